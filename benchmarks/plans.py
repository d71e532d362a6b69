"""Plans of the shipped recipes as the tables of docs/scaling.md.

    python benchmarks/plans.py tpu OUT      # compiled for real slices; needs libtpu (extra `plan`). make plan-tpu
    python benchmarks/plans.py gpu OUT      # compiled for simulated devices; arithmetic decides

Each plan is written to OUT as ``kardia plan --json`` prints it, and is not made again where it is there already. The
table goes into docs/scaling.md, between ``<!-- tpu -->`` and ``<!-- end of tpu -->``. Fails where a recipe does not
fit, or XLA counts other bytes for parameters and moments than the arithmetic.
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

from kardia_jax.bench.layout import table
from kardia_jax.config import MeshConfig, load_config
from kardia_jax.plan.report import gib
from kardia_jax.plan.run import plan

PAGE = pathlib.Path("docs/scaling.md")


class Case(NamedTuple):
    """A recipe on a machine."""

    recipe: str
    machine: str
    """A slice of TPUs, or a kind of GPU."""
    fsdp: int
    tensor: int
    source: str | None = None
    """Another model than the recipe's."""


CASES = {
    "tpu": (
        Case("kardia_qwen2_5_3b", "v5e:4x4", 4, 4),
        Case("kardia_qwen2_5_3b", "v6e:4x4", 4, 4),
        Case("kardia_qwen2_5_7b", "v5e:4x4", 4, 4),
        Case("kardia_qwen2_5_7b", "v6e:4x4", 4, 4),
    ),
    "gpu": (
        Case("kardia_qwen2_5_7b", "a100-80", 4, 2),
        Case("kardia_qwen2_5_7b", "h100", 4, 2),
        Case("kardia_qwen2_5_7b", "h100", 4, 2, "qwen2.5-14b"),
        Case("kardia_qwen2_5_7b_lora", "h100", 1, 1),
    ),
}


def planned(kind: str, case: Case, out: pathlib.Path) -> dict[str, Any]:
    """The plan for the slice, or for all chips, and the seconds that it took."""
    topology = case.machine if kind == "tpu" else None
    name = f"{case.source or case.recipe}-{case.fsdp}x{case.tensor}-{topology or 'simulated'}"
    file = out / f"{name.replace(':', '-')}.json"
    if not file.is_file():
        config = load_config(pathlib.Path(f"configs/{case.recipe}.py"))
        model = dataclasses.replace(config.model, source=case.source or config.model.source)
        config = dataclasses.replace(config, model=model, mesh=MeshConfig(fsdp=case.fsdp, tensor=case.tensor))
        start = time.perf_counter()
        found = plan(config, None, None, topology)
        file.write_text(json.dumps(found | {"seconds": time.perf_counter() - start}), "utf-8")
    return json.loads(file.read_text("utf-8"))


def row(kind: str, case: Case, found: dict[str, Any]) -> list[str]:
    """GiB on one device; a program's peak has what is there all the time in it."""
    chip, devices = chip_of(case, found), found["devices"]
    held, peak, by_program = chip["bytes"], chip["peak_bytes"], chip["program_peak_bytes"]
    if kind == "tpu":
        sampler = max(by_program[name] for name in ("weights", "admit", "decode"))
        counted = [sampler, by_program["score"], by_program["update"], max(peak["sample"], peak["update"])]
    else:
        counted = [held["gradients"], held["activations"], peak["sample"], peak["update"]]
    recipe = case.recipe if case.source is None else f"{case.recipe} with {case.source}"
    return [
        f"{recipe} on {case.machine}" if kind == "tpu" else f"{recipe} on {devices} x {case.machine}",
        f"{case.fsdp} x {case.tensor}",
        *(gib(held[part]) for part in ("parameters", "moments", "reference", "frozen", "sampler_weights", "kv")),
        *map(gib, counted),
        gib(chip["usable_bytes"]),
        f"{chip['step_seconds']:.1f}",
        f"{found['seconds']:.0f}",
    ]


def chip_of(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """What the plan says of this case's chip."""
    name = case.machine.partition(":")[0]
    return next(one for one in found["chips"] if one["chip"] == name)


HEADER = {
    "tpu": ("peak, sampler", "peak, score", "peak, update", "peak by arithmetic"),
    "gpu": ("gradients", "activations", "peak, sampler", "peak, update"),
}
"""Columns that differ."""


def main(kind: str, out: pathlib.Path) -> int:
    """Prints the table and writes it into the page; 1 where something is not as it should be."""
    out.mkdir(parents=True, exist_ok=True)
    found = [(case, planned(kind, case, out)) for case in CASES[kind]]
    header = [
        "GiB on a device",
        "fsdp x tensor",
        "parameters",
        "moments",
        "reference",
        "frozen",
        "sampler's copy",
        "KV",
    ]
    header += [*HEADER[kind], "usable", "s a step, estimated", "s to plan"]
    made = table(header, [row(kind, case, one) for case, one in found])
    print(made)
    head, rest = PAGE.read_text("utf-8").split(f"<!-- {kind} -->\n")
    tail = rest[rest.index(f"<!-- end of {kind} -->") :]
    PAGE.write_text(f"{head}<!-- {kind} -->\n{made}\n{tail}", "utf-8")
    return 0 if all(chip_of(case, one)["fits"] and agrees(case, one) for case, one in found) else 1


def agrees(case: Case, found: dict[str, Any]) -> bool:
    """Whether XLA counts what the update takes as the arithmetic does, within 1 %: ids and log-probs are in it."""
    held = chip_of(case, found)["bytes"]
    [update] = [one for one in found["programs"] if one["name"] == "update"]
    expected = held["parameters"] + held["moments"] + held["frozen"]
    return abs(update["argument_bytes"] / expected - 1) < 0.01


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], pathlib.Path(sys.argv[2])))
