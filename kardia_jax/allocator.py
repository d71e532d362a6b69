"""What becomes of host memory that a program frees: on a CPU it is kept for the next one.

XLA's programs for a CPU take their temporaries, gigabytes in an update, from the C library and free them at their end.
glibc gives blocks of that size back to the system, and every update then waits for a million new pages to be cleared.
"""

import ctypes
import os
import platform

from kardia_jax.platforms import only_cpu

# Parameters of glibc's mallopt, malloc.h. One arena, since only the first can grow to any size; no blocks of their own
# for what is large; nothing handed back; grown by 256 MiB at a time.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
KEEPING = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 2**28}

OWN_ALLOCATOR = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
"""With any of these somebody has chosen already."""


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, where programs run on a CPU with glibc and nobody has chosen otherwise.

    For the start of a process: threads that have memory of their own already go on as before. The process stays as
    large as it has ever been.
    """
    if only_cpu() and platform.libc_ver()[0] == "glibc" and not any(map(os.environ.get, OWN_ALLOCATOR)):
        libc = ctypes.CDLL(None)
        for parameter, value in KEEPING.items():
            libc.mallopt(parameter, value)
