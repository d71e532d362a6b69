"""The command line: ``kardia VERB [CONFIG.py] [--part.field value ...]``.

    kardia demo configs/demo.py --seeds 3
    kardia grpo configs/demo.py --run.dir runs/a --grpo.group 16
    kardia import Qwen/Qwen2.5-0.5B-Instruct models/qwen --dtype bfloat16
    kardia export runs/a out/a --dtype bfloat16
    kardia verify models/qwen --against transformers
    kardia bench step --model qwen2.5-0.5b --group 16
    kardia judge serve --judge.kind rules
    kardia plan configs/kardia_qwen2_5_7b.py --topology v5e:4x4 --mesh.fsdp 4 --mesh.tensor 4

A config file is Python with ``get_config() -> Config``; what follows overrides its fields. Errors that a person can
mend are one message on stderr and exit code 2 (1 for a run that stopped, checkpoints that differ, or a plan that fits
nowhere; 143 for a run that saved on SIGTERM); anything else is a bug and shows its trace.
"""

import errno
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from kardia_jax.config import BenchConfig, Config, ConfigError, ImportBenchConfig, load_config
from kardia_jax.platforms import leave_out_absent_tpus

USAGE = """usage: kardia VERB [CONFIG.py] [--part.field value ...]

  demo     mini data, warm start, GRPO, evaluation, export: the whole path in minutes   [--seeds N]
  sft      supervised warm start
  grpo     GRPO against the rubric judge
  eval     held-out evaluation of a policy
  import   SOURCE TARGET: a Hugging Face checkpoint, local or from the Hub, as a directory for --model.source
  export   SOURCE TARGET: a run's newest checkpoint, or a model directory, as a Hugging Face directory
  verify   A B: are two checkpoints the same model?  A --against transformers: does ours compute what theirs does?
  doctor   what this machine and this installation can do
  bench    step, sample, update or import: seconds by phase, memory, and how near the machine's ceilings that is
  judge    serve, probe, show or gap: the judge over HTTP; whether it can be trusted; one graded completion in full;
           a run's judge against the one that audits it
  plan     will it fit, and how fast may it be: bytes, collectives and an estimate of a step, without an accelerator

  kardia VERB --help lists every field with its default. CONFIG.py is a Python file with get_config()."""


