"""Which modules of a model are its blocks, which of them feed which, and which were not captured."""

from __future__ import annotations

import fnmatch
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from collapse_probe.capture.attention_operators import LINEAR
from collapse_probe.capture.layers import is_attention, module_class
from collapse_probe.capture.plan import Frame, Plan, Tap
from collapse_probe.capture.recorder import ModuleCall, PassLog, weights_of

NO_MIDDLE = (
    "where its attention has been added and its MLP not yet, no module reads the residual stream: both are added at once, a "
    "norm follows the sum, or the block is one operator"
)
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def block_paths(model: nn.Module, log: PassLog, owners: Sequence[str], pattern: str | None = None) -> dict[str, str | None]:
    """For each attention owner the dotted path of its block, None where nothing around it repeats.

    With a `pattern` (`stages.*.blocks.*`) the block is the innermost module around the attention whose path matches.
    Otherwise it is the innermost child of a container that has a matrix outside all attention owners (its MLP), else the
    innermost child of a container. Where several children of one container inside such a block attend one after the other,
    these are the blocks, and what is around them is a stage; so is what has other blocks inside. Blocks kept as attributes
    have no container: then the innermost module with an MLP counts.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = list(dict.fromkeys(owners))
    attention = {id(w) for owner in owners if owner for w in weights_of(modules[owner])}

    def matrices(path: str) -> int:
        return sum(w.ndim >= 2 and id(w) not in attention for w in weights_of(modules[path]))

    def has_mlp(path: str) -> bool:
        return matrices(path) > 0

    def is_whole(path: str) -> bool:  # more than what projects the result of its attention
        return matrices(path) > 1

    paths: dict[str, str | None] = {}
    loose: dict[str, str] = {}
    for owner in owners:
        parts = owner.split(".") if owner else []
        around = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        if pattern is not None:
            paths[owner] = next((path for path in around if _matches(path, pattern)), None)
            continue
        children = [path for path in around if isinstance(modules[path.rpartition(".")[0]], _CONTAINERS)]
        found = [path for path in children if has_mlp(path)]
        paths[owner] = next(iter(found or children), None)
        if not children:
            loose[owner] = next((path for path in around if has_mlp(path)), owner)
    if pattern is not None:
        return paths
    for stage in {path for path in paths.values() if path}:
        inside = [owner for owner in owners if paths[owner] == stage]
        below = {owner: child for owner in inside if (child := _child_below(owner, stage, modules, is_whole)) is not None}
        if len(set(below.values())) > 1 and _one_after_another(list(dict.fromkeys(below.values())), log):
            paths |= below
    for owner, outer in paths.items():
        if outer and any(other and other.startswith(f"{outer}.") for other in paths.values()):  # other blocks stand in it
            paths[owner] = _child_below(owner, outer, modules, is_whole) or outer
    classes = Counter(type(modules[path]) for path in dict.fromkeys(loose.values()))
    called = Counter(call.path for call in log.calls)
    for owner, path in loose.items():
        if path and (classes[type(modules[path])] > 1 or called[path] > 1 or not any(paths.values())):
            paths[owner] = path
    return paths


def _matches(path: str, pattern: str) -> bool:
    """Whether a path has as many parts as a pattern, and each fits: `*` stands for one part or a piece of it."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _child_below(owner: str, stage: str, modules: dict[str, nn.Module], is_whole: Callable[[str], bool]) -> str | None:
    """The outermost child of a container, or module with an MLP, inside a stage that the owner is in or is."""
    parts = owner.split(".")
    for n in range(stage.count(".") + 2, len(parts) + 1):
        path = ".".join(parts[:n])
        part = path != owner and is_whole(path) and not isinstance(modules[path], _CONTAINERS)
        if part or isinstance(modules[path.rpartition(".")[0]], _CONTAINERS):
            return path
    return None


