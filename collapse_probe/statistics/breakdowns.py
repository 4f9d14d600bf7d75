"""How the headline numbers settle as images come in, and whether there were enough of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy

from collapse_probe.statistics.estimates import HEADLINES, SIMILARITY, Estimate, PerImageValues
from collapse_probe.statistics.intervals import Array, count_bounds, mean_parts, parts_interval
from collapse_probe.statistics.pair_tests import FEWEST_IMAGES
from collapse_probe.statistics.paired import controlled

FEWEST = 2
"""Images that a class must have for an interval."""
MOST_OF_VARIANCE, FEW_EFFECTIVE = 0.5, 3.0
TEST = (
    "Welch's t test of a class against all other images, two-sided, on what each image contributes; q: Benjamini–Hochberg over "
    "the classes of a number"
)


def classes_of(per_image: PerImageValues, labels: Mapping[str, int] | None, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """Every class' headline numbers, as plain data; {} where there are no labels or just one class.

    `names` and `images` of the classes; by number `value`, `ci_low`, `ci_high` (95 % over the images of the class), `p` and `q`
    of the class against the rest. NaN where a class has too few images. Of a sample all numbers are those of the sample, which
    `test` then says.
    """
    if labels is None:
        return {}
    of_image = np.array([labels.get(name, -1) for name in per_image.names], dtype=np.int64)
    classes = sorted(set(of_image[of_image >= 0].tolist()))
    if len(classes) < FEWEST:
        return {}
    members = [np.flatnonzero(of_image == label) for label in classes]
    by_class = [per_image.only(places).estimates() if len(places) >= FEWEST else {} for places in members]
    return {
        "names": [class_names[label] if label < len(class_names) else str(label) for label in classes],
        "images": [len(places) for places in members],
        "numbers": {
            name: _number(whole, [estimates.get(name) for estimates in by_class], members)
            for name, whole in per_image.estimates().items()
        },
        "test": TEST + (f"; over {per_image.sampled}" if per_image.sampled else ""),
    }


def _number(whole: Estimate, by_class: Sequence[Estimate | None], members: Sequence[Any]) -> dict[str, Any]:
    p = _against_the_rest(whole, members)
    return {**_columns(by_class), "p": p, "q": controlled(p)}


def _columns(estimates: Sequence[Estimate | None]) -> dict[str, list[float]]:
    """`value`, `ci_low` and `ci_high` of some estimates; NaN where there is none."""
    ends = [(math.nan, math.nan) if one is None else one.ci95 for one in estimates]
    values = [math.nan if one is None else one.value for one in estimates]
    return {"value": values, "ci_low": [low for low, _ in ends], "ci_high": [high for _, high in ends]}


def _against_the_rest(whole: Estimate, members: Sequence[Any]) -> Array:
    """Welch's p-values [classes] of the images of a class against all others, from sums."""
    parts = whole.parts
    n = np.array([whole.defined[places].sum() for places in members], dtype=np.float64)
    total = np.array([parts[places].sum() for places in members])
    square = np.array([np.square(parts[places]).sum() for places in members])
    rest_n, rest_total, rest_square = whole.images - n, parts.sum() - total, np.square(parts).sum() - square
    with np.errstate(invalid="ignore", divide="ignore"):
        spread, rest_spread = (
            np.sqrt(np.maximum(squares - sums**2 / count, 0.0) / (count - 1))
            for count, sums, squares in ((n, total, square), (rest_n, rest_total, rest_square))
        )
        testable = (n >= FEWEST) & (rest_n >= FEWEST) & (spread + rest_spread > 0)
        p = np.full(len(n), np.nan)
        p[testable] = scipy.stats.ttest_ind_from_stats(
            *(side[testable] for side in (total / n, spread, n, rest_total / rest_n, rest_spread, rest_n)), equal_var=False
        ).pvalue
    return p


SIZES = 20
COUNT, COUNT_TOLERANCE = "similar_blocks", 1.0
MOST_NEEDED = 10_000_000
"""Beyond so many images the estimate of how many would do says nothing."""


def sizes_for(images: int) -> list[int]:
    """About twenty numbers of images from 2 to all, evenly spaced in their logarithm; none for fewer than two images.

    >>> sizes_for(6)
    [2, 3, 4, 5, 6]
    """
    if images < 2:
        return []
    return sorted({round(size) for size in np.geomspace(2, images, SIZES).tolist()})


