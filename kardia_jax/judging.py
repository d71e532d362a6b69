"""The judge's part of a training run: asked about each completion as it ends, counted, and given up on when it fails.

In: prompts, and texts one by one while the device decodes the others. Out: ``Graded`` for the step, and the metrics of
the judge and of the one that audits it.

    with Judging(grader, config.judge, seed=0) as judging:
        grading = judging.begin(step=0, prompts=prompts, group=8)
        sample(..., finished=grading.finished)          # (prompt, sample, text), as each completion ends
        ...                                              # the device goes on with log-probs
        graded = grading.graded()                        # waits for the verdicts that are not there yet
        judging.check(graded)                            # JudgeStopError when too many are missing
        ...                                              # the device learns
        metrics |= grading.audited()                     # what the second judge said meanwhile

In a run of several processes each asks its judge about the completions that it holds, and then all tell each other, so
that every process has the whole ``Graded``. A judge that gives up on one of them stops all.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import jax

from kardia_jax.config import JudgeConfig
from kardia_jax.dialogue.prompt import Prompt
from kardia_jax.hosts import alone
from kardia_jax.judge.audit import audit_metrics, audit_sample, compare
from kardia_jax.judge.failures import FailureWindow, JudgeStopError
from kardia_jax.judge.protocol import JudgeUnusableError, take_stats
from kardia_jax.judge.records import verdict_from_json, verdict_to_json
from kardia_jax.judge.scoring import Completion, request_of, scores_of
from kardia_jax.judge.session import Answer, JudgeSession, Question, busy_seconds
from kardia_jax.model.shares import WHOLE, Rows, Share, rows_of
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Verdict
from kardia_jax.scoring import Graded, Grader, collected, read_answer

GRACE_SECONDS = 1.0
"""Beyond the deadline, for a judge that keeps it itself and can say what was wrong."""

Place = tuple[int, int]
"""(prompt, sample)."""


class Questions:
    """What one judge is asked about the completions of a step, by place."""

    def __init__(self, session: JudgeSession):
        self._session = session
        self._asked: dict[Place, Question] = {}
        self._waited = 0.0

    def ask(self, at: Place, request: JudgeRequest) -> None:
        """Hands a request to the judge, and returns at once."""
        self._asked[at] = self._session.submit(request)

    def answers(self) -> dict[Place, Answer]:
        """Waits for all of them; in the order of places, whatever order the completions ended in."""
        places, started = sorted(self._asked), time.monotonic()
        given = self._session.gather([self._asked[at] for at in places])
        self._waited = time.monotonic() - started
        return dict(zip(places, given, strict=True))

    def failed(self, why: str) -> dict[Place, Answer]:
        """The same, where nothing can be asked any more."""
        return dict.fromkeys(sorted(self._asked), JudgeFailure(why, retryable=False))

    def metrics(self) -> dict[str, float]:
        """How long the judge was at work on the step, and which share of that nobody waited for."""
        busy = busy_seconds(self._asked.values())
        return {"judge/busy_seconds": busy, "judge/hidden_share": hidden_share(self._waited, busy)}


class Grading:
    """P x G completions of one step on their way through parser and judge."""

    def __init__(
        self,
        grader: Grader,
        prompts: Sequence[Prompt],
        group: int,
        paid: Questions,
        audit: Questions,
        sample: Set[Place],
        rows: Rows,
    ):
        """``paid``: what the judge of the rewards is asked; ``audit``: what the second judge is asked, about the
        places in ``sample``; ``rows``: which prompts are this process's."""
        self._grader, self._prompts, self._group, self._held = grader, prompts, group, rows
        self._texts: dict[Place, str] = {}
        self._paid, self._audit, self._sample = paid, audit, sample
        self._rows: dict[Place, Completion] = {}
        self._said: dict[Place, Answer] = {}

    def finished(self, prompt: int, sample: int, text: str) -> None:
        """Takes a completion of this process's own that has ended; a well-formed one goes to the judge at once."""
        if not self._held.share.speaks:
            return
        at = int(self._held.own[prompt]), sample
        self._texts[at] = text
        row = self._rows[at] = read_answer(self._prompts[at[0]], text)
        request = request_of(row, self._grader.weights)
        if request is None:
            return
        self._paid.ask(at, request)
        if at in self._sample:
            self._audit.ask(at, request)

    def graded(self) -> Graded:
        """Waits for the verdicts. Raises JudgeUnusableError where none can ever come."""
        said = self._said = self._everybodys(self._paid.answers)
        for (p, g), text in self._texts.items():
            if (p, g) not in self._rows:
                self._rows[p, g] = read_answer(self._prompts[p], text)
        rows_P_G = [[self._rows[p, g] for g in range(self._group)] for p in range(len(self._prompts))]
        scores = [scores_of(self._rows[at], said.get(at), self._grader.rubric) for at in sorted(self._rows)]
        return collected(rows_P_G, scores, self._grader.weights)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, G)"""
        return len(self._prompts), self._group

    @property
    def texts_P_G(self) -> list[list[str]]:
        """Every completion of the step, once it is graded."""
        return [[self._texts[p, g] for g in range(self._group)] for p in range(len(self._prompts))]

    def _everybodys(self, answers: Callable[[], dict[Place, Answer]]) -> dict[Place, Answer]:
        """The answers of all processes, and their texts; raises JudgeUnusableError in all where one has to."""
        if alone():
            return answers()
        try:
            own, trouble = answers(), None
        except JudgeUnusableError as error:
            own, trouble = {}, f"process {jax.process_index()}: {error}"
        said: dict[Place, Answer] = {}
        for text in self._held.share.told(written(self._texts, own, trouble)):
            texts, answered, found = read(text)
            self._texts |= texts
            said |= answered
            if found is not None:
                raise JudgeUnusableError(found)
        return {at: said[at] for at in sorted(said)}

    @property
    def has_audit(self) -> bool:
        """Whether the second judge looks at this step."""
        return bool(self._sample)

    def audited(self) -> dict[str, float]:
        """The gap between the two judges, and what the second one counted and cost (``audit/judge/...``); whatever goes
        wrong with it is counted and stops nothing."""
        try:
            second = self._everybodys(self._audit.answers)
        except JudgeUnusableError as error:
            why = str(error)
            second = self._everybodys(lambda: self._audit.failed(why))
        rubric, auditor = self._grader.rubric, self._grader.auditor
        found = audit_metrics(compare(rubric, [self._said[at] for at in second], list(second.values())))
        counted = {} if auditor is None else reduced(self._held.share, take_stats(auditor))
        return found | {f"audit/{name}": value for name, value in counted.items()}

    def metrics(self) -> dict[str, float]:
        """What the judge's time came to."""
        return reduced(self._held.share, self._paid.metrics())


