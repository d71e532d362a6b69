"""What the endpoint judge costs the process that trains: verdicts per second, and processor time per verdict.

    python benchmarks/judge.py --json

Everything is real but the model: a server in a process of its own answers over HTTP on loopback after ``--delay``
seconds, and requests take the training loop's way (``JudgeSession``, ``EndpointJudge``, the openai library, traffic
control, SQLite). Dialogues and replies are those of the calibration set, each reply made different by its number.

    fresh    every verdict is asked for and then kept; no more than concurrency / delay can come per second
    cached   every verdict is in the file already, and no server is there
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from kardia_jax.bench.layout import table
from kardia_jax.config import EndpointConfig, JudgeSamplingConfig, TrafficConfig
from kardia_jax.judge.cache import VerdictCache
from kardia_jax.judge.calibration import load_calibration
from kardia_jax.judge.endpoint import EndpointJudge, cache_key, identity
from kardia_jax.judge.session import JudgeSession
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, Rubric, Verdict, load_rubric, questions

STEP = 1024
"""Completions that are asked about together: 128 prompts of 8."""
REASON = "It names what happened in the person's own words and stays with the feeling before anything else."


class Answering(asyncio.Protocol):
    """Keeps connections open and answers each request after a while, always the same."""

    def __init__(self, answer: bytes, delay: float):
        self._answer, self._delay, self._read = answer, delay, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        if not found:
            return
        length = next(int(row[15:]) for row in head.lower().split(b"\r\n") if row.startswith(b"content-length:"))
        if len(body) >= length:
            del self._read[: len(head) + 4 + length]
            asyncio.get_running_loop().call_later(self._delay, self._say)

    def _say(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._answer)


async def serve(rubric: Rubric, delay: float) -> None:
    """Prints its port and serves until it is ended."""
    marks = json.dumps({name: {"reason": REASON, "mark": 4} for name in rubric.names})
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": marks}}
    usage = {"prompt_tokens": 1000, "completion_tokens": 150, "total_tokens": 1150}
    body = json.dumps({"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage})
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    answer = (head + body).encode()
    server = await asyncio.get_running_loop().create_server(
        lambda: Answering(answer, delay), "127.0.0.1", 0, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def requests() -> Iterator[JudgeRequest]:
    """As many as are wanted, no two alike."""
    asked = [item.request for item in load_calibration()]
    for number, one in enumerate(itertools.cycle(asked)):
        yield dataclasses.replace(one, reply=f"{one.reply} ({number})")


def judged(judge: EndpointJudge, asked: Iterator[JudgeRequest], count: int) -> dict[str, Any]:
    """Asks step by step, as training does; wall and processor time of this process, all threads."""
    failures: list[str] = []
    wall = worked = 0.0
    with JudgeSession(judge) as session:
        for start in range(0, count, STEP):
            step = list(itertools.islice(asked, min(STEP, count - start)))
            began, before = time.perf_counter(), time.process_time()
            said = session.gather([session.submit(request) for request in step])
            wall, worked = wall + time.perf_counter() - began, worked + time.process_time() - before
            failures += [one.reason for one in said if isinstance(one, JudgeFailure)]
    if failures:
        raise SystemExit(f"{len(failures)} of {count} verdicts are missing: {failures[0]}")
    counted = judge.take_stats()
    return {
        "verdicts": count,
        "seconds": wall,
        "verdicts_per_second": count / wall,
        "cpu_ms_per_verdict": 1000 * worked / count,
        "calls": int(counted["judge/calls"]),
        "latency_p50": known(counted["judge/latency_p50"]),
        "latency_p95": known(counted["judge/latency_p95"]),
        "cache_hit_rate": counted["judge/cache_hit_rate"],
    }


def known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def make_judge(port: int, concurrency: int, rubric: Rubric, cache: VerdictCache) -> EndpointJudge:
    """The judge of a config whose server is at this port."""
    endpoint = EndpointConfig(base_urls=(f"http://127.0.0.1:{port}/v1",), model="m")
    return EndpointJudge(endpoint, JudgeSamplingConfig(), TrafficConfig(concurrency=concurrency), rubric, cache=cache)


def fresh(args: argparse.Namespace, rubric: Rubric, folder: pathlib.Path) -> dict[str, Any]:
    """Every verdict over HTTP. A first step, which is not counted, opens connections and settles the format."""
    command = [sys.executable, __file__, "--serve", "--delay", str(args.delay)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        cache = VerdictCache(folder / "fresh.sqlite", 2**30)
        judge = make_judge(port, args.concurrency, rubric, cache)
        asked = requests()
        judged(judge, asked, args.concurrency)
        found = judged(judge, asked, args.verdicts)
        cache.close()
        return found
    finally:
        server.kill()
        server.wait()


def cached(args: argparse.Namespace, rubric: Rubric, folder: pathlib.Path) -> dict[str, Any]:
    """Every verdict from the file; the port is closed, so that a miss would show as a failure."""
    cache = VerdictCache(folder / "cached.sqlite", 2**30)
    judge = make_judge(1, args.concurrency, rubric, cache)
    who = identity(EndpointConfig(model="m"), JudgeSamplingConfig(), rubric)
    verdict = Verdict(tuple(Mark(name, 4, REASON) for name in rubric.names))
    for request in itertools.islice(requests(), args.cached):
        cache.put(cache_key(who, questions(rubric, request)), verdict)
    found = judged(judge, requests(), args.cached)
    cache.close()
    return found | {"file_mb": round((folder / "cached.sqlite").stat().st_size / 2**20, 1)}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--delay", type=float, default=0.2, help="seconds until the server answers")
    made.add_argument("--concurrency", type=int, default=64)
    made.add_argument("--verdicts", type=int, default=4096, help="over HTTP")
    made.add_argument("--cached", type=int, default=100_000, help="from the file")
    made.add_argument("--rubric", default="kardia_five")
    made.add_argument("--json", action="store_true")
    made.add_argument("--serve", action="store_true", help="be the server")
    args = made.parse_args()
    rubric = load_rubric(args.rubric)
    if args.serve:
        asyncio.run(serve(rubric, args.delay))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {kind.__name__: kind(args, rubric, pathlib.Path(folder)) for kind in (fresh, cached)}
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    if args.json:
        print(json.dumps({"delay": args.delay, "concurrency": args.concurrency, **machine, **found}))
        return
    names = ["verdicts", "seconds", "verdicts_per_second", "cpu_ms_per_verdict", "calls", "latency_p50", "latency_p95"]
    print(
        table(
            ["", *names],
            [
                [kind, *("" if one[name] is None else f"{one[name]:.4g}" for name in names)]
                for kind, one in found.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
