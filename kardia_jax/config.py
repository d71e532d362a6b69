"""One tree of frozen dataclasses: every default and every check lives here and nowhere else.

Rooms are handed the part that they need, never the root. A config file is Python with ``get_config() -> Config``;
``kardia VERB FILE --part.field value`` overrides it. The docstring under a field is its ``--help``.
"""

import dataclasses
import json
import pathlib
from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A value that cannot work: names the field, what was wanted, what came and what to do."""

    def __init__(self, name: str, wanted: str, came: object, fix: str = ""):
        super().__init__(f"{name}: wanted {wanted}, got {came!r}." + (f" {fix}" if fix else ""))


def _require(condition: bool, name: str, wanted: str, came: object, fix: str = "") -> None:
    if not condition:
        raise ConfigError(name, wanted, came, fix)


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

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**31, "run.seed", "an integer in [0, 2^31)", self.seed)
        _require(self.save_every >= 1, "run.save_every", "at least 1", self.save_every)
        _require(self.keep_checkpoints >= 1, "run.keep_checkpoints", "at least 1", self.keep_checkpoints)
        _require(self.log_rollouts >= -1, "run.log_rollouts", "-1 (all), 0 or more", self.log_rollouts)


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
        _require(bool(self.source), "data.source", "mini, a file, a folder or a Hub id", self.source)
        _require(self.max_prompt_tokens >= 8, "data.max_prompt_tokens", "at least 8", self.max_prompt_tokens)
        for name in ("train_limit", "test_limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"data.{name}", "none or at least 1", value)


@dataclass(frozen=True)
class ModelConfig:
    """Which policy to start from."""

    source: str = "tiny-qwen3"
    """Name of a built-in random model (see `kardia doctor`), or a local Hugging Face directory."""
    tokenizer: str = "mini"
    """`mini` (the shipped tokenizer), or a local directory; ignored where the model's own directory has one."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Compute type; auto is bfloat16 on accelerators and float32 on CPU. Master parameters are always float32."""
    remat: Literal["none", "block", "dots"] = "block"
    """What the backward pass recomputes: nothing, every block, or everything but the blocks' matrix products."""
    head_chunk: int = 1024
    """Completion tokens per slice of the LM head in the learner: memory is head_chunk x vocabulary floats."""

    def __post_init__(self) -> None:
        _require(self.head_chunk >= 1, "model.head_chunk", "at least 1", self.head_chunk)


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

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "sampler.temperature", "0 (greedy) or more", self.temperature)
        _require(self.top_k >= 0, "sampler.top_k", "0 (off) or more", self.top_k)
        _require(0 < self.top_p <= 1, "sampler.top_p", "a number in (0, 1]", self.top_p)
        _require(0 <= self.min_p < 1, "sampler.min_p", "a number in [0, 1)", self.min_p)
        _require(self.max_new_tokens >= 1, "sampler.max_new_tokens", "at least 1", self.max_new_tokens)


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
            _require(getattr(self, name) >= 0, f"rewards.{name}", "0 or more", getattr(self, name))
        total = self.format + self.emotion + self.rubric
        _require(total > 0, "rewards", "at least one weight above 0", dataclasses.asdict(self))


@dataclass(frozen=True)
class JudgeConfig:
    """Who marks the rubric, and what its silence means."""

    kind: Literal["rules"] = "rules"
    """`rules`: the embedded, deterministic stand-in for an LLM judge."""
    max_failure_share: float = 0.5
    """The run stops when more than this share of one step's verdicts is missing."""
    min_valid: int = 2
    """A group with fewer verdicts than this is left out of the update."""

    def __post_init__(self) -> None:
        share = self.max_failure_share
        _require(0 <= share <= 1, "judge.max_failure_share", "a share in [0, 1]", share)
        _require(self.min_valid >= 1, "judge.min_valid", "at least 1", self.min_valid)


