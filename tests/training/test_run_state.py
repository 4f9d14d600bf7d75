"""The state of a run on disk: whole or not at all, complete, and found again."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from collapse_probe.errors import CheckpointError, OutputError
from collapse_probe.files import write_whole
from collapse_probe.seeding import random_states, restore_random, seed_of, seeded
from collapse_probe.training.run import load_state, save_state, save_whole, states_in


class Full:
    room = 3000

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return len(content)

    def flush(self):
        pass


def test_a_full_disk_is_called_one_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    first = save_state(tmp_path, 1, {"model": {"weight": torch.ones(1000)}})
    content = first.read_bytes()
    with pytest.raises(OSError, match="No space left on device"):
        save_whole({"weight": torch.ones(1000)}, Full())
    monkeypatch.setattr("collapse_probe.training.run.save_whole", lambda content, stream: save_whole(content, Full()))
    said = (
        r"step-00000002.pt cannot be written: .*No space left on device; free space, .*--resume goes on from step-00000001.pt"
    )
    with pytest.raises(OutputError, match=said):
        save_state(tmp_path, 2, {"model": {"weight": torch.ones(1000)}})
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert first.read_bytes() == content


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "held"
    path.write_bytes(b"old")

    def half(stream):
        stream.write(b"new")
        raise OSError("no space left")

    with pytest.raises(OutputError, match="no space left"):
        write_whole(path, half)
    assert path.read_bytes() == b"old"


def test_only_the_newest_states_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save_state(tmp_path, step, {"x": torch.ones(2)})
    assert [path.name for path in states_in(tmp_path)] == ["step-00000015.pt", "step-00000100.pt"]
    held = load_state(states_in(tmp_path)[-1])
    assert held["step"] == 100
    assert torch.equal(held["x"], torch.ones(2))


def test_a_partial_file_of_a_killed_run_is_no_state_and_goes_away(tmp_path):
    (tmp_path / "step-00000005.pt.partial").write_bytes(b"half")
    assert states_in(tmp_path) == []
    save_state(tmp_path, 6, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006.pt"]


@pytest.mark.parametrize("content", [b"", b"not a state"])
def test_a_damaged_state_is_named(tmp_path, content):
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_state(path)


def test_another_file_of_torch_is_no_state(tmp_path):
    torch.save({"model": {}}, tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError, match="no training state"):
        load_state(tmp_path / "step-00000001.pt")


def draws():
    return random.random(), np.random.rand(), float(torch.rand(())), random.gauss(0, 1), np.random.randn()  # noqa: NPY002


def test_random_states_come_back_from_disk(tmp_path):
    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002  (leaves a second normal number in store)
    path = save_state(tmp_path, 1, {"random": random_states()})
    first = draws()
    assert draws() != first
    restore_random(load_state(path)["random"])
    assert draws() == first


def test_what_is_drawn_under_a_key_depends_on_the_key_alone_and_disturbs_nothing():
    def under(*key):
        with seeded(*key):
            return draws()

    before = random_states()
    first = under(1, 2)
    draws()
    assert under(1, 2) == first
    assert under(2, 1) != first
    restore_random(before)
    outside = draws()
    restore_random(before)
    under(1, 2)
    assert draws() == outside


def test_seeds_differ():
    assert len({seed_of(a, b) for a in range(20) for b in range(20)}) == 400
