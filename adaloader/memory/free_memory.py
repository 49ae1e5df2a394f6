"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

# Where containers find their limits, and the files of a limit and of what is used: cgroup version 2, and 1.
_CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory")
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_bytes() -> int:
    """Return the memory available to this process without swapping, -1 if the system does not say."""
    available = [left for root in _CGROUPS if (left := _left_in_cgroup(Path(root))) is not None]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        available.append(int(line.split()[1]) * 1024)
    return min(available, default=-1)


def _left_in_cgroup(folder: Path) -> int | None:
    """Return what a container's limit leaves, counting cached files as free; None where there is no limit."""
    for limit_name, usage_name in _CGROUP_FILES:
        if (folder / limit_name).exists() and (folder / usage_name).exists():
            limit = (folder / limit_name).read_text().strip()
            if limit == "max":
                return None
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(statistics.get("active_file", 0)) + int(statistics.get("inactive_file", 0))
            return max(0, int(limit) - int((folder / usage_name).read_text()) + cached)
    return None
