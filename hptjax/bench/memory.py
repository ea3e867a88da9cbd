"""How much memory this process has held, and since when."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pathlib
import re
import resource
import sys

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
PEAK = "5"  # what clears the peak, and nothing else; see Linux, Documentation/filesystems/proc.rst


def peak_mib() -> float:
    """The most memory that this process has held, in MiB, since it began or since `forget_peak`.

    Linux's VmHWM where there is one: it counts as ru_maxrss does, but begins anew with the process, where ru_maxrss
    keeps what the parent held before it started this one.
    """
    with contextlib.suppress(OSError, IndexError):
        return int(re.findall(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)[0]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def forget_peak() -> bool:
    """Lets the peak begin anew at what is in use now; False where the system has no such thing.

    What compilation has freed, but the C library keeps for later, goes back to the system before; with another library
    than glibc it stays, and counts.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text(PEAK, encoding="ascii")
    except OSError:
        return False
    return True
