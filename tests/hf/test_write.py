import math
import shutil
from collections import namedtuple

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kardia_jax.hf.card import Card, model_card
from kardia_jax.hf.tables import HfError, nested, rules, shape, sizes
from kardia_jax.hf.write import plan_shards, save_directory, shard_bytes
from kardia_jax.model.spec import ModelSpec

SPEC = ModelSpec("qwen3", vocab_size=12, width=8, mlp_width=6, layers=2, heads=4, kv_heads=2, head_dim=2)
Usage = namedtuple("Usage", "total used free")


def params_of(spec: ModelSpec = SPEC):
    generator, lengths = np.random.default_rng(0), sizes(spec)
    return nested({rule.path: generator.normal(size=shape(rule, lengths)).astype("f4") for rule in rules(spec)})


def tokenizer_of(ids: int = 10) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(ids)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


def export(dir, params=None, stop_ids=(2,), ids=10, **options):
    save_directory(dir, params or params_of(), SPEC, tokenizer_of(ids), stop_ids, card="# tiny\n", **options)


def names(dir):
    return sorted(path.name for path in dir.iterdir())


def test_a_folder_in_use_is_refused_and_a_foreign_one_never_deleted(tmp_path):
    target = tmp_path / "hf"
    target.mkdir()
    export(target)
    with pytest.raises(HfError, match="overwrite"):
        export(target)
    diary = tmp_path / "mine"
    diary.mkdir()
    (diary / "diary.txt").write_text("dear")
    with pytest.raises(HfError, match="holds a model"):
        export(diary, overwrite=True)
    assert names(diary) == ["diary.txt"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "hf"
    export(target, max_shard_size="1KB")
    assert (target / "model.safetensors.index.json").is_file()
    export(target, overwrite=True)
    assert not (target / "model.safetensors.index.json").exists()
    assert names(tmp_path) == ["hf"]


def test_a_disk_that_fills_leaves_the_old_export_and_nothing_else(tmp_path, file_limit):
    target = tmp_path / "hf"
    export(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with file_limit(2000), pytest.raises(HfError, match=r"hf: could not be written: .*Nothing was left behind"):
        export(target, overwrite=True)
    assert names(tmp_path) == ["hf"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_full_disk_is_found_out_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 900, 100))
    with pytest.raises(HfError, match="got 100"):
        export(tmp_path / "deep" / "hf")
    assert names(tmp_path) == []


def test_weights_that_are_not_finite_are_never_exported(tmp_path):
    params = params_of()
    params["blocks"]["mlp"]["up"]["kernel"][1, 0, 0] = math.nan
    with pytest.raises(HfError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        export(tmp_path / "hf", params)
    params = params_of()
    params["final_norm"]["scale"][0] = 1e6
    with pytest.raises(HfError, match=r"model\.norm\.weight: wanted finite float16"):
        export(tmp_path / "hf", params, dtype="float16")
    assert names(tmp_path) == []


def test_tokens_beyond_the_table_are_refused(tmp_path):
    with pytest.raises(HfError, match="at most 12 ids"):
        export(tmp_path / "hf", ids=13)
    for stop_ids in ((), (12,), (-1,)):
        with pytest.raises(HfError, match="stop_ids"):
            export(tmp_path / "hf", stop_ids=stop_ids)


def test_shards_by_hand():
    # Embedding 12 x 8 = 96 numbers of 4 bytes = 384. One layer, sorted into its files up to 500 bytes.
    shards = plan_shards(SPEC, 4, 500)
    assert shards[0] == ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    assert sum(len(shard) for shard in shards) == 2 * 11 + 2
    assert plan_shards(SPEC, 4, 10**9)[1:] == []
    assert all(len(shard) == 1 for shard in plan_shards(SPEC, 4, 1))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000)])
def test_shard_sizes(text, size):
    assert shard_bytes(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0MB", "5TB"])
def test_shard_sizes_that_mean_nothing_are_refused(text):
    with pytest.raises(HfError, match="max_shard_size"):
        shard_bytes(text)


def test_model_card():
    card = model_card(
        Card(
            name="tiny",
            base_model="random initialisation",
            data="Synthetic dialogues.",
            recipe={"grpo.group": 8, "note": "a|b"},
            results={
                "base": {"reward": (0.1, math.nan, math.nan)},
                "grpo": {"reward": (0.5, 0.4, 0.6), "macro_f1": (0.2, 0.1, 0.3)},
            },
            licence='mit"\nx: 1',
            hub_base="Qwen/Qwen3-0.6B",
        )
    )
    lines = card.splitlines()
    assert lines[0] == "---"
    # A quote or a line break in a field cannot add a key to the front matter.
    assert lines[1] == 'license: "mit\\"\\nx: 1"'
    assert 'base_model: "Qwen/Qwen3-0.6B"' in lines
    assert "| reward | 0.100 | 0.500 [0.400, 0.600] |" in lines
    assert "| macro_f1 | – | 0.200 [0.100, 0.300] |" in lines
    assert "| note | a\\|b |" in lines
    for section in ("## Data", "## Recipe", "## Intended use", "## Limits", "## Licence"):
        assert section in lines
