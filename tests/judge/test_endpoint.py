"""The endpoint judge against a real HTTP server that does what it should: what is sent, read, kept and kept secret.

What servers do wrong is in ``test_endpoint_faults.py``.
"""

import asyncio
import json
import logging
import math
from typing import Any

import pytest

from kardia_jax.judge.cache import VerdictCache
from kardia_jax.judge.chat import usage
from kardia_jax.judge.protocol import JudgeUnusableError, score_all
from kardia_jax.rewards.rubric import Criterion, JudgeFailure, Rubric, Verdict

# ---- what goes well


def test_verdicts_come_in_order_and_the_request_is_what_the_config_says(serve, kit):
    server = serve(lambda n, body: kit.good(mark=1 + int(body["messages"][0]["content"].count("all things. 1"))))
    asked = kit.judge(server.url, seed=7, max_tokens=99, extra_body='{"chat_template_kwargs": {"a": false}}')
    given = score_all(asked, kit.requests(3))
    assert [one.by_name()["empathy"] for one in given] == [1, 2, 1]
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("m", 0.0, 99, 7)
    assert body["chat_template_kwargs"] == {"a": False}
    schema = body["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == list(kit.rubric.names)
    taken = asked.take_stats()
    assert (taken["judge/calls"], taken["judge/verdicts"], taken["judge/retries"]) == (3, 3, 0)
    assert (taken["judge/prompt_tokens"], taken["judge/completion_tokens"]) == (300, 60)
    assert 0 < taken["judge/latency_p50"] <= taken["judge/latency_max"] < 5


def test_reasoning_models_get_their_field_and_no_temperature(serve, kit):
    server = serve(lambda n, body: kit.good())
    asked = kit.judge(server.url, temperature=None, max_tokens_field="max_completion_tokens")
    assert isinstance(score_all(asked, kit.requests(1))[0], Verdict)
    assert {"temperature", "max_tokens", "seed"} & set(server.requests[0]) == set()
    assert server.requests[0]["max_completion_tokens"] == 1024


def test_samples_are_averaged_with_their_spread(serve, kit):
    server = serve(lambda n, body: kit.good(mark=1 + body["seed"] % 3))
    asked = kit.judge(server.url, temperature=0.7, seed=0, samples=3)
    (verdict,) = score_all(asked, kit.requests(1))
    assert isinstance(verdict, Verdict)
    assert [(mark.mark, mark.spread) for mark in verdict.marks] == [(2.0, pytest.approx(math.sqrt(2 / 3)))] * 5
    assert sorted(body["seed"] for body in server.requests) == [0, 1, 2]


LEVELS = ("no", "hardly", "partly", "mostly", "yes")
SPLIT = Rubric(
    "split",
    "1",
    (Criterion("why", "Is it thought through?", LEVELS, sees=("reasoning",)), Criterion("tone", "Is it kind?", LEVELS)),
)


def test_criteria_that_see_different_spans_are_asked_apart_and_joined(serve, kit):
    def plan(n: int, body: dict[str, Any]):
        name = "why" if "## why" in body["messages"][0]["content"] else "tone"
        mark = {"why": 2, "tone": 5}[name]
        return kit.Plan(body=kit.completion(json.dumps({name: {"reason": "So.", "mark": mark}})))

    server = serve(plan)
    (verdict,) = score_all(kit.judge(server.url, rubric=SPLIT), kit.requests(1))
    assert verdict.by_name() == {"why": 2, "tone": 5}
    assert len(server.requests) == 2


def test_where_one_part_fails_the_verdict_fails(serve, kit):
    def plan(n: int, body: dict[str, Any]):
        if "## why" in body["messages"][0]["content"]:
            return kit.Plan(status=400, body={"error": {"message": "too long"}})
        return kit.Plan(body=kit.completion('{"tone": {"reason": "So.", "mark": 5}}'))

    (failure,) = score_all(kit.judge(serve(plan).url, rubric=SPLIT, response_format="none"), kit.requests(1))
    assert isinstance(failure, JudgeFailure)
    assert failure.reason.endswith("/v1: status 400: too long (after 1 try)")


def test_connections_are_given_back_and_a_judge_may_be_asked_again(serve, kit):
    server = serve(lambda n, body: kit.good())
    asked = kit.judge(server.url)
    for _ in range(2):  # each call of score_all has an event loop of its own; unclosed sockets would be warnings
        assert all(isinstance(one, Verdict) for one in score_all(asked, kit.requests(2)))


# ---- the format of the answer


@pytest.mark.parametrize("opened", ["<think>", "", "[THINK]"])
def test_thinking_before_the_verdict_is_taken_off(serve, kit, opened):
    closed = "[/THINK]" if opened == "[THINK]" else "</think>"
    thought = f"{opened}She bakes, so an oven matters. A five? No.{closed}\n\n"
    server = serve(lambda n, body: kit.Plan(body=kit.completion(thought + kit.marks_json(kit.rubric, 3))))
    (verdict,) = score_all(kit.judge(server.url), kit.requests(1))
    assert verdict.by_name() == dict.fromkeys(kit.rubric.names, 3)


def test_thinking_that_never_ends_is_no_verdict_whatever_stands_in_it(serve, kit):
    unclosed = f"<think>It could be {kit.marks_json(kit.rubric, 5)}"
    server = serve(lambda n, body: kit.Plan(body=kit.completion(unclosed)))
    (failure,) = score_all(kit.judge(server.url, max_tries=2), kit.requests(1))
    assert isinstance(failure, JudgeFailure)
    assert failure.reason.endswith("got a block that was never closed (after 2 tries)")


@pytest.mark.parametrize("form", ["json_schema", "json_object", "none"])
def test_a_format_that_is_named_is_sent_and_no_other_is_tried(serve, kit, form):
    refused = kit.Plan(status=400, body={"error": {"message": "no response_format here"}})
    server = serve(lambda n, body: refused if n == 0 else kit.good())
    asked = kit.judge(server.url, response_format=form)
    (failure,) = score_all(asked, kit.requests(1))
    assert isinstance(failure, JudgeFailure)
    assert isinstance(score_all(asked, kit.requests(1))[0], Verdict)
    assert [body.get("response_format", {}).get("type", "none") for body in server.requests] == [form, form]


def test_many_first_calls_at_once_try_each_format_once_at_the_most(serve, kit):
    def plan(n: int, body: dict[str, Any]):
        return kit.Plan(status=422, body={"detail": "unknown field"}) if "response_format" in body else kit.good()

    server = serve(plan)
    asked = kit.judge(server.url, concurrency=16)
    given = score_all(asked, kit.requests(64))
    assert all(isinstance(one, Verdict) for one in given)
    assert 64 + 2 <= len(server.requests) <= 64 + 2 * 16
    assert asked.take_stats()["judge/calls"] == len(server.requests)


@pytest.mark.parametrize(("known", "seen"), [("json_object", 2), ("none", 3)])
def test_auto_falls_back_once_and_remembers(serve, kit, known, seen):
    def plan(n: int, body: dict[str, Any]):
        form = body.get("response_format", {}).get("type", "none")
        if form == known:
            return kit.good()
        return kit.Plan(status=400, body={"error": {"message": f"response_format {form} is unavailable"}})

    server = serve(plan)
    asked = kit.judge(server.url)
    assert isinstance(score_all(asked, kit.requests(1))[0], Verdict)
    assert len(server.requests) == seen
    assert all(isinstance(one, Verdict) for one in score_all(asked, kit.requests(3))[:1])


def test_a_bad_call_does_not_change_the_format_of_the_others(serve, kit):
    def plan(n: int, body: dict[str, Any]):
        bad = "things. 0" in body["messages"][0]["content"]
        return kit.Plan(status=400, body={"error": {"message": "prompt too long"}}) if bad else kit.good()

    server = serve(plan)
    asked = kit.judge(server.url)
    (bad,) = score_all(asked, kit.requests(1))
    assert isinstance(bad, JudgeFailure)
    assert not bad.retryable
    (good,) = score_all(asked, kit.requests(2)[1:])
    assert isinstance(good, Verdict)
    assert server.requests[-1]["response_format"]["type"] == "json_schema"
    before = len(server.requests)
    score_all(asked, kit.requests(1))
    assert len(server.requests) == before + 1, "once the format is known to work, 400 has another cause"


@pytest.mark.parametrize(
    ("data", "counted"),
    [
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 3}}, (7, 3)),
        ({"usage": {"prompt_tokens": 7}}, (7, 0)),
        ({"usage": {"prompt_tokens": "many", "completion_tokens": None}}, (0, 0)),
        ({"usage": None}, (0, 0)),
        ({}, (0, 0)),
        (["no object"], (0, 0)),
    ],
)
def test_tokens_are_counted_where_the_server_tells_them(data, counted):
    assert usage(data) == counted


