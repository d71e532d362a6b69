"""A rubric is data: criteria, and pure functions that make a judge's prompt and read its verdict.

    load_rubric("kardia_five")  ->  Rubric                                    files.py, criteria.py, vetoes.py
    questions(rubric, request)  ->  prompts, one per set of spans             prompt.py
    make_level_prompt(...)      ->  prompt whose next token is a mark         prompt.py
    read_verdict(part, text)    ->  Verdict or JudgeFailure                   answer.py
    join_verdicts, average      ->  one Verdict; apply_vetoes; to_unit        marks.py

How a judge that is a language model uses them, for one completion:

>>> asked = questions(rubric, request)
>>> parts = [read_verdict(question.rubric, ask(question.prompt)) for question in asked]
>>> said = join_verdicts(with_items(rubric, request.items), parts)
"""

from kardia_jax.dialogue.dataset import RubricItem
from kardia_jax.rewards.rubric.answer import json_schema, read_verdict
from kardia_jax.rewards.rubric.criteria import Criterion, Rubric, Span, is_item, views, with_items
from kardia_jax.rewards.rubric.files import RubricError, load_rubric, shipped_rubrics
from kardia_jax.rewards.rubric.judge_talk import addresses_judge
from kardia_jax.rewards.rubric.marks import (
    JudgeFailure,
    Mark,
    Verdict,
    Vetoed,
    apply_vetoes,
    average,
    join_verdicts,
    to_unit,
)
from kardia_jax.rewards.rubric.prompt import JudgeRequest, Question, fence, make_level_prompt, make_prompt, questions
from kardia_jax.rewards.rubric.vetoes import (
    HIGHEST,
    LOWEST,
    Contains,
    MaxWords,
    Pattern,
    Phrases,
    Veto,
)

__all__ = [
    "HIGHEST",
    "LOWEST",
    "Contains",
    "Criterion",
    "JudgeFailure",
    "JudgeRequest",
    "Mark",
    "MaxWords",
    "Pattern",
    "Phrases",
    "Question",
    "Rubric",
    "RubricError",
    "RubricItem",
    "Span",
    "Verdict",
    "Veto",
    "Vetoed",
    "addresses_judge",
    "apply_vetoes",
    "average",
    "fence",
    "is_item",
    "join_verdicts",
    "json_schema",
    "load_rubric",
    "make_level_prompt",
    "make_prompt",
    "questions",
    "read_verdict",
    "shipped_rubrics",
    "to_unit",
    "views",
    "with_items",
]
