"""Alarms: said once when crossed, again only after they have come back."""

import math

import pytest

from kardia_jax.config import AlarmConfig, ConfigError
from kardia_jax.rewards.alarms import SIGNS, Alarms
from kardia_jax.rewards.diagnostics import hacking_signs, shared_phrase_share

OPENER = "hacking/shared_opener_share"


def said(alarms: Alarms, *values: float, metric: str = OPENER) -> list[int]:
    """The steps at which the alarm was given."""
    return [step for step, value in enumerate(values) if alarms.update({metric: value})]


def test_one_line_when_the_mean_crosses_and_the_next_after_it_came_back():
    # Means of two: 0.5, 0.7 (crossed), 0.8 (said), 0.5 (back), 0.2, 0.6 (not above), 0.9 (crossed again).
    assert said(Alarms(AlarmConfig(window=2)), 0.5, 0.5, 0.9, 0.7, 0.3, 0.1, 1.0, 0.8) == [2, 7]


def test_the_line_names_metric_value_and_threshold():
    (line,) = Alarms(AlarmConfig(window=1, shared_closer=0.4)).update({"hacking/shared_closer_share": 0.75})
    assert line.startswith("hacking/shared_closer_share 0.75 (mean over judge.alarms.window = 1, alarm above 0.4): ")


def test_nothing_is_said_before_the_window_is_full_and_a_step_without_the_number_does_not_count():
    assert said(Alarms(AlarmConfig(window=3)), 1.0, math.nan, 1.0, math.nan, 1.0) == [4]
    assert said(Alarms(AlarmConfig(window=1)), math.nan, math.nan) == []


@pytest.mark.parametrize(("values", "steps"), [((-0.9, -0.9), [0]), ((0.9, -0.9), [0]), ((0.6, -0.6), [])])
def test_length_counts_in_either_direction(values, steps):
    metric = "hacking/length_reward_correlation"
    assert said(Alarms(AlarmConfig(window=1)), *values, metric=metric) == steps


def test_few_different_replies_are_the_alarm_and_not_many():
    metric = "hacking/distinct_reply_share"
    assert said(Alarms(AlarmConfig(window=1)), 1.0, 0.3, 0.2, 0.1, metric=metric) == [2]


def test_every_sign_is_a_metric_that_a_step_has():
    import numpy as np

    signs = hacking_signs(["a b c"] * 2, np.zeros(2), np.zeros(2), np.ones(2, dtype=bool))
    assert {sign.metric for sign in SIGNS} == set(signs)


def test_a_phrase_counts_wherever_it_stands_and_once_per_reply():
    tic = "take all the time you need"
    replies = [f"Oh no, {tic}.", f"{tic.capitalize()}, dear. {tic}!", "Nothing of it is in here at all.", "Short."]
    assert shared_phrase_share(replies) == 2 / 4
    assert shared_phrase_share(["too short", "as well"]) == 0.0
    assert math.isnan(shared_phrase_share([]))


def test_thresholds_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"judge\.alarms\.window"):
        AlarmConfig(window=0)
    with pytest.raises(ConfigError, match=r"judge\.alarms\.repetition"):
        AlarmConfig(repetition=-0.1)
