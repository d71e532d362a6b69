"""The endpoint judge against a real HTTP server that misbehaves in every way that servers do.

For each fault: what becomes of the verdicts, how many requests the server saw, and how long it took. No fault may
become a number, hang beyond its deadline, or multiply requests.
"""

import asyncio
import json
import math
import time
from typing import Any

import pytest

from kardia_jax.config import RewardConfig
from kardia_jax.dialogue.dataset import Dialogue, Turn
from kardia_jax.dialogue.spans import Spans
from kardia_jax.judge.endpoint import EndpointJudge
from kardia_jax.judge.protocol import JudgeUnusableError, score_all
from kardia_jax.judge.scoring import Completion, score_completions
from kardia_jax.rewards.combine import combine
from kardia_jax.rewards.rubric import JudgeFailure, Verdict


def reasons(given: list[Verdict | JudgeFailure]) -> list[str]:
    return [one.reason if isinstance(one, JudgeFailure) else "" for one in given]


# ---- the fault matrix: faults that pass


def once(fault, good):
    """The first request of every reply meets the fault, later ones succeed."""
    seen: set[str] = set()

    def plan(n: int, body: dict[str, Any]):
        prompt = body["messages"][0]["content"]
        first = prompt not in seen
        seen.add(prompt)
        return fault if first else good

    return plan


def faults(kit) -> dict[str, tuple[Any, str]]:
    """Name to what the server does, and under which name it is counted."""

    def bad(text: object) -> Any:
        return kit.Plan(body=kit.completion(text if isinstance(text, str) else json.dumps(text)))

    good = {name: {"reason": "So.", "mark": 4} for name in kit.rubric.names}
    first = kit.rubric.names[0]
    body = json.dumps(kit.completion(kit.marks_json(kit.rubric)))
    return {
        "timeout": (kit.Plan(how="hang"), "timeouts"),
        "slow drip": (kit.Plan(how="drip", body=body), "timeouts"),
        "connection reset": (kit.Plan(how="reset"), "connection_errors"),
        "429 without Retry-After": (kit.Plan(status=429, body={"error": {"message": "slow down"}}), "rate_limited"),
        "429 with Retry-After": (
            kit.Plan(status=429, body={"error": {"message": "slow down"}}, headers={"retry-after": "0.2"}),
            "rate_limited",
        ),
        "500": (kit.Plan(status=500, body="oops", headers={"content-type": "text/plain"}), "server_errors"),
        "503 with Retry-After": (kit.Plan(status=503, body={}, headers={"retry-after": "0.2"}), "server_errors"),
        "a cut body": (kit.Plan(body='{"choices": [', headers={"connection": "close"}), "unreadable"),
        "no completion": (kit.Plan(body={"object": "list"}), "unreadable"),
        "a page": (kit.Plan(body="<html>", headers={"content-type": "text/html"}), "unreadable"),
        "invalid JSON": (bad("I would give it a four."), "unreadable"),
        "wrong schema": (bad({"mark": 4}), "unreadable"),
        "a missing criterion": (bad({k: v for k, v in good.items() if k != first}), "unreadable"),
        "a repeated criterion": (
            bad(json.dumps(good)[:-1] + f', "{first}": {json.dumps(good[first])}}}'),
            "unreadable",
        ),
        "a mark out of range": (bad({**good, first: {"reason": "So.", "mark": 0}}), "unreadable"),
        "a mark above the range": (bad({**good, first: {"reason": "So.", "mark": 6}}), "unreadable"),
        "half a mark": (bad({**good, first: {"reason": "So.", "mark": 4.5}}), "unreadable"),
        "a mark that is none": (bad({**good, first: {"reason": "So.", "mark": "5"}}), "unreadable"),
        "an empty answer": (bad(" "), "unreadable"),
    }


