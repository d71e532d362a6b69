"""Processes that find each other, agree and stop together: real ones on this machine, with nothing but hosts.py."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import get_args, get_type_hints

import pytest

from kardia_jax.config import Config, ConfigError, HostsConfig
from kardia_jax.hosts import (
    JAX_NAMES,
    HostsError,
    _require_free,
    code_fingerprint,
    differences,
    facts,
    joined,
    method,
    missing,
    require_one_process,
)

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 120
"""Seconds for processes that are expected to end by themselves in five: other work may have the cores."""

PROGRAM = """
    import dataclasses, sys, time
    import jax
    from kardia_jax.config import Config, GrpoConfig, HostsConfig, JudgeConfig, MeshConfig, SamplerMeshConfig
    from kardia_jax.hosts import HostsError, anyone, end_if_joined, gathered, joined

    coordinator, processes, process, group = sys.argv[1], *map(int, sys.argv[2:5])
    hosts = HostsConfig(coordinator=coordinator, processes=processes, process=process, {settings})
    config = dataclasses.replace(Config(), hosts=hosts, grpo=GrpoConfig(group=group), **dict({more}))
    try:
        with joined(config):
            {work}
    except Exception as error:
        print("raised", type(error).__name__, error, file=sys.stderr, flush=True)
        end_if_joined(1)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    work: str,
    processes: int,
    groups: dict[int, int] | None = None,
    settings: str = "heartbeat_seconds=600",
    only=None,
    more: str = "",
):
    """One Python for each process, which does ``work`` when all have joined; ``more`` are fields of their config."""
    coordinator = f"127.0.0.1:{free_port()}"
    program = textwrap.dedent(PROGRAM).format(
        work=textwrap.indent(textwrap.dedent(work), 8 * " ").strip(), settings=settings, more=more
    )
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, coordinator, str(processes), str(n), str((groups or {}).get(n, 8))],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in (range(processes) if only is None else only)
    ]