# ---- the key


KEY = "sk-very-secret-0123456789"


def test_the_key_is_sent_and_shown_nowhere(serve, kit, caplog, capfd, monkeypatch):
    """A server that repeats the whole request in its error, with every logger at its loudest."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-account")
    caplog.set_level(logging.DEBUG)
    server = serve(lambda n, body: kit.Plan(status=422, body={"error": {"message": f"bad header: Bearer {KEY}"}}))
    asked = kit.judge(server.url, key=KEY, response_format="none")
    (failure,) = score_all(asked, kit.requests(1))
    assert f"authorization: Bearer {KEY}".lower() in server.headers[0].lower()
    server.plan = lambda n, body: kit.Plan(status=401, body={"error": {"message": f"wrong key {KEY}"}})
    with pytest.raises(JudgeUnusableError) as stopped:
        score_all(asked, kit.requests(1))
    written = capfd.readouterr()
    shown = [str(failure), repr(stopped.value), repr(asked), caplog.text, *written, json.dumps(asked.take_stats())]
    assert "[key]" in str(failure)
    assert all(KEY not in text for text in shown)


def test_without_a_key_of_ours_none_of_the_environment_is_sent(serve, kit, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda n, body: kit.good())
    score_all(kit.judge(server.url), kit.requests(1))
    assert KEY not in server.headers[0]


# ---- cancelling


def test_cancelling_closes_the_requests_at_the_server_too(serve, kit):
    server = serve(lambda n, body: kit.Plan(how="hang"))
    asked = kit.judge(server.url, concurrency=5)

    async def main() -> int:
        whole = asyncio.create_task(asked.score(kit.requests(20)))
        while server.open < 5:
            await asyncio.sleep(0.01)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
        while server.open:
            await asyncio.sleep(0.01)
        await asked.close()
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1
    assert len(server.requests) == 5


# ---- the cache


def test_what_is_cached_is_not_asked_for_again_and_failures_are(serve, kit, tmp_path):
    server = serve(lambda n, body: kit.Plan(status=400, body={}) if n == 0 else kit.good())
    for again in range(3):  # as three processes would, one after the other
        cache = VerdictCache(tmp_path / "verdicts.sqlite", 2**20)
        asked = kit.judge(server.url, cache=cache, response_format="none")
        given = score_all(asked, kit.requests(1))
        assert isinstance(given[0], Verdict) == (again > 0)
        cache.close()
    assert len(server.requests) == 2
    assert asked.take_stats()["judge/cache_hit_rate"] == 1.0


def test_another_model_sampling_rubric_or_reply_is_another_verdict(serve, kit, tmp_path):
    server = serve(lambda n, body: kit.good())
    cache = VerdictCache(tmp_path / "verdicts.sqlite", 2**20)
    other = Rubric(kit.rubric.name, "2", kit.rubric.criteria)
    variants = [
        kit.judge(server.url, cache=cache),
        kit.judge(server.url, cache=cache, model="n"),
        kit.judge(server.url, cache=cache, temperature=0.5),
        kit.judge(server.url, cache=cache, extra_body='{"top_k": 1}'),
        kit.judge(server.url, rubric=other, cache=cache),
    ]
    for asked in variants * 2:
        score_all(asked, kit.requests(2))
    assert len(server.requests) == 2 * len(variants)
    moved = kit.judge(serve(lambda n, body: kit.good(mark=1)).url, cache=cache)
    assert score_all(moved, kit.requests(1))[0].by_name()["empathy"] == 4, "the address is not part of a verdict"
    cache.close()
