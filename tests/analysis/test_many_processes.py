"""Real processes: shares of any size come together in a Probe, and parts made by other numbers of processes in a merge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distributed_analysis import torchrun
from test_probe import assert_same, model, names_of, pictures

import collapse_probe as cp

METRICS = (
    "attention-similarity",
    "attention-similarity@row",
    "image-similarity",
    "similar-blocks",
    "patch-diversity",
    "layer-cka",
)
TRIALS = 4
SHARES = """
import sys
sys.path[:0] = sys.argv[2:]
import numpy as np, torch, torch.distributed as dist
import collapse_probe as cp
from collapse_probe.errors import StateError
from test_probe import model, names_of, pictures
from test_many_processes import METRICS, TRIALS, shares_of

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
for trial in range(TRIALS):
    own = shares_of(trial, world)[rank]
    probe = cp.Probe(model(), metrics=METRICS, null_images=0, gallery_images=1, device="cpu")
    for first in range(0, len(own), 1 + trial):
        some = own[first : first + 1 + trial]
        probe.update(pictures()[some], names_of(some))
    probe.all_reduce()
    assert probe.images == 24, probe.images
    try:
        probe.all_reduce()
    except StateError as error:
        assert "brought together before" in str(error)
    else:
        raise AssertionError("images counted twice")
    if rank == trial % world:
        probe.findings().save(f"{sys.argv[1]}/{trial}")
other = model()
with torch.no_grad():
    other.blocks[0].attn.qkv.weight.mul_(1 + rank)
probe = cp.Probe(other, metrics=METRICS, null_images=0, device="cpu")
probe.update(pictures()[rank::world])
try:
    probe.all_reduce()
except StateError as error:
    assert "measures something else: the weights" in str(error)
else:
    raise AssertionError("other weights were added")
dist.destroy_process_group()
"""


def shares_of(trial, world):
    """24 images in a random order, cut at random places: some shares may be empty, and in the first trial all but one are."""
    random = np.random.default_rng(trial)
    order, cuts = random.permutation(24).tolist(), np.sort(random.integers(0, 25, world - 1)).tolist()
    if not trial:
        cuts = [24] * (world - 1)
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, 24], strict=True)]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_uneven_and_empty_shares_of_processes_are_the_whole(world, tmp_path):
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    here = Path(__file__).parent
    words = [sys.executable, *torchrun(world), str(script), str(tmp_path), str(here), str(here.parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.manual_seed(0)
    whole = cp.Probe(model(), metrics=METRICS, null_images=0, gallery_images=1, device="cpu")
    whole.update(pictures(), names_of(range(24)))
    expected = whole.findings()
    for trial in range(TRIALS):
        assert_same(expected, cp.Findings.load(tmp_path / str(trial)))


WORDS = "analyze -m timm:vit_tiny_patch16_224 --no-pretrained --img-size 32 --model-kwargs depth=2 --data bundled:digits"
FLAGS = [*WORDS.split(), "--limit", "120", "--null-images", "8", "--device", "cpu", "-q", "--save-every", "0"]


def analysed(world, *words, check=True, **options):
    start = [*torchrun(world), "-m", "collapse_probe"] if world > 1 else ["-m", "collapse_probe"]
    return subprocess.run([sys.executable, *start, *FLAGS, *words], capture_output=True, text=True, check=check, **options)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_parts_by_three_numbers_of_processes_one_of_them_killed(tmp_path):
    parts = tmp_path / "parts"
    for number, world, size in ((1, 1, 3), (2, 2, 4), (3, 3, 5), (4, 1, 16), (5, 2, 1), (6, 3, 2), (8, 1, 7)):
        analysed(world, "--part", f"{number}/8", "-o", str(parts), "-b", str(size))
    words = [sys.executable, "-m", "collapse_probe", *FLAGS, "--part", "7/8", "-o", str(parts), "-b", "1"]
    run = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((parts / ".state").glob("part-7-of-8.*.safetensors")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (parts / "part-7-of-8.safetensors").exists()
    analysed(2, "--part", "7/8", "-o", str(parts), "--resume", "-b", "2")
    assert not (parts / ".state").exists()
    subprocess.run([sys.executable, "-m", "collapse_probe", "merge", str(parts), "-o", str(tmp_path / "out"), "-q"], check=True)
    analysed(1, "-o", str(tmp_path / "one"))
    one, eight = (cp.Findings.load(tmp_path / name) for name in ("one", "out"))
    assert json.loads((tmp_path / "out" / "findings.json").read_text())["data"]["images"] == 120
    of_a_run = {"batch_size": 0, "world_size": 0, "self_check": {}}
    assert_same(*(replace(found, run={**found.run, **of_a_run}) for found in (one, eight)))
