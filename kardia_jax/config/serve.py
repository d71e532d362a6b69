"""What ``kardia judge serve`` is told beside the judge itself."""

import ipaddress
from dataclasses import dataclass

from kardia_jax.config.errors import require, require_variable


@dataclass(frozen=True)
class ServeConfig:
    """Where the judge listens, and how much it takes on."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback a token is required."""
    port: int = 8600
    """TCP port; 0: any free one."""
    token_env: str = "KARDIA_JUDGE_TOKEN"
    """Environment variable with the bearer token. Where it is set, every client needs it; the token itself stands in no
    config."""
    max_batch: int = 256
    """Completions in one request."""
    max_body_mb: float = 16.0
    """Size of one request's body, in MB."""
    max_waiting: int = 4096
    """Completions taken on and not answered yet; beyond it clients get 503 and Retry-After."""
    score_seconds: float = 600.0
    """Longest time for one request; what has no verdict by then is a failure."""
    drain_seconds: float = 30.0
    """After SIGTERM or Ctrl-C, requests in flight may take so long to finish."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", "a TCP port, or 0 for any free one", self.port)
        require_variable("token_env", self.token_env)
        for name in ("max_batch", "max_waiting"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("max_body_mb", "score_seconds", "drain_seconds"):
            require(0 < getattr(self, name) < float("inf"), name, "a finite number above 0", getattr(self, name))
        fix = "A larger request would never be taken."
        require(
            self.max_batch <= self.max_waiting,
            "max_batch",
            f"at most max_waiting = {self.max_waiting}",
            self.max_batch,
            fix,
        )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # another name: whoever it resolves to
            return False
