"""Signs of reward hacking in a batch of completions: pure functions for the training loop's metrics.

Policies that learn to please a rubric start alike, end alike, repeat themselves and grow. In: the replies of
one step with their lengths, rewards and scores. Out: plain floats; NaN where a number is not defined.

>>> replies = ["I hear you. Rest now.", "I hear you. Call her.", "Congratulations on the job."]
>>> shared_share([opener(reply) for reply in replies])   # two of three start with "i hear you"
0.6666666666666666
>>> repetition("so so so so so", n=3)                    # one distinct 3-gram of three
0.6666666666666667
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from kardia_jax.rewards.combine import Scores
from kardia_jax.rewards.rubric import is_item

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return [match.group().lower() for match in _WORD.finditer(text)]


def opener(reply: str, size: int = 3) -> str:
    """The first words of a reply."""
    return " ".join(words(reply)[:size])


def closer(reply: str, size: int = 3) -> str:
    """The last words of a reply."""
    return " ".join(words(reply)[-size:])


def shared_share(texts: Sequence[str]) -> float:
    """The share of the most common text: 1 / n when all differ, 1 when all are the same."""
    if not texts:
        return float("nan")
    return Counter(texts).most_common(1)[0][1] / len(texts)


def distinct_share(replies: Sequence[str]) -> float:
    """Distinct replies over replies, case and punctuation aside."""
    if not replies:
        return float("nan")
    return len({" ".join(words(reply)) for reply in replies}) / len(replies)


def repetition(reply: str, n: int = 3) -> float:
    """1 - distinct n-grams / n-grams of one reply; 0 for a reply of fewer than n words."""
    grams = _grams(words(reply), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def shared_phrase_share(replies: Sequence[str], n: int = 5) -> float:
    """The share of replies that hold the most common run of n words, wherever it stands; 0 where none is that long."""
    if not replies:
        return float("nan")
    counts = Counter(gram for reply in replies for gram in set(_grams(words(reply), n)))
    return max(counts.values(), default=0) / len(replies)


def _grams(heard: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(heard[start : start + n]) for start in range(len(heard) - n + 1)]


def length_reward_correlation(
    lengths_N: Float[np.ndarray, " N"], rewards_N: Float[np.ndarray, " N"], valid_N: Bool[np.ndarray, " N"]
) -> float:
    """Pearson's r of length and reward over valid rows; NaN below two rows or when either is constant."""
    lengths, rewards = lengths_N[valid_N].astype(np.float64), rewards_N[valid_N].astype(np.float64)
    if len(lengths) < 2 or np.all(lengths == lengths[0]) or np.all(rewards == rewards[0]):
        return float("nan")
    return float(np.corrcoef(lengths, rewards)[0, 1])


def criterion_means(scores: Sequence[Scores]) -> dict[str, float]:
    """``criterion/NAME``: the mean mark of each criterion; items of dialogues, which differ, share one mean."""
    marks: dict[str, list[float]] = {}
    for score in scores:
        for name, mark in (score.marks or {}).items():
            marks.setdefault("items" if is_item(name) else name, []).append(mark)
    return {f"criterion/{name}": float(np.mean(marks[name])) for name in sorted(marks)}


def verdict_signs(scores: Sequence[Scores]) -> dict[str, float]:
    """How sure the judge was, how often a veto corrected it, and how often a completion spoke to it.

    - judge/spread: mean standard deviation of the marks that have one, in marks
    - judge/vetoed: share of the completions with a verdict that had a mark lowered
    - judge/flagged: share of the well-formed completions that speak to their judge
    """
    spreads = [spread for score in scores for spread in score.spreads.values()]
    judged = [bool(score.vetoes) for score in scores if score.marks is not None]
    read = [bool(score.flag) for score in scores if score.malformed is None]
    return {
        "judge/spread": float(np.mean(spreads)) if spreads else float("nan"),
        "judge/vetoed": float(np.mean(judged)) if judged else float("nan"),
        "judge/flagged": float(np.mean(read)) if read else float("nan"),
    }


def hacking_signs(
    replies: Sequence[str],
    lengths_N: Float[np.ndarray, " N"],
    rewards_N: Float[np.ndarray, " N"],
    valid_N: Bool[np.ndarray, " N"],
) -> dict[str, float]:
    """The metrics of a step: ``replies`` of the well-formed completions, arrays over all N completions."""
    return {
        "shared_opener_share": shared_share([opener(reply) for reply in replies]),
        "shared_closer_share": shared_share([closer(reply) for reply in replies]),
        "shared_phrase_share": shared_phrase_share(replies),
        "distinct_reply_share": distinct_share(replies),
        "repetition": float(np.mean([repetition(reply) for reply in replies])) if replies else float("nan"),
        "length_reward_correlation": length_reward_correlation(lengths_N, rewards_N, valid_N),
    }
