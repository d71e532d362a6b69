"""The server over real HTTP: what it answers, whom it lets in, what it says about mistakes."""

import concurrent.futures
import dataclasses
import logging
import math
import socket
import time

import httpx2
import pytest

from kardia_jax.judge.rules.judge import RuleJudge
from kardia_jax.judge.wire import (
    ScoreRequest,
    ScoreResponse,
    WireFailure,
    WireItem,
    WireMark,
    WireRequest,
    WireVerdict,
    answer_from_wire,
    answer_to_wire,
    from_wire,
    to_wire,
)
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, RubricItem, Verdict

REQUEST = JudgeRequest("About: Shy librarian.", "My bike was sold.", (("user", "She sold it."),), "Your bike is gone.")
TOKEN = "correct-horse-battery"


def post(url: str, requests: list[JudgeRequest], rubric: str | None = None, **more) -> httpx2.Response:
    body = ScoreRequest(rubric=rubric, requests=[to_wire(request) for request in requests])
    return httpx2.post(f"{url}/v1/score", json=body.model_dump(), timeout=20, **more)


def error_of(response: httpx2.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


def test_the_wire_has_every_field_of_the_dataclasses():
    for wire, ours in (
        (WireRequest, JudgeRequest),
        (WireItem, RubricItem),
        (WireMark, Mark),
        (WireVerdict, Verdict),
        (WireFailure, JudgeFailure),
    ):
        assert set(wire.model_fields) == {field.name for field in dataclasses.fields(ours)}


def test_what_travels_comes_back_the_same(all_marks):
    asked = dataclasses.replace(REQUEST, reasoning="r", understanding="u", items=(RubricItem("Does it help?", 2.0),))
    assert from_wire(WireRequest.model_validate_json(to_wire(asked).model_dump_json())) == asked
    for answer in (all_marks(4), all_marks(3.25), Verdict((Mark("a", 2, "b", 0.5),)), JudgeFailure("late", True)):
        sent = answer_to_wire(answer).model_dump_json(exclude_none=True)
        assert answer_from_wire(type(answer_to_wire(answer)).model_validate_json(sent)) == answer


def test_a_batch_is_answered_in_order_with_the_judges_own_marks(serving, numbered):
    requests = numbered(3)
    with serving(RuleJudge()) as served:
        response = post(served.url, requests, KARDIA_FIVE.fingerprint)
        scored = ScoreResponse.model_validate_json(response.content)
    assert response.status_code == 200
    assert scored.judge == "rules-1"
    assert (scored.rubric.name, scored.rubric.fingerprint) == ("kardia_five", KARDIA_FIVE.fingerprint)
    assert [answer_from_wire(answer) for answer in scored.answers] == [RuleJudge().mark(one) for one in requests]


def test_a_verdict_that_did_not_come_is_a_failure_object_and_no_number(serving, scripted, numbered, all_marks):
    lost = JudgeFailure("timeouts: no answer", retryable=True)
    judge = scripted(lambda request: lost if request.reply.endswith("1") else all_marks(4))
    with serving(judge) as served:
        answers = post(served.url, numbered(2)).json()["answers"]
    assert answers[1] == {"failure": {"reason": "timeouts: no answer", "retryable": True}}
    assert answers[0]["verdict"]["marks"][0] == {"criterion": "relevance", "mark": 4, "reason": "because"}


@pytest.mark.parametrize(
    ("mark", "named", "said"),
    [
        (math.nan, "01234", "relevance.mark: wanted 1 to 5, got nan"),
        (6, "01234", "relevance.mark: wanted 1 to 5, got 6"),
        (3, "0123", "verdict: wanted each of"),
        (3, "012340", "verdict: wanted each of"),
    ],
)
def test_a_backend_that_gives_no_proper_marks_has_failed(serving, mark, named, said, scripted, all_marks):
    marks = all_marks(mark).marks
    with serving(scripted(lambda _: Verdict(tuple(marks[int(place)] for place in named)))) as served:
        (answer,) = post(served.url, [REQUEST]).json()["answers"]
    assert answer["failure"]["reason"].startswith(said)


def test_a_backend_that_breaks_or_takes_too_long_has_failed(serving, scripted, all_marks):
    def broken(_: JudgeRequest) -> Verdict:
        raise ConnectionError("gone")

    with serving(scripted(broken)) as served:
        assert (
            post(served.url, [REQUEST]).json()["answers"][0]["failure"]["reason"] == "scripted: ConnectionError: gone"
        )
    with serving(scripted(lambda _: all_marks(4), seconds=30), score_seconds=0.2) as served:
        started = time.monotonic()
        failure = post(served.url, [REQUEST]).json()["answers"][0]["failure"]
        assert time.monotonic() - started < 10
    assert failure == {"reason": "scripted: no answer within 0.2 s (score_seconds)", "retryable": True}


def test_items_of_a_dialogue_reach_the_judge_and_their_marks_come_back(serving, scripted, all_marks):
    asked = dataclasses.replace(REQUEST, items=(RubricItem("Does it name the bike?", 2.0),))
    judge = scripted(lambda _: Verdict((*all_marks(4).marks, Mark("item_1", 5, "it does"))))
    with serving(judge) as served:
        answers = post(served.url, [asked]).json()["answers"]
    assert judge.seen == [asked]
    assert answers[0]["verdict"]["marks"][-1] == {"criterion": "item_1", "mark": 5, "reason": "it does"}


def test_another_rubric_is_refused_before_anything_is_judged(serving, scripted, all_marks):
    judge = scripted(lambda _: all_marks(4))
    with serving(judge) as served:
        status, code, message = error_of(post(served.url, [REQUEST], rubric="0123456789abcdef"))
    assert (status, code) == (409, "rubric_mismatch")
    assert "0123456789abcdef" in message
    assert KARDIA_FIVE.fingerprint in message
    assert judge.seen == []


GOOD = to_wire(REQUEST).model_dump()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "body: no JSON at character 1"),
        ("[]", "body: wanted a JSON object"),
        ({"requests": []}, "requests: List should have at least 1 item"),
        ({"requests": [GOOD, GOOD | {"reply": None}]}, "requests[1].reply: Input should be a valid string"),
        ({"requests": [GOOD | {"replay": "x"}]}, "requests[0].replay: Extra inputs are not permitted"),
        ({"requests": [GOOD | {"history": [["user", "x"]]}]}, "requests[0].history[0]: Input should be"),
        ({"requests": [GOOD | {"items": [{"question": ""}]}]}, "requests[0].items[0]: Value error, question: wanted"),
        ({"requests": [GOOD | {"reply": "x" * 200_001}]}, "requests[0].reply: String should have at most 200000"),
        ('{"requests": [{"profile": "\\ud800"}]}', "requests[0].profile: Input should be a valid string"),
    ],
)
def test_bad_input_is_422_and_says_where_without_repeating_what_stood_there(serving, body, said):
    with serving(RuleJudge()) as served:
        sent = (
            {"content": body, "headers": {"content-type": "application/json"}}
            if isinstance(body, str)
            else {"json": body}
        )
        status, code, message = error_of(httpx2.post(f"{served.url}/v1/score", **sent))
    assert (status, code) == (422, "bad_request")
    assert message.startswith(said)
    assert "bike" not in message
    assert len(message) < 1000