@dataclass(frozen=True)
class AdvantageConfig:
    """From rewards to advantages."""

    scale: Literal["group", "batch", "none", "rloo", "reinforce_pp", "gdpo", "maxrl", "opo"] = "group"
    """What a centred reward is divided by: `group` the group's std (GRPO), `batch` the batch's (Lite-PPO),
    `none` nothing (Dr. GRPO), `rloo` (G-1)/G, `reinforce_pp` the std of all centred rewards (REINFORCE++ with
    baseline), `gdpo` each reward term by its own std, `maxrl` the mean, `opo` nothing, with a length-weighted
    baseline."""
    epsilon: float = 1e-4
    """Added to a std before the division (TRL and ms-swift 1e-4, AReaL 1e-5, verl 1e-6, the paper 0)."""
    min_spread: float = 0.0
    """A group whose largest minus smallest reward is below this gets advantage 0: judge noise on near-ties is
    not blown up to a full-size update. With gdpo it holds per term. Groups of equal rewards always get 0."""

    def __post_init__(self) -> None:
        _require(self.epsilon >= 0, "grpo.advantage.epsilon", "0 or more", self.epsilon)
        _require(self.min_spread >= 0, "grpo.advantage.min_spread", "0 (off) or more", self.min_spread)


@dataclass(frozen=True)
class LossConfig:
    """The policy-gradient objective: a preset by name, and fields that replace its parts."""

    name: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo", "sapo", "luspo", "vespo"] = "grpo"
    """Which published loss: it fixes the policy term, the ratio's level, the average and the clip range."""
    importance: Literal["auto", "token", "sequence", "sequence_token"] = "auto"
    """Level of the ratio: per token, one per completion (geometric mean), or `sequence_token` (value of the
    completion's, gradient of the token's; GSPO-token). auto is sequence for gspo and luspo, else token."""
    aggregation: Literal[
        "auto", "sequence_mean", "token_mean", "micro_batch_mean", "fixed_length", "sequence_sum"
    ] = "auto"
    """How token losses become one number; auto is the preset's (grpo, gspo, sapo: sequence_mean; dapo, cispo,
    vespo: token_mean; bnpo: micro_batch_mean; dr_grpo: fixed_length; luspo: sequence_sum)."""
    clip_low: float | None = None
    """The ratio is clipped below at 1 - this; none is 0.2 (gspo 3e-4, luspo 2e-3)."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 + this; none is 0.2 (dapo 0.28, gspo 4e-4, luspo 2.5e-3). With
    `cispo_clip` cap it is the largest weight itself; none is 5."""
    delta: float | None = None
    """Upper bound of the ratio for negative advantages too, where clipping leaves it free (INTELLECT-2)."""
    dual_clip: float | None = None
    """With a negative advantage A the loss of a token is at most -dual_clip x A."""
    cispo_clip: Literal["cap", "band"] = "cap"
    """CISPO's weight: min(ratio, clip_high) (TRL), or the ratio in [1 - clip_low, 1 + clip_high] (verl)."""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """SAPO's gate for positive advantages, and for all others."""
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    """VESPO's (k, lambda) for advantages of 0 and more."""
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    """VESPO's (k, lambda) for negative advantages."""
    beta: float = 0.04
    """Weight of the KL to the reference; 0 needs none. The paper is silent: this is ms-swift's default."""
    kl: Literal["k1", "k2", "k3", "k3_unbiased", "k3_unbiased_token", "k3+"] = "k3_unbiased"
    """Estimator: k3_unbiased is ratio x k3, the ratio at the loss's own level (TRL 1.16.0); k3_unbiased_token
    takes the token's ratio whatever the level; k3+ has the value of k3 and the gradient of k2."""
    kl_clamp: Literal["none", "verl", "openrlhf"] = "none"
    """Bounds in nats: none (TRL); log-ratio 20 and estimate 10 (verl, ms-swift); estimate 10 (OpenRLHF)."""
    kl_order: Literal["weight_then_kl", "kl_then_weight"] = "weight_then_kl"
    """weight x policy term + beta KL (TRL), or weight x (policy term + beta KL) (ms-swift)."""
    correction: Literal[
        "none",
        "token_tis",
        "token_mis",
        "sequence_tis",
        "sequence_mis",
        "geometric_tis",
        "geometric_mis",
        "icepop",
    ] = "none"
    """Weight against sampler and learner disagreeing: old / sampler probability per token, as the product
    or as the geometric mean over a completion; tis cuts it to the bounds, mis and icepop drop what lies
    outside."""
    correction_cap: float = 3.0
    """Upper bound of that weight."""
    correction_floor: float = 0.0
    """Lower bound of that weight."""
    off_policy_threshold: float | None = None
    """A completion with a negative advantage leaves the policy term when its mean log-prob has fallen by more
    than this (nats per token) since it was sampled (DeepSeek-V3.2); none keeps all."""
    top_entropy: float = 1.0
    """Share of the tokens, those of highest entropy, that feel the policy term; 1 is all."""
    mask_truncated: bool = False
    """Completions that ran out of tokens leave the loss."""
    overlong_buffer: int = 0
    """Last tokens of the budget, in which the reward falls linearly to -1 (DAPO); 0 is off."""
    empty_rows: Literal["count", "skip"] = "count"
    """Whether rows without a single kept token count in averages over rows (TRL), or not (verl, OpenRLHF)."""

    def __post_init__(self) -> None:
        self._check_level()
        self._check_clip()
        self._check_correction()
        self._need("beta", self.beta >= 0, "0 (no KL) or more")
        self._need("top_entropy", 0 < self.top_entropy <= 1, "a share in (0, 1]")
        self._need("overlong_buffer", self.overlong_buffer >= 0, "0 (off) or more tokens")
        drift = self.off_policy_threshold
        self._need("off_policy_threshold", drift is None or drift >= 0, "none, or 0 or more")
        for name in ("sapo_temperatures", "vespo_positive", "vespo_negative"):
            self._need(name, min(getattr(self, name)) > 0, "two numbers above 0")

    def _need(self, name: str, holds: bool, wanted: str, fix: str = "") -> None:
        _require(holds, f"grpo.loss.{name}", wanted, getattr(self, name), fix)

    def _check_level(self) -> None:
        level, by = self.importance, f"with name {self.name}"
        if self.name in ("cispo", "sapo"):
            fix = "It weighs every token by itself; for one ratio per completion use name gspo."
            self._need("importance", level in ("auto", "token"), f"auto or token {by}", fix)
        if self.name == "vespo":
            fix = "It always weighs the whole completion, by the product of its ratios."
            self._need("importance", level == "auto", f"auto {by}", fix)
        if self.name == "gspo":
            fix = "For one ratio per token use name grpo."
            self._need("importance", level != "token", f"auto, sequence or sequence_token {by}", fix)

    def _check_clip(self) -> None:
        by, capped = f"with name {self.name}", self.name == "cispo" and self.cispo_clip == "cap"
        for name in ("clip_low", "clip_high", "delta", "dual_clip"):
            bound, second = getattr(self, name), name in ("delta", "dual_clip")
            without = ("cispo", "sapo", "vespo") if second else ("sapo", "vespo")
            least = 1 if second else 0
            self._need(name, bound is None or self.name not in without, f"none {by}", "Leave it unset.")
            self._need(name, bound is None or bound > least, f"none or more than {least}")
        self._need("clip_low", self.clip_low is None or self.clip_low <= 1, "none or at most 1")
        known = self.cispo_clip == "cap" or self.name == "cispo"
        self._need("cispo_clip", known, f"cap {by}", "Use name cispo.")
        if capped:
            fix = "Here it is the largest weight itself (5.0); for 1 + clip_high set cispo_clip to band."
            self._need("clip_high", self.clip_high is None or self.clip_high >= 1, "none or at least 1", fix)
            fix = "A cap has no lower bound; set cispo_clip to band for one."
            self._need("clip_low", self.clip_low is None, "none with cispo_clip cap", fix)

    def _check_correction(self) -> None:
        cap, floor = self.correction_cap, self.correction_floor
        fix = "Weight 1, sampler and learner agreeing, must lie within the bounds."
        self._need("correction_cap", cap >= 1, "at least 1", fix)
        self._need("correction_floor", 0 <= floor <= 1, f"in [0, 1], below correction_cap = {cap}", fix)
        fix = "IcePop is a band, 0.5 to 5.0 in its paper; for an upper bound alone use token_mis."
        banded = self.correction != "icepop" or floor > 0
        self._need("correction_floor", banded, "more than 0 with correction icepop", fix)
        fix = "VESPO takes weights of tokens into its own: use none, token_tis, token_mis or icepop."
        per_token = not self.correction.startswith(("sequence", "geometric"))
        self._need("correction", per_token or self.name != "vespo", "one per token with name vespo", fix)

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Where the ratio is clipped: (1 - clip_low, 1 + clip_high), the preset's own numbers for none."""
        if self.name in ("sapo", "vespo"):
            return 0.0, float("inf")
        if self.name == "cispo" and self.cispo_clip == "cap":
            return 0.0, 5.0 if self.clip_high is None else self.clip_high
        ranges = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "luspo": (2e-3, 2.5e-3)}
        low, high = ranges.get(self.name, (0.2, 0.2))
        low = low if self.clip_low is None else self.clip_low
        high = high if self.clip_high is None else self.clip_high
        return 1 - low, 1 + high


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping and a schedule, by optax."""

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

    def __post_init__(self) -> None:
        rate = self.learning_rate
        _require(rate >= 0, "optimizer.learning_rate", "0 or more", rate)
        for name in ("warmup_share", "final_share"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name}", "a share in [0, 1]", getattr(self, name))
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", "in [0, 1)", getattr(self, name))
        _require(self.clip_norm >= 0, "optimizer.clip_norm", "0 (never) or more", self.clip_norm)
        _require(self.max_bad_steps >= 1, "optimizer.max_bad_steps", "at least 1", self.max_bad_steps)


@dataclass(frozen=True)
class SftConfig:
    """Supervised warm start."""

    epochs: float = 2.0
    """Passes over the training dialogues."""
    batch: int = 128
    """Conversations in one update; each brings one example per assistant turn, and all share its prompt."""
    micro_batches: int = 1
    """Slices of a batch whose gradients are added before the update; lowers memory, changes nothing else."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "sft.epochs", "more than 0", self.epochs)
        _require(self.batch >= 1, "sft.batch", "at least 1", self.batch)
        _check_split("sft", self.batch, self.micro_batches)


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
    micro_batches: int = 1
    """Slices of a minibatch whose gradients are added before the update."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(temperature=0.9))
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _require(self.steps is None or self.steps >= 1, "grpo.steps", "none or at least 1", self.steps)
        _require(self.epochs > 0, "grpo.epochs", "more than 0", self.epochs)
        _require(self.prompts >= 1, "grpo.prompts", "at least 1", self.prompts)
        _require(self.group >= 1, "grpo.group", "at least 1", self.group)
        _require(self.passes >= 1, "grpo.passes", "at least 1", self.passes)
        fix = "Pick a divisor of grpo.prompts."
        divides = self.minibatches >= 1 and self.prompts % self.minibatches == 0
        _require(divides, "grpo.minibatches", f"a divisor of grpo.prompts = {self.prompts}", self.minibatches, fix)
        _check_split("grpo", self.prompts // self.minibatches, self.micro_batches)
        fix = "Greedy completions of one prompt are all alike; set grpo.sampler.temperature above 0."
        _require(self.sampler.temperature > 0, "grpo.sampler.temperature", "more than 0", 0.0, fix)


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
        _require(self.batch >= 1, "eval.batch", "at least 1", self.batch)
        _require(self.samples >= 1, "eval.samples", "at least 1", self.samples)


@dataclass(frozen=True)
class Config:
    """Everything a run can be told."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def _check_split(part: str, rows: int, micro_batches: int) -> None:
    fix = f"Pick a divisor of {rows}."
    divides = micro_batches >= 1 and rows % micro_batches == 0
    _require(divides, f"{part}.micro_batches", f"a divisor of the batch = {rows}", micro_batches, fix)


def to_json(config: Any) -> str:
    """The resolved config as it is saved beside every checkpoint."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field to value, in order: {"run.seed": 0, ...}."""
    out: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        out |= flat(value, f"{prefix}{item.name}.") if dataclasses.is_dataclass(value) else {prefix + item.name: value}
    return out
