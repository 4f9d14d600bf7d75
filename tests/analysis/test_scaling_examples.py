"""The examples of docs/scaling.md, run as they stand there: each measures every image once, and finds what one probe finds."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import collapse_probe as cp
from collapse_probe.results.findings import Findings

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
LIBRARIES = {
    "torch alone, like a torchmetrics metric": "torch",
    "accelerate": "accelerate",
    "Lightning": "lightning",
    "Ray: actors": "ray",
    "Ray Data: `map_batches`": "ray",
    "webdataset": "webdataset",
    "Hugging Face datasets": "datasets",
}


def examples():
    """The first code under each heading of the third level; "mine.py" for the file that they share."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^### (.+?)\n(?:(?!^###).)*?^```python\n(.*?)^```", text, re.M | re.S)
    return {**dict(found), "mine.py": re.search(r"^```python\n(# mine\.py\n.*?)^```", text, re.M | re.S)[1]}


def command(example):
    """The command in an example's first line."""
    program, *words = shlex.split(re.match(r"# loop\.py: (.+?)(  .*)?\n", example)[1])
    if program == "torchrun":
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            words = ["-m", "torch.distributed.run", f"--master-port={s.getsockname()[1]}", *words]
    return [sys.executable, *words]


def run(folder, example):
    """The example run in a folder, beside mine.py."""
    (folder / "mine.py").write_text(examples()["mine.py"])
    (folder / "loop.py").write_text(example)
    own = {"HF_HOME": str(folder / "hf"), "RAY_USAGE_STATS_ENABLED": "0", "ACCELERATE_USE_CPU": "true"}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1])}
    return subprocess.run(command(example), cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def reference(mine, pictures):
    """What one probe finds of all images: those of mine.py, or the pictures by name."""
    probe = cp.Probe(mine["model"])
    if pictures is None:
        images = mine["Images"]()
        probe.update(*map(list_or_stack, zip(*(images[i] for i in range(len(images))), strict=True)))
    else:
        probe.update(torch.stack([mine["transform"](Image.open(path)) for path in pictures]), [path.stem for path in pictures])
    return probe.findings()


def list_or_stack(values):
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else list(values)


@pytest.fixture
def pictures(tmp_path):
    """Eleven pictures, in a folder and in four shards of a webdataset."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "shards").mkdir()
    noise = np.random.default_rng(0)
    paths = [tmp_path / "photos" / f"photo{i:02}.png" for i in range(11)]
    for path in paths:
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    for shard in range(4):
        with tarfile.open(tmp_path / "shards" / f"{shard:03}.tar", "w") as tar:
            for path in paths[shard::4]:
                tar.add(path, path.name)
    return paths


@pytest.mark.parametrize(
    "heading",
    [
        heading if library == "torch" else pytest.param(heading, marks=pytest.mark.slow)
        for heading, library in LIBRARIES.items()
    ],
)
def test_an_example_finds_what_one_probe_finds(heading, tmp_path, pictures):
    pytest.importorskip(LIBRARIES[heading])
    code = examples()
    done = run(tmp_path, code[heading])
    assert done.returncode == 0, done.stderr[-3000:]
    found = Findings.load(tmp_path / "out")
    mine = {}
    exec(code["mine.py"], mine)
    whole = reference(mine, pictures if heading in ("webdataset", "Hugging Face datasets") else None)
    if heading == "Hugging Face datasets":  # named by their pixels
        assert found.summary["images"] == len(pictures)
    else:
        assert set(found.images["names"]) == set(whole.images["names"])
        assert len(found.images["names"]) == whole.summary["images"]
    for name, value in whole.summary.items():
        assert found.summary[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_every_example_that_can_run_is_run():
    shown_only = {"DALI, mosaicml streaming, litdata", "mine.py"}
    assert examples().keys() - shown_only == LIBRARIES.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "right", "wrong"),
    [
        ("accelerate", "even_batches=False", "even_batches=True"),
        ("Lightning", "use_distributed_sampler=False", "use_distributed_sampler=True"),
        (
            "torch alone, like a torchmetrics metric",
            "sampler=range(rank, len(images), world)",
            "sampler=__import__('torch').utils.data.DistributedSampler(images)",
        ),
    ],
    ids=["accelerate", "Lightning", "torch"],
)
def test_a_sampler_that_repeats_images_is_refused(heading, right, wrong, tmp_path):
    pytest.importorskip(LIBRARIES[heading])
    example = examples()[heading]
    assert right in example
    if heading == "Lightning":  # which puts its sampler in the place of one that reads in order
        right, example = "use_distributed_sampler=False", example.replace(", sampler=share", "")
    done = run(tmp_path, example.replace(right, wrong))
    assert done.returncode != 0
    assert "has seen an image that another process has seen too: image" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_parts_of_an_array_of_jobs_are_merged(tmp_path):
    """The two bash blocks, with a smaller model and data."""
    first, second = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)[:2]
    small = {"vit_b_32": "ours:digits-tied-mhsa", "imagenet/val": "bundled:digits --limit 20 --null-images 2 --device cpu -q"}
    for words, replacement in {**small, "collapse-probe": f"{sys.executable} -m collapse_probe", "/8": "/2"}.items():
        first, second = first.replace(words, replacement), second.replace(words, replacement)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for script, task in ((first, "1"), (first, "2"), (second, "")):
        job = {**environment, "SLURM_ARRAY_TASK_ID": task, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=job, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert Findings.load(tmp_path / "findings").summary["images"] == 20
