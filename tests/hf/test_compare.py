import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kardia_jax.hf.convert import convert
from kardia_jax.hf.tables import HfError
from kardia_jax.hf.verify import apart, compare_tensors

NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def changed(dir, change):
    held = load_file(dir / "model.safetensors")
    change(held)
    save_file(held, dir / "model.safetensors")


def test_a_copy_is_equal_in_every_tensor(checkpoint, tmp_path):
    source = checkpoint()
    convert(source, tmp_path / "out", max_shard_size="1KB")
    report = compare_tensors(source, tmp_path / "out")
    assert (report.compared, report.equal, report.max_abs) == (24, 24, 0.0)
    assert report.agrees(0.0)


def test_every_difference_is_named_with_its_size(checkpoint):
    source, other = checkpoint(), checkpoint("other")

    def change(held):
        held[NORM] = held[NORM] + np.float32(0.5)
        held["extra"] = held[NORM]
        del held["model.layers.0.self_attn.q_norm.weight"]
        held[UP] = held[UP][:, :3].copy()

    changed(other, change)
    report = compare_tensors(source, other)
    assert report.differences == {NORM: pytest.approx(0.5)}
    assert report.only_a == ["model.layers.0.self_attn.q_norm.weight"]
    assert report.only_b == ["extra"]
    assert report.shapes == {UP: [[6, 8], [6, 3]]}
    assert (report.compared, report.equal) == (22, 21)
    assert not report.agrees(1.0)


def test_a_tolerance_is_for_numbers_only(checkpoint):
    source, other = checkpoint(), checkpoint("other")
    changed(other, lambda held: held[NORM].__iadd__(np.float32(0.25)))
    assert compare_tensors(source, other).agrees(0.26)
    assert not compare_tensors(source, other).agrees(0.2)


def test_types_are_told_but_numbers_count(checkpoint, tmp_path):
    source = checkpoint(dtype="bfloat16")
    convert(source, tmp_path / "wide", "float32")
    report = compare_tensors(source, tmp_path / "wide")
    assert report.agrees(0.0)
    assert report.dtypes[NORM] == ["BF16", "F32"]


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ([1, 2], [1, 2], 0),
        ([1, 2], [1, 4], 2),
        ([np.nan], [np.nan], 0),
        ([np.nan], [1], np.inf),
        ([np.inf], [np.inf], 0),
    ],
)
def test_distance_by_hand(one, other, distance):
    assert apart(np.array(one, np.float32), np.array(other, np.float32)) == distance


def test_no_checkpoint_no_comparison(checkpoint, tmp_path):
    with pytest.raises(HfError, match="wanted a directory"):
        compare_tensors(checkpoint(), tmp_path / "none")
