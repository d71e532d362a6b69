import pytest

from kardia_jax.observe.phases import PhaseTimer


class Clock:
    """Moves only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_an_inner_phase_stops_the_outer_clock():
    clock = Clock()
    timer = PhaseTimer(clock)
    clock.now += 10  # no phase is open: nobody's time
    with timer.phase("rollout"):
        clock.now += 1
        with timer.phase("judge"):
            clock.now += 2
        clock.now += 4
    with timer.phase("judge"):
        clock.now += 8
    assert timer.take() == {"rollout": 5.0, "judge": 10.0}
    assert timer.take() == {}


def test_an_open_phase_is_split_by_take():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("update"):
        clock.now += 3
        assert timer.take() == {"update": 3.0}
        clock.now += 1
    assert timer.take() == {"update": 1.0}


def test_time_is_counted_when_the_block_raises():
    clock = Clock()
    timer = PhaseTimer(clock)

    def save():
        clock.now += 2
        raise KeyError("disk")

    with pytest.raises(KeyError), timer.phase("save"):
        save()
    clock.now += 5
    assert timer.take() == {"save": 2.0}
