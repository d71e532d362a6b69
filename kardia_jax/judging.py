"""The judge's part of a training run: asked about each completion as it ends, counted, and given up on when it fails.

In: prompts, and texts one by one while the device decodes the others. Out: ``Graded`` for the step, the metrics of the
judge, and the sentence with which the run stops when too many verdicts are missing.

    with Judging(grader, config.judge) as judging:
        grading = judging.begin(prompts, group=8)
        sample(..., finished=grading.finished)          # (prompt, sample, text), as each completion ends
        ...                                              # the device goes on with log-probs
        graded = grading.graded()                        # waits for the verdicts that are not there yet
        trouble = judging.trouble(graded)                # None, or why the run has to stop
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from kardia_jax.config import JudgeConfig
from kardia_jax.dialogue.prompt import Prompt
from kardia_jax.judge.failures import FailureWindow
from kardia_jax.judge.protocol import take_stats
from kardia_jax.judge.scoring import Completion, request_of, scores_of
from kardia_jax.judge.session import JudgeSession, Question, busy_seconds
from kardia_jax.scoring import Graded, Grader, collected, read_answer

GRACE_SECONDS = 1.0
"""Beyond the deadline, for a judge that keeps it itself and can say what was wrong."""


class Grading:
    """P x G completions of one step on their way through parser and judge."""

    def __init__(self, grader: Grader, session: JudgeSession, prompts: Sequence[Prompt], group: int):
        self._grader, self._session, self._prompts, self._group = grader, session, prompts, group
        self._rows: dict[tuple[int, int], Completion] = {}
        self._questions: dict[tuple[int, int], Question] = {}
        self._waited = 0.0

    def finished(self, prompt: int, sample: int, text: str) -> None:
        """Takes a completion that has ended; a well-formed one goes to the judge at once."""
        at = prompt, sample
        row = self._rows[at] = read_answer(self._prompts[prompt], text)
        request = request_of(row, self._grader.weights)
        if request is not None:
            self._questions[at] = self._session.submit(request)

    def graded(self) -> Graded:
        """Waits for the verdicts; the order in which completions ended changes nothing."""
        places, started = sorted(self._questions), time.monotonic()
        said = dict(zip(places, self._session.gather([self._questions[at] for at in places]), strict=True))
        self._waited = time.monotonic() - started
        rows_P_G = [[self._rows[p, g] for g in range(self._group)] for p in range(len(self._prompts))]
        rubric = self._grader.rubric
        scores = [scores_of(self._rows[at], said.get(at), rubric) for at in sorted(self._rows)]
        return collected(rows_P_G, scores, self._grader.weights)

    def metrics(self) -> dict[str, float]:
        """How long the judge was at work on this step, and which share of that nobody waited for."""
        busy = busy_seconds(self._questions.values())
        return {"judge/busy_seconds": busy, "judge/hidden_share": hidden_share(self._waited, busy)}


def hidden_share(waited: float, busy: float) -> float:
    """1 - waited / busy, both in seconds; NaN where the judge had nothing to do."""
    return max(0.0, 1 - waited / busy) if busy > 0 else math.nan


class Judging:
    """The judge of a run, from its first step to its last; a context manager, since calls may be under way."""

    def __init__(self, grader: Grader, config: JudgeConfig):
        self._grader, self._open = grader, ExitStack()
        self._session = JudgeSession(grader.judge, config.traffic.deadline_seconds + GRACE_SECONDS)
        self._window = FailureWindow(config.max_failure_share, config.failure_window)

    def begin(self, prompts: Sequence[Prompt], group: int) -> Grading:
        """A step's completions are about to come."""
        return Grading(self._grader, self._session, prompts, group)

    def trouble(self, graded: Graded) -> str | None:
        """Counts the step's missing verdicts; why the run has to stop, if it has to."""
        return self._window.add(graded.tally)

    def metrics(self) -> dict[str, float]:
        """What the judge counted since the last call: latency, retries, tokens, as far as it counts."""
        return take_stats(self._grader.judge)

    def __enter__(self) -> Self:
        self._open.enter_context(self._session)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
