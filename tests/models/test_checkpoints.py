"""A checkpoint goes into a model wholly or not at all, and a file that runs code is refused."""

import argparse
import hashlib
import os
import pickle
from datetime import datetime
from pathlib import PosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from collapse_probe.errors import CheckpointError
from collapse_probe.models.checkpoints import load_checkpoint


def small(classes=3):
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, classes))


def filled(value, classes=3):
    return {key: torch.full_like(tensor, value) for key, tensor in small(classes).state_dict().items()}


def holds(model, value):
    return all(bool((tensor == value).all()) for tensor in model.state_dict().values())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth.tar"


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar"])
def test_every_torch_suffix_loads(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(filled(2.0), path)
    model = small()
    report = load_checkpoint(model, path)
    assert holds(model, 2.0)
    assert report.complete
    assert report.key_used == ""
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_loads(tmp_path):
    save_file(filled(3.0), tmp_path / "model.safetensors")
    model = small()
    assert load_checkpoint(model, tmp_path / "model.safetensors").complete
    assert holds(model, 3.0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_come_off(path, prefix):
    torch.save({"state_dict": {prefix + key: tensor for key, tensor in filled(1.0).items()}}, path)
    model = small()
    load_checkpoint(model, path)
    assert holds(model, 1.0)


def test_a_prefix_that_the_model_itself_uses_stays(path):
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save({key: torch.ones_like(tensor) for key, tensor in model.state_dict().items()}, path)
    load_checkpoint(model, path)
    assert holds(model, 1.0)


@pytest.mark.parametrize(
    ("entries", "key", "used"),
    [
        (["state_dict", "state_dict_ema"], None, "state_dict"),
        (["state_dict", "state_dict_ema"], "state_dict_ema", "state_dict_ema"),
        (["state_dict", "state_dict_ema"], "state_dict", "state_dict"),
        (["model", "model_ema"], None, "model"),
        (["model", "model_ema"], "model_ema", "model_ema"),
        (["model_ema"], None, "model_ema"),
        (["student", "teacher"], None, "teacher"),
        (["student", "teacher"], "student", "student"),
        (["epoch", "net"], None, "net"),
    ],
)
def test_which_entry_is_used(path, entries, key, used):
    torch.save({entry: filled(float(i)) for i, entry in enumerate(entries)} | {"epoch": 7}, path)
    model = small()
    report = load_checkpoint(model, path, key=key)
    assert report.key_used == used
    assert holds(model, entries.index(used))


def test_missing_averaged_weights_are_an_error(path):
    torch.save({"state_dict": filled(1.0), "epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"no weights under 'state_dict_ema'; it holds state_dict"):
        load_checkpoint(small(), path, key="state_dict_ema")


def test_a_teacher_backbone_fits(path):
    torch.save({"teacher": {"backbone." + key: tensor for key, tensor in filled(1.0).items()}}, path)
    assert load_checkpoint(small(), path).complete


def test_the_settings_of_a_training_file_are_allowed(path):
    torch.save({"state_dict": filled(1.0), "args": argparse.Namespace(lr=0.1, model="deepvit_s")}, path)
    assert load_checkpoint(small(), path).complete


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.5),
        np.int64(3),
        np.ones(3, dtype=np.float32),
        PosixPath("runs/a"),
        argparse.Namespace(accuracy=np.float32(0.5)),
        datetime(2026, 11, 1),
        SimpleNamespace(lr=0.1),
        slice(1, 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_beside_the_weights_are_allowed(path, value):
    torch.save({"state_dict": filled(1.0), "best": value}, path)
    assert load_checkpoint(small(), path).complete


class Evil:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(path, tmp_path, zipped):
    trace = tmp_path / "ran"
    torch.save({"state_dict": filled(1.0), "args": Evil(trace)}, path, _use_new_zipfile_serialization=zipped)
    model = small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="could run code") as caught:
        load_checkpoint(model, path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_that_runs_code_is_refused(path, tmp_path, protocol):
    trace = tmp_path / "ran"
    path.write_bytes(pickle.dumps(Evil(trace), protocol))
    with pytest.raises(CheckpointError):
        load_checkpoint(small(), path)
    assert not trace.exists()


def test_a_checkpoint_that_does_not_fit_changes_nothing(path):
    state = filled(9.0, classes=4) | {"extra.weight": torch.ones(1)}
    del state["0.bias"]
    torch.save(state, path)
    model = small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    text = str(caught.value)
    assert "1 missing in the file (0.bias)" in text
    assert "1 unknown to the model (extra.weight)" in text
    assert "2 of another shape (2.weight: [4, 5], [3, 5], 2.bias: [4], [3])" in text
    assert "--partial" in text
    assert "\n" not in text
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_partial_loads_what_fits_and_reports_the_rest(path):
    torch.save(filled(9.0, classes=4), path)
    model = small()
    report = load_checkpoint(model, path, partial=True)
    assert not report.complete
    assert len(report.mismatched) == 2
    assert bool((model[0].weight == 9.0).all())
    assert not bool((model[2].weight == 9.0).any())
    assert "in part" in report.notes[-1]


def test_partial_is_no_licence_for_nothing_at_all(path):
    torch.save({"other.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load_checkpoint(small(), path, partial=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read|can read safely") as caught:
        load_checkpoint(small(), path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_weights_is_an_error(path):
    torch.save({"epoch": 3, "lr": 0.1}, path)
    with pytest.raises(CheckpointError, match="holds no weights: expected a state dict, found the entries epoch, lr"):
        load_checkpoint(small(), path)


def test_a_folder_with_one_checkpoint_stands_for_it(tmp_path):
    torch.save(filled(1.0), tmp_path / "only.pth")
    (tmp_path / "notes.txt").write_text("x")
    assert load_checkpoint(small(), tmp_path).complete
    torch.save(filled(1.0), tmp_path / "second.pth")
    with pytest.raises(CheckpointError, match=r"found 2 \(only.pth, second.pth\)"):
        load_checkpoint(small(), tmp_path)


def test_no_file_and_another_kind_of_file(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(small(), tmp_path / "absent.pth")
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no known kind"):
        load_checkpoint(small(), tmp_path / "image.png")


@pytest.mark.parametrize("odd", [torch.eye(5, 4).to_sparse(), torch.empty(5, 4, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_all_their_numbers_are_refused_and_the_model_stays(path, odd):
    torch.save({**filled(1.0), "0.weight": odd}, path)
    model = small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"sparse or missing values \(float32: 0.weight\)"):
        load_checkpoint(model, path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_path_that_cannot_be_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load_checkpoint(small(), tmp_path / ("x" * 5000))
