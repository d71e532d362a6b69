"""A checkpoint in hand, for people who come with a model and leave with one: load, logits, generate, save.

    policy = kardia_jax.load("models/smollm2", dtype="float32")
    z = kardia_jax.logits(policy, tokens, lengths)                     # tokens int32 [B, S], right-padded -> [B, S, V]
    [[first, second]] = kardia_jax.generate(policy, ["I failed my exam."], n=2, max_new_tokens=64, seed=1)
    print(first.text, sum(first.logprobs))
    kardia_jax.save(policy, "out/smollm2")

Nothing is added to a model on the way: what is loaded and saved is equal in every tensor, and its config, generation
settings and tokenizer files are the ones it came with. Training wants more of a policy (span tags, float32 masters),
see ``kardia_jax.policies``.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from kardia_jax.config import ConfigError, SamplerConfig
from kardia_jax.config.errors import require
from kardia_jax.dialogue.prompt import decode_completion
from kardia_jax.hf import write
from kardia_jax.hf.container import Dtype
from kardia_jax.hf.folder import GENERATION, TOKENIZER_FILES
from kardia_jax.hf.read import load_arrays, require_tokenizer_fits, source_of
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model.policy import Compute
from kardia_jax.model.policy import logits as model_logits
from kardia_jax.model.spec import ModelSpec
from kardia_jax.programs import make_generate
from kardia_jax.rollout.engine import pad_rows
from kardia_jax.rollout.sampling import Controls
from kardia_jax.types import Params

Path = str | pathlib.Path


class Origin(NamedTuple):
    """What came beside the parameters and goes with them again."""

    config: Mapping[str, Any]
    """Every field of config.json."""
    files: Mapping[str, bytes]
    """Tokenizer, generation settings, card and licence, by name."""
    tokenizer: str
    """How the tokenizer described itself, to see later whether somebody changed it."""


class Pretrained(NamedTuple):
    """A model as it was found."""

    spec: ModelSpec
    params: Params
    """Device arrays of one dtype."""
    tokenizer: PreTrainedTokenizerBase | None
    """None where the directory has none."""
    origin: Origin

    @property
    def dtype(self) -> Dtype:
        """Of the parameters."""
        return self.params["embed"]["embedding"].dtype.name

    @property
    def generation(self) -> Mapping[str, Any]:
        """generation_config.json, or what config and tokenizer say where there is none."""
        kept = self.origin.files.get(GENERATION)
        return write.generation_config(self.origin.config, self.tokenizer) if kept is None else json.loads(kept)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a completion, of the generation settings and the tokenizer; empty where neither names one."""
        named = self.generation.get("eos_token_id")
        ends = set([named] if isinstance(named, int) else named or [])
        if self.tokenizer is not None and isinstance(self.tokenizer.eos_token_id, int):
            ends.add(self.tokenizer.eos_token_id)
        return tuple(sorted(ends))


class Completion(NamedTuple):
    """One sampled continuation of a prompt."""

    ids: list[int]
    """As drawn, the end token included."""
    text: str | None
    """Decoded with special tokens, less the end token; None without a tokenizer."""
    logprobs: list[float]
    """Of each id under softmax(logits / temperature), nats; temperature 1 for greedy."""


def load(dir: Path, dtype: Dtype = "float32", shardings: Params | None = None) -> Pretrained:
    """The model in a directory, its parameters as device arrays of this dtype, sharded where ``shardings`` says so.

    ``shardings`` has the structure of ``hf.read.abstract_params``. Raises HfError or SpecError for what is not a
    supported model, is damaged or does not fit its own config.
    """
    path = pathlib.Path(dir)
    source = source_of(path)
    config, tokenizer = source.config(path), source.tokenizer(path)
    spec = ModelSpec.from_hf(config)
    require_tokenizer_fits(tokenizer, spec)
    files = {name: file.read_bytes() for name, file in source.companions(path).items()}
    params = load_arrays(path, spec, shardings, dtype)
    spec = spec if tokenizer is None else spec.with_tokens(len(tokenizer))
    return Pretrained(spec, params, tokenizer, Origin(config, files, _description(tokenizer)))


