"""When a sign of reward hacking is worth a line on the console: once when it is crossed, not at every step.

In: the metrics of each step (``diagnostics.hacking_signs``, under ``hacking/``) and thresholds. Out: sentences.

>>> alarms = Alarms(AlarmConfig(window=1))
>>> alarms.update({"hacking/shared_closer_share": 0.8})
['hacking/shared_closer_share 0.80 (mean over judge.alarms.window = 1, alarm above 0.6): most replies end ...']
>>> alarms.update({"hacking/shared_closer_share": 0.9})                # still there: said already
[]

The mean over a window is held against the threshold, so that one odd step says nothing; a step without the number (NaN)
is left out of it. An alarm that was given is given again only after the mean has come back below its threshold. A run
that is resumed begins anew.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kardia_jax.config import AlarmConfig


class Sign(NamedTuple):
    """One metric, from where on it is suspicious, and what it means."""

    metric: str
    threshold: Callable[[AlarmConfig], float]
    below: bool
    """Whether low values are the suspicious ones."""
    means: str


SIGNS = (
    Sign("shared_opener_share", lambda c: c.shared_opener, False, "most replies begin with the same words"),
    Sign("shared_closer_share", lambda c: c.shared_closer, False, "most replies end with the same words"),
    Sign("shared_phrase_share", lambda c: c.shared_phrase, False, "most replies hold the same phrase"),
    Sign("repetition", lambda c: c.repetition, False, "replies say the same words again and again"),
    Sign("distinct_reply_share", lambda c: c.distinct_replies, True, "few replies differ from each other"),
    Sign("length_reward_correlation", lambda c: c.length_reward, False, "the reward follows the length"),
)
SIGNED = frozenset({"length_reward_correlation"})
"""Metrics whose size counts, whatever the sign."""


class Alarms:
    """The last steps of a run, as far as its signs of hacking are concerned."""

    def __init__(self, config: AlarmConfig):
        self._config = config
        self._last = {sign.metric: deque[float](maxlen=config.window) for sign in SIGNS}
        self._given: set[str] = set()

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """Takes a step's metrics; gives a sentence for every threshold that has just been crossed."""
        return [said for sign in SIGNS if (said := self._look(sign, metrics.get(f"hacking/{sign.metric}", math.nan)))]

    def _look(self, sign: Sign, value: float) -> str:
        last, threshold = self._last[sign.metric], sign.threshold(self._config)
        if not math.isnan(value):
            last.append(value)
        if len(last) < self._config.window:
            return ""
        mean = sum(last) / len(last)
        size = abs(mean) if sign.metric in SIGNED else mean
        if not (size < threshold if sign.below else size > threshold):
            self._given.discard(sign.metric)
            return ""
        if sign.metric in self._given:
            return ""
        self._given.add(sign.metric)
        side = "below" if sign.below else "above"
        how = f"mean over judge.alarms.window = {len(last)}, alarm {side} {threshold:g}"
        return f"hacking/{sign.metric} {mean:.2f} ({how}): {sign.means}."
