"""What is asked: criteria with described levels, weights and vetoes, under a name, a version and a fingerprint.

>>> levels = ("no", "hardly", "partly", "mostly", "yes")
>>> rubric = Rubric("one", "1", (Criterion("tone", "Is it kind?", levels),))
>>> [c.name for c in with_items(rubric, (RubricItem("Does it mention the bees?"),)).criteria]
['tone', 'item_1']
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kardia_jax.dialogue.dataset import RubricItem
from kardia_jax.rewards.rubric.vetoes import HIGHEST, Veto

Span = Literal["understanding", "reasoning", "reply"]
SPANS: tuple[Span, ...] = ("understanding", "reasoning", "reply")
"""The spans that a judge may see, in the order in which they stand in a completion and in a prompt."""

ITEM_LEVELS = (
    "No: the reply does nothing of this, or the opposite.",
    "Hardly: a trace of it, out of place or by chance.",
    "Partly: it is there, but vague, incomplete or mixed with something that works against it.",
    "Mostly: it is clearly there, with a small gap.",
    "Fully: it is there, in its place and in words made for this person.",
)
"""What the levels of an item that came with a dialogue mean; such an item brings a question and nothing else."""
_ITEM = re.compile(r"item_\d+")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Criterion:
    """One question about a completion, with a description of each level from 1 (worst) to 5 (best)."""

    name: str
    question: str
    levels: tuple[str, str, str, str, str]
    weight: float = 1.0
    """Share of the unit mark, relative to the others; with 0 the criterion is marked and logged, and pays nothing."""
    sees: tuple[Span, ...] = ("reply",)
    """Spans that the judge is shown; criteria on the reply see it alone, so that reasoning cannot plead."""
    vetoes: tuple[Veto, ...] = ()
    """Rules on the spans that it sees; where one is broken the mark is capped."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"criterion.name: wanted lower-case letters, digits and _, got {self.name!r}.")
        if len(self.levels) != HIGHEST or not all(text.strip() for text in self.levels):
            raise ValueError(f"{self.name}.levels: wanted 5 descriptions, worst first, got {self.levels!r}.")
        for text in (self.question, *self.levels):
            if len(text.splitlines()) != 1:
                raise ValueError(f"{self.name}: wanted question and levels of one line each, got {text!r}.")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"{self.name}.weight: wanted a finite number, 0 or more, got {self.weight}.")
        if not self.sees or len(set(self.sees)) < len(self.sees) or not set(self.sees) <= set(SPANS):
            wanted = f"at least one of {', '.join(SPANS)}, each once"
            raise ValueError(f"{self.name}.sees: wanted {wanted}, got {self.sees}. Most criteria see ('reply',).")


@dataclass(frozen=True)
class Rubric:
    """Criteria under a name and a version; change the version with the text, since verdicts depend on it."""

    name: str
    version: str
    criteria: tuple[Criterion, ...]

    def __post_init__(self) -> None:
        names = [criterion.name for criterion in self.criteria]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"rubric {self.name}: wanted at least one criterion, each named once, got {names}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The criteria's names, in order."""
        return tuple(criterion.name for criterion in self.criteria)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of everything in the rubric: texts, weights, spans, vetoes, name and version.

        For caches and logs: it changes with the content even where somebody forgot to change the version.
        """
        fields = dataclasses.asdict(self)
        for criterion in fields["criteria"]:
            criterion["weight"] = float(criterion["weight"])
        content = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_item(name: str) -> bool:
    """Whether a criterion's name is that of an item that came with a dialogue."""
    return bool(_ITEM.fullmatch(name))


def with_items(rubric: Rubric, items: Sequence[RubricItem]) -> Rubric:
    """The rubric with a dialogue's own questions behind its criteria, named item_1, item_2, ...

    They see the reply, have ``ITEM_LEVELS`` for levels and weigh what the item says. Raises ValueError for a
    rubric that has such names itself.
    """
    extra = tuple(
        Criterion(f"item_{number}", item.question, ITEM_LEVELS, item.weight)
        for number, item in enumerate(items, start=1)
    )
    return dataclasses.replace(rubric, criteria=rubric.criteria + extra) if extra else rubric


@functools.lru_cache(maxsize=64)
def views(rubric: Rubric) -> tuple[Rubric, ...]:
    """The rubric cut into parts whose criteria see the same spans: one prompt each."""
    parts: dict[frozenset[Span], list[Criterion]] = {}
    for criterion in rubric.criteria:
        parts.setdefault(frozenset(criterion.sees), []).append(criterion)
    return tuple(dataclasses.replace(rubric, criteria=tuple(criteria)) for criteria in parts.values())
