"""Collectives of a compiled program, read from its HLO text, loops counted as often as they turn.

    %w = (s32[], f32[8,16]) while(%t), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"5"}}
    %b (...) { %r = f32[8,64] all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, ... }

is an all-reduce of 2,048 bytes among 4 devices, 5 times. A device of a ring of n sends

    all-gather, reduce-scatter, all-to-all    (n - 1) / n of the whole
    all-reduce                                2 (n - 1) / n of it (a reduce-scatter, then an all-gather)
    collective-permute                        what it holds

where the whole is the result of an all-gather and the operand of a reduce-scatter. Of a conditional the branch that
sends most counts, or as the caller says. Where the text does not say how often a loop turns (a ``while_loop`` of its
program's own), the caller says it. A TPU spreads one collective over several fusions, which it computes beside: each
has the instruction, with the same ``channel_id``, and it counts once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
"""Of types whose name does not say it after the first letter; f8e4m3fn and its kin are read as f8."""

LINE = re.compile(r"^\s+(ROOT )?%\S+ = ")
HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+)[a-z0-9]*\[([\d,]*)\]")
CALLED = re.compile(r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=")
NAME = re.compile(r"%([^\s,(){}]+)")


class Collective(NamedTuple):
    """One instruction that sends, as often as it runs."""

    kind: str
    bytes: int
    """Of the whole that is gathered or reduced, on one device."""
    devices: int
    """Devices that take part together."""
    times: float

    @property
    def sent(self) -> float:
        """Bytes that one device sends, over all times."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.bytes * factor * self.times


class Instruction(NamedTuple):
    """``%name = shape op(operands), attributes``."""

    name: str
    shape: str
    op: str
    operands: str
    attributes: str
    root: bool


Computations = dict[str, list[Instruction]]


class Program(NamedTuple):
    """A parsed program, and how it is read."""

    computations: Computations
    unknown_trips: float
    branch: Callable[..., Any]


def collectives(text: str, unknown_trips: float = 1.0, branch: Callable[..., Any] = max) -> list[Collective]:
    """Every collective of the program's entry and of what it calls; a loop of unknown length turns ``unknown_trips``
    times, and of a conditional the branch counts that sends most (``max``) or least (``min``)."""
    computations, entry = parse(text)
    return [found for _, found in _of(entry, 1.0, Program(computations, unknown_trips, branch))]


def sent_by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends, by kind, largest first; kinds that do not occur are left out."""
    totals: dict[str, float] = defaultdict(float)
    for one in found:
        totals[one.kind] += one.sent
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def parse(text: str) -> tuple[Computations, str]:
    """All computations by name, and the name of the entry."""
    computations: Computations = {}
    entry, current = "", []
    for line in text.splitlines():
        head = HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif LINE.match(line):  # other lines belong to kernels that are spelt out
            current.append(instruction(line.strip()))
    return computations, entry


def instruction(line: str) -> Instruction:
    """One line of a computation."""
    left, right = line.split(" = ", 1)
    end = _closed(right, 0) if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].strip()
    op = rest[: rest.index("(")]
    end = _closed(rest, len(op))
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, shape, op, rest[len(op) + 1 : end - 1], rest[end:], left.startswith("ROOT "))


def shape_bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple; tokens and other opaque types have none."""
    return sum(math.ceil(_bits(dtype) * _count(sizes) / 8) for dtype, sizes in ARRAY.findall(shape))


def group_size(attributes: str) -> int:
    """Devices that take part together; all three ways in which XLA writes replica groups."""
    named = re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else 1


def _of(name: str, times: float, program: Program) -> Iterator[tuple[str, Collective]]:
    """(channel, collective) of a computation and all that it calls."""
    # A fusion of this name is a reduce-scatter that is written as an all-reduce of which one part is kept.
    scatters = name.startswith("all-reduce-scatter")
    inside, seen = program.computations.get(name, []), set[str]()
    for one in inside:
        kind = one.op.removesuffix("-start")
        if kind in KINDS:
            devices = group_size(one.attributes) if kind != "collective-permute" else 2
            found = Collective(kind, _whole(one, kind, devices), devices, times)
            found = found._replace(kind="reduce-scatter") if scatters and kind == "all-reduce" else found
            seen.add(_channel(one))
            yield _channel(one), found
        elif one.op == "fusion":
            fresh = [pair for pair in _called_by(one, inside, times, program) if not pair[0] or pair[0] not in seen]
            seen.update(channel for channel, _ in fresh)
            yield from fresh
        else:
            yield from _called_by(one, inside, times, program)


