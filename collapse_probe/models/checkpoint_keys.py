"""Which tensors of a checkpoint are meant for a model, under which names: wrappers, prefixes, a library's own names."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.errors import CheckpointError
from collapse_probe.models.checkpoint_files import sample
from collapse_probe.seeding import torch_seeded

ORDER = (
    *("state_dict", "model", "model_state_dict", "module"),  # plain weights, as timm's validate.py takes them first
    *("state_dict_ema", "model_ema", "ema", "teacher"),  # averaged ones; of a student and its teacher, the teacher
    "student",
)
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
NOT_READ = re.compile(r"mask_token$|decoder|n_averaged$")  # by no encoder: parts of a masked autoencoder, a counter of torch's
RESIZABLE = re.compile(r"pos|patch_embed|rel_")

State = Mapping[str, Tensor]
Shapes = Mapping[str, torch.Size]
Conversion = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Match:
    """Weights for one model, by the model's own names where they fit it.

    `key` is where they stood in the file: its entry, and the prefix that was taken off the names, "" for the file itself.
    `fits` counts the tensors with a name and shape of the model's; `aside` are names of the file that do not stand under `key`;
    `remarks` say what was done to names and values.
    """

    key: str
    entry: str
    state: State
    fits: int
    aside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def bare(name: str) -> str:
    """A name without the segments that wrappers of torch put in.

    >>> bare("module.blocks.0._orig_mod.norm1.weight")
    'blocks.0.norm1.weight'
    """
    segments = [segment for segment in name.split(".") if segment not in WRAPPERS]
    while len(segments) > 1 and segments[0] == "module":
        segments.pop(0)
    return ".".join(segments)


def bare_state(state: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`state` by bare names. Raises CheckpointError where two names become one."""
    names: dict[str, str] = {}
    for name in state:
        if (first := names.setdefault(bare(name), name)) != name:
            raise CheckpointError(f"{what} holds both {first!r} and {name!r}, which are one without wrapper names; save one")
    return {short: state[name] for short, name in names.items()}


def entries(content: Mapping[Any, Any], at: str = "") -> dict[str, dict[str, Tensor]]:
    """The state dicts within a file's content by where they stand: "", "state_dict", "model.backbone".

    A state dict is a dictionary at least half of whose values are tensors.
    """
    tensors = {str(key): tensor for key, value in content.items() if (tensor := _tensor(value)) is not None}
    found = {at: tensors} if tensors and 2 * len(tensors) >= len(content) else {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= entries(value, f"{at}.{key}" if at else str(key))
    return found


def _tensor(value: Any) -> Tensor | None:
    """The tensor that an entry is; of the pair in which torch stores a quantised layer, its weight."""
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor) and value[0].is_quantized:
        return value[0]
    return value if isinstance(value, Tensor) else None


def without_model(content: Mapping[str, Any], file: object) -> dict[str, Tensor]:
    """The weights that a file is about where no model says which: by ORDER, else the most; without the prefix of all names."""
    states = entries(content)
    if not states:
        raise _no_weights(content, file)
    at = min(states, key=lambda entry: (_rank(entry), -len(states[entry])))
    state = bare_state(states[at], str(file))
    longest = max(_shared(state, len(state)), key=len)
    return {name.removeprefix(longest): tensor for name, tensor in state.items()}


