"""Time and memory of ``kardia bench`` against one number of the workload, as a table and a plot.

    python benchmarks/scaling.py step --over group --values 1 2 4 8 16 32 --model qwen2.5-0.5b

Every point runs in a process of its own, since peaks of memory belong to a process. Flags that are not listed here go
to ``kardia bench``. Writes OUT/step-group.jsonl (a line per point) and OUT/step-group.svg, which needs matplotlib (the
extra `bench`), and prints the table. ``--replot`` makes table and plot again from the lines.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
from typing import Any

from versus import last_json

from kardia_jax.bench.layout import table

AXES = {"group": "completions per prompt", "prompt_len": "prompt tokens", "new_tokens": "completion tokens"}


def points(args: argparse.Namespace, rest: list[str], file: pathlib.Path) -> None:
    """Measures and writes a line for every value."""
    with file.open("w") as lines:
        for value in args.values:
            flag = f"--{args.over.replace('_', '-')}"
            command = [sys.executable, "-m", "kardia_jax", "bench", args.kind, *rest, flag, value, "--json"]
            print(" ".join(command), file=sys.stderr)
            lines.write(json.dumps(last_json(command)) + "\n")
            lines.flush()


def rows(over: str, found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table."""
    phases = list(found[0]["seconds"])
    header = [over, *(f"{name} s" for name in phases), "step s", "completion tokens/s", "MFU", "MFU repeated"]
    header += ["host GB", "device GB"]
    cells = [
        [
            str(one[over]),
            *(f"{one['seconds'][name]:.2f}" for name in phases),
            f"{one['step_seconds']:.2f}",
            f"{one['completion_tokens_per_second']:.1f}",
            f"{one['mfu']:.1%}",
            f"{one['mfu_repeated']:.1%}",
            f"{one['peak_rss_gb']:.2f}",
            "" if one["peak_device_gb"] is None else f"{one['peak_device_gb']:.2f}",
        ]
        for one in found
    ]
    return header, cells


def plot(over: str, found: list[dict[str, Any]], file: pathlib.Path) -> None:
    """Seconds by phase stacked, and peak memory beside it."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and the same numbers give the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "kardia"}
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    names, below = [str(one[over]) for one in found], [0.0] * len(found)
    for phase in found[0]["seconds"]:
        seconds = [one["seconds"][phase] for one in found]
        time.bar(names, seconds, bottom=below, label=phase)
        below = [a + b for a, b in zip(below, seconds, strict=True)]
    kind = "peak_rss_gb" if found[0]["peak_device_gb"] is None else "peak_device_gb"
    memory.bar(names, [one[kind] for one in found], color="grey")
    time.set_ylabel("seconds a step")
    memory.set_ylabel("peak of host memory, GB" if kind == "peak_rss_gb" else "peak of device memory, GB")
    for axes in (time, memory):
        axes.set_xlabel(AXES.get(over, over))
    time.legend()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("kind", choices=("step", "sample", "update"))
    made.add_argument("--over", choices=(*AXES, "model"), required=True)
    made.add_argument("--values", nargs="+", default=[])
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/plots"))
    made.add_argument("--replot", action="store_true", help="measure nothing, read the lines that are there")
    args, rest = made.parse_known_args()
    if not args.values and not args.replot:
        made.error("--values: wanted at least one, got none")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.kind}-{args.over}.jsonl"
    if not args.replot:
        points(args, rest, file)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    print(table(*rows(args.over, found)))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot without matplotlib: install it and run again with --replot; {file} is kept", file=sys.stderr)
        return
    plot(args.over, found, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
