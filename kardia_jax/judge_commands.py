"""``kardia judge serve|probe|show``: the judge by itself, without a training run.

kardia judge serve --judge.kind endpoint --judge.endpoint.model qwen3-8b --host 0.0.0.0
kardia judge probe --judge.kind rules
kardia judge show --run runs/a --step 40 --sample 3
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import tyro

from kardia_jax.config import Config, ConfigError, JudgeConfig, ServeConfig

ConfigFile = Callable[[list[str]], Config]
"""Takes a leading path off the arguments and gives its config, or the defaults."""

KINDS = ("serve", "probe", "show")
USAGE = """usage: kardia judge KIND [CONFIG.py] [--field value ...]

  serve   the judge over HTTP, for many learners: POST /v1/score, health, metrics
  probe   can it be trusted? grades a calibration set and says where it goes wrong
  show    one graded completion in full: what the judge saw, what it said, what it came to

  kardia judge KIND --help lists the fields"""


@dataclass(frozen=True)
class ServeArgs:
    """One judge over HTTP for many learners; the client is --judge.kind remote."""

    judge: JudgeConfig
    serve: Annotated[ServeConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ServeConfig)


def run(arguments: list[str], config_file: ConfigFile) -> int | None:
    """One of the three; returns the exit code."""
    kind, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if kind in ("-h", "--help"):
        print(USAGE)
        return 0
    if kind not in KINDS:
        raise ConfigError("judge", f"one of {', '.join(KINDS)}", kind)
    config = config_file(rest)
    return {"serve": _serve}[kind](rest, config)


def _serve(arguments: list[str], config: Config) -> None:
    args = tyro.cli(ServeArgs, prog="kardia judge serve", args=arguments, default=ServeArgs(config.judge))
    try:
        from kardia_jax.serve.server import serve
    except ImportError as error:
        fix = "Run: pip install 'kardia_jax[serve]'"
        raise ConfigError("judge serve", "fastapi, uvicorn and prometheus-client", f"no {error.name}", fix) from error
    from kardia_jax.scoring import make_grader

    grader = make_grader(args.judge, config.rewards)
    serve(grader.judge, grader.rubric, args.serve)
