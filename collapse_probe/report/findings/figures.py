"""The figures of the page: how each is drawn, its caption, and the section that it stands in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import numpy as np

from collapse_probe.report.findings.curves import adjacent_blocks, convergence, entropy, per_block, similar_blocks
from collapse_probe.report.findings.metric_figures import family_figure, kind, matrices, readings_of, switched, weights
from collapse_probe.report.findings.outliers import outlier_places
from collapse_probe.report.gallery import attention_gallery, rollout_gallery
from collapse_probe.report.heatmaps import SIGNED, Heatmap, grid, scale_of
from collapse_probe.report.html import Caption, Drawing, Figure, draw_figures
from collapse_probe.report.sheet import Sheet
from collapse_probe.results.findings import Findings
from collapse_probe.results.readings import null_of, phase_starts, result_of
from collapse_probe.results.rules import KAPPA_ABOVE
from collapse_probe.statistics.pair_tests import LEVEL, SHOWN, beyond_null, pairs_tested

MARK = f"dot (below the diagonal): more alike than the chance level, q ≤ {LEVEL:g}"


def similarity(findings: Findings, *, name: str) -> Sheet | None:
    """Cosine between the maps of every two blocks, or the patches at every two depths, its chance level and κ, in one place."""
    result = result_of(findings, name)
    if result is None:
        return None
    first, *others = readings_of(result, phase_starts(findings))
    first = replace(first, title="raw similarity (mean cosine)")
    tested = pairs_tested(findings.sureness.get("tests") or {}, name)
    if others and others[-1].name == "κ" and tested is not None and name == SHOWN:
        first = replace(first, beside={**first.beside, "q": np.array(tested["q"], dtype=np.float64)})
        others[-1] = replace(others[-1], marked=np.tril(beyond_null(tested), -1), mark=MARK)
    return switched([first, *(each for each in others if each.name != "untrained copy")])


def attention_variants(findings: Findings) -> Sheet | None:
    """The other readings of attention similarity (rows, centred, …): raw and κ, with a switch between the readings."""
    beside = "probs" if result_of(findings, "attention-similarity") is not None else ""
    results = {}
    for name, result in findings.metrics.items():
        family, _, variant = name.partition("@")
        if family == "attention-similarity" and variant not in ("", beside) and result.values is not None:
            panel = result.description.panel or variant.replace("@", ", ")
            results[name] = replace(result, description=replace(result.description, panel=panel))
    if not results:
        return None
    return matrices(results, phase_starts(findings))


def probs_and_weights(findings: Findings) -> Sheet | None:
    """What softmax gives beside what multiplies V, on one scale; drawn only where the two differ."""
    weights, probs = result_of(findings, "attention-similarity"), result_of(findings, "attention-similarity@probs")
    if weights is None or probs is None:
        return None
    scale = scale_of(weights.array, probs.array)
    titles = {"softmax map": probs, "final map": weights}
    phases = phase_starts(findings)
    return grid([Heatmap(r.array, f"{title}: raw similarity", scale, phases=phases) for title, r in titles.items()], 2)


def weights_depth(findings: Findings) -> Sheet | None:
    """The same weight matrix in every two blocks: entry by entry, and by the directions that it uses."""
    titles = {"depth": "entry by entry", "directions": "by the directions that are used"}
    results = {title: result_of(findings, f"weight-similarity@{suffix}") for suffix, title in titles.items()}
    panels = [Heatmap(result.array, title, SIGNED) for title, result in results.items() if result is not None]
    return grid(panels, len(panels)) if panels else None


@dataclass(frozen=True)
class Entry(Drawing):
    """One figure of the page: the section in which it stands, in it right after the figure `after` where that is there.

    `shows` names the metrics, with wildcards, that need no other figure.
    """

    section: str = "pictures"
    after: str = ""
    shows: tuple[str, ...] = ()


FIGURES: dict[str, Entry] = {
    "attention-similarity": Entry(
        "How alike the attention maps of two blocks are",
        "Raw similarity is the mean cosine between the attention of the same head and token in two blocks; the chance level "
        "is the same for other tokens. κ says how much of the possible agreement beyond that level is reached: 0 is no more "
        "than chance, 1 identical maps. One colour is one number in all three, and on every page.",
        "A dark matrix of raw similarity alone is no collapse. Near-uniform maps, and maps in which every query looks at "
        "the same keys, have a raw similarity near 1 whatever they attend to; only κ and the other readings tell these apart.",
        partial(similarity, name="attention-similarity"),
        shows=("attention-similarity",),
    ),
    "attention-adjacent": Entry(
        "Each block compared with the one before",
        "First the measured similarity with its 95 % CI over images, its chance level (other tokens), the same for other "
        "images and other heads, and the untrained copy. Dotted: the thresholds at which "
        "blocks count as similar. Then κ of the same blocks.",
        "The interval covers the choice of images, not the training run: another seed may differ by more. A line at its "
        "chance level is explained without the two blocks agreeing on anything.",
        adjacent_blocks,
    ),
    "similar-blocks": Entry(
        "How many blocks count as similar",
        "Adjacent pairs whose mean similarity passes each threshold, with 95 % intervals over images; in the last row, "
        f"pairs whose κ passes {KAPPA_ABOVE:g}.",
        "A count depends on its threshold, and a network with random parameters can pass all of them; the raw rows are "
        "meant for comparison with published counts.",
        similar_blocks,
        shows=("similar-blocks",),
    ),
    "attention-gallery": Entry(
        "Where each block looks",
        "First the picture as the model sees it, then the map of every block laid over it, numbered from 0. Blue patches "
        "get less attention than in a uniform map, orange and red ones more; grey ones about as much.",
        "A map is a mean over heads and queries and can look flat although single heads are sharp. What is attended to "
        "need not be what decides the output.",
        attention_gallery,
    ),
    "rollout-gallery": Entry(
        "Attention rollout over the picture",
        "What has come from each patch up to every block when the maps of all blocks so far are multiplied, skip "
        "connections counted as identity and heads averaged (Abnar & Zuidema). Scale and order as in the gallery of "
        "single blocks.",
        "Rollout ignores values and MLPs, and evens out with depth in every network. It does not show what the decision "
        "rests on.",
        rollout_gallery,
        "attention",
        after="attention-rollout",
    ),
    "attention-variants": Entry(
        "The same comparison, read in other ways",
        "Rows compare where one query looks; the default compares columns, how one key is looked at by all queries. "
        "Centred takes the mean off each vector first, which removes what uniform attention contributes.",
        "No reading is the true one. High by columns and low by rows, for instance, is what query-independent maps give.",
        attention_variants,
        shows=("attention-similarity@*",),
    ),
    "probs-and-weights": Entry(
        "What softmax gives, and what multiplies the values",
        "This model changes its maps after the softmax: first the softmax map, then the final map, which multiplies the "
        "values, on one scale.",
        "A lower similarity of the final maps can come from the mixing itself, also with random parameters; it does not "
        "show that the softmax maps have become more diverse.",
        probs_and_weights,
    ),
    "attention-entropy": Entry(
        "How spread out each head attends",
        "Entropy of the attention of every head as a share of log N, where N is the number of keys: 1 is uniform, 0 is a "
        "single key. Beside it the mean over heads with its interval, the single heads, and the untrained copy.",
        "High entropy is not collapse by itself, yet it makes raw similarities high; low entropy says how sharp a head "
        "is, not whether it looks at the right place.",
        entropy,
        shows=("attention-entropy",),
    ),
    "per-block": Entry(
        "Heads, images and patches",
        "How alike the heads of one block are, how alike a block's maps are for different images (near 1: attention "
        "ignores the picture), and how different the patches of one image remain through depth.",
        "Patches can grow alike while attention stays diverse, and the other way round.",
        per_block,
        shows=("head-similarity", "image-similarity", "patch-diversity"),
    ),
    "feature-similarity": Entry(
        "How alike the patch embeddings at two depths are",
        "Cosine of the embeddings of the same patch at two depths, raw and κ; depth 0 is what enters the first block.",
        "The residual stream carries each embedding on, so neighbouring depths are close to 1 in nearly every deep network.",
        partial(similarity, name="feature-similarity"),
        shows=("feature-similarity",),
    ),
    "convergence": Entry(
        "How the headline numbers settle as images come in",
        "Value and 95 % interval over the first images of a seeded shuffle. Dotted: the value over all images, in the "
        "band of its tolerance. Each number has a scale of its own.",
        "A curve that has settled has settled for images like these. The points share images, so that the curve is "
        "smoother than as many independent samples would be.",
        convergence,
        "sure",
    ),
    "token-norm-places": Entry(
        "Where the tokens of unusual length sit",
        "For each depth the share of images in which the patch at that place is an outlier by its norm, and above each "
        "map the share of all patch tokens that are. One scale for all maps.",
        "A token is compared with the others of its image and depth: a heavy tail of ordinary lengths gives outliers "
        "too, with random parameters as well.",
        outlier_places,
        "tokens",
        after="token-norm",
    ),
    "weights": Entry(
        "How redundant the parameters of each block are",
        "For the query, key, value and projection matrices and the two layers of the MLP: mean |cosine| between the "
        "rows, effective rank as a share of the full one, the spread of the eigenvalues of W Wᵀ, and how crowded the "
        "rows are on the sphere. Dashed: the same matrices before training.",
        "A model has one set of parameters, so there is no interval. A random matrix already has a rank below the "
        "full one and rows that are not quite orthogonal: only the distance from the dashed line is learned. One "
        "outlying entry is enough to raise the gap. Redundant parameters do not say that attention or tokens are alike.",
        weights,
        "weights",
        shows=("weight-similarity", "weight-rank", "weight-orthogonality", "hyperspherical-energy"),
    ),
    "weights-depth": Entry(
        "How alike the same weight matrix is in two blocks",
        "Mean over q, k, v, proj, fc1 and fc2 of the cosine between two blocks: of all entries, or of how strongly each "
        "direction of the token stream is read or written.",
        "Blocks whose neurons are the same but stand in another order look unrelated entry by entry.",
        weights_depth,
        "weights",
        shows=("weight-similarity@depth", "weight-similarity@directions"),
    ),
}
TESTED_PAIRS = Caption(
    "",
    "Below the diagonal a dot marks the pairs that are more alike than the chance level (q ≤ {level:g}: {test}, false "
    "discoveries controlled over all pairs of blocks), here {significant} of {tested}.",
    "A dot says that a pair agrees on more than chance would give, however little: how much, κ says. No dot does not show "
    "that κ is 0: more images find more pairs.",
)
"""What the dots on the κ panel add to the caption of a similarity whose pairs of blocks were tested."""
OTHER_SETTINGS = Caption(
    "Other readings",
    "The metric with other settings, named above each panel.",
    "No reading is the true one: where they disagree, the number depends on a choice that papers leave open.",
)


def shown(name: str) -> bool:
    """Whether a figure made for this very metric shows it."""
    return any(fnmatchcase(name, pattern) for entry in FIGURES.values() for pattern in entry.shows)


def family_figures(findings: Findings) -> dict[str, list[str]]:
    """The metrics in each figure that one metric with its variants shares: the plain one NAME, its variants NAME-variants."""
    families: dict[str, list[str]] = {}
    for name, result in findings.metrics.items():
        if result.values is None or not kind(result) or shown(name):
            continue
        base = name.partition("@")[0]
        key = f"{base}-variants" if base != name and (shown(base) or result_of(findings, base) is not None) else base
        if key in families and kind(findings.metrics[families[key][0]]) != kind(result):
            key = f"{key}-{kind(result)}"
        families.setdefault(key, []).append(name)
    return families


def metrics_of(key: str, findings: Findings) -> list[str]:
    """The metrics that a figure shows, of those that need no other one."""
    patterns = FIGURES[key].shows if key in FIGURES else ()
    own = [name for name in findings.metrics if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return own or family_figures(findings).get(key, [])


def undrawn(findings: Findings) -> list[tuple[str, str]]:
    """Metrics that no figure can show, and why."""
    odd = [(name, " × ".join(r.dims)) for name, r in findings.metrics.items() if r.values is not None and not kind(r)]
    return [(name, f"no figure shows the axes {axes}; its numbers are in findings.json") for name, axes in odd]


def draw_all(findings: Findings, *, names: Collection[str] | None = None) -> dict[str, Figure]:
    """Every figure (of `names`) that these findings fill.

    First those of FIGURES, then those of the metrics that these leave out (`family_figures`).
    """
    families = family_figures(findings)
    wanted = {*FIGURES, *families} if names is None else set(names)
    figures = draw_figures(FIGURES, findings, names=wanted)
    for key, metrics in families.items():
        if key in wanted and (figure := family_figure(findings, metrics)) is not None:
            figures[key] = figure.called(key)
    return figures


def caption_of(key: str, families: Mapping[str, list[str]], findings: Findings) -> Caption:
    """The words under a figure: its own, with those about the dots where it has some, or those of its metric."""
    if key not in families:
        caption, whole = FIGURES[key], pairs_tested(findings.sureness.get("tests") or {}, key)
        tested = result_of(findings, key)
        if key != SHOWN or whole is None or tested is None or null_of(tested, "kappa") is None:
            return caption
        seen = TESTED_PAIRS.seen.format(level=LEVEL, **{name: whole[name] for name in ("test", "significant", "tested")})
        return replace(caption, seen=f"{caption.seen} {seen}", limits=f"{caption.limits} {TESTED_PAIRS.limits}")
    result = findings.metrics[families[key][0]]
    stated = result.description
    title = stated.title or families[key][0]
    if "-variants" in key:
        return replace(OTHER_SETTINGS, title=f"{OTHER_SETTINGS.title}: {title[0].lower()}{title[1:]}")
    return Caption(title, stated.seen or result.definition, stated.limits)
