"""The table of what is converted, from the code, for docs/conversion.md.

python -m kardia_jax.hf.support docs/conversion.md       # writes the table between the markers of the file
"""

import pathlib
import sys
from typing import NamedTuple

from kardia_jax.hf.tables import FAMILIES, QK_NORM, QKV_BIAS
from kardia_jax.model.spec import ARCHITECTURES

BEGIN, END = "<!-- supported models: begin -->", "<!-- supported models: end -->"
CHECKED = "there and back: every byte of every tensor; against transformers: float32 logits to 1e-4, greedy tokens"
NAMES = {"qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3 (dense)"}
FEATURES = {QKV_BIAS: "bias on queries, keys and values", QK_NORM: "norm on query and key heads"}


class Row(NamedTuple):
    """One family."""

    family: str
    architecture: str
    features: str


def rows() -> list[Row]:
    """Every family that has a table of tensors."""
    return [
        Row(
            NAMES.get(family, family),
            ARCHITECTURES[family],
            ", ".join(text for part, text in FEATURES.items() if set(part) <= set(table)),
        )
        for family, table in FAMILIES.items()
        if family in ARCHITECTURES
    ]


def support_table() -> str:
    """Markdown: family, architecture, what is special, direction, what is checked."""
    head = ["family", "architecture in config.json", "of its own", "direction", "what the tests check"]
    lines = [[row.family, f"`{row.architecture}`", row.features, "in and out", CHECKED] for row in rows()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def with_table(text: str) -> str:
    """The document with the table between its markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{support_table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    document = pathlib.Path(sys.argv[1])
    document.write_text(with_table(document.read_text("utf-8")), "utf-8")
