"""The number of loader processes: `choose_workers`."""

import logging
import multiprocessing
import os
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

_MAX_WORKERS = 16
_IMAGES_OF_WORKER = 1024  # fewer are read before more processes have started
_CGROUP = Path("/sys/fs/cgroup")


def choose_workers(given: int | None, images: int) -> int:
    """Return the number of loader processes of this rank.

    Without a given number, the ranks of this machine share its CPUs, and a few images get no process. Where a process
    imports everything again, as on macOS and Windows, it is 0.

    Args:
        given: The number that was set.
        images: Images to load.
    """
    if given is not None:
        if given > 0:
            _warn_of_many(given)
        return given
    if (multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]) != "fork":
        return 0
    share = available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(share, _MAX_WORKERS, images // _IMAGES_OF_WORKER)


def available_cpus() -> int:
    """Return the number of CPUs that this process may use: of its affinity, and of the quota of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpus, _quota())))


def _quota() -> float:
    """Return the CPUs of the quota of this container, of either version of cgroups; infinite without one."""
    files = [[_CGROUP / "cpu.max"], [_CGROUP / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]]
    for parts in files:
        try:
            words = " ".join(file.read_text(encoding="utf-8") for file in parts).split()
        except OSError:
            continue
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():  # "max", or -1, is no quota
            return int(words[0]) / int(words[1])
    return float("inf")


@cache
def _warn_of_many(given: int) -> None:
    """Log once that there are more loader processes than CPUs."""
    if given > available_cpus():
        logger.warning(f"data.num_workers {given}: this process may use {available_cpus()} CPUs; more may be slower")
