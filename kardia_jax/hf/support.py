"""The table of what is converted, from the code, for docs/conversion.md.

python -m kardia_jax.hf.support docs/conversion.md       # writes the table between the markers of the file
"""

import pathlib
import sys

from kardia_jax.hf.gguf_names import ARCHITECTURES
from kardia_jax.hf.tables import FamilyRow, supported_families

BEGIN, END = "<!-- supported models: begin -->", "<!-- supported models: end -->"
DIRECTORIES = "safetensors and LoRA in and out"
CHECKED = "logits (1e-4), greedy tokens, adapters against transformers and PEFT; every byte there and back"
PACKED = "every tensor of a GGUF as transformers unpacks it"
GGUF_TYPES = {row.model_type for row in ARCHITECTURES.values()}


def support_table() -> str:
    """Markdown: family, architecture, what is special, directions, what is checked."""
    head = ["family", "architecture in config.json", "of its own", "directions", "what the tests check"]
    lines = [_cells(row) for row in supported_families()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def _cells(row: FamilyRow) -> list[str]:
    packed = row.model_type in GGUF_TYPES
    directions = DIRECTORIES + ("; GGUF in" if packed else "")
    checked = f"{CHECKED}; {PACKED}" if packed else CHECKED
    return [row.family, f"`{row.architecture}`", ", ".join(row.features), directions, checked]


def with_table(text: str) -> str:
    """The document with the table between its markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{support_table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    document = pathlib.Path(sys.argv[1])
    document.write_text(with_table(document.read_text("utf-8")), "utf-8")
