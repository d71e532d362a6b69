"""The local judge: a checkpoint runs through our own model, and the expected mark is read from its logits.

In: ``JudgeRequest``s. Out: a ``Verdict`` each, or a ``JudgeFailure`` that says why there is none. For every criterion
the model reads one prompt: instructions, the fenced material, then the question with its five described levels, in the
chat template of its own tokenizer. Its answer is begun for it, and the next token is the mark::

    <|im_start|>user  You mark one answer ...  | I lost my job.  ...  1: It dismisses ... 5: ...  <|im_end|>
    <|im_start|>assistant  The mark is |

There the logits z of the tokens of 1 to 5 give

    p(m) = exp z_m / sum_k exp z_k,    mark = sum_m m p(m),    spread = sqrt(sum_m (m - mark)^2 p(m)).

p is renormalised over the five. ``mass`` is what they have together among all tokens that the tokenizer knows; where
it is below ``judge.local.min_mass`` the model was about to say something else, and that is unknown, not a mark.

Nothing is drawn, so the same requests get the same marks. Prompts on one reply, or on one dialogue, begin alike, and
what they share is run once (``judge/sharing.py``). Work is done where the caller stands: JAX knows one thread of ours,
so the training loop asks this judge after the rollout, all at once (``in_process``).

Source: expectation over the tokens of a score: G-Eval, arXiv 2303.16634, section 2; described levels and the rest of
the prompt are ours.
"""

import itertools
import pathlib
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from kardia_jax.checkpoint import fingerprint
from kardia_jax.config import ConfigError, JudgeConfig, LocalJudgeConfig, ModelConfig
from kardia_jax.judge.sharing import Part, alone, divide, gathered, padded_arrays
from kardia_jax.model.policy import Compute
from kardia_jax.policies import Model, read_model
from kardia_jax.programs import compute_for, make_next_logprobs
from kardia_jax.rewards.rubric import (
    HIGHEST,
    LOWEST,
    JudgeFailure,
    JudgeRequest,
    Mark,
    Rubric,
    Span,
    Verdict,
    make_level_prompt,
    with_items,
)

MARKS = np.arange(LOWEST, HIGHEST + 1, dtype=np.float64)
OPENINGS = (("The mark is", " {}"), ("The mark is ", "{}"))
"""How the answer is begun and a level written after it. Some tokenizers have a token for " 3", others split it into a
blank and "3"; the first way in which all five levels are one token each is taken."""


class Opening(NamedTuple):
    """The beginning of the judge's answer, and the five tokens that may follow."""

    text: str
    levels: tuple[int, ...]


class Reading(NamedTuple):
    """What the five tokens say."""

    probabilities_M: Float[np.ndarray, " M"]
    """Of the levels from 1 to 5; sum to 1."""
    mass: float
    """Probability of the five among all tokens."""

    @property
    def mark(self) -> float:
        """The expected level."""
        return float(self.probabilities_M @ MARKS)

    @property
    def spread(self) -> float:
        """The levels' standard deviation, in marks."""
        return float(np.sqrt(self.probabilities_M @ (MARKS - self.mark) ** 2))


def reading_of(logprobs_M: Float[np.ndarray, " M"]) -> Reading:
    """The distribution over the levels, from their log-probs (nats) among all tokens."""
    shares = np.exp(logprobs_M.astype(np.float64))
    mass = shares.sum()
    # Through the logarithm, since all five may be too small for exp.
    centred = np.exp(logprobs_M.astype(np.float64) - logprobs_M.max())
    return Reading(centred / centred.sum(), float(mass))


