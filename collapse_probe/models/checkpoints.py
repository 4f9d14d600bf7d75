"""Loads weights from a file into a model: safely, wholly, or not at all."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.errors import CheckpointError
from collapse_probe.models.checkpoint_files import checkpoint_file, read_checkpoint, sample, sha256_of
from collapse_probe.models.checkpoint_keys import NOT_READ, Match, bare, match

ADAPTERS = ("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_lambda", "adaption_prompt")  # as peft names its tensors
QUANTISED = re.compile(
    r"\.(qweight|qzeros|SCB|absmax|quant_map|quant_state\.\w+)$"
)  # beside weights in GPTQ, AWQ, bitsandbytes
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others need a scale to mean anything


@dataclass(frozen=True)
class Checkpoint:
    """A file and the weights in it that are meant for one model; see `Match` for their names."""

    path: Path
    sha256: str
    weights: Match

    def unknown_to(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors whose names the model does not have."""
        own = _own_tensors(model)
        return {name: tensor for name, tensor in self.weights.state.items() if name not in own}


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held and what of it went into the model.

    `key_used` is the entry of the file that held the weights and the prefix of their names, "" for the file as it is.
    `loaded` of the model's `total` tensors came from the file. `missing` are keys that only the model has, `unexpected` only
    the file; `mismatched` say "key: [shape in the file], [shape in the model]". `absent` are keys that the file was free to
    leave out, and did. `not_loaded` are the weights that the model has from elsewhere, `blocks` the names of the model's
    blocks; `remarks` say what was done to names and values on the way.
    """

    sha256: str
    key_used: str
    loaded: int
    total: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    not_loaded: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

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
        return "; ".join(f"{len(keys)} {kind} ({sample(keys)})" for kind, keys in kinds if keys)

    @property
    def whole_blocks(self) -> str:
        """A clause on how many blocks the file has all weights of, and which others there are; empty for a model without."""
        lacking = [block for block in self.blocks if holds_any(self.not_loaded, block)]
        whole = f"; {len(self.blocks) - len(lacking)} of {len(self.blocks)} blocks whole" if self.blocks else ""
        return whole + (f", not {sample(lacking, 6)}" if lacking else "")

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the findings should know."""
        under = f", under {self.key_used!r}" if self.key_used else ""
        came = f"checkpoint: {self.loaded} of {self.total} tensors of the model came from the file{under}{self.whole_blocks}"
        lines = [came, *(f"checkpoint: {remark}" for remark in self.remarks)]
        if self.absent:
            lines.append(f"checkpoint: holds no weights of what was put into the model ({sample(self.absent)})")
        return (*lines, *(() if self.complete else (f"checkpoint loaded in part: {self.differences}",)))


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    partial: bool = False,
    optional: Collection[str] = (),
) -> LoadReport:
    """Load the weights at `path` into `model`; see `read_weights` and `load_weights`."""
    return load_weights(model, read_weights(model, path, key), partial=partial, optional=optional)


