"""Damaged checkpoints: refused by name with the model untouched, or every tensor of the model is as the file says."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_trials import READ, Kind, mutated, refused
from safetensors.torch import load, save
from torch import Tensor, nn

from collapse_probe.errors import CheckpointError
from collapse_probe.models.checkpoints import load_checkpoint

State = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar")


def model_of(value: float | None = None) -> nn.Module:
    """Two blocks; filled with a value, or random."""
    model = nn.Sequential()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
    model.head = nn.Linear(8, 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter) if value is None else nn.init.constant_(parameter, value)
    return model


def states(_: Path) -> list[State]:
    """The weights of two models."""
    torch.manual_seed(0)
    return [dict(model_of().state_dict()) for _ in range(2)]


def _bytes(random: Random, suffix: str, content: Any) -> bytes:
    if suffix == ".safetensors":
        return save(content)
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=random.random() < 0.7)
    return stream.getvalue()


def _changed(random: Random, state: State, other: State) -> dict[Any, Any]:
    """The weights with one thing about them changed."""
    name = random.choice(list(state))
    tensor, way = state[name], random.randrange(12)
    changes: tuple[Any, ...] = (
        tensor.flatten()[:-1].clone(),
        tensor.unsqueeze(0).clone(),
        tensor.to(torch.int8),
        tensor.to(torch.complex64),
        tensor.to(torch.float8_e4m3fn),
        tensor.half(),
        torch.empty(0),
    )
    if way < len(changes):
        return {**state, name: changes[way]}
    if way == 7:
        return {key: value for key, value in state.items() if key != name}
    if way == 8:
        return {("x" + key if key == name else key): value for key, value in state.items()}
    if way == 9:
        return {**state, "more": tensor.clone()}
    if way == 10:
        return {f"module.{key}": value for key, value in state.items()}
    return {key: value.clone() for key, value in (*state.items(), *other.items())}


def _wrapped(random: Random, state: dict[Any, Any], other: State) -> Any:
    """What a .pth may hold instead of tensors by name, or around them."""
    name = random.choice(list(state))
    return random.choice(
        (
            state,
            state,
            {"state_dict": state},
            {"model": state, "epoch": 3, "args": None},
            {"state_dict": state, "state_dict_ema": other},
            {**state, name: random.choice((None, 1.5, "x", [1], {"a": torch.ones(1)}, print, torch.eye(8).to_sparse()))},
            {**state, 3: torch.ones(1)},
            list(state.values()),
            state[name],
            None,
        )
    )


def _inner(content: Any, key: str) -> Any:
    """The tensors by name that a report says were used: in the entry of that name, or behind that prefix."""
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        names = {str(name).removeprefix(f"{key}."): value for name, value in part.items()}
        if {"head.weight", "head.bias"} <= {name.removeprefix("module.") for name in names}:
            if part is not content and content.get(key) is not part:
                continue
            return {name.removeprefix("module."): value for name, value in names.items()}
    raise AssertionError(f"the report names the entry {key!r}, and the file holds no such weights")


def trial(random: Random, folder: Path, made: list[State]) -> str:
    """One damaged file, or one that is whole and says something else."""
    suffix = random.choice(SUFFIXES)
    state, other = random.sample(made, 2)
    content: Any = _changed(random, state, other) if random.random() < 0.6 else state
    if suffix != ".safetensors":
        content = _wrapped(random, content, other)
    try:
        data = _bytes(random, suffix, content)
    except (RuntimeError, pickle.PicklingError):
        data = b""
    if random.random() < 0.5:
        data = mutated(random, data, _bytes(random, suffix, other))
    file = folder / f"model{random.choice(SUFFIXES) if random.random() < 0.05 else suffix}"
    file.write_bytes(data)
    model, error = model_of(7.0), None
    try:
        report = load_checkpoint(model, file)
    except CheckpointError as raised:
        error = raised
    if error is not None:
        assert all(bool((tensor == 7).all()) for tensor in model.state_dict().values()), f"refused, and loaded: {error}"
        return refused(error, file)
    stored = load(data) if file.suffix == ".safetensors" else torch.load(io.BytesIO(data), weights_only=True)
    names = _inner(stored, report.key_used)
    for name, tensor in model.state_dict().items():
        assert name in names, f"{name} is not in the file"
        assert names[name].dtype.is_floating_point, f"{name} is {names[name].dtype} in the file"
        assert torch.equal(tensor, names[name].to(tensor.dtype).reshape(tensor.shape)) or tensor.isnan().any(), name
    assert report.loaded == report.total == len(model.state_dict())
    return READ


KIND = Kind(500, states, trial)
