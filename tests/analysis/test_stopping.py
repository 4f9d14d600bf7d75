"""Stopping at a narrow interval: in a random order, alike in all processes, and said in the findings."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from factories import noise_by_class, small_vit
from scipy import stats

import collapse_probe as cp
from collapse_probe.analysis.state import stopping
from collapse_probe.analysis.state.stopping import FEWEST, Stopper
from collapse_probe.data.images import batches, open_data, seeded_order
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.errors import SettingError

TINY = {"pretrained": False, "img_size": 32, "model_kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 3}, "device": "cpu"}
NAME = "timm:vit_tiny_patch16_224"
QUICK = {"null_images": 0, "gallery_images": 2, **TINY}


def kept(values):
    return {"names": np.arange(len(values)).astype(str), "patch-diversity": np.asarray(values, dtype=float)[:, None]}


def test_no_interval_is_believed_before_enough_images():
    stopper = Stopper(1.0, ["patch-diversity"])
    assert not stopper.enough(kept([0.5] * (FEWEST - 1)))
    assert stopper.enough(kept([0.5]))


def test_it_stops_at_the_first_narrow_interval():
    generator, stopper, seen = np.random.default_rng(0), Stopper(0.1, ["patch-diversity"]), []
    while True:
        new = generator.normal(size=16)
        seen += new.tolist()
        done = stopper.enough(kept(new))
        low, high = by_scipy(seen)
        assert done == (len(seen) >= FEWEST and (high - low) / 2 <= 0.1)
        if done:
            break
    assert stopper.facts(10_000)["images"] == len(seen)


def by_scipy(values):
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def test_a_run_without_headline_means_cannot_stop():
    with pytest.raises(SettingError, match="headline mean"):
        Stopper(0.1, ["token-norm"])


@pytest.fixture(scope="module")
def sorted_folder(tmp_path_factory):
    """Seventy pictures in two class folders, dark ones first."""
    return noise_by_class(tmp_path_factory.mktemp("sorted"), count=70, side=32)


def test_a_random_order_reads_the_same_pictures_and_knows_their_places(sorted_folder):
    images = open_data(str(sorted_folder))
    order = seeded_order(images, 3)
    assert sorted(order) == list(range(70))
    assert seeded_order(images, 3) == order != seeded_order(images, 4)
    prepare = Preprocess(lambda picture: torch.full((3, 8, 8), float(np.asarray(picture).mean())), (8, 8), {})
    straight = next(batches(images, prepare, batch_size=70)).pixels[:, 0, 0, 0]
    found = [list(batches(images, prepare, batch_size=8, order=order, rank=rank, world=2)) for rank in (0, 1)]
    for rank, part in enumerate(found):
        indices = [i for batch in part for i in batch.indices]
        assert indices == list(order[rank::2])
        assert [name for batch in part for name in batch.names] == [images.names[i] for i in indices]
        assert torch.cat([batch.labels for batch in part]).tolist() == [images.labels[i] for i in indices]
        assert torch.equal(torch.cat([batch.pixels[:, 0, 0, 0] for batch in part]), straight[indices])


def test_stopping_takes_images_at_random_and_says_so(sorted_folder):
    found = cp.analyze(NAME, str(sorted_folder), until_ci=10.0, batch_size=8, **QUICK)
    facts = found.run["until_ci"]
    assert facts["reached"]
    assert (facts["images"], facts["of"], found.data["images"]) == (FEWEST, 70, FEWEST)
    names = found.images["names"].tolist()
    assert names == sorted(names)
    assert 8 <= sum(name.startswith("a_dark") for name in names) <= 24
    assert facts["sentence"] in found.run["notes"]
    assert "too narrow" in facts["sentence"]
    assert len(found.gallery.names) == 2
    assert all(width <= 10.0 for width in facts["half_widths"].values())


def test_a_width_that_is_never_reached_reads_everything_and_changes_no_number(sorted_folder):
    plain = cp.analyze(NAME, str(sorted_folder), batch_size=8, **QUICK)
    found = cp.analyze(NAME, str(sorted_folder), until_ci=1e-12, batch_size=8, **QUICK)
    assert plain.run["until_ci"] is None
    assert not found.run["until_ci"]["reached"]
    assert found.images["names"].tolist() == plain.images["names"].tolist()
    for name in found.images:
        if name != "names":
            assert found.images[name] == pytest.approx(plain.images[name], abs=1e-5), name
    for name, reading in found.metrics.items():
        assert reading.values == pytest.approx(plain.metrics[name].values, abs=1e-5, nan_ok=True), name


def test_an_iterable_comes_in_its_own_order():
    loader = [torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = cp.analyze(small_vit(), loader, until_ci=10.0, device="cpu", gallery_images=0)
    assert found.run["until_ci"]["of"] is None
    assert found.data["images"] == FEWEST
    assert "in the order they came in" in found.run["until_ci"]["sentence"]


@pytest.mark.parametrize(("half_width", "used"), [(10.0, 46), (1e-12, 70)])
def test_processes_with_unequal_numbers_of_images_decide_together(monkeypatch, half_width, used):
    shares = [32, 24, 14]
    meeting, held = threading.Barrier(3, timeout=10), {}

    def gathered(mine):
        held[threading.get_ident()] = mine
        meeting.wait()
        parts = [held[one] for one in order]
        meeting.wait()
        return parts

    def work(share):
        stopper, values = Stopper(half_width, ["patch-diversity"]), np.random.default_rng(share).normal(size=share)
        order.append(threading.get_ident())
        meeting.wait()
        rounds = (stopper.enough(kept(values[i : i + 8])) for i in range(0, share, 8))
        any(rounds)  # stops at the first that is enough
        stopper.drain()
        return stopper.facts(70)

    order: list[int] = []
    monkeypatch.setattr(stopping, "gathered", gathered)
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(work, shares)
    assert all(facts == first for facts in others)
    assert first["images"] == used
    assert first["reached"] == (used < 70)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_stop_together(sorted_folder):
    words = ["analyze", "-m", NAME, "--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=2 embed_dim=24 num_heads=3"]
    words += ["--data", str(sorted_folder), "--json=full", "--null-images", "0", "-b", "8", "-q", "--device", "cpu"]
    port = f"--master-port={free_port()}"
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", port, "-m", "collapse_probe"]
    done = subprocess.run([sys.executable, *start, *words, "--until-ci", "10"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["run"]["world_size"] == 2
    assert found["run"]["until_ci"]["reached"]
    assert found["data"]["images"] == found["run"]["until_ci"]["images"] == FEWEST
