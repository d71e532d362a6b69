"""The objective of GRPO: from rewards to advantages, and from advantages to a loss."""

from dataclasses import dataclass
from typing import Literal

from kardia_jax.config.errors import require


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
        require(self.epsilon >= 0, "grpo.advantage.epsilon", "0 or more", self.epsilon)
        require(self.min_spread >= 0, "grpo.advantage.min_spread", "0 (off) or more", self.min_spread)


@dataclass(frozen=True)
class LossConfig:
    """The policy-gradient objective: a preset by name, and fields that replace its parts."""

    name: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo", "sapo", "luspo", "vespo"] = "grpo"
    """Which published loss: it fixes the policy term, the ratio's level, the average and the clip range."""
    importance: Literal["auto", "token", "sequence", "sequence_token"] = "auto"
    """Level of the ratio: per token, one per completion (geometric mean), or `sequence_token` (value of the
    completion's, gradient of the token's; GSPO-token). auto is sequence for gspo and luspo, else token."""
    aggregation: Literal["auto", "sequence_mean", "token_mean", "micro_batch_mean", "fixed_length", "sequence_sum"] = (
        "auto"
    )
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
        require(holds, f"grpo.loss.{name}", wanted, getattr(self, name), fix)

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
