"""What a drawing holds as text: every cell with its numbers and its colour, keys like the lines, words as they were."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from collapse_probe.report.colours import FLARE, MAKO, VLAG
from collapse_probe.report.heatmaps import SIGNED, UNSIGNED, Heatmap, Scale, cell_number, grid, mosaic, short
from collapse_probe.report.sheet import Sheet
from collapse_probe.report.style import ROLES, charts, curve, drawn, panels

SVG = "{http://www.w3.org/2000/svg}"


def cells(panel: Heatmap) -> dict[tuple[int, int], tuple[str, str]]:
    """Fill and words of every cell, by row and column."""
    found = {}
    for fill, column, row, said in re.findall(
        r'<path fill="([^"]*)"[^>]*d="M(\d+) (\d+)h1v1h-1z"><title>([^<]*)<', panel.body("a")
    ):
        found[int(row), int(column)] = (fill, said)
    return found


def matrix(rows: int, columns: int, low: float = 0.0) -> np.ndarray:
    return np.random.default_rng(rows).uniform(low, 1, (rows, columns))


@pytest.mark.parametrize("scale", [UNSIGNED, SIGNED, Scale(-0.05, 0.05, VLAG)])
@pytest.mark.parametrize("shape", [(1, 1), (12, 12), (32, 32), (3, 7)])
def test_every_cell_has_the_colour_of_its_value_and_says_it(scale: Scale, shape: tuple[int, int]) -> None:
    values = matrix(*shape, low=scale.low) * scale.high
    values[0, 0] = np.nan
    found = cells(Heatmap(values, "title", scale))
    assert len(found) == values.size
    assert found.pop((0, 0)) == ("none", "blocks 0 and 0: undefined")
    for (row, column), (fill, said) in found.items():
        share = (values[row, column] - scale.low) / (scale.high - scale.low)
        assert fill == scale.colours.codes[round(share * 255)]
        assert said == f"blocks {row} and {column}: {cell_number(values[row, column])}"


def test_a_cell_says_its_interval_and_its_nulls_where_there_are_any() -> None:
    values, null = matrix(2, 2), np.array([[np.nan, 0.25], [-0.5, 0.125]])
    ends = np.stack([values - 0.1, values + 0.1], -1)
    ends[1, 0] = np.nan
    panel = Heatmap(values, "", UNSIGNED, "head", "depth (0: before)", beside={"95 % CI": ends, "<other> token": null})
    found = cells(panel)
    assert found[0, 0][1].startswith(f"head 0, depth 0: {values[0, 0]:.3f}; 95 % CI [")
    assert "token" not in found[0, 0][1]
    assert found[1, 0][1] == f"head 1, depth 0: {values[1, 0]:.3f}; &lt;other&gt; token −0.500"
    low, high = map(cell_number, ends[1, 1])
    assert found[1, 1][1].endswith(f"; 95 % CI [{low}, {high}]; &lt;other&gt; token 0.125")


def contrast(one: str, other: str) -> float:
    """How well two colours can be told apart, as WCAG reckons it: 1 not at all, 21 black on white."""

    def luminance(code: str) -> float:
        code = "#ffffff" if code == "#fff" else code
        share = np.array([int(code[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(share <= 0.03928, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("cells_a_side", "numbers"), [(1, 1), (12, 144), (13, 169), (14, 0), (32, 0)])
def test_numbers_stand_in_cells_where_they_fit(cells_a_side: int, numbers: int) -> None:
    values = matrix(cells_a_side, cells_a_side)
    panel = Heatmap(values, "", UNSIGNED)
    text, fills = panel.body("a"), cells(panel)
    groups = re.findall(r'<g fill="([^"]*)" font-size="([^"]*)" text-anchor="middle" pointer-events="none">(.*?)</g>', text)
    assert sum(group.count("<text") for *_, group in groups) == numbers
    assert all(float(size) >= 7 for _, size, _ in groups)
    for colour, _, group in groups:
        for x, y, word in re.findall(r'<text x="([^"]*)" y="([^"]*)">([^<]*)</text>', group):
            place = (int(float(y) / panel.cell[1]), int(float(x) / panel.cell[0]))
            assert word == short(values[place])
            assert contrast(colour, fills[place][0]) >= 3.5


def test_dots_leave_the_numbers_in_their_cells_alone() -> None:
    values = matrix(12, 12, -1.0)
    panel = Heatmap(values, "", SIGNED, marked=np.tril(np.ones((12, 12), dtype=bool), -1))
    text, side = panel.body("a"), panel.cell[0]
    numbers = {(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">[−.\d]+</text>', text)}
    dots = [
        (float(x), float(y), float(r)) for x, y, r in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"/>', text)
    ]
    assert len(dots) == 66
    size = min(10.0, side * 0.36)
    for x, y, radius in dots:
        (below,) = [at for at in numbers if abs(at[0] - x) < 1 and 0 < at[1] - y < side]
        assert y + radius <= below[1] - 0.72 * size  # a digit is about so tall
        assert y - radius >= int(y / side) * side


def test_cells_without_words_are_the_same_picture() -> None:
    values = np.round(matrix(9, 14), 1)
    values[2, 3:5] = np.nan
    found = np.full(values.shape, "", dtype=object)
    for fill, d in re.findall(r'<path fill="([^"]*)" d="([^"]*)"/>', mosaic(values, UNSIGNED)):
        for column, row, wide in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", d):
            found[int(row), int(column) : int(column) + int(wide)] = fill
    expected = [[UNSIGNED.colours.codes[round(v * 255)] if np.isfinite(v) else "" for v in row] for row in values]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("name", "ramp"), [("mako_r", MAKO), ("vlag", VLAG), ("flare", FLARE)])
def test_colours_are_those_of_seaborn(name: str, ramp) -> None:
    seaborn = pytest.importorskip("seaborn")
    theirs = np.asarray(seaborn.color_palette(name, as_cmap=True)(np.arange(256)))[:, :3] * 255
    assert np.abs(ramp.table.astype(float) - theirs).max() <= 1.5
    few = np.array(seaborn.color_palette(name, n_colors=5)) * 255
    ours = np.array([[int(code[at : at + 2], 16) for at in (1, 3, 5)] for code in ramp.spread(5)])
    assert np.abs(ours - few).max() <= 3


def test_names_cannot_become_markup() -> None:
    hostile = "<script>alert(1)</script> & \"'"
    panel = Heatmap(matrix(2, 2), hostile, UNSIGNED, rows=hostile, columns=hostile, beside={hostile: matrix(2, 2)})
    sheet = grid([panel, None], 2).called(hostile)
    for text in (sheet.content().decode(), *(part.text for part in sheet.parts if part is not None)):
        assert "<script" not in text
        ElementTree.fromstring(text)


@drawn
def lines(label: str = "0.123456789 <b>") -> Sheet:
    places = panels(2)
    for axes in places:
        for role in ROLES.values():
            curve(axes, np.arange(4.0), np.arange(4) / 7.123456, role, np.stack([np.zeros(4), np.ones(4)], -1))
        axes.set(title=label, xlabel="a\nb", xticks=[0.987654321], xticklabels=["0.987654321"])
    return charts(places)


def test_a_chart_keeps_its_words_and_its_ids_apart() -> None:
    one, other = (lines().called(name) for name in ("first", "second & <third>"))
    texts = [part.text for sheet in (one, other) for part in sheet.parts if part is not None]
    for text in texts:
        root = ElementTree.fromstring(text)
        words = ["".join(each.itertext()).strip() for each in root.iter(f"{SVG}text")]
        assert {"0.123456789 <b>", "0.987654321"} <= set(words)
        assert "metadata" not in text
        assert "font-family" not in text
        pointed = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
        assert set(pointed) == set(re.findall(r' id="([^"]*)"', text))
    ids = [each for text in texts for each in re.findall(r' id="([^"]*)"', text)]
    assert len(ids) == len(set(ids)) > 8
    assert lines().called("first").content() == one.content()


def test_the_key_shows_each_line_as_it_is_drawn() -> None:
    sheet = lines()
    assert [key.words for key in sheet.above] == [role.label for role in ROLES.values()]
    for key, role in zip(sheet.above, ROLES.values(), strict=True):
        assert f'stroke="{role.colour}"' in key.swatch
        dashes = re.search(r'stroke-dasharray="([^"]*)"', key.swatch)
        if role.line == "-":
            assert dashes is None
        else:
            assert dashes is not None
            shown = np.array(dashes[1].split(), dtype=float)
            np.testing.assert_allclose(shown / shown[0], np.array(role.line[1]) / role.line[1][0], rtol=0.02)
        assert ("translate" in key.swatch) == bool(role.marker)
