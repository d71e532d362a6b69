"""JAX looks for no TPU where there is none, although libtpu is installed."""

import glob
import importlib.util
import os
import subprocess
import sys

import pytest

from kardia_jax import platforms

LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture
def machine(monkeypatch):
    """(libtpu is installed, device nodes, environment) -> what JAX_PLATFORMS then says."""

    def of(libtpu: bool, nodes: dict[str, list[str]], **environment: str) -> str | None:
        for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: object() if libtpu else None)
        monkeypatch.setattr(platforms.glob, "glob", lambda pattern: nodes.get(pattern, []))
        platforms.leave_out_absent_tpus()
        return os.environ.get("JAX_PLATFORMS")

    return of


def test_tpus_are_left_out_where_libtpu_has_none_to_start(machine):
    assert machine(True, {}) == "cpu"
    assert machine(True, {}, JAX_PLATFORMS="") == "cpu", "an empty name is no wish"
    assert machine(False, {}) is None, "without libtpu there is nothing to leave out"


def test_what_is_there_or_asked_for_stays(machine):
    assert machine(True, {"/dev/accel*": ["/dev/accel0"]}) is None
    assert machine(True, {"/dev/vfio/[0-9]*": ["/dev/vfio/0"]}) is None
    assert machine(True, {"/dev/nvidia*": ["/dev/nvidia0"]}) is None
    assert machine(True, {}, JAX_PLATFORMS="tpu,cpu") == "tpu,cpu"
    assert machine(True, {}, JAX_FORCE_TPU_INIT="1") is None


@pytest.mark.skipif(
    not LIBTPU or any(map(glob.glob, platforms.TPUS + platforms.GPUS)),
    reason="needs libtpu (the extra `test` brings it) and a machine without an accelerator",
)
def test_a_command_beside_libtpu_complains_of_no_tpu():
    around = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "kardia_jax", "doctor"]
    done = subprocess.run(command, env=around, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "x cpu (cpu)" in done.stdout
    assert "libtpu yes" in done.stdout
