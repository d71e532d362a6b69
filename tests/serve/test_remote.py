"""The client against the real server: the same verdicts as without it, and what becomes of what breaks."""

import asyncio
import dataclasses
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from kardia_jax.config import ConfigError, JudgeConfig
from kardia_jax.config.judge import RemoteConfig, TrafficConfig
from kardia_jax.judge.factory import make_judge
from kardia_jax.judge.protocol import JudgeUnusableError, close, score_all, take_stats
from kardia_jax.judge.remote import RemoteJudge, refusal
from kardia_jax.judge.rules.judge import RuleJudge
from kardia_jax.judge.traffic import Trouble
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Verdict

QUICK = TrafficConfig(
    call_seconds=2.0,
    deadline_seconds=20.0,
    max_tries=20,
    backoff_seconds=0.05,
    backoff_max_seconds=0.2,
    breaker_seconds=0.1,
)
OTHER = dataclasses.replace(KARDIA_FIVE, version="another")


def remote(url: str, traffic: TrafficConfig = QUICK, token: str = "", rubric=KARDIA_FIVE, **settings) -> RemoteJudge:
    return RemoteJudge(RemoteConfig(urls=(url,), **settings), traffic, rubric, token)


def test_the_verdicts_are_those_of_the_judge_behind_the_server(serving, numbered):
    requests = numbered(7)
    with serving(RuleJudge()) as served:
        judge = remote(served.url, batch=3)
        given = score_all(judge, requests)
        again = score_all(judge, requests[:1])  # another event loop, as every step of an evaluation has
        stats = take_stats(judge)
    assert given == score_all(RuleJudge(), requests)
    assert again == given[:1]
    assert (stats["judge/calls"], stats["judge/verdicts"], stats["judge/failures"]) == (4, 8, 0)


def test_completions_that_end_one_by_one_travel_together(serving, numbered, scripted, all_marks):
    judge = scripted(lambda request: all_marks(int(request.reply[-1]) % 5 + 1))
    requests = numbered(10)

    async def one_by_one(client: RemoteJudge) -> list[Verdict | JudgeFailure]:
        given = await asyncio.gather(*(client.score([request]) for request in requests))
        await close(client)
        return [answer for (answer,) in given]

    with serving(judge) as served:
        client = remote(served.url, batch=4, gather_seconds=0.2)
        given = asyncio.run(one_by_one(client))
    assert given == [all_marks(number % 5 + 1) for number in range(10)]
    assert take_stats(client)["judge/calls"] == 3


def test_failures_stay_failures_and_keep_their_reason(serving, numbered, scripted, all_marks):
    lost = JudgeFailure("timeouts: nothing came", retryable=True)
    with serving(scripted(lambda request: lost if request.reply.endswith("1") else all_marks(2))) as served:
        client = remote(served.url)
        assert score_all(client, numbered(3)) == [all_marks(2), lost, all_marks(2)]
    stats = take_stats(client)
    assert (stats["judge/verdicts"], stats["judge/failures"], stats["judge/calls"]) == (2, 1, 1)


def test_another_rubric_stops_the_run_with_both_fingerprints(serving, asked, scripted, all_marks):
    judge = scripted(lambda _: all_marks(4))
    with serving(judge) as served, pytest.raises(JudgeUnusableError, match="rubric") as stopped:
        score_all(remote(served.url, rubric=OTHER), [asked])
    assert OTHER.fingerprint in str(stopped.value)
    assert KARDIA_FIVE.fingerprint in str(stopped.value)
    assert judge.seen == []


def test_a_token_opens_the_door_and_a_wrong_one_stops_the_run_and_is_not_shown(serving, asked):
    with serving(RuleJudge(), token="right-token") as served:
        assert isinstance(score_all(remote(served.url, token="right-token"), [asked])[0], Verdict)
        for token in ("", "wrong-token"):
            with pytest.raises(JudgeUnusableError, match="KARDIA_JUDGE_TOKEN") as stopped:
                score_all(remote(served.url, token=token), [asked])
            assert "wrong-token" not in str(stopped.value)


