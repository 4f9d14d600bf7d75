"""Which images the report shows, and the small pictures that are kept of those at the ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import photographs, small_vit
from PIL import Image

import collapse_probe as cp
from collapse_probe.analysis import gallery as showing
from collapse_probe.analysis.analyze import gallery_names
from collapse_probe.analysis.gallery import LONGEST, thumbnails
from collapse_probe.analysis.loop import FEWEST
from collapse_probe.analysis.measurement import RunSettings
from collapse_probe.data.images import open_data, seeded_order
from collapse_probe.data.preprocessing import Preprocess
from collapse_probe.results.findings import Findings
from collapse_probe.statistics.breakdowns import extremes_of, pictured
from collapse_probe.statistics.estimates import per_image_values

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def prepared(size):
    def transform(picture):
        pixels = torch.from_numpy(np.asarray(picture.resize(size[::-1]), dtype=np.float32) / 255).permute(2, 0, 1)
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    return Preprocess(transform, size, {"mean": MEAN, "std": STD})


def ends_of(images, **values):
    """What `extremes_of` says of images whose patch diversity (and kappa) are given."""
    table = {"names": np.array(images.names), "patch-diversity": np.array(values["diversity"])[:, None]}
    if "real" in values:
        table["attention-similarity"] = np.array(values["real"])[:, None]
        table["attention-similarity/other_token"] = np.zeros((len(images), 1))
    return extremes_of(per_image_values(table))


def test_the_ends_are_kept_small_as_the_model_saw_them(photos):
    images = open_data(str(photos))
    ends = ends_of(images, diversity=[0.6, 0.1, 0.3, 0.4, 0.5, 0.2])
    found = thumbnails(ends, images, prepared((300, 200)))
    order = [images.names[i] for i in (0, 4, 3, 1, 5, 2)]
    assert list(found) == order
    for name, pixels in found.items():
        assert (pixels.shape, pixels.dtype) == ((LONGEST, 96, 3), np.uint8)
        whole = images[images.names.index(name)].resize((200, 300))
        expected = np.asarray(whole.resize((96, LONGEST), Image.Resampling.LANCZOS), dtype=int)
        assert np.abs(pixels.astype(int) - expected).max() <= 2


def test_kappa_comes_before_the_raw_similarity_and_that_before_diversity(photos):
    images = open_data(str(photos))
    plain, with_kappa = (
        ends_of(images, diversity=range(6)),
        ends_of(images, diversity=range(6), real=[0.5, 0, 0.1, 0.9, 0.2, 0.3]),
    )
    assert pictured(plain)[0] == "patch_diversity_last"
    assert pictured(with_kappa)[0] == "kappa_adjacent"
    assert next(iter(thumbnails(with_kappa, images, prepared((32, 32))))) == images.names[3]
    raw = {"numbers": {k: v for k, v in with_kappa["numbers"].items() if k != "kappa_adjacent"}}
    assert pictured(raw)[0] == "attention_similarity_adjacent"
    assert pictured({}) is None


def test_images_that_cannot_be_read_again_are_left_out(tmp_path, photos):
    folder = photographs(tmp_path / "pictures")
    images = open_data(str(folder))
    ends = ends_of(images, diversity=range(6))
    (folder / images.names[2]).unlink()
    assert set(thumbnails(ends, images, prepared((16, 16)))) == set(images.names) - {images.names[2]}
    loader = [torch.zeros(6, 3, 16, 16)]
    assert thumbnails(ends, loader, prepared((16, 16))) == {}
    assert thumbnails({}, images, prepared((16, 16))) == {}


def test_only_the_first_process_reads_them(photos, monkeypatch):
    images = open_data(str(photos))
    monkeypatch.setattr(showing, "rank_and_world", lambda: (1, 2))
    assert thumbnails(ends_of(images, diversity=range(6)), images, prepared((16, 16))) == {}


@pytest.mark.parametrize("count", [0, 2, 6, 9])
def test_the_gallery_is_spread_over_the_images(photos, count):
    images = open_data(str(photos))
    settings = RunSettings(gallery_images=count)
    assert len(gallery_names(images, settings)) == min(count, 6)
    assert gallery_names(images, settings) <= set(images.names)
    assert gallery_names([torch.zeros(1)], settings) == {str(i) for i in range(count)}


def test_a_run_that_may_stop_early_shows_images_that_it_reads_in_any_case():
    images = open_data("bundled:digits")
    names = gallery_names(images, RunSettings(gallery_images=4, until_ci=0.1, seed=3))
    assert names <= {images.names[i] for i in seeded_order(images, 3)[:FEWEST]}
    assert len(names) == 4


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
