import collections
import json
import shutil
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kardia_jax.hf import folder
from kardia_jax.hf.convert import convert
from kardia_jax.hf.read import load_arrays, load_params
from kardia_jax.hf.tables import HfError, entries, hf_shape, nested, rules, shape, sizes
from kardia_jax.hf.verify import compare_tensors
from kardia_jax.hf.write import published, tensors, write_weights
from kardia_jax.model.spec import ModelSpec, SpecError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
BIG = ModelSpec("qwen3", vocab_size=4096, width=256, mlp_width=512, layers=6, heads=4, kv_heads=2, head_dim=64)
LARGEST = 4096 * 256 * 4
"""Bytes of the largest tensor of BIG in float32: 4.2 MB of 18 MB."""


def contents(dir):
    return {file.name: file.read_bytes() for file in sorted(dir.iterdir())}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keeping_the_dtype_keeps_every_byte(checkpoint, tmp_path, dtype, tied):
    source = checkpoint(dtype=dtype, tied=tied)
    before = contents(source)
    convert(source, tmp_path / "out")
    after = contents(tmp_path / "out")
    config, was = (json.loads(side.pop("config.json")) for side in (after, before))
    assert after == before
    assert config == {name: value for name, value in was.items() if name != "torch_dtype"} | {"dtype": dtype}
    assert contents(source)["config.json"] == json.dumps(was).encode()


@pytest.mark.parametrize(
    ("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_another_dtype_is_one_rounding(checkpoint, tmp_path, stored, wanted):
    source = checkpoint(dtype=stored)
    convert(source, tmp_path / "out", wanted)
    for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items():
        assert tensor.tobytes() == load_file(source / WEIGHTS)[name].astype(jnp.dtype(wanted)).tobytes()


def test_mixed_types_become_float32(checkpoint, tmp_path):
    source = checkpoint(dtype="bfloat16")
    held = load_file(source / WEIGHTS)
    held["model.norm.weight"] = held["model.norm.weight"].astype(np.float32)
    save_file(held, source / WEIGHTS)
    convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert compare_tensors(source, tmp_path / "out").agrees(0.0)


def test_shards_in_and_out(checkpoint, tmp_path):
    source = checkpoint()
    convert(source, tmp_path / "shards", max_shard_size="1KB")
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert all((tmp_path / "shards" / name).is_file() for name in index["weight_map"].values())
    convert(tmp_path / "shards", tmp_path / "one")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_transformers_finds_every_key_and_the_same_tokenizer(checkpoint, tmp_path, family, tied):
    source = checkpoint(tied=tied, family=family)
    convert(source, tmp_path / "out", "bfloat16", max_shard_size="2KB")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert str(model.dtype) == "torch.bfloat16"
    assert model.generation_config.eos_token_id == [3, 5]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_a_model_without_tokenizer_or_generation_settings_comes_through(checkpoint, tmp_path):
    source = checkpoint(tokens=0)
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "out", card="# made\n")
    assert sorted(contents(tmp_path / "out")) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        WEIGHTS,
    ]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    (tmp_path / "out" / "README.md").write_text("# mine\n")
    convert(tmp_path / "out", tmp_path / "again", card="# made\n")
    assert (tmp_path / "again" / "README.md").read_text() == "# mine\n"


def change_tensors(dir, change):
    held = load_file(dir / WEIGHTS)
    change(held)
    save_file(held, dir / WEIGHTS, metadata={"format": "pt"})


def change_config(dir, **fields):
    config = json.loads((dir / "config.json").read_text())
    (dir / "config.json").write_text(json.dumps(config | fields))


def cut_a_shard(dir):
    (dir / WEIGHTS).write_bytes((dir / WEIGHTS).read_bytes()[:-20])


def only_a_pickle(dir):
    (dir / WEIGHTS).rename(dir / "pytorch_model.bin")


