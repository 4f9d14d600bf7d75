"""How often the intervals contain the truth and the tests find what is not there: the numbers of docs/intervals.md.

    OMP_NUM_THREADS=1 python experiments/interval_coverage.py [DRAWS]

Populations are the bundled models over all digits, of which small samples are drawn with replacement, and made-up ones. Prints
the tables; tests/statistics/test_interval_coverage.py asserts bounds of the same numbers with fewer draws.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import scipy
from numpy.typing import NDArray

from collapse_probe.analysis.analyze import analyze
from collapse_probe.statistics.estimates import kappa_of
from collapse_probe.statistics.intervals import Array, beyond, interval, mean_parts, parts_skewness, parts_stderr
from collapse_probe.statistics.kappa import PairMoments, kappa, kappa_interval
from collapse_probe.statistics.paired import Sides, compare_sides
from collapse_probe.statistics.proportions import paired_shares

MODELS = ("digits-mhsa", "digits-tied-mhsa", "digits-re-attention", "digits-tied-re-attention")
METRICS = ("attention-similarity", "attention-entropy", "patch-diversity")
SIZES = (2, 3, 5, 8, 16, 32, 64, 200)
AT_ONCE = 100
Tables = Mapping[str, NDArray[np.float64]]


def measured(model: str) -> dict[str, Array]:
    """What a bundled model gives of every digit, by key of images.npz."""
    found = analyze(f"ours:{model}", "bundled:digits", null_images=0, gallery_images=0, metrics=METRICS, device="cpu")
    return {key: np.asarray(values, dtype=np.float64) for key, values in found.images.items() if key != "names"}


def made_up(seed: int = 5, images: int = 4000, places: int = 23) -> dict[str, tuple[Array, Array]]:
    """Real and wrong-token similarities [images, places] with skewed rooms, heavy tails and outlying images."""
    rng = np.random.default_rng(seed)
    kept = 1 - np.linspace(-0.1, 0.9, places)  # 1 − kappa
    shape = (images, places)

    def lognormal(spread: float) -> Array:
        return np.asarray(np.exp(spread * rng.standard_normal(shape) - spread**2 / 2))

    rare = rng.random(shape) < 0.02
    rooms = {
        "lognormal, spread 0.5": (lognormal(0.5), lognormal(0.5)),
        "lognormal, spread 1": (lognormal(1.0), lognormal(0.3)),
        "2 % outlying images": (lognormal(0.3) * np.where(rare, 10, 1), lognormal(0.3) * np.where(rare, 0.2, 1)),
    }
    drawn = {name: (1 - 0.1 * kept * room * noise, 1 - 0.1 * room) for name, (room, noise) in rooms.items()}
    room = lognormal(0.4)
    drawn["Student's t, 3 degrees"] = 1 - 0.1 * (kept * room + 0.1 * rng.standard_t(3, shape) + 0.5), 1 - 0.1 * room
    return drawn


def samples(images: int, size: int, draws: int, seed: int) -> NDArray[np.int64]:
    """Indices [size, draws] of images drawn with replacement."""
    return np.random.default_rng([seed, size]).integers(0, images, (size, draws))


def of_kappa(real: Array, null: Array, size: int, draws: int, seed: int = 0) -> dict[str, float]:
    """How the intervals of the pairs' kappas do: shares over draws and pairs.

    `covered` and `worst` (pair); `low` and `high`, the worst pair's share of lower bounds above and of upper bounds below the
    truth; `open` intervals; `width`, the median; `before` and `before_worst`, what the t interval by the delta method covers;
    `false_high` and `false_low`, the share of draws in which some pair is wrongly put above or below 0.5 (with 95 % intervals).
    """
    truth = kappa(real.mean(0), null.mean(0))
    drawn = samples(len(real), size, draws, seed)
    ends, plain = [], []
    for at in range(0, draws, AT_ONCE):
        chosen = drawn[:, at : at + AT_ONCE]
        moments = PairMoments.of(real[chosen], null[chosen])
        ends.append(kappa_interval(moments))
        quotient = moments.central[0] / moments.central[1]
        error = moments.along(1.0, -quotient)[1] / moments.central[1]
        plain.append(interval(1 - quotient, error, float(size)))
    (low, high), (plain_low, plain_high) = (np.moveaxis(np.concatenate(each), -1, 0) for each in (ends, plain))
    over, under = (low > truth).mean(0), (high < truth).mean(0)
    before = ((plain_low <= truth) & (truth <= plain_high)).mean(0)
    return {
        "covered": float(1 - (over + under).mean()),
        "worst": float(1 - (over + under).max()),
        "low": float(over.max()),
        "high": float(under.max()),
        "open": float(np.isinf(low).mean()),
        "width": float(np.median(high - low)),
        "before": float(before.mean()),
        "before_worst": float(before.min()),
        "false_high": float(((low > 0.5) & (truth <= 0.5)).any(-1).mean()),
        "false_low": float(((high < 0.5) & (truth > 0.5)).any(-1).mean()),
    }


def of_headline(real: Array, null: Array, size: int, draws: int, seed: int = 0) -> dict[str, float]:
    """The interval of the mean kappa over pairs: `covered` where there is one, and the share that has none as `none`."""
    truth, drawn = kappa(real.mean(0), null.mean(0)).mean(), samples(len(real), size, draws, seed)
    found = [kappa_of(real[chosen], null[chosen]) for chosen in drawn.T]
    ends = np.array([one.ci95 for one in found if one is not None])
    known = np.isfinite(ends).all(1)
    inside = (ends[known, 0] <= truth) & (truth <= ends[known, 1])
    return {"covered": float(inside.mean()) if known.any() else np.nan, "none": float(1 - known.mean())}


def of_means(values: Array, size: int, draws: int, seed: int = 0) -> dict[str, float]:
    """The intervals of plain means [images, places]: `covered`, `worst` place, and what the t interval covers, `before`."""
    truth, drawn = values.mean(0), samples(len(values), size, draws, seed)
    means, parts, defined = mean_parts(values[drawn].reshape(size, -1))
    n = defined.sum(0)
    stderr = parts_stderr(parts, n)
    covered = []
    for skewness in (parts_skewness(parts, n), 0.0):
        low, high = interval(means, stderr, n, skewness).reshape(draws, -1, 2).transpose(2, 0, 1)
        covered.append(((low <= truth) & (truth <= high)).mean(0))
    ours, plain = covered
    return {"covered": float(ours.mean()), "worst": float(ours.min()), "before": float(plain.mean())}


def of_tests(differences: Array, size: int, draws: int, seed: int = 0) -> dict[str, float]:
    """One-sided tests of differences [images, places] of which the mean is 0.

    `p`: the share of p ≤ 0.05 over all places; `any_q`: the share of draws in which some place has q ≤ 0.05; `flips`: that
    share for sign flips, which take the differences to be symmetric.
    """
    drawn, found = samples(len(differences), size, draws, seed), []
    rng, flipped = np.random.default_rng(seed), []
    for chosen in drawn.T:
        each = differences[chosen]
        means, parts, defined = mean_parts(each)
        n = defined.sum(0)
        found.append(beyond(means, parts_stderr(parts, n), n, parts_skewness(parts, n)))
        signs = rng.choice([-1.0, 1.0], (999, size))
        flipped.append((1 + (signs @ each >= each.sum(0) - 1e-12).sum(0)) / 1000)
    p, flips = np.array(found), np.array(flipped)

    def any_q(p: Array) -> float:
        return float((scipy.stats.false_discovery_control(p, axis=1) <= 0.05).any(1).mean())

    return {"p": float((p <= 0.05).mean()), "any_q": any_q(p), "flips": any_q(flips)}


def of_comparisons(first: Tables, second: Tables, size: int, draws: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Two models on the same images: coverage and that of the worst place, of differences of plain means and of kappas."""
    name, null = "attention-similarity", "attention-similarity/other_token"
    drawn, found = samples(len(first[name]), size, draws, seed), {}
    kinds = {
        "similarity": lambda at: Sides(first[name][at], second[name][at]),
        "entropy": lambda at: Sides(first["attention-entropy"][at], second["attention-entropy"][at]),
        "kappa": lambda at: Sides(first[name][at], second[name][at], (first[null][at], second[null][at])),
    }
    for kind, sides in kinds.items():
        truth = compare_sides(sides(slice(None))).difference
        ends = np.array([compare_sides(sides(chosen)).ci95 for chosen in drawn.T[: draws if kind != "kappa" else draws // 5]])
        known, inside = np.isfinite(ends).all(-1), (ends[..., 0] <= truth) & (truth <= ends[..., 1])
        share = np.where(known.any(0), inside.sum(0) / np.maximum(known.sum(0), 1), np.nan)
        found[kind] = float(inside.sum() / max(known.sum(), 1)), float(np.nanmin(share))
        found[f"{kind}, none"] = float(1 - known.mean()), np.nan
    return found


def of_answers(size: int) -> dict[str, float]:
    """Tango's interval by the exact distribution over shares of gained and lost answers: mean and worst coverage, worst p."""
    counts = np.array([(b, c) for b in range(size + 1) for c in range(size + 1 - b)])
    first, second = np.ones((2, size, len(counts)))
    for at, (gained, lost) in enumerate(counts):
        first[:gained, at], second[gained : gained + lost, at] = 0.0, 0.0
    ends, p = paired_shares(first, second)
    covered, level = [], []
    shares = (0.002, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5)
    for gained in shares:
        for lost in shares:
            chances = [gained, lost, max(1 - gained - lost, 0.0)]
            chance = scipy.stats.multinomial.pmf(np.column_stack([counts, size - counts.sum(1)]), size, chances)
            truth = gained - lost
            covered.append(chance[(ends[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= ends[:, 1])].sum())
            level += [chance[p < 0.05].sum()] if gained == lost else []
    return {"covered": float(np.mean(covered)), "worst": float(min(covered)), "p": float(max(level))}


def main(draws: int) -> None:
    """Print every table."""
    tables = {model: measured(model) for model in MODELS}
    pairs = {m: (t["attention-similarity"], t["attention-similarity/other_token"]) for m, t in tables.items()} | made_up()
    print("| population | images | before | worst | now | worst | lower | upper | open | width | false high | false low |")
    print("|" + "---|" * 12)
    for name, (real, null) in pairs.items():
        for size in SIZES[1:]:
            k = of_kappa(real, null, size, draws)
            cells = ("before", "before_worst", "covered", "worst", "low", "high", "open", "width", "false_high", "false_low")
            print(f"| {name} | {size} | " + " | ".join(f"{k[key]:.3f}" for key in cells) + " |", flush=True)
    print("\n| headline kappa | " + " | ".join(map(str, SIZES[2:])) + " |\n|" + "---|" * (len(SIZES) - 1))
    for name, (real, null) in pairs.items():
        found = [of_headline(real, null, size, max(draws // 5, 50)) for size in SIZES[2:]]
        print(f"| {name} | " + " | ".join(f"{h['covered']:.2f} ({h['none']:.2f})" for h in found) + " |", flush=True)
    print("\n| plain means | " + " | ".join(map(str, SIZES)) + " |\n|" + "---|" * (len(SIZES) + 1))
    for model, table in tables.items():
        for metric in METRICS:
            values = table[metric][:, table[metric].std(0) > 1e-6]
            found = [of_means(values, size, draws) for size in SIZES]
            cells = (f"{f['before']:.3f} → {f['covered']:.3f} ({f['worst']:.2f})" for f in found)
            print(f"| {model}, {metric} | " + " | ".join(cells) + " |", flush=True)
    print("\n| tests | " + " | ".join(map(str, SIZES[3:])) + " |\n|" + "---|" * (len(SIZES) - 2))
    nulls = {name: null_of(real, null) for name, (real, null) in pairs.items()} | left_tails()
    for name, differences in nulls.items():
        found = [of_tests(differences, size, draws // 2) for size in SIZES[3:]]
        print(
            f"| {name} | " + " | ".join(f"{f['p']:.3f}, {f['any_q']:.2f} ({f['flips']:.2f})" for f in found) + " |", flush=True
        )
    print("\n| comparison | " + " | ".join(map(str, SIZES[:6])) + " |\n|" + "---|" * 7)
    compared = [of_comparisons(tables[MODELS[0]], tables[MODELS[2]], size, draws // 4) for size in SIZES[:6]]
    for kind in ("similarity", "entropy", "kappa"):
        cells = (f"{f[kind][0]:.3f} ({f[kind][1]:.2f}; {f[f'{kind}, none'][0]:.2f})" for f in compared)
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)
    print("\n| answers | coverage | worst | largest error of the test |\n|---|---|---|---|")
    for size in (2, 3, 4, 5, 8, 16, 20, 50):
        a = of_answers(size)
        print(f"| {size} | {a['covered']:.3f} | {a['worst']:.3f} | {a['p']:.3f} |", flush=True)


def null_of(real: Array, null: Array) -> Array:
    """Differences real − null with their means taken off."""
    differences = real - null
    return np.asarray(differences - differences.mean(0))


def left_tails(seed: int = 7, images: int = 20_000, places: int = 23) -> dict[str, Array]:
    """Differences of mean 0 with a long left tail."""
    rng = np.random.default_rng(seed)
    drawn = {"minus exponential": -rng.standard_exponential((images, places)), "normal": rng.standard_normal((images, places))}
    drawn["minus lognormal, spread 0.5"] = -np.exp(0.5 * rng.standard_normal((images, places)))
    return {name: values - values.mean(0) for name, values in drawn.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
