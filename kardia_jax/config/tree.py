"""One tree of frozen dataclasses: every default and every check lives here and nowhere else.

Rooms are handed the part that they need, never the root. A config file is Python with ``get_config() -> Config``;
``kardia VERB FILE --part.field value`` overrides it. The docstring under a field is its ``--help``.
"""

import dataclasses
import pathlib
from dataclasses import dataclass, field
from typing import Literal

from kardia_jax.config.errors import check_choices, require
from kardia_jax.config.hosts import HostsConfig
from kardia_jax.config.judge import JudgeConfig
from kardia_jax.config.lora import LoraConfig
from kardia_jax.config.mesh import MeshConfig
from kardia_jax.config.objective import AdvantageConfig, LossConfig


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how often it reports and saves."""

    dir: pathlib.Path = pathlib.Path("runs/default")
    """Folder of this run: checkpoints, metrics.jsonl, rollouts.jsonl, config.json."""
    seed: int = 0
    """Root of every random key."""
    resume: bool = False
    """Go on from the newest complete checkpoint in the folder; without it a folder that has one is refused."""
    save_every: int = 50
    """Updates between checkpoints (one is always written at the end)."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    log_rollouts: int = 1
    """Groups per step written to rollouts.jsonl; 0 writes none, -1 all."""
    console: bool = True
    """Live progress on the terminal; the JSONL metrics are written either way."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where metrics go besides metrics.jsonl; needs the extra `track`."""
    compilation_cache: str = "auto"
    """Folder in which the command line keeps compiled programs, so that the next run loads them. auto: the one that
    JAX_COMPILATION_CACHE_DIR names, else one in the user's cache folder; off: compile anew."""

    auto_resume: bool = False
    """Go on from the newest complete checkpoint if there is one, and begin otherwise: for jobs that are started again
    by a scheduler."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "run.seed", "an integer in [0, 2^31)", self.seed)
        require(self.save_every >= 1, "run.save_every", "at least 1", self.save_every)
        require(self.keep_checkpoints >= 1, "run.keep_checkpoints", "at least 1", self.keep_checkpoints)
        fix = "Give auto, a folder, or off."
        require(bool(self.compilation_cache), "run.compilation_cache", "a folder", self.compilation_cache, fix)
        require(self.log_rollouts >= -1, "run.log_rollouts", "-1 (all), 0 or more", self.log_rollouts)


@dataclass(frozen=True)
class DataConfig:
    """Which dialogues, and how they become prompts."""

    source: str = "mini"
    """`mini` (the shipped synthetic set), a .jsonl or .parquet file (it serves both splits), a folder holding
    train.* and test.*, or a Hub id."""
    bad_rows: Literal["skip", "fatal"] = "fatal"
    """What a row that does not fit the schema does: stop the run, or be reported, counted and left out."""
    system_prompt: pathlib.Path | None = None
    """Text file that replaces the built-in system prompt; it may use {profile}, {situation} and {emotions}."""
    history: Literal["reply", "spans"] = "reply"
    """Earlier assistant turns in the prompt: the reply alone (what the user saw), or all four spans as in the row."""
    max_prompt_tokens: int = 1024
    """Longest prompt; see long_prompts."""
    long_prompts: Literal["fatal", "skip"] = "fatal"
    """What a longer prompt does: stop the run with its row, or be counted and left out."""
    train_limit: int | None = None
    """Use only the first so many good training dialogues, in file order; rows beyond are not read."""
    test_limit: int | None = None
    """The same for test dialogues."""

    def __post_init__(self) -> None:
        require(bool(self.source), "data.source", "mini, a file, a folder or a Hub id", self.source)
        require(self.max_prompt_tokens >= 8, "data.max_prompt_tokens", "at least 8", self.max_prompt_tokens)
        for name in ("train_limit", "test_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}", "none or at least 1", value)


@dataclass(frozen=True)
class ModelConfig:
    """Which policy to start from."""

    source: str = "tiny-qwen3"
    """Name of a built-in random model (see `kardia doctor`), a local Hugging Face directory or a GGUF file."""
    tokenizer: str = "mini"
    """`mini` (the shipped tokenizer), or a local directory; ignored where the model's own directory has one."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Compute type; auto is bfloat16 on accelerators and float32 on CPU. Master parameters are always float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Who computes attention of prompts and whole completions; auto takes cudnn on NVIDIA GPUs and splash on TPUs for
    the layers that these can do, xla for the rest. A kernel that is named and cannot do a layer is an error."""
    remat: Literal["none", "block", "dots"] = "block"
    """What the backward pass recomputes: nothing, every block, or everything but the blocks' matrix products and
    attention."""
    head_chunk: int = 1024
    """Completion tokens per slice of the LM head in the learner; slices of padding alone are skipped."""
    vocab_chunk: int = 0
    """Rows of the vocabulary per slice: memory is head_chunk x vocab_chunk floats. 0 is what was fastest: 1024 on CPU,
    where a slice then fits its cache, and all of them elsewhere."""
    unroll: int = 1
    """Blocks per trip of the scan over layers: more saves copies of activations and compiles longer."""
    adapter: pathlib.Path | None = None
    """PEFT directory of a LoRA adapter to go on from; its own config names rank, alpha, targets and dropout."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        fix = "Leave it out: the adapter's own config names rank, alpha, targets and dropout."
        require(
            self.adapter is None or self.lora.rank == 0, "model.lora.rank", "0 with model.adapter", self.lora.rank, fix
        )
        frozen, base = self.lora.rank > 0 or self.adapter is not None, self.lora.base
        fix = "Parameters that are trained are float32; set model.lora.rank, or model.dtype for the arithmetic."
        require(frozen or base == "float32", "model.lora.base", "float32 without an adapter", base, fix)
        require(self.head_chunk >= 1, "model.head_chunk", "at least 1", self.head_chunk)
        require(self.vocab_chunk >= 0, "model.vocab_chunk", "0 (chosen by platform) or more", self.vocab_chunk)
        require(self.unroll >= 1, "model.unroll", "at least 1", self.unroll)