def longer_tokenizer(dir):
    tokenizer = AutoTokenizer.from_pretrained(dir)
    tokenizer.add_tokens([f"more{index}" for index in range(17 - len(tokenizer))])
    tokenizer.save_pretrained(str(dir))


def index_of(dir, weight_map):
    (dir / WEIGHTS).unlink()
    (dir / INDEX).write_text(json.dumps({"weight_map": weight_map}))


BAD = {
    "truncated": (cut_a_shard, r"model\.safetensors: damaged or cut short"),
    "pickle": (only_a_pickle, r"pytorch_model\.bin: pickles can run any code .*save_pretrained"),
    "missing shard": (lambda dir: index_of(dir, {"a": "gone.safetensors"}), r"files that are not there.*gone\.safet"),
    "shard elsewhere": (lambda dir: index_of(dir, {"a": "../x.safetensors"}), r"wanted files of this directory"),
    "no map": (lambda dir: index_of(dir, ["a"]), r"weight_map of file names"),
    "vocabulary": (
        lambda dir: change_config(dir, vocab_size=18),
        r"of another shape: model\.embed_tokens\.weight \(wanted \[18, 8\], got \[16, 8\]\)",
    ),
    "tokenizer": (longer_tokenizer, r"wanted at most 16 ids .*got 17"),
    "broken tokenizer": (lambda dir: (dir / "tokenizer.json").write_text("{"), r"wanted a tokenizer, got"),
    "missing": (lambda dir: change_tensors(dir, lambda held: held.pop(UP)), rf"missing: {UP}"),
    "unknown": (lambda dir: change_tensors(dir, lambda held: held.update(x=np.zeros(2))), r"unknown: x"),
    "quantised": (
        lambda dir: change_tensors(dir, lambda held: held.update({UP: np.zeros((6, 8), np.int8)})),
        r"\(I8\)",
    ),
    "no config": (lambda dir: (dir / "config.json").unlink(), r"wanted a directory with config\.json, got none"),
    "broken config": (lambda dir: (dir / "config.json").write_text("{"), r"config\.json: wanted a JSON object"),
    "list for config": (lambda dir: (dir / "config.json").write_text("[]"), r"wanted a JSON object, got a list"),
    "architecture": (lambda dir: change_config(dir, model_type="mamba"), r"model_type: wanted one of .*got 'mamba'"),
    "other head": (
        lambda dir: change_tensors(dir, lambda held: held.update({"lm_head.weight": np.zeros((16, 8), np.float32)})),
        r"lm_head\.weight is not model\.embed_tokens\.weight",
    ),
    "overflow": (
        lambda dir: change_tensors(dir, lambda held: held[UP].fill(1e30)),
        rf"{UP}: wanted finite float16 weights.*wider dtype",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_and_nothing_is_left(checkpoint, tmp_path, kind):
    source = checkpoint()
    spoil, message = BAD[kind]
    spoil(source)
    before = contents(source)
    with pytest.raises((HfError, SpecError), match=message):
        convert(source, tmp_path / "deep" / "out", "float16")
    assert contents(source) == before
    assert [path for path in tmp_path.rglob("*") if "out" in path.name] == []


def test_everything_wrong_is_said_at_once(checkpoint, tmp_path):
    source = checkpoint()

    def spoil(held):
        del held["model.norm.weight"]
        held["extra"] = np.zeros(1, np.float32)
        held[UP] = np.zeros((6, 9), np.float32)

    change_tensors(source, spoil)
    with pytest.raises(HfError) as raised:
        convert(source, tmp_path / "out")
    for piece in ("unknown: extra", "missing: model.norm.weight", f"of another shape: {UP}"):
        assert piece in str(raised.value)


def test_nan_is_kept_but_said_with_its_tensor(checkpoint, tmp_path, capsys):
    source = checkpoint()
    change_tensors(source, lambda held: held[UP].fill(np.nan))
    convert(source, tmp_path / "out")
    assert f"{UP} holds NaN or infinity" in capsys.readouterr().err
    assert compare_tensors(source, tmp_path / "out").agrees(0.0)
    load_params(source, ModelSpec.from_hf(folder.config(source)))
    assert f"{UP} holds NaN or infinity" in capsys.readouterr().err


def test_a_tied_head_that_somebody_wrote_out_is_left_out(checkpoint, tmp_path):
    source = checkpoint()
    change_tensors(source, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].copy()}))
    convert(source, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)


