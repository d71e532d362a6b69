"""Judge latency x concurrency x step time: how much of a slow judge the training loop hides.

    python benchmarks/judge_overlap.py --concurrency 64   # the first line's rollout is the unit R
    python benchmarks/judge_overlap.py --latency 0.25 0.5 1 --concurrency 16   # adds lines to --json, prints the table

Runs ``train_grpo`` as `kardia grpo` does, with the endpoint judge and a real HTTP server on loopback (a process of its
own) that answers every call after a set time. Each call first makes a run that is not counted and compiles what the
others share; about five minutes on 2 CPU cores for all.

Two things are not as in training. The model is untrained and writes no spans, so the parser is replaced and every
completion is judged. And so many ids end a completion that lengths differ as those of answers do (a mean of about 90
tokens of at most 256): where all completions end at once, nothing but the reference is left to hide behind without lag.

The first two steps and the last one are not counted: nothing is sampled behind the last one.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from statistics import median
from typing import Any

PROMPTS, GROUP, TOKENS = 8, 8, 256
ENDS = range(300, 332)
"""Of 3,200 ids that are about equally likely: one token in a hundred ends its completion."""
MAKERS = ("make_generate", "make_score", "make_compiled_update", "make_optimizer", "make_loss", "grpo_objective")
"""What a run compiles; the runs of one process share it, so that no step waits for a compiler."""
CALLS = PROMPTS * GROUP
"""Of a step."""
UNCOUNTED = 2


# ---- the judge's server: /SECONDS/v1/chat/completions


async def serve(names: list[str]) -> None:
    """Prints its port, then answers until the process that started it has gone."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                size = int(head.split("content-length:")[1].split("\r\n")[0])
                body = await reader.readexactly(size)
                await asyncio.sleep(float(head.split("/")[1]))
                writer.write(response(names, body))
                await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


def response(names: list[str], body: bytes) -> bytes:
    """Marks by a checksum of what was asked, so that the completions of a group differ."""
    marks = {name: {"reason": "As asked.", "mark": 1 + zlib.crc32(name.encode() + body) % 5} for name in names}
    said = {"role": "assistant", "content": json.dumps(marks)}
    usage = {"prompt_tokens": len(body) // 4, "completion_tokens": 100, "total_tokens": len(body) // 4 + 100}
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "timed", "usage": usage}
    text = json.dumps(answer | {"choices": [{"index": 0, "finish_reason": "stop", "message": said}]}).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)


@contextlib.contextmanager
def server() -> Iterator[int]:
    """The server's port, while it runs."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


# ---- runs


def measure(port: int, folder: pathlib.Path, latency: float, concurrency: int, lag: int, steps: int) -> dict[str, Any]:
    """One run: medians over its counted steps."""
    from kardia_jax.config import (
        CacheConfig,
        Config,
        DataConfig,
        EndpointConfig,
        GrpoConfig,
        JudgeConfig,
        ModelConfig,
        RunConfig,
        SamplerConfig,
        TrafficConfig,
    )
    from kardia_jax.observe.jsonl import read_rows
    from kardia_jax.policies import load_policy
    from kardia_jax.scoring import make_grader
    from kardia_jax.train import train_grpo

    config = Config(
        run=RunConfig(dir=folder, save_every=steps, console=False),
        data=DataConfig(system_prompt=pathlib.Path(__file__).parents[1] / "configs/demo_system_prompt.txt"),
        model=ModelConfig(source="demo-qwen3", remat="none", head_chunk=256),
        judge=JudgeConfig(
            kind="endpoint",
            endpoint=EndpointConfig((f"http://127.0.0.1:{port}/{latency:g}/v1",), "timed"),
            traffic=TrafficConfig(concurrency=concurrency),
            cache=CacheConfig("off"),
        ),
        grpo=GrpoConfig(
            steps=steps, prompts=PROMPTS, group=GROUP, lag=lag, sampler=SamplerConfig(max_new_tokens=TOKENS)
        ),
    )
    policy = load_policy(config.model, config.run.seed)
    policy = policy._replace(end_ids=(*policy.end_ids, *ENDS))
    with contextlib.redirect_stdout(sys.stderr):
        train_grpo(config, policy, make_grader(config.judge, config.rewards))
    rows = read_rows(config.run.dir / "metrics.jsonl")[UNCOUNTED:-1]
    assert not any(row["judge_failures"] for row in rows), "a verdict is missing; nothing was measured"
    return {"latency": latency, "concurrency": concurrency, "lag": lag, **summary(rows)}


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over steps; a step is the sum of its phases, saving left out."""
    phases = ("rollout", "judge", "reference", "update")

    def middle(name: str) -> float:
        return median(float(row[name]) for row in rows)

    return {
        "step": median(sum(float(row[f"seconds/{name}"]) for name in phases) for row in rows),
        **{name: middle(f"seconds/{name}") for name in phases},
        "busy": middle("judge/busy_seconds"),
        "hidden": middle("judge/hidden_share"),
    }


HEADER = ["latency of a call, s", "calls at once", "lag", "judge busy, s", "waited for, s", "hidden", "step, s"]


def cells(found: dict[str, Any]) -> list[str]:
    """One row of the table."""
    share = f" ({found['latency'] / found['unit']:.2g} R)" if found["latency"] else ""
    return [
        f"{found['latency']:.2f}{share}",
        str(found["concurrency"]),
        str(found["lag"]),
        f"{found['busy']:.2f}",
        f"{found['judge']:.2f}",
        f"{found['hidden']:.0%}",
        f"{found['step']:.2f}",
    ]


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--steps", type=int, default=6, help="of each run, the three that are not counted included")
    made.add_argument(
        "--latency", type=float, nargs="*", default=[0.0, 0.25, 0.5, 1.0], help="of a call, in units of R"
    )
    made.add_argument("--concurrency", type=int, nargs="+", default=[16, CALLS])
    made.add_argument("--lag", type=int, nargs="+", default=[0, 1])
    made.add_argument("--json", type=pathlib.Path, default=pathlib.Path("judge_overlap.jsonl"), help="a line per run")
    args = made.parse_args()
    if args.serve:
        from kardia_jax.rewards.kardia_five import KARDIA_FIVE

        asyncio.run(serve([criterion.name for criterion in KARDIA_FIVE.criteria]))
        return

    from kardia_jax import scoring, train
    from kardia_jax.bench.layout import machine, table
    from kardia_jax.compilation import use_compilation_cache
    from kardia_jax.dialogue.spans import Spans

    scoring.parse = lambda text: Spans("-", "-", "sad", text or "-")
    for maker in MAKERS:
        setattr(train, maker, functools.cache(getattr(train, maker)))
    with server() as port:
        use_compilation_cache("auto")

        def run(latency: float, concurrency: int, lag: int) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                return measure(port, pathlib.Path(folder), latency, concurrency, lag, args.steps)

        run(0.0, CALLS, args.lag[-1])
        unit = lines(args.json)[0]["rollout"] if args.json.exists() else None
        for latency, concurrency, lag in itertools.product(args.latency, args.concurrency, args.lag):
            found = run(round(latency * (unit or 0.0), 3), concurrency, lag)
            unit = unit or found["rollout"]
            with args.json.open("a") as file:
                file.write(json.dumps(found | {"unit": unit} | machine()) + "\n")
    rows = lines(args.json)
    print(f"R, the rollout by itself: {rows[0]['unit']:.2f} s; {PROMPTS} prompts x {GROUP} completions; {machine()}\n")
    print(table(HEADER, [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
