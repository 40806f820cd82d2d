"""Which rank a process is: what each launcher sets, and what is refused because it is somebody else's."""

from __future__ import annotations

import os

import pytest

from sltscale.errors import InputError
from sltscale.launching import Place, expand, place, port_of

TASK = 4321  # the process that srun started
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "n[1-2,07]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASK_PID": str(TASK),
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}


def refused(environment: dict[str, str], ancestors: set[int]) -> str:
    with pytest.raises(InputError) as refusal:
        place(environment, ancestors)
    line = str(refusal.value)
    assert "\n" not in line
    return line


def test_nothing_is_one_process() -> None:
    assert place({}, set()) == Place(0, 1, 0, 1, "127.0.0.1", 0, "none")


def test_a_task_of_srun() -> None:
    found = place(STEP, {TASK, 1})
    assert found == Place(3, 5, 1, 2, "n1", port_of(77), "srun", ("n1", "n2", "n07"))
    assert place(STEP | {"SLURM_NODEID": "2", "SLURM_PROCID": "4"}, {TASK}).local_world_size == 1
    assert place(STEP | {"MASTER_ADDR": "10.0.0.1"}, {TASK}).address == "10.0.0.1"


def test_cpus_of_a_task() -> None:
    assert place(STEP | {"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "16"}, {TASK}).cpus == 6
    assert place(STEP | {"SLURM_CPUS_ON_NODE": "16"}, {TASK}).cpus == 8


def test_torchrun_and_deepspeed() -> None:
    assert place(TORCHRUN, set()) == Place(5, 8, 1, 4, "first", 29400, "torchrun")
    deepspeed = {name: value for name, value in TORCHRUN.items() if name[:5] not in ("LOCAL", "TORCH")}
    deepspeed |= {"LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    assert place(deepspeed, set()) == Place(5, 8, 1, 4, "first", 29400, "deepspeed")
    # Either may itself be the one task per node of a step.
    one_per_node = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert place(TORCHRUN | one_per_node, {TASK}).launcher == "torchrun"


def test_its_variables_are_those_of_the_other_launchers() -> None:
    variables = place(STEP, {TASK}).variables()
    again = place(variables, set())
    assert (again.rank, again.world_size, again.local_rank, again.local_world_size) == (3, 5, 1, 2)
    assert (again.address, again.port) == ("n1", port_of(77))


def test_variables_of_another_job() -> None:
    line = refused(STEP, {TASK + 1})
    assert "job 77" in line
    assert "unset ${!SLURM_@}" in line
    assert "left over" in refused({"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77"}, {TASK})
    assert "contradict" in refused(STEP | {"SLURM_PROCID": "5"}, {TASK})
    assert "contradict" in refused(STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, {TASK})
    assert "SLURM_LOCALID is 'x'" in refused(STEP | {"SLURM_LOCALID": "x"}, {TASK})


def test_several_tasks_without_srun() -> None:
    line = refused({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}, set())
    assert "4 tasks of job 77" in line
    assert "srun" in line
    # As in the job's own script, or salloc's shell, for one task.
    assert place({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1"}, set()).world_size == 1


def test_part_of_a_launcher() -> None:
    line = refused({"RANK": "1"}, set())
    assert "LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in line
    assert "expected a rank below" in refused(TORCHRUN | {"RANK": "8"}, set())
    assert "left over from another launcher" in refused(TORCHRUN | STEP | {"WORLD_SIZE": "2", "RANK": "1"}, {TASK})


def test_ports() -> None:
    """Jobs that may run at once share none, nor does a job with its next starts; none is in the system's range."""
    ports = [port_of(job) for job in range(10**6, 10**6 + 12007)]
    assert len(set(ports)) == len(ports)
    assert 20000 < min(ports) < max(ports) < 32768
    assert len({port_of(77, restart, step) for restart in range(6) for step in range(2)}) == 12


def test_expand() -> None:
    assert expand("n1") == ("n1",)
    assert expand("gpu-a[08-10],login,r[1-2]c[3,5]") == (
        *("gpu-a08", "gpu-a09", "gpu-a10", "login"),
        *("r1c3", "r1c5", "r2c3", "r2c5"),
    )


def test_this_process_is_among_its_ancestors() -> None:
    """What ``here`` hands on, in a process that srun would have started."""
    assert place(STEP | {"SLURM_TASK_PID": str(os.getpid())}, {os.getpid()}).launcher == "srun"