@pytest.mark.parametrize("target", ["in", "in/out", "."])
def test_a_target_that_overlaps_the_source_is_refused(checkpoint, tmp_path, target):
    source = checkpoint()
    before = contents(source)
    with pytest.raises(HfError, match="apart from the source"):
        convert(source, tmp_path / target, overwrite=True)
    assert contents(source) == before


def test_a_target_in_use_is_replaced_only_when_asked_and_only_if_it_is_a_model(checkpoint, tmp_path):
    source, target = checkpoint(), tmp_path / "out"
    convert(source, target)
    before = contents(target)
    with pytest.raises(HfError, match="got one in use"):
        convert(source, target, "bfloat16")
    assert contents(target) == before
    convert(source, target, "bfloat16", overwrite=True)
    assert contents(target) != before
    # The folder of a run holds a config.json too, and is not to be deleted.
    (target / "config.json").write_text('{"run": {}}')
    with pytest.raises(HfError, match="holds a model to overwrite"):
        convert(source, target, overwrite=True)


def test_a_disk_that_fills_half_way_leaves_nothing(checkpoint, tmp_path, file_limit):
    source = checkpoint()
    before = contents(source)
    with file_limit(2000), pytest.raises(HfError, match=r"out: could not be written: .*Nothing was left behind"):
        convert(source, tmp_path / "out")
    assert contents(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_disk_without_room_is_found_out_first(checkpoint, tmp_path, monkeypatch):
    source = checkpoint()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(10))
    with pytest.raises(HfError, match="no room for the model"):
        convert(source, tmp_path / "out")


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    dir = tmp_path_factory.mktemp("big")
    lengths = sizes(BIG)
    held = {name: np.ones(hf_shape(entry.rule, lengths), np.float32) for name, entry in entries(BIG).items()}
    save_file(held, dir / WEIGHTS, metadata={"format": "pt"})
    (dir / "config.json").write_text(json.dumps(BIG.to_hf()))
    return dir


def peak_bytes(work) -> int:
    """Most bytes that Python and NumPy held at once while working."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# One tensor and at most one copy of it, in another layout or type.
TENSORS_AT_ONCE = 2.2


def test_a_conversion_holds_one_tensor_at_a_time(big, tmp_path):
    assert (big / WEIGHTS).stat().st_size > 4 * LARGEST
    for dtype in ("float32", "bfloat16"):
        assert peak_bytes(lambda dtype=dtype: convert(big, tmp_path / dtype, dtype)) < TENSORS_AT_ONCE * LARGEST


def test_reading_holds_the_parameters_and_one_tensor(big):
    size = BIG.parameter_count * 4
    assert peak_bytes(lambda: load_params(big, BIG)) < size + TENSORS_AT_ONCE * LARGEST
    # On the CPU the arrays of JAX are not NumPy's: what is counted is beside the parameters.
    assert peak_bytes(lambda: load_arrays(big, BIG)) < TENSORS_AT_ONCE * LARGEST


def test_writing_parameters_holds_one_tensor_beside_them(tmp_path):
    lengths = sizes(BIG)
    params = nested({rule.path: np.ones(shape(rule, lengths), np.float32) for rule in rules(BIG)})

    def write_it():
        with published(tmp_path / "out", BIG, "bfloat16", overwrite=False) as partial:
            write_weights(partial, lambda names: tensors(params, BIG, names), BIG, "bfloat16")

    assert peak_bytes(write_it) < TENSORS_AT_ONCE * LARGEST
    assert (tmp_path / "out" / WEIGHTS).stat().st_size > 2 * BIG.parameter_count
