"""A policy as a unit: spec, parameters, tokenizer and the ids that end a completion.

It comes from a built-in random shape, a local Hugging Face directory or a GGUF file:

    policy = load_policy(ModelConfig(source="demo-qwen3"), seed=0)
    policy = load_policy(ModelConfig(source="runs/demo/hf"), seed=0)

The eight span tags are single tokens. Where a tokenizer lacks them they are added, inside the table's spare rows when
it has room and by growing the table otherwise; their rows start from the mean of the table.
"""

import dataclasses
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kardia_jax.config import FULL, ConfigError, LoraConfig, ModelConfig
from kardia_jax.dialogue.mini import tokenizer_dir
from kardia_jax.dialogue.spans import END_TAG, TAGS
from kardia_jax.hf import gguf
from kardia_jax.hf.container import Dtype
from kardia_jax.hf.folder import GENERATION, has_tokenizer, read_json
from kardia_jax.hf.peft import load_adapter
from kardia_jax.hf.read import abstract_params, load_arrays
from kardia_jax.keys import Purpose, key_for
from kardia_jax.model.lora import init_adapter, joined, merged_model
from kardia_jax.model.policy import init
from kardia_jax.model.shapes import named_shape
from kardia_jax.model.sharding import check_mesh, shardings
from kardia_jax.model.spec import ModelSpec
from kardia_jax.placement import put
from kardia_jax.rollout.batching import Generate
from kardia_jax.rollout.engine import Sampler
from kardia_jax.types import NOTHING, Params


class Model(NamedTuple):
    """What a source holds, before it is made a policy."""

    spec: ModelSpec
    params: Params
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    """Ids at which the model stops by its own files."""


class Policy(NamedTuple):
    """Everything that sampling, training and export need."""

    spec: ModelSpec
    params: Params
    """What is trained: the whole model or its adapter, float32 masters."""
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    """Ids that end a turn: the tokenizer's and the model's end-of-sequence tokens."""
    frozen: Params = NOTHING
    """The base under an adapter; nothing when the whole model is trained."""
    lora: LoraConfig = FULL

    def full(self, trained: Params | None = None) -> Params:
        """The parameters that the model reads, from these trained ones or the policy's own."""
        return joined(self.lora, self.frozen, self.params if trained is None else trained)

    def reference(self) -> Params:
        """What a KL term compares with: the base under the adapter, or a copy of the whole model, since the first
        update takes the policy's own arrays."""
        return self.frozen or jax.tree.map(jnp.copy, self.params)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: the end of a turn, or the end tag of the response."""
        return (*self.end_ids, token_id(self.tokenizer, END_TAG))

    @property
    def pad_id(self) -> int:
        """What stands behind a row; never read, since lengths say where a row ends."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else self.end_ids[0]

    @property
    def silent_ids(self) -> frozenset[int]:
        """Ids that may end a completion without being part of its text: ends of turn and padding."""
        return frozenset((*self.end_ids, self.pad_id))


def check_positions(spec: ModelSpec, prompt_tokens: int, answer_tokens: int, where: str) -> None:
    """Refuses prompts and answers that together outrun the model's positions."""
    if prompt_tokens + answer_tokens > spec.max_positions:
        fix = f"Lower data.max_prompt_tokens or {where}.max_new_tokens."
        room = f"at most the model's {spec.max_positions} positions with {answer_tokens} tokens of answer"
        raise ConfigError("data.max_prompt_tokens", room, prompt_tokens, fix)


def sampler_of(policy: Policy, generate: Generate) -> Sampler:
    """The compiled sampler with the policy's tokenizer and ids."""
    return Sampler(generate, policy.tokenizer, policy.stop_ids, policy.silent_ids, policy.pad_id)


