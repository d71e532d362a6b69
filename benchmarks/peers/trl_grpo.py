"""Steps of TRL's GRPOTrainer on the workload of ``kardia bench step``, by phase.

rollout is `_generate`; reference is what `_generate_and_score_completions` does beside it (log-probs of the reference,
rewards, advantages); update is the rest of the step: loss, gradient and optimizer.

Made for trl 1.16.0, whose default is float32 parameters and, for bfloat16, autocast (--weights float32).
"""

import tempfile
import time

import torch
import transformers
import trl
from common import parser, report, text_of, timed
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepClock(TrainerCallback):
    """Seconds of every optimizer step, its micro-batches included."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronise(None)
        self.times.append(time.perf_counter() - self.began)


def synchronise(_: object) -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reward(completions: list[str], **_: object) -> list[float]:
    """Numbers that differ within a group."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def settings(args, out: str) -> GRPOConfig:
    """Completions of forced length, one update a step, nothing written."""
    return GRPOConfig(
        output_dir=out,
        per_device_train_batch_size=args.prompts * args.group // args.micro_batches,
        gradient_accumulation_steps=args.micro_batches,
        num_generations=args.group,
        max_completion_length=args.new_tokens,
        generation_kwargs={"min_new_tokens": args.new_tokens},
        beta=args.beta,
        learning_rate=1e-6,
        max_steps=1 + args.steps,
        bf16=args.dtype == "bfloat16",
        fp16=False,
        gradient_checkpointing=args.checkpointing,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="type of the parameters")
    made.add_argument("--micro-batches", type=int, default=1, help="slices of a step's completions")
    made.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    args = made.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [text_of(tokenizer, args.prompt_len, seed) for seed in range((1 + args.steps) * args.prompts)]
    generated, scored, seen = [], [], []

    def lengths_seen(result: tuple) -> None:
        synchronise(result)
        prompt_ids, completion_ids = result[:2]
        seen.append((max(map(len, prompt_ids)), min(map(len, completion_ids))))

    GRPOTrainer._generate = timed(generated, GRPOTrainer._generate, lengths_seen)
    GRPOTrainer._generate_and_score_completions = timed(
        scored, GRPOTrainer._generate_and_score_completions, synchronise
    )
    clock = StepClock()
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.weights)),
            reward_funcs=reward,
            args=settings(args, out),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    together = list(zip(generated, scored, clock.times, strict=True))
    phases = {
        "rollout": generated,
        "reference": [both - rollout for rollout, both, _ in together],
        "update": [step - both for _, both, step in together],
    }
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    report(phases, seen[-1], versions, peak)


if __name__ == "__main__":
    main()