@dataclass(frozen=True)
class SamplerConfig:
    """How completions are drawn."""

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most likely token. The learner divides by the same number."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    max_new_tokens: int = 512
    """Token budget of a completion."""
    rows: int = 0
    """Most completions decoded at once, in whole groups; waiting prompts take the place of groups that are done; 0 is
    all."""
    kv_dtype: Literal["compute", "bfloat16", "int8"] = "compute"
    """Type of the keys and values that are kept; the learner's stay in the compute type."""
    weights_dtype: Literal["compute", "int8"] = "compute"
    """Type of the sampler's copy of the blocks' kernels, with which completions are decoded; int8 has one scale per
    output. Prompts are run with the learner's own."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "sampler.temperature", "0 (greedy) or more", self.temperature)
        require(self.top_k >= 0, "sampler.top_k", "0 (off) or more", self.top_k)
        require(0 < self.top_p <= 1, "sampler.top_p", "a number in (0, 1]", self.top_p)
        require(0 <= self.min_p < 1, "sampler.min_p", "a number in [0, 1)", self.min_p)
        require(self.max_new_tokens >= 1, "sampler.max_new_tokens", "at least 1", self.max_new_tokens)
        require(self.rows >= 0, "sampler.rows", "0 (all) or more", self.rows)


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the three terms; the paper gives each one third. They are normalised to sum to one."""

    format: float = 1 / 3
    """All four spans present, in order, not empty (0 or 1)."""
    emotion: float = 1 / 3
    """The label is the dialogue's (0 or 1)."""
    rubric: float = 1 / 3
    """The judge's five marks, weighted and mapped from [1, 5] to [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("format", "emotion", "rubric"):
            require(getattr(self, name) >= 0, f"rewards.{name}", "0 or more", getattr(self, name))
        total = self.format + self.emotion + self.rubric
        require(total > 0, "rewards", "at least one weight above 0", dataclasses.asdict(self))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for matrices beside it, with clipping and a schedule, by optax."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after the warm-up."""
    warmup_share: float = 0.05
    """Share of the updates spent warming up from 0."""
    final_share: float = 0.0
    """Last learning rate as a share of the peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are left out."""
    clip_norm: float = 1.0
    """Global gradient norm above which the gradient is scaled down; 0 never clips."""
    max_bad_steps: int = 5
    """Updates in a row with a gradient that is not finite before the run stops."""
    muon_learning_rate: float | None = None
    """Peak learning rate of Muon, which then trains the blocks' matrices and leaves the rest to Adam; none is off."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the first moment is kept between updates; bfloat16 saves 2 bytes a parameter. The second moment
    is always float32."""
    offload: bool = False
    """Keep the moments in pinned host memory between updates: saves up to 8 bytes a parameter on the device while
    gradients are computed, and costs two transfers an update."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        require(rate >= 0, "optimizer.learning_rate", "0 or more", rate)
        muon = self.muon_learning_rate
        require(muon is None or muon >= 0, "optimizer.muon_learning_rate", "none, 0 or more", muon)
        for name in ("warmup_share", "final_share"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name}", "a share in [0, 1]", getattr(self, name))
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", "in [0, 1)", getattr(self, name))
        require(self.clip_norm >= 0, "optimizer.clip_norm", "0 (never) or more", self.clip_norm)
        require(self.epsilon > 0, "optimizer.epsilon", "more than 0", self.epsilon)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "0 or more", self.weight_decay)
        require(self.max_bad_steps >= 1, "optimizer.max_bad_steps", "at least 1", self.max_bad_steps)


@dataclass(frozen=True)
class SftConfig:
    """Supervised warm start."""

    epochs: float = 2.0
    """Passes over the training dialogues."""
    batch: int = 128
    """Conversations in one update; each brings one example per assistant turn, and all share its prompt."""
    micro_batches: int = 1
    """Slices of a batch whose gradients are added before the update; lowers memory, changes nothing else."""
    tokens_per_micro_batch: int | None = None
    """Instead of equal slices: conversations sorted by length and cut so that a slice has at most so many tokens
    (padded prompt + answers x padded answer, over its conversations), each padded for itself; none is off."""
    length_window: int = 16
    """Batches drawn together, so that conversations of like length share one and less is padded; 1 is off."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))

    def __post_init__(self) -> None:
        require(self.epochs > 0, "sft.epochs", "more than 0", self.epochs)
        require(self.batch >= 1, "sft.batch", "at least 1", self.batch)
        require(self.length_window >= 1, "sft.length_window", "at least 1", self.length_window)
        _check_split("sft", self.batch, self)


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimisation."""

    steps: int | None = None
    """Rollout steps; none means `epochs` passes over the prompts."""
    epochs: float = 2.0
    """Passes over the prompts when `steps` is none."""
    prompts: int = 4
    """Prompts per step (P)."""
    group: int = 8
    """Completions per prompt (G). The paper's batch of 32 is read as 4 prompts x 8."""
    minibatches: int = 1
    """Updates in one pass over the rollouts; each takes prompts / minibatches groups."""
    passes: int = 1
    """Passes over the same rollouts."""
    lag: int = 0
    """Steps that the sampler is ahead of the learner: with 1 the next step is sampled while this one is judged, and
    rollouts are one step old when they are learned from (importance ratios account for it)."""
    old_logprobs: Literal["score", "sampler"] = "score"
    """Where an update with other weights than those that sampled takes the sampling weights' log-probs from: a pass of
    the learner's own program before the first update, or what the sampler recorded (no pass; rounding differs)."""
    micro_batches: int = 1
    """Slices of a minibatch whose gradients are added before the update."""
    tokens_per_micro_batch: int | None = None
    """Instead of equal slices: groups sorted by length and cut so that a slice has at most so many tokens (padded
    prompt + group x padded completion, over its groups), each padded for itself; none is off."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(temperature=0.9))
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    offload_reference: bool = False
    """Keep the reference policy (`loss.beta` above 0) in pinned host memory: saves 4 bytes a parameter on the device
    outside its own pass, and costs one transfer a step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, "grpo.steps", "none or at least 1", self.steps)
        require(self.epochs > 0, "grpo.epochs", "more than 0", self.epochs)
        require(self.prompts >= 1, "grpo.prompts", "at least 1", self.prompts)
        require(self.group >= 2, "grpo.group", "at least 2: a group of one has nothing to compare", self.group)
        require(self.passes >= 1, "grpo.passes", "at least 1", self.passes)
        require(self.lag in (0, 1), "grpo.lag", "0 or 1", self.lag)
        fix = "Pick a divisor of grpo.prompts."
        divides = self.minibatches >= 1 and self.prompts % self.minibatches == 0
        require(divides, "grpo.minibatches", f"a divisor of grpo.prompts = {self.prompts}", self.minibatches, fix)
        _check_split("grpo", self.prompts // self.minibatches, self)
        fix = "Shorten it or raise grpo.sampler.max_new_tokens."
        budget, buffer = self.sampler.max_new_tokens, self.loss.overlong_buffer
        require(buffer <= budget, "grpo.loss.overlong_buffer", f"at most the token budget = {budget}", buffer, fix)
        fix = "GDPO reads the reward terms alone; use another scale, or overlong_buffer 0."
        deaf = self.advantage.scale == "gdpo" and self.loss.overlong_buffer > 0
        require(
            not deaf,
            "grpo.loss.overlong_buffer",
            "0 with advantage.scale gdpo",
            self.loss.overlong_buffer,
            fix,
        )
        rows, fix = self.sampler.rows, "A group is never split."
        require(
            rows == 0 or rows >= self.group, "grpo.sampler.rows", f"0 or at least grpo.group = {self.group}", rows, fix
        )
        fix = "Greedy completions of one prompt are all alike; set grpo.sampler.temperature above 0."
        require(self.sampler.temperature > 0, "grpo.sampler.temperature", "more than 0", 0.0, fix)

    @property
    def off_policy(self) -> bool:
        """Whether some update is made with other weights than those that sampled: the ratio is then not 1."""
        return self.lag > 0 or self.minibatches * self.passes > 1


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(temperature=0.0))
    """Greedy by default, as in the published demos."""
    batch: int = 64
    """Prompts answered at once."""
    samples: int = 1
    """Completions per prompt."""
    turns: Literal["all", "last"] = "all"
    """Which assistant turns of a test dialogue are answered."""

    def __post_init__(self) -> None:
        require(self.batch >= 1, "eval.batch", "at least 1", self.batch)
        require(self.samples >= 1, "eval.samples", "at least 1", self.samples)


