"""Seconds and peak memory of a piece of work, for the benchmarks beside this file.

On a CPU memory is the resident size of this process (Linux, glibc), which tells the truth only while freed memory goes
back to the system: ask for all memory first, then for times.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3  # malloc.h
glibc = ctypes.CDLL(None)
glibc.mallopt(M_MMAP_THRESHOLD, 2**16)  # larger blocks are the system's, and go back to it one by one


def peak_mib(work: Callable[[], object]) -> float:
    """The most memory (MiB) that one call holds beyond what was held before: the GPU's where there is one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        work()
        return torch.cuda.max_memory_allocated() / 2**20 - before
    glibc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def seconds(work: Callable[[], object]) -> float:
    """On the clock, of one call."""
    glibc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it goes to by itself
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _resident(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024
