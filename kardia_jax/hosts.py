"""One run in several processes: how they find each other, agree, tell each other things, and stop together.

Every process runs the same program on the same config (JAX's multi-controller way); each sees its own devices, its own
rows and its own files. What must be the same in all of them goes through here:

    with joined(config):        # nothing in a run of one process; HostsError: "grpo.group: 8 on 0 (a); 16 on 1 (b)"
        gathered("what I saw")          # ["what 0 saw", "what 1 saw"], everywhere
        anyone(stop_asked)              # True everywhere, if one of them says so

A process that raises tells the others why before it goes, and they stop within seconds. One that is killed cannot: the
others see the broken connection, or miss its heartbeat for ``hosts.heartbeat_seconds``, and JAX ends them with its own
message.
"""

import hashlib
import json
import os
import pathlib
import platform
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kardia_jax.config import Config, HostsConfig, flat
from kardia_jax.config.errors import require

POLL_SECONDS = 0.5
"""Between two looks for what another process has said before it stopped."""
FAREWELL_SECONDS = 20
"""How long process 0 stays at most until all others have heard why; without it they would hear nothing."""
SLACK_SECONDS = 30
"""Beyond ``hosts.join_seconds``, for JAX, which would end the process without a word of ours."""
JAX_NAMES = {"k8s": None}
"""Clusters that JAX has no name for: it finds them when it looks for any."""
PER_PROCESS = ("hosts.process",)
"""Fields that differ between processes by their meaning."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")
LOST = re.compile(r"[A-Z_]+: Gloo|UNAVAILABLE: ")
"""How an error of JAX begins where another process is gone."""
STOPPED, FACTS = "kardia/stopped", "kardia/facts"
HEARD = ""
"""What a process says that stops because another one does."""
BLOCK = 1 << 16
"""Bytes: what is gathered is padded to a power of two of at least this size, so that few programs are compiled."""


class HostsError(RuntimeError):
    """Processes that do not find each other, or are not the same: names them, what differs and what to do."""


def is_first() -> bool:
    """Whether this process is the one that writes files and reports."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether the run has this process only."""
    return jax.process_count() == 1


def method(config: HostsConfig, environment: Mapping[str, str]) -> str:
    """How the processes are found: ``by hand``, ``alone``, or the name of a cluster that JAX knows.

    >>> method(HostsConfig(), {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "3", "SLURM_NTASKS": "16"})
    'slurm'
    """
    if config.coordinator:
        return "by hand"
    if config.cluster != "auto":
        return config.cluster
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if "," in environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", "")):
        return "gketpu"
    return "ompi" if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 else "alone"


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """Inside, all processes of the run know each other and are the same; entered before JAX touches a device.

    Raises HostsError where that fails. When the others have not come within ``hosts.join_seconds`` the process ends
    with a message, since JAX cannot give up waiting. An error inside is told to the others; SystemExit is not one.
    """
    hosts = config.hosts
    found = method(hosts, os.environ)
    if found == "alone":
        yield
        return
    # Of JAX's and of Orbax's: a run notices SIGTERM itself, and all processes save the same step.
    jax.config.update("jax_enable_preemption_service", False)
    with _deadline(hosts, found):
        _initialize(hosts, found)
    watcher = _Watcher()
    watcher.start()
    try:
        require_agreement(config)
        apart = config.mesh.sampler.devices
        require(apart == 0 or alone(), "mesh.sampler.data", "0 in a run of several processes", apart)
        record = config.judge.record
        require(record is None or alone(), "judge.record", "no file in a run of several processes", record)
        yield
    except Exception as error:
        watcher.stop()
        _depart(f"{jax.process_index()} ({socket.gethostname()}): {error}")
        if LOST.match(str(error)):
            why = str(error).splitlines()[0][:300]
            raise HostsError(f"lost another process, whose own log says why: {why}") from error
        raise
    except SystemExit:  # All have been told to stop, and saved the same step.
        watcher.stop()
        jax.distributed.shutdown()
        raise
    watcher.stop()
    jax.distributed.shutdown()