def test_too_many_and_too_large_are_413_by_header_and_by_count_and_while_streaming(serving, numbered):
    def streamed():
        for _ in range(40):
            yield b" " * 10_000

    with serving(RuleJudge(), max_batch=2, max_body_mb=0.1) as served:
        assert error_of(post(served.url, numbered(3)))[:2] == (413, "too_many")
        large = httpx2.post(f"{served.url}/v1/score", content=b" " * 200_000)
        chunked = httpx2.post(f"{served.url}/v1/score", content=streamed())
        assert httpx2.get(f"{served.url}/healthz").status_code == 200
    assert error_of(large)[:2] == error_of(chunked)[:2] == (413, "too_large")
    assert "--max-body-mb" in error_of(large)[2]


def test_beyond_what_it_takes_on_it_says_when_to_come_again(serving, scripted, numbered, all_marks):
    judge = scripted(lambda _: all_marks(4), seconds=1.0)
    with serving(judge, max_batch=2, max_waiting=2) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(post, served.url, numbered(2))
        until(lambda: served.service.waiting == 2)
        second = post(served.url, [REQUEST])
        assert first.result().status_code == 200
        assert post(served.url, [REQUEST]).status_code == 200
    assert error_of(second)[:2] == (503, "busy")
    assert second.headers["retry-after"] == "1"