NAMES = [
    *("timeout", "slow drip", "connection reset", "429 without Retry-After", "429 with Retry-After", "500"),
    *("503 with Retry-After", "a cut body", "no completion", "a page", "invalid JSON", "wrong schema"),
    *("a missing criterion", "a repeated criterion", "a mark out of range", "a mark above the range"),
    *("half a mark", "a mark that is none", "an empty answer"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_that_passes_costs_a_retry_and_no_verdict(serve, kit, name):
    fault, counted = faults(kit)[name]
    server = serve(once(fault, kit.good()))
    late = counted == "timeouts"
    seconds = 1.0 if late else 30.0
    asked = kit.judge(server.url, call_seconds=seconds, deadline_seconds=60.0, breaker_failures=100)
    given = score_all(asked, kit.requests(4))
    assert all(isinstance(one, Verdict) for one in given), reasons(given)
    taken = asked.take_stats()
    # A machine that is busy elsewhere may let a good answer come too late as well.
    assert taken["judge/calls"] == 4 + taken["judge/retries"] <= (16 if late else 8)
    assert taken["judge/retries"] == taken[f"judge/{counted}"] >= 4
    assert (len(server.requests) == taken["judge/calls"] or late, taken["judge/failures"]) == (True, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_that_stays_is_a_failure_with_a_reason_within_the_budget(serve, kit, name):
    fault, counted = faults(kit)[name]
    server = serve(lambda n, body: fault)
    late = counted == "timeouts"
    asked = kit.judge(
        server.url,
        max_tries=3,
        call_seconds=0.3 if late else 30.0,
        deadline_seconds=20.0,
        retry_share=0.25,
        retry_reserve=2,
        breaker_failures=100,
    )
    began = time.monotonic()
    given = score_all(asked, kit.requests(8))
    assert time.monotonic() - began < 20.0 + 1.0
    assert all(isinstance(one, JudgeFailure) for one in given)
    assert all(f"{server.url}: " in why and " (after " in why for why in reasons(given)), reasons(given)
    assert len(server.requests) <= 8 + 2 + 0.25 * 8, "no retry storm"
    assert len(server.requests) >= 8 or late


def test_a_burst_of_500_is_waited_out_by_few_requests(serve, kit):
    ends: list[float] = []

    def plan(n: int, body: dict[str, Any]):
        ends.append(time.monotonic() + 0.5)
        return kit.Plan(status=500, body="oops") if time.monotonic() < ends[0] else kit.good()

    server = serve(plan)
    asked = kit.judge(server.url, concurrency=8, max_tries=9, breaker_failures=4)
    given = score_all(asked, kit.requests(40))
    assert all(isinstance(one, Verdict) for one in given), reasons(given)
    # Eight are under way when the breaker opens; then it is single probes, after pauses that double.
    assert 4 <= asked.take_stats()["judge/server_errors"] == len(server.requests) - 40 <= 8 + 6


def test_a_server_restarted_in_mid_batch_loses_no_verdict(serve, kit):
    server = serve(lambda n, body: kit.good(delay=0.05))
    asked = kit.judge(server.url, concurrency=4, max_tries=20, backoff_max_seconds=0.2)

    async def main():
        whole = asyncio.create_task(asked.score(kit.requests(40)))
        while len(server.requests) < 10:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(server.stop)
        before = len(server.requests)
        await asyncio.sleep(0.5)
        server.start()
        given = await whole
        await asked.close()
        return given, before

    given, before = asyncio.run(main())
    assert before < 40
    assert all(isinstance(one, Verdict) for one in given), reasons(given)
    taken = asked.take_stats()
    assert taken["judge/connection_errors"] > 0
    assert len(server.requests) <= 40 + 64


def test_dns_failure_is_a_failure_that_names_the_host(kit):
    asked = kit.judge("http://judge.invalid:1/v1", max_tries=2, deadline_seconds=5.0)
    (failure,) = score_all(asked, kit.requests(1))
    assert isinstance(failure, JudgeFailure)
    assert "judge.invalid" in failure.reason
    assert failure.retryable


def test_where_one_of_two_servers_is_dead_the_other_judges_everything(serve, kit):
    alive, dead = serve(lambda n, body: kit.good()), serve(lambda n, body: kit.good())
    dead.stop()
    asked = kit.judge(alive.url, dead.url, max_tries=10, concurrency=4)
    assert all(isinstance(one, Verdict) for one in score_all(asked, kit.requests(40)))
    assert len(alive.requests) == 40


def test_no_more_requests_at_once_than_allowed(serve, kit):
    server = serve(lambda n, body: kit.good(delay=0.05))
    score_all(kit.judge(server.url, concurrency=3), kit.requests(12))
    assert server.most_open == 3


# ---- faults that no retry mends


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"text": "", "refusal": "I cannot help with that."}, "the model refused: I cannot help with that."),
        ({"text": "", "finish": "content_filter"}, "the model refused: finish_reason content_filter"),
        ({"text": '{"rel', "finish": "length"}, "cut at judge.sampling.max_tokens = 1024; raise it"),
    ],
)
def test_refused_and_cut_answers_are_not_asked_for_again(serve, kit, how, reason):
    server = serve(lambda n, body: kit.Plan(body=kit.completion(**how)))
    (failure,) = score_all(kit.judge(server.url), kit.requests(1))
    assert isinstance(failure, JudgeFailure)
    assert reason in failure.reason
    assert not failure.retryable
    assert len(server.requests) == 1


