"""The file of a trained model: its weights, and in the header all that is needed to build it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from collapse_probe.data.preprocessing import Preprocess, from_timm_config
from collapse_probe.errors import CheckpointError
from collapse_probe.files import write_whole
from collapse_probe.models.architecture import Architecture

FORMAT = "collapse-probe/model/1"
SUFFIX = ".safetensors"
KEY = "collapse_probe"
CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct")  # the preprocessing as timm's pretrained_cfg spells it


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model file says about its model.

    `input_size` is [channels, height, width]; `mean` and `std` are those of the pixels, in [0, 1].
    `facts` are further plain values: recipe, data, step, accuracy, command, versions, which weights.
    """

    architecture: Architecture
    input_size: tuple[int, int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def preprocess(self) -> Preprocess:
        """The evaluation transform that the model was validated with."""
        return from_timm_config({name: getattr(self, name) for name in CONFIG})

    def plain(self) -> dict[str, Any]:
        """The same as plain values."""
        config = {name: getattr(self, name) for name in CONFIG}
        return {"format": FORMAT, "architecture": self.architecture.plain(), **config, "facts": dict(self.facts)}

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> ModelCard:
        """The card that `plain` wrote. Raises CheckpointError for another format."""
        if values.get("format") != FORMAT:
            raise CheckpointError(f"this model file has the format {values.get('format')!r}; expected {FORMAT!r}")
        try:
            config: Any = {name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in CONFIG}
            return cls(architecture=Architecture.of_plain(values["architecture"]), facts=values["facts"], **config)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the header of this model file is incomplete: {error}") from error


def save_model(path: str | Path, model: nn.Module, card: ModelCard) -> Path:
    """Write `model` and its card to `path` (.safetensors), whole or not at all, and return the path.

    Weights that several blocks share are stored once; the header lists the other names under which the
    state_dict has them. Raises CheckpointError where the file cannot be written.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(f"a model file ends in {SUFFIX}, not {path.suffix!r}")
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            shared[name] = first[place]
        else:
            first[place], tensors[name] = name, tensor.detach().cpu().contiguous()
    header = {"format": "pt", KEY: json.dumps({**card.plain(), "shared": shared}, allow_nan=False)}
    content = save(tensors, metadata=header)
    write_whole(path, lambda stream: stream.write(content))
    return path


def is_model_file(path: str | Path) -> bool:
    """Whether a file of this format lies at `path`."""
    path = Path(path)
    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        return KEY in _metadata(path)
    except CheckpointError:
        return False


def read_card(path: str | Path) -> ModelCard:
    """The card of the model file at `path`. Raises CheckpointError for anything that is none."""
    return ModelCard.of_plain(_header(Path(path)))


def load_model(path: str | Path) -> tuple[Any, ModelCard]:
    """The model of a file in eval mode on the CPU, and its card.

    The architecture is built as the header says; every weight must fit. Raises CheckpointError otherwise.
    """
    from safetensors.torch import load_file

    header = _header(Path(path))
    card = ModelCard.of_plain(header)
    model = card.architecture.build(seed=0)
    state = load_file(path)
    for name, first in header.get("shared", {}).items():
        if first not in state:
            raise CheckpointError(f"{path}: {name} should share the weights of {first}, which are not there")
        state[name] = state[first]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the weights of the model that its header names: {error}") from error
    return model.eval(), card


def _header(path: Path) -> dict[str, Any]:
    metadata = _metadata(path)
    if KEY not in metadata:
        raise CheckpointError(f"{path} is no model file of collapse-probe: its header names no model; use --model for it")
    try:
        return json.loads(metadata[KEY])  # type: ignore[no-any-return]
    except ValueError as error:
        raise CheckpointError(f"the header of {path} is damaged: {error}") from error


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a model file: {error}") from error
