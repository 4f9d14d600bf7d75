"""What replacing attention maps shows: for each kind of replacement a case and two sentences, from the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from collapse_probe.report.intervention import dropping, tokens
from collapse_probe.results.intervention import GREEDY, OTHER, Effect, Interventions
from collapse_probe.results.readings import is_untrained, mean, not_loaded, trained_on
from collapse_probe.results.rules import KEEPS_ANSWERS, MOST_BLOCKS, ROUNDING
from collapse_probe.results.text import interval, number, numbered
from collapse_probe.results.verdict import Verdict

SPARED, ONLY_ALONE, USED, MIXED = "spared", "spared only one at a time", "used", "used in some blocks"
NOT_READABLE = "nothing can be read"
WORDS = (
    dropping.WORDS
    | tokens.WORDS
    | {
        SPARED: "not needed: all that were tried can be replaced together",
        ONLY_ALONE: "not needed one at a time, but needed together",
        MIXED: "needed in some blocks",
        USED: "needed in most blocks",
        NOT_READABLE: "not judged: the answers do not vary",
    }
)
"""What each case says of a model's own maps, or of the blocks that were left out."""
TEXTS = {  # what is done; what it means where it costs little; what it does not say
    "share": (
        "Using the map of the block before",
        "their own maps add little to those of the blocks before",
        "It does not say that these blocks' attention is useless, nor that their maps are alike: a map that hardly matters can "
        "be replaced by any other.",
    ),
    "mean": (
        "Using each block's mean map over the images",
        "it matters little that their maps depend on the image",
        "It does not say that these blocks attend to nothing: a pattern of positions is kept.",
    ),
    "donor": (
        "Using another image's map",
        "it matters little that their maps are those of the image",
        "It does not say that these blocks attend to nothing: another image's map is a trained one.",
    ),
    "uniform": (
        "Attending to all tokens equally",
        "it matters little where they attend",
        "It does not say that these blocks do nothing: averaging the tokens' values remains.",
    ),
    "identity": (
        "Letting every token attend to itself alone",
        "it matters little that tokens read from each other there",
        "It does not say that these blocks do nothing: each token's own value is still added.",
    ),
    "skip": (
        "Leaving out the attention branch",
        "their attention matters little",
        "It does not say that a model trained without these branches would be as good.",
    ),
}


def verdicts(interventions: Interventions) -> list[Verdict]:
    """One verdict for each kind of replacement that could be made, with the kind as its label."""
    single = {kind: effects for kind, effects in interventions.single.items() if not kind.endswith(OTHER)}
    return [_verdict(interventions, kind) for kind, effects in single.items() if any(e.kl is not None for e in effects)]


def case_of(single: Sequence[Effect], whole: Effect) -> str:
    """spared: all blocks together keep the answers; spared only one at a time: most blocks alone do; used: most do not."""
    share = np.mean([keeps(e) for e in single])
    if keeps(whole):
        return SPARED
    return ONLY_ALONE if share == 1 else MIXED if share >= MOST_BLOCKS else USED


def keeps(effect: Effect) -> bool:
    """Whether the top answers of at least KEEPS_ANSWERS of the images stay."""
    return effect.agreement is not None and effect.agreement >= KEEPS_ANSWERS


def _verdict(interventions: Interventions, kind: str) -> Verdict:
    if silent := not_readable(interventions):
        return Verdict(NOT_READABLE, (*said_first(interventions), silent), label=kind)
    if kind in tokens.ACTS:
        said = (*said_first(interventions), *_tried(interventions), *tokens.sentences(interventions, kind))
        of_tokens = tokens.case_of(kind, [e for e in interventions.single[kind] if e.kl is not None])
        return Verdict(
            of_tokens, said, tuple(_caveats(interventions, kind, "", tokens.caveats(interventions, kind))), label=kind
        )
    if kind in dropping.PARTS:
        case = dropping.case_of(interventions.orders.get(kind, {}).get(GREEDY))
        answer, *others = dropping.sentences(interventions, kind)
        said = (*said_first(interventions), answer, *_tried(interventions), *others)
        return Verdict(case, said, tuple(_caveats(interventions, kind, "", dropping.caveats(interventions, kind))), label=kind)
    single, whole = [e for e in interventions.single[kind] if e.kl is not None], interventions.cumulative[kind][-1]
    case, count, cheap = case_of(single, whole), len(single), sum(map(keeps, single))
    largest = max(single, key=lambda e: e.kl or 0.0)
    block = largest.blocks[0]
    act, worth, not_said = TEXTS[kind]
    if count == 1:
        first = f"{act} in block {block}: {_numbers(largest)}."
        second = f"On these images {worth if case == SPARED else 'the block uses what was replaced'}."
    else:
        first = (
            f"{act} keeps at least {100 * KEEPS_ANSWERS:g} % of the top answers in {cheap} of {count} blocks, one at a time; "
            f"block {block} changes the output most ({_numbers(largest)})."
        )
        meaning = {
            SPARED: f"on these images {worth}",
            ONLY_ALONE: "each can be spared alone, but not all of them",
            MIXED: f"{cheap} blocks can be spared one at a time, the other{'' if count - cheap == 1 else 's'} cannot",
            USED: "most of these blocks use what was replaced",
        }
        second = f"In all {count} together {_numbers(whole)}: {meaning[case]}."
    sentences = (
        *said_first(interventions),
        *_tried(interventions),
        first,
        second,
        *_from_a_block_on(interventions.cumulative[kind], interventions.model.get("blocks")),
    )
    return Verdict(case, sentences, tuple(_caveats(interventions, kind, not_said)), label=kind)