def load_policy(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> Policy:
    """The policy that the config names, with its adapter, on the mesh if there is one; errors say what was wanted and
    what the directory holds."""
    whole = placed_policy(load_whole(config, seed, mesh), mesh)
    if config.adapter is not None:
        lora, adapter = load_adapter(config.adapter, whole.spec)
        return placed_policy(adapted(whole, dataclasses.replace(lora, base=config.lora.base), adapter), mesh)
    return placed_policy(with_new_adapter(whole, config.lora, seed), mesh)


def placed_policy(policy: Policy, mesh: Mesh | None) -> Policy:
    """The policy with its arrays where the mesh wants them; those that lie there stay.

    Raises ConfigError for a model that the mesh does not divide.
    """
    if mesh is None:
        return policy
    check_mesh(policy.spec, mesh)
    params, frozen = (jax.tree.map(put, tree, shardings(tree, mesh)) for tree in (policy.params, policy.frozen))
    return policy._replace(params=params, frozen=frozen)


def with_new_adapter(policy: Policy, lora: LoraConfig, seed: int) -> Policy:
    """The policy, merged, as the frozen base of a new adapter; as it is where none is wanted."""
    if not lora.rank:
        return policy
    whole = merged_model(policy.full())
    return adapted(policy._replace(params=whole), lora, init_adapter(lora, whole, key_for(seed, Purpose.ADAPTER)))


def adapted(whole: Policy, lora: LoraConfig, adapter: Params) -> Policy:
    """The whole model frozen under this adapter; says so when the span tags cannot be told apart."""
    table = whole.params["embed"]["embedding"]
    tags = table[jnp.array([token_id(whole.tokenizer, tag) for tag in TAGS])]
    if (tags == tags[0]).all():
        print(
            "model.lora: the span tags are new to this model, and an adapter trains no embeddings: all eight look "
            "alike to it. Train the whole model first (`kardia sft` without model.lora), and start from that.",
            file=sys.stderr,
        )
    frozen = jax.tree.map(lambda leaf: leaf.astype(lora.base), whole.params)
    return whole._replace(params=adapter, frozen=frozen, lora=lora)


def load_whole(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> Policy:
    """The model that ``source`` names, every parameter of it to be trained; weights are read straight to the mesh."""
    return _assembled(read_model(config, seed, config.lora.base, mesh))


def read_model(config: ModelConfig, seed: int, dtype: Dtype, mesh: Mesh | None = None) -> Model:
    """The model that ``source`` names as it is, in this type; without the span tags where it has none."""
    folder = pathlib.Path(config.source)
    if gguf.is_gguf(folder):
        return _from_gguf(folder, dtype, mesh)
    if folder.is_dir():
        return _from_directory(folder, config.tokenizer, dtype, mesh)
    if len(folder.parts) > 1:
        fix = "Import a checkpoint there first, or name a built-in shape (`kardia doctor` lists them)."
        raise ConfigError("model.source", "a local Hugging Face directory", config.source, fix)
    spec = named_shape(config.source)
    tokenizer = load_tokenizer(config.tokenizer)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), init(spec, key_for(seed, Purpose.INIT)))
    return Model(spec.with_tokens(len(tokenizer)), params, tokenizer, frozenset())


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The shipped tokenizer (`mini`) or one from a local directory."""
    folder = tokenizer_dir() if source == "mini" else pathlib.Path(source)
    if not has_tokenizer(folder):
        raise ConfigError("model.tokenizer", "mini or a directory with tokenizer.json or tokenizer_config.json", source)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        fix = "Save it again with tokenizer.save_pretrained."
        raise ConfigError("model.tokenizer", f"a tokenizer in {folder}", f"{error}"[:200], fix) from error


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a token that has one of its own."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"{token} has no id of its own"
    return found


def add_tags(
    spec: ModelSpec, params: Params, tokenizer: PreTrainedTokenizerBase
) -> tuple[ModelSpec, Params, PreTrainedTokenizerBase]:
    """Makes the eight span tags single tokens; does nothing where they are."""
    vocabulary = tokenizer.get_vocab()
    missing = [tag for tag in TAGS if tag not in vocabulary]
    if not missing:
        return spec, params, tokenizer
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    rows = max(spec.vocab_size, len(tokenizer))
    grown = params | {
        name: {"embedding": _with_new_rows(params[name]["embedding"], known, len(tokenizer), rows)}
        for name in ("embed", "head")
        if name in params
    }
    return dataclasses.replace(spec, vocab_size=rows), grown, tokenizer


def _with_new_rows(table: Float[Array, "V D"], known: int, tokens: int, rows: int) -> Float[Array, "W D"]:
    """Rows ``known`` to ``tokens`` become the mean of the known rows; the table grows to ``rows``."""
    table = jnp.pad(jnp.asarray(table), ((0, rows - table.shape[0]), (0, 0)))
    return table.at[known:tokens].set(table[:known].mean(0))


def _from_directory(folder: pathlib.Path, tokenizer_source: str, dtype: Dtype, mesh: Mesh | None) -> Model:
    if not (folder / "config.json").is_file():
        fix = "Give a directory as written by save_pretrained or by `kardia export`."
        raise ConfigError("model.source", "a directory with config.json", str(folder), fix)
    spec = ModelSpec.from_hf(read_json(folder / "config.json"))
    tokenizer = load_tokenizer(str(folder) if has_tokenizer(folder) else tokenizer_source)
    params = load_arrays(folder, spec, _places(spec, mesh), dtype)
    return Model(spec.with_tokens(len(tokenizer)), params, tokenizer, _generation_ends(folder))


def _from_gguf(path: pathlib.Path, dtype: Dtype, mesh: Mesh | None) -> Model:
    """The tokenizer is the file's own; packed weights become float32 masters (or the type of a frozen base)."""
    described = gguf.config(path)
    spec = ModelSpec.from_hf(described)
    params = load_arrays(path, spec, _places(spec, mesh), dtype)
    tokenizer = gguf.tokenizer(path)
    return Model(spec.with_tokens(len(tokenizer)), params, tokenizer, _ends(described.get("eos_token_id")))


def _places(spec: ModelSpec, mesh: Mesh | None) -> Params | None:
    return None if mesh is None else shardings(abstract_params(spec), mesh)


def _assembled(model: Model) -> Policy:
    spec, params, tokenizer = add_tags(*model[:3])
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError("model.tokenizer", "a tokenizer with an eos_token that ends a turn", None)
    # A generation config may stop at the end tag too, but that one belongs to the text: it is never an end of turn.
    ends = (model.ends | {tokenizer.eos_token_id}) - {token_id(tokenizer, END_TAG)}
    return Policy(spec.with_tokens(len(tokenizer)), params, tokenizer, tuple(sorted(ends)))


def _generation_ends(folder: pathlib.Path) -> frozenset[int]:
    """``eos_token_id`` of generation_config.json: models such as Qwen stop at more ids than their tokenizer names."""
    file = folder / GENERATION
    return _ends(read_json(file).get("eos_token_id") if file.is_file() else None)


def _ends(ids: int | list[int] | None) -> frozenset[int]:
    return frozenset([ids] if isinstance(ids, int) else ids or [])
