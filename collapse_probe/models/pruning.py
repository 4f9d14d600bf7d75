"""A model without some of its blocks as a checkpoint of its own, from which the library that made the model builds it again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.errors import CollapseProbeError, ModelError, OutputError
from collapse_probe.files import check_writable, write_whole
from collapse_probe.models.architecture import Architecture
from collapse_probe.models.loading import Subject, remade
from collapse_probe.models.model_file import ModelCard, is_model_file, read_card, save_model
from collapse_probe.models.sources.ours import bundled_models, file_of
from collapse_probe.models.vit import ViTSettings

SUFFIXES = (".safetensors", ".pth", ".pt")
PICKLED = (".pth", ".pt")
BLOCKS = "blocks"
"""Where the blocks stand in timm's models and in this project's own, one after the other."""
_BLOCK = re.compile(rf"{BLOCKS}\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Pruning:
    """How a model of `depth` blocks is written without some of them, into `path`: by its own `card`, or as a checkpoint of the
    library that made it.
    """

    subject: Subject
    path: Path
    depth: int
    card: ModelCard | None = None

    @classmethod
    def of(cls, subject: Subject, path: str | Path) -> Pruning:
        """Raises ModelError where no model of this kind has another depth, OutputError where the file cannot be written."""
        path, card = Path(path), _card_of(subject)
        expected = SUFFIXES if card is None else SUFFIXES[:1]
        if path.suffix not in expected:
            raise OutputError(f"{path}: expected a file that ends in {' or '.join(expected)}")
        if path.is_dir():
            raise OutputError(f"{path} is a folder; expected a file")
        check_writable(path.absolute().parent)
        blocks = getattr(subject.model, BLOCKS, None)
        cannot = f"{subject.address} cannot be exported without some of its blocks:"
        if subject.request is None:
            raise ModelError(f"{cannot} it came as an object; give its address")
        if card is None and (subject.request["fixes"] or getattr(subject.model, "fixes", ())):
            raise ModelError(f"{cannot} fixes were put into it, which {subject.source} does not build")
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) < 2:
            raise ModelError(f"{cannot} its blocks do not stand in one list `{BLOCKS}`, whose length its constructor takes")
        pruning = cls(subject, path, len(blocks), card)
        try:
            shorter = pruning.build(range(len(blocks) - 1))
        except CollapseProbeError as error:
            raise ModelError(f"{cannot} {error}") from error
        own, theirs = (
            {name: tensor.shape for name, tensor in state.items()}
            for state in (pruning.state([len(blocks) - 1]), shorter.state_dict())
        )
        if own != theirs:
            other = next(name for name in {**own, **theirs} if own.get(name) != theirs.get(name))
            raise ModelError(f"{cannot} built with depth={len(blocks) - 1} its {other} is another one, or none")
        return pruning

    def build(self, left: Sequence[int]) -> Any:
        """The model with as many blocks as are `left`, fresh parameters, in eval mode."""
        if self.card is not None:
            return _shorter(self.card.architecture, left).build(0).eval()
        return remade(self.subject, depth=len(left))

    def left(self, gone: Sequence[int]) -> list[int]:
        """The blocks that stay."""
        return [block for block in range(self.depth) if block not in gone]

    def state(self, gone: Sequence[int]) -> dict[str, Tensor]:
        """The model's tensors without those of some blocks, the others numbered anew; on the CPU."""
        numbers = {block: at for at, block in enumerate(self.left(gone))}
        state = {}
        for name, tensor in self.subject.model.state_dict().items():
            match = _BLOCK.fullmatch(name)
            if match is None:
                state[name] = tensor.detach().cpu()
            elif int(match[1]) in numbers:
                state[f"{BLOCKS}.{numbers[int(match[1])]}.{match[2]}"] = tensor.detach().cpu()
        return state

    def pruned(self, gone: Sequence[int]) -> Any:
        """The model without some blocks, on the CPU."""
        model = self.build(self.left(gone))
        model.load_state_dict(self.state(gone), strict=True)
        return model

    def write(self, model: nn.Module, gone: Sequence[int]) -> dict[str, Any]:
        """Write `model`, as `pruned` gave it, whole or not at all; what it is, and the two lines that load it."""
        left = self.left(gone)
        facts = {"dropped_blocks": [*gone], "of": self.depth, "made_from": self.subject.address}
        if self.card is not None:
            card = replace(self.card, architecture=_shorter(self.card.architecture, left), facts={**self.card.facts, **facts})
            save_model(self.path, model, card)
            lines = ("from collapse_probe.models.loading import resolve", f'model = resolve("ours:{self.path}").model')
            return {"file": str(self.path), "depth": len(left), **facts, "lines": [*lines], "address": f"ours:{self.path}"}
        request = self.subject.request or {}
        size = {} if request["img_size"] is None else {"img_size": request["img_size"]}
        kwargs = {**request["model_kwargs"], **size, "depth": len(left)}
        scheme, name = self.subject.source, self.subject.name
        place = f"{scheme}:{name}" if scheme in ("hf-hub", "local-dir") else name
        built = {"model": place, "model_kwargs": kwargs}
        if self.path.suffix in PICKLED:
            content = {"state_dict": dict(self.state(gone)), "arch": place, **built, **facts}
            write_whole(self.path, lambda stream: torch.save(content, stream))
        else:
            from safetensors.torch import save

            header = {"format": "pt", **{key: json.dumps(value, default=list) for key, value in {**built, **facts}.items()}}
            tensors = {name: tensor.clone().contiguous() for name, tensor in self.state(gone).items()}
            data = save(tensors, metadata=header)
            write_whole(self.path, lambda stream: stream.write(data))
        return {"file": str(self.path), "depth": len(left), **facts, **_how_to_load(self.subject, place, kwargs, self.path)}


