"""Who is one of several processes, by what launchers leave in the environment, and who only looks like it."""

from __future__ import annotations

import os

import pytest

from collapse_probe.errors import SettingError
from collapse_probe.processes.launchers import announced, exported, first_node

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
BATCH_SHELL = {
    "ENVIRONMENT": "BATCH",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu07",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "a.b",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "launcher", "place", "host"),
    [
        (TORCHRUN, "torchrun", (1, 2, 1), "a.b"),
        (without(TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE", "LOCAL_RANK"), "WORLD_SIZE", (1, 2, 0), "a.b"),
        (STEP, "srun", (3, 4, 1), "gpu07"),
        ({**STEP, "ENVIRONMENT": "BATCH"}, "srun", (3, 4, 1), "gpu07"),  # srun in a batch script
        ({**STEP, "SLURM_STEP_NODELIST": "gpu07"}, "srun", (3, 4, 1), "127.0.0.1"),
        ({**STEP, "MASTER_ADDR": "boss"}, "srun", (3, 4, 1), "boss"),
        ({**STEP, "MASTER_ADDR": "boss", "WORLD_SIZE": "4"}, "srun", (3, 4, 1), "boss"),  # set by hand, the rank is srun's
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, "srun", (1, 2, 1), "127.0.0.1"),
        ({**STEP, **TORCHRUN}, "torchrun", (1, 2, 1), "a.b"),  # srun starts one torchrun a machine
        (MPIRUN, "mpirun", (1, 2, 1), "127.0.0.1"),
        ({**STEP, **MPIRUN}, "mpirun", (1, 2, 1), "127.0.0.1"),  # mpirun starts its daemons with srun
    ],
)
def test_one_of_several(variables, launcher, place, host):
    launch = announced(variables)
    assert launch is not None
    assert (launch.launcher, (launch.rank, launch.world, launch.local_rank), launch.host) == (launcher, place, host)
    assert launch.agent == (launcher == "torchrun")
    assert 0 < launch.port < 1 << 16


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
        {**STEP, **TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
        without(TORCHRUN, "RANK"),  # left over in a shell
        BATCH_SHELL,
        {**BATCH_SHELL, "SLURM_ARRAY_TASK_ID": "3"},
        without(STEP, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),  # salloc
        {**without(STEP, "SLURM_STEP_ID"), "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell on a node
        {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_the_only_one(variables):
    assert announced(variables) is None


def test_groups_meet_at_places_of_their_own():
    ports = {announced({**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).port for job in "123" for step in "01"}
    jobs = {announced({**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).job for job in "123" for step in "01"}
    assert len(ports) == len(jobs) == 6
    assert announced({**STEP, "MASTER_PORT": "1234"}).port == 1234


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK=x is no number"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2 is no place among WORLD_SIZE=2 processes (0 to 1)"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "set MASTER_ADDR"),
    ],
)
def test_numbers_that_cannot_be(variables, says):
    with pytest.raises(SettingError) as error:
        announced(variables)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,12],login1", "gpu007"),
        ("a1,b2", "a1"),
        ("rack[1-2]n[3,4]", "rack1n3"),
        ("n[5]-ib", "n5-ib"),
        ("one", "one"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


def test_variables_are_put_back(monkeypatch):
    monkeypatch.setenv("RANK", "before")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with exported(announced(TORCHRUN).variables):
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")
    assert os.environ["RANK"] == "before"
    assert "WORLD_SIZE" not in os.environ
