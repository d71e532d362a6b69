"""Reading what a model that judges has written: strictly, and never a mark from junk.

In: a rubric and the text of the answer. Out: a ``Verdict``, or a ``JudgeFailure`` that says which part was
wrong. ``json_schema`` is the same contract for endpoints that can hold a model to a schema.

>>> levels = ("no", "hardly", "partly", "mostly", "yes")
>>> rubric = Rubric("one", "1", (Criterion("tone", "Is it kind?", levels),))
>>> read_verdict(rubric, '{"tone": {"reason": "Warm and plain.", "mark": 4}}')
Verdict(marks=(Mark(criterion='tone', mark=4, reason='Warm and plain.', spread=None),))
>>> read_verdict(rubric, '{"tone": {"reason": "Warm.", "mark": 9}}')
JudgeFailure(reason='tone.mark: wanted an integer from 1 to 5, got 9', retryable=True)

Marks that are given before their reasons differ from marks that follow them, so the reader insists on the
order: reason, then mark.
"""

import json
import re
from typing import Any, NoReturn

from kardia_jax.rewards.rubric.criteria import Rubric
from kardia_jax.rewards.rubric.marks import JudgeFailure, Mark, Verdict
from kardia_jax.rewards.rubric.vetoes import HIGHEST, LOWEST


def json_schema(rubric: Rubric) -> dict[str, Any]:
    """The JSON schema of an answer: every criterion once, in order, a reason and then a mark.

    It keeps to what OpenAI's strict mode, vLLM's and SGLang's guided decoding and llama.cpp's grammars all
    read: types, enum, required, additionalProperties false, no references and no bounds. All four write the
    properties in the order in which they stand here.
    """
    marks = list(range(LOWEST, HIGHEST + 1))
    entry = _object({"reason": {"type": "string"}, "mark": {"type": "integer", "enum": marks}})
    return _object(dict.fromkeys(rubric.names, entry))


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_OPEN = re.compile(r"<(?:think|thinking|thought|reasoning)>|\[THINK\]", re.IGNORECASE)
_CLOSE = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]", re.IGNORECASE)
_UNPAIRED = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can spell and no file can hold."""
_CODE_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n\s*```\Z", re.DOTALL)


class _Unreadable(ValueError):
    """An answer that is not a verdict; the message says which part, what was wanted and what came."""


def read_verdict(rubric: Rubric, text: str) -> Verdict | JudgeFailure:
    """The verdict in a judge's answer: JSON, each criterion once, a reason, then a whole mark from 1 to 5."""
    try:
        entries = _load_json(_without_thinking(text))
        names = rubric.names
        if not isinstance(entries, dict) or sorted(entries) != sorted(names):
            came = list(entries) if isinstance(entries, dict) else entries
            raise _Unreadable(f"answer: wanted an object with the keys {list(names)}, got {came!r:.200}")
        return Verdict(tuple(_read_mark(name, entries[name]) for name in names))
    except _Unreadable as error:
        return JudgeFailure(str(error), retryable=True)


def _without_thinking(text: str) -> str:
    """What follows the leading blocks; templates that open a block in the prompt leave its end alone here.

    An end that stands inside the JSON (a judge may quote one in a reason) ends nothing.
    """
    start = 0
    while closed := _CLOSE.search(text, start):
        block = text[start : closed.start()].strip()
        if block.startswith(("{", "```")):
            break
        opened = _OPEN.search(block)
        if opened and (opened.start() > 0 or _OPEN.search(block, opened.end())):
            raise _Unreadable(f"answer: wanted a thinking block and then JSON, got {text!r:.80}")
        start = closed.end()
    left = text[start:].strip()
    if _OPEN.match(left):
        raise _Unreadable("answer: wanted JSON after the thinking block, got a block that was never closed")
    fenced = _CODE_FENCE.match(left)
    return fenced.group(1) if fenced else left


def _load_json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except _Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"answer: wanted one JSON object, got {text!r:.80} ({error})") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise _Unreadable(f"answer: wanted each key once, got {keys}")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise _Unreadable(f"answer: wanted JSON numbers, got {name}")


def _read_mark(name: str, entry: object) -> Mark:
    if not isinstance(entry, dict) or list(entry) != ["reason", "mark"]:
        raise _Unreadable(f"{name}: wanted a reason and then a mark, got {entry!r:.200}")
    reason, mark = entry["reason"], entry["mark"]
    if not isinstance(reason, str) or not reason.strip():
        raise _Unreadable(f"{name}.reason: wanted a sentence, got {reason!r:.80}")
    if not isinstance(mark, int) or isinstance(mark, bool) or not LOWEST <= mark <= HIGHEST:
        raise _Unreadable(f"{name}.mark: wanted an integer from {LOWEST} to {HIGHEST}, got {mark!r:.80}")
    return Mark(name, mark, _UNPAIRED.sub("\ufffd", reason.strip()))