def test_a_filtered_prompt_is_a_refusal(serve, kit):
    blocked = {"error": {"message": "blocked", "code": "content_filter"}}
    server = serve(lambda n, body: kit.Plan(status=400, body=blocked))
    asked = kit.judge(server.url, response_format="json_schema")
    assert isinstance(score_all(asked, kit.requests(1))[0], JudgeFailure)
    assert asked.take_stats()["judge/refusals"] == 1


@pytest.mark.parametrize(
    ("status", "message", "says"),
    [
        (401, "wrong key", "judge.endpoint.key_env"),
        (403, "not allowed", "judge.endpoint.key_env"),
        (404, "model m not found", "judge.endpoint.model"),
        (400, "The model `m` does not exist.", "judge.endpoint.model"),
        (402, "Insufficient Balance", "nothing left to spend"),
        (429, "You exceeded your current quota: insufficient_quota", "nothing left to spend"),
    ],
)
def test_what_only_a_person_can_mend_stops_at_once(serve, kit, status, message, says):
    server = serve(lambda n, body: kit.Plan(status=status, body={"error": {"message": message}}))
    asked = kit.judge(server.url, response_format="none", concurrency=2)
    with pytest.raises(JudgeUnusableError, match=rf"status {status}: .*{says}"):
        score_all(asked, kit.requests(30))
    assert len(server.requests) <= 4


def test_a_server_that_has_answered_may_refuse_a_call_without_stopping_the_run(serve, kit):
    server = serve(lambda n, body: kit.good() if n == 0 else kit.Plan(status=403, body={"error": "not this one"}))
    asked = kit.judge(server.url)
    assert isinstance(score_all(asked, kit.requests(1))[0], Verdict)
    (failure,) = score_all(asked, kit.requests(1))
    assert isinstance(failure, JudgeFailure)
    assert "status 403: not this one" in failure.reason


# ---- what becomes of a reward


def grouped(asked: EndpointJudge, kit, count: int = 4):
    turns = (Turn("user", "My oven broke."), Turn("assistant", "-"))
    talk = Dialogue("1", "She bakes.", "ISFJ", "sad", "The oven broke.", turns, "here:1")
    rows = [Completion(talk, 0, Spans("u", "r", "sad", f"The oven {n}.")) for n in range(count)]
    scores = score_completions(asked, kit.rubric, RewardConfig(), rows)
    return combine([scores], RewardConfig())


def test_half_a_group_lost_is_unknown_and_the_others_keep_their_rewards(serve, kit):
    def plan(n: int, body: dict[str, Any]):
        lost = any(f"The oven {n}." in body["messages"][0]["content"] for n in (0, 2))
        return kit.Plan(status=500, body={}) if lost else kit.good(mark=5)

    asked = kit.judge(serve(plan).url, max_tries=2, breaker_failures=100)
    combined = grouped(asked, kit)
    assert combined.valid_P_G.tolist() == [[False, True, False, True]]
    assert [math.isnan(value) for value in combined.rewards_P_G[0]] == [True, False, True, False]
    assert combined.rewards_P_G[0, 1] == pytest.approx(1.0)


def test_all_lost_is_all_unknown(kit, serve):
    server = serve(lambda n, body: kit.good())
    server.stop()
    combined = grouped(kit.judge(server.url, max_tries=2, deadline_seconds=3.0), kit)
    assert not combined.valid_P_G.any()
    assert all(math.isnan(value) for value in combined.rewards_P_G[0])
