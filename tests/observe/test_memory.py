"""The peak of resident memory, in a process of its own: a large one gives and takes pages all the time."""

import json
import subprocess
import sys

import pytest

from kardia_jax.observe import memory

SIZE, NOISE = 200_000_000, 20_000_000
PROGRAM = f"""
import json
from kardia_jax.observe.memory import peak_rss, reset_peak_rss
seen = [reset_peak_rss(), peak_rss()]
block = b"x" * {SIZE}
seen.append(peak_rss())
del block
seen.append(peak_rss())
print(json.dumps([*seen, reset_peak_rss(), peak_rss()]))
"""


def test_the_peak_is_of_the_time_since_the_reset():
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    could, before, high, still, again, after = json.loads(done.stdout.splitlines()[-1])
    if not could:
        pytest.skip("this system lets nobody reset the peak")
    assert high - before > SIZE - NOISE
    assert still == pytest.approx(high, abs=NOISE)
    assert again
    assert after < high - SIZE + NOISE


def test_a_system_without_reset_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "absent" / "clear_refs")
    assert memory.reset_peak_rss() is False


def test_a_cpu_counts_no_device_memory():
    assert memory.peak_device_bytes() is None
