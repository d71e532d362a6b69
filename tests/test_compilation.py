"""The folder of compiled programs: where it is, that a second process loads from it, and what stops it."""

import os
import subprocess
import sys

import jax
import pytest

from kardia_jax import compilation
from kardia_jax.compilation import cache_folder, this_cpu, use_compilation_cache


@pytest.mark.parametrize(
    ("setting", "environment", "folder"),
    [
        ("auto", {}, f"~/.cache/kardia_jax/programs/{this_cpu()}"),
        ("auto", {"XDG_CACHE_HOME": "/x"}, f"/x/kardia_jax/programs/{this_cpu()}"),
        ("auto", {"XDG_CACHE_HOME": "/x", "JAX_COMPILATION_CACHE_DIR": "gs://bucket/y"}, "gs://bucket/y"),
        ("/z", {"JAX_COMPILATION_CACHE_DIR": "/y"}, "/z"),
        ("~/z", {}, "~/z"),
    ],
)
def test_the_folder_of_a_setting(setting, environment, folder):
    assert cache_folder(setting, environment) == os.path.expanduser(folder)


def test_a_cpu_with_other_instructions_has_another_folder(monkeypatch):
    names = []
    for flags in ("sse avx", "sse avx", "sse avx avx512f"):
        monkeypatch.setattr(compilation.pathlib.Path, "read_text", lambda *_, text=flags: f"flags\t\t: {text}\n")
        names.append(this_cpu())
    assert names[0] == names[1] != names[2]


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from kardia_jax.compilation import use_compilation_cache
use_compilation_cache(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
total = jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(8))
print(sum(hits), float(total).hex())
"""


def run(setting: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", PROGRAM, setting]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    folder = tmp_path / "programs"
    first, second = (run(str(folder)).stdout.splitlines() for _ in range(2))
    assert first[0] == second[0] == f"compiled programs are kept in {folder}"
    (none, total), (hits, again) = first[1].split(), second[1].split()
    assert (none, total) == ("0", again)
    assert int(hits) > 0


@pytest.fixture
def enabled():
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("enabled")
def test_a_folder_that_cannot_be_written_is_said_and_does_not_stop(tmp_path, capsys):
    (tmp_path / "file").write_text("", "utf-8")
    use_compilation_cache(str(tmp_path / "file" / "programs"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("run.compilation_cache: wanted a folder to write, got ")
    assert "Not a directory. Everything is compiled anew" in err
    assert not jax.config.jax_enable_compilation_cache


@pytest.mark.usefixtures("enabled")
def test_off_is_off_and_says_nothing(capsys):
    use_compilation_cache("off")
    assert not jax.config.jax_enable_compilation_cache
    assert capsys.readouterr() == ("", "")
