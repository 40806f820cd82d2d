"""Packages, GPU and driver, the process group's library, DeepSpeed and the compile locks in torch's extension cache."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from sltscale.diagnosis.finding import Finding
from sltscale.engine.compile_lock import locks_left_behind
from sltscale.errors import InputError

DRIVER = Path("/proc/driver/nvidia/version")
BUSY_SHARE = 0.1  # of a GPU's memory that others may hold before it is said


def packages() -> Iterator[Finding]:
    """Are the packages there that sltscale requires, in versions that it takes?"""
    try:
        required = importlib.metadata.requires("sltscale") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "fault", "sltscale is not installed in this Python", "make setup, or pip install .")
        return
    amiss = []
    for requirement in map(Requirement, required):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                version = "absent"
            if version == "absent" or not requirement.specifier.contains(version, prereleases=True):
                amiss.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    if amiss:
        yield Finding("packages", "fault", ", ".join(amiss), "make setup, or pip install --upgrade . in this Python")
    else:
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("sltscale", "torch", "deepspeed"))
        yield Finding("packages", "ok", f"all that sltscale requires; {', '.join(versions)}")


def gpus() -> Iterator[Finding]:
    """Can torch use the GPUs of this machine? A machine without any is no fault."""
    built_for = torch.version.cuda
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            why = f"torch is built for CUDA {built_for}" if built_for else "torch is built for CPUs"
            yield Finding("GPU", "ok", f"CPU, no GPU: no NVIDIA driver on this machine, {why}")
        elif built_for is None:
            remedy = "install the torch build for CUDA"
            yield Finding("GPU", "fault", f"driver {driver}, but torch {torch.__version__} is built for CPUs", remedy)
        elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            yield Finding("GPU", "ok", f"CPU, no GPU: driver {driver}, but CUDA_VISIBLE_DEVICES hides its GPUs")
        else:
            yield Finding(
                "GPU",
                "fault",
                f"driver {driver}, but torch for CUDA {built_for} finds no GPU it can use",
                f"ask SLURM for GPUs (--gpus-per-node); else install a newer driver or torch for an older CUDA than "
                f"{built_for}",
            )
        return
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        torch.ones(8, device=torch.device("cuda", number)).sum().item()
        free, total = torch.cuda.mem_get_info(number)
        text = f"{number}: {name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, driver {driver or 'unknown'}"
        if free < (1 - BUSY_SHARE) * total:
            yield Finding("GPU", "warning", text, "see with nvidia-smi who holds the rest; end it or take another GPU")
        else:
            yield Finding("GPU", "ok", f"{text}, CUDA {built_for}")


def _driver() -> str | None:
    """Version of the NVIDIA kernel driver that is loaded."""
    try:
        found = re.search(r"\s(\d+\.[\d.]+)\s", DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else "unknown"


def process_group() -> Iterator[Finding]:
    """Does the library between the ranks start, alone and on this machine? NCCL for GPUs, gloo for CPUs."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    subject = "NCCL" if backend == "nccl" else "gloo"
    interfaces = psutil.net_if_addrs()
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    asked = [name for name in os.environ.get(variable, "").split(",") if name and name[0] not in "^="]
    if unknown := [name for name in asked if not any(known.startswith(name) for known in interfaces)]:
        found = f"{variable} names {', '.join(unknown)}, which this machine has not"
        yield Finding(subject, "fault", found, f"set it to one of {', '.join(sorted(interfaces))}, or unset it")
        return
    if dist.is_initialized():
        raise InputError("a process group is running in this process; run sltscale doctor by itself")
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1, device=device))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = f"this machine's name must resolve to an address of its own; or set {variable} to an interface"
        yield Finding(subject, "fault", f"does not start: {reason}", remedy)
        return
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else "of torch"
    yield Finding(subject, "ok", f"{version}, starts" + ("" if backend == "nccl" else " (what CPU ranks talk by)"))


def deepspeed() -> Iterator[Finding]:
    """Does it load? With this project's settings none of its C++ or CUDA ops is compiled (docs/engine.md)."""
    try:
        from sltscale.engine.deepspeed_engine import build_engine  # noqa: F401 - what training itself imports
    except Exception as error:  # it looks for compilers and libraries while it is imported
        reason = next(iter(str(error).splitlines()), "")
        yield Finding(
            "DeepSpeed", "fault", f"cannot be loaded: {type(error).__name__}: {reason}", "make setup installs it anew"
        )
        return
    yield Finding("DeepSpeed", "ok", f"{importlib.metadata.version('deepspeed')} loads; no op of its own is compiled")


def compile_locks() -> Iterator[Finding]:
    """Locks in torch's extension cache on which a start would wait for ever."""
    stale = locks_left_behind()
    for lock in stale:
        found = f"stale lock {lock}: its process is gone, and whoever compiles there waits for ever"
        yield Finding(
            "compile locks", "fault", found, f"start a training, which removes it, or rm {shlex.quote(str(lock))}"
        )
    if not stale:
        yield Finding("compile locks", "ok", "none left behind")
