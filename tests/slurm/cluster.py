"""A real SLURM on this machine, for the time of the tests: munge, a controller and several nodes on loopback.

Nothing of the system's own configuration is read or touched, and no cgroups are used. What is set here and why:
cred_expire=5 (a requeued job would wait two minutes), NodeAddr and *NoInAddrAny (loopback only), one Port per node
(several slurmd on one host), /dev/null's likes as GPUs, partition "low" that is pre-empted by "high" with a requeue.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from launching import ROOT, free_port

DAEMONS = {name: shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("munged", "slurmctld", "slurmd")}
CONF = """
ClusterName=sltscale
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
BatchStartTimeout=120
KillWait=10
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=60
Waittime=0
UnkillableStepTimeout=20
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
{nodes}
PartitionName=low Nodes={names} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=3 MaxTime=60 State=UP
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=2000 Gres=gpu:2"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}


def missing() -> str | None:
    """Why no cluster can be started here, if none can."""
    absent = [name for name, path in DAEMONS.items() if path is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge; make test-slurm installs them)"
    return None if os.getuid() == 0 else "the daemons have to be started as root"


class Cluster:
    """``start`` it, use ``environment`` for every client command, ``stop`` it."""

    def __init__(self, nodes: int = 3, cpus: int = 2, *, environment: Mapping[str, str]) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets' paths have a limit
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self.environment = dict(environment) | {"SLURM_CONF": str(self.base / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/usr/bin"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for folder in ("munge", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.base / folder).mkdir(parents=True)
        self.base.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        nodes = [NODE.format(name=node, host=host, port=free_port(), cpus=self.cpus) for node in self.nodes]
        names = ",".join(self.nodes)
        text = CONF.format(host=host, port=free_port(), base=self.base, nodes="\n".join(nodes), names=names)
        (self.base / "slurm.conf").write_text(text)
        for number in range(2):
            os.mknod(self.base / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.base / "gres.conf").write_text(f"Name=gpu File={self.base}/gpu[0-1]\n")
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        munge = self.base / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._begin("munged", "--foreground", "--force", "--num-threads=2", f"--socket={munge}/socket", *files)
        wait_for(lambda: (munge / "socket").exists(), 120, "munged")
        self._begin("slurmctld", "-D")
        # A slurmd that finds none asks again after 1, 2, 4, ... seconds.
        wait_for(lambda: " UP" in self.run("scontrol", "ping").stdout, 120, "slurmctld", self.logs)
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.idle() == len(self.nodes), 120, "idle nodes", self.logs)

    def _begin(self, daemon: str, *options: str, name: str | None = None) -> None:
        log = (self.base / f"{name or daemon}.start").open("ab")
        self._daemons[name or daemon] = subprocess.Popen(
            [str(DAEMONS[daemon]), *options],
            env=self.environment,
            cwd=self.base,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def start_node(self, node: str) -> None:
        self._begin("slurmd", "-D", "-N", node, name=node)

    def cut_off(self, node: str) -> None:
        """Nothing is heard from it any more, but the processes of its jobs live on."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        self.set_node(node, "DOWN")

    def _kill_processes(self, node: str) -> None:
        """Of its jobs, and slurmstepd above them."""
        found = self.processes(node)
        above = {_parent(process) for process in found}
        for process in (*(parent for parent in above if _name(parent) == "slurmstepd"), *found):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def set_node(self, node: str, state: str) -> None:
        self("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    def revive(self, node: str) -> None:
        self._kill_processes(node)
        if node not in self._daemons:
            self.start_node(node)
        # Refused if it has come back by itself, as a node does whose slurmd speaks.
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        wait_for(lambda: self.idle() == len(self.nodes), 120, f"{node} to be back", self.logs)

    def processes(self, node: str, job: str | None = None) -> list[int]:
        """Processes that a job has started on that node, batch shell and its children included, eldest first."""
        wanted = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        wanted |= {f"SLURM_JOB_ID={job}"} if job else set()
        return sorted(pid for pid, variables in _environments() if wanted <= variables)

    def ranks(self, job: str) -> dict[int, int]:
        """Rank -> process id, of the step that is running."""
        own = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        found: dict[int, int] = {}
        for pid, variables in _environments():
            if {own, f"SLURM_JOB_ID={job}", f"SLURM_TASK_PID={pid}"} <= variables and _is_step(variables):
                rank = next(v for v in variables if v.startswith("SLURM_PROCID="))
                found[int(rank.partition("=")[2])] = pid
        return found

    def node_of(self, job: str, rank: int) -> str:
        """The node on which that rank of the running step is."""
        variables = (Path("/proc") / str(self.ranks(job)[rank]) / "environ").read_bytes().decode().split("\0")
        return next(v.partition("=")[2] for v in variables if v.startswith("SLURMD_NODENAME="))

    def __call__(self, *command: str | Path, cwd: Path = ROOT, seconds: float = 300) -> str:
        """The output of a client command; AssertionError if it fails."""
        done = self.run(*command, cwd=cwd, seconds=seconds)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run(self, *command: str | Path, cwd: Path = ROOT, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def idle(self) -> int:
        return len(self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").stdout.split())

    def submit(self, *arguments: str | Path, cwd: Path = ROOT) -> str:
        """sbatch with these arguments; the job's id."""
        return self("sbatch", "--parsable", *arguments, cwd=cwd)

    def show(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, Reason, ExitCode and so on."""
        text = self("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, seconds: float, log: Path | None = None) -> dict[str, str]:
        """Until the job has ended for good; what it was then."""
        wait_for(
            lambda: self.show(job)["JobState"] in ENDED and not self._completing(job),
            seconds,
            f"the end of job {job}",
            lambda: f"{self.show(job)}\n{log.read_text()[-6000:] if log is not None and log.exists() else ''}",
        )
        return self.show(job)

    def _completing(self, job: str) -> bool:
        return "COMPLETING" in self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.base.glob("*.log"))

    def stop(self) -> None:
        self.run("scancel", "--user", "root")
        for _ in range(50):
            if not any(self.processes(node) for node in self.nodes):
                break
            time.sleep(0.2)
        for node in self.nodes:
            self._kill_processes(node)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.base, ignore_errors=True)


def wait_for(condition: Callable[[], object], seconds: float, what: str, about: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}\n{about()}"
        time.sleep(0.1)


def _environments() -> Iterator[tuple[int, set[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                content = (folder / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            yield int(folder.name), set(content.split("\0"))


def _is_step(variables: set[str]) -> bool:
    return any(variable.startswith("SLURM_STEP_ID=") for variable in variables)


def _parent(process: int) -> int:
    """0 if the process is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""
