"""Recordings: what is written, what is found again, and what a reply that was never recorded costs."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kardia_jax.config import ConfigError
from kardia_jax.config.judge import JudgeConfig, ReplayConfig
from kardia_jax.dialogue.dataset import RubricItem
from kardia_jax.judge import replay as replay_module
from kardia_jax.judge.factory import make_judge
from kardia_jax.judge.protocol import is_in_process, score_all, take_stats
from kardia_jax.judge.records import request_key, verdict_from_json, verdict_to_json
from kardia_jax.judge.replay import Recorder, ReplayJudge, load_recording
from kardia_jax.judge.rules.judge import RuleJudge
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, Rubric, Verdict


def request(reply: str) -> JudgeRequest:
    return JudgeRequest("She bakes.", "The oven broke.", (("user", "My oven broke."),), reply)


def verdict(mark: float, reason: str = "So.") -> Verdict:
    return Verdict(tuple(Mark(name, mark, reason) for name in KARDIA_FIVE.names))


class Moody:
    """Gives all its verdicts the next mark; stays silent where the reply is "silence"."""

    name = "moody"

    def __init__(self):
        self.mark, self.closed = 0, 0

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        self.mark += 1
        return [
            JudgeFailure("no mood", retryable=True) if asked.reply == "silence" else verdict(self.mark, asked.reply)
            for asked in requests
        ]

    def take_stats(self) -> dict[str, float]:
        return {"judge/calls": float(self.mark)}

    async def close(self) -> None:
        self.closed += 1


REPLIES = ["The oven.", "Ünïcode \u2028 and\nlines", ""]


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "deep" / "verdicts.jsonl"


def test_what_was_recorded_is_said_again_without_the_judge(path):
    requests = [request(reply) for reply in REPLIES]
    judge = Moody()
    recorded = Recorder(judge, KARDIA_FIVE, path)
    said = score_all(recorded, requests)
    assert recorded.name == "moody"
    assert take_stats(recorded) == {"judge/calls": 1.0}
    assert judge.closed == 1
    replay = ReplayJudge(path, KARDIA_FIVE)
    assert score_all(replay, requests[::-1]) == said[::-1]
    assert take_stats(replay) == {"judge/replayed": 3.0, "judge/not_recorded": 0.0}
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(row["judge"], row["rubric"], row["reply"]) for row in rows] == [
        ("moody", "kardia_five 1", reply) for reply in REPLIES
    ]


def test_a_failure_is_not_recorded_and_the_last_verdict_counts(path):
    recorded = Recorder(Moody(), KARDIA_FIVE, path)
    for _ in range(2):
        score_all(recorded, [request("silence"), request("a")])
    assert len(path.read_text("utf-8").splitlines()) == 2
    silence, said = score_all(ReplayJudge(path, KARDIA_FIVE), [request("silence"), request("a")])
    assert isinstance(silence, JudgeFailure)
    assert said == verdict(2, "a")


OTHERS = {
    "reply": dataclasses.replace(request("a"), reply="b"),
    "profile": dataclasses.replace(request("a"), profile="She sings."),
    "history": dataclasses.replace(request("a"), history=()),
    "reasoning": dataclasses.replace(request("a"), reasoning="hm"),
    "items": dataclasses.replace(request("a"), items=(RubricItem("Does it name the oven?", 1.0),)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_reply_that_was_never_recorded_is_unknown_and_says_why(path, other):
    score_all(Recorder(Moody(), KARDIA_FIVE, path), [request("a")])
    replay = ReplayJudge(path, KARDIA_FIVE)
    known, missing = score_all(replay, [request("a"), OTHERS[other]])
    assert known == verdict(1, "a")
    why = "replay of verdicts.jsonl: this reply was never recorded with rubric kardia_five"
    assert missing == JudgeFailure(why, retryable=False)
    assert take_stats(replay) == {"judge/replayed": 1.0, "judge/not_recorded": 1.0}
    newer = Rubric(KARDIA_FIVE.name, "2", KARDIA_FIVE.criteria)
    assert isinstance(score_all(ReplayJudge(path, newer), [request("a")])[0], JudgeFailure)


def test_what_is_missing_goes_to_the_other_judge_where_that_is_asked_for(path):
    score_all(Recorder(Moody(), KARDIA_FIVE, path), [request("a")])
    config = JudgeConfig(kind="replay", replay=ReplayConfig(path, missing="rules"))
    judge = make_judge(config, KARDIA_FIVE)
    assert isinstance(judge, ReplayJudge)
    replies = ["I hear how much this oven meant.", "a", "No."]
    said = score_all(judge, [request(reply) for reply in replies])
    marked = score_all(RuleJudge(), [request(replies[0]), request(replies[2])])
    assert said == [marked[0], verdict(1, "a"), marked[1]]
    assert take_stats(judge)["judge/not_recorded"] == 2.0


def test_the_other_judge_s_counts_place_and_end_are_passed_on(path):
    score_all(Recorder(Moody(), KARDIA_FIVE, path), [request("a")])
    otherwise = Moody()
    replay = ReplayJudge(path, KARDIA_FIVE, otherwise)
    score_all(replay, [request("a")])
    assert (otherwise.mark, otherwise.closed) == (0, 1), "nothing was missing, so it was not asked"
    assert "judge/calls" in take_stats(replay)

    class OnTheDevice(Moody):
        in_process = True

    assert is_in_process(Recorder(OnTheDevice(), KARDIA_FIVE, path))
    assert is_in_process(ReplayJudge(path, KARDIA_FIVE, OnTheDevice()))
    assert not is_in_process(replay)


def test_a_line_that_a_killed_process_left_is_passed_over_and_then_cut_off(path, capsys):
    score_all(Recorder(Moody(), KARDIA_FIVE, path), [request("a"), request("b")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert list(load_recording(path).values()) == [verdict(1, "a")]
    assert capsys.readouterr().err == f"judge.replay.path: {path}:2 was never finished; passed over\n"
    # Whoever writes next must not continue that line.
    score_all(Recorder(Moody(), KARDIA_FIVE, path), [request("c")])
    assert list(load_recording(path).values()) == [verdict(1, "a"), verdict(1, "c")]


def test_processes_write_one_recording_line_by_line(path):
    """Two at once, four lines a time; one that is torn or mixed with another would not be read."""
    program = """
