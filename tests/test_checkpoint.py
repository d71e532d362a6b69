import errno
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from kardia_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    fingerprint,
    interrupted,
    latest_step,
    refuse_existing,
    restore,
    restore_latest,
)
from kardia_jax.types import TrainState

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
# When one array fails, Orbax closes its event loop under the others, and each of them reports that to nobody.
orphaned_writes = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
Usage = namedtuple("Usage", "total used free")


def state_at(step: int, width: int = 6) -> TrainState:
    """A state with every dtype that a run may hold, and with values that differ by step."""
    generator = np.random.default_rng(step)
    params = {
        "embed": {"embedding": jnp.asarray(generator.normal(size=(4, width)), jnp.float32)},
        "half": jnp.asarray(generator.normal(size=(3, 5)), jnp.bfloat16),
        "kept": jnp.asarray([True, False]),
        "counts": jnp.asarray([-(2**31), 7], jnp.int32),
        "edge": jnp.asarray([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
    }
    trained = {"embed": params["embed"]}
    return TrainState(jnp.int32(step), params, OPTIMIZER.init(trained), jnp.int32(0))


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def saved(folder, *steps, keep=5):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), {"prompts_seen": 4 * step})
    return folder


def test_round_trip_is_bitwise_for_every_dtype(tmp_path):
    saved(tmp_path, 3)
    restored = restore_latest(tmp_path, like=state_at(0))
    assert restored is not None
    assert restored.step == 3
    assert restored.extra == {"prompts_seen": 12}
    assert bits(restored.state) == bits(state_at(3))
    assert jax.tree.structure(restored.state) == jax.tree.structure(state_at(0))


def test_abstract_state_and_host_arrays_are_enough(tmp_path):
    host = np.asarray([2**40, -1])
    state = state_at(1)._replace(opt_state={"cursor": host})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    like = jax.eval_shape(lambda: state_at(0))._replace(opt_state={"cursor": np.zeros(2, np.int64)})
    restored = restore(tmp_path, 1, like)
    assert isinstance(restored.state.opt_state["cursor"], np.ndarray)
    assert bits(restored.state) == bits(state)


def test_arrays_come_back_with_the_sharding_of_like(tmp_path):
    saved(tmp_path, 2)
    devices = np.array(jax.devices()[:2])
    mesh = jax.sharding.Mesh(devices, ("data",))
    across = NamedSharding(mesh, PartitionSpec(None, "data"))
    like = jax.eval_shape(lambda: state_at(0))
    embedding = like.params["embed"]["embedding"]
    like.params["embed"]["embedding"] = jax.ShapeDtypeStruct(embedding.shape, embedding.dtype, sharding=across)
    restored = restore(tmp_path, 2, like)
    assert restored.state.params["embed"]["embedding"].sharding == across
    assert bits(restored.state) == bits(state_at(2))


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = TrainState(jnp.int32(0), {"w": jnp.ones((1500, 1500))}, (), jnp.int32(0))
    before = bits(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = jax.block_until_ready(advance(state))
    assert bits(restore(tmp_path, 1, like=state).state) == before


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_saving_a_saved_step_again_changes_nothing(tmp_path):
    saved(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(9), {})
    assert bits(restore(tmp_path, 1, state_at(0)).state) == bits(state_at(1))


def test_an_earlier_step_is_refused(tmp_path):
    saved(tmp_path, 5)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="step 4 is not later"):
        checkpoints.save(4, state_at(4), {})


def test_no_checkpoint_is_none(tmp_path):
    assert restore_latest(tmp_path, state_at(0)) is None
    assert restore_latest(tmp_path / "missing", state_at(0)) is None
    refuse_existing(tmp_path / "missing")


def test_a_run_without_resume_refuses_a_used_folder(tmp_path):
    saved(tmp_path, 7)
    with pytest.raises(CheckpointError, match=r"step 7.*--run\.resume"):
        refuse_existing(tmp_path)


def test_interrupted_checkpoints_are_named_and_passed_over(tmp_path, capsys):
    saved(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "3" / "state").mkdir(parents=True)
    restored = restore_latest(tmp_path, state_at(0))
    assert restored is not None
    assert restored.step == 1
    warned = capsys.readouterr().err
    assert "2.orbax-checkpoint-tmp" in warned
    assert str(tmp_path / "3") in warned
    # A writer clears them away and can save these steps again.
    saved(tmp_path, 2)
    assert interrupted(tmp_path) == []
    assert latest_step(tmp_path) == 2


KILLED_WHILE_WRITING = """
import pathlib, resource, signal, sys
import jax.numpy as jnp
import jax
from kardia_jax.checkpoint import Checkpoints
from kardia_jax.types import TrainState
noise = jax.random.normal(jax.random.key(0), (300, 300))
with Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:
    state = TrainState(jnp.int32(1), {"w": noise}, (), jnp.int32(0))
    checkpoints.save(1, state, {})
    checkpoints.wait()
    # From here the kernel kills the process in the middle of the first write beyond 100 kB.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoints.save(2, state, {})
"""


def test_a_process_killed_while_writing_leaves_the_checkpoint_before(tmp_path, capsys):
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], capture_output=True)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr.decode()
    assert interrupted(tmp_path) != []
    like = TrainState(jnp.int32(0), {"w": jnp.zeros((300, 300))}, (), jnp.int32(0))
    restored = restore_latest(tmp_path, like)
    assert restored is not None
    assert restored.step == 1
    assert "2.orbax-checkpoint-tmp" in capsys.readouterr().err