def written(texts: Mapping[Place, str], said: Mapping[Place, Answer], trouble: str | None) -> str:
    """What a process tells the others, as JSON."""
    verdicts = [[*at, verdict_to_json(one)] for at, one in said.items() if isinstance(one, Verdict)]
    failures = [[*at, one.reason, one.retryable] for at, one in said.items() if isinstance(one, JudgeFailure)]
    rows = [[*at, text] for at, text in texts.items()]
    return json.dumps({"texts": rows, "verdicts": verdicts, "failures": failures, "trouble": trouble})


def read(text: str) -> tuple[dict[Place, str], dict[Place, Answer], str | None]:
    """What ``written`` wrote."""
    told = json.loads(text)
    answers: dict[Place, Answer] = {(p, g): verdict_from_json(verdict) for p, g, verdict in told["verdicts"]}
    answers |= {(p, g): JudgeFailure(reason, retryable) for p, g, reason, retryable in told["failures"]}
    return {(p, g): said for p, g, said in told["texts"]}, answers, told["trouble"]


def reduced(share: Share, own: Mapping[str, float]) -> dict[str, float]:
    """What each process counted, as one: counts are added; of seconds, latencies and queues the largest stands, of
    shares and rates the mean; NaN is unknown and left out.

    >>> reduced(WHOLE, {"judge/calls": 3.0})
    {'judge/calls': 3.0}
    """
    if alone():
        return dict(own)
    told: list[dict[str, float]] = [json.loads(text) for text in share.told(json.dumps(own))]

    def one(name: str) -> float:
        known = [each[name] for each in told if name in each and not math.isnan(each[name])]
        if not known:
            return math.nan
        if name.endswith(("_rate", "_share")):
            return sum(known) / len(known)
        return max(known) if any(word in name for word in ("latency", "queue", "seconds")) else sum(known)

    return {name: one(name) for name in dict.fromkeys(name for each in told for name in each)}


def hidden_share(waited: float, busy: float) -> float:
    """1 - waited / busy, both in seconds; NaN where the judge had nothing to do."""
    return max(0.0, 1 - waited / busy) if busy > 0 else math.nan


class Judging:
    """The judges of a run, from its first step to its last; a context manager, since calls may be under way."""

    def __init__(self, grader: Grader, config: JudgeConfig, seed: int, share: Share = WHOLE):
        self._share = share
        self._grader, self._config, self._seed, self._open = grader, config.audit, seed, ExitStack()
        self._session = JudgeSession(grader.judge, config.traffic.deadline_seconds + GRACE_SECONDS)
        limit = config.audit.traffic.deadline_seconds + GRACE_SECONDS
        self._audit = self._session if grader.auditor is None else JudgeSession(grader.auditor, limit)
        self._window = FailureWindow(config.max_failure_share, config.failure_window)

    def begin(self, step: int, prompts: Sequence[Prompt], group: int, rows: Rows | None = None) -> Grading:
        """The completions of step ``step`` (counted from 0) are about to come; ``prompts`` are those of all processes,
        and ``rows`` says which are this one's: all, where nothing is said."""
        paid, audit = Questions(self._session), Questions(self._audit)
        sample = self._sample(step, len(prompts), group)
        return Grading(self._grader, prompts, group, paid, audit, sample, rows or rows_of(WHOLE, len(prompts)))

    def check(self, graded: Graded) -> None:
        """Counts the step's missing verdicts; raises JudgeStopError when too many of the last steps' are missing."""
        trouble = self._window.add(graded.tally)
        if trouble is not None:
            raise JudgeStopError(trouble)

    def metrics(self) -> dict[str, float]:
        """What the judge counted since the last call: latency, retries, tokens, as far as it counts."""
        return reduced(self._share, take_stats(self._grader.judge))

    def _sample(self, step: int, prompts: int, group: int) -> frozenset[Place]:
        """Places that the second judge sees, chosen before anything is sampled."""
        every = self._config.every
        if self._grader.auditor is None or every == 0 or (step + 1) % every:
            return frozenset()
        size = math.ceil(self._config.share * prompts * group)
        return frozenset(divmod(place, group) for place in audit_sample(self._seed, step, prompts * group, size))

    def __enter__(self) -> Self:
        self._open.enter_context(self._session)
        if self._audit is not self._session:
            self._open.enter_context(self._audit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
