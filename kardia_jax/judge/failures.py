"""When too many verdicts are missing: counted over the last steps, said with the commonest reasons.

In: of every step the verdicts that were asked for, and why the missing ones are missing. Out: None, or the sentence
with which a run stops. Nothing here touches a reward: a missing verdict is unknown and stays so.

>>> window = FailureWindow(most=0.5, steps=3)
>>> window.add(Tally(asked=8, completions=8, reasons=("timed out",) * 3))       # 3 of 8
>>> window.add(Tally(asked=8, completions=8, reasons=("timed out",) * 6))       # 9 of 16
'judge.max_failure_share: 9 of 16 verdicts of the last 2 steps are missing (56%), allowed are 50%. Why: 9 x timed out.'

A step that lost every verdict counts by itself, however good the steps before it were, unless most of its completions
needed none: one lost call beside thirty malformed answers is no outage. A run that is resumed starts its window anew,
since whoever resumes it has looked at the judge.
"""

import re
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

SHOWN = 3
"""Reasons that are named; the others are counted."""
LONGEST = 240
"""Characters of a reason: endpoints may answer with whole pages."""


class JudgeStopError(RuntimeError):
    """Too many verdicts are missing for the rewards to mean anything."""


class Tally(NamedTuple):
    """The verdicts of one step."""

    asked: int
    completions: int
    """Those that needed no verdict, being malformed, included."""
    reasons: tuple[str, ...]
    """Why, for each verdict that is missing."""


class FailureWindow:
    """The last steps of a run, as far as its judge is concerned."""

    def __init__(self, most: float, steps: int):
        """``most``: the largest share of missing verdicts that is allowed over the last ``steps`` steps."""
        self._most, self._last = most, deque[Tally](maxlen=steps)

    def add(self, tally: Tally) -> str | None:
        """Counts a step; says what is wrong where too much is missing."""
        self._last.append(tally)
        if too_many(self._last, self._most):
            return shortage(self._last, self._most)
        lost = len(tally.reasons)
        return shortage([tally], self._most) if tally.asked == lost > self._most * tally.completions else None


def too_many(tallies: Sequence[Tally], most: float) -> bool:
    """Whether more than the share ``most`` of the verdicts is missing."""
    return sum(len(tally.reasons) for tally in tallies) > most * sum(tally.asked for tally in tallies)


def kind_of(reason: str) -> str:
    """A reason without what one answer alone had in it, so that alike ones are counted together.

    >>> kind_of("http://a: empathy.mark: wanted an integer from 1 to 5, got 9 (after 3 tries)")
    'http://a: empathy.mark: wanted an integer from 1 to 5'
    """
    return re.split(r", got | \(after \d", reason)[0]


def shortage(tallies: Sequence[Tally], most: float) -> str:
    """How many verdicts are missing, how many may be, and why: the commonest kinds of reasons, by the first of each."""
    asked = sum(tally.asked for tally in tallies)
    reasons = [reason for tally in tallies for reason in tally.reasons]
    first = {kind_of(reason): reason[:LONGEST] for reason in reversed(reasons)}
    missing, named = len(reasons), Counter(map(kind_of, reasons)).most_common(SHOWN)
    others = missing - sum(count for _, count in named)
    why = [f"{count} x {first[kind]}" for kind, count in named] + [f"{others} for other reasons"] * (others > 0)
    where = "" if len(tallies) == 1 else f" of the last {len(tallies)} steps"
    return (
        f"judge.max_failure_share: {missing} of {asked} verdicts{where} are missing ({missing / asked:.0%}), "
        f"allowed are {most:.0%}. Why: {'; '.join(why)}."
    )
