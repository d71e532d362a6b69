"""How the processes of one run find each other."""

from dataclasses import dataclass
from typing import Literal

from kardia_jax.config.errors import require


@dataclass(frozen=True)
class HostsConfig:
    """One run in several processes: on several hosts, or one for each GPU. All of them are started with the same
    command; what each of them is, the cluster says, or `coordinator`, `processes` and `process` do."""

    cluster: Literal["auto", "alone", "slurm", "gketpu", "gcetpu", "ompi", "k8s"] = "auto"
    """Who says how many processes there are and which one this is: a step of SLURM (`srun`), a TPU slice on GKE, a
    Cloud TPU slice, Open MPI, or Kubernetes (an indexed job; needs the package `kubernetes`). auto: slurm, gketpu or
    ompi where the environment names several processes, else one process alone. Not read with `coordinator`."""
    coordinator: str = ""
    """HOST:PORT of process 0, which listens there; the other processes must reach it. Also `--coordinator`."""
    processes: int = 1
    """Processes in all, with `coordinator`. Also `--processes`."""
    process: int = 0
    """Which of them this is, from 0 on, with `coordinator`. Also `--process`."""
    join_seconds: int = 300
    """How long the processes wait for each other at the start."""
    heartbeat_seconds: int = 60
    """After how long without a sign of life a process counts as dead, and the others stop."""

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        named = not self.coordinator or (bool(host) and port.isdigit() and 0 < int(port) < 2**16)
        require(named, "hosts.coordinator", "HOST:PORT, like 10.0.0.2:8476", self.coordinator)
        require(self.processes >= 1, "hosts.processes", "at least 1", self.processes)
        fix = "Name process 0 with hosts.coordinator, or let hosts.cluster find the processes."
        require(self.processes == 1 or (named and bool(host)), "hosts.processes", "1 alone", self.processes, fix)
        inside = 0 <= self.process < self.processes
        require(inside, "hosts.process", f"0 to {self.processes - 1}, below hosts.processes", self.process)
        require(self.join_seconds >= 1, "hosts.join_seconds", "at least 1", self.join_seconds)
        require(self.heartbeat_seconds >= 1, "hosts.heartbeat_seconds", "at least 1", self.heartbeat_seconds)
