"""``kardia verify``: are two checkpoints the same model, and does ours compute what transformers computes?

In: directory A, and directory B or transformers. Out: ``Report``, every number of the comparison.

    verify("models/qwen", "out/qwen")                  # A and B: every tensor, and what both answer in our code
    verify("models/qwen", against="transformers")      # A in our code and in transformers (needs PyTorch)

What they answer is compared in float32 on fixed prompts: logits at every position, log-probs of the prompt's own
tokens, and greedy continuations token by token.
"""

import dataclasses
import math
import pathlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from kardia_jax.config import ConfigError
from kardia_jax.hf.tables import HfError
from kardia_jax.hf.verify import TensorReport, apart, compare_tensors
from kardia_jax.pretrained import Pretrained, generate, load, logits
from kardia_jax.rollout.engine import pad_rows

Against = Literal["directory", "transformers"]

LOGIT_TOLERANCE = 1e-4
"""Largest difference of a logit or log-prob (nats) that counts as equal: float32 on both sides, sums in another
order."""

TEXTS = (
    "The capital of France is",
    "I did not get the job, and I do not know how to tell my family.",
    "def fibonacci(n):\n    ",
    "3, 1, 4, 1, 5, 9, 2, 6,",
    "Ich habe meine Schlüssel verloren, und jetzt",
    "She wrote to her friend: dear Anna, thank you for",
    "Water boils at 100 degrees because",
    "今日はとても",
    "Once upon a time, in a small house by the sea,",
    "Q: Why do people cry when they are happy?\nA:",
)
LENGTHS = (5, 12, 17, 3, 9, 21, 8, 2, 14, 11)
"""Tokens of the random prompts of a model without tokenizer."""


class Answers(NamedTuple):
    """What one model says to the prompts."""

    logits: list[Float[np.ndarray, "S V"]]
    greedy: list[list[int]]


@dataclass(frozen=True)
class PromptReport:
    """One prompt."""

    tokens: int
    logits_max_abs: float
    logprobs_max_abs: float
    """Of the prompt's own tokens, nats."""
    greedy_equal: int
    """Leading tokens of the greedy continuation that agree."""
    greedy_a: list[int]
    greedy_b: list[int]


