"""The cache of verdicts: what is kept, for whom, how much of it, and what a kill or a damaged file costs."""

import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
from typing import Any

import pytest

from kardia_jax.judge import cache as cache_module
from kardia_jax.judge.cache import LOOK_EVERY, VerdictCache, cache_path
from kardia_jax.rewards.rubric import Mark, Verdict

MB = 2**20


def verdict(number: int, length: int = 20) -> Verdict:
    """One that tells its number; the reason has ``length`` characters."""
    return Verdict((Mark("tone", 1 + number % 5, f"{number:0{length}d}", None if number % 2 else 0.5),))


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "deep" / "verdicts.sqlite"


WRITER = """
import pathlib, sys
from kardia_jax.judge.cache import VerdictCache
from kardia_jax.rewards.rubric import Mark, Verdict
cache, name, number = VerdictCache(pathlib.Path(sys.argv[1]), 2**30), sys.argv[2], 0
while number < int(sys.argv[3]):
    mark = Mark("tone", 1 + number % 5, f"{number:020d}", None if number % 2 else 0.5)
    cache.put(f"{name} {number}", Verdict((mark,)))
    print(number, flush=True)
    number += 1
cache.close()
"""


def writer(path: pathlib.Path, name: str, count: int) -> subprocess.Popen[str]:
    """A process that writes ``verdict(n)`` under "name n", and says so after each."""
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    root = pathlib.Path(cache_module.__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)


def test_what_is_put_is_got_and_nothing_else(path):
    cache = VerdictCache(path, MB)
    assert cache.get("a") is None
    for number in (1, 2):
        cache.put("a", verdict(number))
    cache.put("b", verdict(3))
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (verdict(2), verdict(3), None)
    cache.close()
    again = VerdictCache(path, MB)
    assert again.get("a") == verdict(2)
    again.close()


def test_two_processes_write_and_a_third_reads_beside_them(path):
    cache = VerdictCache(path, MB)
    others = [writer(path, name, 300) for name in "xy"]
    assert others[0].stdout is not None
    for line in others[0].stdout:
        # What the other process has said is written is here at once.
        assert cache.get(f"x {int(line)}") == verdict(int(line))
        cache.put(f"here {int(line)}", verdict(int(line)))
    assert [other.wait() for other in others] == [0, 0]
    for other in others:
        assert other.stdout is not None
        other.stdout.close()
    assert all(cache.get(f"{name} {n}") == verdict(n) for name in ("x", "y", "here") for n in range(300))
    cache.close()


def test_a_process_that_is_killed_while_it_writes_loses_nothing_that_it_had_written(path):
    other = writer(path, "x", 10**9)
    assert other.stdout is not None
    last = next(int(line) for line in other.stdout if int(line) >= 400)
    other.send_signal(signal.SIGKILL)
    said = [int(line) for line in other.stdout if line.endswith("\n")]
    assert other.wait() == -signal.SIGKILL
    other.stdout.close()
    cache = VerdictCache(path, MB)
    assert all(cache.get(f"x {n}") == verdict(n) for n in range(max([last, *said]) + 1))
    cache.put("x 0", verdict(7))
    assert cache.get("x 0") == verdict(7)
    cache.close()
    with sqlite3.connect(path) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    db.close()


def test_beyond_its_size_what_was_unused_for_longest_goes(path):
    bound = MB // 2
    cache = VerdictCache(path, bound)
    cache.put("kept", verdict(1))
    # 300 characters and some each: eight times the bound in all.
    total = 8 * bound // 300
    for number in range(total):
        cache.put(f"{number}", verdict(number, 300))
        if number % 100 == 0:
            assert cache.get("kept") == verdict(1), "used all the time, whenever it was written"
    assert cache.get("0") is None
    assert all(cache.get(f"{n}") == verdict(n, 300) for n in range(total - LOOK_EVERY, total))
    cache.close()
    # Between two looks at the size the file may grow by what is written then.
    assert path.stat().st_size <= bound + LOOK_EVERY * 600


def test_a_file_that_is_no_database_is_kept_aside_and_begun_anew(path, capsys):
    path.parent.mkdir()
    path.write_bytes(b"not a database, but somebody's notes" * 100)
    cache = VerdictCache(path, MB)
    cache.put("a", verdict(1))
    assert cache.get("a") == verdict(1)
    cache.close()
    said = capsys.readouterr().err
    assert f"{path} is damaged" in said
    (kept,) = path.parent.glob("verdicts.sqlite.damaged-*")
    assert kept.name in said
    assert kept.read_bytes().startswith(b"not a database, but somebody's notes")


def test_a_file_that_is_damaged_while_it_is_used_costs_verdicts_and_no_run(path, capsys):
    cache = VerdictCache(path, MB)
    for number in range(2000):
        cache.put(f"{number}", verdict(number, 100))
    cache.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    cache = VerdictCache(path, MB)
    found = [cache.get(f"{number}") for number in range(2000)]
    assert all(one in (None, verdict(n, 100)) for n, one in enumerate(found))
    assert "is damaged" in capsys.readouterr().err
    cache.put("a", verdict(1))
    assert cache.get("a") == verdict(1)
    cache.close()


@pytest.mark.parametrize("change", ["verdict = replace(verdict, '4', '5')", "checksum = 1", "verdict = x'00'"])
def test_a_row_that_is_not_as_it_was_written_is_asked_for_again(path, change):
    cache = VerdictCache(path, MB)
    cache.put("a", verdict(3))
    assert cache.get("a").by_name() == {"tone": 4}
    with sqlite3.connect(path) as db:
        db.execute(f"update verdicts set {change} where key = 'a'")
    db.close()
    assert cache.get("a") is None
    cache.put("a", verdict(3))
    assert cache.get("a") == verdict(3)
    cache.close()


def blocked_by_a_file(path: pathlib.Path) -> None:
    path.parent.write_text("a file where the folder should be")


def blocked_by_a_folder(path: pathlib.Path) -> None:
    path.mkdir(parents=True)


@pytest.mark.parametrize("block", [blocked_by_a_file, blocked_by_a_folder])
def test_where_no_file_can_be_the_judge_is_asked_and_that_is_said_once(path, capsys, block):
    block(path)
    cache = VerdictCache(path, MB)
    for _ in range(3):
        cache.put("a", verdict(1))
        assert cache.get("a") is None
    cache.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "verdicts are not kept. Name a file in judge.cache.path" in said


def test_a_file_that_another_process_holds_too_long_is_passed_over(path, capsys, monkeypatch):
    monkeypatch.setattr(cache_module, "BUSY_SECONDS", 0.02)
    cache = VerdictCache(path, MB)
    cache.put("a", verdict(1))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    for _ in range(2):
        cache.put("b", verdict(2))
    # Reading goes on beside a writer.
    assert (cache.get("a"), cache.get("b")) == (verdict(1), None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "database is locked; the judge is asked instead" in said
    other.execute("rollback")
    other.close()
    cache.put("b", verdict(2))
    assert cache.get("b") == verdict(2)
    cache.close()


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("off", {}, None),
        ("auto", {"XDG_CACHE_HOME": "/c"}, "/c/kardia_jax/verdicts.sqlite"),
        ("auto", {}, "~/.cache/kardia_jax/verdicts.sqlite"),
        ("/tmp/mine", {"XDG_CACHE_HOME": "/c"}, "/tmp/mine"),
        ("~/mine", {}, "~/mine"),
    ],
)
def test_where_the_file_is(setting: str, environment: dict[str, str], expected: Any):
    assert cache_path(setting, environment) == (expected and pathlib.Path(expected).expanduser())