def test_a_full_disk_is_found_out_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 900, 100))
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(CheckpointError) as raised:
        checkpoints.save(2, state_at(2), {})
    message = str(raised.value)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state_at(2)))
    for piece in (str(tmp_path), f"{needed:,} bytes of state", "got 100", "run.keep_checkpoints"):
        assert piece in message
    assert sorted(tmp_path.rglob("*")) == before


@orphaned_writes
def test_a_disk_that_fills_while_writing_leaves_the_checkpoint_before(tmp_path, file_limit):
    noise = jax.random.normal(jax.random.key(0), (300, 300))
    large = TrainState(jnp.int32(2), {"w": noise}, (), jnp.int32(0))
    saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    with file_limit(100_000), pytest.raises(CheckpointError, match=r"no room.*360,008 bytes of state.*untouched"):
        _save_and_wait(checkpoints, 2, large)
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert bits(restore(tmp_path, 1, state_at(0)).state) == bits(state_at(1))


def _save_and_wait(checkpoints, step, state):
    checkpoints.save(step, state, {})
    checkpoints.wait()


@orphaned_writes
def test_a_failed_write_surfaces_when_the_run_closes(tmp_path, file_limit):
    noise = jax.random.normal(jax.random.key(0), (300, 300))

    def run():
        with file_limit(100_000), Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, TrainState(jnp.int32(1), {"w": noise}, (), jnp.int32(0)), {})

    with pytest.raises(CheckpointError, match="no room"):
        run()
    assert latest_step(tmp_path) is None


def test_the_error_number_decides_what_a_failure_is_called(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def fail(number):
        def save(*args, **kwargs):
            raise OSError(number, "from the system")

        return save

    monkeypatch.setattr(checkpoints._manager, "save", fail(errno.ENOSPC))
    with pytest.raises(CheckpointError, match="no room"):
        checkpoints.save(1, state_at(1), {})
    monkeypatch.setattr(checkpoints._manager, "save", fail(errno.EACCES))
    with pytest.raises(CheckpointError, match="could not be written: PermissionError"):
        checkpoints.save(1, state_at(1), {})
    monkeypatch.undo()
    checkpoints.close()


def test_another_model_is_refused_at_its_first_difference(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"params\.embed\.embedding: wanted float32\[4, 8\], got float32\[4, 6\]"):
        restore(tmp_path, 1, state_at(0, width=8))
    other = state_at(0)
    other.params["half"] = other.params["half"].astype(jnp.float32)
    with pytest.raises(CheckpointError, match=r"params\.half: wanted float32\[3, 5\], got bfloat16\[3, 5\]"):
        restore(tmp_path, 1, other)
    other = state_at(0)
    other.params["head"] = jnp.zeros(2)
    with pytest.raises(CheckpointError, match=r"params\.head: wanted float32\[2\], got nothing"):
        restore(tmp_path, 1, other)
    other = state_at(0)
    del other.params["kept"]
    with pytest.raises(CheckpointError, match=r"params\.kept: wanted nothing, got bool\[2\]"):
        restore(tmp_path, 1, other)


def data_file(folder):
    """The largest file of the step: the arrays themselves."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@orphaned_writes
@pytest.mark.parametrize("harm", ["truncate", "flip", "extra", "extra flip", "manifest"])
def test_damage_is_named_and_never_restored(tmp_path, harm):
    state = TrainState(jnp.int32(1), {"w": jax.random.normal(jax.random.key(0), (64, 64))}, (), jnp.int32(0))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"prompts_seen": 12})
    step = tmp_path / "1"
    data, extra = data_file(step), step / "extra" / "metadata"
    if harm == "truncate":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif harm == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 0x10
        data.write_bytes(content)
    elif harm == "extra":
        extra.write_bytes(extra.read_bytes()[:40])
    elif harm == "extra flip":
        extra.write_bytes(extra.read_bytes().replace(b'"prompts_seen": 12', b'"prompts_seen": 13'))
    else:
        (step / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=rf"{step}.*damaged"):
        restore_latest(tmp_path, state)


def test_fingerprint_by_hand():
    # 5 * 1 + 7 * 3 + 2 * 5 + 1 * 7 = 43, whatever the shape.
    assert int(fingerprint(jnp.asarray([5, 7, 2, 1], jnp.uint32))) == 43
    assert int(fingerprint(jnp.asarray([[5, 7], [2, 1]], jnp.int32))) == 43
    assert int(fingerprint(jnp.asarray([True, False, True]))) == 6
    assert int(fingerprint(jnp.float32(1.0))) == 0x3F800000
    assert int(fingerprint(jnp.bfloat16(1.0))) == 0x3F80


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 23), st.integers(0, 31))
def test_every_flipped_bit_changes_the_fingerprint(place, bit):
    words = np.arange(24, dtype=np.uint32).reshape(2, 3, 4) * 12345
    flipped = words.copy()
    flipped.flat[place] ^= np.uint32(1) << np.uint32(bit)
    assert int(fingerprint(jnp.asarray(words))) != int(fingerprint(jnp.asarray(flipped)))