import pathlib, sys
from kardia_jax.judge.protocol import score_all
from kardia_jax.judge.replay import Recorder
from kardia_jax.judge.rules.judge import RuleJudge
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeRequest
recorder = Recorder(RuleJudge(), KARDIA_FIVE, pathlib.Path(sys.argv[1]))
for number in range(50):
    score_all(recorder, [JudgeRequest("p", "s", (), f"{sys.argv[2]} {number} {part}" * 200) for part in range(4)])
"""
    root = pathlib.Path(replay_module.__file__).parents[2]
    command = [sys.executable, "-c", program, str(path)]
    others = [subprocess.Popen([*command, name], cwd=root) for name in "ab"]
    assert [other.wait() for other in others] == [0, 0]
    assert len(load_recording(path)) == 2 * 50 * 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{}", "no key and verdict"),
        ("no JSON", "Expecting value"),
        ('{"key": "k", "verdict": [["tone", 0, "So.", null]]}', "a mark cannot be 0"),
        ('{"key": "k", "verdict": [["tone", true, "So.", null]]}', "a mark cannot be True"),
        ('{"key": "k", "verdict": [["tone", 3]]}', "missing"),
    ],
)
def test_a_line_that_is_no_verdict_is_named(path, line, says):
    score_all(Recorder(Moody(), KARDIA_FIVE, path), [request("a")])
    path.write_text(f"{line}\n{path.read_text('utf-8')}", "utf-8")
    with pytest.raises(ConfigError, match=rf"judge\.replay\.path: .*verdicts\.jsonl:1.*{says}"):
        ReplayJudge(path, KARDIA_FIVE)


def test_files_that_are_none_are_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"judge\.replay\.path"):
        ReplayJudge(tmp_path / "nowhere.jsonl", KARDIA_FIVE)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"judge\.replay\.path"):
        ReplayJudge(tmp_path / "binary", KARDIA_FIVE)
    with pytest.raises(ConfigError, match=r"judge\.record"):
        Recorder(Moody(), KARDIA_FIVE, tmp_path)


# ---- one verdict as text

marks = st.builds(
    Mark,
    st.text(max_size=20),
    st.one_of(st.integers(1, 5), st.floats(1, 5)),
    st.text(max_size=50),
    st.one_of(st.none(), st.floats(0, 2)),
)


@given(st.lists(marks).map(lambda one: Verdict(tuple(one))))
def test_a_verdict_reads_back(said):
    assert verdict_from_json(verdict_to_json(said)) == said


@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
def test_junk_is_refused_or_a_verdict_in_range(text):
    try:
        read = verdict_from_json(text)
    except ValueError:
        return
    assert all(1 <= mark.mark <= 5 for mark in read.marks)


def test_a_key_is_the_same_in_every_process():
    assert request_key(KARDIA_FIVE, request("a")) == request_key(KARDIA_FIVE, request("a"))
    assert len({request_key(KARDIA_FIVE, other) for other in OTHERS.values()}) == len(OTHERS)
