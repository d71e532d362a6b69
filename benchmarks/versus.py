"""A peer and kardia_jax on the same workload and machine, in turns: what vs_trl.py, vs_tunix.py and vs_vllm.py share.

Each side runs in a process of its own and prints one JSON object on its last line. They alternate, so that a machine
that slows down slows both. A ratio is the peer's number over ours, pair by pair: above 1, we need less.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from statistics import median
from typing import Any

from kardia_jax.bench.conversion import write_random
from kardia_jax.bench.layout import table
from kardia_jax.dialogue.mini import tokenizer_dir
from kardia_jax.model.shapes import SHAPES

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "kardia-bench"
WORKLOAD = ("model", "prompts", "group", "prompt_len", "new_tokens", "beta", "dtype", "steps")
MEASURES = ("step_seconds", "peak_rss_gb", "peak_device_gb")


@dataclass(frozen=True)
class Peer:
    """Who is compared with, and in what."""

    name: str
    script: str
    """In benchmarks/peers."""
    kind: str
    """Verb of ``kardia bench`` that does the same."""
    installs: tuple[str, ...]
    """Arguments of each ``pip install`` that makes its environment."""
    removes: tuple[str, ...] = ()
    """Packages that come along and do not fit."""


def arguments(peer: Peer, doc: str | None) -> tuple[argparse.Namespace, list[str]]:
    """The workload, and what is left over: the peer's own flags."""
    made = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Other flags are handed to benchmarks/peers/{peer.script}.",
    )
    made.add_argument("--model", default="qwen2.5-0.5b", help="a Hugging Face directory, or a built-in shape")
    made.add_argument("--prompts", type=int, default=2)
    made.add_argument("--group", type=int, default=8)
    made.add_argument("--prompt-len", type=int, default=512)
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--beta", type=float, default=0.04)
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--steps", type=int, default=2, help="measured in every round, after one that is not")
    made.add_argument("--rounds", type=int, default=1, help="times that both sides run, in turns")
    made.add_argument("--venv", type=pathlib.Path, default=CACHE / peer.name, help="made where there is none")
    made.add_argument("--python", help="an interpreter that has the peer, in place of --venv")
    made.add_argument(
        "--models", type=pathlib.Path, default=CACHE / "models", help="for checkpoints of built-in shapes"
    )
    made.add_argument("--ours", default="", help="more flags for `kardia bench`, in one string")
    made.add_argument("--json", action="store_true", help="print the JSON line alone")
    return made.parse_known_args()


def main(peer: Peer, doc: str | None) -> None:
    """Runs both sides and prints the table and, last, everything as one line of JSON."""
    args, rest = arguments(peer, doc)
    python = args.python or str(environment(peer, args.venv))
    args.model = str(checkpoint(args.model, args.models))
    workload = [word for name in WORKLOAD for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    ours = [sys.executable, "-m", "kardia_jax", "bench", peer.kind, *workload, *shlex.split(args.ours), "--json"]
    theirs = [python, str(ROOT / "benchmarks" / "peers" / peer.script), *workload, *rest]
    rounds = [{"ours": last_json(ours), "peer": last_json(theirs)} for _ in range(args.rounds)]
    asked = {name: getattr(args, name) for name in WORKLOAD}
    found = {"peer": peer.name, "command": sys.argv, "asked": asked, "ratios": ratios(rounds), "rounds": rounds}
    if not args.json:
        print(text(peer, found) + "\n")
    print(json.dumps(found))


def environment(peer: Peer, folder: pathlib.Path) -> pathlib.Path:
    """The interpreter of the peer's virtual environment, which is made where there is none."""
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(partial)], check=True, stdout=sys.stderr)
    pip = [str(partial / "bin" / "python"), "-m", "pip"]
    for packages in peer.installs:
        subprocess.run([*pip, "install", "--quiet", *packages.split()], check=True, stdout=sys.stderr)
    for package in peer.removes:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", package], check=True, stdout=sys.stderr)
    partial.rename(folder)
    return python


def checkpoint(model: str, folder: pathlib.Path) -> pathlib.Path:
    """The directory itself; for a built-in shape, a checkpoint of random bfloat16 values with the shipped tokenizer."""
    if model not in SHAPES:
        return pathlib.Path(model).resolve()
    target = folder / model
    if not target.is_dir():
        write_random(SHAPES[model], target)
        shutil.copytree(tokenizer_dir(), target, dirs_exist_ok=True)
    return target


def last_json(command: list[str]) -> dict[str, Any]:
    """Runs a command; what its last line says. Its messages go to stderr."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    return json.loads(done.stdout.splitlines()[-1])


def measures(side: dict[str, Any]) -> dict[str, float]:
    """Step, phases and peaks of one side, those that it has."""
    totals = {name: side[name] for name in MEASURES if side.get(name) is not None}
    return totals | {f"seconds.{name}": seconds for name, seconds in side["seconds"].items()}


def ratios(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Peer over ours for everything that both have: median, least and largest over the rounds."""
    out: dict[str, list[float]] = {}
    for pair in rounds:
        ours, theirs = measures(pair["ours"]), measures(pair["peer"])
        for name in ours:
            if name in theirs:
                out.setdefault(name, []).append(theirs[name] / ours[name])
    return {name: {"median": median(all), "min": min(all), "max": max(all)} for name, all in out.items()}


def text(peer: Peer, found: dict[str, Any]) -> str:
    """The table of medians and ratios."""
    rounds = found["rounds"]
    rows = []
    for name, ratio in found["ratios"].items():
        ours, theirs = (median(measures(pair[side])[name] for pair in rounds) for side in ("ours", "peer"))
        spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        rows.append([name, f"{ours:.3f}", f"{theirs:.3f}", spread])
    first = rounds[0]["peer"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    ours, asked = rounds[0]["ours"], found["asked"]
    return "\n".join(
        [
            f"{ours['model']}, {ours['dtype']}: {ours['prompts']} prompts x {ours['group']}, {ours['prompt_len']} + "
            f"{ours['new_tokens']} tokens (the peer {asked['prompts']} x {asked['group']}, and saw "
            f"{first['prompt_len']} + {first['new_tokens']}), "
            f"{len(rounds)} rounds of {ours['steps']} steps; {versions}",
            "",
            table(["", "kardia_jax", peer.name, "ratio (min to max)"], rows),
        ]
    )
