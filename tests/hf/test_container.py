import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kardia_jax.hf.container import SLAB, header, is_finite, read, stored, write
from kardia_jax.hf.tables import HfError


def tensors(dtype="float32"):
    numbers = np.random.default_rng(1)
    shapes = {"b.weight": (3, 5), "a.weight": (7,), "empty": (0, 4), "number": ()}
    return {name: numbers.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def refuse(name, was_finite):
    raise HfError(f"{name} {was_finite}")


def write_all(file, held, dtype, on_bad_number=refuse):
    shapes = {name: tensor.shape for name, tensor in held.items()}
    write(file, dtype, shapes, lambda names: [(name, held[name]) for name in names], on_bad_number)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_is_byte_for_byte_what_the_library_writes(tmp_path, dtype):
    held = tensors(dtype)
    write_all(tmp_path / "ours", held, dtype)
    save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    loaded = load_file(tmp_path / "ours")
    assert all(loaded[name].tobytes() == tensor.tobytes() for name, tensor in held.items())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_file_of_the_library_is_read_bit_by_bit(tmp_path, dtype):
    held = tensors(dtype)
    save_file(held, tmp_path / "theirs")
    found = dict(read(stored(tmp_path / "theirs")))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in held.items()}
    assert all(found[name].dtype == tensor.dtype for name, tensor in held.items())
    assert all(found[name].tobytes() == tensor.tobytes() for name, tensor in held.items())


def test_the_header_by_hand():
    names, head = header("bfloat16", {"b": (2, 2), "a": (3,)})
    table = json.loads(head[8:])
    assert names == ["a", "b"]
    assert int.from_bytes(head[:8], "little") == len(head) - 8
    assert len(head) % 8 == 0
    assert table["a"] == {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}
    assert table["b"] == {"dtype": "BF16", "shape": [2, 2], "data_offsets": [6, 14]}
    assert table["__metadata__"] == {"format": "pt"}


def test_conversion_rounds_as_one_cast_of_the_whole_does(tmp_path):
    held = {"x": np.linspace(-3, 3, SLAB + 5, dtype=np.float32)}
    write_all(tmp_path / "f", held, "bfloat16")
    assert load_file(tmp_path / "f")["x"].tobytes() == held["x"].astype(jnp.bfloat16).tobytes()


@pytest.mark.parametrize(
    ("value", "dtype", "was_finite"), [(np.nan, "float32", False), (np.inf, "bfloat16", False), (1e6, "float16", True)]
)
def test_bad_numbers_are_told_once_with_where_they_come_from(tmp_path, value, dtype, was_finite):
    held, told = {"x": np.zeros(2 * SLAB, np.float32), "y": np.zeros(3, np.float32)}, []
    held["x"][[1, SLAB + 1]] = value
    write_all(tmp_path / "f", held, dtype, lambda *problem: told.append(problem))
    assert told == [("x", was_finite)]
    assert not is_finite(load_file(tmp_path / "f")["x"])
    with pytest.raises(HfError, match="x "):
        write_all(tmp_path / "g", held, dtype)


@pytest.mark.parametrize("keep", [4, 60, -3])
def test_a_file_cut_anywhere_is_refused(tmp_path, keep):
    save_file(tensors(), tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:keep])
    with pytest.raises(HfError, match="f: damaged or cut short"):
        stored(tmp_path / "f")


def test_a_file_cut_after_its_header_was_read_is_refused(tmp_path):
    save_file(tensors(), tmp_path / "f")
    found = stored(tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-100])
    with pytest.raises(HfError, match="f: cut short in"):
        list(read(found))


def test_a_type_that_is_not_a_float_is_named(tmp_path):
    save_file({"x": np.zeros(3, np.int8)}, tmp_path / "f")
    with pytest.raises(HfError, match="x is I8, wanted one of"):
        list(read(stored(tmp_path / "f")))
