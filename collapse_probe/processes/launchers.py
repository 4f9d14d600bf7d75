"""Which launcher started this process as one of several (torchrun, srun, mpirun), told from the environment without torch."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from collapse_probe.errors import SettingError

LOOPBACK = "127.0.0.1"
ANNOUNCING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIXES = ("TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "SLURM_PROCID", "SLURM_LOCALID")
FIRST_PORT, PORTS = 10000, 20000


@dataclass(frozen=True)
class Launch:
    """This process's place in a group of `world` processes, and the `host` and `port` at which the group meets.

    `job` differs between groups that might meet at one place. `agent` says that the launcher itself keeps the meeting place
    (torchrun); else the first process does.
    """

    launcher: str
    rank: int
    world: int
    local_rank: int
    host: str
    port: int
    job: str
    agent: bool = False

    @property
    def variables(self) -> dict[str, str]:
        """What torchrun would have set, which other libraries read."""
        places = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local_rank}
        return {**{name: str(n) for name, n in places.items()}, "MASTER_ADDR": self.host, "MASTER_PORT": str(self.port)}


def announced(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The group of processes that a launcher announces; None where this process is the only one.

    torchrun (accelerate launch, variables set by hand): RANK, WORLD_SIZE and MASTER_ADDR. mpirun: OMPI_COMM_WORLD_RANK. srun:
    SLURM_PROCID, with the number of tasks of the step; the shell of a batch job or of salloc is no step, whatever number of
    tasks the job has. Raises SettingError for numbers that are none, and where the place to meet cannot be known.
    """
    if "WORLD_SIZE" in environ and "RANK" in environ and "MASTER_ADDR" in environ:
        job = f"{environ.get('TORCHELASTIC_RUN_ID', '')}.{environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
        agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return _launch("torchrun" if agent else "WORLD_SIZE", ("RANK", "WORLD_SIZE", "LOCAL_RANK"), environ, job, agent)
    if "OMPI_COMM_WORLD_RANK" in environ and "OMPI_COMM_WORLD_SIZE" in environ:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        return _launch("mpirun", names, environ, environ.get("PMIX_NAMESPACE", "mpirun"))
    if "SLURM_PROCID" in environ and "SLURM_NTASKS" in environ and not _is_shell_of_job(environ):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        return _launch("srun", names, environ, f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}")
    return None


def _is_shell_of_job(environ: Mapping[str, str]) -> bool:
    """Whether this is the one process of a batch script or of salloc's shell, which has the variables of a task as well."""
    if environ.get("SLURM_STEP_NUM_TASKS") == "1":  # the shell of salloc is a step of one task; SLURM_NTASKS is the job's
        return True
    return environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ


def _launch(
    launcher: str, names: tuple[str, str, str], environ: Mapping[str, str], job: str, agent: bool = False
) -> Launch | None:
    numbers = {name: environ.get(name, "0") for name in names}
    for name, text in numbers.items():
        if not (text.isascii() and text.isdigit()):
            raise SettingError(f"{name}={text} is no number, and should tell this process's place among several; unset it")
    rank, world, local_rank = (int(text) for text in numbers.values())
    if world <= 1:
        return None
    if rank >= world:
        raise SettingError(f"{names[0]}={rank} is no place among {names[1]}={world} processes (0 to {world - 1})")
    port = environ.get("MASTER_PORT", "")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise SettingError(f"MASTER_PORT={port} is no port; expected a number from 1 to 65535")
    host = environ.get("MASTER_ADDR") or _first_host(launcher, world, environ)
    return Launch(
        launcher, rank, world, local_rank, host, int(port or FIRST_PORT + zlib.crc32(job.encode()) % PORTS), job, agent
    )


def _first_host(launcher: str, world: int, environ: Mapping[str, str]) -> str:
    """The machine of the first process."""
    if launcher == "mpirun":
        if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world):
            return LOOPBACK
        raise SettingError("mpirun does not say on which machine the first process is; set MASTER_ADDR to its name (mpirun -x)")
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environ[name] for name in names if environ.get(name)), LOOPBACK)
    first = first_node(nodes)
    return LOOPBACK if first == nodes else first


def first_node(nodes: str) -> str:
    """The first name in a list of nodes as Slurm writes it.

    >>> first_node("gpu[007-009,12],login1"), first_node("a1,b2"), first_node("rack[1-2]n[3,4]")
    ('gpu007', 'a1', 'rack1n3')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


@contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside the `with`, these environment variables are set; afterwards all are as they were."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def forget() -> None:
    """Take from the environment what announces a group: this process, started by one of the group, works alone."""
    for name in [name for name in os.environ if name in ANNOUNCING or name.startswith(PREFIXES)]:
        del os.environ[name]
