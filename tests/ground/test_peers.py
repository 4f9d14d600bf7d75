"""When a process dies or fails, all others of its group end at once and say who it was; one that is slow is waited for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, signal, sys, time
from collapse_probe.distributed import check_processes, gathered, joined, rank_and_world
from collapse_probe.errors import CollapseProbeError

def work(rank, doing, way):
    print("begun", flush=True)
    if way:
        time.sleep(0.5)
        if way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "failed":
            raise ValueError("my own\\ntrouble")
        if way == "interrupted":
            raise KeyboardInterrupt
    if doing == "collecting":
        gathered(rank)
    if doing == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
    if doing == "resting":
        time.sleep(2)
    for _ in range(900 if doing not in ("collecting", "resting") else 0):
        time.sleep(0.1)
        if doing == "looking up":
            check_processes()

try:
    with joined():
        rank, world = rank_and_world()
        assert gathered(rank) == list(range(world))
        try:
            work(rank, sys.argv[1], sys.argv[2] if rank == int(sys.argv[3]) else "")
        finally:
            print("saved", flush=True)
        print("all", gathered({"rank": rank, "more": [0] * 100 * rank}), flush=True)
except CollapseProbeError as error:
    sys.exit(f"error: {error}")
assert signal.getsignal(signal.SIGURG) == signal.SIG_DFL
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def by_hand(rank, world, port):
    return {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def by_srun(rank, world, port):
    step = {"SLURM_JOB_ID": port, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": world, "SLURM_STEP_NODELIST": "localhost"}
    return {**step, "SLURM_NTASKS": world, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}


def started(tmp_path, world, *words, launcher=by_hand):
    program, port = tmp_path / "program.py", free_port()
    program.write_text(PROGRAM)
    processes = []
    for rank in range(world):
        variables = {name: str(value) for name, value in launcher(rank, world, port).items()}
        command = [sys.executable, str(program), *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, **pipes))
    return processes


def ended(processes):
    try:
        return [(process.communicate(timeout=90), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("launcher", [pytest.param(by_hand, marks=pytest.mark.slow), by_srun])
def test_processes_find_one_another(tmp_path, launcher):
    for (out, err), code in ended(started(tmp_path, 3, "collecting", "", 9, launcher=launcher)):
        assert code == 0, err
        assert "'rank': 2" in out


@pytest.mark.parametrize(
    ("doing", "way", "who", "says"),
    [
        ("collecting", "killed", 1, "is gone: it was killed"),
        ("computing", "killed", 0, "is gone: it was killed"),
        ("looking up", "failed", 1, "failed: ValueError: my own trouble"),
        pytest.param("collecting", "killed", 0, "is gone: it was killed", marks=pytest.mark.slow),
        pytest.param("computing", "killed", 1, "is gone: it was killed", marks=pytest.mark.slow),
        pytest.param("deaf", "killed", 2, "is gone: it was killed", marks=pytest.mark.slow),
        pytest.param("computing", "failed", 0, "failed: ValueError: my own trouble", marks=pytest.mark.slow),
        pytest.param("collecting", "failed", 1, "failed: ValueError: my own trouble", marks=pytest.mark.slow),
        pytest.param("computing", "interrupted", 1, "was interrupted", marks=pytest.mark.slow),
    ],
)
def test_all_end_and_say_who_ended_first(tmp_path, doing, way, who, says):
    processes = started(tmp_path, 3, doing, way, who)
    name = f"rank {who} of 3 (on {socket.gethostname()}, process {processes[who].pid})"
    for rank, ((out, err), code) in enumerate(ended(processes)):
        assert code not in (0, None), (rank, out, err)
        assert "all" not in out
        if rank != who:
            assert code == 1
            assert f"error: {name} {says}" in err.splitlines()[-1], (rank, err)
            assert ("saved" in out) == (doing != "deaf")


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_process_is_waited_for(tmp_path, who):
    processes = started(tmp_path, 2, "resting", "", 9)
    assert [process.stdout.readline() for process in processes] == ["begun\n"] * 2
    processes[who].send_signal(signal.SIGSTOP)
    time.sleep(6)
    processes[who].send_signal(signal.SIGCONT)
    for (out, err), code in ended(processes):
        assert code == 0, err
        assert "all" in out


def test_one_who_waits_in_vain_says_for_whom(tmp_path):
    from collapse_probe.processes.peers import JOIN_SECONDS

    program = tmp_path / "alone.py"
    program.write_text(f"import collapse_probe.processes.peers as peers\npeers.JOIN_SECONDS = 1\n{PROGRAM}")
    for rank, other in ((0, 1), (1, 0)):
        variables = {name: str(value) for name, value in by_srun(rank, 2, free_port()).items()}
        command = [sys.executable, str(program), "collecting", "", "9"]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=90)
        assert done.returncode == 1
        assert f"error: rank {rank} of 2 waited 1 s" in done.stderr
        assert f"for rank {other}: start all 2 processes (srun)" in done.stderr
        assert "unset SLURM_PROCID" in done.stderr
    assert JOIN_SECONDS >= 60
