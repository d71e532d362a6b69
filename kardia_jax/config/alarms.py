"""From where on a sign of reward hacking is said aloud."""

from dataclasses import dataclass

from kardia_jax.config.errors import require


@dataclass(frozen=True)
class AlarmConfig:
    """Signs that a policy pleases its judge and nobody else: one line on the console when the mean of the last steps
    goes beyond a threshold, and again only after it has come back. The numbers of every step are in metrics.jsonl under
    `hacking/`. With fewer than about four prompts in a step, replies to one prompt make up a large share of all."""

    window: int = 5
    """Steps whose mean counts."""
    shared_opener: float = 0.6
    """Share of the step's replies that begin with the same three words; above 1 never."""
    shared_closer: float = 0.6
    """Share of the replies that end with the same three words."""
    shared_phrase: float = 0.6
    """Share of the replies in which the same five words in a row stand anywhere."""
    repetition: float = 0.2
    """Mean share of a reply's three-word runs that it has said before."""
    distinct_replies: float = 0.25
    """Different replies over replies; the alarm is below this."""
    length_reward: float = 0.7
    """Correlation of a completion's length with its reward, of either sign."""

    def __post_init__(self) -> None:
        require(self.window >= 1, "judge.alarms.window", "at least 1 step", self.window)
        for name in (
            "shared_opener",
            "shared_closer",
            "shared_phrase",
            "repetition",
            "distinct_replies",
            "length_reward",
        ):
            require(getattr(self, name) >= 0, f"judge.alarms.{name}", "0 or more", getattr(self, name))
