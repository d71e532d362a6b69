"""How far a sentence is from English: a chain of word classes with a cost for every step that does not fit.

Every word has one or more classes; ``word_classes.tsv`` says which class may follow which. The faults of a
sentence are the cost of its cheapest reading (0.5 for a doubtful step, 1 for an impossible one), plus 1 for
every pair of words that never stand together, plus 1 for a list in the place of a sentence. It is no parser:
it finds broken joints, not broken thoughts.

>>> faults(("that", "must", "have", "hurt", "."))
0.0
>>> faults(("the", "is", "your", "of", "garden", "."))
3.0
"""

import itertools

from kardia_jax.judge.rules.lexicon import bad_pairs, classes, follow_costs

LONG_FRAGMENT = 10
"""Words from which a sentence without a verb is a list and no exclamation."""
LIST_COMMAS = 3
"""Commas that make a list of a sentence."""
_COMMAS = frozenset(",;:—–")
_ENDS = frozenset(".!?…")
_FINITE = frozenset("BMHVWZPJ")
_MAY_REPEAT = frozenset(("very", "really", "so", "had", "that", "no", "oh", "far"))


def faults(words: tuple[str, ...]) -> float:
    """The grammatical faults of one sentence of lower-case tokens."""
    return _reading_cost(words) + _pair_faults(words) + _missing_verb(words) + (words.count(",") >= LIST_COMMAS)


def _reading_cost(words: tuple[str, ...]) -> float:
    """The cost of the cheapest chain of classes from start to end, by dynamic programming over the words."""
    costs = follow_costs()
    paths = {"^": 0.0}
    for letters in [_letters(word) for word in words if word not in _ENDS]:
        paths = {letter: min(paid + costs[last].get(letter, 1.0) for last, paid in paths.items()) for letter in letters}
    return min(paid + costs[last].get("$", 1.0) for last, paid in paths.items())


def _letters(word: str) -> str:
    if word in _COMMAS:
        return "c"
    return classes(word) or guess(word)


def guess(word: str) -> str:
    """Classes for a word that no list knows, by its ending."""
    if not word[0].isalpha():
        return "UN" if word.isdigit() else "c"
    for ending, letters in (("ing", "GNA"), ("ed", "PEA"), ("ly", "R"), ("s", "NZ")):
        if word.endswith(ending):
            return letters
    return "NAV"


def _pair_faults(words: tuple[str, ...]) -> float:
    pairs = list(itertools.pairwise(words))
    doubled = sum(first == second and first[0].isalpha() and first not in _MAY_REPEAT for first, second in pairs)
    wrong = sum(pair in bad_pairs() or _wrong_article(*pair) for pair in pairs)
    return float(doubled + wrong)


def _wrong_article(first: str, second: str) -> bool:
    """Whether "a" stands before a clear vowel; not u, h and o, since "a user" and "an hour" are right."""
    return first == "a" and second[0] in "aei" and not second.startswith(("eu", "ewe"))


def _missing_verb(words: tuple[str, ...]) -> float:
    """Half a fault for a sentence without a verb, 1.5 for a long one, none for "What a day!" or a call."""
    count = sum(word[0].isalpha() for word in words)
    exclaims = bool(words) and words[0] in ("what", "how", "such", "congratulations", "yuck", "wow", "poor")
    verb = any(_FINITE & set(_letters(word)) for word in words if word not in _ENDS and word not in _COMMAS)
    if verb or exclaims or count <= 2:
        return 0.0
    return 0.5 if count < LONG_FRAGMENT else 1.5
