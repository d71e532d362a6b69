import json

import pytest

from kardia_jax.bench import conversion, layout, report
from kardia_jax.bench.ceilings import Ceilings, Sizes, measure_ceilings
from kardia_jax.bench.measure import Record, Records, measure_sample, measure_update
from kardia_jax.bench.workload import load_model
from kardia_jax.cli import main
from kardia_jax.config import BenchConfig, ConfigError
from kardia_jax.model.shapes import SHAPES

CONFIG = BenchConfig("tiny-qwen3", prompts=2, group=2, prompt_len=20, new_tokens=4, steps=1, dtype="float32")
CEILINGS = Ceilings(1e9, 1e12, {"1 MB": 1e9}, {"8": 1e12})


def test_a_step_ends_in_one_line_of_json(capsys):
    flags = "--model tiny-qwen3 --prompts 1 --group 2 --prompt-len 20 --new-tokens 4 --steps 2 --dtype float32"
    assert main(["bench", "step", *flags.split()]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert any(line.startswith("| rollout ") for line in shown)
    assert list(found["seconds"]) == ["rollout", "reference", "update"] == list(found["phases"])
    assert found["peak_rss_gb"] > 0.05
    assert (found["group"], found["prompt_len"], found["dtype"]) == (2, 20, "float32")
    assert found["step_seconds"] == pytest.approx(sum(found["step_seconds_all"]) / 2)
    assert 0 < found["mfu"] < found["mfu_repeated"] < 1
    for rates in found["phases"].values():
        assert rates["flops_per_second"] == pytest.approx(rates["mfu"] * found["ceilings"]["flops_per_second"])


def test_sampling_is_split_into_prefill_and_decode():
    records = measure_sample(CONFIG, load_model(CONFIG, "float32"))
    found = report.results("sample", CONFIG, SHAPES["tiny-qwen3"], records, CEILINGS, device_peak=2_000_000_000)
    whole = records["generate"].seconds[1]
    assert found["seconds"]["prefill"] + found["seconds"]["decode"] == pytest.approx(whole)
    assert found["completion_tokens_per_second"] == pytest.approx(2 * 2 * 4 / whole)
    assert found["peak_device_gb"] == 2.0
    assert "device 2.00 GB" in report.text(found)


def test_an_update_learns_in_micro_batches_without_a_reference():
    config = BenchConfig("tiny-qwen3", 2, 2, 20, 4, beta=0.0, steps=1, micro_batches=2, dtype="float32")
    records = measure_update(config, load_model(config, "float32"))
    assert {name: len(record.seconds) for name, record in records.items()} == {"update": 2}
    assert "reference" not in report.phase_work("step", config, SHAPES["tiny-qwen3"])


def test_medians_leave_the_first_call_out():
    records = Records(update=Record([9.0, 1.0, 3.0, 2.0], [4_000_000_000, 10**9, 3 * 10**9, 10**9]))
    found = report.results("update", CONFIG, SHAPES["tiny-qwen3"], records, CEILINGS, None)
    assert found["seconds"] == {"update": 2.0}
    assert found["compile_seconds"] == {"update": 7.0}
    assert found["peak_rss_gb"] == 4.0
    assert found["peak_rss_gb_by_phase"] == {"update": 3.0}


def test_ceilings_are_the_best_of_their_sizes():
    ceilings = measure_ceilings("bfloat16", Sizes(megabytes=(1, 2), widths=(64, 128)))
    assert ceilings.bytes_per_second == max(ceilings.copies.values()) > 0
    assert ceilings.flops_per_second == max(ceilings.matmuls.values()) > 0
    assert list(ceilings.copies) == ["1 MB", "2 MB"]


def test_a_way_of_conversion_counts_its_memory(tmp_path):
    conversion.write_random(SHAPES["tiny-qwen3"], tmp_path / "source")
    found = conversion.measure("import", "tiny-qwen3", tmp_path)
    assert (tmp_path / "target" / "config.json").is_file()
    assert found["seconds"] > 0
    assert found["extra_gb"] == found["peak_rss_gb"] > 0.01


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nonsense"], "bench: wanted one of step, sample, update, import, got 'nonsense'."),
        ([], "bench: wanted one of step"),
        (["step", "--model", "nope"], "model: wanted a directory, a GGUF file or one of tiny-qwen2"),
        (["update", "--group", "0"], "group: wanted at least 1, got 0."),
        (["sample", "--new-tokens", "1"], "new_tokens: wanted at least 2"),
        (["step", "--model", "tiny-qwen3", "--prompt-len", "2048"], "prompt_len + new_tokens: wanted at most 2048"),
        (["step", "--micro-batches", "3"], "micro_batches: wanted a divisor of prompts, got 3."),
        (["import", "--model", "nope"], "wanted a local directory or one of"),
    ],
)
def test_what_cannot_work_is_said(flags, said, capsys):
    assert main(["bench", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_config_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="beta: wanted 0"):
        BenchConfig(beta=-1.0)


def test_tables_are_markdown():
    assert layout.table(["a", "bb"], [["x", "1.5"]]).splitlines() == ["| a |  bb |", "| - | --: |", "| x | 1.5 |"]