@dataclass(frozen=True)
class Config:
    """Everything a run can be told."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        self.model.lora.check_used()
        adapting = self.model.lora.rank > 0 or self.model.adapter is not None
        for part, optimizer in (("sft", self.sft.optimizer), ("grpo", self.grpo.optimizer)):
            muon = optimizer.muon_learning_rate
            fix = "Muon trains whole matrices; adapters are left to AdamW."
            allowed = muon is None or not adapting
            require(allowed, f"{part}.optimizer.muon_learning_rate", "none with an adapter", muon, fix)
        fix = "The reference of an adapter is the frozen base, which the policy reads as well."
        offload = self.grpo.offload_reference
        require(not (offload and adapting), "grpo.offload_reference", "False with an adapter", offload, fix)
        least, group = self.judge.min_valid, self.grpo.group
        require(
            least <= group, "judge.min_valid", f"at most grpo.group = {group}", least, "Every group would be left out."
        )


def _check_split(part: str, rows: int, config: SftConfig | GrpoConfig) -> None:
    parts, tokens = config.micro_batches, config.tokens_per_micro_batch
    fix = f"Pick a divisor of {rows}."
    divides = parts >= 1 and rows % parts == 0
    require(divides, f"{part}.micro_batches", f"a divisor of the batch = {rows}", parts, fix)
    require(tokens is None or tokens >= 1, f"{part}.tokens_per_micro_batch", "none or at least 1", tokens)
    fix = "The budget decides how many there are."
    alone = tokens is None or parts == 1
    require(alone, f"{part}.micro_batches", f"1 with {part}.tokens_per_micro_batch", parts, fix)
