"""What replaced maps say, in two sentences for each replacement, made from rules that tests can turn around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from collapse_probe.results.intervention import Effect, Interventions
from collapse_probe.results.text import interval, number

KEEPS = 0.95
"""From this share of unchanged top answers on, a replacement counts as one that costs little."""
MAJORITY = 0.5
SPARED, ONLY_ALONE, USED, MIXED = "spared", "spared only one at a time", "used", "used in some blocks"
ACTS = {
    "share": "Taking over the map of the block before",
    "mean": "Putting each block's mean map over the images in place of its own",
    "uniform": "Attending to all tokens equally",
    "identity": "Letting every token read itself alone",
    "skip": "Leaving out the attention branch",
}
WORTH = {
    "share": "their own maps add little to those of the blocks before",
    "mean": "it matters little that their maps depend on the image",
    "uniform": "it matters little where they attend",
    "identity": "it matters little that tokens read from each other there",
    "skip": "their attention matters little",
}
NOT_SAID = {
    "share": "It does not say that these blocks' attention is useless, nor that their maps are alike: a map that hardly "
    "matters can be replaced by any other.",
    "mean": "It does not say that these blocks attend to nothing: a pattern of positions is kept.",
    "uniform": "It does not say that these blocks do nothing: averaging the tokens' values remains.",
    "identity": "It does not say that these blocks do nothing: each token's own value is still added.",
    "skip": "It does not say that a model trained without these branches would be as good.",
}


@dataclass(frozen=True)
class Answer:
    """The case in a few words, two sentences, and what they do not say."""

    kind: str
    case: str
    sentences: tuple[str, ...]
    caveats: tuple[str, ...]


def answers(found: Interventions) -> list[Answer]:
    """One answer for each kind of replacement that could be made."""
    return [_answer(found, kind) for kind, effects in found.single.items() if any(e.kl is not None for e in effects)]


def case_of(single: Sequence[Effect], whole: Effect) -> str:
    """spared: all blocks together keep the answers; spared only one at a time: most blocks alone do; used: most do not."""
    cheap = np.mean([keeps(e) for e in single])
    if keeps(whole):
        return SPARED
    if cheap == 1:
        return ONLY_ALONE
    return MIXED if cheap >= MAJORITY else USED


def keeps(effect: Effect) -> bool:
    """Whether the top answers of at least KEEPS of the images stay."""
    return effect.agreement is not None and effect.agreement >= KEEPS


def _answer(found: Interventions, kind: str) -> Answer:
    single = [e for e in found.single[kind] if e.kl is not None]
    whole = found.cumulative[kind][-1]
    case = case_of(single, whole)
    worst = max(single, key=lambda e: e.kl or 0.0)
    cheap, count = sum(map(keeps, single)), len(single)
    alone = f"{ACTS[kind]} in block {worst.blocks[0]}: {told(worst)}."
    first = (
        f"{ACTS[kind]} keeps at least {KEEPS:.0%} of the top answers in {cheap} of {count} blocks, one at a time; block "
        f"{worst.blocks[0]} changes the output most ({told(worst)})."
    )
    second = _second(kind, case, whole, count, cheap)
    return Answer(kind, case, (alone if count == 1 else first, second), tuple(_caveats(found, kind)))


def _second(kind: str, case: str, whole: Effect, count: int, cheap: int) -> str:
    if count == 1:
        return f"On these images {WORTH[kind] if case == SPARED else 'the block uses what was replaced'}."
    together = f"In all {count} together {told(whole)}"
    if case == SPARED:
        return f"{together}: on these images {WORTH[kind]}."
    if case == ONLY_ALONE:
        return f"{together}: each can be spared alone, but not all of them."
    if case == MIXED:
        return f"{together}: {cheap} blocks can be spared one at a time, the others cannot."
    return f"{together}: most of these blocks use what was replaced."


def told(effect: Effect) -> str:
    """The numbers of one effect in words."""
    assert effect.agreement is not None
    parts = [f"{effect.agreement:.1%} of the top answers stay", f"KL {number(effect.kl)} nats"]
    if effect.kl_ci95 is not None:
        parts[-1] += f", 95 % interval {interval(effect.kl_ci95)}"
    if effect.accuracy is not None and effect.accuracy_change is not None:
        sign = "+" if effect.accuracy_change > 0 else ""
        parts.append(f"accuracy {effect.accuracy:.1%}, {sign}{number(100 * effect.accuracy_change, 1)} points")
    return "; ".join(parts)


def _caveats(found: Interventions, kind: str) -> list[str]:
    said = [NOT_SAID[kind]]
    if str(found.model.get("weights") or "").startswith("random"):
        said.insert(0, "The weights are random: what is kept or lost here is no evidence about a trained model.")
    raw, kappa = (_mean(found.similarity.get(name, ())) for name in ("raw", "kappa"))
    if kind == "share" and raw is not None:
        shown = "undefined" if kappa is None else number(kappa)
        said.append(
            f"The raw cosine of neighbouring maps is {number(raw)} on average on the same images, κ {shown}; it can be high "
            "where sharing costs much, and low where it costs nothing."
        )
    images = int(found.data["images"])
    if kind == "mean":
        said.append(f"The mean maps are over the same {images} images, each of which has a share of 1/{images} in them.")
    said.append("The model was not trained with these maps, and the intervals cover the choice of images alone.")
    return said


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
