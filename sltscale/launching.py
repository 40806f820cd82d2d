"""Which rank this process is, from the launcher that started it: srun, torchrun, deepspeed, or none. No MPI.

    srun        SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, the first node of SLURM_STEP_NODELIST; port by job id
    others      RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT

Variables that another job or launcher has left behind would make a process wait for ranks that nobody starts; what
gives them away is refused.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product

import psutil

from sltscale.errors import InputError

# Below the ports that Linux hands out by itself (32768 on), above those of common services.
FIRST_PORT, PORTS = 20011, 12007
OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_TASK_PID"),
)


@dataclass(frozen=True)
class Place:
    """This process among the ranks. local_*: among those of its node. nodes: of all ranks, cpus: of this one, where the
    launcher says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    launcher: str
    nodes: tuple[str, ...] = ()
    cpus: int | None = None

    def variables(self) -> dict[str, str]:
        """As the other launchers set them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def place(environment: Mapping[str, str], ancestors: Collection[int]) -> Place:
    """ancestors: ids of this process and those above it. InputError, naming the variables, if the environment is that
    of another job or launcher, or holds only part of what a launcher sets."""
    if environment.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return _of_a_launcher(environment)
    if "SLURM_STEP_ID" in environment:
        return _of_a_step(environment, ancestors)
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environment and tasks != "1":
        raise InputError(
            f"SLURM's variables say {tasks} tasks of job {environment['SLURM_JOB_ID']}, but srun has not started this "
            "process; start it by srun (slurm/train.sbatch does), or, outside of that job, first: unset ${!SLURM_@}"
        )
    return Place(0, 1, 0, 1, "127.0.0.1", 0, "none")


@functools.cache
def here() -> Place:
    """The place of this process; from then on its environment says so as torch.distributed and DeepSpeed expect it."""
    found = place(os.environ, {os.getpid(), *(process.pid for process in psutil.Process().parents())})
    os.environ.update(found.variables())
    return found


def _of_a_launcher(environment: Mapping[str, str]) -> Place:
    missing = [name for name in OTHERS if name not in environment]
    if missing:
        there = ", ".join(f"{name}={environment[name]}" for name in OTHERS if name in environment)
        raise InputError(
            f"{there} set, but not {', '.join(missing)}; start through srun, torchrun or deepspeed, which set all, or "
            f"for a single process first: unset {' '.join(OTHERS)}"
        )
    rank, world_size, local_rank = (_number(environment, name) for name in OTHERS[:3])
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), "WORLD_SIZE")
    if rank >= world_size:
        raise InputError(f"RANK={rank}, WORLD_SIZE={world_size}; expected a rank below the number of ranks")
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environment else 1
    if tasks > world_size:
        raise InputError(
            f"RANK={rank} and WORLD_SIZE={world_size} are set in a step of {tasks} tasks of SLURM job "
            f"{environment.get('SLURM_JOB_ID')}: left over from another launcher; before srun: unset {' '.join(OTHERS)}"
        )
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
    address, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
    return Place(rank, world_size, local_rank, _number(environment, local), address, port, launcher)


def _of_a_step(environment: Mapping[str, str], ancestors: Collection[int]) -> Place:
    missing = [name for name in STEP if not environment.get(name)]
    if missing:
        raise InputError(
            f"SLURM_STEP_ID={environment['SLURM_STEP_ID']} set, but not {', '.join(missing)}: no task of srun, but "
            "left over from a job; outside of one first: unset ${!SLURM_@}"
        )
    job, task = environment["SLURM_JOB_ID"], _number(environment, "SLURM_TASK_PID")
    if task not in ancestors:
        raise InputError(
            f"SLURM's variables are those of job {job}, but this process does not descend from its task (process "
            f"{task}): left over from that job; outside of it first: unset ${{!SLURM_@}}. In a container: run it "
            "without process ids of its own"
        )
    rank, world_size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
    nodes = expand(environment["SLURM_STEP_NODELIST"])
    tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    node = _number(environment, "SLURM_NODEID")
    if rank >= world_size or sum(tasks) != world_size or len(tasks) != len(nodes) or node >= len(nodes):
        raise InputError(
            f"SLURM's variables contradict each other: task {rank} of {world_size} on node {node} of "
            f"{environment['SLURM_STEP_NODELIST']} with {environment['SLURM_STEP_TASKS_PER_NODE']} tasks; "
            "outside of a job first: unset ${!SLURM_@}"
        )
    return Place(
        rank,
        world_size,
        _number(environment, "SLURM_LOCALID"),
        tasks[node],
        environment.get("MASTER_ADDR") or nodes[0],
        port_of(int(job), int(environment.get("SLURM_RESTART_COUNT", "0")), _number(environment, "SLURM_STEP_ID")),
        "srun",
        nodes,
        _cpus(environment, tasks[node]),
    )


def _cpus(environment: Mapping[str, str], tasks: int) -> int | None:
    """Not every cluster ties tasks to their CPUs, so that the process would see all of the node's."""
    if "SLURM_CPUS_PER_TASK" in environment:
        return _number(environment, "SLURM_CPUS_PER_TASK")
    return _number(environment, "SLURM_CPUS_ON_NODE") // tasks if "SLURM_CPUS_ON_NODE" in environment else None


def port_of(job: int, restart: int = 0, step: int = 0) -> int:
    """Where the ranks of a step meet. Jobs whose ids are less than some thousands apart (every element of an array has
    its own) never share a port, nor does a job with its own earlier start, of which a rank may still be alive."""
    return FIRST_PORT + (job + 2003 * restart + 4001 * step) % PORTS


def expand(nodelist: str) -> tuple[str, ...]:
    """Every host of a list as SLURM writes it: "n[1-3,07],m2" -> n1, n2, n3, n07, m2."""
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        pieces = [
            _numbers(piece[1:-1]) if piece[0] == "[" else [piece] for piece in re.findall(r"\[.*?\]|[^\[]+", item)
        ]
        hosts += map("".join, product(*pieces))
    return tuple(hosts)


def _numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def _tasks_per_node(text: str) -> list[int]:
    """ "2(x3),1" -> 2, 2, 2, 1."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}; expected a number, as a launcher sets it")
    return int(text)
