"""Loads weights from a file into a model: safely, wholly, or not at all."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import pickle
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.errors import CheckpointError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")  # `.pth.tar` ends in .tar
PLAIN = ("state_dict", "model", "model_state_dict", "module")
AVERAGED = ("state_dict_ema", "model_ema", "ema", "teacher")
STUDENT = ("student",)
WRAPPERS = ("module.", "_orig_mod.")

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held and what of it went into the model.

    `key_used` is the entry of the file that held the weights, "" where the file is the state dict itself.
    `missing` are keys that only the model has, `unexpected` only the file; `mismatched` say
    "key: [shape in the file], [shape in the model]". `absent` are keys that the file was free to leave out, and did.
    """

    sha256: str
    key_used: str
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether file and model agreed on every key and shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def differences(self) -> str:
        """One clause that counts and samples what did not fit; empty where all did."""
        kinds = (
            ("missing in the file", self.missing),
            ("unknown to the model", self.unexpected),
            ("of another shape", self.mismatched),
        )
        return "; ".join(f"{len(keys)} {kind} ({_sample(keys)})" for kind, keys in kinds if keys)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the findings should know."""
        used = (f"checkpoint: weights under {self.key_used!r}",) if self.key_used else ()
        bare = (f"checkpoint: holds no weights of what was put into the model ({_sample(self.absent)})",) if self.absent else ()
        return used + bare + (() if self.complete else (f"checkpoint loaded in part: {self.differences}",))


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    ema: bool | None = None,
    partial: bool = False,
    optional: Collection[str] = (),
) -> LoadReport:
    """Load the weights at `path` into `model`; the model is untouched unless this returns.

    `path` is a file with one of `SUFFIXES`, or a folder that holds exactly one. Nothing in the file is executed: torch reads it
    with `weights_only`, and of all Python classes only `argparse.Namespace` (the settings in timm's training files) is allowed.
    Wrapper prefixes (`module.`, `_orig_mod.`) are taken off.

    `ema` chooses between plain and averaged weights where a file holds both. None, the default, takes the plain ones as timm's
    validate.py does, and averaged ones where there are no others; of a student and its teacher it takes the teacher, as the
    authors of that method do. True and False insist. The report says what was used.

    The file may leave out all keys in `optional` together: those of a fix that was put into the model after the weights were
    trained.

    Raises CheckpointError if the file cannot be read safely, holds no weights, or does not fit. With `partial` whatever fits is
    loaded and the rest reported; it is still an error if nothing fits.
    """
    file = _checkpoint_file(Path(path))
    content, own = read_file(file), model.state_dict()
    key, state = choose_weights(content, ema, file)
    # wrapper prefixes, and DINO's `backbone.`, come off, unless the model has keys of its own that start so
    prefixes = tuple(p for p in (*WRAPPERS, "backbone.") if not any(name.startswith(p) for name in own))
    state = {re.sub(f"^({'|'.join(map(re.escape, prefixes))})+", "", name): tensor for name, tensor in state.items()}
    missing = [name for name in own if name not in state]
    absent = [name for name in missing if name in optional]
    if len(absent) < len(optional):  # the file holds some of them
        absent = []
    other_shape = [name for name in own if name in state and own[name].shape != state[name].shape]
    fitting = {name: state[name] for name in own if name in state and name not in other_shape}
    report = LoadReport(
        sha256=_sha256(file),
        key_used=key,
        missing=tuple(name for name in missing if name not in absent),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(f"{name}: {list(state[name].shape)}, {list(own[name].shape)}" for name in other_shape),
        absent=tuple(absent),
    )
    if not fitting or not (report.complete or partial):
        means = "nothing was loaded; use the model that it was made from"
        means += " (same sizes and number of classes)" if not fitting else ", or --partial for what fits"
        raise CheckpointError(f"{file} does not fit {type(model).__name__}: {report.differences}; {means}")
    model.load_state_dict(fitting, strict=False)
    return report


def _checkpoint_file(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}; give an existing file ({', '.join(SUFFIXES)})")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise CheckpointError(f"{path} is no known kind of checkpoint; expected {', '.join(SUFFIXES)}")
        return path
    inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(inside) != 1:
        found = _sample([file.name for file in inside]) if inside else "none"
        raise CheckpointError(f"the folder {path} must hold one checkpoint, found {len(inside)} ({found}); name one")
    return inside[0]


def read_file(file: Path) -> Mapping[str, Any]:
    """The content of a checkpoint file; raises CheckpointError where it cannot be read safely."""
    try:
        if file.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            allow = getattr(torch.serialization, "safe_globals", None)  # since torch 2.5
            with warnings.catch_warnings(), allow([argparse.Namespace]) if allow else contextlib.nullcontext():
                warnings.simplefilter("ignore")  # on pickles of other protocols
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        if culprit is None:
            why = "it is damaged, or holds more than tensors"
            raise CheckpointError(f"{file} is no checkpoint that torch can read safely: {why}") from error
        what = f"it holds the Python object {culprit[1]!r}, and loading that could run code"
        raise CheckpointError(f"{file} was not loaded: {what}; save the tensors alone, e.g. as .safetensors") from error
    except Exception as error:  # damaged files fail in many ways
        why = (str(error).strip().splitlines() or [""])[0][:160]
        raise CheckpointError(f"{file} cannot be read as a checkpoint ({type(error).__name__}: {why})") from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise CheckpointError(f"{file} holds a {kind}, expected a dictionary of tensors; save model.state_dict()")
    return content


def choose_weights(content: Mapping[str, Any], ema: bool | None, file: Path) -> tuple[str, State]:
    """The entry that holds the wanted weights and its name; "" for a file that is a state dict itself."""
    orders = {None: PLAIN + AVERAGED + STUDENT, True: AVERAGED, False: PLAIN + STUDENT}
    for key in orders[ema]:
        if _is_state(content.get(key)):
            return key, content[key]
    if _is_state(content) and ema is not True:
        return "", content
    kind = {None: "weights", True: "averaged (EMA) weights", False: "plain weights"}[ema]
    expected = "a state dict" if ema is None else " or ".join(orders[ema])
    keys = _sample([str(key) for key in content]) or "nothing"
    raise CheckpointError(f"{file} holds no {kind}: expected {expected}, found the entries {keys}")


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(leaf, Tensor) for leaf in value.values())


def _sample(names: Iterable[str], count: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:count]) + (", …" if len(listed) > count else "")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
