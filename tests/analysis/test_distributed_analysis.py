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


def torchrun(world):
    run = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", "--master-addr=127.0.0.1"]
    return [*run, f"--master-port={free_port()}"]


def found_by(world, photos):
    words = ["analyze", "-m", "timm:vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=3"]
    words += ["--data", str(photos), "--limit", "5", "--json=full", "--null-images", "2", "-b", "2", "-q", "--device", "cpu"]
    start = [*torchrun(world), "-m", "collapse_probe"] if world > 1 else ["-m", "collapse_probe"]
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


OWN_LOADERS = """
import sys, timm, torch
import collapse_probe as cp
from collapse_probe.distributed import joined, rank_and_world
with joined():
    rank = rank_and_world()[0]
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, dynamic_img_size=True)
    sides = [(48, 64), (48, 64 if sys.argv[1] == "alike" else 32)][rank]
    batches = [] if sys.argv[1] == "empty" and rank else [torch.randn(3, 3, *sides)]
    try:
        found = cp.analyze(model, iter(batches), metrics=("patch-diversity",), device="cpu")
        sys.stdout.write(f"{found.model['tokens']} {found.summary['images']}\\n")  # at once: two processes share the stream
    except cp.errors.DataError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("kind", "says"),
    [("empty", "13 3"), ("alike", "13 6"), ("other", "gave images [(3, 48, 32), (3, 48, 64)] (channels, height, width)")],
)
def test_own_loaders_of_two_processes_have_one_size(kind, says, tmp_path):
    script = tmp_path / "own.py"
    script.write_text(OWN_LOADERS)
    words = [sys.executable, *torchrun(2), str(script), kind]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.count(says) == 2, done.stdout + done.stderr