def test_a_judge_that_the_server_cannot_use_stops_the_run(serving, asked):
    class Unusable:
        name = "unusable"

        async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
            raise JudgeUnusableError("judge.endpoint: wrong key")

    with serving(Unusable()) as served:
        with pytest.raises(JudgeUnusableError, match=r"judge\.endpoint: wrong key"):
            score_all(remote(served.url), [asked])
        assert httpx2.get(f"{served.url}/healthz").status_code == 503


def test_a_batch_beyond_the_servers_bound_says_which_field_to_lower(serving, numbered):
    with serving(RuleJudge(), max_batch=2) as served, pytest.raises(JudgeUnusableError, match=r"judge\.remote\.batch"):
        score_all(remote(served.url), numbered(3))


def test_nobody_there_is_a_failure_within_the_deadline_and_without_a_storm(asked):
    traffic = dataclasses.replace(QUICK, max_tries=3, deadline_seconds=5.0)
    client, started = remote("http://127.0.0.1:9", traffic), time.monotonic()
    (failure,) = score_all(client, [asked])
    assert time.monotonic() - started < 5.0
    assert isinstance(failure, JudgeFailure)
    assert "127.0.0.1:9" in failure.reason
    assert "3 tries" in failure.reason
    assert take_stats(client)["judge/calls"] == 3


def test_a_server_that_hangs_is_given_up_at_the_deadline(serving, asked, scripted, all_marks):
    traffic = TrafficConfig(call_seconds=0.3, deadline_seconds=1.0, backoff_seconds=0.01, retry_reserve=2)
    with serving(scripted(lambda _: all_marks(4), seconds=5.0), score_seconds=1.0) as served:
        started = time.monotonic()
        (failure,) = score_all(remote(served.url, traffic), [asked])
        assert time.monotonic() - started < 4.0
    assert isinstance(failure, JudgeFailure)
    assert failure.retryable


def test_when_nobody_waits_any_more_the_request_ends_as_well(serving, asked, scripted, all_marks):
    async def give_up(client: RemoteJudge) -> int:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.score([asked]), 0.3)
        await asyncio.sleep(0.1)
        left = len(asyncio.all_tasks())
        await close(client)
        return left

    with serving(scripted(lambda _: all_marks(4), seconds=1.0)) as served:
        assert asyncio.run(give_up(remote(served.url))) == 1


def test_text_that_cannot_travel_fails_alone(serving, asked):
    half = dataclasses.replace(asked, reply="\ud83d")
    with serving(RuleJudge()) as served:
        given = score_all(remote(served.url), [half, asked])
    assert isinstance(given[0], JudgeFailure)
    assert not given[0].retryable
    assert given[1] == RuleJudge().mark(asked)


@pytest.mark.parametrize(
    ("status", "headers", "what", "retryable", "pause"),
    [
        (429, {"retry-after": "7"}, "rate_limited", True, 7.0),
        (500, {}, "server_errors", True, None),
        (503, {"retry-after": "2"}, "server_errors", True, 2.0),
        (408, {}, "server_errors", True, None),
        (418, {}, "rejected", False, None),
    ],
)
def test_a_status_from_something_in_between_says_whether_to_ask_again(status, headers, what, retryable, pause):
    response = httpx2.Response(status, headers=headers, text="<html>a proxy</html>")
    trouble = refusal(response, "http://judge", "TOKEN", now=0.0)
    assert isinstance(trouble, Trouble)
    assert (trouble.what, trouble.retryable, trouble.retry_after) == (what, retryable, pause)
    assert "a proxy" in trouble.reason


@pytest.mark.parametrize("status", [401, 403, 418, 500])
def test_a_server_that_repeats_the_token_does_not_put_it_into_a_message(status):
    for body in ("you sent Bearer abc-123", '{"error": {"code": "x", "message": "Bearer abc-123?"}}'):
        said = str(refusal(httpx2.Response(status, text=body), "http://judge", "TOKEN", now=0.0, token="abc-123"))
        assert "abc-123" not in said
        assert "Bearer [secret]" in said


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_server_that_is_no_judge_stops_the_run(status):
    error = refusal(httpx2.Response(status, text="nginx"), "http://judge", "TOKEN", now=0.0)
    assert isinstance(error, JudgeUnusableError)
    assert "kardia judge serve" in str(error)