def headline(answers: Sequence[Verdict], interventions: Interventions) -> str:
    """The answer of the page in a few words; where blocks, or parts of them, were left out, which can go, at what price."""
    dropped = [kind for kind in dropping.PARTS for each in answers if each.label == kind and each.case != NOT_READABLE]
    if dropped:
        return dropping.answer(interventions, dropped[0])
    if len(answers) == 1 and answers[0].label in tokens.ACTS:
        if answers[0].case == tokens.NO_SINKS:
            return "No head of any block has a sink in any image"
        return f"{'Sinks' if answers[0].label.startswith('sinks') else 'States of prefix tokens'} are {WORDS[answers[0].case]}"
    if len(answers) == 1:
        return f"Own attention maps are {WORDS[answers[0].case]}"
    if all(each.label in tokens.ACTS for each in answers):
        prefix, sinks = (any(each.label.startswith(name) for each in answers) for name in ("prefix", "sinks"))
        what = (
            "the states of prefix tokens and sinks" if prefix and sinks else "sinks" if sinks else "the states of prefix tokens"
        )
        return f"What {what} are worth"
    if any(each.label in tokens.ACTS for each in answers):
        return "What a model's own attention maps and tokens are worth"
    return "What a model's own attention maps are worth"


def _from_a_block_on(cumulative: Sequence[Effect], count: int | None) -> list[str]:
    """From which block on all maps can be replaced together, of a model of `count` blocks.

    Nothing where that is none, one block, or all of them. Where only some blocks were tried, or could be, these are named.
    """
    spared = list(itertools.takewhile(keeps, cumulative))
    if len(spared) < 2 or len(spared) == len(cumulative):
        return []
    blocks = spared[-1].blocks
    if list(blocks) == list(range(min(blocks), count or 0)):
        return [f"From block {min(blocks)} on, all maps can be replaced together: {_numbers(spared[-1])}."]
    return [f"The maps of {numbered(blocks)} can be replaced together: {_numbers(spared[-1])}."]


def said_first(interventions: Interventions) -> list[str]:
    """What stands above all answers: images and weights that are not finite, a checkpoint that was loaded in part."""
    ill, part = interventions.run.get("nonfinite"), not_loaded(interventions.model)
    return [*([str(ill["sentence"])] if ill else []), *([f"{part}."] if part else [])]


def _tried(interventions: Interventions) -> list[str]:
    """That not all blocks were tried; nothing where they were."""
    chosen, count = interventions.run.get("blocks"), interventions.model.get("blocks")
    if not chosen or not count or len(chosen) >= count:
        return []
    return [f"Only {numbered(chosen)} of {count} {'was' if len(chosen) == 1 else 'were'} tried."]


def not_readable(interventions: Interventions) -> str:
    """Why the answers of the model say nothing about its attention: they do not vary; empty where they do."""
    spread, images = interventions.plain.get("logit_spread"), int(interventions.data["images"])
    if spread is None or spread > ROUNDING or images < 2:
        return ""
    return (
        f"Nothing can be read from replacing attention here: the model gives the same logits for all {images} images (they "
        f"differ by {spread:.0e} of the largest at most), as a head that was never trained does, so that no answer can change."
    )


def _numbers(effect: Effect) -> str:
    assert effect.agreement is not None
    ends = "" if effect.agreement_ci95 is None else f" (95 % CI {interval([100 * end for end in effect.agreement_ci95], 1)})"
    parts = [f"{number(100 * effect.agreement, 1)} % of the top answers stay{ends}", f"KL {number(effect.kl)} nats"]
    if effect.kl_ci95 is not None:
        parts[-1] += f", 95 % CI {interval(effect.kl_ci95)}"
    if effect.accuracy is not None and effect.accuracy_change is not None:
        sign = "+" if effect.accuracy_change > 0 else ""
        parts.append(f"accuracy {number(100 * effect.accuracy, 1)} %, {sign}{number(100 * effect.accuracy_change, 1)} points")
    return "; ".join(parts)


def _caveats(interventions: Interventions, kind: str, not_said: str, own: Sequence[str] = ()) -> list[str]:
    caveats, answers = [*own] or [not_said], interventions.plain.get("answers")
    if answers == 1 and int(interventions.data["images"]) > 1:
        caveats.insert(0, "The plain model gives the same answer to every image: that it stays says little; read the KL.")
    if known := trained_on(interventions.data):
        caveats.insert(0, known)
    if is_untrained(interventions.model):
        caveats.insert(0, "The weights are random: what is kept or lost here is no evidence about a trained model.")
    raw, kappa = (mean(np.array(interventions.similarity.get(name, ()), np.float64)) for name in ("raw", "kappa"))
    if kind == "share" and raw is not None:
        caveats.append(
            f"The raw similarity of adjacent blocks is {number(raw)} on average on the same images, κ "
            f"{'undefined' if kappa is None else number(kappa)}; it can be high where sharing costs much, and low where it "
            "costs nothing."
        )
    if kind == "mean":
        images = int(interventions.data["images"])
        caveats.append(f"The mean maps are over the same {images} images, each of which has a share of 1/{images} in them.")
    if own:
        return caveats
    return [*caveats, "The model was not trained with these maps, and the intervals cover the choice of images alone."]
