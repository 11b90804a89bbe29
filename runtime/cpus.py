"""How many CPUs this process may really use: affinity and cgroup quota, not what the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int:
    """min(CPUs in the affinity mask, CPUs of the cgroup's quota, rounded up), at least 1.

    Reads cpu.max (cgroup v2) of the process's own group and of every group above it, and cpu.cfs_quota_us (v1).
    """
    counts = [float(len(os.sched_getaffinity(0)))]
    group = cgroup / _own_group(membership)
    for directory in (group, *group.parents):
        if directory != cgroup and cgroup not in directory.parents:
            break
        counts.append(_quota_v2(directory / "cpu.max"))
    counts.append(_quota_v1(cgroup / "cpu"))
    return max(1, math.ceil(min(counts)))


def _own_group(membership: Path) -> str:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:].lstrip("/") for line in lines if line.startswith("0::") and ".." not in line), "")


def _quota_v2(path: Path) -> float:
    try:
        quota, period = path.read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _quota_v1(directory: Path) -> float:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        return math.inf if quota <= 0 else quota / int((directory / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