def test_the_factory_makes_it_with_the_token_of_the_environment(serving, asked, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "right-token")
    with serving(RuleJudge(), token="right-token") as served:
        config = JudgeConfig(kind="remote", remote=RemoteConfig(urls=(served.url,), token_env="MY_TOKEN"))
        assert isinstance(score_all(make_judge(config, KARDIA_FIVE), [asked])[0], Verdict)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"urls": ()}, "judge.remote.urls"),
        ({"urls": ("judge:8600",)}, "judge.remote.urls"),
        ({"urls": ("http://judge:8600/",)}, "slash"),
        ({"urls": ("http://me:secret@judge:8600",)}, "token_env"),
        ({"token_env": "a secret, pasted"}, "hidden"),
        ({"batch": 0}, "judge.remote.batch"),
        ({"gather_seconds": 2.0}, "judge.remote.gather_seconds"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_showing_secrets(settings, said):
    with pytest.raises(ConfigError, match=said) as refused:
        RemoteConfig(**settings)
    assert "secret" not in str(refused.value).replace("A secret belongs", "")


# --- the server as a process ----------------------------------------------------------------------------------


def start(port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """``kardia judge serve`` in a process of its own, and its address once it listens."""
    command = [sys.executable, "-m", "kardia_jax", "judge", "serve", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert " at http://" in line, line
    url = line.split(" at ")[1].split(" ")[0]
    end = time.monotonic() + 60
    while True:
        try:
            httpx2.get(f"{url}/healthz", timeout=5)
            return process, url
        except httpx2.TransportError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_server_that_is_killed_and_started_again_costs_nothing_but_time(numbered):
    first, url = start()
    try:
        client = remote(
            url, dataclasses.replace(QUICK, deadline_seconds=120.0, max_tries=1000, retry_reserve=1000), batch=2
        )
        assert score_all(client, numbered(2)) == score_all(RuleJudge(), numbered(2))
        first.send_signal(signal.SIGKILL)
        first.wait()
        given: list[Verdict | JudgeFailure] = []
        asking = threading.Thread(target=lambda: given.extend(score_all(client, numbered(20))))
        asking.start()
        second, _ = start(int(url.rsplit(":", 1)[1]))
        try:
            asking.join(timeout=120)
        finally:
            second.send_signal(signal.SIGTERM)
            out, _ = second.communicate(timeout=30)
    finally:
        first.kill()
        first.communicate()
    assert given == score_all(RuleJudge(), numbered(20))
    assert second.returncode == 0
    assert out.splitlines()[-1] == "stopped: 20 verdicts, 0 failures"


SLOW = """
import asyncio, sys
from kardia_jax.config import ServeConfig
from kardia_jax.judge.rules.judge import RuleJudge
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.serve.server import serve

class Slow(RuleJudge):
    async def score(self, requests):
        print("judging", flush=True)
        await asyncio.sleep(float(sys.argv[1]))
        return await super().score(requests)

serve(Slow(), KARDIA_FIVE, ServeConfig(port=0, drain_seconds=3))
"""


@pytest.mark.parametrize(("seconds", "finishes"), [(1.0, True), (30.0, False)])
def test_sigterm_lets_requests_finish_within_the_deadline_and_not_beyond(asked, seconds, finishes):
    command = [sys.executable, "-c", SLOW, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split(" at ")[1].split(" ")[0]
        given: list[Verdict | JudgeFailure] = []
        client = remote(url, dataclasses.replace(QUICK, call_seconds=60.0, max_tries=1, deadline_seconds=60.0))
        asking = threading.Thread(target=lambda: given.extend(score_all(client, [asked])))
        asking.start()
        while process.stdout.readline() != "judging\n":
            pass
        process.send_signal(signal.SIGTERM)
        asking.join(timeout=30)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
    assert [isinstance(answer, Verdict) for answer in given] == [finishes]
