"""The benchmarks run, count as arithmetic says, and the ways of others that stand in the table find what we find."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from subjects import CASES, H100, H200, floor_operations, floor_seconds, sizes_of
from variants import DEFAULT, PEERS, Variants

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("label", "forward", "entries", "logits", "gram", "patches"),
    [("S/16", 9.2, 2.79, 0.36, 0.067, 0.38), ("B/16", 35.1, 5.59, 0.72, 0.134, 0.77), ("S/16@1024", 486, 1209, 155, 29, 168)],
)
def test_sizes_are_those_of_the_models(label, forward, entries, logits, gram, patches):
    sizes = sizes_of(CASES[label])
    found = (sizes.forward_flops, sizes.logits_flops, sizes.gram_flops, sizes.patch_flops)
    assert np.array(found) / 1e9 == pytest.approx([forward, logits, gram, patches], rel=0.02)
    assert sizes.entries / 1e6 == pytest.approx(entries, rel=0.01)


def test_the_floor_is_what_was_counted_by_hand():
    base, small = sizes_of(CASES["B/16"]), sizes_of(CASES["S/16"])
    assert 1 + floor_seconds(base, H100) / 150e-6 == pytest.approx(1.08, abs=0.01)  # 150 and 60 µs an image are assumed
    assert 1 + floor_seconds(small, H200) / 60e-6 == pytest.approx(1.10, abs=0.02)
    assert floor_operations(small) == pytest.approx(1 + (0.36 + 2 * 0.067 + 0.38) / 9.2, abs=0.002)


@pytest.mark.parametrize("peer", ["timm AttentionExtract + NumPy", "hooks that store + torch"])
def test_others_find_the_similarity_that_we_find(peer):
    variants = Variants(CASES["tiny"], CPU, None)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    variants.job(DEFAULT)(images)
    run = variants.runs[DEFAULT]
    ours = run.results(run.table())["attention-similarity"].values
    assert np.asarray(PEERS[peer](variants)(images)) == pytest.approx(ours, abs=2e-6)


def test_the_table_is_printed():
    words = ["benchmarks/overhead.py", "--models", "tiny", "--rounds", "1", "--no-memory", "--no-process", "--no-everything"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for row in ("plain ", "capture ", "default analysis ", "default analysis, ends included ", "floor, by operations ", *PEERS):
        assert f"  {row}" in done.stdout
