import pathlib

from kardia_jax.hf.support import support_table, with_table
from kardia_jax.hf.tables import FAMILIES

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "conversion.md"


def test_the_table_in_the_docs_is_the_generated_one():
    text = DOCUMENT.read_text("utf-8")
    assert text == with_table(text), "python -m kardia_jax.hf.support docs/conversion.md"
    assert support_table() in text


def test_every_family_has_its_line_and_gguf_is_said_where_it_is_read():
    lines = support_table().splitlines()[2:]
    assert len(lines) == len(FAMILIES)
    packed = {line.split("`")[1] for line in lines if "GGUF in" in line}
    assert packed == {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"}