def convergence_of(per_image: PerImageValues, count_above: float, seed: int = 0) -> dict[str, Any]:
    """Running values and 95 % intervals of the headline numbers, as plain data; {} with fewer than two images.

    Among them is the number of similar blocks, whose similarity with the block before is above `count_above`. `sizes`: numbers
    of images. `numbers`: by name `value`, `ci_low` and `ci_high` at every size (NaN where undefined), the `half_width` at the
    end, the `tolerance` it is held against, whether it is `settled`, `images_needed`: about how many images would bring it
    there (half-width falls with the root of their number; None for a count), and `enough`: the size from which on the
    half-width stays within the tolerance, from FEWEST_IMAGES up (None where it is not settled). `sentences`: what there were
    too few images for; `known`: after how many images what was known. Of a sample the last size is the number of all images.
    """
    kept = len(per_image)
    sizes, by_name = sizes_for(kept), np.argsort(np.array(per_image.names, dtype=np.str_), kind="stable")
    order = by_name[np.random.default_rng(seed).permutation(kept)]
    steps = [per_image.only(order[:size]) for size in sizes[:-1]]
    if per_image.sampled and sizes:
        steps.append(per_image.only(order))
        sizes = [*sizes, per_image.total]
    steps += [per_image] if sizes else []
    running = [step.estimates() for step in steps]
    curves = {name: _curve(name, sizes, [step.get(name) for step in running]) for name in (running[-1] if running else {})}
    if steps and np.isfinite(per_image.values.get(SIMILARITY, np.nan)).any():
        curves[COUNT] = _count_curve(steps, sizes, count_above)
    if not curves:
        return {}
    order_of = f"the first images of a shuffle with seed {seed}, so that a sorted data set does not bend the curves"
    if per_image.sampled:
        order_of += f"; they are of {per_image.sampled}, and the last size is all of them"
    return {
        "sizes": sizes,
        "order": order_of,
        "numbers": curves,
        "sentences": [
            *(text for name, curve in curves.items() if (text := _sentence(name, curve, per_image.total))),
            *(text for name, one in running[-1].items() if one and (text := heavy_tail(name, one, per_image.names))),
        ],
        "known": [text for name, curve in curves.items() if (text := _known(name, curve, per_image.total))],
    }


def heavy_tail(name: str, estimate: Estimate, names: Sequence[str]) -> str:
    """That a few images make most of how a headline number varies, which no interval can be trusted with; empty where not.

    One image makes more than half of the variance, or the images count for fewer than `FEW_EFFECTIVE` (1 over the sum of their
    squared shares): of 16 normal ones either happens in about two samples of a hundred.
    """
    shares = estimate.shares
    if estimate.images < FEWEST_IMAGES or not np.isfinite(shares).all():
        return ""
    words, most, effective = HEADLINES[name].words, int(np.argmax(shares)), 1 / np.square(shares).sum()
    if shares[most] > MOST_OF_VARIANCE:
        what = f"one image, {names[most]}, makes {shares[most]:.0%} of the variance of the {words} over images"
    elif effective < FEW_EFFECTIVE:
        what = f"about {effective:.0f} of {estimate.images} images make the variance of the {words} over images"
    else:
        return ""
    return f"Heavy tail: {what}, so that its interval may be too narrow: look at the images at both ends."


def _curve(name: str, sizes: Sequence[int], running: list[Estimate | None]) -> dict[str, Any]:
    last = running[-1]
    assert last is not None
    return _settled(_columns(running), sizes, HEADLINES[name].tolerance, round(last.images * last.times))


def _settled(columns: Mapping[str, list[float]], sizes: Sequence[int], tolerance: float, images: int | None) -> dict[str, Any]:
    """Columns of a curve with how it ends; `images` entered at the end, None where no number of them can be foretold."""
    widths = [(high - low) / 2 for low, high in zip(columns["ci_low"], columns["ci_high"], strict=True)]
    needed = None
    if images is not None and math.isfinite(widths[-1]):
        needed = min(max(math.ceil(images * (widths[-1] / tolerance) ** 2), 2), MOST_NEEDED)
    wide = [place for place, width in enumerate(widths) if not width <= tolerance]
    settled = len(widths) - 1 not in wide
    trusted = sum(size < FEWEST_IMAGES for size in sizes)  # the intervals before are of too few images to be believed
    first = max(max(wide, default=-1) + 1, trusted)
    enough = sizes[first] if settled and first < len(sizes) else None
    ends = {"half_width": widths[-1], "tolerance": tolerance, "settled": settled, "images_needed": needed, "enough": enough}
    return {**columns, **ends}