def _called_by(
    one: Instruction, around: list[Instruction], times: float, program: Program
) -> Iterator[tuple[str, Collective]]:
    called = _called(one)
    if one.op == "while":
        turns = trip_count(one, around, program.computations)
        yield from _of(called["body"][0], times * (program.unknown_trips if turns is None else turns), program)
    elif one.op == "conditional":
        branches = [list(_of(branch, times, program)) for names in called.values() for branch in names]
        yield from program.branch(branches, key=lambda found: sum(pair[1].sent for pair in found), default=[])
    elif one.op in ("call", "fusion", "async-start", "custom-call"):
        for callee in called.get("calls", []) + called.get("to_apply", []):
            yield from _of(callee, times, program)


def _channel(one: Instruction) -> str:
    """Its number, the same for all parts of one collective; empty where it has none."""
    named = re.search(r"channel_id=(\d+)", one.attributes)
    return named[1] if named else ""


def _whole(one: Instruction, kind: str, devices: int) -> int:
    """Bytes of what is gathered or reduced, whichever shape the instruction shows."""
    shown = shape_bytes(one.shape)
    if kind == "reduce-scatter":
        return shown * devices
    if one.op == "all-gather-start":  # (operands, results)
        return shown * devices // (devices + 1)
    if one.op == "collective-permute-start":  # (operand, result, two counters)
        return max(map(shape_bytes, re.findall(r"\w+\[[\d,]*\]", one.shape)))
    return shown


def _called(one: Instruction) -> dict[str, list[str]]:
    """Names of computations by the attribute that names them."""
    found: dict[str, list[str]] = {}
    for match in CALLED.finditer(one.attributes):
        rest = one.attributes[match.end() :]
        listed = rest[1 : rest.index("}")] if rest.startswith("{") else rest.split(",", 1)[0]
        found.setdefault(match[1], []).extend(NAME.findall(listed))
    return found


def trip_count(loop: Instruction, around: list[Instruction], computations: Computations) -> int | None:
    """How often a loop turns: what XLA notes, or what its condition ``counter < constant`` says; None if neither."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    condition = {one.name: one for one in computations.get(_called(loop)["condition"][0], [])}
    test = next((one for one in condition.values() if one.root), None)
    if test is None or test.op != "compare" or "direction=LT" not in test.attributes:
        return None
    start = {one.name: one for one in around}
    before = _elements(start.get(NAME.findall(loop.operands)[0]))
    counter, limit = (_constant(condition.get(name), condition, start, before) for name in NAME.findall(test.operands))
    # Counters that the text does not trace back start at 0: JAX's scans do.
    return None if limit is None else limit - (counter or 0)


def _elements(start: Instruction | None) -> list[str]:
    return NAME.findall(start.operands) if start is not None and start.op == "tuple" else []


def _constant(
    one: Instruction | None, inside: dict[str, Instruction], outside: dict[str, Instruction], before: list[str]
) -> int | None:
    """The integer that an operand of a condition is at first: a constant there, or one that entered with the loop."""
    while one is not None and one.op in ("copy", "bitcast", "convert"):
        name = NAME.findall(one.operands)[0]
        one = inside.get(name) or outside.get(name)
    if one is not None and one.op == "get-tuple-element":
        place = re.search(r"index=(\d+)", one.attributes)
        name = before[int(place[1])] if place and int(place[1]) < len(before) else ""
        return _constant(outside.get(name), outside, {}, [])
    return int(one.operands) if one is not None and one.op == "constant" and one.operands.isdecimal() else None


def _bits(dtype: str) -> int:
    return BITS.get(dtype) or int(re.sub(r"\D", "", dtype))


def _count(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)


def _closed(text: str, start: int) -> int:
    """Behind the bracket that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"no closing bracket: {text[:80]}")
