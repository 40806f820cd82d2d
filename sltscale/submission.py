"""Job scripts for SLURM: slurm/*.sbatch with the site's settings and a job's options written into them, and sbatch.

The scripts in slurm/ run as they are. Rendering one adds what would otherwise stand on sbatch's command line and in
slurm/site.env, so that the job depends on nothing that may have changed by the time it starts, or starts again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sltscale.errors import InputError
from sltscale.recipe_files import nearest

CHECKOUT = Path(__file__).parents[1]
Script = Literal["train", "sweep", "shards", "evaluate"]
# sbatch itself reads these from its environment, so that the site file also serves those who call it directly.
SBATCH_OPTIONS = {
    f"SBATCH_{name}": option
    for name, option in {
        "ACCOUNT": "account",
        "PARTITION": "partition",
        "QOS": "qos",
        "CONSTRAINT": "constraint",
        "RESERVATION": "reservation",
        "TIMELIMIT": "time",
        "OUTPUT": "output",
        "CPUS_PER_GPU": "cpus-per-gpu",
        "MEM_PER_GPU": "mem-per-gpu",
        "MEM_PER_CPU": "mem-per-cpu",
        "MEM_PER_NODE": "mem",
        "EXCLUSIVE": "exclusive",
    }.items()
}
SETTINGS = ("MODULES", "VENV", "CONTAINER", "SRUN_OPTIONS", "MASTER_ADDR", "MAX_REQUEUES")
# Of the libraries' own variables, these families.
FAMILIES = ("NCCL_", "GLOO_", "FI_", "UCX_", "HF_", "CUDA_", "TORCH_", "OMP_")
TIME = re.compile(r"\d+(:\d\d(:\d\d)?)?|\d+-\d+(:\d\d(:\d\d)?)?")


@dataclass(frozen=True)
class Site:
    """What a cluster wants of every job: the keys of slurm/site.env.example, with their values."""

    values: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What one submission asks for. ``arguments`` are those of the script; None leaves an option to site and script.

    processes: per node, one for each GPU where ``gpus`` is true. cpus: per process. array: as sbatch has it
    ("0-7%2"). dependency: as sbatch has it ("afterok:12").
    """

    name: str
    arguments: tuple[str, ...]
    nodes: int = 1
    processes: int = 1
    gpus: bool = False
    cpus: int | None = None
    time: str | None = None
    array: str | None = None
    dependency: str | None = None
    max_requeues: int | None = None

    def options(self) -> dict[str, str]:
        """sbatch's options, without dashes."""
        options = {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.processes),
            "gpus-per-node": str(self.processes) if self.gpus else None,
            "cpus-per-task": None if self.cpus is None else str(self.cpus),
            "time": self.time,
            "array": self.array,
            "dependency": self.dependency,
        }
        return {option: value for option, value in options.items() if value is not None}


def read_site(path: Path | None) -> Site:
    """The site file, or slurm/site.env of the checkout if there is one. InputError, with the line, for unknown keys and
    for whatever a shell would not take literally: the job scripts source the same file."""
    if path is None:
        path = CHECKOUT / "slurm/site.env"
        if not path.is_file():
            return Site()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"site file {path} cannot be read ({error}); see slurm/site.env.example") from None
    values: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = re.fullmatch(r"""([A-Za-z_]\w*)=(?:'([^']*)'|"([^"$`\\]*)"|([\w@%+=:,./-]*))(?:\s+#.*)?\s*""", line)
        if parts is None:
            raise InputError(f"{where}: {line!r}; expected KEY=VALUE, VALUE in quotes if it has spaces, no $ or `")
        key, *quoted = parts.groups()
        known = [*SBATCH_OPTIONS, *SETTINGS]
        if key not in known and not key.startswith(FAMILIES):
            raise InputError(f"{where}: unknown key {key}; {nearest(key, known)}")
        if key in values:
            raise InputError(f"{where}: {key} is set a second time; remove one")
        values[key] = next(value for value in quoted if value is not None)
    return Site(values)


def render(script: Script, site: Site, job: Job) -> str:
    """slurm/SCRIPT.sbatch as a script of its own: what ``job`` wants counts, then the site, then the script's lines."""
    if job.time is not None and not TIME.fullmatch(job.time):
        raise InputError(f"--time {job.time!r}; expected minutes, HH:MM:SS or DAYS-HH:MM:SS")
    path = CHECKOUT / f"slurm/{script}.sbatch"
    try:
        shebang, *lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise InputError(f"{path} does not exist; jobs are submitted from a checkout of sltscale") from None
    wanted = {SBATCH_OPTIONS[key]: value for key, value in site.values.items() if key in SBATCH_OPTIONS}
    wanted |= job.options() | {"chdir": str(CHECKOUT)}
    header = [line for line in lines if line.startswith("#")]
    body = lines[len(header) :] if lines[: len(header)] == header else []
    if not body:
        raise InputError(f"{path} is not as rendering expects it: first comments and #SBATCH lines, then commands")
    kept = [line for line in header if _option(line) not in wanted]
    settings = {key: value for key, value in site.values.items() if key not in SBATCH_OPTIONS}
    if job.max_requeues is not None:
        settings["MAX_REQUEUES"] = str(job.max_requeues)
    return "\n".join(
        [
            shebang,
            *(line for line in kept if not line.startswith("#SBATCH")),
            *(_directive(option, value) for option, value in wanted.items()),
            *(line for line in kept if line.startswith("#SBATCH")),
            "export site_included=yes",
            *(f"export {key}={shlex.quote(value)}" for key, value in settings.items()),
            shlex.join(["set", "--", *job.arguments]),
            *body,
            "",
        ]
    )


def _option(line: str) -> str | None:
    found = re.match(r"#SBATCH --([a-z-]+)", line)
    return found[1] if found else None


def _directive(option: str, value: str) -> str:
    if "\n" in value or '"' in value:
        raise InputError(f"sbatch --{option} {value!r}: quotes and line breaks cannot stand in a job script")
    return f'#SBATCH --{option}="{value}"' if " " in value else f"#SBATCH --{option}" + (f"={value}" if value else "")


def check(text: str) -> str:
    """What sbatch --test-only says of a rendered script: where and when it could start. InputError if it is refused."""
    return _sbatch(text, "--test-only")


def submit(text: str) -> str:
    """Hand a rendered script to sbatch; the job's id. InputError, with sbatch's reason, if it is refused."""
    return _sbatch(text, "--parsable").partition(";")[0]


def has_cluster() -> bool:
    """Whether there is a SLURM controller to ask. Its commands may be installed where there is none."""
    if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
        return False
    return subprocess.run(["sinfo", "--noheader"], capture_output=True, check=False).returncode == 0  # noqa: S607


def _sbatch(text: str, *options: str) -> str:
    if shutil.which("sbatch") is None:
        raise InputError("no sbatch here; submit from a login node of the cluster, or look at the script by --dry-run")
    # sbatch's own variables, and those of a job that this may run in, would overrule what the script says.
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(("SBATCH_", "SLURM_", "SLURMD_", "SRUN_"))
    }
    done = subprocess.run(  # noqa: S603
        ["sbatch", *options],  # noqa: S607
        input=text,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    said = " ".join(line.removeprefix("sbatch: ") for line in (done.stdout + done.stderr).splitlines() if line)
    if done.returncode:
        raise InputError(f"sbatch refuses the job: {said.removeprefix('error: ')}; change what it names")
    return done.stdout.strip() or said