def opening_of(tokenizer: PreTrainedTokenizerBase) -> Opening:
    """How this tokenizer's model is made to answer with one token.

    Raises ConfigError for a tokenizer without a chat template, or in which the levels are not five single tokens.
    """
    if not tokenizer.chat_template:
        wanted = "a model whose tokenizer has a chat template"
        raise ConfigError(
            "judge.local.source", wanted, tokenizer.name_or_path, "Take one tuned to follow instructions."
        )
    for text, form in OPENINGS:
        before = chat(tokenizer, "-") + text
        (start, *ends) = token_ids(tokenizer, [before, *(before + form.format(int(mark)) for mark in MARKS)])
        levels = tuple(ids[-1] for ids in ends)
        if len(set(levels)) == len(levels) and all(ids[:-1] == start for ids in ends):
            return Opening(text, levels)
    wanted = f"a tokenizer in which each of 1 to 5 is one token after {OPENINGS[0][0]!r}"
    raise ConfigError("judge.local.source", wanted, tokenizer.name_or_path)


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as a user's message, up to where the answer begins; templates that know thinking leave it out."""
    said = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert isinstance(text, str)
    return text


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of whole texts that already hold their special tokens."""
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


class Asked(NamedTuple):
    """One request as the model will read it."""

    request: JudgeRequest
    rubric: Rubric
    """With the dialogue's own items."""
    rows: tuple[tuple[int, ...], ...]
    """Token ids of one whole prompt per criterion."""


class LocalJudge:
    """A ``Judge`` by expected marks; make it with ``load_local_judge``."""

    in_process = True
    """It computes with the JAX of this process: to be asked by the training loop's own thread, not beside it."""

    def __init__(
        self, name: str, model: Model, dtype: Literal["float32", "bfloat16"], rubric: Rubric, local: LocalJudgeConfig
    ):
        """``model.params`` are of the type ``dtype``."""
        self.name = name
        self._model, self._rubric, self._config = model, rubric, local
        self._opening = opening_of(model.tokenizer)
        compute = Compute(dtype, remat="none")
        self._next_logprobs = make_next_logprobs(model.spec, compute, self._opening.levels)
        self._counted: Counter[str] = Counter()

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        """One answer per request, in order; equal requests are read once."""
        began = time.monotonic()
        asked = self.asked(list(dict.fromkeys(requests)))
        said = {one.request: self._too_long(one) for one in asked}
        readable = [one for one in asked if said[one.request] is None]
        read = self._read(readable)
        said |= {one.request: self._verdict(one.rubric, readings) for one, readings in zip(readable, read, strict=True)}
        answers = [answer for request in requests if (answer := said[request]) is not None]
        verdicts = sum(isinstance(answer, Verdict) for answer in answers)
        self._count(seconds=time.monotonic() - began, verdicts=verdicts, failures=len(answers) - verdicts)
        return answers

    def take_stats(self) -> dict[str, float]:
        """Since the last call: verdicts and failures, seconds, tokens that were run (padding included), the tokens of
        all prompts one by one, and the mean mass of the five levels over all prompts."""
        counted, self._counted = self._counted, Counter()
        prompts = counted.pop("prompts", 0)
        mass = counted.pop("mass", 0.0) / prompts if prompts else float("nan")
        return {f"judge/{name}": float(value) for name, value in counted.items()} | {"judge/mass": mass}

    def asked(self, requests: Sequence[JudgeRequest]) -> list[Asked]:
        """The prompts of all criteria, tokenised whole."""
        rubrics = [with_items(self._rubric, request.items) for request in requests]
        texts = [
            chat(self._model.tokenizer, make_level_prompt(criterion, request)) + self._opening.text
            for request, rubric in zip(requests, rubrics, strict=True)
            for criterion in rubric.criteria
        ]
        rows = iter(token_ids(self._model.tokenizer, texts) if texts else [])
        return [
            Asked(request, rubric, tuple(tuple(next(rows)) for _ in rubric.criteria))
            for request, rubric in zip(requests, rubrics, strict=True)
        ]

    def _too_long(self, asked: Asked) -> JudgeFailure | None:
        """Why a request cannot be read: it is never cut short."""
        positions, budget = self._model.spec.max_positions, self._config.max_tokens_per_batch
        for criterion, row in zip(asked.rubric.criteria, asked.rows, strict=True):
            if len(row) > positions:
                room = f"the model has {positions:,} positions"
            elif alone(asked.rows, asked.rows.index(row)).shape.tokens > budget:
                room = f"judge.local.max_tokens_per_batch is {budget:,}, padding included"
            else:
                continue
            return JudgeFailure(f"{self.name}: the prompt of {criterion.name} has {len(row):,} tokens; {room}", False)
        return None

    def _read(self, asked: Sequence[Asked]) -> list[list[Reading]]:
        """What the model says to each prompt; all batches are dispatched before the first is waited for."""
        rows, budget = [row for one in asked for row in one.rows], self._config.max_tokens_per_batch
        if not rows:
            return []
        batches = list(gathered(shared_parts(asked, budget), budget))
        pad = self._model.tokenizer.pad_token_id
        arrays = [padded_arrays(rows, batch, pad if isinstance(pad, int) else 0) for batch in batches]
        given = [self._next_logprobs(self._model.params, array) for array in arrays]
        readings: dict[int, Reading] = {}
        for batch, logprobs_P_G_M in zip(batches, jax.device_get(given), strict=True):
            # What fills up a batch or a part stands behind the others and is passed over.
            for part, logprobs_G_M in zip(batch, logprobs_P_G_M, strict=False):
                readings |= dict(zip(part.rows, map(reading_of, logprobs_G_M), strict=False))
        run = sum(array.tokens for array in arrays)
        self._count(tokens=run, tokens_unshared=sum(map(len, rows)), prompts=len(rows))
        self._count(mass=sum(reading.mass for reading in readings.values()))
        ordered = (readings[row] for row in range(len(rows)))
        return [list(itertools.islice(ordered, len(one.rows))) for one in asked]

    def _verdict(self, rubric: Rubric, readings: Sequence[Reading]) -> Verdict | JudgeFailure:
        """The marks, unless the model was about to say something else at any of them."""
        least = self._config.min_mass
        for name, reading in zip(rubric.names, readings, strict=True):
            if not reading.mass >= least:  # also where the mass is NaN
                why = f"the levels 1 to 5 have mass {reading.mass:.3g} among all tokens"
                return JudgeFailure(f"{self.name}: {name}: {why}; judge.local.min_mass is {least:g}", False)
        pairs = zip(rubric.names, readings, strict=True)
        return Verdict(tuple(Mark(name, read.mark, reason(read), read.spread) for name, read in pairs))

    def _count(self, **amounts: float) -> None:
        self._counted.update(amounts)