def _how_to_load(subject: Subject, place: str, kwargs: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The two lines of Python, and the flags of the command line, that load an exported model."""
    said = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
    flags = " ".join(f"{name}={value!r}".replace(" ", "") for name, value in kwargs.items() if name != "img_size")
    size = kwargs.get("img_size")
    flags = shlex.quote(flags)
    flags += "" if size is None else f" --img-size {size if isinstance(size, int) else 'x'.join(map(str, size))}"
    address = str((subject.request or {}).get("address"))
    if subject.source in ("timm", "ours", "hf-hub", "local-dir"):
        imports = "import timm" if subject.source != "ours" else "import timm, collapse_probe.models.deepvit"
        lines = (imports, f"model = timm.create_model({place!r}, {said}, checkpoint_path={str(path)!r})")
    else:
        lines = (
            "from collapse_probe.models.loading import resolve",
            f"model = resolve({address!r}, model_kwargs={dict(kwargs)!r}, checkpoint={str(path)!r}).model",
        )
    return {"lines": [*lines], "flags": f"--model {address} --model-kwargs {flags} --checkpoint {path}"}


def _card_of(subject: Subject) -> ModelCard | None:
    """What the model file says of which the subject was made; None for one of another kind."""
    if subject.source != "ours" or subject.checkpoint is not None or (subject.request or {}).get("fixes"):
        return None
    name = str((subject.request or {}).get("address", "")).removeprefix("ours:")
    path = file_of(name) if name in bundled_models() else name
    return read_card(path) if is_model_file(path) else None


def _shorter(architecture: Architecture, left: Sequence[int]) -> Architecture:
    """The same with some of its blocks, and the fixes that stand in these."""
    numbers = {block: at for at, block in enumerate(left)}

    def fixes(each: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: _renumbered(settings, numbers) for name, settings in each.items()}

    shorter = replace(architecture.varied({"depth": len(left)}), fixes=fixes(architecture.fixes))
    if isinstance(shorter.model, ViTSettings):
        return replace(shorter, model=replace(shorter.model, fixes=fixes(shorter.model.fixes)))
    return shorter


def _renumbered(settings: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    if settings.get("blocks") is None:
        return dict(settings)
    return {**settings, "blocks": [numbers[block] for block in settings["blocks"] if block in numbers]}
