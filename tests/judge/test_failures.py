"""When a run gives up on its judge, and what it says."""

from kardia_jax.judge.failures import LONGEST, FailureWindow, Tally, shortage


def tally(lost: int, asked: int = 8, completions: int = 8, why: str = "busy") -> Tally:
    return Tally(asked, completions, (why,) * lost)


def test_the_share_counts_over_the_window():
    window = FailureWindow(most=0.5, steps=3)
    assert window.add(tally(3)) is None
    # 9 of 16.
    said = window.add(tally(6))
    assert said == (
        "judge.max_failure_share: 9 of 16 verdicts of the last 2 steps are missing (56%), allowed are 50%. "
        "Why: 9 x busy."
    )


def test_a_bad_step_among_good_ones_is_borne():
    window = FailureWindow(most=0.5, steps=3)
    assert [window.add(tally(lost)) for lost in (0, 0, 7, 4)] == [None] * 4
    # 0, 7 and 4 of 24 were fine; 7, 4 and 2 of 24 are more than half.
    assert window.add(tally(2)) is not None


def test_exactly_the_allowed_share_is_allowed():
    assert FailureWindow(most=0.5, steps=1).add(tally(4)) is None
    assert FailureWindow(most=0.0, steps=1).add(tally(0)) is None
    assert FailureWindow(most=0.0, steps=1).add(tally(1)) is not None


def test_a_step_that_lost_everything_counts_by_itself():
    window = FailureWindow(most=0.5, steps=10)
    for _ in range(9):
        assert window.add(tally(0)) is None
    said = window.add(tally(8))
    assert said is not None
    assert "8 of 8 verdicts are missing (100%)" in said


def test_one_lost_call_beside_malformed_answers_is_no_outage():
    window = FailureWindow(most=0.5, steps=10)
    assert window.add(tally(0)) is None
    assert window.add(tally(1, asked=1, completions=32)) is None


def test_a_step_that_asked_nothing_is_fine():
    window = FailureWindow(most=0.0, steps=2)
    assert window.add(Tally(0, 8, ())) is None


def test_with_everything_allowed_nothing_stops():
    window = FailureWindow(most=1.0, steps=2)
    assert [window.add(tally(8)) for _ in range(5)] == [None] * 5


def test_the_commonest_reasons_come_first_and_the_rest_are_counted():
    reasons = ("slow",) * 2 + ("reset",) * 4 + ("503",) * 3 + ("odd", "x" * 1000)
    said = shortage([Tally(16, 16, reasons)], 0.25)
    assert said.endswith(
        "11 of 16 verdicts are missing (69%), allowed are 25%. Why: 4 x reset; 3 x 503; 2 x slow; 2 for other reasons."
    )
    assert len(shortage([Tally(1, 1, ("x" * 1000,))], 0.5)) < LONGEST + 120


def test_reasons_that_differ_by_one_answers_words_or_tries_are_one_kind():
    reasons = (
        "http://a: answer: wanted one JSON object, got 'Well' (after 3 tries)",
        "http://a: no answer (after 1 try)",
        "http://a: answer: wanted one JSON object, got '1. It is' (after 2 tries)",
        "http://a: no answer (after 2 tries)",
        "http://b: no answer (after 2 tries)",
        "http://a: no answer (after 5 tries)",
    )
    said = shortage([Tally(6, 6, reasons)], 0.5)
    assert said.endswith(
        "Why: 3 x http://a: no answer (after 1 try); "
        "2 x http://a: answer: wanted one JSON object, got 'Well' (after 3 tries); "
        "1 x http://b: no answer (after 2 tries)."
    )
