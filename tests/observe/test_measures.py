import math

import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.observe.measures import HostMean, merge, observed, to_host, values
from kardia_jax.types import Mean


def test_device_means_arrive_as_floats():
    fetched = to_host({"kl": Mean(jnp.float32(8.0), jnp.float32(2.0))})
    assert fetched == {"kl": HostMean(8.0, 2.0)}
    assert isinstance(fetched["kl"].sum, float)


def test_merge_adds_sums_and_weights_and_divides_once():
    # Tokens 3 and 5 in one part, 7 in the other: 15 / 3, not the mean of 4 and 7.
    merged = merge([{"kl": HostMean(8.0, 2.0)}, {"kl": HostMean(7.0, 1.0), "entropy": HostMean(1.5, 3.0)}])
    assert values(merged) == {"kl": 5.0, "entropy": 0.5}


def test_nothing_observed_is_unknown_and_not_zero():
    assert math.isnan(values({"judge": HostMean(0.0, 0.0)})["judge"])
    assert observed([math.nan, 2.0, 4.0]) == HostMean(6.0, 2.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-100, 100), min_size=1, max_size=20), st.integers(0, 20))
def test_any_split_gives_the_same_mean(numbers, cut):
    whole = values({"x": observed(numbers)})
    parts = [{"x": observed(numbers[:cut])}, {"x": observed(numbers[cut:])}]
    assert values(merge(parts)) == whole