def _initialize(config: HostsConfig, found: str) -> None:
    by_hand = found == "by hand"
    if by_hand and config.process == 0:
        _require_free(config.coordinator)
    who: dict[str, Any] = {}
    if by_hand:
        who = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
        }
    try:
        jax.distributed.initialize(
            **who,
            cluster_detection_method="deactivate" if by_hand else JAX_NAMES.get(found, found),
            initialization_timeout=config.join_seconds + SLACK_SECONDS,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        fix = "Name the processes with --coordinator HOST:PORT --processes N --process I."
        raise HostsError(f"hosts.cluster: {found} does not say who the processes are: {error}. {fix}") from error


def _require_free(coordinator: str) -> None:
    """JAX goes down without a word where it cannot listen."""
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
            # Connections of a run that has just ended do not keep the port from the next one.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise HostsError(f"hosts.coordinator: wanted a free port, got {port}: {error.strerror}.") from error


@contextmanager
def _deadline(config: HostsConfig, found: str) -> Iterator[None]:
    """Ends the process when the block takes longer than ``hosts.join_seconds``."""

    def give_up() -> None:
        _end(2, f"kardia: {missing(config, found)}")

    timer = threading.Timer(config.join_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def missing(config: HostsConfig, found: str) -> str:
    """Why a process waits in vain, as far as it can tell."""
    waited = f"within hosts.join_seconds = {config.join_seconds} s"
    if found != "by hand":
        return (
            f"hosts.cluster: not all processes that {found} names have come {waited}. Look at the logs of the others."
        )
    wanted = f"all {config.processes} processes {waited}"
    if config.process == 0:
        fix = "Start the others with the same --coordinator and --processes, and --process 1 and so on."
        return f"hosts.processes: wanted {wanted}, but some have not come to {config.coordinator}. {fix}"
    host, _, port = config.coordinator.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError as error:
        fix = "Is process 0 running there, and does a firewall or a proxy stand between?"
        return f"hosts.coordinator: wanted process 0 at {config.coordinator} {waited}, got: {error}. {fix}"
    return f"hosts.processes: wanted {wanted}; {config.coordinator} answers, but somebody else has not come."


class _Watcher(threading.Thread):
    """Ends this process when another one has said that it stops; holds no array."""

    def __init__(self) -> None:
        super().__init__(name="kardia-hosts", daemon=True)
        self._over = threading.Event()

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            reasons = [reason for reason in _departed() if reason]
            if reasons and not self._over.is_set():
                _depart(HEARD)
                _end(1, f"kardia: stopped, since another process has: {reasons[0]}")


def _departed() -> list[str]:
    """What the processes that stop have said; nothing where nobody is there to be asked."""
    try:
        return [said for _, said in _client().key_value_dir_get(STOPPED)]
    except jax.errors.JaxRuntimeError:  # Process 0 is gone: JAX says so and ends this one.
        return []


def _depart(reason: str) -> None:
    """Tells the others why this process stops. Process 0, whom they hear it from, waits until they have."""
    place, started = jax.process_index(), time.monotonic()
    try:
        _client().key_value_set(f"{STOPPED}/{place}", reason)
    except jax.errors.JaxRuntimeError:
        return
    while place == 0 and time.monotonic() - started < FAREWELL_SECONDS and len(_departed()) < jax.process_count():
        time.sleep(POLL_SECONDS)


def end_if_joined(code: int) -> None:
    """Ends a process of several that has failed. An ordinary end would wait for the others, which wait for this one."""
    if jax.distributed.is_initialized():
        _end(code, "")


def _end(code: int, message: str) -> None:
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def require_agreement(config: Config) -> None:
    """Raises HostsError, in every process, where config, code, libraries or devices are not the same in all."""
    client, place, wait = _client(), jax.process_index(), 1000 * config.hosts.join_seconds
    own = json.dumps({"name": f"{place} ({socket.gethostname()})", "facts": facts(config)})
    client.key_value_set(f"{FACTS}/{place}", own)
    said = [json.loads(client.blocking_key_value_get(f"{FACTS}/{n}", wait)) for n in range(jax.process_count())]
    found = differences([one["name"] for one in said], [one["facts"] for one in said])
    if found:
        fix = "Start all processes with the same config, the same code and the same environment."
        raise HostsError(f"hosts: the processes are not the same. {'. '.join(found)}. {fix}")


def facts(config: Config) -> dict[str, str]:
    """What must be the same in every process, by name."""
    settings = {name: repr(value) for name, value in flat(config).items() if name not in PER_PROCESS}
    libraries = {name: version(name) for name in LIBRARIES}
    devices = jax.local_devices()
    return (
        settings
        | libraries
        | {
            "code of kardia_jax": code_fingerprint(),
            "python": platform.python_version(),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "devices of a process": f"{len(devices)} x {devices[0].device_kind}",
        }
    )


def code_fingerprint() -> str:
    """Of every source file of the package."""
    root = pathlib.Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def differences(names: Sequence[str], facts: Sequence[Mapping[str, str]]) -> list[str]:
    """Every fact that is not the same for all, with who says what.

    >>> differences(["0 (a)", "1 (b)", "2 (c)"], [{"grpo.group": "8"}, {"grpo.group": "8"}, {"grpo.group": "16"}])
    ['grpo.group: 8 on 0 (a), 1 (b); 16 on 2 (c)']
    """
    lines = []
    for field in dict.fromkeys(name for one in facts for name in one):
        by_value: dict[str, list[str]] = {}
        for who, one in zip(names, facts, strict=True):
            by_value.setdefault(one.get(field, "nothing"), []).append(who)
        if len(by_value) > 1:
            lines.append(f"{field}: " + "; ".join(f"{value} on {', '.join(who)}" for value, who in by_value.items()))
    return lines


def gathered(text: str) -> list[str]:
    """What every process says, in the order of processes; all of them must call it."""
    if alone():
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    room = max(BLOCK, 1 << int(sizes.max() - 1).bit_length())
    parts = multihost_utils.process_allgather(np.pad(data, (0, room - data.size)))
    return [part[:size].tobytes().decode() for part, size in zip(parts, sizes, strict=True)]


def anyone(flag: bool) -> bool:
    """Whether some process says yes; all of them must call it."""
    return flag if alone() else bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def require_one_folder(folder: pathlib.Path) -> None:
    """Raises HostsError, in every process, where they do not all see the same folder of the run."""
    if alone():
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".hosts-{gathered(secrets.token_hex(8))[0]}"
    if is_first():
        mark.touch()
    gathered("the mark is there")
    blind = [place for place, sees in enumerate(gathered("yes" if mark.is_file() else "no")) if sees == "no"]
    if is_first():
        mark.unlink()
    if blind:
        fix = "All processes write one checkpoint together: give a folder on a file system that they share."
        raise HostsError(f"run.dir: wanted a folder that all processes see, got {folder}, new to {blind}. {fix}")


def require_one_process(hosts: HostsConfig, verb: str) -> None:
    """Raises HostsError for a verb that several processes would each do as a whole, into the same files."""
    found = method(hosts, os.environ)
    if found != "alone":
        fix = "Start it once, outside of the job's processes; kardia sft and kardia grpo run in several."
        raise HostsError(f"hosts: wanted one process for kardia {verb}, got several ({found}). {fix}")


def require_same_step(step: int | None) -> None:
    """Raises HostsError, in every process, where they see different newest checkpoints."""
    seen = gathered(str(step))
    if len(set(seen)) > 1:
        fix = "The file system has not shown all of them the same files yet: start again."
        raise HostsError(f"run.dir: wanted one newest checkpoint for all processes, got steps {seen}. {fix}")


def most(number: int) -> int:
    """The largest number of all; all of them must call it."""
    return number if alone() else int(multihost_utils.process_allgather(np.int32(number)).max())


def _client() -> Any:
    """JAX's own store of keys and values, which Orbax opens up."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()
