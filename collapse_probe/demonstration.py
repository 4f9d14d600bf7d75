"""The demonstration: the bundled pairs compared on held-out digits, and what their attention maps are worth; no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from collapse_probe.comparison import compare
from collapse_probe.effects import Effect, Interventions
from collapse_probe.intervention import intervene
from collapse_probe.side_by_side import Comparison
from collapse_probe.splitting import split_data
from collapse_probe.words import number

DATA = "bundled:digits"
PAIRS = {
    "positive control": ("digits-tied-mhsa", "digits-tied-re-attention"),
    "ordinary ViT": ("digits-mhsa", "digits-re-attention"),
}
LABELS = ("MHSA", "Re-attention")
NULL_IMAGES = 32
SHARING_IMAGES = 96
COLLAPSED, NEAR_ZERO, STILL_ALIKE, ORDINARY = 0.9, 0.1, 0.9, 0.35  # of kappa, of |raw|, of raw probs, of kappa
SPARED = 0.02  # of accuracy

Report = Callable[[str], None]


@dataclass(frozen=True)
class Demonstration:
    """The comparison of each pair, and for each model what sharing its maps costs: by the names in PAIRS."""

    comparisons: dict[str, Comparison]
    sharing: dict[str, dict[str, Interventions]]


def demonstrate(*, seed: int = 0, device: str = "auto", report: Report | None = None, watch: Any = None) -> Demonstration:
    """Compare the bundled pairs, then let their blocks use the map of the block before."""
    say = report or (lambda text: None)
    images = split_data(DATA).held_out
    comparisons: dict[str, Comparison] = {}
    sharing: dict[str, dict[str, Interventions]] = {}
    for pair, names in PAIRS.items():
        say(f"the {pair}: {' and '.join(names)} on {len(images)} held-out digits")
        subjects = {label: f"ours:{name}" for label, name in zip(LABELS, names, strict=True)}
        facts: dict[str, Any] = {"seed": seed, "device": device, "null_images": NULL_IMAGES, "gallery_images": 2}
        comparisons[pair] = compare(subjects, images, watch=watch, command="collapse-probe demo", **facts)
        say(f"the {pair}: what sharing the maps of neighbouring blocks costs")
        few = images.subset(SHARING_IMAGES, seed)
        sharing[pair] = {
            label: intervene(address, few, ("share",), seed=seed, device=device) for label, address in subjects.items()
        }
    return Demonstration(comparisons, sharing)


def upper(found: Interventions) -> Effect:
    """Sharing in the upper three quarters of the blocks at once: block b and all above it use the map of the block below b."""
    effects = found.cumulative["share"]
    depth = max(max(effect.blocks) for effect in effects) + 1
    return next(effect for effect in effects if min(effect.blocks) == depth // 4)


def told(shown: Demonstration) -> list[tuple[str, list[str]]]:
    """The story, chapter by chapter: titles and sentences, which follow the numbers, whatever they are."""
    chapters = [
        ("What collapse looks like", _control(shown)),
        ("What Re-attention does, and where", _remedy(shown)),
        ("What an ordinary ViT shows", _ordinary(shown)),
        ("What the maps are worth", _worth(shown)),
    ]
    return chapters


def _of(shown: Demonstration, pair: str, label: str) -> Mapping[str, Any]:
    return shown.comparisons[pair].subjects[label].summary


def _control(shown: Demonstration) -> list[str]:
    n = _of(shown, "positive control", "MHSA")
    raw, null, kappa = (n[f"{key}_adjacent"] for key in ("attention_similarity", "other_token", "kappa"))
    found = (
        f"One block, reused 24 times and trained to read digits, attends alike throughout: neighbouring blocks have a raw "
        f"cosine of {number(raw)}, other tokens' attention explains {number(null)} of it, and of what is left to agree "
        f"{number(100 * kappa, 1)} % does (κ {number(kappa)}); {n['similar_blocks_corrected']} of 23 pairs count as shared."
    )
    if kappa < COLLAPSED:
        found = f"This control should show collapse, but κ is {number(kappa)} (raw {number(raw)}): read it with care."
    return [
        found,
        "This is collapse by construction, there before any training: it shows how every number here reads when maps are "
        "shared, and is no evidence about ordinary ViTs.",
    ]


def _remedy(shown: Demonstration) -> list[str]:
    n = _of(shown, "positive control", "Re-attention")
    weights, probs = n["attention_similarity_adjacent"], n["attention_similarity_probs_adjacent"]
    kappa = n["kappa_probs_adjacent"]
    gone, alike = abs(weights) <= NEAR_ZERO, probs >= STILL_ALIKE
    after = f"what multiplies V (weights) has a raw cosine of {number(weights)}"
    before = f"the softmax behind it (probs) one of {number(probs)}, κ {number(kappa)}"
    if gone and alike:
        text = (
            f"In its twin with Re-attention {after}, but {before}: the blocks still attend alike, and each then mixes its "
            "heads in another way. The number that falls is the one taken after the mixing."
        )
    else:
        text = f"In its twin with Re-attention {after}, and {before}."
    return [
        text,
        "Every block has a mixing matrix and a BatchNorm of its own here; an untrained Re-attention model reads the same, so "
        "that the fall is no sign of something learned.",
    ]


def _ordinary(shown: Demonstration) -> list[str]:
    n = _of(shown, "ordinary ViT", "MHSA")
    raw, null, kappa = (n[f"{key}_adjacent"] for key in ("attention_similarity", "other_token", "kappa"))
    counts = f"{n['similar_blocks']} of 23 pairs are similar at 0.9, {n['similar_blocks_corrected']} beyond their null"
    text = f"With 24 blocks of their own, trained alike, the raw cosine is {number(raw)}: {counts}. "
    if kappa < ORDINARY:
        share = n.get("attention_entropy_share")
        text += (
            f"Nearly all of it is there for the wrong token too ({number(null)}; κ {number(kappa)}): its attention is "
            f"{'near-uniform' if share is not None and share > 0.8 else 'alike for all tokens'}"
            + ("" if share is None else f" ({number(100 * share, 1)} % of the largest entropy)")
            + ", and near-uniform maps are alike whatever was learned."
        )
    else:
        text += f"Other tokens explain {number(null)} of it; κ is {number(kappa)}, so the blocks do share attention."
    twin = _of(shown, "ordinary ViT", "Re-attention")
    return [
        text,
        f"Its twin with Re-attention reads {number(twin['attention_similarity_adjacent'])} in weights and "
        f"{number(twin['attention_similarity_probs_adjacent'])} in probs.",
    ]


def _worth(shown: Demonstration) -> list[str]:
    parts = []
    for pair, models in shown.sharing.items():
        for label, found in models.items():
            effect = upper(found)
            change = effect.accuracy_change
            if change is not None and effect.accuracy is not None:
                cost = "costs nothing to speak of" if change > -SPARED else f"costs {number(-100 * change, 1)} points"
                parts.append(f"{label} ({pair}): accuracy {number(100 * effect.accuracy, 1)} %, {cost}")
    return [
        "If the upper 18 of 24 blocks all use the map of the block beneath them: " + "; ".join(parts) + ".",
        "This is the functional test: a raw cosine near one says nothing of what sharing costs, and sharing that costs "
        "little does not need a high cosine. The models were not trained for it, and these are digits, 8 pixels wide.",
    ]
