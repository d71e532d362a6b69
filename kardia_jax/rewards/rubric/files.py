"""Rubrics in YAML: read, checked field by field, refused with the file, the field and what to do.

In: the name of a shipped rubric, or a path. Out: a ``Rubric``. ``docs/judge.md`` describes the fields.

    name: one
    version: "1"
    criteria:
      - name: tone
        question: Is it kind?
        levels: {1: "no", 2: hardly, 3: partly, 4: mostly, 5: "yes"}
        vetoes:
          - max_words: 60
            cap: 2
            because: nobody listens that long

>>> load_rubric("kardia_five").names
('relevance', 'empathy', 'persona_consistency', 'safety', 'fluency')
"""

import difflib
import pathlib
from collections.abc import Hashable
from importlib import resources
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from kardia_jax.rewards.rubric.criteria import Criterion, Rubric, Span, is_item
from kardia_jax.rewards.rubric.vetoes import Contains, Kind, MaxWords, Pattern, Phrases, Rule, Veto

_SHIPPED = resources.files("kardia_jax.rewards") / "rubrics"
_SUFFIXES = (".yaml", ".yml")

Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^[^\r\n]+$")]
"""Text in one line, not empty."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class RubricError(ValueError):
    """A rubric that cannot be used: names the file, the field, what was wanted, what came and what to do."""

    def __init__(self, where: str, field: str, wanted: str, came: str, fix: str = ""):
        super().__init__(f"{where}: {field}: wanted {wanted}, got {came}." + (f" {fix}" if fix else ""))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Levels(_File):
    one: Line = Field(alias="1")
    two: Line = Field(alias="2")
    three: Line = Field(alias="3")
    four: Line = Field(alias="4")
    five: Line = Field(alias="5")


class _Veto(_File):
    max_words: Annotated[int, Field(ge=1)] | None = None
    phrases: Annotated[list[Line], Field(min_length=1)] | None = None
    pattern: str | None = None
    contains: Kind | None = None
    cap: Annotated[int, Field(ge=1, le=4)]
    because: Line


class _Criterion(_File):
    name: Name
    question: Line
    levels: _Levels
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    sees: Annotated[list[Span], Field(min_length=1)] = ["reply"]
    vetoes: list[_Veto] = []


class _Rubric(_File):
    name: Name
    version: Line
    criteria: Annotated[list[_Criterion], Field(min_length=1)]


def shipped_rubrics() -> tuple[str, ...]:
    """The names of the rubrics that are part of this package."""
    return tuple(sorted(file.name.removesuffix(".yaml") for file in _SHIPPED.iterdir() if file.name.endswith(".yaml")))


def load_rubric(name_or_path: str) -> Rubric:
    """The shipped rubric of that name, or the one in a file: a path has a slash or ends in .yaml or .yml.

    Raises RubricError for a name or file that is not there and for the first field that cannot be used.
    """
    where, text = _read(name_or_path)
    content = _parse(text, where)
    if not isinstance(content, dict):
        raise RubricError(where, "rubric", "a mapping with name, version and criteria", _shown(content))
    try:
        return _build(_Rubric.model_validate(_with_text_levels(content)), where)
    except ValidationError as error:
        raise _explained(error, where) from error


def _read(name_or_path: str) -> tuple[str, str]:
    """What to call the source in errors, and its text."""
    path = pathlib.Path(name_or_path).expanduser()
    if path.suffix not in _SUFFIXES and "/" not in name_or_path:
        names = shipped_rubrics()
        if name_or_path not in names:
            near = difflib.get_close_matches(name_or_path, names, n=1)
            fix = f"Did you mean {near[0]}? " if near else ""
            wanted = f"one of {', '.join(names)}, or a path that ends in .yaml"
            raise RubricError(
                "rubric", "name", wanted, repr(name_or_path), f"{fix}For a file of your own give its path."
            )
        return f"{name_or_path}.yaml", (_SHIPPED / f"{name_or_path}.yaml").read_text("utf-8")
    try:
        return str(path), path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RubricError(str(path), "file", "a readable YAML file in UTF-8", str(error), "Check the path.") from error


class _OnceLoader(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal keys in silence; this one refuses the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            shown = _shown(key)
            if shown in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown} stands twice", key_node.start_mark
                )
            seen.add(shown)
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> object:
    try:
        # A SafeLoader: it builds texts, numbers, lists and mappings, nothing else.
        loader = _OnceLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        came = " ".join(str(error).split())
        raise RubricError(where, "file", "YAML", came, 'A text with ": " or " #" in it needs quotes.') from error


def _with_text_levels(content: dict[Any, Any]) -> dict[Any, Any]:
    """The content with the levels' numbers as texts, which is what a model can name."""
    criteria = content.get("criteria")
    if not isinstance(criteria, list):
        return content
    return {**content, "criteria": [_with_text_keys(criterion) for criterion in criteria]}


