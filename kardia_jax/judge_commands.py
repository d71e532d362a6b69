"""``kardia judge serve|probe|show|gap``: the judge by itself, without training.

kardia judge serve --judge.kind endpoint --judge.endpoint.model qwen3-8b --host 0.0.0.0
kardia judge probe --judge.kind rules
kardia judge show --run runs/a --step 40 --sample 3
kardia judge gap --run runs/a
"""

import asyncio
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from kardia_jax.config import Config, ConfigError, JudgeConfig, ServeConfig

if TYPE_CHECKING:
    from kardia_jax.trust.show import Shown

ConfigFile = Callable[[list[str]], Config]
"""Takes a leading path off the arguments and gives its config, or the defaults."""

USAGE = """usage: kardia judge KIND [CONFIG.py] [--field value ...]

  serve   the judge over HTTP, for many learners: POST /v1/score, health, metrics
  probe   can it be trusted? grades a calibration set and says where it goes wrong
  show    one graded completion in full: what the judge saw, what it said, what it came to
  gap     a run's audit as a plot: is the judge that pays getting kinder than the one that looks on?

  kardia judge KIND --help lists the fields"""


@dataclass(frozen=True)
class ServeArgs:
    """One judge over HTTP for many learners; the client is --judge.kind remote."""

    judge: JudgeConfig
    serve: Annotated[ServeConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ServeConfig)


@dataclass(frozen=True)
class ProbeArgs:
    """Grades replies whose marks people agree on, and says where the judge goes wrong. Nothing is cached."""

    judge: JudgeConfig
    items: tuple[pathlib.Path, ...] = ()
    """Calibration files or folders of your own, in the form of kardia_jax/judge/calibration; none: the shipped set."""
    repeats: int = 2
    """Rounds, each in another order; two or more show test-retest and the influence of the place in a batch."""
    seed: int = 0
    """Of the orders."""
    json: bool = False
    """Print every number as JSON."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError("repeats", "at least 1", self.repeats)


@dataclass(frozen=True)
class ShowArgs:
    """One graded completion in full: from a run, or graded anew from the calibration set or a file."""

    judge: JudgeConfig
    run: pathlib.Path | None = None
    """Folder of a `kardia grpo` run; its own rubric and weights are used."""
    step: int | None = None
    """Step of the run; none: the last."""
    sample: int = 0
    """Completion of the step, counted from 0 in the order of rollouts.jsonl."""
    item: str | None = None
    """Reply of the calibration set, like old-dog/good-plain."""
    items: tuple[pathlib.Path, ...] = ()
    """Calibration files or folders of your own, for --item."""
    text: pathlib.Path | None = None
    """File with a reply, or with a completion in its four spans."""
    profile: str = ""
    """Profile of the person whom --text answers."""
    situation: str = ""
    """Situation of that person."""
    said: str = ""
    """What that person said last."""
    prompt: bool = True
    """Show what a judge that is a language model is asked."""


@dataclass(frozen=True)
class GapArgs:
    """A run's audit as a plot: the judge that pays minus the one that looks on, step by step."""

    run: pathlib.Path
    """Folder of a `kardia grpo` run with --judge.audit.every above 0."""


def run(arguments: list[str], config_file: ConfigFile) -> None:
    """One of the four."""
    kind, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if kind in ("-h", "--help"):
        print(USAGE)
        return
    if kind not in KINDS:
        raise ConfigError("judge", f"one of {', '.join(KINDS)}", kind)
    KINDS[kind](rest, config_file(rest))


def _serve(arguments: list[str], config: Config) -> None:
    args = tyro.cli(ServeArgs, prog="kardia judge serve", args=arguments, default=ServeArgs(config.judge))
    try:
        from kardia_jax.serve.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        fix = "Run: pip install 'kardia_jax[serve]'"
        raise ConfigError("judge serve", f"the package {error.name}", "none installed", fix) from error
    from kardia_jax.scoring import make_grader

    grader = make_grader(args.judge, config.rewards)
    serve(grader.judge, grader.rubric, args.serve)


def _probe(arguments: list[str], config: Config) -> None:
    args = tyro.cli(ProbeArgs, prog="kardia judge probe", args=arguments, default=ProbeArgs(config.judge))
    from kardia_jax.judge.calibration import load_calibration
    from kardia_jax.judge.probe import as_json, check_bands, evaluate, rounds
    from kardia_jax.scoring import make_grader
    from kardia_jax.trust.tables import make_console, print_probe

    items = load_calibration(args.items)
    # A cache would answer the second round, and test-retest would measure the cache.
    fresh = dataclasses.replace(args.judge, cache=dataclasses.replace(args.judge.cache, path="off"))
    grader = make_grader(fresh, config.rewards)
    check_bands(grader.rubric, items)
    rounds_told = "1 round" if args.repeats == 1 else f"{args.repeats} rounds"
    print(f"{grader.judge.name} is asked about {len(items)} replies in {rounds_told} ...", file=sys.stderr)
    told = asyncio.run(rounds(grader.judge, items, args.repeats, args.seed))
    probe = evaluate(grader.judge.name, grader.rubric, items, told)
    if args.json:
        print(json.dumps(as_json(probe)))
    else:
        print_probe(probe, make_console())


def _show(arguments: list[str], config: Config) -> None:
    args = tyro.cli(ShowArgs, prog="kardia judge show", args=arguments, default=ShowArgs(config.judge))
    given = [name for name in ("run", "item", "text") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ConfigError("show", "one of --run, --item and --text", ", ".join(given) or "none of them")
    from kardia_jax.trust.rendering import print_shown
    from kardia_jax.trust.show import from_run
    from kardia_jax.trust.tables import make_console

    shown = _graded_anew(args, config) if args.run is None else from_run(args.run, args.step, args.sample)
    print_shown(shown, make_console(), args.prompt)


def _graded_anew(args: ShowArgs, config: Config) -> "Shown":
    from kardia_jax.judge.calibration import find_item, load_calibration
    from kardia_jax.judge.protocol import score_all
    from kardia_jax.rewards.rubric import JudgeRequest
    from kardia_jax.scoring import make_grader
    from kardia_jax.trust.show import from_answer, read_completion

    if args.item is not None:
        item = find_item(load_calibration(args.items), args.item)
        title, request = item.id, item.request
    else:
        assert args.text is not None
        understanding, reasoning, reply = read_completion(args.text)
        history = (("user", args.said),) if args.said else ()
        item, title = None, str(args.text)
        request = JudgeRequest(args.profile, args.situation, history, reply, understanding, reasoning)
    grader = make_grader(args.judge, config.rewards)
    (answer,) = score_all(grader.judge, [request])
    return from_answer(request, answer, grader.rubric, f"{title}, marked by {grader.judge.name}", item)


def _gap(arguments: list[str], config: Config) -> None:
    args = tyro.cli(GapArgs, prog="kardia judge gap", args=arguments)
    from kardia_jax.trust.gap import looks, parts
    from kardia_jax.trust.tables import make_console

    console = make_console()
    for part in parts(args.run, looks(args.run)):
        console.print(part, soft_wrap=isinstance(part, str))


KINDS: dict[str, Callable[[list[str], Config], None]] = {
    "serve": _serve,
    "probe": _probe,
    "show": _show,
    "gap": _gap,
}
