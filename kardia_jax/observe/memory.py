"""Peaks of memory: of this process on the host (Linux), and of a device where its allocator counts.

reset_peak_rss()
work()
peak_rss()          # bytes: most resident memory since the reset, or since the start where a reset is refused
"""

import pathlib

import jax

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def peak_rss() -> int:
    """Most resident memory that this process has had, bytes. Source: proc(5), VmHWM."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak_rss() -> bool:
    """Starts the peak again from what is resident now; False where the system does not allow it.

    Source: proc(5), clear_refs, value 5.
    """
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_device_bytes() -> int | None:
    """Most memory that was in use on the first device since the process began, bytes; None where nobody counts."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
