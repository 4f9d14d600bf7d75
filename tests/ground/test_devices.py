"""What a run takes where nobody says: processes that read, images in a batch, the type of mixed precision."""

import multiprocessing
import os

import pytest
import torch

from collapse_probe.devices import cores, default_amp_dtype, default_batch_size, default_workers

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the number of cores, of a quota and of processes."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def of(able, quota=None, processes=None, name="cpu.max"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(able)), raising=False)
        if quota:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(quota)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        return cores(tmp_path)

    return of


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((8,), 8),
        ((8, "max 100000"), 8),
        ((8, "250000 100000"), 2),
        ((8, "50000 100000"), 1),
        ((2, "900000 100000"), 2),
        ((8, "nonsense"), 8),
        ((8, None, "4"), 2),
        ((2, None, "4"), 1),
        ((8, "600000 100000", "2"), 3),
    ],
)
def test_cores_are_those_that_this_process_may_use(machine, asked, expected):
    assert machine(*asked) == expected


def test_quotas_of_the_first_control_groups(machine, tmp_path):
    machine(8, "300000", name="cpu/cpu.cfs_quota_us")
    assert machine(8, "100000", name="cpu/cpu.cfs_period_us") == 3
    assert machine(8, "-1", name="cpu/cpu.cfs_quota_us") == 8


@pytest.mark.parametrize(
    ("device", "able", "images", "from_memory", "expected"),
    [
        (CPU, 2, 1000, False, 1),
        (CPU, 1, 1000, False, 0),
        (CPU, 16, 1000, False, 4),
        (CPU, 16, None, False, 4),
        (CPU, 16, 255, False, 0),
        (CPU, 16, 256, False, 4),
        (GPU, 16, 1000, True, 0),
        (GPU, 16, 1000, False, 15),
        (GPU, 64, None, False, 16),
        (GPU, 2, None, False, 1),
        (GPU, 1, None, False, 0),
    ],
)
def test_processes_that_read(monkeypatch, device, able, images, from_memory, expected):
    monkeypatch.setattr("collapse_probe.devices.cores", lambda: able)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")
    assert default_workers(device, 64, images, from_memory) == expected
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert default_workers(device, 64, images, from_memory) == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [((32, 32), 256), ((224, 224), 256), ((225, 224), 128), ((384, 384), 64), ((518, 518), 32), ((9000, 9000), 1)],
)
def test_images_in_a_batch(size, expected):
    assert default_batch_size(GPU, size) == expected
    assert default_batch_size(CPU, size) == 64


def test_types_of_mixed_precision(monkeypatch):
    assert default_amp_dtype(CPU) == "bfloat16"
    for capability, expected in (((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert default_amp_dtype(GPU) == expected