def match(model: nn.Module, own: Shapes, content: Mapping[str, Any], key: str | None, file: object) -> Match:
    """The weights in `content` that are meant for `model`, whose tensors have the names and shapes `own`.

    Of every state dict in the file each prefix is tried under which more than half of the model's tensors have their name
    and shape (or which lacks a prefix that the model's names have); where none fits wholly, the library that made the model
    converts names and shapes. `key` names entry or prefix. Without it entries come in ORDER, and within one the prefix under
    which most fit. Raises CheckpointError where several fit equally, and where there are no weights or none under `key`.
    """
    states = entries(content)
    if not states:
        raise _no_weights(content, file)
    found = {at: _under_prefixes(own, {name: state[name] for name in state}, at, key) for at, state in states.items()}
    matches = [each for inside in found.values() for each in inside]
    if not any(each.fits == len(own) == len(each.state) for each in matches):
        matches = [_converted(model, own, each) if 3 * len(each.state) >= len(own) else each for each in matches]
    if key is not None:
        chosen = [each for each in matches if f".{bare(key)}." in f".{each.key}." or key == each.key]
        if not chosen:
            named = sample(sorted({each.key or "(the file itself)" for each in matches if each.fits}) or list(states), 8)
            raise CheckpointError(f"{file} holds no weights under {key!r}; it holds {named}")
        matches = chosen
    fitting = [each for each in matches if 2 * each.fits > len(own)]
    if not fitting:
        return min(matches, key=lambda each: (_rank(each.entry), -each.fits))
    rank = min(_rank(each.entry) for each in fitting)
    most = max(each.fits for each in fitting if _rank(each.entry) == rank)
    best = [each for each in fitting if (_rank(each.entry), each.fits) == (rank, most)]
    if any(not _equal(best[0].state, other.state, own) for other in best[1:]):
        listed = ", ".join(f"{each.key or 'the names as they are'}" for each in best)
        raise CheckpointError(
            f"{file} holds several sets of weights that fit {type(model).__name__} equally well ({listed}: {most} of "
            f"{len(own)} tensors each); choose one with --checkpoint-key"
        )
    others = sorted({each.key or "the names as they are" for each in fitting if each not in best})
    return replace(best[0], remarks=(*best[0].remarks, *([f"the file also holds {sample(others)}"] if others else [])))


def _no_weights(content: Mapping[str, Any], file: object) -> CheckpointError:
    keys = sample([str(key) for key in content]) or "nothing"
    return CheckpointError(f"{file} holds no weights: expected a state dict, found the entries {keys}")


def _rank(entry: str) -> int:
    first = entry.partition(".")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER)


def _cuts(name: str) -> list[str]:
    """All prefixes of a name that end at a dot, and the empty one.

    >>> _cuts("model.head.bias")
    ['', 'model.', 'model.head.']
    """
    return ["", *(name[: dot.end()] for dot in re.finditer(r"\.", name))]


def _shared(names: Mapping[str, Any], least: float) -> list[str]:
    """The prefixes that at least so many of the names have."""
    counts = Counter(cut for name in names for cut in _cuts(name))
    return [cut for cut, count in counts.items() if count >= least]


def _under_prefixes(own: Shapes, state: dict[str, Tensor], entry: str, key: str | None) -> list[Match]:
    """A match for each prefix under which most of the model's tensors fit; else for each prefix that all names have."""
    state = bare_state(state, f"the entry {entry!r}" if entry else "the file")
    fits: Counter[tuple[str, str]] = Counter()
    for added in _shared(own, len(own) / 2):
        wanted = {name.removeprefix(added): shape for name, shape in own.items() if name.startswith(added)}
        for name, tensor in state.items():
            cuts = [""] if added else _cuts(name)  # one prefix for another would be a guess
            fits.update((cut, added) for cut in cuts if wanted.get(name[len(cut) :]) == tensor.shape)
    most = [pair for pair, count in fits.items() if 2 * count > len(own)]
    pairs = [pair for pair in most if not pair[1]] or sorted(most, key=lambda pair: -fits[pair])[:1]
    if not pairs:
        asked = [f"{bare(key)}."] if key and any(name.startswith(f"{bare(key)}.") for name in state) else []
        pairs = [(cut, "") for cut in {*_shared(state, len(state)), *asked}]
    return [_under(own, state, entry, *pair) for pair in pairs]


