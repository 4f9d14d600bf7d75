"""The similarity ratio against loops over every vector, and how its count of blocks hangs on its free choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
from factories import random_maps, readings, trace_of

from collapse_probe.metrics.attention.similarity_ratio import CHOICES, Choice, sensitivity

B, L, H, N = 3, 7, 2, 5
BUDGETS = [2**24, L * H * N * N * 4, 1]


def drifting(seed=0, images=B):
    """Maps that grow alike with depth, so that every threshold splits them somewhere."""
    own, shared = random_maps((images, L, H, N, N), 1.5, seed), random_maps((images, 1, H, N, N), 1.5, seed + 1)
    weight = np.linspace(0, 1, L)[:, None, None, None]
    return (1 - weight) * own + weight * shared


def slow_ratio(maps, choice, axis="column"):
    """[images, blocks], one vector after the other."""
    found = np.full(maps.shape[:2], np.nan)
    for b, block in np.ndindex(found.shape):
        near = [block - d for d in range(1, choice.k + 1)]
        near += [block + d for d in range(1, choice.k + 1)] if choice.direction == "both" else []
        near = [q for q in near if 0 <= q < maps.shape[1]]
        if not near:
            continue
        means = []
        for h, t in itertools.product(range(H), range(N)):
            vector = [m[h, :, t] if axis == "column" else m[h, t] for m in maps[b]]
            means.append(np.mean([reference.cosine(vector[block], vector[q]) for q in near]))
        threshold = np.mean(means) if choice.threshold == "mean" else choice.threshold
        found[b, block] = np.mean(np.array(means) > threshold)
    return found


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("suffix", "choice"),
    [
        ("", Choice()),
        ("@mean", Choice(threshold="mean")),
        ("@both", Choice(direction="both")),
        ("@nearest-3", Choice(k=3)),
        ("@nearest-3@both@mean", Choice(3, "mean", "both")),
    ],
)
@pytest.mark.parametrize("axis", ["column", "row"])
def test_ratio_against_the_slow_way(suffix, choice, axis, budget):
    maps = drifting()
    name = "similarity-ratio" + suffix + ("" if axis == "column" else "@row")
    found = readings([trace_of(maps[:1]), trace_of(maps[1:])], [name], budget)[name]
    slow = slow_ratio(maps, choice, axis)
    assert found.values == pytest.approx(slow.mean(0), abs=1e-12, nan_ok=True)
    assert found.stderr == pytest.approx(slow.std(0, ddof=1) / np.sqrt(B), abs=1e-7, nan_ok=True)
    assert (choice.direction == "before") == np.isnan(found.values[0])


def test_the_count_under_every_choice():
    maps = drifting(seed=4)
    found = readings([trace_of(maps)], ["similarity-ratio"])["similarity-ratio"].details
    assert len(found["sensitivity"]) == len(CHOICES) == 2 * 4 * 5
    for row, choice in zip(found["sensitivity"], CHOICES, strict=True):
        assert (row["k"], row["threshold"], row["direction"]) == (choice.k, choice.threshold, choice.direction)
        slow = slow_ratio(maps, choice).mean(0)
        assert row["similar_blocks"] == (slow[np.isfinite(slow)] > 0.9).sum(), choice
        assert row["blocks"] == L - (choice.direction == "before")
    counts = {row["similar_blocks"] for row in found["sensitivity"]}
    assert len(counts) > 2, "the drifting maps should be counted differently under different choices"
    default = next(row for row in found["sensitivity"] if (row["k"], row["threshold"], row["direction"]) == (1, 0.9, "before"))
    assert found["similar_blocks"]["value"] == default["similar_blocks"]
    low, high = found["similar_blocks"]["ci95"]
    assert low <= default["similar_blocks"] <= high


def test_the_count_under_every_choice_has_the_interval_of_its_blocks():
    maps = drifting(seed=4, images=6)
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, (6, L, 1, 1, 1))
    maps = np.clip(maps + spread * random_maps((6, L, H, N, N), 1.5, 9), 0, None)
    found = readings([trace_of(maps[:2]), trace_of(maps[2:])], ["similarity-ratio"])["similarity-ratio"].details
    wide = 0
    for row, choice in zip(found["sensitivity"], CHOICES, strict=True):
        ratios = slow_ratio(maps, choice)
        ratios = ratios[:, np.isfinite(ratios).all(0)]
        bounds = np.array([reference.interval_ends(each, 0.05 / ratios.shape[1]) for each in ratios.T])
        ends = (bounds > 0.9 + 1e-6).sum(0).tolist()
        assert row["ci95"] == ends, choice
        assert ends[0] <= row["similar_blocks"] <= ends[1]
        wide += ends[0] < ends[1]
    assert wide > 5, "the intervals should be wide under some choices"
    default = next(row for row in found["sensitivity"] if (row["k"], row["threshold"], row["direction"]) == (1, 0.9, "before"))
    assert default["ci95"] == found["similar_blocks"]["ci95"]


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9, 0.95])
def test_a_higher_threshold_never_counts_more(threshold):
    counts = {}
    for row in readings([trace_of(drifting(2))], ["similarity-ratio"])["similarity-ratio"].details["sensitivity"]:
        counts[row["k"], row["direction"], row["threshold"]] = row["similar_blocks"]
    for (k, direction, at), count in counts.items():
        if at != "mean" and at <= threshold:
            assert count >= counts[k, direction, threshold]


def test_blocks_with_one_map_have_the_ratio_one_under_every_choice():
    maps = np.tile(random_maps((2, 1, H, N, N)), (1, L, 1, 1, 1))
    found = readings([trace_of(maps)], ["similarity-ratio"])["similarity-ratio"]
    assert found.values[1:].tolist() == [1.0] * (L - 1)
    for row in found.details["sensitivity"]:
        assert row["similar_blocks"] == row["blocks"] == L - (row["direction"] == "before")


def test_vectors_without_a_direction_do_not_count():
    maps = drifting(1, images=1)
    maps[:, 3, 0, :, 2] = 0
    found = readings([trace_of(maps)], ["similarity-ratio"])["similarity-ratio"].values
    slow = slow_ratio(np.where(maps == 0, 1e-12, maps), Choice())[0]  # a direction, so that the slow way can go on
    assert found[[1, 2, 5, 6]] == pytest.approx(slow[[1, 2, 5, 6]])
    kept = [(h, t) for h, t in itertools.product(range(H), range(N)) if (h, t) != (0, 2)]
    for block in (3, 4):  # the block of the lost vector, and the block that would be compared with it
        cosines = [reference.cosine(maps[0, block, h, :, t], maps[0, block - 1, h, :, t]) for h, t in kept]
        assert found[block] == pytest.approx(np.mean(np.array(cosines) > 0.9))
        assert found[block] > 0


def test_one_image_has_no_interval_of_its_count():
    settings = readings([trace_of(drifting(images=1))], ["similarity-ratio"])["similarity-ratio"].details
    assert settings["similar_blocks"]["ci95"] is None
    assert {row["ci95"] for row in settings["sensitivity"]} == {None}


def test_a_table_from_ratios_alone():
    ratios = np.array([[np.nan, 0.91, 0.9], [np.nan, 0.2, 1.0]])
    rows = sensitivity(
        ratios, lambda tail: np.stack([ratios, ratios], -1), [Choice(1, 0.8, "before"), Choice(2, "mean", "both")]
    )
    assert [row["similar_blocks"] for row in rows] == [1, 1]
    assert [row["threshold"] for row in rows] == [0.8, "mean"]
    assert [row["ci95"] for row in rows] == [[1.0, 1.0]] * 2