def save(
    policy: Pretrained,
    dir: Path,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes the model as a Hugging Face directory, complete or not at all; ``dtype`` None keeps the parameters' own.

    A tokenizer that nobody changed is written byte for byte as it came. Raises HfError for a target in use, a full
    disk, and a weight that is not finite.
    """
    spec, target, wanted = policy.spec, pathlib.Path(dir), dtype or policy.dtype
    require_tokenizer_fits(policy.tokenizer, spec)
    with write.published(target, spec, wanted, overwrite) as partial:
        tensors = functools.partial(write.tensors, policy.params, spec)
        write.write_weights(partial, tensors, spec, wanted, max_shard_size)
        write.write_json(partial / "config.json", write.saved_config(policy.origin.config, spec, wanted))
        write.write_json(partial / GENERATION, policy.generation)
        for name, content in policy.origin.files.items():
            (partial / name).write_bytes(content)
        as_it_came = _description(policy.tokenizer) == policy.origin.tokenizer and set(TOKENIZER_FILES) & set(
            policy.origin.files
        )
        if policy.tokenizer is not None and not as_it_came:
            policy.tokenizer.save_pretrained(str(partial))


def logits(
    policy: Pretrained, tokens: Int[Array | np.ndarray, "B S"], lengths: Int[Array | np.ndarray, " B"]
) -> Float[Array, "B S V"]:
    """Logits of right-padded rows, float32; positions from ``lengths`` on mean nothing.

    Arithmetic is bfloat16 for bfloat16 parameters, else float32 without TF32. Raises ConfigError for shapes or ids
    that do not fit.
    """
    rows, sizes = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
    require(rows.ndim == 2, "tokens", "int32 [B, S]", rows.shape)
    require(sizes.shape == rows.shape[:1], "lengths", f"one length for each of {len(rows)} rows", sizes.shape)
    within = "lengths", f"1 to {rows.shape[1]}, the width of tokens"
    require(bool(((sizes > 0) & (sizes <= rows.shape[1])).all()), *within, sizes.tolist())
    _check_ids(policy.spec, rows.reshape(-1).tolist(), "tokens")
    _check_length(policy.spec, rows.shape[1], 0)
    with jax.default_matmul_precision("highest"):
        return _make_logits(policy.spec, _compute(policy))(policy.params, rows, sizes)


def generate(
    policy: Pretrained,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[list[Completion]]:
    """``n`` completions of each prompt, which is a text or a list of ids; temperature 0 is greedy.

    A text is tokenised as the tokenizer does by default (most put a beginning-of-sequence token of their own in
    front); give ids where the text holds a whole chat template already. A completion ends at any of
    ``policy.end_ids``. The same seed gives the same completions. Raises ConfigError for an empty prompt, ids without
    a row in the table, a prompt that leaves no room in the model's positions, or text without a tokenizer.
    """
    require(n > 0, "n", "at least 1", n)
    require(max_new_tokens > 0, "max_new_tokens", "at least 1", max_new_tokens)
    controls = SamplerConfig(temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens)
    if not prompts:
        return []
    rows = [_prompt_ids(policy, prompt, max_new_tokens) for prompt in prompts]
    pad = policy.generation.get("pad_token_id")
    pad = pad if isinstance(pad, int) else 0
    tokens, lengths = pad_rows(rows, pad)
    with jax.default_matmul_precision("highest"):
        rollouts = make_generate(policy.spec, _compute(policy))(
            policy.params,
            tokens,
            lengths,
            row_keys(seed, Purpose.ROLLOUT, 0, jnp.arange(len(rows)), n),
            Controls.from_config(controls),
            policy.end_ids,
            pad,
            max_new_tokens=max_new_tokens,
        )
    drawn = zip(rollouts.tokens, rollouts.lengths, rollouts.tempered_logprobs, strict=True)
    return [[_completion(policy, *sample) for sample in zip(*group, strict=True)] for group in drawn]


def _completion(policy: Pretrained, tokens: np.ndarray, length: int, logprobs: np.ndarray) -> Completion:
    ids = tokens[:length].tolist()
    said = ids[:-1] if ids and ids[-1] in policy.end_ids else ids
    text = None if policy.tokenizer is None else decode_completion(policy.tokenizer, said, frozenset())
    return Completion(ids, text, logprobs[:length].tolist())


def _prompt_ids(policy: Pretrained, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
    if isinstance(prompt, str):
        if policy.tokenizer is None:
            fix = "The model's directory has no tokenizer: give ids."
            raise ConfigError("prompts", "lists of token ids", "a text", fix)
        ids: list[int] = list(policy.tokenizer(prompt).input_ids)
    else:
        ids = [int(token) for token in prompt]
    require(bool(ids), "prompts", "at least one token each", ids)
    _check_ids(policy.spec, ids, "prompts")
    _check_length(policy.spec, len(ids), max_new_tokens)
    return ids


def _check_ids(spec: ModelSpec, ids: Sequence[int], name: str) -> None:
    foreign = [token for token in ids if not 0 <= token < spec.vocab_size]
    require(not foreign, name, f"ids from 0 to {spec.vocab_size - 1} (the table)", foreign[:8])


def _check_length(spec: ModelSpec, tokens: int, answer: int) -> None:
    wanted = f"at most the model's {spec.max_positions} positions"
    require(tokens + answer <= spec.max_positions, "tokens and max_new_tokens", wanted, tokens + answer)


def _description(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Changes when tokens, settings or the chat template do."""
    return "" if tokenizer is None else f"{tokenizer!r} {tokenizer.chat_template!r}"


def _compute(policy: Pretrained) -> Compute:
    return Compute("bfloat16" if policy.dtype == "bfloat16" else "float32", remat="none")


@functools.cache
def _make_logits(spec: ModelSpec, compute: Compute) -> Callable[..., Array]:
    """``model.policy.logits`` compiled; no part of training, so not among its three programs."""
    return jax.jit(functools.partial(model_logits, spec, compute))
