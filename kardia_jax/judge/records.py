"""Verdicts and requests as JSON, for the cache and for recordings.

>>> text = verdict_to_json(Verdict((Mark("tone", 4, "Warm."),)))
>>> text
'[["tone", 4, "Warm.", null]]'
>>> verdict_from_json(text)
Verdict(marks=(Mark(criterion='tone', mark=4, reason='Warm.', spread=None),))
"""

import dataclasses
import hashlib
import json
from typing import Any

from kardia_jax.rewards.rubric import HIGHEST, LOWEST, JudgeRequest, Mark, Rubric, Verdict


def verdict_to_json(verdict: Verdict) -> str:
    """One line: criterion, mark, reason and spread of every criterion, in order."""
    rows = [[mark.criterion, mark.mark, mark.reason, mark.spread] for mark in verdict.marks]
    return json.dumps(rows, ensure_ascii=False, allow_nan=False)


def verdict_from_json(text: str) -> Verdict:
    """What ``verdict_to_json`` wrote; raises ValueError for anything else, marks out of range included."""
    try:
        read = json.loads(text)
        return Verdict(tuple(_mark(*row) for row in read))
    except (TypeError, ValueError) as error:
        wanted = "[[criterion, mark, reason, spread], ...]"
        raise ValueError(f"verdict: wanted {wanted}, got {text!r:.80} ({error})") from error


_NUMBERS = (int, float)
"""By exact type: true and false are ints to Python."""


def _mark(criterion: Any, mark: Any, reason: Any, spread: Any) -> Mark:
    texts = type(criterion) is str and type(reason) is str
    numbers = type(mark) in _NUMBERS and (spread is None or type(spread) in _NUMBERS)
    if texts and numbers and LOWEST <= mark <= HIGHEST:
        return Mark(criterion, mark, reason, spread)
    raise ValueError(f"a mark cannot be {mark!r:.40}")


def request_key(rubric: Rubric, request: JudgeRequest) -> str:
    """SHA-256 of what was asked, whoever the judge is: the rubric and everything that the request says."""
    content = {"rubric": rubric.fingerprint, "request": dataclasses.asdict(request)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
