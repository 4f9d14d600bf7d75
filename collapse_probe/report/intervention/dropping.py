"""Which blocks of a model can go, at what price, and how sure that is: one sentence, and those that stand behind it."""

from __future__ import annotations

from collapse_probe.results.intervention import GREEDY, INFLUENCE, Effect, Interventions, Order
from collapse_probe.results.readings import is_untrained
from collapse_probe.results.rules import KEEPS_ANSWERS
from collapse_probe.results.text import interval, listed, number, numbered

SOME, UNSURE, NONE, NO_ORDER = "some blocks can go", "too few images to be sure", "none can go", "no order of the blocks"
WORDS = {
    SOME: "some are not needed",
    UNSURE: "some may not be needed: the interval leaves it open",
    NONE: "each is needed",
    NO_ORDER: "each was left out alone; no order was chosen",
}
"""What each case says of what was left out."""
PARTS = {  # what is left out; what it is called in a sentence
    "drop_block": ("Leaving out whole blocks", ("Block", "Blocks")),
    "drop_attention": ("Leaving out attention", ("The attention of block", "The attention of blocks")),
    "drop_mlp": ("Leaving out MLPs", ("The MLP of block", "The MLPs of blocks")),
}
SHARE = f"{100 * KEEPS_ANSWERS:g} %"


def case_of(order: Order | None) -> str:
    """Whether some blocks can go, by the images that had no part in the choice.

    SOME: at least KEEPS_ANSWERS of their top answers stay, and so says the whole interval; UNSURE: the interval holds
    KEEPS_ANSWERS, or it does for the block that costs least where no block could be chosen; NONE: the interval lies below.
    """
    if order is None:
        return NO_ORDER
    priced = order.priced[max(order.spared - 1, 0)]
    low, high = priced.agreement_ci95 or (0.0, 1.0)
    if not order.spared:  # the images that settle it may only be too few
        return UNSURE if high >= KEEPS_ANSWERS else NONE
    return SOME if low >= KEEPS_ANSWERS else UNSURE if high >= KEEPS_ANSWERS else NONE


def answer(interventions: Interventions, kind: str) -> str:
    """Which blocks can go, at what price, and on how many images that was measured: one sentence."""
    order, total = interventions.orders.get(kind, {}).get(GREEDY), interventions.model.get("blocks")
    one, several = PARTS[kind][1]
    if order is None:
        return (
            f"{several.removesuffix(' of blocks')} were left out one at a time; no order was chosen, which takes more of them."
        )
    others = f"{order_images(interventions, 'priced')} images that had no part in the choice"
    if not order.spared:
        first = order.priced[0]
        cheapest = f"{one[:1].lower()}{one[1:]} {first.blocks[0]}"
        rest = f"without {cheapest}, which costs least, {_share(first)} of the top answers stay, on {others}."
        if case_of(order) == UNSURE:
            return f"It cannot be told whether any of {_of(several)} can go, for which more images are needed: {rest}"
        return f"None of {_of(several)} can go: {rest}"
    priced = order.priced[order.spared - 1]
    subject = f"{one if order.spared == 1 else several} {listed(sorted(priced.blocks))}{f' of {total}' if total else ''}"
    can = {SOME: "can go", UNSURE: "can perhaps go", NONE: "cannot go, although the images that settled it said so,"}
    return f"{subject} {can[case_of(order)]} {price(priced)}; the price was measured on {others}."


def _of(several: str) -> str:
    return {"Blocks": "the blocks", "The attention of blocks": "the attention branches"}.get(several, "the MLPs")


def price(effect: Effect) -> str:
    """What an effect costs, in points of accuracy where there are labels, else in top answers: "for 0.4 points of accuracy"."""
    if effect.accuracy_change is None:
        lost = None if effect.agreement_ci95 is None else [100 * (1 - end) for end in reversed(effect.agreement_ci95)]
        ends = "" if lost is None else f" (95 % CI {interval(lost, 1)})"
        return f"for {number(100 * (1 - (effect.agreement or 0.0)), 1)} % of the top answers{ends}"
    gained, ci95 = effect.accuracy_change > 0, effect.accuracy_change_ci95
    points = None if ci95 is None else [100 * end for end in ci95] if gained else [-100 * end for end in reversed(ci95)]
    ends = "" if points is None else f" (95 % CI {interval(points, 1)})"
    much = f"{number(100 * abs(effect.accuracy_change), 1)} points of accuracy"
    return f"with {much} gained{ends}" if gained else f"for {much}{ends}"


def _share(effect: Effect) -> str:
    ends = "" if effect.agreement_ci95 is None else f" (95 % CI {interval([100 * end for end in effect.agreement_ci95], 1)})"
    return f"{number(100 * (effect.agreement or 0.0), 1)} %{ends}"