def ended(running) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none outlives the test."""
    try:
        said = [process.communicate(timeout=PATIENCE) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(running, said, strict=True)]


def test_what_one_says_all_hear_in_the_order_of_processes():
    work = """
        assert gathered(f"é{process}" * (process * 40_000 + 1)) == [f"é{n}" * (n * 40_000 + 1) for n in range(3)]
        assert gathered("") == [""] * 3
        assert anyone(process == 1) and not anyone(False)
        print("fine", jax.process_count())
    """
    # Gloo says on stdout that it is connected.
    assert [(code, out.splitlines()[-1]) for code, out, _ in ended(start(work, 3))] == [(0, "fine 3")] * 3


def test_processes_with_different_configs_are_named_in_all_of_them():
    here = socket.gethostname()
    for code, _, err in ended(start("print('never')", 3, groups={2: 16})):
        assert code == 1, err
        assert f"grpo.group: 8 on 0 ({here}), 1 ({here}); 16 on 2 ({here})" in err
        assert "Start all processes with the same config" in err


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ("judge=JudgeConfig(record='all.jsonl')", "judge.record: wanted no file"),
        ("mesh=MeshConfig(sampler=SamplerMeshConfig(data=1))", "mesh.sampler.data: wanted 0"),
    ],
)
def test_what_only_one_process_can_do_is_refused_in_several(more, field):
    for code, _, err in ended(start("print('never')", 2, more=more)):
        assert code == 1, err
        assert f"{field} in a run of several processes" in err


def test_the_reason_of_one_stops_the_others_within_seconds():
    work = """
        if process == 1:
            raise ValueError("the disk of this host is full")
        time.sleep(100)
    """
    started = time.monotonic()
    codes_and_errors = [(code, err) for code, _, err in ended(start(work, 3))]
    assert time.monotonic() - started < PATIENCE
    assert [code for code, _ in codes_and_errors] == [1, 1, 1], codes_and_errors
    for _, err in (codes_and_errors[0], codes_and_errors[2]):
        assert f"stopped, since another process has: 1 ({socket.gethostname()}): the disk of this host is full" in err


@pytest.mark.parametrize("waiting", ["gathered('x')", "time.sleep(100)"])
def test_a_process_that_is_killed_ends_the_others_within_the_deadline(waiting):
    work = f"""
        gathered("all are here")
        if process == 1:
            print("ready", flush=True)
            time.sleep(100)
        {waiting}
    """
    running = start(work, 3, settings="heartbeat_seconds=3")
    while running[1].stdout.readline() not in ("ready\n", ""):
        pass
    running[1].send_signal(signal.SIGKILL)
    started = time.monotonic()
    (first, _, first_error), _, (last, _, last_error) = ended(running)
    assert time.monotonic() - started < 60
    assert first not in (0, None)
    assert last not in (0, None)
    for error in (first_error, last_error):
        assert (
            "lost another process" in error or "stopped sending heartbeats" in error or "another process has" in error
        )


def test_a_coordinator_that_nobody_is_at_is_said_within_the_deadline():
    started = time.monotonic()
    [(code, _, err)] = ended(start("print('never')", 2, settings="join_seconds=2", only=[1]))
    assert time.monotonic() - started < 60
    assert code == 2
    assert "hosts.coordinator: wanted process 0 at 127.0.0.1" in err
    assert "within hosts.join_seconds = 2 s" in err
    assert "refused" in err


def test_the_first_process_says_that_others_have_not_come():
    [(code, _, err)] = ended(start("print('never')", 2, settings="join_seconds=2", only=[0]))
    assert code == 2
    assert "hosts.processes: wanted all 2 processes within hosts.join_seconds = 2 s" in err


def test_a_port_that_is_taken_is_named():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = Config(hosts=HostsConfig(coordinator=f"127.0.0.1:{port}", processes=2))
        with pytest.raises(HostsError, match=rf"hosts\.coordinator: wanted a free port, got {port}"):
            joined(config).__enter__()


# ---- Without processes


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, "alone"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, "alone"),  # in the batch script, outside of srun
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, "alone"),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"}, "slurm"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, "alone"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "gketpu"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
    ],
)
def test_what_the_environment_says(environment, found):
    assert method(HostsConfig(), environment) == found


def test_what_is_said_by_hand_comes_first():
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"}
    assert method(HostsConfig(cluster="alone"), slurm) == "alone"
    assert method(HostsConfig(coordinator="a:1", processes=2), slurm) == "by hand"
    assert method(HostsConfig(cluster="gcetpu"), {}) == "gcetpu"


def test_jax_knows_every_cluster_that_can_be_named():
    from jax._src.clusters import ClusterEnv

    named = {JAX_NAMES.get(name, name) for name in get_args(get_type_hints(HostsConfig)["cluster"])}
    assert named - {"auto", "alone", None} <= {kind.name for kind in ClusterEnv._cluster_types}


def test_the_process_may_differ_and_nothing_else():
    one, other = (facts(Config(hosts=HostsConfig(coordinator="a:1", processes=2, process=n))) for n in (0, 1))
    assert one == other
    assert one["code of kardia_jax"] == code_fingerprint()
    assert "jax" in one
    assert differences(["0", "1"], [one, other | {"jax": "0.0"}]) == [f"jax: {one['jax']} on 0; 0.0 on 1"]
    assert differences(["0", "1"], [{"a": "1"}, {}]) == ["a: 1 on 0; nothing on 1"]


def test_a_cluster_that_is_not_complete_is_named():
    said = missing(HostsConfig(cluster="slurm", join_seconds=9), "slurm")
    assert "slurm" in said
    assert "hosts.join_seconds = 9 s" in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "a"}, r"hosts\.coordinator: wanted HOST:PORT.*got 'a'"),
        ({"coordinator": "a:99999"}, r"hosts\.coordinator"),
        ({"processes": 2}, r"hosts\.processes: wanted 1 alone, got 2.*hosts\.coordinator"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, r"hosts\.process: wanted 0 to 1"),
        ({"processes": 0}, r"hosts\.processes"),
        ({"join_seconds": 0}, r"hosts\.join_seconds"),
        ({"heartbeat_seconds": 0}, r"hosts\.heartbeat_seconds"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        HostsConfig(**fields)


def test_a_port_is_free_again_as_soon_as_nobody_listens_and_no_sooner():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As gRPC's, which JAX listens with.
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        server.listen()
        with pytest.raises(HostsError, match=f"hosts.coordinator: wanted a free port, got {port}"):
            _require_free(f"here:{port}")
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
    # Who closes first keeps the port in TIME_WAIT.
    accepted.close()
    client.close()
    _require_free(f"here:{port}")


def test_what_is_for_one_process_is_refused_in_several(monkeypatch):
    require_one_process(HostsConfig(), "eval")
    with pytest.raises(HostsError, match=r"wanted one process for kardia eval, got several \(by hand\)"):
        require_one_process(HostsConfig(coordinator="here:1", processes=2, process=0), "eval")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(HostsError, match=r"got several \(ompi\)"):
        require_one_process(HostsConfig(), "eval")
