"""Training against a judge on a server that misbehaves: real HTTP, the real loop, and what reaches a reward.

The other faults are met one by one in ``tests/judge/test_endpoint_faults.py``. Here: a step completes, or the run stops
by its own rules; what is missing is unknown in every file, and never a number.
"""

import json
import signal
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from kardia_jax.config import Config
from kardia_jax.config.judge import CacheConfig, EndpointConfig, JudgeConfig, ReplayConfig, TrafficConfig
from kardia_jax.judge.failures import JudgeStopError
from kardia_jax.scoring import make_grader
from kardia_jax.train import train_grpo

STEPS, ROWS = 2, 8
"""Of every run here: 2 prompts of 4 completions a step."""
AWHILE = 60.0
"""Seconds that no run here may take, whatever its judge does; deadlines are a second or two."""
KEY = "sk-very-secret-0123456789"

pytestmark = pytest.mark.usefixtures("every_text_counts")


@pytest.fixture
def run(config_of, fresh_policy, read_lines) -> Callable[..., tuple[Config, list[dict[str, Any]]]]:
    """Trains against these addresses; gives the config and the rows of rollouts.jsonl."""

    def train(
        *urls: str, name: str = "run", traffic: dict[str, Any] | None = None, key_env: str = "", **fields: Any
    ) -> tuple[Config, list[dict[str, Any]]]:
        quick = {"backoff_seconds": 0.01, "breaker_seconds": 0.05, "deadline_seconds": 30.0, **(traffic or {})}
        settings = {
            "kind": "endpoint",
            "endpoint": EndpointConfig(base_urls=urls, model="m", key_env=key_env, response_format="json_schema"),
            "traffic": TrafficConfig(**quick),
            "cache": CacheConfig(path="off"),
            **fields,
        }
        folder = config_of().run.dir.with_name(name)
        config = config_of({"grpo.steps": STEPS, "run.dir": folder, "judge": JudgeConfig(**settings)})
        began = time.monotonic()
        try:
            train_grpo(config, fresh_policy(), make_grader(config.judge, config.rewards))
        finally:
            assert time.monotonic() - began < AWHILE
        return config, read_lines(folder / "rollouts.jsonl")

    return train


def by_prompt(kit, body: dict[str, Any]):
    """Different replies get different marks, so that a wrong one would show."""
    prompt = body["messages"][0]["content"]
    return kit.good(mark=1 + zlib.crc32(prompt.encode()) % 5)


@pytest.fixture
def undisturbed(run, serve, kit) -> list[dict[str, Any]]:
    """The rows of a run whose judge does what it should."""
    _, rows = run(serve(lambda n, body: by_prompt(kit, body)).url, name="undisturbed")
    assert len(rows) == STEPS * ROWS
    assert len({row["rubric"] for row in rows}) > 1
    return rows


def faults(kit) -> list[Any]:
    """What a server does to a request that it should have answered."""
    marks = json.loads(kit.marks_json(kit.rubric))
    first, *rest = marks

    def says(entries: object) -> Any:
        return kit.Plan(body=kit.completion(entries if isinstance(entries, str) else json.dumps(entries)))

    return [
        kit.Plan(how="hang"),
        kit.Plan(how="drip", body=json.dumps(kit.completion(kit.marks_json(kit.rubric)))),
        kit.Plan(how="reset"),
        kit.Plan(status=429, body={"error": {"message": "slow down"}}),
        kit.Plan(status=429, body={"error": {"message": "slow down"}}, headers={"retry-after": "0.1"}),
        kit.Plan(status=500, body="oops"),
        kit.Plan(status=500, body="oops"),
        kit.Plan(status=503, body={}),
        says("I would give it a four."),
        says({"mark": 0}),
        says({name: marks[name] for name in rest}),
        says(json.dumps(marks)[:-1] + f', "{first}": {json.dumps(marks[first])}}}'),
        says({**marks, first: {"reason": "None at all.", "mark": 0}}),
        says({**marks, first: {"reason": "The best.", "mark": 6}}),
        kit.Plan(body='{"choices": [', headers={"connection": "close"}),
        says("<think>" + kit.marks_json(kit.rubric, 5)),
    ]


