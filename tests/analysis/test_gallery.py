"""Which images the report shows, and the small pictures that are kept of those at the ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import small_vit
from PIL import Image

import collapse_probe as cp
from collapse_probe.analysis.state import gallery
from collapse_probe.analysis.state.gallery import LONGEST, overlays, pooled, thumbnail
from collapse_probe.data.images import open_data
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.results.findings import Findings
from collapse_probe.seeding import rank_of_name
from collapse_probe.statistics.breakdowns import extremes_of, pictured
from collapse_probe.statistics.estimates import per_image_values

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def prepared(size):
    def transform(picture):
        pixels = torch.from_numpy(np.asarray(picture.resize(size[::-1]), dtype=np.float32) / 255).permute(2, 0, 1)
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    return Preprocess(transform, size, {"mean": MEAN, "std": STD})


def test_a_thumbnail_is_small_and_as_the_model_saw_it(photos):
    images, made = open_data(str(photos)), prepared((300, 200))
    for i in range(len(images)):
        found = thumbnail(images.pixels(i, made), made.description)
        assert (found.shape, found.dtype) == ((LONGEST, 96, 3), np.uint8)
        expected = np.asarray(images[i].resize((200, 300)).resize((96, LONGEST), Image.Resampling.LANCZOS), dtype=int)
        assert np.abs(found.astype(int) - expected).max() <= 2


def test_kappa_comes_before_the_raw_similarity_and_that_before_diversity():
    table = {"names": np.arange(6).astype(str), "patch-diversity": np.arange(6.0)[:, None]}
    assert pictured(extremes_of(per_image_values(table)))[0] == "patch_diversity_last"
    table["attention-similarity"] = np.array([0.5, 0, 0.1, 0.9, 0.2, 0.3])[:, None]
    table["attention-similarity/other_token"] = np.zeros((6, 1))
    ends = extremes_of(per_image_values(table))
    assert pictured(ends)[0] == "kappa_adjacent"
    raw = {"numbers": {k: v for k, v in ends["numbers"].items() if k != "kappa_adjacent"}}
    assert pictured(raw)[0] == "attention_similarity_adjacent"
    assert pictured({}) is None


@pytest.mark.parametrize("count", [0, 2, 6, 9])
def test_the_gallery_is_a_random_sample_that_the_seed_draws(photos, count):
    options = {"img_size": 64, "null_images": 0, "gallery_images": count, "metrics": ("patch-diversity",)}
    names = [
        () if (gallery := cp.analyze(small_vit(), str(photos), seed=seed, **options).gallery) is None else gallery.names
        for seed in (0, 0, 1)
    ]
    assert len(names[0]) == min(count, 6)
    assert names[0] == names[1] == tuple(sorted(names[0]))
    ranked = sorted(open_data(str(photos)).names, key=rank_of_name)
    assert names[0] == tuple(sorted(ranked[:count]))


def test_the_findings_keep_the_ends_and_give_them_back(photos, tmp_path):
    found = cp.analyze(small_vit(sharpness=8), str(photos), img_size=64, batch_size=4, null_images=0)
    entry = pictured(found.sureness["extremes"])[1]
    assert set(found.thumbnails) == {image["name"] for end in ("highest", "lowest") for image in entry[end]}
    again = Findings.load(found.save(tmp_path / "out"))
    assert list(again.thumbnails) == list(found.thumbnails)
    for name, pixels in found.thumbnails.items():
        np.testing.assert_array_equal(again.thumbnails[name], pixels)
    bare = replace(again, gallery=None)
    assert Findings.load(bare.save(tmp_path / "no maps")).gallery is None
    assert set(Findings.load(tmp_path / "no maps").thumbnails) == set(found.thumbnails)
    none = replace(bare, thumbnails={}).save(tmp_path / "none")
    assert not (none / "gallery.npz").exists()
    assert Findings.load(none).thumbnails == {}


def test_without_a_gallery_no_image_is_read_again(photos):
    found = cp.analyze(small_vit(), str(photos), img_size=64, null_images=0, gallery_images=0)
    assert found.gallery is None
    assert found.thumbnails == {}


def test_maps_by_head_and_by_patch_survive_the_folder(photos, tmp_path):
    options = {"img_size": 64, "null_images": 0, "gallery_images": 2, "metrics": ("patch-diversity",)}
    found = cp.analyze(small_vit(sharpness=8), str(photos), **options)
    kept = Findings.load(found.save(tmp_path / "out")).gallery
    assert kept is not None
    np.testing.assert_allclose(kept.heads.mean(2), found.gallery.maps, rtol=2e-3)
    np.testing.assert_allclose(kept.patches, found.gallery.patches, rtol=2e-3, atol=1e-6)


def test_maps_of_many_patches_are_pooled_to_means():
    maps = torch.arange(24.0 * 24).reshape(1, 24, 24)
    found = pooled(maps)
    assert found.shape == (1, 12, 12)
    assert found[0, 0, 0] == maps[0, :2, :2].mean()
    assert found[0, -1, -1] == maps[0, -2:, -2:].mean()
    assert pooled(maps[:, :20, :20]).shape == (1, 20, 20)  # 400 are not too many
    assert pooled(torch.ones(1, 21, 21)).unique().tolist() == [1.0]  # a border of half squares is a mean too


def test_what_single_patches_attend_to_is_a_mean_over_the_queries_of_a_cell():
    model = small_vit(sharpness=8).eval()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with cp.record(model) as recording, torch.no_grad():
        model(pixels)
    trace = recording.last
    maps, heads, patches = overlays(trace, 0)
    rows, columns = trace.plan.grid
    for block, index in enumerate(trace.plan.map_layers):
        whole = trace.map_of(index, 0)
        first = len(trace.plan.prefix)
        torch.testing.assert_close(heads[block].flatten(1), whole[:, 0, first:])
        torch.testing.assert_close(maps[block].flatten(), whole[:, 0, first:].mean(0))
        torch.testing.assert_close(patches[block].flatten(2).flatten(0, 1), whole.mean(0)[first:, first:])
    assert patches.shape[1:] == (rows, columns, rows, columns)


def test_queries_are_pooled_where_they_are_too_many(monkeypatch):
    monkeypatch.setattr(gallery, "MOST_NUMBERS", 4 * 16 * 2)
    maps = torch.arange(16.0 * 16).reshape(16, 4, 4)  # of each of 4 × 4 queries
    found = gallery._of_cells(maps, (4, 4), 2)
    assert found.shape == (2, 2, 4, 4)
    torch.testing.assert_close(found[0, 1], maps.reshape(4, 4, 4, 4)[:2, 2:].mean((0, 1)))