def _count_curve(steps: list[PerImageValues], sizes: Sequence[int], count_above: float) -> dict[str, Any]:
    """The count of similar blocks with the bounds that similar-blocks has; of a sample the last are the exact ones if given."""
    values, ends = [], []
    for step in steps:
        numbers = mean_parts(step.values[SIMILARITY])
        exact = [step.exact.get(f"{COUNT}{end}") for end in ("", "_ci_low", "_ci_high")]
        count = float((numbers[0] > count_above).sum())
        low, high = count_bounds(numbers[0], partial(parts_interval, numbers), count_above).tolist()
        value, *bounds = (own if known is None else known for own, known in zip((count, low, high), exact, strict=True))
        values.append(float(value))
        ends.append([float(end) for end in bounds])
    columns = {"value": values, "ci_low": [low for low, _ in ends], "ci_high": [high for _, high in ends]}
    return _settled(columns, sizes, COUNT_TOLERANCE, None)


def _words(name: str) -> tuple[str, str]:
    """A number in words, and its unit after a space."""
    words, unit = (HEADLINES[name].words, HEADLINES[name].unit) if name in HEADLINES else ("number of similar blocks", "")
    return words, f" {unit}" if unit else ""


def _known(name: str, curve: Mapping[str, Any], images: int) -> str:
    """From how many images on a number was known to its tolerance; empty where it was not."""
    if curve["enough"] is None:
        return ""
    words, unit = _words(name)
    words = f"{words[0].upper()}{words[1:]}"
    return f"{words} is known to ± {curve['tolerance']:g}{unit} after {curve['enough']:,} images (of {images:,})."


def _sentence(name: str, curve: Mapping[str, Any], images: int) -> str:
    """What there were too few images for; empty where the interval is narrow enough."""
    if curve["settled"]:
        return ""
    words, unit = _words(name)
    if not math.isfinite(curve["half_width"]):
        return f"Too few images to tell the {words}: {images} give no interval."
    said = (
        f"Too few images to tell the {words} to within ± {curve['tolerance']:g}{unit}: with {images} images its 95 % "
        f"interval is ± {curve['half_width']:.2g}{unit}"
    )
    needed = curve["images_needed"]
    return said + (f"; about {needed} would do." if needed is not None and needed < MOST_NEEDED else ".")


EACH_SIDE = 5
WARNING = (
    "These are the ends of {images} sorted values, not typical ones: the most extreme of many images lies far out even where "
    "all images are alike, and further out the more images there are. Read them as examples to look at."
)
PICTURED = ("kappa_adjacent", "attention_similarity_adjacent", "patch_diversity_last")
"""The number whose ends are shown as pictures: the first of these that the images define."""


def extremes_of(per_image: PerImageValues) -> dict[str, Any]:
    """Names and values of the images with the highest and lowest headline numbers, as plain data; {} with fewer than two.

    By number: `highest` and `lowest`, up to five each (no image in both) with the outermost first, each {name, value};
    `median`; `images`; `undefined`, how many images have none; `collapsed`, which end is collapse. An image's kappa is the
    mean of its own over adjacent pairs.
    """
    numbers: dict[str, Any] = {}
    for name, values in per_image.each().items():
        order = np.lexsort((np.array(per_image.names, dtype=np.str_), values))
        order = order[np.isfinite(values[order])]
        count = min(EACH_SIDE, len(order) // 2)
        if not count:
            continue
        numbers[name] = {
            "highest": [{"name": per_image.names[i], "value": float(values[i])} for i in order[::-1][:count]],
            "lowest": [{"name": per_image.names[i], "value": float(values[i])} for i in order[:count]],
            "median": float(np.median(values[order])),
            "images": len(order),
            "undefined": len(values) - len(order),
            "collapsed": HEADLINES[name].collapsed,
        }
    most = f"{'up to ' if any(each['undefined'] for each in numbers.values()) else ''}{len(per_image)}"
    of_sample = f" They are of {per_image.sampled}: others may lie further out." if per_image.sampled else ""
    return {"numbers": numbers, "warning": WARNING.format(images=most) + of_sample} if numbers else {}


def pictured(extremes: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The number whose images at both ends the report shows and its entry in what `extremes_of` gave; None where there is none.

    >>> pictured({"numbers": {"patch_diversity_last": {"images": 4}, "kappa_adjacent": {"images": 3}}})
    ('kappa_adjacent', {'images': 3})
    """
    numbers: Mapping[str, Any] = extremes.get("numbers") or {}
    return next(((name, numbers[name]) for name in PICTURED if name in numbers), None)