def test_every_fault_in_one_run_changes_no_reward_where_the_next_try_is_answered(run, serve, kit, undisturbed):
    coming = iter(faults(kit))
    met: set[str] = set()

    def plan(n: int, body: dict[str, Any]):
        prompt = body["messages"][0]["content"]
        if prompt in met:
            return by_prompt(kit, body)
        met.add(prompt)
        return next(coming, None) or by_prompt(kit, body)

    server = serve(plan)
    traffic = {"call_seconds": 0.5, "max_tries": 9, "retry_reserve": 64, "breaker_failures": 100}
    _, rows = run(server.url, traffic=traffic)
    assert rows == undisturbed
    # A request for each distinct reply, one more for each fault, and a few for answers that came late.
    assert len(met) + len(faults(kit)) - 2 <= len(server.requests) <= STEPS * ROWS + 2 * len(faults(kit))


def test_half_of_the_verdicts_lost_are_unknown_and_the_others_as_they_would_be(run, serve, kit, undisturbed):
    def lost(body: dict[str, Any]) -> bool:
        return zlib.crc32(body["messages"][0]["content"][::-1].encode()) % 2 == 0

    def plan(n: int, body: dict[str, Any]):
        return kit.Plan(status=500, body="oops") if lost(body) else by_prompt(kit, body)

    server = serve(plan)
    traffic = {"max_tries": 2, "breaker_failures": 1000}
    _, rows = run(server.url, traffic=traffic, max_failure_share=1.0)
    gone = [row for row in rows if not row["valid"]]
    assert 0 < len(gone) < len(rows)
    for row in gone:
        assert (row["reward"], row["marks"]) == (None, None)
        assert row["rubric"] is None
        assert row["reasons"]["rubric"] == f"no verdict: {server.url}: status 500: oops (after 2 tries)"
    # Before the first update the completions are those of the other run.
    kept = [(row, other) for row, other in zip(rows[:ROWS], undisturbed[:ROWS], strict=True) if row["valid"]]
    assert all(row == other for row, other in kept)
    assert all(row["reward"] > 0 and min(row["marks"].values()) >= 1 for row in rows if row["valid"])
    assert len(server.requests) == len(rows) + len(gone)


@pytest.fixture(params=["nobody listens", "unknown host", "every answer is 500", "nothing ever comes"])
def broken(request, serve, kit) -> tuple[str, str, Callable[[], int]]:
    """An address behind which no verdict can be had, what is said about it, and the requests that it saw."""
    plans = {"every answer is 500": kit.Plan(status=500, body="oops"), "nothing ever comes": kit.Plan(how="hang")}
    server = serve(lambda n, body: plans[request.param])
    if request.param == "nobody listens":
        server.stop()
        return server.url, "ConnectionRefusedError|Connect call failed", lambda: 0
    if request.param == "unknown host":
        return "http://judge.invalid:1/v1", "gaierror", lambda: 0
    says = "status 500: oops" if "500" in request.param else "no complete answer within|no answer within"
    return server.url, says, lambda: len(server.requests)


TIGHT = {"call_seconds": 0.4, "deadline_seconds": 1.5, "retry_share": 0.25, "retry_reserve": 2}


def test_a_judge_that_never_answers_stops_the_run_before_it_learns_anything(run, broken, config_of, read_lines):
    url, says, requests = broken
    folder = config_of().run.dir
    with pytest.raises(JudgeStopError, match=rf"8 of 8 verdicts are missing \(100%\).*Why: .*({says}).*--run\.resume"):
        run(url, traffic=TIGHT)
    assert read_lines(folder / "metrics.jsonl") == read_lines(folder / "rollouts.jsonl") == []
    assert (folder / "checkpoints" / "0").is_dir()
    assert requests() <= ROWS + 2 + 0.25 * ROWS, "no retry storm"


def test_where_that_is_allowed_the_run_goes_on_and_learns_nothing(run, broken, read_lines):
    url, _, requests = broken
    config, rows = run(url, traffic=TIGHT, max_failure_share=1.0)
    assert len(rows) == STEPS * ROWS
    assert all((row["valid"], row["reward"], row["rubric"], row["marks"]) == (False, None, None, None) for row in rows)
    for row in read_lines(config.run.dir / "metrics.jsonl"):
        assert (row["reward"], row["reward/rubric"], row.get("criterion/empathy")) == (None, None, None)
        assert (row["judge_failures"], row["skipped"], row["grad_norm"]) == (1.0, 1.0, 0.0)
    assert requests() <= STEPS * ROWS * 1.25 + 2


