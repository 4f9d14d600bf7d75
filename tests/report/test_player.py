"""The gallery of a page: every map of every block, head and patch is there, for the images that tell most."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from factories import TOKENS, make_gallery, synthetic
from PIL import Image

from collapse_probe.report.findings.page import render
from collapse_probe.report.gallery import COLOURS, LEVELS, attention_gallery, chosen, is_flat, spread_of
from collapse_probe.results.findings import Findings

NAMES = ("a", "b", "c", "d", "e")


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("blocks", [2, 12])
def test_every_tile_has_the_colours_of_its_map(blocks: int) -> None:
    findings = synthetic(blocks)
    player, gallery = attention_gallery(findings), findings.gallery
    assert player is not None
    assert (player.heads, player.cells, player.grid, player.rows) == (2, (2, 2), (7, 7), 7)
    assert player.blocks == tuple(range(blocks))
    small = np.asarray(picture(player.shots[0].tiles))  # of indices into its colours
    assert small.shape == (7 * player.rows, 7 * blocks)
    spread = spread_of(TOKENS * gallery.maps)
    for block in range(blocks):
        expected = [gallery.maps[0, block], *gallery.heads[0, block], *gallery.patches[0, block].reshape(-1, 7, 7)]
        for row, values in enumerate(expected):
            tile = small[7 * row : 7 * row + 7, 7 * block : 7 * block + 7]
            np.testing.assert_array_equal(tile, np.round((spread.place(TOKENS * values) + 1) / 2 * (LEVELS - 1)))


def test_uniform_attention_covers_nothing_and_the_ends_most() -> None:
    player = attention_gallery(synthetic(3))
    assert player is not None
    shown = picture(player.shots[0].tiles)
    alpha = np.frombuffer(shown.info["transparency"], dtype=np.uint8)
    assert alpha[[0, LEVELS - 1]].min() > 180
    assert alpha[LEVELS // 2 - 1 : LEVELS // 2 + 1].max() < 8
    palette = np.array(shown.getpalette()).reshape(-1, 3)[:LEVELS]
    np.testing.assert_array_equal(palette[[0, -1]], COLOURS.table[[0, -1]])


def told(values: list[float], collapsed: str) -> Findings:
    """Findings with five pictures and the patch diversity of each; the median over all images is 0.5."""
    entry = {"highest": [], "lowest": [], "median": 0.5, "images": 99, "collapsed": collapsed}
    images = {"names": np.array(NAMES), "patch-diversity": np.array(values)[:, None]}
    extremes = {"numbers": {"patch_diversity_last": entry}, "warning": ""}
    return replace(synthetic(3, images=NAMES), images=images, sureness={"extremes": extremes})


def test_the_images_are_a_typical_one_and_those_at_both_ends_of_the_kept() -> None:
    found = chosen(told([0.9, 0.45, 0.2, 0.6, 0.3], "low"))
    assert list(found) == [1, 2, 0]
    assert found[1] == "closest to the median of the 5 images kept: patch diversity 0.450, median of all 0.500"
    assert found[2].startswith("most collapsed of the 5 images kept: patch diversity 0.200")
    assert found[0].startswith("least collapsed of")
    assert list(chosen(told([0.9, 0.45, 0.2, 0.6, 0.3], "high"))) == [1, 0, 2]
    assert chosen(synthetic(3, images=NAMES)) == {0: "", 1: "", 2: ""}  # nothing is known of them


def test_uniform_maps_are_one_sentence_and_no_grey_tiles() -> None:
    findings = synthetic(4)
    even = np.full((2, 4, 7, 7), 1 / TOKENS)
    flat = replace(findings, gallery=replace(make_gallery(4), maps=even, heads=even[:, :, None] * 1.1, patches=None))
    assert is_flat(flat)
    assert attention_gallery(flat) is None
    html = render(flat, {})
    assert "Where each block looks is not drawn: in 2 images that were kept" in html
    sharp = replace(flat, gallery=replace(flat.gallery, heads=even[:, :, None] * 1.3))  # a head that is not uniform
    assert not is_flat(sharp)
    assert attention_gallery(sharp) is not None
    assert "is not drawn" not in render(findings, {})


def test_pooled_maps_say_so_and_the_mean_over_heads_is_pooled_alike() -> None:
    gallery = make_gallery(2)
    fine = np.repeat(np.repeat(gallery.maps, 4, 2), 4, 3) / 16
    findings = replace(synthetic(2), gallery=replace(gallery, maps=fine))
    player = attention_gallery(findings)
    assert player is not None
    assert player.pooled
    small = np.asarray(picture(player.shots[0].tiles))
    spread = spread_of(TOKENS * fine)
    np.testing.assert_array_equal(small[:7, :7], np.round((spread.place(TOKENS * gallery.maps[0, 0] / 16) + 1) / 2 * 63))
    assert "neighbouring patches pooled to 7 × 7" in render(findings)
    assert "pooled to" not in render(synthetic(2))


def test_a_page_shows_the_tiles_of_all_blocks_without_a_script() -> None:
    html = render(synthetic(5))
    boxes = re.findall(r'<svg viewBox="(\d+) 0 7 7" preserveAspectRatio="none"><use class="map" href="#([^"]*)"/>', html)
    assert boxes == [(str(7 * block), f"attention-gallery-{at}-m") for at in (0, 1) for block in range(5)]


def test_a_page_of_24_blocks_with_every_map_is_below_two_and_a_half_megabytes() -> None:
    rng = np.random.default_rng(0)

    def maps(*shape: int) -> np.ndarray:
        raised = np.exp(rng.normal(0, 0.8, (*shape, 14, 14)))  # as uneven as attention, without anything to compress
        return raised / raised.sum((-2, -1), keepdims=True)

    gallery = replace(
        make_gallery(24, names=("a", "b", "c")), maps=maps(3, 24), heads=maps(3, 24, 16), patches=maps(3, 24, 5, 5)
    )
    findings = synthetic(24, heads=16)
    html = render(replace(findings, gallery=gallery, model={**findings.model, "tokens": 197}))
    assert html.count('class="map"') == 3 * 24
    assert len(html.encode()) < 2_500_000