SavedDtype = Literal["keep", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class DemoArgs:
    """The whole path on one machine; see configs/demo.py."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    seeds: int = 1
    """Runs with different seeds; intervals are over seeds when there are several."""


@dataclass(frozen=True)
class ImportArgs:
    """A Hugging Face checkpoint as a directory that --model.source and kardia_jax.load read, tensor by tensor."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A local directory, or a Hub id like owner/name."""
    target: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Folder to write; must not exist unless --overwrite."""
    dtype: SavedDtype = "keep"
    """Type of the written weights; keep: the checkpoint's own."""
    max_shard_size: str = "5GB"
    """Largest weight file, like 5GB or 500MB."""
    overwrite: bool = False
    """Replace a folder that holds a model."""


@dataclass(frozen=True)
class ExportArgs:
    """A run's newest checkpoint, or a model directory, as a Hugging Face directory."""

    source: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder of a `kardia sft` or `kardia grpo` run, or a model directory."""
    target: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Folder to write; must not exist unless --overwrite."""
    dtype: SavedDtype = "keep"
    """Type of the exported weights; keep: float32 of a run, a directory's own."""
    max_shard_size: str = "5GB"
    """Largest weight file, like 5GB or 500MB."""
    overwrite: bool = False
    """Replace a folder that holds a model."""
    results: pathlib.Path | None = None
    """An eval.json of `kardia eval`: its table goes on the model card of a run."""
    licence: str = "apache-2.0"
    """SPDX id on a card that is written anew; weights inherit the licence of what they started from."""
    push: str | None = None
    """Upload to this Hub repository (owner/name) afterwards."""
    adapter: pathlib.Path | None = None
    """Folder for the LoRA adapter alone, as PEFT reads it; TARGET holds the merged model either way."""


@dataclass(frozen=True)
class VerifyArgs:
    """Are two checkpoints the same model? Exit code 0 if they are, 1 if not."""

    a: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A model directory."""
    b: Annotated[pathlib.Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="B")] = None
    """Another one, compared tensor by tensor and in what it answers."""
    against: Literal["directory", "transformers"] = "directory"
    """transformers: what A answers in our code and in transformers, which needs PyTorch."""
    json: bool = False
    """Print every number as JSON."""
    prompts: int = 10
    """Fixed prompts, at most 10; random ids for a model without tokenizer."""
    new_tokens: int = 64
    """Tokens of each greedy continuation."""
    seed: int = 0
    """Of the random ids."""
    tolerance: float = 1e-4
    """Largest difference of a logit or a log-prob (nats)."""
    tensor_tolerance: float = 0.0
    """Largest difference of a number in a tensor."""


@dataclass(frozen=True)
class PlanArgs:
    """What a GRPO run needs on so many devices, compiled with abstract values: no weights, no accelerator."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    devices: int | None = None
    """Devices of the mesh; none: as many as its sizes make, or the chips of the topology."""
    chip: str | None = None
    """v5e, v5p, v6e, a100-40, a100-80, h100, h200 or l40s; none: all of them."""
    topology: str | None = None
    """A TPU slice to compile for, like v5e:4x4; needs the extra `plan`."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class DoctorArgs:
    """What this machine and this installation can do, one line each; takes no arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    # transformers would advise everybody to install PyTorch, which this package does without.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    leave_out_absent_tpus()
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if verb not in VERBS:
        print(f"verb: wanted one of {', '.join(VERBS)}, got {verb!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    return _outcome(verb, lambda: VERBS[verb](arguments))


def _outcome(verb: str, work: Callable[[], int | None]) -> int:
    """Does the work of a verb and says what went wrong; returns the exit code."""
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        if not _is_ours(error):
            raise
        print(f"kardia {verb}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not _is_ours(error):
            raise
        print(f"kardia {verb}: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "go on with --run.resume" if verb in ("sft", "grpo") else "run it again"
        print(f"kardia {verb}: interrupted; {again}", file=sys.stderr)
        return 130
    except SystemExit as done:  # tyro's: 0 after --help, 2 after a mistake that it has explained
        return done.code if isinstance(done.code, int) else 2


def _is_ours(error: Exception) -> bool:
    """Whether a person can mend it: raised by name in this package, or the system's own on a file or a full disk."""
    if isinstance(error, OSError):
        return bool(error.filename) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__module__.startswith("kardia_jax")


SHORT = {f"--{name}": f"--hosts.{name}" for name in ("coordinator", "processes", "process")}
"""What is typed by hand, on every host."""


def read_config(verb: str, arguments: list[str]) -> Config:
    """The config file, if the first argument is one, with the overrides that follow it."""
    arguments = [SHORT.get(argument, argument) for argument in arguments]
    base = config_file(arguments)
    return tyro.cli(Config, prog=f"kardia {verb}", args=arguments, default=base)


def config_file(arguments: list[str]) -> Config:
    """Takes a leading path off the arguments and runs its ``get_config()``; the defaults where there is none."""
    if not arguments or arguments[0].startswith("-"):
        return Config()
    return load_config(pathlib.Path(arguments.pop(0)))


# The rooms behind a verb take seconds to import (JAX, transformers), so each verb imports its own.


def _demo(arguments: list[str]) -> None:
    from kardia_jax.compilation import use_compilation_cache
    from kardia_jax.demo import run_demo

    if not arguments or (arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments)):
        fix = "In a clone of the repository: kardia demo configs/demo.py"
        raise ConfigError("demo", "a config file first", " ".join(arguments) or None, fix)
    args = tyro.cli(DemoArgs, prog="kardia demo", default=DemoArgs(config_file(arguments)), args=arguments)
    use_compilation_cache(args.config.run.compilation_cache)
    run_demo(args.config, args.seeds)


def _sft(arguments: list[str]) -> int:
    return _in_processes("sft", read_config("sft", arguments), _train_sft)


def _grpo(arguments: list[str]) -> int:
    return _in_processes("grpo", read_config("grpo", arguments), _train_grpo)


def _in_processes(verb: str, config: Config, train: Callable[[Config], None]) -> int:
    """Runs it in this process and those that belong to it; one that fails must not wait for the others to end."""
    from kardia_jax.hosts import end_if_joined, joined

    def run() -> None:
        with joined(config):
            train(config)

    try:
        code = _outcome(verb, run)
    except Exception:
        traceback.print_exc()
        end_if_joined(1)
        raise
    if code:
        end_if_joined(code)
    return code


def _train_sft(config: Config) -> None:
    from kardia_jax.compilation import use_compilation_cache
    from kardia_jax.export import export_final
    from kardia_jax.model.sharding import make_mesh
    from kardia_jax.policies import load_policy
    from kardia_jax.sft import train_sft

    use_compilation_cache(config.run.compilation_cache)
    policy = train_sft(config, load_policy(config.model, config.run.seed, make_mesh(config.mesh)))
    export_final(config, policy, "sft")


def _train_grpo(config: Config) -> None:
    from kardia_jax.compilation import use_compilation_cache
    from kardia_jax.export import export_final
    from kardia_jax.model.sharding import make_mesh
    from kardia_jax.policies import load_policy
    from kardia_jax.scoring import make_grader, with_auditor
    from kardia_jax.train import train_grpo

    use_compilation_cache(config.run.compilation_cache)
    policy = load_policy(config.model, config.run.seed, make_mesh(config.mesh))
    grader = with_auditor(make_grader(config.judge, config.rewards), config.judge)
    policy = train_grpo(config, policy, grader)
    export_final(config, policy, "grpo")


def _eval(arguments: list[str]) -> None:
    config = read_config("eval", arguments)
    from kardia_jax.compilation import use_compilation_cache
    from kardia_jax.hosts import require_one_process
    from kardia_jax.report import evaluate_and_report

    require_one_process(config.hosts, "eval")
    use_compilation_cache(config.run.compilation_cache)
    evaluate_and_report(config)


def _import(arguments: list[str]) -> None:
    args = tyro.cli(ImportArgs, prog="kardia import", args=arguments)
    from kardia_jax.hf.convert import convert
    from kardia_jax.hf.hub import local

    convert(local(args.source), args.target, args.dtype, args.max_shard_size, args.overwrite)
    print(f"imported to {args.target}")


def _export(arguments: list[str]) -> None:
    args = tyro.cli(ExportArgs, prog="kardia export", args=arguments)
    from kardia_jax.export import export

    address = export(
        args.source,
        args.target,
        args.dtype,
        args.max_shard_size,
        args.overwrite,
        args.results,
        args.licence,
        args.push,
        args.adapter,
    )
    print(f"exported to {args.target}" + (f" and {address}" if address else ""))


def _verify(arguments: list[str]) -> int:
    args = tyro.cli(VerifyArgs, prog="kardia verify", args=arguments)
    from kardia_jax.verify import summary, verify

    report = verify(
        args.a,
        args.b,
        args.against,
        args.prompts,
        args.new_tokens,
        args.seed,
        args.tolerance,
        args.tensor_tolerance,
    )
    print(json.dumps(report.as_json(), indent=2) if args.json else summary(report))
    return 0 if report.agree else 1


def _doctor(arguments: list[str]) -> None:
    tyro.cli(DoctorArgs, prog="kardia doctor", args=arguments)
    from kardia_jax.doctor import diagnose

    diagnose()


def _bench(arguments: list[str]) -> None:
    kinds = ("step", "sample", "update", "import")
    kind, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if kind in ("-h", "--help"):
        print(f"usage: kardia bench {{{','.join(kinds)}}} [--field value ...]; kardia bench step --help lists fields")
        return
    if kind not in kinds:
        raise ConfigError("bench", f"one of {', '.join(kinds)}", kind)
    if kind == "import":
        args = tyro.cli(ImportBenchConfig, prog="kardia bench import", args=rest)
        from kardia_jax.bench import conversion

        found = conversion.run_import(args)
        shown = conversion.text(found)
    else:
        args = tyro.cli(BenchConfig, prog=f"kardia bench {kind}", args=rest)
        from kardia_jax.bench import report, run

        found = run.run_bench(kind, args)
        shown = report.text(found)
    if not args.json:
        print(shown + "\n")
    print(json.dumps(found))


def _judge(arguments: list[str]) -> None:
    from kardia_jax.judge_commands import run

    run(arguments, config_file)


def _plan(arguments: list[str]) -> int:
    args = tyro.cli(PlanArgs, prog="kardia plan", default=PlanArgs(config_file(arguments)), args=arguments)
    from kardia_jax.plan.report import text
    from kardia_jax.plan.run import plan

    found = plan(args.config, args.devices, args.chip, args.topology)
    print(json.dumps(found) if args.json else text(found))
    return 0 if any(one["fits"] for one in found["chips"]) else 1


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "demo": _demo,
    "sft": _sft,
    "grpo": _grpo,
    "eval": _eval,
    "import": _import,
    "export": _export,
    "verify": _verify,
    "doctor": _doctor,
    "bench": _bench,
    "judge": _judge,
    "plan": _plan,
}