def _one_after_another(paths: Sequence[str], log: PassLog) -> bool:
    """Whether each of some modules reads what the one before it gave."""
    spans = [Span.of(path, None, log) for path in paths]
    return all(later.read & earlier.bits for earlier, later in itertools.pairwise(spans))


@dataclass(frozen=True)
class Span:
    """The module calls that make up one call of a block, as bits, the calls whose results they read, and those from whose
    results its input was made."""

    bits: int
    read: int
    entered: int = 0

    @classmethod
    def of(cls, path: str, number: int | None, log: PassLog) -> Span:
        """`number` None: all calls of the module."""
        own = [c for c in log.calls if c.path == path and number in (None, c.number)]
        own = own or [c for c in log.calls if c.path.startswith(path + ".") and number in (None, c.number)]
        bits, read = 0, 0
        for call in own:
            bits, read = bits | call.bit, read | call.read
        first = log.calls.index(own[0]) if own else 0
        inside = (c for c in log.calls[first:] if c in own or c.path.startswith(path + "."))
        entered = next((c.entered for c in inside if c.input is not None), read)
        return cls(bits, read, entered)


def chains(frames: Sequence[Frame], log: PassLog) -> tuple[list[Frame], list[bool]]:
    """The blocks with those after one another that feed each other, and for each two whether the first one feeds the second.

    A block feeds another where what enters the other was made from its output, and no further block stands between; what a
    decoder reads of an encoder beside its own tokens does not count.
    """
    spans = {frame: Span.of(*frame, log) for frame in frames}
    reads = {f: [e for e in frames if e != f and spans[f].read & spans[e].bits & ~spans[f].bits] for f in frames}
    before = {f: [e for e in reads[f] if spans[f].entered & spans[e].bits] for f in frames}
    nearest = {f: [e for e in before[f] if not any(e in reads[k] for k in before[f] if k != e)] for f in frames}
    chains: list[list[Frame]] = []
    for frame in frames:
        fed_by = nearest[frame][0] if len(nearest[frame]) == 1 else None
        chain = next((c for c in chains if c[-1] == fed_by), None)
        if chain is None:
            chains.append([frame])
        else:
            chain.append(frame)
    order = [frame for chain in chains for frame in chain]
    return order, [nearest[later] == [earlier] for earlier, later in itertools.pairwise(order)]


def unheard_blocks(model: nn.Module, log: PassLog, heard: Sequence[Frame]) -> dict[Frame, str]:
    """Calls of modules that are blocks by their class or by what they compute, but in which no attention was heard, and why.

    Candidates are the children of the containers in which blocks that were heard stand, and the modules of their classes.
    """
    paths = {path for path, _ in heard}
    classes = {type(model.get_submodule(path)) for path in paths}
    parents = {path.rpartition(".")[0] for path in paths}
    named = set(attention_like(model, log.calls))
    events = {frame for event in log.events if is_attention(event, log) for frame in event.stack}
    unheard: dict[Frame, str] = {}
    for call in log.calls:
        frame = (call.path, call.number)
        kind = type(model.get_submodule(call.path))
        sibling = call.path.rpartition(".")[0] in parents and isinstance(
            model.get_submodule(call.path.rpartition(".")[0]), _CONTAINERS
        )
        if not call.path or frame in events or frame in heard or not (sibling or kind in classes):
            continue
        if any(path in paths for path in _around(call.path)) or any(path.startswith(call.path + ".") for path in paths):
            continue
        what = _what_ran(log, frame)
        inside = [path for path in named if path == call.path or path.startswith(call.path + ".")]
        if what or (kind in classes and inside):
            where = inside[0] if inside else call.path
            ran = what or "ran without a softmax that multiplies values"
            unheard[frame] = f"{where} ({module_class(model, where)}) {ran}"
    return unheard