def read_weights(model: nn.Module, path: str | Path, key: str | None = None) -> Checkpoint:
    """The weights at `path` that are meant for `model`, which stays as it is.

    `path` is a file with one of `SUFFIXES`, the index of a checkpoint in several files, or a folder that holds one checkpoint;
    nothing in it is executed. Which of its tensors are meant is for `match` to say; `key` names an entry of the file, or a
    prefix of names, where it holds several sets of weights.

    Raises CheckpointError if the file cannot be read safely, holds no weights, holds an adapter, or does not say which of
    several sets is meant.
    """
    file, own = checkpoint_file(Path(path)), _own_tensors(model)
    content = read_checkpoint(file)
    weights = match(model, {name: tensor.shape for name, tensor in own.items()}, content, key, file)
    adapter = [name for name in (*weights.state, *weights.aside) if name not in own and _is_adapter(name)]
    if adapter:
        alone = len(adapter) == len(weights.state) + len(weights.aside)
        what = "an adapter without the weights that it adapts" if alone else "adapters beside the weights that they adapt"
        how = "merge it into its model first (with peft: merge_and_unload) and save that model's state_dict"
        raise CheckpointError(f"{file} holds {what} ({sample(adapter)}); {how}")
    not_read = [name for name in weights.state if name not in own and NOT_READ.match(name)]
    if not_read:
        state = {name: tensor for name, tensor in weights.state.items() if name not in not_read}
        said = f"{len(not_read)} tensors that no encoder reads were set aside ({sample(not_read)})"
        weights = replace(weights, state=state, remarks=(*weights.remarks, said))
    if weights.aside:
        said = f"{len(weights.aside)} tensors that do not stand under {weights.key!r} were set aside ({sample(weights.aside)})"
        weights = replace(weights, remarks=(*weights.remarks, said))
    return Checkpoint(file, sha256_of(file), weights)


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, *, partial: bool = False, optional: Collection[str] = ()
) -> LoadReport:
    """Load a checkpoint's weights into `model`; the model is untouched unless this returns.

    The file may leave out all keys in `optional` together: those of a fix that was put into the model after the weights were
    trained. Raises CheckpointError for weights that do not fit, and for complex or quantised ones where the model has
    floating-point numbers. With `partial` whatever fits is loaded and the rest reported; it is still an error if nothing fits.
    """
    own, weights = _own_tensors(model), checkpoint.weights
    _refuse_other_kinds(own, weights.state, checkpoint.path)
    other_shape = [name for name in own if name in weights.state and own[name].shape != weights.state[name].shape]
    fitting = {name: weights.state[name] for name in own if name in weights.state and name not in other_shape}
    tied = {_place(own[name]) for name in fitting if own[name].numel()}
    missing = [name for name in own if name not in weights.state and _place(own[name]) not in tied]
    optional = {bare(name) for name in optional}
    absent = [name for name in missing if name in optional]
    if len(absent) < len(optional):  # the file holds some of them
        absent = []
    missing = [name for name in missing if name not in absent]
    actual = _bare_names(model)
    report = LoadReport(
        sha256=checkpoint.sha256,
        key_used=weights.key,
        loaded=len(own) - len(missing) - len(absent) - len(other_shape),
        total=len(own),
        missing=tuple(missing),
        unexpected=tuple(name for name in weights.state if name not in own),
        mismatched=tuple(f"{name}: {list(weights.state[name].shape)}, {list(own[name].shape)}" for name in other_shape),
        absent=tuple(absent),
        not_loaded=tuple(actual[name] for name in (*missing, *other_shape) if own[name].is_floating_point()),
        blocks=repeated_blocks(model),
        remarks=weights.remarks,
    )
    if not fitting or not (report.complete or partial):
        means = "no tensor has a name and shape of the model's: nothing was loaded"
        if fitting:
            fit = f"{len(fitting)} of {len(own)} tensors that fit{report.whole_blocks.replace(';', ':')}"
            means = f"nothing was loaded; make the model as it was for this file, or --partial for the {fit}"
        also = "".join(f"; {remark}" for remark in weights.remarks)
        raise CheckpointError(f"{checkpoint.path} does not fit {type(model).__name__}: {report.differences}; {means}{also}")
    model.load_state_dict({actual[name]: tensor for name, tensor in fitting.items()}, strict=False)
    return report


def holds_any(names: Collection[str], module: str) -> bool:
    """Whether one of the parameters called `names` lies in `module`."""
    return any(name.startswith(f"{module}.") for name in names)


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules of one kind that stand in a row, the innermost such rows: the blocks of a transformer."""
    names = []
    for place, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            parts = {name: part for name, part in module.named_children() if any(True for _ in part.children())}
            if len(parts) > len({type(part) for part in parts.values()}):
                names += [f"{place}.{name}" if place else name for name in parts]
    return tuple(name for name in names if not any(other.startswith(f"{name}.") for other in names))


def _bare_names(model: nn.Module) -> dict[str, str]:
    """The names of the model's tensors by those without wrappers, or by themselves where two would become one."""
    names = list(model.state_dict())
    short = {bare(name): name for name in names}
    return short if len(short) == len(names) else {name: name for name in names}


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {short: state[name] for short, name in _bare_names(model).items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: the same for weights that are tied."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _is_adapter(name: str) -> bool:
    return any(segment.startswith(ADAPTERS) for segment in name.split("."))


def _refuse_other_kinds(own: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path) -> None:
    """Raise CheckpointError where the file has complex, quantised or sparse values for the floating-point ones of the model."""
    floating = {name: tensor for name, tensor in state.items() if name in own and own[name].is_floating_point()}
    complex_ones = [name for name, tensor in floating.items() if tensor.is_complex()]
    quantised = [name for name, tensor in floating.items() if tensor.dtype not in FLOATS and name not in complex_ones]
    quantised += [name for name in state if name not in own and (state[name].is_quantized or QUANTISED.search(name))]
    sparse = [name for name, tensor in state.items() if name in own and (tensor.layout != torch.strided or tensor.is_meta)]
    for names, kind, way in (
        (sparse, "sparse or missing", "save dense ones"),
        (complex_ones, "complex", "save real numbers"),
        (quantised, "quantised", "save them dequantised, as floating-point numbers"),
    ):
        if names:
            what = f"{str(state[names[0]].dtype).removeprefix('torch.')}: {sample(names)}"
            raise CheckpointError(f"{file} holds {kind} values ({what}) where the model has floating-point ones; {way}")
