"""What findings say of how sure they are: tests of pairs, convergence, extremes, classes, seeds of the twin."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from collapse_probe.cli.summary import answer
from factories import random_maps, readings, trace_of
from scipy import stats

import collapse_probe as cp
from collapse_probe.analysis.summary import pair_tests, sureness
from collapse_probe.data.images import from_loader
from collapse_probe.errors import SettingError
from collapse_probe.metrics.metric import of_level
from collapse_probe.metrics.nulls import untrained_only, with_twins
from collapse_probe.registry import METRICS
from collapse_probe.results.findings import MetricResult, Nulls
from collapse_probe.results.rules import RAW_ABOVE
from collapse_probe.statistics.breakdowns import classes_of, convergence_of, extremes_of, sizes_for
from collapse_probe.statistics.estimates import HEADLINES, PerImageValues, per_image_values
from collapse_probe.statistics.intervals import beyond, mean_parts, parts_interval
from collapse_probe.statistics.kappa import PairMoments
from collapse_probe.statistics.pair_tests import FEWEST_IMAGES

TINY = {"pretrained": False, "img_size": 32, "model_kwargs": {"depth": 3, "embed_dim": 24, "num_heads": 3}, "device": "cpu"}
NAME = "timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def found():
    return cp.analyze(NAME, "bundled:digits", limit=48, null_images=6, gallery_images=0, **TINY)


def table(images=30, pairs=4, seed=0):
    generator = np.random.default_rng(seed)
    real = 0.85 + 0.05 * generator.normal(size=(images, pairs))
    return {
        "names": np.array([f"{i:04d}" for i in range(images)]),
        "attention-similarity": real,
        "attention-similarity/other_token": real - 0.1 + 0.02 * generator.normal(size=(images, pairs)),
        "patch-diversity": generator.uniform(0.2, 0.6, (images, pairs + 2)),
        "attention-entropy": generator.uniform(2, 3, (images, pairs + 1)),
    }


def test_headline_estimates_are_the_numbers_of_the_summary(found):
    estimates = per_image_values(found.images).estimates()
    assert set(estimates) == set(HEADLINES)
    for name, estimate in estimates.items():
        assert estimate.value == pytest.approx(found.summary[name], abs=1e-6), name
        assert estimate.images == 48
        low, high = (found.summary[f"{name}_ci_{end}"] for end in ("low", "high"))
        assert low < found.summary[name] < high
        assert estimate.ci95 == pytest.approx((low, high))


def test_the_interval_of_a_mean_over_blocks_is_that_of_its_images():
    kept = per_image_values(table())
    each = kept.values["attention-similarity"].mean(1)
    found = kept.estimates()["attention_similarity_adjacent"].ci95
    assert found == pytest.approx(tuple(parts_interval(mean_parts(each[:, None]))[0]))
    assert found == pytest.approx(stats.t.interval(0.95, 29, each.mean(), stats.sem(each)), abs=1e-3)


def test_entropies_are_weighed_by_heads():
    heads = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    kept = per_image_values(table(), heads)
    expected = np.average(kept.values["attention-entropy"].mean(0), weights=heads)
    assert kept.estimates()["attention_entropy_mean"].value == pytest.approx(expected)


def test_convergence_ends_at_the_summary(found):
    curves = found.sureness["convergence"]
    assert curves["sizes"][-1] == 48
    for name, curve in curves["numbers"].items():
        assert len(curve["value"]) == len(curve["ci_low"]) == len(curve["ci_high"]) == len(curves["sizes"])
        assert curve["value"][-1] == pytest.approx(found.summary[name], abs=1e-6)
        assert curve["half_width"] == pytest.approx((curve["ci_high"][-1] - curve["ci_low"][-1]) / 2)
    ends = [curves["numbers"]["similar_blocks"][f"ci_{end}"][-1] for end in ("low", "high")]
    assert ends == [found.summary[f"similar_blocks_ci_{end}"] for end in ("low", "high")]


def test_convergence_takes_about_twenty_sizes_from_two_to_all():
    assert sizes_for(1) == []
    assert sizes_for(2) == [2]
    sizes = sizes_for(1000)
    assert (sizes[0], sizes[-1]) == (2, 1000)
    assert 15 <= len(sizes) <= 20
    assert sizes == sorted(set(sizes))


def test_convergence_shuffles_so_that_a_sorted_set_does_not_bend_it():
    values = np.linspace(0, 1, 400)[:, None]
    kept = PerImageValues(tuple(map(str, range(400))), {"patch-diversity": values})
    curve = convergence_of(kept, RAW_ABOVE)["numbers"]["patch_diversity_last"]
    at = convergence_of(kept, RAW_ABOVE)["sizes"].index(next(s for s in sizes_for(400) if s > 30))
    assert abs(curve["value"][at] - 0.5) < 0.2
    assert curve == convergence_of(kept, RAW_ABOVE)["numbers"]["patch_diversity_last"]
    assert curve != convergence_of(kept, RAW_ABOVE, seed=1)["numbers"]["patch_diversity_last"]


def test_too_few_images_are_said_to_be_too_few():
    wide = convergence_of(per_image_values(table(12)), RAW_ABOVE)
    assert any("Too few images to tell the patch diversity" in said for said in wide["sentences"])
    curve = wide["numbers"]["patch_diversity_last"]
    assert not curve["settled"]
    assert curve["images_needed"] == math.ceil(12 * (curve["half_width"] / curve["tolerance"]) ** 2)
    same = {key: values if key == "names" else np.repeat(values[:1], 12, 0) for key, values in table(12).items()}
    narrow = convergence_of(per_image_values(same), RAW_ABOVE)
    assert narrow["sentences"] == []
    assert all(curve["settled"] for curve in narrow["numbers"].values())


def test_enough_images_are_the_first_from_which_on_the_interval_is_narrow_enough():
    found = convergence_of(per_image_values(table(4000)), RAW_ABOVE)
    for name, curve in found["numbers"].items():
        widths = [(high - low) / 2 for low, high in zip(curve["ci_low"], curve["ci_high"], strict=True)]
        narrow = [n for i, n in enumerate(found["sizes"]) if max(widths[i:]) <= curve["tolerance"] and n >= FEWEST_IMAGES]
        assert curve["enough"] == (narrow[0] if narrow else None), name
        assert curve["settled"] == bool(narrow)
    similarity = found["numbers"]["attention_similarity_adjacent"]
    assert 2 < similarity["enough"] < 4000
    said = f"Raw similarity of neighbouring blocks is known to ± 0.01 after {similarity['enough']:,} images (of 4,000)."
    assert said in found["known"]
    assert sum(curve["settled"] for curve in found["numbers"].values()) == len(found["known"])
    few = convergence_of(per_image_values(table(6)), RAW_ABOVE)
    assert few["known"] == []  # the intervals of so few images are not believed, however narrow


def test_the_terminal_says_after_how_many_images_what_was_known(found):
    known = found.sureness["convergence"]["known"]
    assert known
    assert set(known) <= set(answer(found).splitlines())


def test_the_order_of_the_images_does_not_matter():
    held = table(50)
    held["patch-diversity"] = held["patch-diversity"].round(1)  # ties
    turned = {key: values[::-1] for key, values in held.items()}
    one, other = (per_image_values(each) for each in (held, turned))
    first, second = convergence_of(one, RAW_ABOVE), convergence_of(other, RAW_ABOVE)
    for name, curve in first["numbers"].items():
        assert curve["value"] == pytest.approx(second["numbers"][name]["value"], rel=1e-12, nan_ok=True)
    assert extremes_of(one) == extremes_of(other)


@pytest.fixture(scope="module")
def sample():
    """2,000 images, of which 500 were kept; with the numbers of all."""
    held = table(2000)
    whole = per_image_values(held)
    exact = {name: one.value for name, one in whole.estimates().items()}
    counts = {"similar_blocks": 3.0, "similar_blocks_ci_low": 1.0, "similar_blocks_ci_high": 4.0}
    kept = {key: values[:500] for key, values in held.items()}
    return whole, per_image_values(kept, of=2000, exact=exact | counts)


def test_of_a_sample_values_are_those_of_all_images_and_intervals_as_narrow(sample):
    whole, kept = sample
    for name, one in kept.estimates().items():
        all_images, alone = whole.estimates()[name], kept.only(np.arange(500)).estimates()[name]
        assert one.value == pytest.approx(all_images.value, rel=1e-12)
        assert one.half_width == pytest.approx(alone.half_width / 2)
        assert one.half_width == pytest.approx(all_images.half_width, rel=0.2)
        assert one.value - one.ci95[0] == pytest.approx((alone.value - alone.ci95[0]) / 2)
        assert (one.images, one.times) == (500, 4.0)


def test_the_interval_of_a_sample_covers_as_often_as_it_says():
    covered = []
    for seed in range(300):
        values = np.random.default_rng(seed).normal(0.5, 0.1, (400, 1))
        exact = {"patch_diversity_last": float(values.mean())}
        kept = PerImageValues(tuple(map(str, range(100))), {"patch-diversity": values[:100]}, of=400, exact=exact)
        low, high = kept.estimates()["patch_diversity_last"].ci95
        covered.append(low <= 0.5 <= high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_a_sample_is_said_to_be_one(sample):
    whole, kept = sample
    words = "a random sample of 500 of 2,000 images"
    found = convergence_of(kept, RAW_ABOVE)
    assert words in found["order"]
    assert found["sizes"][-2:] == [500, 2000]
    assert words in extremes_of(kept)["warning"]
    classes = classes_of(kept, {name: i % 2 for i, name in enumerate(kept.names)})
    assert words in classes["test"]
    for each in (
        convergence_of(whole, RAW_ABOVE),
        extremes_of(whole),
        classes_of(whole, {whole.names[0]: 0, whole.names[1]: 1}),
    ):
        assert "random sample" not in json.dumps(each, default=list)
    diversity = found["numbers"]["patch_diversity_last"]
    assert diversity["value"][-1] == pytest.approx(whole.estimates()["patch_diversity_last"].value, rel=1e-12)
    assert diversity["images_needed"] == math.ceil(2000 * (diversity["half_width"] / diversity["tolerance"]) ** 2)
    counts = found["numbers"]["similar_blocks"]
    assert (counts["value"][-1], counts["ci_low"][-1], counts["ci_high"][-1]) == (3.0, 1.0, 4.0)


def test_one_image_gives_no_convergence_no_extremes_and_no_classes():
    alone = per_image_values(table(1))
    assert convergence_of(alone, RAW_ABOVE) == {}
    assert extremes_of(alone) == {}
    assert classes_of(alone, {"0000": 0}) == {}


def test_neighbouring_pairs_are_tested_and_all_pairs_too(found):
    tests = found.sureness["tests"]
    names = {name for name in found.images if f"{name}/other_token" in found.images}
    assert names == set(tests)
    for name, test in tests.items():
        pairs = found.images[name].shape[1]
        assert len(test["p"]) == len(test["q"]) == pairs == len(test["pairs"])
        assert (np.asarray(test["q"]) >= np.asarray(test["p"]) - 1e-12).all()
        assert test["significant"] == (np.asarray(test["q"]) <= 0.05).sum()
        whole = test["all_pairs"]
        nearest = np.diagonal(np.asarray(whole["p"], dtype=float), -1)
        each = found.images[name] - found.images[f"{name}/other_token"]
        assert nearest == pytest.approx(test["p"])
        plain = stats.ttest_1samp(each, 0, alternative="greater").pvalue
        assert nearest == pytest.approx(np.maximum(plain, nearest), abs=1e-3), "never less than of the plain t test"


def beside_null(real, null, twins=(), twin_images=40):
    """The tests of what `between_blocks` would give for these similarities [images, pairs], beside those of copies."""

    def matrix(values):
        whole = np.full((real.shape[1] + 1,) * 2, np.nan)
        whole[np.arange(1, len(whole)), np.arange(len(whole) - 1)] = values
        return whole

    def p_of(real, null):
        mean, error, skewness = PairMoments.of(real, null).along(-1.0, 1.0)
        return matrix(beyond(mean, error, len(real), skewness))

    twin_p = np.stack([p_of(*twin) for twin in twins]) if twins else None
    images = {"other_token": len(real), "untrained": twin_images}
    token = {"other_token": matrix(null.mean(0))}
    nulls = Nulls(token, images, beyond_p=p_of(real, null), untrained_beyond_p=twin_p)
    return pair_tests({"x": MetricResult(("block", "block"), "", matrix(real.mean(0)), nulls=nulls)})["x"]


def some_alike(images, alike, seed=0):
    """Similarities of six pairs, of which so many are more alike than their null."""
    generator = np.random.default_rng(seed)
    null = 0.5 + 0.05 * generator.normal(size=(images, 6))
    return null + 0.03 * generator.normal(size=(images, 6)) + 0.05 * (np.arange(6) < alike), null


def test_alike_pairs_are_found_and_chance_is_not():
    test = beside_null(*some_alike(60, 2))
    assert (test["q"] <= 0.05).tolist() == [True, True, False, False, False, False]
    assert test["sentence"].startswith("2 of 6 neighbouring pairs")
    assert "no untrained copy was tested" in test["sentence"]


def test_the_untrained_twins_stand_beside_the_test():
    one, other, few = some_alike(40, 3, seed=1), some_alike(40, 5, seed=2), some_alike(8, 5, seed=3)
    assert "in the untrained copy 3 of 6 (40 images)" in beside_null(*some_alike(60, 2), [one])["sentence"]
    both = beside_null(*some_alike(60, 2), [one, other])
    assert both["untrained"] == {"significant": [3, 5], "tested": 6, "images": 40}
    assert "in the untrained copies of 2 seeds 3 to 5 of 6" in both["sentence"]
    assert "too few images for the test" in beside_null(*some_alike(60, 2), [few], 8)["sentence"]


def test_a_few_images_cannot_show_anything():
    test = beside_null(*some_alike(15, 6))
    assert not test["enough_images"]
    assert test["significant"] == 0
    assert np.isnan(test["q"]).all()
    assert (test["p"] < 0.01).all()
    assert np.isnan(test["all_pairs"]["q"]).all()
    assert "Too few images to tell: 15" in test["sentence"]


def test_untrained_twins_are_tested_like_the_model(found):
    nulls = found.metrics["attention-similarity"].nulls
    assert nulls.untrained_beyond_p.shape == (1, 3, 3)
    assert np.isfinite(nulls.untrained_beyond_p[0, 1, 0])
    assert found.sureness["tests"]["attention-similarity"]["untrained"] is None, "six images"


def test_one_image_that_makes_most_of_the_spread_is_named():
    held = table(40)
    assert not [said for said in convergence_of(per_image_values(held), RAW_ABOVE)["sentences"] if "Heavy tail" in said]
    held["patch-diversity"][17, -1] += 5.0
    (said,) = [said for said in convergence_of(per_image_values(held), RAW_ABOVE)["sentences"] if "Heavy tail" in said]
    assert "one image, 0017, makes 9" in said
    assert "patch diversity" in said
    held["patch-diversity"][3, -1] += 5.0
    (said,) = [said for said in convergence_of(per_image_values(held), RAW_ABOVE)["sentences"] if "Heavy tail" in said]
    assert "about 2 of 40 images make the variance" in said
    few = {key: values[10:25] for key, values in held.items()}
    assert not [said for said in convergence_of(per_image_values(few), RAW_ABOVE)["sentences"] if "Heavy tail" in said]


def test_extremes_are_the_outermost_images():
    kept = per_image_values(table(30))
    found = extremes_of(kept)
    last = kept.values["patch-diversity"][:, -1]
    order = np.argsort(last)
    shown = found["numbers"]["patch_diversity_last"]
    assert [one["name"] for one in shown["lowest"]] == [kept.names[i] for i in order[:5]]
    assert [one["name"] for one in shown["highest"]] == [kept.names[i] for i in order[::-1][:5]]
    assert shown["collapsed"] == "low"
    assert found["numbers"]["kappa_adjacent"]["collapsed"] == "high"
    assert "ends of 30 sorted values" in found["warning"]
    held = table(30)
    held["attention-similarity/other_token"][:2] = 1.0  # no kappa beside a chance level of 1
    found = extremes_of(per_image_values(held))
    assert (found["numbers"]["kappa_adjacent"]["images"], found["numbers"]["kappa_adjacent"]["undefined"]) == (28, 2)
    assert found["numbers"]["patch_diversity_last"]["undefined"] == 0
    assert "ends of up to 30 sorted values" in found["warning"]
    few = extremes_of(per_image_values(table(5)))["numbers"]["patch_diversity_last"]
    assert len(few["lowest"]) == len(few["highest"]) == 2


def test_classes_are_measured_by_themselves_and_against_the_rest():
    held = table(40)
    held["patch-diversity"][::4, -1] += 1.0
    labels = {name: (0 if i % 4 == 0 else 1 + i % 2) for i, name in enumerate(held["names"])}
    found = classes_of(per_image_values(held), labels, ("cat", "dog", "sea"))
    assert found["names"] == ["cat", "dog", "sea"]
    assert sum(found["images"]) == 40
    number = found["numbers"]["patch_diversity_last"]
    of_class = np.array([labels[name] for name in held["names"]])
    for label in range(3):
        mine, rest = (held["patch-diversity"][where, -1] for where in (of_class == label, of_class != label))
        assert number["value"][label] == pytest.approx(mine.mean())
        assert number["ci_high"][label] == pytest.approx(parts_interval(mean_parts(mine[:, None]))[0, 1])
        assert number["p"][label] == pytest.approx(stats.ttest_ind(mine, rest, equal_var=False).pvalue)
    assert number["q"] == pytest.approx(stats.false_discovery_control(number["p"]))
    assert number["q"][0] < 1e-6


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (torch.tensor([3, 1], dtype=torch.int32), [3, 1]),
        (torch.tensor([3, 255], dtype=torch.uint8), [3, 255]),
        (np.array([3, 1]), [3, 1]),
        ([3, 1], [3, 1]),
        ((3, 1), [3, 1]),
        (torch.tensor([0.3, 0.7]), None),
        (torch.tensor([True, False]), None),
        (torch.eye(2, dtype=torch.int64), None),
        (torch.tensor([3]), None),
        (["cat", "dog"], None),
        ([torch.zeros(2), torch.zeros(3)], None),
        ({"boxes": torch.zeros(2, 4)}, None),
        (None, None),
    ],
)
def test_a_loaders_whole_numbers_are_its_labels(labels, kept):
    (batch,) = from_loader([(torch.zeros(2, 3, 4, 4), labels)])
    if kept is None:
        assert batch.labels is None
    else:
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == kept


def test_labels_by_name_make_the_classes_of_a_loader():
    held = table(40)
    labels = {name: i % 3 for i, name in enumerate(held["names"])}
    found = sureness(per_image_values(held), {}, labels)["classes"]
    assert found["names"] == ["0", "1", "2"]
    np.testing.assert_equal(found["numbers"], classes_of(per_image_values(held), labels)["numbers"])
    assert sureness(per_image_values(held), {}, {})["classes"] == {}


def test_a_callers_own_loader_with_labels_has_its_classes():
    generator = torch.Generator().manual_seed(0)
    held = [(torch.rand(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 1])) for _ in range(3)]
    settings = {"metrics": ("patch-diversity",), "gallery_images": 0, **TINY}
    found = cp.analyze(NAME, held, **settings)
    classes = found.sureness["classes"]
    assert classes["names"] == ["0", "1", "2"]
    assert classes["images"] == [3, 6, 3]
    first = found.images["patch-diversity"][[0, 4, 8], -1].mean()
    assert classes["numbers"]["patch_diversity_last"]["value"][0] == pytest.approx(first)
    assert cp.analyze(NAME, [images for images, _ in held], **settings).sureness["classes"] == {}


def test_a_class_of_one_image_has_no_interval():
    labels = {name: int(i == 0) for i, name in enumerate(table(10)["names"])}
    number = classes_of(per_image_values(table(10)), labels)["numbers"]["kappa_adjacent"]
    assert np.isnan([number["value"][1], number["p"][1]]).all()
    assert np.isfinite([number["value"][0], number["ci_low"][0]]).all()


def test_labels_come_with_the_images(found):
    assert found.sureness["classes"]["names"] == [str(digit) for digit in range(10)]
    assert sum(found.sureness["classes"]["images"]) == 48


def test_findings_keep_it_and_older_folders_load(found, tmp_path):
    folder = found.save(tmp_path / "out")
    again = cp.Findings.load(folder)
    assert again.to_json() == json.loads(json.dumps(found.to_json()))
    content = json.loads((folder / "findings.json").read_text())
    del content["sureness"]
    for entry in content["metrics"].values():
        (entry["nulls"] or {}).pop("spread", None)
    (folder / "findings.json").write_text(json.dumps(content))
    old = cp.Findings.load(folder)
    assert old.sureness == {}
    assert old.metrics["attention-similarity"].nulls.ci95 == {}


def every_name(*levels):
    """Every metric of these levels, plain and in each of its variants."""
    return [name + suffix for name in of_level(*levels) for suffix in ("", *(f"@{v}" for v in METRICS[name].variants))]


@pytest.fixture(scope="module")
def everything():
    """A small model beside its untrained copy, under every metric and variant."""
    names = tuple(every_name("attention", "tokens", "weights"))
    return cp.analyze(NAME, "bundled:digits", limit=40, null_images=32, gallery_images=0, metrics=names, **TINY)


@pytest.mark.parametrize("name", every_name("attention", "tokens"))
def test_every_number_has_an_interval_or_a_reason(everything, name):
    reading = everything.metrics[name]
    if reading.values is None:
        assert reading.not_applicable
        return
    known = np.isfinite(reading.values)
    assert known.any()
    assert reading.stderr.shape == reading.values.shape
    assert np.isfinite(reading.stderr[known]).all()
    assert np.isfinite(reading.ci95[known]).all()
    if reading.head_mean is not None:
        mean, stderr, ci95 = reading.head_mean
        assert np.isfinite(stderr[np.isfinite(mean)]).all()
        assert np.isfinite(ci95[np.isfinite(mean)]).all()


@pytest.mark.parametrize("name", every_name("attention", "tokens"))
def test_every_null_has_an_interval_or_a_reason(everything, name):
    reading = everything.metrics[name]
    if reading.values is None:
        return
    nulls = reading.nulls
    for null, values in nulls.values.items():
        bounds = nulls.kappa_ci95 if null == "kappa" else nulls.ci95.get(null)
        if values is None:
            assert nulls.reasons[null]
        elif bounds is None:
            assert null in ("kappa", "other_token", "other_image", "other_head")
            assert nulls.reasons[f"{null}_ci95"]
        else:
            known = np.isfinite(values)
            without = known & ~np.isfinite(bounds).all(-1)
            assert null == "kappa" or not without.any()
            assert (f"{null}_ci95" in nulls.reasons) == without.any()
            known &= ~without
            assert (bounds[known, 0] <= values[known] + 1e-9).all()
            assert (values[known] <= bounds[known, 1] + 1e-9).all()


@pytest.mark.parametrize("name", every_name("weights"))
def test_numbers_of_the_weights_say_why_they_have_no_interval(everything, name):
    reading = everything.metrics[name]
    assert reading.values is not None
    assert reading.ci95 is None
    assert "one set of weights" in reading.details["intervals"]


@pytest.mark.parametrize("null", ["other_head", "other_token"])
def test_the_interval_of_a_null_is_that_of_its_images(null):
    maps = random_maps((6, 3, 2, 5, 5))
    name = "attention-similarity@row"
    values = np.stack([readings([trace_of(one[None])], [name])[name].nulls.values[null] for one in maps])
    nulls = readings([trace_of(maps)], [name])[name].nulls
    assert nulls.values[null] == pytest.approx(values.mean(0), abs=1e-6)
    expected = parts_interval(mean_parts(values.reshape(6, -1))).reshape(3, 3, 2)
    assert nulls.ci95[null] == pytest.approx(expected, abs=1e-5)


def test_the_twins_own_interval_is_kept_with_its_values(everything):
    settings = {"limit": 40, "metrics": ("patch-diversity",), "gallery_images": 0, **TINY}
    nulls = cp.analyze(NAME, "bundled:digits", null_images=32, **settings).metrics["patch-diversity"].nulls
    low, high = nulls.ci95["untrained"].T
    assert (low < nulls.values["untrained"]).all()
    assert (nulls.values["untrained"] < high).all()
    alone = cp.analyze(NAME, "bundled:digits", null_images=0, **settings).metrics["patch-diversity"].nulls
    assert "untrained" not in alone.ci95
    assert "untrained" not in everything.metrics["weight-rank"].nulls.ci95


def test_several_twins_give_their_mean_and_their_spread():
    settings = {
        "limit": 8,
        "null_images": 4,
        "gallery_images": 0,
        "metrics": ("attention-similarity", "patch-diversity"),
        **TINY,
    }
    three = cp.analyze(NAME, "bundled:digits", null_seeds=3, **settings)
    alone = cp.analyze(NAME, "bundled:digits", **settings)
    for name in settings["metrics"]:
        spread = three.metrics[name].nulls.untrained_seeds
        assert spread["seeds"] == [1, 2, 3]
        mean = three.metrics[name].nulls.values["untrained"]
        assert (spread["low"] <= mean + 1e-12).all()
        assert (mean <= spread["high"] + 1e-12).all()
        assert alone.metrics[name].nulls.untrained_seeds is None
        one = alone.metrics[name].nulls.values["untrained"]
        assert (spread["low"] <= one + 1e-12).all()
        assert (one <= spread["high"] + 1e-12).all()
    assert any("seeds [1, 2, 3]" in note for note in three.run["notes"])
    assert any("untrained copies of different seeds span" in note for note in three.run["notes"])


def test_the_spread_over_twins_is_that_of_their_values():
    reading = MetricResult(("block",), "", values=np.zeros(2), nulls=untrained_only())
    twins = {seed: MetricResult(("block",), "", values=np.array([seed, 2.0 * seed])) for seed in (1, 2, 6)}
    nulls = with_twins(reading, twins, 5).nulls
    assert nulls.values["untrained"].tolist() == [3.0, 6.0]
    assert "untrained" not in nulls.ci95
    sure = {s: replace(t, ci95=np.stack([t.values - s, t.values + s], -1)) for s, t in twins.items()}
    assert with_twins(reading, sure, 5).nulls.ci95["untrained"].tolist() == [[0.0, 6.0], [3.0, 9.0]]
    assert nulls.untrained_seeds["sd"] == pytest.approx(np.std([[1, 2], [2, 4], [6, 12]], axis=0, ddof=1))
    assert nulls.images["untrained"] == 5


@pytest.mark.parametrize("wrong", [{"null_seeds": 0}, {"until_ci": 0.0}, {"until_ci": -1.0}, {"until_ci": math.nan}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError):
        cp.analyze(NAME, "bundled:digits", limit=2, **wrong, **TINY)


def test_without_labels_or_maps_there_is_little_to_say():
    table = {"names": np.array(["a", "b"])}
    found = sureness(per_image_values(table), {})
    assert found == {"tests": {}, "convergence": {}, "extremes": {}, "classes": {}}