def _around(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _what_ran(log: PassLog, frame: Frame) -> str:
    """What a module call computed in place of attention that can be heard; empty where no activations were multiplied."""
    for stack, operator in log.opaque:
        if frame in stack:
            return f"runs inside {operator}, which cannot be recorded"
    for stack, what in log.suspects:
        if frame in stack:
            return f"computes {what}"
    for event in log.events:
        if frame in event.stack:
            return f"computes {LINEAR}" if event.attention.shape[-1] > 1 else ""
    return "multiplies activations, but by no softmax" if frame in log.products else ""


def attention_like(model: nn.Module, calls: Sequence[ModuleCall]) -> list[str]:
    """Modules that ran, have parameters and are called attention by their class or name."""
    paths = []
    for path in dict.fromkeys(call.path for call in calls):
        name = f"{path.rpartition('.')[2]} {module_class(model, path)}".lower()
        if ("attn" in name or "attention" in name) and next(weights_of(model.get_submodule(path)), None) is not None:
            paths.append(path)
    return paths


def nothing_heard(model: nn.Module, log: PassLog) -> str:
    """Why no attention of a model can be heard."""
    name, like = type(model).__name__, [path for path in attention_like(model, log.calls) if path]
    if log.opaque:
        stack, operator = log.opaque[0]
        owner = stack[-1][0]
        return (
            f"the attention of {owner or 'the model'} ({module_class(model, owner)}) runs inside {operator}, "
            "which cannot be recorded; switch the model to PyTorch's scaled_dot_product_attention or to eager "
            "attention (transformers: attn_implementation='sdpa')"
        )
    if log.suspects or log.events:
        stack, kind = log.suspects[0] if log.suspects else (log.events[0].stack, LINEAR)
        owner = next((path for path, _ in reversed(stack) if path in like), stack[-1][0])
        what = kind if kind != LINEAR else f"{kind}, which has no attention map"
        return (
            f"{name} has no softmax attention that can be recorded: {owner or name} ({module_class(model, owner)}) "
            f"computes {what}; analyse a model with softmax attention"
        )
    if like:
        return (
            f"{name} has no token attention that can be recorded; {like[0]} ({module_class(model, like[0])}) "
            "ran without a softmax whose result multiplies values; analyse a model with softmax attention"
        )
    return f"{name} has no attention: no softmax multiplied any values in it; analyse a Vision Transformer"


def notes_beside(model: nn.Module, log: PassLog, plan: Plan) -> list[str]:
    """Notes on what was computed outside all blocks and might be attention."""
    told = {layer.owner for layer in plan.layers}
    notes = []
    for stack, kind in (*log.opaque, *log.suspects):
        owner = stack[-1][0]
        if not any(path in told for path, _ in stack):
            what = "products of products (linear attention?)" if kind == LINEAR else kind
            notes.append(
                f"{owner or 'the model'} ({module_class(model, owner)}) computes {what}; it is not counted as attention"
            )
    return list(dict.fromkeys(notes))


def middle_tap(block: Frame, entered: ModuleCall | None, layout: str, log: PassLog) -> Tap | None:
    """Where the stream x′ = x + Attn(x) is read in a block that `entered` gave its input x, and that gives x′ + MLP(x′).

    None where it cannot be told (`NO_MIDDLE`).
    """
    if entered is None or entered.input is None:
        return None
    own = sum(1 << event.index for event in log.events if block in event.stack)
    whole = next((call for call in log.calls if (call.path, call.number) == block), None)
    grid = entered.input
    for call in log.calls:
        if call.input is None or not call.path.startswith(f"{block[0]}."):
            continue
        alike, flat = call.input.shape == grid.shape, layout == "BhwD" and call.input.shape == grid.flatten(1, 2).shape
        if not (alike or flat):
            continue
        if not any(readers & entered.bit and attention & own for readers, attention in call.sum):
            continue
        given = [whole.gave] if whole is not None else [later.sum for later in log.calls]
        if any(readers & call.bit for total in given for readers, _ in total):
            return Tap(call.path, call.number, "input", "BND" if flat else layout)
    return None
