"""What the states of prefix tokens, or what sinks give, are worth: beside the same done to random other tokens."""

from __future__ import annotations

from collections.abc import Sequence

from collapse_probe.results.intervention import OTHER, Effect, Interventions
from collapse_probe.results.rules import KEEPS_ANSWERS
from collapse_probe.results.text import interval, number, numbered

NEEDED, SOMEWHERE, NOT_NEEDED, UNSURE = "needed in every block", "needed in some", "needed in none", "too few images to tell"
NO_SINKS = "no head has a sink"
WORDS = {
    NEEDED: "needed at every block",
    SOMEWHERE: "needed at some blocks",
    NOT_NEEDED: "not needed at any one block",
    UNSURE: "perhaps not needed: the intervals leave it open",
    NO_SINKS: "not judged: no head has a sink",
}
"""What each case says of the tokens that were edited."""
ACTS = {  # what is done; what the control does
    "prefix_zero": "Setting the states of prefix tokens to zeros",
    "prefix_mean": "Giving prefix tokens their mean state over the images",
    "prefix_noise": "Giving prefix tokens random states of the same length",
    "prefix_donor": "Giving prefix tokens the states of another image",
    "sinks_zero": "Setting the values at sinks to zero",
    "sinks_mean": "Giving sinks their mean value over the images",
    "sinks_donor": "Giving sinks the value at another image's sink",
    "sinks_redirect": "Taking the attention from sinks",
}
NOTHING = 1e-9
"""KL in nats up to which logits in float32 are the same to rounding."""
SHARE = f"{100 * KEEPS_ANSWERS:g} %"


def case_of(kind: str, single: Sequence[Effect]) -> str:
    """Whether the top answers stay when the tokens are edited at one block, by the intervals: NEEDED or SOMEWHERE where fewer
    than KEEPS_ANSWERS do at every or at some block, NOT_NEEDED where no fewer do at any, UNSURE else; NO_SINKS where there was
    nothing to edit.
    """
    if kind.startswith("sinks") and not any(effect.sinks for effect in single):
        return NO_SINKS
    ends = [effect.agreement_ci95 or (0.0, 1.0) for effect in single]
    lost = [high < KEEPS_ANSWERS for _, high in ends]
    if any(lost):
        return NEEDED if all(lost) else SOMEWHERE
    return NOT_NEEDED if all(low >= KEEPS_ANSWERS for low, _ in ends) else UNSURE


def sentences(interventions: Interventions, kind: str) -> list[str]:
    """What the edit costs, what the same costs elsewhere, and how far the patches move."""
    single = [e for e in interventions.single[kind] if e.kl is not None]
    of_sinks = kind.startswith("sinks")
    if case_of(kind, single) == NO_SINKS:
        return ["No head of any block has a sink in any image: nothing was edited."]
    largest = max(single, key=lambda e: e.kl or 0.0)
    if (largest.kl or 0.0) < NOTHING:
        return [f"{ACTS[kind]} changes nothing beyond rounding at any block (KL {largest.kl:.0e} nats at most)."]
    block = largest.blocks[0]
    kept = sum((e.agreement or 0.0) >= KEEPS_ANSWERS for e in single)
    control = next((e for e in interventions.single.get(kind + OTHER, ()) if e.blocks == (block,) and e.kl is not None), None)
    beside = "" if control is None else f" The same at random patch tokens there: {numbers(control)}."
    where = (
        f"in one block ({largest.sinks or 0:.2g} heads of an image in block {block})"
        if of_sinks
        else f"at the input of one block ({_which(interventions)})"
    )
    said = [
        f"{ACTS[kind]} {where} costs most at block {block}: {numbers(largest)}.{beside}",
        f"At {kept} of {len(single)} blocks at least {SHARE} of the top answers stay.",
    ]
    if of_sinks:
        total = sum(e.sinks or 0.0 for e in single)
        said.append(f"On average an image has a sink in {total:.2g} heads of these blocks; without one nothing is edited.")
    if largest.moved is not None:
        alike = "" if largest.shared is None else f", {number(100 * largest.shared, 1)} % of which all of them share"
        there = "" if control is None or control.moved is None else f"; by {number(100 * control.moved, 1)} % in the control"
        said.append(f"There the last patch tokens move by {number(100 * largest.moved, 1)} % of their length{alike}{there}.")
    return said


def numbers(effect: Effect) -> str:
    """What stays of the top answers, the KL, and the accuracy, with intervals."""
    ends = "" if effect.agreement_ci95 is None else f" (95 % CI {interval([100 * end for end in effect.agreement_ci95], 1)})"
    said = f"{number(100 * (effect.agreement or 0.0), 1)} % of the top answers stay{ends}, KL {number(effect.kl)} nats"
    if effect.accuracy_change is None:
        return said
    points = effect.accuracy_change_ci95
    ends = "" if points is None else f" (95 % CI {interval([100 * end for end in points], 1)})"
    return f"{said}, accuracy changes by {number(100 * effect.accuracy_change, 1)} points{ends}"


def _which(interventions: Interventions) -> str:
    positions = interventions.run.get("prefix_positions") or []
    said = numbered(positions).replace("blocks", "tokens").replace("block", "token")
    count = interventions.model.get("prefix_tokens")
    return f"{said}, the only prefix token" if count == 1 else f"{said}, of {count} prefix tokens"


def caveats(interventions: Interventions, kind: str) -> list[str]:
    """What it does not mean; that zeros alone overstate."""
    said = ["A token that other tokens can stand in for is not needed alone: this does not say that it holds nothing."]
    family = kind.partition("_")[0]
    tried = {name for name in interventions.single if name.startswith(f"{family}_") and not name.endswith(OTHER)}
    if tried == {f"{family}_zero"}:
        said.insert(
            0,
            "Only zeros were tried, which the model never saw there: zeros overstate what a token is worth (arXiv 2604.14433 "
            "reports tens of points of accuracy for zeros, and about one for means, noise or another image's states); try "
            "mean, noise and donor as well.",
        )
    if kind.endswith("_mean"):
        images = int(interventions.data["images"])
        said.append(f"The mean is over the same {images} images, each of which has a share of 1/{images} in it.")
    if kind.endswith("_noise"):
        said.append("The length of the noise is that of the state that it replaces; published work may scale it otherwise.")
    return [*said, "The intervals cover the choice of images alone."]