def shared_parts(asked: Sequence[Asked], budget: int) -> list[Part]:
    """All prompts, cut into parts with common prefixes; only criteria that see the same spans of answers to the same
    dialogue may share one."""
    rows, places = [row for one in asked for row in one.rows], itertools.count()
    dialogues: dict[Hashable, list[list[int]]] = {}
    for request, rubric, _ in asked:
        views: dict[frozenset[Span], list[int]] = {}
        for criterion in rubric.criteria:
            views.setdefault(frozenset(criterion.sees), []).append(next(places))
        for sees, own in views.items():
            dialogue = request.profile, request.situation, request.history, request.items, sees
            dialogues.setdefault(dialogue, []).append(own)
    return [part for replies in dialogues.values() for part in divide(rows, replies, budget)]


def reason(reading: Reading) -> str:
    """What stands where other judges give a reason: the numbers behind the mark."""
    shares = ", ".join(f"{level}: {share:.2f}" for level, share in enumerate(reading.probabilities_M, start=LOWEST))
    return f"expected mark from logits; {shares}; mass {reading.mass:.2f}"


def load_local_judge(judge: JudgeConfig, rubric: Rubric) -> LocalJudge:
    """The judge that ``judge.local`` names, with parameters of its own beside any policy's.

    Its name holds a fingerprint of the first block, so that two checkpoints in one folder, one after the other, have
    different names. Raises ConfigError for a source that cannot be loaded or cannot judge (see ``opening_of``).
    """
    local = judge.local
    dtype = compute_for(ModelConfig(dtype=local.dtype)).dtype
    try:
        model = read_model(ModelConfig(source=local.source), seed=0, dtype=dtype)
    except ValueError as error:
        raise ConfigError("judge.local.source", "a model that can be loaded", local.source, str(error)) from error
    first = jax.tree.map(lambda leaf: fingerprint(leaf[0]), model.params["blocks"])
    seal = int(jnp.stack(jax.tree.leaves(first)).sum(dtype=jnp.uint32))
    name = f"local:{pathlib.Path(local.source).name}-{seal:08x}-{dtype}"
    return LocalJudge(name, model, dtype, rubric, local)
