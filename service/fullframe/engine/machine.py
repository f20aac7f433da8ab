"""What this process may use of its machine: cores and memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def available_memory(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """Bytes of the machine, or of the tightest control group that this process is in, such as a container's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(cgroups, own)])


def _limits(cgroups: Path, own: Path) -> Iterator[int]:
    """Of the groups from this process's up to the root, in either version of the interface."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, file = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
        # Inside a container the path may be the host's, of which only the end is mounted: the root is its own.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (limit := _read(folder / file).strip()).isdecimal():
                yield int(limit)
            if folder == root:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
