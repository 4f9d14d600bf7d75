"""What of a model its numbers speak of: which blocks are neighbours in depth, which are not compared, what is left out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from collapse_probe.capture.plan import Layer, MapGroup, Plan
from collapse_probe.results.text import no_neighbours, numbered, spans

NOT_HEARD = "not captured"
"""How the reason of a block begins whose attention could not be captured."""
MOST_NAMED = 3  # layers that are named one by one
MOST_REASONS = 2  # why layers are left out, beside each metric's numbers
NO_PATCHES = "the tokens do not come from the image"


def depth_neighbours(plan: Plan) -> tuple[bool, ...]:
    """Whether each two consecutive depths are what enters a block and what leaves it; [depths − 1]."""
    return (True, *plan.adjacent_blocks) if plan.blocks else ()


def has_patches(plan: Plan) -> bool:
    """Whether the tokens come from the image, so that patches can be told among them."""
    return any(plan.patch_shapes)


def groups_of(plan: Plan, windowed: bool, without: Sequence[int] = ()) -> list[MapGroup]:
    """The groups of layers whose maps are taken; those inside windows only where `windowed` and where no token is left out, as
    the tokens of a window are numbered by themselves.
    """
    return [group for group in plan.map_groups() if group.windows == 1 or (windowed and not without)]


def compared_pairs(plan: Plan) -> list[bool]:
    """Whether the maps of each place and the place before can be compared: neighbours, with maps of one group."""
    group_of = {place: g for g, group in enumerate(plan.map_groups()) for place in group.positions}
    alike = (group_of.get(i, -1) == group_of.get(i + 1, -2) for i in range(len(plan.adjacent)))
    return [adjacent and same for adjacent, same in zip(plan.adjacent, alike, strict=True)]


def no_pair(plan: Plan) -> str:
    """Why no two neighbouring blocks can be compared; empty where some can."""
    if any(compared_pairs(plan)):
        return ""
    if len(plan.map_layers) < 2:
        return "there is one block, and none before it"
    return no_neighbours(uncompared(plan))


def uncompared(plan: Plan) -> dict[str, list[int]]:
    """Why the maps of a place and the place before are not compared: the later places by the reason."""
    layers, reasons = [plan.layers[index] for index in plan.map_layers], dict[str, list[int]]()
    for i, compared in enumerate(compared_pairs(plan)):
        if not compared:
            reasons.setdefault(_why_not(plan, layers[i], layers[i + 1], plan.adjacent[i]), []).append(i + 1)
    return reasons


def _why_not(plan: Plan, first: Layer, second: Layer, adjacent: bool) -> str:
    missing = [_name(plan, layer) for layer in (first, second) if layer.reason.startswith(NOT_HEARD)]
    if missing:
        return f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not captured"
    for layer in (first, second):
        if layer.reason and layer.windows == 1:
            return layer.reason
    if not adjacent:
        return "the output of one is not the input of the other"
    if first.windows > 1 or second.windows > 1:
        return "their windows do not hold the same tokens"
    return "their maps have other shapes"


def _name(plan: Plan, layer: Layer) -> str:
    return layer.owner if layer.block is None else plan.blocks[layer.block]


@dataclass(frozen=True)
class Omission:
    """Layers that one reason leaves out: their names, and the places on the `block` axis that they have."""

    names: tuple[str, ...]
    why: str
    places: tuple[int, ...]

    @property
    def where(self) -> str:
        """The names, or where these are many their number with the first and the last."""
        if len(self.names) <= MOST_NAMED:
            return ", ".join(self.names)
        return f"{len(self.names)} layers ({self.names[0]} … {self.names[-1]})"


PER_WINDOW = "; measured per window, in the metrics that are defined for windows"


def omissions(plan: Plan, measured: Collection[int] | None = None) -> Iterator[Omission]:
    """What is left out of the attention metrics, in whole or in part; or of one that measures the places `measured`.

    A block that was not captured is called by its own name.
    """
    places = {plan.layers[index].owner: place for place, index in enumerate(plan.map_layers)}
    blocks = {layer.owner: _name(plan, layer) for layer in plan.layers if layer.reason.startswith(NOT_HEARD)}
    for each in plan.left_out:
        names = [name for name in each.names if places.get(name) not in (measured or ())]
        here = tuple(places[name] for name in names if name in places)
        part = measured is None and here and all(plan.layers[plan.map_layers[place]].windows > 1 for place in here)
        if names:
            why = each.why + (PER_WINDOW if part else "")
            yield Omission(tuple(dict.fromkeys(blocks.get(name, name) for name in names)), why, here)


def covered(plan: Plan, measured: Collection[int]) -> str:
    """What numbers over the places `measured` are of, where that is not simply every block; else empty."""
    count, parts = len(plan.map_layers), []
    left = [f"{each.where}: {each.why}" for each in omissions(plan, measured)]
    if left or len(measured) < count:
        of = f" of {count}" if len(measured) < count else ""
        parts.append(f"over {len(measured)}{of} blocks")
    windowed = [place for place in sorted(measured) if plan.layers[plan.map_layers[place]].windows > 1]
    if windowed:
        parts.append(f"per window, averaged over the windows of an image, in {numbered(windowed)}")
    if len(left) > MOST_REASONS:
        left = [*left[:MOST_REASONS], f"and {len(left) - MOST_REASONS} more"]
    return "; ".join([*parts, *([f"left out: {'; '.join(left)}"] if left else [])])


def covered_pairs(plan: Plan) -> str:
    """Which pairs of consecutive blocks a count is over, where these are not all; else empty."""
    pairs = compared_pairs(plan)
    if all(pairs):
        return ""
    which = numbered([place for place, compared in enumerate(pairs, start=1) if compared])
    return f"over {sum(pairs)} of {len(pairs)} pairs of consecutive blocks: {which} with the block before"


def places_of_blocks(plan: Plan) -> list[str]:
    """A sentence on which places of the `block` axis are whose, where blocks have attention of several kinds; else none."""
    if len(plan.map_layers) == len(plan.blocks):
        return []
    layers, starts = [plan.layers[index] for index in plan.map_layers], [0]
    for place in range(1, len(layers)):
        if (layers[place].block or 0) <= (layers[place - 1].block or 0):
            starts.append(place)
    spans_of = [range(start, end) for start, end in zip(starts, [*starts[1:], len(layers)], strict=True)]
    parts = [f"{spans(list(each))} ({layers[each[0]].owner} … {layers[each[-1]].owner})" for each in spans_of]
    return [f"blocks have attention of several kinds, each with a number on the axis of blocks: {'; '.join(parts)}"]
