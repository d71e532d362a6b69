"""Steps of Tunix's GRPOLearner on the workload of ``kardia bench step``, by phase.

Made for google-tunix 0.1.7 and checkpoints of the Llama and Qwen2 families. Its Llama model does not read
``rope_theta``, which is mended here; its ``vanilla`` sampler is used, as the others need another engine. Micro-batches
count prompts (--micro-prompts). update is what a step takes beside the other two: loss, gradient and optimizer, and
rewards and advantages, which take milliseconds.
"""

import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import parser, report, timed
from flax import nnx
from tokenizers import Tokenizer
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.models.qwen2 import model as qwen
from tunix.models.qwen2 import params as qwen_params
from tunix.rl import rl_cluster, rl_learner
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.inference import inference_worker
from tunix.rl.rollout import base_rollout, vanilla_rollout

FAMILIES = {"llama": (llama, llama_params, "weight_tying"), "qwen2": (qwen, qwen_params, "use_tied_embedding")}


class ExactPrompts:
    """A tokenizer for which the prompt "7" is the ids from position 7 on, exactly as many as asked."""

    def __init__(self, folder: pathlib.Path, length: int):
        self.inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.length = length
        self.ids = self.inner.encode("I have been so tired of all of it, and you are the one I talk to. " * length).ids

    def encode(self, text: str, **_: object) -> list[int]:
        start = int(text)
        return self.ids[start : start + self.length]

    def decode(self, ids, **_: object) -> str:
        return self.inner.decode([int(one) for one in ids])

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return 0


def model_of(folder: pathlib.Path, mesh, dtype: str):
    """Tunix's model with the checkpoint's parameters in float32, computing in ``dtype`` where it can."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in FAMILIES:
        raise SystemExit(f"model: wanted a family of {', '.join(FAMILIES)}, got {config['model_type']}")
    module, params, tied = FAMILIES[config["model_type"]]
    heads = config["num_attention_heads"]
    theta = int(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    if module is llama:
        llama.apply_rope.__defaults__ = (theta,)
    spec = module.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=theta,
        norm_eps=config["rms_norm_eps"],
        **{tied: bool(config["tie_word_embeddings"])},
    )
    return params.create_model_from_safe_tensors(str(folder), spec, mesh, dtype=jnp.dtype(dtype))


def reward(prompts, completions, **_: object) -> list[float]:
    """Numbers that differ within a group."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def cluster_of(args, folder: pathlib.Path) -> rl_cluster.RLCluster:
    """Actor, reference and rollout on one device."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    role = rl_cluster.Role
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6)),
        eval_every_n_steps=10**6,
        max_steps=1 + args.steps,
        mini_batch_size=args.prompts,
        train_micro_batch_size=args.micro_prompts,
        rollout_micro_batch_size=args.prompts,
        compute_logps_micro_batch_size=args.prompts,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=args.new_tokens,
        max_prompt_length=args.prompt_len,
        kv_cache_size=args.prompt_len + args.new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        eos_tokens=[-1],
    )
    return rl_cluster.RLCluster(
        actor=model_of(folder, mesh, args.dtype),
        reference=model_of(folder, mesh, args.dtype) if args.beta > 0 else None,
        tokenizer=ExactPrompts(folder, args.prompt_len),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=training,
            rollout_config=rollout,
        ),
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--micro-prompts", type=int, default=1, help="prompts in one slice of the update")
    args = made.parse_args()
    rollouts, references, steps, seen, totals = [], [], [], [], [(0.0, 0.0)]

    def lengths_seen(result) -> None:
        prompts = np.asarray(result.left_padded_prompt_tokens)
        seen.append((prompts.shape[1], min(len(row) for row in result.tokens)))

    vanilla, worker = vanilla_rollout.VanillaRollout, inference_worker.InferenceWorker
    vanilla.generate = timed(rollouts, vanilla.generate, lengths_seen)
    worker.get_ref_per_token_logps = timed(references, worker.get_ref_per_token_logps, jax.block_until_ready)
    cluster = cluster_of(args, pathlib.Path(args.model))

    def updated(_) -> None:
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
        totals.append((sum(rollouts), sum(references)))

    learner = rl_learner.RLLearner
    learner._run_global_step = timed(steps, learner._run_global_step, updated)
    data = [
        {"prompts": np.array([str(step * args.prompts + place) for place in range(args.prompts)])}
        for step in range(1 + args.steps)
    ]
    config = GRPOConfig(num_generations=args.group, num_iterations=1, beta=args.beta, epsilon=0.2)
    GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward).train(data)
    # A step may call either more than once, for a few prompts at a time.
    parts = np.diff(totals, axis=0).T.tolist()
    phases = dict(zip(("rollout", "reference"), parts, strict=True))
    phases["update"] = [step - sum(others) for step, *others in zip(steps, *parts, strict=True)]
    names = ("google-tunix", "jax", "flax")
    versions = {name: importlib.metadata.version(name) for name in names}
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    report(phases, seen[-1], versions, peak)


if __name__ == "__main__":
    main()
