import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.observe.jsonl import JsonlError, JsonlWriter, read_rows, truncate_after


def test_lines_are_strict_json_with_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write(1, {"kl": math.nan, "ratio": [math.inf, 1.5], "by": {"a": np.float32("nan"), "b": np.int64(3)}})
    assert path.read_text() == '{"step": 1, "kl": null, "ratio": [null, 1.5], "by": {"a": null, "b": 3}}\n'


def test_a_step_is_on_disk_before_the_writer_closes(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    writer = JsonlWriter(path)
    writer.write(4, {"reply": "Ça va\nmieux"}, {"reply": "b"})
    assert [json.loads(line)["reply"] for line in path.read_text(encoding="utf-8").splitlines()] == [
        "Ça va\nmieux",
        "b",
    ]
    writer.close()


def test_truncation_keeps_the_checkpoint_step_and_drops_the_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert truncate_after(path, 2) == len(b'{"step": 3}\n{"ste')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 2]


def test_a_torn_line_goes_even_when_every_step_stays(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": 0.1')
    assert truncate_after(path, 9) > 0
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_missing_file_stays_missing(tmp_path):
    assert truncate_after(tmp_path / "none.jsonl", 5) == 0
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"a": 1}\n', b'{"step": "1"}\n'])
def test_a_foreign_line_is_named_and_nothing_is_cut(tmp_path, line):
    path = tmp_path / "m.jsonl"
    before = b'{"step": 1}\n' + line + b'{"step": 3}\n'
    path.write_bytes(before)
    with pytest.raises(JsonlError, match=r"m\.jsonl, line 2"):
        truncate_after(path, 1)
    assert path.read_bytes() == before


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.data())
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path_factory, steps, data):
    folder = tmp_path_factory.mktemp("jsonl")
    saved = data.draw(st.integers(0, steps))
    killed = data.draw(st.integers(saved, steps))

    def run(path, first, last):
        with JsonlWriter(path) as writer:
            for step in range(first, last + 1):
                writer.write(step, {"reward": step / 7})

    run(folder / "whole", 1, steps)
    run(folder / "parts", 1, killed)
    with (folder / "parts").open("a") as file:
        file.write('{"step": ')
    truncate_after(folder / "parts", saved)
    run(folder / "parts", saved + 1, steps)
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()
