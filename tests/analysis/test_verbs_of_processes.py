"""What compare, intervene and sweep find in two processes, and write and print once, is what one process finds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

COMPARE = "compare ours:digits-tied-mhsa ours:digits-tied-re-attention --limit 9 --null-images 2 --cka"
INTERVENE = (
    "intervene -m ours:digits-tied-mhsa --limit 9 --replace mean --replace donor --drop block --prefix mean --sinks redirect "
    "--blocks 20-23"
)
SWEEP = (
    "sweep digits-quick --vary depth=2,3 --vary fix=none,re-attention --set width=16 --set heads=2 --set batch_size=8 "
    "--steps 4 --limit 12 --null-images 0"
)
TOLD_APART = {"created", "command", "id", "run", "seconds", "images_per_second", "peak_memory_bytes", "world_size"}
TOLD_APART |= {"train_seconds", "measure_seconds", "cost"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(words, world):
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={free_port()}"]
    return [sys.executable, *(torchrun if world > 1 else []), "-m", "collapse_probe", *words, "--device", "cpu"]


def found(words, world, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command(words, world), "-o", str(folder)], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    return done.stdout.replace(str(folder), "")


def leaves(value, at=()):
    if not isinstance(value, (dict, list)):
        return {at: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, part in parts if name not in TOLD_APART for key, leaf in leaves(part, (*at, name)).items()}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        pytest.param(COMPARE, "comparison.json", marks=pytest.mark.slow),
        (INTERVENE, "interventions.json"),
        pytest.param(SWEEP, "sweep.json", marks=pytest.mark.slow),
    ],
    ids=["compare", "intervene", "sweep"],
)
def test_two_processes_find_what_one_finds(words, name, tmp_path):
    words = words.split() + ([] if words is SWEEP else ["--data", "bundled:digits"])
    one, two = (found(words, world, tmp_path / str(world)) for world in (1, 2))
    assert one == two
    first, second = (leaves(json.loads((tmp_path / str(world) / name).read_text())) for world in (1, 2))
    assert first.keys() == second.keys()
    for key, value in first.items():
        near = pytest.approx(value, rel=1e-6, abs=1e-8) if isinstance(value, float) else value  # float32, in other batches
        assert second[key] == near, key


@pytest.mark.slow
def test_a_sweep_of_which_a_process_was_killed_goes_on(tmp_path):
    folder = tmp_path / "sweep"
    words = [*SWEEP.replace("--steps 4", "--steps 300").split(), "-o", str(folder)]
    environment, port = {**os.environ, "OMP_NUM_THREADS": "1"}, str(free_port())
    processes = []
    for rank in "01":
        group = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command(words, 1), env={**environment, **group}, **pipes))
    try:
        while len(list(folder.glob("*/recipe.json"))) < 2 and processes[1].poll() is None:
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGKILL)
        out, err = processes[0].communicate(timeout=90)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1, (out, err)
    assert f"process {processes[1].pid}) is gone: it was killed" in err.splitlines()[-1]
    done = subprocess.run(command(words, 1), capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    assert [cell["status"] for cell in json.loads((folder / "sweep.json").read_text())["cells"]] == ["finished"] * 4
