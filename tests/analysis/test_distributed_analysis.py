"""Two processes find what one finds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import numpy as np
import pytest


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def found_by(world, photos):
    words = ["analyze", "-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=3"]
    words += ["--data", str(photos), "--limit", "5", "--json", "--null-images", "2", "-b", "2", "-q", "--device", "cpu"]
    torchrun = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={world}",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
    ]
    start = [*torchrun, "-m", "collapse_probe"] if world > 1 else ["-m", "collapse_probe"]
    done = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_processes_agree_with_one(photos):
    one, two = found_by(1, photos), found_by(2, photos)
    assert (one["run"]["world_size"], two["run"]["world_size"]) == (1, 2)
    assert one["data"] == two["data"]
    assert one["summary"] == pytest.approx(two["summary"], abs=1e-3)  # kappa here divides by 1e-3 and less
    for name, metric in one["metrics"].items():
        for part in ("values", "stderr", "ci95"):
            mine, other = (np.array(found["metrics"][name][part], dtype=float) for found in (one, two))
            assert mine == pytest.approx(other, abs=1e-5, nan_ok=True), (name, part)
        for null, value in metric["nulls"].items():
            if isinstance(value, list):
                other = np.array(two["metrics"][name]["nulls"][null], dtype=float)
                within = 1e-3 if null.startswith("kappa") else 1e-5
                assert np.array(value, dtype=float) == pytest.approx(other, abs=within, nan_ok=True), (name, null)
