"""A Probe: whatever the batches, parts and order in which images come, the findings are those of one pass."""

from __future__ import annotations

import functools
import io
import json

import numpy as np
import pytest
import timm
import torch
from factories import small_vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import collapse_probe as cp
from collapse_probe.analysis.state.manifest import tensors_of
from collapse_probe.errors import DataError, NonFiniteError, StateError
from collapse_probe.registry import METRICS, PRESETS
from collapse_probe.results.findings import result_to_json

EVERY = tuple(METRICS)
QUICK = {"null_images": 0, "gallery_images": 1, "device": "cpu"}
OF_A_RUN = ("seconds", "images_per_second", "peak_memory_bytes", "id", "created", "command")


@functools.cache
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2).eval()


@functools.cache
def pictures(count=24):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def names_of(places):
    return [f"{place:03d}.png" for place in places]


def numbers_in(value, place=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_in(item, f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from numbers_in(item, f"{place}/{i}")
    else:
        yield place, value


def assert_same(one, other, within=1e-9):
    """Every value of two findings, numbers within 1e-9 of their size."""
    documents = [dict(numbers_in(found.to_json())) for found in (one, other)]
    assert documents[0].keys() == documents[1].keys()
    for place, value in documents[0].items():
        came = documents[1][place]
        if place.startswith("/run/") and place.split("/")[2] in OF_A_RUN:
            continue
        if isinstance(value, float) and isinstance(came, (int, float)):
            assert abs(value - came) <= within * max(1.0, abs(value)), (place, value, came)
        else:
            assert value == came, place
    assert one.images.keys() == other.images.keys()
    for key, values in one.images.items():
        if key == "names":
            assert values.tolist() == other.images[key].tolist()
        else:
            np.testing.assert_allclose(other.images[key], values, rtol=within, atol=within, err_msg=key)


def probe(**options):
    return cp.Probe(model(), **{**QUICK, **options})


@functools.cache
def one_pass(count, metrics, presets):
    whole = probe(metrics=metrics, presets=presets)
    whole.update(pictures()[:count], names_of(range(count)))
    return whole.findings()


@st.composite
def partitions(draw, most=24):
    """Images in an order, cut into parts, these into batches, and the order in which the parts are merged."""
    count = draw(st.integers(2, most))
    order = draw(st.permutations(range(count)))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=4)))
    parts = [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    size = draw(st.integers(1, 9))
    return count, [[part[i : i + size] for i in range(0, len(part), size)] for part in draw(st.permutations(parts))]


def merged(parts, stored, **options):
    total = probe(**options)
    for i, batches in enumerate(parts):
        part = probe(**options)
        for batch in batches:
            part.update(pictures()[batch], names_of(batch))
        total.merge(through_a_file(part.state_dict()) if stored[i % len(stored)] else part)
    return total


def through_a_file(state):
    content = io.BytesIO()
    torch.save(state, content)
    return torch.load(io.BytesIO(content.getvalue()), weights_only=True)


relaxed = functools.partial(settings, deadline=None, suppress_health_check=list(HealthCheck))


SOME = st.lists(st.sampled_from(EVERY), min_size=3, max_size=5, unique=True).map(tuple)


@relaxed(max_examples=8)
@given(partitions(), st.lists(st.booleans(), min_size=1, max_size=3), SOME)
def test_any_partition_in_any_order_says_what_one_pass_says(partition, stored, metrics):
    count, parts = partition
    assert_same(one_pass(count, metrics, ()), merged(parts, stored, metrics=metrics).findings())


@pytest.mark.slow
@relaxed(max_examples=30)
@given(partitions(), st.lists(st.booleans(), min_size=1, max_size=3))
def test_any_partition_of_every_metric(partition, stored):
    count, parts = partition
    assert_same(one_pass(count, EVERY, ()), merged(parts, stored, metrics=EVERY).findings())


@pytest.mark.slow
@relaxed(max_examples=60)
@given(partitions(), st.lists(st.booleans(), min_size=1, max_size=3), st.sampled_from(list(PRESETS)))
def test_any_partition_of_every_preset(partition, stored, preset):
    count, parts = partition
    assert_same(one_pass(count, (), (preset,)), merged(parts, stored, presets=(preset,)).findings())


def test_single_images_of_a_sampled_metric_are_those_of_its_sample_in_any_order(monkeypatch):
    monkeypatch.setattr("collapse_probe.metrics.attention.map_rank.SPECTRA_IMAGES", 3)
    pixels, names = pictures(8), names_of(range(8))
    tables = []
    for order in (range(8), range(7, -1, -1)):
        one = probe(metrics=("map-rank",))
        for place in order:
            one.update(pixels[place : place + 1], names=[names[place]])
        tables.append(dict(zip(*(one.findings().images[key].tolist() for key in ("names", "map-rank")), strict=True)))
    assert sum(np.isfinite(values).all() for values in tables[0].values()) == 3
    for name in names:
        np.testing.assert_array_equal(tables[0][name], tables[1][name])


def test_a_loop_of_ones_own_says_what_analyze_says():
    images = pictures()
    found = cp.analyze(model(), images, metrics=("attention-similarity", "patch-diversity"), **QUICK)
    by_hand = probe(metrics=("attention-similarity", "patch-diversity"))
    for i in range(0, 24, 5):
        by_hand.update(images[i : i + 5], [str(k) for k in range(i, min(i + 5, 24))])
    for name, reading in found.metrics.items():
        np.testing.assert_allclose(by_hand.findings().metrics[name].values, reading.values, rtol=1e-12)


def test_the_twin_sees_the_same_images_whatever_the_parts():
    options = {"metrics": ("attention-similarity",), "null_images": 5, "gallery_images": 0, "device": "cpu"}
    arch = {"model_kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 2}, "pretrained": False, "img_size": 32}
    from collapse_probe.models.loading import resolve

    def probed(*parts):
        whole = cp.Probe(resolve("timm:vit_tiny_patch16_224", **arch), **options)
        for part in parts:
            one = cp.Probe(resolve("timm:vit_tiny_patch16_224", **arch), **options)
            one.update(pictures()[part], names_of(part))
            whole.merge(one)
        return whole.findings()

    places = list(range(20))
    one, two = probed(places), probed(places[13:], places[:6], places[6:13])
    assert one.metrics["attention-similarity"].nulls.images["untrained"] == 5
    assert_same(one, two)


def test_images_without_names_are_named_by_their_pixels():
    one, other = probe(metrics=("patch-diversity",)), probe(metrics=("patch-diversity",))
    one.update(pictures()[:6])
    other.update(pictures()[4:6])
    other.update(pictures()[:4])
    assert sorted(one.findings().images["names"]) == sorted(other.findings().images["names"])
    assert_same(one.findings(), other.findings())
    one.update(pictures()[:1])
    found = one.findings()
    assert found.summary["images"] == 7
    assert any("same pixels as another" in note for note in found.run["notes"])


class TestRefused:
    def test_an_image_that_came_before(self):
        own = probe(metrics=("patch-diversity",))
        own.update(pictures()[:3], names_of(range(3)))
        with pytest.raises(StateError, match=r"'002\.png' came before.*even_batches"):
            own.update(pictures()[2:5], names_of(range(2, 5)))
        with pytest.raises(StateError, match="came before"):
            own.update(pictures()[5:7], ["a", "a"])
        assert own.images == 3

    def test_names_for_some_images_alone(self):
        own = probe(metrics=("patch-diversity",))
        own.update(pictures()[:3], names_of(range(3)))
        with pytest.raises(StateError, match="names to all or to none"):
            own.update(pictures()[3:5])
        own.update(pictures()[3:5], names_of((3, 4)))
        assert own.images == 5

    def test_overlapping_probes(self):
        one, other = probe(metrics=("patch-diversity",)), probe(metrics=("patch-diversity",))
        one.update(pictures()[:3], names_of(range(3)))
        other.update(pictures()[2:5], names_of(range(2, 5)))
        before = tensors_of(one.state_dict())
        with pytest.raises(StateError, match=r"both parts have seen 002\.png"):
            one.merge(other)
        after = tensors_of(one.state_dict())
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_the_same_part_twice_without_names(self):
        one, other = probe(metrics=("patch-diversity",)), probe(metrics=("patch-diversity",))
        one.update(pictures()[:3])
        other.update(pictures()[:3])
        with pytest.raises(StateError, match="both parts have seen"):
            one.merge(other)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"metrics": ("token-norm",)}, "the metrics: "),
            ({"seed": 3}, "the seed: 0 and 3"),
            ({"records": 7}, "the number of records: "),
            ({"amp": True, "amp_dtype": "bfloat16"}, "the precision: "),
        ],
    )
    def test_other_settings(self, options, says):
        one, other = probe(metrics=("patch-diversity",)), probe(**{"metrics": ("patch-diversity",), **options})
        one.update(pictures()[:3], names_of(range(3)))
        other.update(pictures()[3:5], names_of(range(3, 5)))
        for take in (one.merge, one.load_state_dict):
            with pytest.raises(StateError, match=says):
                take(other.state_dict())
        assert one.images == 3

    def test_other_weights(self):
        one, other = probe(metrics=("patch-diversity",)), cp.Probe(small_vit(), metrics=("patch-diversity",), **QUICK)
        one.update(pictures()[:3], names_of(range(3)))
        other.update(torch.randn(2, 3, 64, 64), names_of(range(3, 5)))
        with pytest.raises(StateError, match="the model: "):
            one.merge(other)
        changed = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2).eval()
        other = cp.Probe(changed, metrics=("patch-diversity",), **QUICK)
        other.update(pictures()[3:5], names_of(range(3, 5)))
        with pytest.raises(StateError, match=r"the weights \(SHA-256\): "):
            one.merge(other)

    def test_weights_that_change_on_the_way(self):
        own = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2).eval()
        measuring = cp.Probe(own, metrics=("patch-diversity",), **QUICK)
        measuring.update(pictures()[:3], names_of(range(3)))
        own.load_state_dict(own.state_dict())  # written to, and the same
        measuring.update(pictures()[3:5], names_of(range(3, 5)))
        with torch.no_grad():
            own.blocks[0].attn.qkv.weight.mul_(1.1)
        calls = (measuring.findings, measuring.state_dict, lambda: measuring.update(pictures()[5:7], names_of(range(5, 7))))
        for call in calls:
            with pytest.raises(StateError, match="weights have changed since the first images"):
                call()
        assert measuring.images == 5

    def test_other_heads_with_the_same_weights(self):
        other = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=4).eval()
        other.load_state_dict(model().state_dict())
        one, other = probe(metrics=("patch-diversity",)), cp.Probe(other, metrics=("patch-diversity",), **QUICK)
        one.update(pictures()[:3], names_of(range(3)))
        other.update(pictures()[3:5], names_of(range(3, 5)))
        with pytest.raises(StateError, match=r"the attention: .*2 × 5 × 5.* and .*4 × 5 × 5"):
            one.merge(other)

    def test_a_batch_of_which_a_part_may_count(self, monkeypatch):
        own = probe(metrics=("patch-diversity",))
        own.update(pictures()[:3], names_of(range(3)))
        state = own.state_dict()
        with monkeypatch.context() as broken:
            broken.setattr(type(own.measurement.tally.records), "add", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                own.update(pictures()[3:5], names_of(range(3, 5)))
        calls = (own.findings, own.state_dict, lambda: own.update(pictures()[3:5], names_of(range(3, 5))))
        for call in (*calls, lambda: own.merge(state)):
            with pytest.raises(StateError, match="stopped while it added a batch"):
                call()
        own.load_state_dict(state)
        own.update(pictures()[3:5], names_of(range(3, 5)))
        whole = probe(metrics=("patch-diversity",))
        whole.update(pictures()[:5], names_of(range(5)))
        assert_same(whole.findings(), own.findings())

    def test_what_is_no_state(self):
        for state in ({}, {"manifest": "{"}, {"manifest": json.dumps({"schema": "other"})}):
            with pytest.raises(StateError, match="expected"):
                probe().load_state_dict(state)

    def test_a_state_that_lacks_something(self):
        own = probe(metrics=("patch-diversity",))
        own.update(pictures()[:3], names_of(range(3)))
        state = own.state_dict()
        for missing in [name for name in state if name != "manifest"]:
            with pytest.raises(StateError, match="incomplete"):
                own.load_state_dict({name: value for name, value in state.items() if name != missing})
        assert own.images == 3

    @pytest.mark.parametrize(
        ("images", "options"),
        [
            (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), {}),
            (torch.zeros(3, 32, 32), {}),
            ([1, 2], {}),
            (torch.zeros(2, 3, 32, 32), {"names": ["a"]}),
            (torch.zeros(2, 3, 32, 32), {"labels": [1, 2, 3]}),
        ],
    )
    def test_bad_images(self, images, options):
        with pytest.raises(DataError, match="expected"):
            probe(metrics=("patch-diversity",)).update(images, **options)

    def test_nothing_seen(self):
        with pytest.raises(DataError, match="seen no images"):
            probe().findings()

    def test_images_of_another_size(self):
        own = probe(metrics=("patch-diversity",))
        own.update(pictures()[:2])
        with pytest.raises(DataError, match="3 × 48 × 48"):
            own.update(torch.zeros(2, 3, 48, 48))


