"""The processors that this process may use: fewer than there are under taskset, a batch system or a container."""

from __future__ import annotations

import os


def processors() -> list[int]:
    """Their numbers; where the system does not say (macOS, Windows), all there are."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def affinity() -> str:
    """The same, as 0-3,8."""
    runs: list[list[int]] = []
    for cpu in processors():
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
