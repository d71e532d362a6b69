import pytest

from kardia_jax.observe import memory

SIZE, NOISE = 200_000_000, 20_000_000


def test_the_peak_is_of_the_time_since_the_reset():
    if not memory.reset_peak_rss():
        pytest.skip("this system lets nobody reset the peak")
    before = memory.peak_rss()
    block = b"x" * SIZE
    high = memory.peak_rss()
    assert high - before > SIZE - NOISE
    del block
    assert memory.peak_rss() == pytest.approx(high, abs=NOISE)
    assert memory.reset_peak_rss()
    assert memory.peak_rss() < high - SIZE + NOISE


def test_a_system_without_reset_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "absent" / "clear_refs")
    assert memory.reset_peak_rss() is False


def test_a_cpu_counts_no_device_memory():
    assert memory.peak_device_bytes() is None
