"""The README.md of an exported model.

In: what the exporter knows. Out: Markdown with the Hub's front matter, for instance

    ---
    license: "apache-2.0"
    library_name: transformers
    ---
    # kardia-demo
    ...
    | metric | base | sft | grpo |
    | --- | --- | --- | --- |
    | format_rate | 0.000 [0.000, 0.000] | 0.981 [0.970, 0.990] | 0.995 [0.990, 1.000] |
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kardia_jax.dialogue.spans import SPAN_NAMES

OUTPUT = f"""\
The model answers with the spans {", ".join(SPAN_NAMES)}, in this order, each between `<|NAME_begin|>` and
`<|NAME_end|>`, which are special tokens: decode with `skip_special_tokens=False`, and show people the last
span only. The chat template and the stop tokens are in this folder."""

USE = """\
Research on empathetic dialogue and on reinforcement learning from rubrics."""

LIMITS = """\
- It is no therapist and no crisis service, and must not be used as one; route people at risk to human help.
- It can misread an emotion, agree too easily, and state wrong things with warmth.
- Its rewards came from an automatic judge: high marks mean that the judge was pleased, not that people were
  helped.
- It speaks from the profile that it is given and knows nothing else about the person."""


@dataclass(frozen=True)
class Card:
    """What stands on a model card."""

    name: str
    base_model: str
    """What training started from, in words: a Hub id, or 'random initialisation (tiny-qwen3)'."""
    data: str
    """The training data, in words; synthetic data must say so."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Settings that somebody would need to do it again."""
    results: Mapping[str, Mapping[str, tuple[float, float, float]]] = field(default_factory=dict)
    """By policy, by metric: (mean, low, high), 95 %."""
    licence: str = "apache-2.0"
    """SPDX id in lower case, as the Hub wants it. Weights inherit the licence of what they started from."""
    hub_base: str | None = None
    """Hub id of the base model, when it has one."""
    use: str = USE
    limits: str = LIMITS


def model_card(card: Card) -> str:
    """The whole README.md."""
    sections = [
        _front_matter(card),
        f"# {card.name}",
        f"Started from {card.base_model}; trained with kardia_jax.",
        f"## Data\n\n{card.data}",
        f"## Recipe\n\n{_recipe(card.recipe)}" if card.recipe else "",
        f"## Evaluation\n\nMean and 95 % interval.\n\n{_results(card.results)}" if card.results else "",
        f"## Output\n\n{OUTPUT}",
        f"## Intended use\n\n{card.use}",
        f"## Limits\n\n{card.limits}",
        f"## Licence\n\n{card.licence}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(card: Card) -> str:
    # JSON strings are YAML strings, so nothing in a name can break out.
    lines = ["---", f"license: {json.dumps(card.licence)}", "library_name: transformers"]
    lines += ["pipeline_tag: text-generation", "tags:", "- empathetic-dialogue", "- grpo"]
    lines += [f"base_model: {json.dumps(card.hub_base)}"] if card.hub_base else []
    return "\n".join([*lines, "---"])


def _recipe(recipe: Mapping[str, object]) -> str:
    rows = [[name, str(value)] for name, value in recipe.items()]
    return "\n".join([_row(["setting", "value"]), _row(["---", "---"]), *map(_row, rows)])


def _results(results: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    metrics = dict.fromkeys(metric for by_metric in results.values() for metric in by_metric)
    rows = [[metric, *(_interval(by_metric.get(metric)) for by_metric in results.values())] for metric in metrics]
    return "\n".join([_row(["metric", *results]), _row(["---"] * (len(results) + 1)), *map(_row, rows)])


def _interval(interval: tuple[float, float, float] | None) -> str:
    if interval is None or math.isnan(interval[0]):
        return "–"
    mean, low, high = interval
    return f"{mean:.3f}" if math.isnan(low) or math.isnan(high) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
