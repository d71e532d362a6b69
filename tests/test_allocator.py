"""A process that keeps what it frees asks the system for no pages the second time."""

import os
import platform
import subprocess
import sys
import textwrap

import pytest

from kardia_jax import allocator, platforms

PROGRAM = """
    import resource
    import numpy as np
    from kardia_jax.allocator import keep_freed_memory

    keep_freed_memory()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(100_000_000, np.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(faults[0], faults[-1])
"""
GLIBC = platform.libc_ver()[0] == "glibc"


def faults(**environment):
    """Pages that the first and the last of three arrays of 100 MB needed, in a process with this environment."""
    around = {name: value for name, value in os.environ.items() if name not in allocator.OWN_ALLOCATOR}
    around |= {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=60, check=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(not GLIBC, reason="glibc's malloc is what is told")
def test_freed_memory_is_used_again():
    first, last = faults()
    assert first > 100, "the kernel may hand out pages of 4 to 256 KB at a time"
    assert last < first / 10


@pytest.mark.skipif(not GLIBC, reason="glibc's malloc is what is told")
def test_an_allocator_that_was_chosen_stays_as_it_is():
    first, last = faults(MALLOC_ARENA_MAX="4")
    assert last > first / 2


def test_only_a_process_for_the_cpu_is_told(monkeypatch):
    for name in allocator.OWN_ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    nodes = {"/dev/nvidia*": ["/dev/nvidia0"]}
    monkeypatch.setattr(platforms.glob, "glob", lambda pattern: nodes.get(pattern, []))
    told = []

    class Library:
        def __init__(self, name):
            assert name is None

        def mallopt(self, parameter, value):
            told.append(parameter)

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    allocator.keep_freed_memory()
    assert not told
    nodes.clear()
    allocator.keep_freed_memory()
    assert told == list(allocator.KEEPING)