def sentences(interventions: Interventions, kind: str) -> list[str]:
    """The answer, how sure it is, the order, single blocks and windows."""
    said, order = [answer(interventions, kind)], interventions.orders.get(kind, {}).get(GREEDY)
    if order is not None and order.spared:
        said += [_how_sure(order), *_beyond(order)]
    said += _beside_untrained(interventions, kind, case_of(order))
    if order is not None:
        said.append(_in_order(interventions, kind, order))
    single = [e for e in interventions.single[kind] if e.agreement is not None]
    cheap = [e.blocks[0] for e in single if (e.agreement or 0.0) >= KEEPS_ANSWERS]
    largest = max(single, key=lambda e: e.kl or 0.0)
    which = f" ({numbered(cheap)})" if cheap and len(cheap) < len(single) else ""
    said.append(
        f"One at a time, over all images, {len(cheap)} of {len(single)} can be left out{which} with at least {SHARE} of the "
        f"top answers unchanged; block {largest.blocks[0]} costs most: {_share(largest)} stay, KL {number(largest.kl)} nats."
    )
    if windows := interventions.windows.get(kind, ()):
        best = min(windows, key=lambda e: e.kl or 0.0)
        said.append(
            f"Of the {len(windows)} windows of {len(best.blocks)} consecutive blocks, {numbered(best.blocks)} cost least: "
            f"{_share(best)} of the top answers stay, {price(best)}; it is the best of {len(windows)} on the same images, "
            "which makes it look cheaper than it is."
        )
    return said


def _how_sure(order: Order) -> str:
    priced = order.priced[order.spared - 1]
    verdicts = {
        SOME: f"the whole interval lies at or above {SHARE}",
        UNSURE: f"the interval holds {SHARE}, from which on we say that blocks can go, so that more images have to decide",
        NONE: f"fewer than the {SHARE} from which on we say that blocks can go",
    }
    kl = "" if priced.kl_ci95 is None else f", 95 % CI {interval(priced.kl_ci95)}"
    return f"There {_share(priced)} of the top answers stay (KL {number(priced.kl)} nats{kl}): {verdicts[case_of(order)]}."


def _beyond(order: Order) -> list[str]:
    """What the next block would cost."""
    if order.spared == len(order.blocks):
        return []
    after = order.priced[order.spared]
    return [f"Without block {order.blocks[order.spared]} as well, {_share(after)} would stay, {price(after)}."]


def _beside_untrained(interventions: Interventions, kind: str, case: str) -> list[str]:
    """What an untrained copy keeps without the same blocks, and what that says of blocks that can go.

    That it is learned takes a trained model, blocks that can go, and an interval of the copy that lies below KEEPS_ANSWERS.
    """
    copy = interventions.untrained
    effect = None if copy is None else next((e for e in copy.effects if e.kind == kind), None)
    if copy is None or effect is None:
        return []
    said = f"Without the same, an untrained copy keeps {_share(effect)} of its own top answers ({numbered(effect.blocks)})"
    if copy.answers == 1:
        return [f"{said}; but it gives all {copy.images} images the same answer, which says little."]
    if (effect.agreement or 0.0) >= KEEPS_ANSWERS:
        return [f"{said}, so that losing nothing is no sign of what was learned."]
    if case != SOME or is_untrained(interventions.model):
        return [f"{said}."]
    below = effect.agreement_ci95 is not None and effect.agreement_ci95[1] < KEEPS_ANSWERS
    meaning = "so that these can go is learned" if below else f"too few images to tell this from {SHARE}"
    return [f"{said}, {meaning}."]


def _in_order(interventions: Interventions, kind: str, order: Order) -> str:
    others, beside = interventions.orders[kind].get(INFLUENCE), ""
    if others is not None:
        at = max(order.spared, 1)
        own, other = _share(order.priced[at - 1]), _share(others.priced[at - 1])
        beside = (
            f" By their influence (1 − the cosine of a token before and after the block) they would go in the order "
            f"{_steps(others)}; the first {at} of these keep {other} of the top answers, those by loss {own}."
        )
    return (
        f"They go in the order {_steps(order)}: each time the one whose loss costs the least KL after those that are gone, on "
        f"{order_images(interventions, 'chose')} images; how many can go was settled on "
        f"{order_images(interventions, 'settled')} others.{beside}"
    )


def _steps(order: Order) -> str:
    return ", ".join(map(str, order.blocks))


def order_images(interventions: Interventions, part: str) -> int:
    """How many images `chose` the orders, `settled` how many blocks can go, or `priced` them."""
    return int(interventions.run.get("order_images", {}).get(part, 0))


def caveats(interventions: Interventions, kind: str) -> list[str]:
    """What the answer does not mean."""
    order, said = interventions.orders.get(kind, {}).get(GREEDY), []
    if order is not None and order.spared:
        chosen, priced = order.chosen[order.spared - 1], order.priced[order.spared - 1]
        said.append(
            f"On the images that chose the order they go {price(chosen)}, KL {number(chosen.kl)} nats; on those of the price "
            f"{price(priced)}, KL {number(priced.kl)} nats: only these say what it costs."
        )
    return [
        *said,
        "A residual stream makes a single block cheap to leave out, also in networks that learned nothing: that it can go does "
        "not say that it computes nothing.",
        "The model was not trained without these parts; training it further may win back what is lost.",
        "The intervals cover the choice of the images that give the price, not that of those that chose the order.",
    ]
