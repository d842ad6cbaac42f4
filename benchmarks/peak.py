"""The peak memory of this process; each side of a comparison imports it when its work is done."""

import sys
from pathlib import Path


def peak() -> float:
    """The largest resident set so far, in MB of 2**20 bytes."""
    if sys.platform == "linux":
        # Not ru_maxrss: on Linux it begins with the parent's.
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