def test_a_batch_that_is_not_finite_leaves_what_was_added():
    own = probe(metrics=("patch-diversity",))
    own.update(pictures()[:4], names_of(range(4)))
    ill = pictures()[4:6].clone()
    ill[1, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"005\.png"):
        own.update(ill, names_of((4, 5)))
    assert own.images == 4
    own.update(pictures()[4:5], names_of((4,)))
    whole = probe(metrics=("patch-diversity",))
    whole.update(pictures()[:5], names_of(range(5)))
    assert_same(whole.findings(), own.findings())
    skipping = probe(metrics=("patch-diversity",), on_nonfinite="skip")
    skipping.update(torch.cat([pictures()[:4], ill]), names_of(range(6)))
    assert (skipping.images, len(skipping.findings().data["skipped"])) == (5, 1)


def test_empty_probes_add_nothing():
    own, empty = probe(metrics=("patch-diversity",)), probe(metrics=("patch-diversity",))
    own.update(pictures()[:0])
    assert own.images == 0
    empty.merge(own)
    own.update(pictures()[:3], names_of(range(3)))
    before = result_to_json(own.findings().metrics["patch-diversity"])
    own.merge(empty)
    own.merge(empty.state_dict())
    assert result_to_json(own.findings().metrics["patch-diversity"]) == before
    empty.merge(own)
    assert empty.images == 3


