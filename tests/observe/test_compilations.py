"""The counter hears the compiler, and nothing when a program is used again."""

import jax
import jax.numpy as jnp
import numpy as np

from kardia_jax.observe.compilations import EVENT, CompilationCounter, Compiled


def test_a_new_shape_counts_and_a_known_one_does_not():
    double = jax.jit(lambda x: 2 * x)
    with CompilationCounter() as compilations:
        for size in (3, 4, 3, 4):
            double(np.zeros(size, np.float32))
        taken = compilations.take()
        assert taken.count == 2
        assert taken.seconds > 0
        double(np.zeros(3, np.float32))
        assert compilations.take() == Compiled(0, 0.0)


def test_it_stops_listening_and_hears_nothing_else():
    with CompilationCounter() as compilations:
        jax.monitoring.record_event_duration_secs("/something/else", 1.0)
        jax.monitoring.record_event_duration_secs(EVENT, 1.5)
    jax.monitoring.record_event_duration_secs(EVENT, 1.0)
    jax.jit(lambda x: x + 3)(jnp.zeros(5)).block_until_ready()
    assert compilations.take() == Compiled(1, 1.5)