def test_a_server_that_restarts_in_the_middle_of_a_step_changes_no_reward(run, serve, kit, undisturbed):
    down = threading.Event()

    def plan(n: int, body: dict[str, Any]):
        if n == 3:
            down.set()
        return kit.Plan(**{**vars(by_prompt(kit, body)), "delay": 0.02})

    server = serve(plan)

    def restart() -> None:
        assert down.wait(AWHILE)
        server.stop()
        time.sleep(0.2)
        server.start()

    other = threading.Thread(target=restart)
    other.start()
    traffic = {"concurrency": 2, "max_tries": 20, "backoff_max_seconds": 0.1}
    _, rows = run(server.url, traffic=traffic)
    other.join()
    assert rows == undisturbed
    assert len(server.requests) <= STEPS * ROWS + 64


def test_a_key_that_is_refused_stops_the_run_at_once(run, serve, kit, monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    server = serve(lambda n, body: kit.Plan(status=401, body={"error": {"message": f"wrong key {KEY}"}}))
    with pytest.raises(JudgeStopError, match=r"wrong key \[key\].*MY_JUDGE_KEY") as stopped:
        run(server.url, key_env="MY_JUDGE_KEY")
    assert KEY not in "".join(traceback.format_exception(stopped.value))
    assert len(server.requests) <= ROWS


def test_the_key_stands_in_no_file_of_a_run_and_in_nothing_that_is_printed(
    run, serve, kit, monkeypatch, capfd, config_of, tmp_path
):
    """Half of the answers are refusals that repeat the request's header; a cache and a recording are kept as well."""
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    refusal = kit.Plan(status=422, body={"error": {"message": f"odd header: Authorization: Bearer {KEY}"}})
    server = serve(lambda n, body: refusal if n % 2 else by_prompt(kit, body))
    cache = CacheConfig(path=str(tmp_path / "verdicts.sqlite"))
    _, rows = run(
        server.url, key_env="MY_JUDGE_KEY", cache=cache, record=tmp_path / "verdicts.jsonl", max_failure_share=1.0
    )
    assert all(f"authorization: bearer {KEY}" in head.lower() for head in server.headers)
    assert any("Authorization: Bearer [key]" in row["reasons"].get("rubric", "") for row in rows)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {path.name for path in files}
    assert {"config.json", "metrics.jsonl", "rollouts.jsonl", "verdicts.sqlite", "verdicts.jsonl"} <= names
    assert any("checkpoints" in path.parts for path in files)
    assert [path for path, content in files.items() if KEY.encode() in content] == []
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err


def test_ctrl_c_while_the_judge_is_waited_for_ends_the_run_and_its_requests(run, serve, kit):
    server = serve(lambda n, body: kit.Plan(how="hang"))
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        end = time.monotonic() + AWHILE
        while server.open < 1 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)
        signal.pthread_kill(main, signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        run(server.url)
    other.join()
    end = time.monotonic() + AWHILE
    while server.open:
        assert time.monotonic() < end, "the server still holds requests of a run that has ended"
        time.sleep(0.01)
    assert [one.name for one in threading.enumerate() if one.name.startswith("judge ")] == []
    assert len(server.requests) <= ROWS


def test_a_recording_of_a_run_judges_it_again_without_the_server(run, serve, kit, undisturbed, tmp_path):
    recording = tmp_path / "verdicts.jsonl"
    server = serve(lambda n, body: by_prompt(kit, body))
    _, rows = run(server.url, name="recorded", record=recording)
    assert rows == undisturbed
    server.stop()
    before = len(server.requests)
    _, again = run(server.url, name="replayed", kind="replay", replay=ReplayConfig(recording))
    assert again == undisturbed
    assert len(server.requests) == before


def test_a_second_run_is_judged_by_the_cache_of_the_first(run, serve, kit, undisturbed, read_lines, tmp_path):
    cache = CacheConfig(path=str(tmp_path / "verdicts.sqlite"))
    server = serve(lambda n, body: by_prompt(kit, body))
    rates = []
    for name in ("first", "second"):
        config, rows = run(server.url, name=name, cache=cache)
        assert rows == undisturbed
        rates.append([row["judge/cache_hit_rate"] for row in read_lines(config.run.dir / "metrics.jsonl")])
    assert rates[1] == [1.0, 1.0]
    assert rates[0][0] < 1
    assert len(server.requests) <= STEPS * ROWS