@dataclass(frozen=True)
class Report:
    """The whole comparison."""

    a: str
    b: str
    agree: bool
    tolerance: float
    tensor_tolerance: float
    logits_max_abs: float
    logprobs_max_abs: float
    greedy_agree: bool
    vocabulary: list[int]
    """Rows of the two tables; logits are compared over the smaller one."""
    tensors: TensorReport | None
    """None against transformers, where both read the same files."""
    prompts: list[PromptReport]

    def as_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite, which JSON does not have, becomes a text."""
        return _plain(dataclasses.asdict(self))


def verify(
    a: pathlib.Path,
    b: pathlib.Path | None = None,
    against: Against = "directory",
    prompts: int = len(TEXTS),
    new_tokens: int = 64,
    seed: int = 0,
    tolerance: float = LOGIT_TOLERANCE,
    tensor_tolerance: float = 0.0,
) -> Report:
    """Compares; raises ConfigError for arguments that do not belong together, HfError for what is no checkpoint."""
    _check_arguments(b, against, prompts, new_tokens)
    tensors = None if b is None else compare_tensors(a, b)
    policy = load(a)
    rows = fixed_prompts(policy, prompts, seed)
    room = policy.spec.max_positions - max(map(len, rows))
    new_tokens = max(1, min(new_tokens, room))
    ours = answers(policy, rows, new_tokens)
    ends, size = policy.end_ids, policy.spec.sampled_tokens
    del policy  # One model in memory at a time.
    theirs = _in_transformers(a, rows, new_tokens, ends, size) if b is None else answers(load(b), rows, new_tokens)
    reports = [
        _compared(*one) for one in zip(rows, ours.logits, ours.greedy, theirs.logits, theirs.greedy, strict=True)
    ]
    logit = max(report.logits_max_abs for report in reports)
    logprob = max(report.logprobs_max_abs for report in reports)
    greedy = all(report.greedy_a == report.greedy_b for report in reports)
    same = tensors is None or tensors.agrees(tensor_tolerance)
    return Report(
        a=str(a),
        b=against if b is None else str(b),
        agree=same and greedy and max(logit, logprob) <= tolerance,
        tolerance=tolerance,
        tensor_tolerance=tensor_tolerance,
        logits_max_abs=logit,
        logprobs_max_abs=logprob,
        greedy_agree=greedy,
        vocabulary=[ours.logits[0].shape[-1], theirs.logits[0].shape[-1]],
        tensors=tensors,
        prompts=reports,
    )


def fixed_prompts(policy: Pretrained, count: int, seed: int) -> list[list[int]]:
    """Ids of the first texts, or random ids from this seed where the model has no tokenizer."""
    if policy.tokenizer is not None:
        return [list(policy.tokenizer(text).input_ids) for text in TEXTS[:count]]
    numbers = np.random.default_rng(seed)
    return [numbers.integers(0, policy.spec.sampled_tokens, length).tolist() for length in LENGTHS[:count]]


def answers(policy: Pretrained, rows: list[list[int]], new_tokens: int) -> Answers:
    """Logits and greedy continuations in our own code, all prompts in one right-padded batch."""
    tokens, lengths = pad_rows(rows, 0)
    whole = jax.device_get(logits(policy, tokens[:, : lengths.max()], lengths))
    drawn = generate(policy, rows, max_new_tokens=new_tokens, temperature=0.0)
    return Answers([one[:length] for one, length in zip(whole, lengths, strict=True)], [one.ids for [one] in drawn])


def _in_transformers(
    path: pathlib.Path, rows: list[list[int]], new_tokens: int, ends: tuple[int, ...], size: int
) -> Answers:
    """The same in transformers: one prompt at a time, nothing padded, greedy over the ``size`` ids that are sampled."""
    try:
        import torch
    except ImportError as error:
        raise HfError("against: transformers needs PyTorch, which is not installed. pip install torch") from error
    from transformers import AutoModelForCausalLM, GenerationConfig

    # Any: what from_pretrained gives depends on the checkpoint.
    model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, attn_implementation="eager")
    model.eval()
    # The model's own settings may penalise repetition, which is not greedy; and its padding rows are no tokens.
    padding = list(range(size, model.config.vocab_size)) or None
    stops = {"eos_token_id": list(ends) or None, "pad_token_id": ends[0] if ends else 0, "suppress_tokens": padding}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, **stops)

    def greedy(row: list[int]) -> list[int]:
        prompt = torch.tensor([row])
        return model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, len(row) :].tolist()

    with torch.no_grad():
        return Answers([model(torch.tensor([row])).logits[0].numpy() for row in rows], [greedy(row) for row in rows])


def _compared(
    row: list[int], logits_a: np.ndarray, greedy_a: list[int], logits_b: np.ndarray, greedy_b: list[int]
) -> PromptReport:
    size = min(logits_a.shape[-1], logits_b.shape[-1])
    same = [one == other for one, other in zip(greedy_a, greedy_b, strict=False)]
    return PromptReport(
        tokens=len(row),
        logits_max_abs=apart(logits_a[:, :size], logits_b[:, :size]),
        logprobs_max_abs=apart(_logprobs(logits_a, row), _logprobs(logits_b, row)),
        greedy_equal=same.index(False) if False in same else len(same),
        greedy_a=greedy_a,
        greedy_b=greedy_b,
    )


def _logprobs(whole: Float[np.ndarray, "S V"], row: list[int]) -> Float[np.ndarray, " T"]:
    """Of each token after the first, nats."""
    z = whole[:-1].astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    chosen = z[np.arange(len(z)), row[1:]]
    return chosen - np.log(np.exp(z).sum(-1))


def _check_arguments(b: pathlib.Path | None, against: Against, prompts: int, new_tokens: int) -> None:
    if (b is None) == (against == "directory"):
        wanted = "two directories, or one with --against transformers"
        raise ConfigError("verify", wanted, "one directory" if b is None else f"two, and {against}")
    if not 1 <= prompts <= len(TEXTS):
        raise ConfigError("prompts", f"1 to {len(TEXTS)}", prompts)
    if new_tokens < 1:
        raise ConfigError("new_tokens", "at least 1", new_tokens)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def summary(report: Report) -> str:
    """The comparison in a few lines, for people."""
    lines = [f"{report.a} and {report.b}: {'the same' if report.agree else 'NOT the same'}"]
    if (tensors := report.tensors) is not None:
        odd = len(tensors.only_a) + len(tensors.only_b) + len(tensors.shapes)
        lines.append(
            f"tensors   {tensors.equal} of {tensors.compared} equal, {odd} without a partner of their shape; "
            f"largest difference {tensors.max_abs:.3g} (tolerance {report.tensor_tolerance:g})"
        )
    lines.append(f"logits    largest difference {report.logits_max_abs:.3g} (tolerance {report.tolerance:g})")
    lines.append(f"log-probs largest difference {report.logprobs_max_abs:.3g} nats (tolerance {report.tolerance:g})")
    equal = sum(one.greedy_a == one.greedy_b for one in report.prompts)
    longest = max(len(one.greedy_a) for one in report.prompts)
    lines.append(f"greedy    {equal} of {len(report.prompts)} prompts equal in up to {longest} tokens")
    return "\n".join(lines)