def test_above_the_limit_of_records_means_stay_exact_and_a_sample_is_kept():
    few, many = (
        probe(metrics=("attention-similarity", "similar-blocks"), records=10),
        probe(metrics=("attention-similarity", "similar-blocks")),
    )
    for own in (few, many):
        for i in range(0, 24, 7):
            own.update(pictures()[i : i + 7], names_of(range(i, min(i + 7, 24))))
    sampled, whole = few.findings(), many.findings()
    assert (sampled.data["images"], sampled.data["records"], len(sampled.images["names"])) == (24, 10, 10)
    assert "records" not in whole.data
    assert any("random sample of 10" in note for note in sampled.run["notes"])
    for name, reading in whole.metrics.items():
        np.testing.assert_allclose(sampled.metrics[name].values, reading.values, rtol=1e-12)
        np.testing.assert_allclose(sampled.metrics[name].ci95, reading.ci95, rtol=1e-9, atol=1e-9)
    for side in ("highest", "lowest"):
        numbers = [found.sureness["extremes"]["numbers"]["kappa_adjacent"][side] for found in (sampled, whole)]
        assert [each["name"] for each in numbers[0]] == [each["name"] for each in numbers[1]]


def test_a_module_stays_as_it_was():
    own = small_vit().train()
    measuring = cp.Probe(own, metrics=("patch-diversity",), **QUICK)
    measuring.update(torch.randn(2, 3, 64, 64))
    assert own.training
    measuring.findings()
    assert own.training
