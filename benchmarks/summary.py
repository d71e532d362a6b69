"""The results of gpu.sh as one table, with the targets beside them.

    python benchmarks/summary.py OUT

OUT holds NAME.json per benchmark, whose last line is one JSON object. A target is met, missed, or not measured.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from kardia_jax.bench.layout import table


class Target(NamedTuple):
    """What an item has to reach."""

    item: str
    what: str
    read: Callable[[dict[str, Any]], float]
    least: float


TARGETS = (
    Target("sample-1.5b", "decode, share of copy bandwidth", lambda x: x["phases"]["decode"]["bandwidth_share"], 0.7),
    Target("update-1.5b", "update, MFU of computed work", lambda x: x["phases"]["update"]["mfu"], 0.4),
    Target("trl-0.5b", "step, TRL's seconds over ours", lambda x: x["ratios"]["step_seconds"]["median"], 1.0),
)


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The last line of every file that ends in a JSON object; what the others (tests, failures) end in is printed."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        lines = file.read_text().splitlines()
        try:
            found[file.stem] = json.loads(lines[-1])
        except (IndexError, json.JSONDecodeError):
            print(f"{file.stem}: {lines[-1] if lines else f'no result, see {file.stem}.log'}")
    return found


def row(name: str, one: dict[str, Any]) -> list[str]:
    """One benchmark's cells."""
    phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in one["seconds"].items())
    device = one.get("peak_device_gb")
    mfu, repeated = (f"{one[key]:.1%}" if key in one else "" for key in ("mfu", "mfu_repeated"))
    gb = "" if device is None else f"{device:.1f}"
    return [name, f"{one['step_seconds']:.3f}", phases, mfu, repeated, f"{one['peak_rss_gb']:.1f}", gb]


def main(folder: pathlib.Path) -> None:
    found = read(folder)
    header = ["item", "seconds", "by phase", "MFU", "MFU repeated", "host GB", "device GB"]
    rows = [row(name, one) for name, one in found.items() if "step_seconds" in one]
    for name, one in found.items():
        for place, pair in enumerate(one.get("rounds", [])):
            rows += [row(f"{name} {place} {side}", pair[side]) for side in ("ours", "peer")]
    print(table(header, rows) if rows else "nothing was measured")
    print()
    for target in TARGETS:
        value = target.read(found[target.item]) if target.item in found else None
        verdict = "not measured" if value is None else f"{value:.3f}, {'met' if value >= target.least else 'missed'}"
        print(f"{target.item}: {target.what}, wanted {target.least}: {verdict}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