def _under(own: Shapes, state: dict[str, Tensor], entry: str, prefix: str, added: str) -> Match:
    named = {added + name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    outside = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    also = {n: t for n, t in outside.items() if n not in named and own.get(n) == t.shape}  # a head beside the backbone
    return Match(
        key=".".join(filter(None, (entry, prefix.removesuffix(".")))),
        entry=entry,
        state=named | also,
        fits=_fits(own, named | also),
        aside=tuple(name for name in outside if name not in also),
        remarks=(f"its names were put under {added.removesuffix('.')!r} of the model",) if added else (),
    )


def _fits(own: Shapes, state: State) -> int:
    return sum(own.get(name) == tensor.shape for name, tensor in state.items())


def _equal(state: State, other: State, own: Shapes) -> bool:
    """Whether both hold the same values for the model."""
    return all(name in state and name in other and torch.equal(state[name], other[name]) for name in own)


def _converted(model: nn.Module, own: Shapes, found: Match) -> Match:
    """The match after the conversion of the library that made the model, where more fits then."""
    best, left = found, len(found.state) - found.fits
    for library, convert in _conversions(model):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the library's, about its own code
                converted = convert(dict(found.state))
            again = max(_under_prefixes(own, dict(converted), "", None), key=lambda each: each.fits)
        except Exception:  # a conversion made for other files fails in many ways
            continue
        if (again.fits, -(len(again.state) - again.fits)) > (best.fits, -left):
            remarks = (*found.remarks, *_remarks(library, found.state, again.state))
            best, left = replace(found, state=again.state, fits=again.fits, remarks=remarks), len(again.state) - again.fits
    return best


def _remarks(library: str, before: State, after: State) -> Iterator[str]:
    """What a conversion did: names, and each tensor whose values it resampled."""
    if {*after} - {*before}:
        yield f"names converted by {library}"
    elif left_out := [name for name in before if name not in after]:
        yield f"left out by {library}: {sample(left_out)}"
    sizes = {tensor.numel() for tensor in before.values()}
    for name, tensor in after.items():
        first = before.get(name)
        cut = first is not None and first.ndim == 3 == tensor.ndim and torch.equal(first[:, -tensor.shape[1] :], tensor)
        same = tensor.numel() in sizes if first is None else first.numel() == tensor.numel() and _same_values(first, tensor)
        if RESIZABLE.search(name) and not cut and not same:
            came = "" if first is None else f" from {list(first.shape)}"
            yield f"{name} resized{came} to {list(tensor.shape)} by {library}"


def _same_values(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.flatten().sort().values, second.flatten().sort().values)


def _conversions(model: nn.Module) -> Iterator[tuple[str, Conversion]]:
    """What the library that made the model does to the names and values of a file before it loads them."""
    for kind in type(model).__mro__:
        module = sys.modules.get(kind.__module__)
        if kind.__module__.startswith("timm.models.") and (timm := getattr(module, "checkpoint_filter_fn", None)) is not None:
            yield "timm", lambda state: timm(state, model)
            if "adapt_layer_scale" in inspect.signature(timm).parameters:  # its builder asks for it of DeiT III
                yield "timm", lambda state: timm(state, model, adapt_layer_scale=True)
            return
        if kind.__module__ == "torchvision.models.vision_transformer":
            vit: Any = model
            yield "torchvision", partial(module.interpolate_embeddings, vit.image_size, vit.patch_size)  # type: ignore[union-attr]
            return
        if kind.__module__ == "transformers.modeling_utils":
            yield "transformers", partial(_by_transformers, model)
            return


def _by_transformers(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as `from_pretrained` of the model's own class places them."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch_seeded(0):
            loaded, facts = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=state,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    other_shape = {name: state.get(name, torch.zeros(shape)) for name, shape, _ in facts["mismatched_keys"]}
    random = {*facts["missing_keys"], *other_shape}
    placed = {name: tensor for name, tensor in loaded.state_dict().items() if name not in random}
    return placed | other_shape | {name: state.get(name, torch.empty(0)) for name in facts["unexpected_keys"]}
