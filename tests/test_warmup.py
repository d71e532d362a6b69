"""What does not fit is said before the first step, with the fields that change it."""

import types

import jax
import jax.numpy as jnp
import pytest

from kardia_jax import warmup
from kardia_jax.warmup import MemoryShortageError, bytes_of, check_memory, free_bytes, memory_errors


def program(temporaries: int, results: int, aliased: int):
    """Stands for a compiled program of this much memory."""
    sizes = {"temp_size_in_bytes": temporaries, "output_size_in_bytes": results, "alias_size_in_bytes": aliased}
    return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes))


def test_what_fits_passes_and_what_takes_an_arguments_place_is_free():
    check_memory("update", program(60, 100, 90), {}, 70, "grpo")
    with pytest.raises(MemoryShortageError):
        check_memory("update", program(60, 100, 90), {}, 69, "grpo")
    check_memory("update", program(60, 100, 90), {}, None, "grpo")


@pytest.mark.parametrize("verb", ["grpo", "sft"])
def test_the_error_says_what_where_how_much_and_which_fields(verb):
    held = {"parameters": 3 * 2**30, "optimizer state": 6 * 2**30, "batch": 2**20, "gradient": 0}
    with pytest.raises(MemoryShortageError) as error:
        check_memory("update of 4 groups", program(8 * 2**30, 0, 0), held, 2 * 2**30, verb)
    assert str(error.value).startswith(
        "update of 4 groups: wanted 8.00 GiB for temporaries and results, got 2.00 GiB that are free; that is room "
        "for 25% of it. Beside it: parameters 3.00 GiB, optimizer state 6.00 GiB, batch 1.0 MiB. Set "
        f"{verb}.tokens_per_micro_batch lower"
    )


def test_a_failed_allocation_becomes_advice_and_other_errors_pass():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nlong\ntrace")
    advice = r"allocating 9 bytes\. Set sft\.tokens_per_micro_batch"
    with pytest.raises(MemoryShortageError, match=advice), memory_errors("sft"):
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_errors("sft"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_memory_is_that_of_the_device_or_else_of_the_machine(monkeypatch):
    free = free_bytes()
    assert free is not None
    assert 2**20 < free < 2**50
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 100, "bytes_in_use": 30})
    monkeypatch.setattr(warmup.jax, "local_devices", lambda: [device])
    assert free_bytes() == 70


def test_bytes_of_a_tree():
    assert bytes_of({"a": jnp.zeros((2, 3)), "b": [jnp.zeros(4, jnp.bfloat16), ()]}) == 24 + 8
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    assert bytes_of(jax.device_put(jnp.zeros((2, 3)), places)) == 12