def test_with_a_token_only_who_carries_it_comes_in(serving, caplog):
    with serving(RuleJudge(), token=TOKEN) as served, caplog.at_level(logging.DEBUG):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"authorization": "Bearer é"}):
            raw = {name: value.encode() for name, value in headers.items()}
            refused = post(served.url, [REQUEST], headers=raw)
            assert error_of(refused)[:2] == (401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
        carried = {"authorization": f"Bearer {TOKEN}"}
        assert post(served.url, [REQUEST], headers=carried).status_code == 200
        for path in ("/metrics", "/v1/rubric"):
            assert httpx2.get(f"{served.url}{path}").status_code == 401
            assert httpx2.get(f"{served.url}{path}", headers=carried).status_code == 200
        assert httpx2.get(f"{served.url}/healthz").status_code == 200
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert not [line for line in ours if TOKEN in line or "bike" in line]


def test_without_a_token_it_answers_to_local_names_alone(serving):
    with serving(RuleJudge()) as served:
        port = served.url.rsplit(":", 1)[1]
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
            assert httpx2.get(f"{served.url}/healthz", headers={"host": host}).status_code == 200
        strange = httpx2.get(f"{served.url}/v1/rubric", headers={"host": f"evil.example:{port}"})
    assert error_of(strange)[:2] == (421, "wrong_host")


def test_health_says_failing_after_a_batch_without_any_verdict_and_ok_after_the_next_good_one(
    serving, scripted, all_marks
):
    lost = JudgeFailure("no connection", retryable=True)
    judge = scripted(lambda _: lost)
    with serving(judge) as served:
        assert httpx2.get(f"{served.url}/healthz").json() == {"status": "ok", "judge": "scripted", "waiting": 0}
        post(served.url, [REQUEST])
        failing = httpx2.get(f"{served.url}/healthz")
        assert (failing.status_code, failing.json()["trouble"]) == (503, "no connection")
        judge.answer = lambda _: all_marks(4)
        post(served.url, [REQUEST])
        assert httpx2.get(f"{served.url}/healthz").status_code == 200


class Busy:
    """A judge that computes and lets nobody else's coroutine run."""

    name = "busy"

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        time.sleep(1.0)
        return [all_marks(4)] * len(requests)


def test_health_and_metrics_do_not_wait_for_a_judge_that_computes(serving, numbered):
    with serving(Busy()) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(post, served.url, numbered(2))
        until(lambda: served.service.waiting == 2)
        assert httpx2.get(f"{served.url}/healthz", timeout=20).json()["waiting"] == 2
        assert "kardia_judge_waiting 2.0" in httpx2.get(f"{served.url}/metrics", timeout=20).text
        assert not asked.done()
        assert asked.result().status_code == 200


def test_metrics_count_verdicts_failures_and_requests(serving, scripted, numbered, all_marks):
    lost = {"0": JudgeFailure("late", True), "1": JudgeFailure("refused", False)}
    judge = scripted(lambda request: lost.get(request.reply[-1], all_marks(4)))
    with serving(judge) as served:
        post(served.url, numbered(5))
        post(served.url, [REQUEST], rubric="another")
        response = httpx2.get(f"{served.url}/metrics")
    lines = set(response.text.splitlines())
    assert response.headers["content-type"].startswith("text/plain")
    assert {
        "kardia_judge_verdicts_total 3.0",
        'kardia_judge_failures_total{reason="retryable"} 1.0',
        'kardia_judge_failures_total{reason="permanent"} 1.0',
        'kardia_judge_requests_total{status="200"} 1.0',
        'kardia_judge_requests_total{status="409"} 1.0',
        "kardia_judge_request_seconds_count 1.0",
        "kardia_judge_waiting 0.0",
        "kardia_judge_ready 1.0",
    } <= lines


class Counting(RuleJudge):
    """A judge with counts of its own, new ones at every reading."""

    def take_stats(self) -> dict[str, float]:
        return {"judge/cache_hits": 2.0, "judge/timeouts": 1.0, "judge/latency_p50": 0.5, "judge/latency_p95": math.nan}


def test_what_the_backend_counts_adds_up_and_what_it_measures_is_the_last_value(serving):
    with serving(Counting()) as served:
        for _ in range(3):
            lines = set(httpx2.get(f"{served.url}/metrics").text.splitlines())
    assert {
        'kardia_judge_backend_total{what="cache_hits"} 6.0',
        'kardia_judge_backend_total{what="timeouts"} 3.0',
        'kardia_judge_backend_now{what="latency_p50"} 0.5',
    } <= lines
    assert not [line for line in lines if "latency_p95" in line]


def test_the_schema_names_every_route_and_every_refusal(serving):
    with serving(RuleJudge()) as served:
        schema = httpx2.get(f"{served.url}/openapi.json").json()
    assert set(schema["paths"]) == {"/v1/score", "/v1/rubric", "/healthz", "/metrics"}
    assert {"200", "401", "409", "413", "422", "503"} <= set(schema["paths"]["/v1/score"]["post"]["responses"])
    assert {"WireRequest", "WireVerdict", "WireFailure", "ErrorResponse"} <= set(schema["components"]["schemas"])
    assert schema["components"]["schemas"]["WireRequest"]["additionalProperties"] is False


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/score", 405), ("POST", "/v2/score", 404)])
def test_a_route_that_is_not_there_points_to_the_one_that_is(serving, method, path, status):
    with serving(RuleJudge()) as served:
        got, code, message = error_of(httpx2.request(method, f"{served.url}{path}"))
    assert (got, code) == (status, "no_such_route")
    assert "POST /v1/score" in message


def test_a_client_that_goes_away_in_the_middle_of_its_body_disturbs_nobody(serving):
    with serving(RuleJudge()) as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        assert post(served.url, [REQUEST]).status_code == 200


def until(holds, seconds: float = 20.0) -> None:
    """Waits for something that is about to be true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)