def _with_text_keys(criterion: object) -> object:
    if not isinstance(criterion, dict) or not isinstance(criterion.get("levels"), dict):
        return criterion
    return {**criterion, "levels": {str(key): text for key, text in criterion["levels"].items()}}


def _build(file: _Rubric, where: str) -> Rubric:
    seen: set[str] = set()
    for index, criterion in enumerate(file.criteria):
        field = f"criteria[{index}].name"
        if criterion.name in seen:
            raise RubricError(where, field, "each name once", repr(criterion.name), "Rename one of them.")
        if is_item(criterion.name):
            fix = "Names like item_1 belong to the items of dialogues."
            raise RubricError(where, field, "another name", repr(criterion.name), fix)
        seen.add(criterion.name)
    if sum(criterion.weight for criterion in file.criteria) <= 0:
        raise RubricError(where, "criteria", "at least one weight above 0", "only zeros", "Leave one weight out: 1.")
    criteria = tuple(_criterion(one, f"criteria[{index}]", where) for index, one in enumerate(file.criteria))
    return Rubric(file.name, file.version, criteria)


def _criterion(file: _Criterion, field: str, where: str) -> Criterion:
    levels = file.levels
    vetoes = tuple(_veto(veto, f"{field}.vetoes[{index}]", where) for index, veto in enumerate(file.vetoes))
    described = (levels.one, levels.two, levels.three, levels.four, levels.five)
    try:
        return Criterion(file.name, file.question, described, file.weight, tuple(file.sees), vetoes)
    except ValueError as error:
        raise RubricError(where, field, "a criterion that can be asked", str(error).rstrip(".")) from error


def _veto(file: _Veto, field: str, where: str) -> Veto:
    given = file.model_dump(exclude_none=True, exclude={"cap", "because"})
    if len(given) != 1:
        wanted = "exactly one of max_words, phrases, pattern, contains"
        raise RubricError(where, field, wanted, " and ".join(given) or "none of them", "Write one veto for each rule.")
    try:
        return Veto(_rule(file), file.cap, file.because)
    except ValueError as error:
        raise RubricError(where, f"{field}.{next(iter(given))}", "a rule that can be applied", str(error)) from error


def _rule(file: _Veto) -> Rule:
    if file.max_words is not None:
        return MaxWords(file.max_words)
    if file.phrases is not None:
        return Phrases(tuple(file.phrases))
    if file.pattern is not None:
        return Pattern(file.pattern)
    assert file.contains is not None
    return Contains(file.contains)


_WANTED: dict[str, tuple[str, str]] = {
    "missing": ("a value", "Add it."),
    "string_type": ("a text", "Put it in quotes."),
    "string_too_short": ("a text that is not empty", ""),
    "int_type": ("a whole number", ""),
    "float_type": ("a number", "Write it without quotes."),
    "finite_number": ("a finite number", ""),
    "list_type": ("a list", "Start each entry with a dash."),
    "model_type": ("a mapping with named fields", ""),
    "too_short": ("at least one entry", ""),
}
"""What pydantic's kinds of error mean here: what was wanted, and the fix."""


def _explained(error: ValidationError, where: str) -> RubricError:
    """The first of pydantic's errors in our words."""
    first = error.errors(include_url=False)[0]
    kind, limits = first["type"], first.get("ctx", {})
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    came = "nothing" if kind == "missing" else _shown(first["input"])
    if kind == "extra_forbidden":
        return RubricError(where, field, "no such field", "one", _known_fields(first["loc"]))
    if kind == "literal_error":
        return RubricError(where, field, f"one of {limits['expected']}", came)
    if kind == "greater_than_equal":
        return RubricError(where, field, f"a number from {limits['ge']:g}", came)
    if kind == "less_than_equal":
        return RubricError(where, field, f"a number up to {limits['le']:g}", came)
    if kind == "string_pattern_mismatch":
        named = field.endswith("name")
        wanted = "lower-case letters, digits and _, a letter first" if named else "one line of text"
        return RubricError(where, field, wanted, came)
    wanted, fix = _WANTED.get(kind, (first["msg"], ""))
    return RubricError(where, field, wanted, came, fix)


def _known_fields(place: tuple[int | str, ...]) -> str:
    """Which fields there are where an unknown one was found."""
    models: dict[int, type[_File]] = {1: _Rubric, 3: _Criterion, 4: _Levels, 5: _Veto}
    known = [field.alias or name for name, field in models[len(place)].model_fields.items()]
    return f"Known are {', '.join(known)}."


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
