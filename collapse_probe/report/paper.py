"""Figures for papers: what DeepViT's Figures 3, 4 and 6 show, one or two columns wide, with the numbers of each beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from collapse_probe.errors import OutputError
from collapse_probe.report.comparison.curves import NULL_LINES, colours
from collapse_probe.report.heatmaps import UNSIGNED, Scale, scale_of
from collapse_probe.report.style import DISTINCT, MARKERS, ROLES, STYLE, printable
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings, MetricResult
from collapse_probe.results.intervention import Interventions
from collapse_probe.results.readings import adjacent, counts_of, null_ci95, null_of, over_heads, result_of
from collapse_probe.results.rules import KAPPA_ABOVE
from collapse_probe.results.survey import Survey
from collapse_probe.results.sweep import UNTRAINED, Sweep, estimate
from collapse_probe.statistics.intervals import Array

FORMATS = ("pdf", "svg", "png")
DOTS = 300
"""An inch of a PNG."""
IN_A_ROW = 4
"""Heatmaps side by side."""
NAMES = {"other_token": "chance level", "untrained": "untrained copy"}
COLUMNS = ("panel", "series", "x", "y", "value", "ci_low", "ci_high")


@dataclass(frozen=True)
class Size:
    """Inches of a figure of one and of two columns, and points of its letters."""

    single: float
    double: float
    letters: float


SIZES = {"paper": Size(3.25, 6.75, 7.0), "screen": Size(6.0, 12.0, 11.0)}
"""A column and a text of the usual two-column papers; twice as large for slides."""


@dataclass(frozen=True)
class Line:
    """One series over `x`, with its 95 % interval [n, 2]; `dash` is matplotlib's line style, "" for points alone."""

    label: str
    x: Array
    values: Array
    colour: str
    ci95: Array | None = None
    dash: Any = "-"
    marker: str = "o"


@dataclass(frozen=True)
class Curves:
    """Series over one axis; `ticks` are names of the places 0, 1, … where these are no numbers."""

    title: str
    along: str
    unit: str
    lines: Sequence[Line]
    limits: tuple[float, float] | None = None
    ticks: Sequence[str] = ()

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The numbers, in the order of COLUMNS without the panel."""
        for line in self.lines:
            for at, (x, value) in enumerate(zip(line.x, line.values, strict=True)):
                ends = (np.nan, np.nan) if line.ci95 is None else line.ci95[at]
                place = self.ticks[round(x)] if self.ticks else int(x) if float(x).is_integer() else float(x)
                yield (line.label, place, None, value, *ends)


@dataclass(frozen=True)
class Matrix:
    """Every block (or depth) with every other; `ci95` [n, n, 2]."""

    title: str
    values: Array
    scale: Scale
    along: str
    ci95: Array | None = None

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The numbers, in the order of COLUMNS without the panel: x is the column, y the row."""
        for (y, x), value in np.ndenumerate(self.values):
            ends = (np.nan, np.nan) if self.ci95 is None else self.ci95[y, x]
            yield (self.title, x, y, value, *ends)


@dataclass(frozen=True)
class PaperFigure:
    """Panels in rows, `wide` (two columns) or not; `tall` is the height of a row over the width of the figure."""

    panels: Sequence[Sequence[Curves | Matrix]]
    wide: bool = True
    tall: float = 0.3

    @property
    def table(self) -> pd.DataFrame:
        """What is drawn, one number a row."""
        named = zip("abcdefghijklmnopqrstuvwxyz" * 4, (panel for row in self.panels for panel in row), strict=False)
        return pd.DataFrame([(letter, *row) for letter, panel in named for row in panel.rows()], columns=list(COLUMNS))


def write_figures(results: Any, folder: Path, kind: str, size: str) -> list[Path]:
    """Write every figure of `results` and its numbers as CSV into a new folder; raises OutputError where there is none."""
    if isinstance(results, Survey):
        raise OutputError("DeepViT's figures are of one model: ask for them of a model's own folder, below models/")
    figures = figures_of(results)
    if not figures:
        raise OutputError(
            "nothing here belongs into DeepViT's Figures 3, 4 or 6: expected attention-similarity, similar-blocks, "
            "head-similarity or feature-similarity; the page has all else"
        )
    folder.mkdir(parents=True)
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.{kind}"
        timeless = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
        with style.context([STYLE, looks(SIZES[size])]):
            draw(figure, SIZES[size]).savefig(path, dpi=DOTS, metadata=timeless, facecolor="white")
        figure.table.to_csv(folder / f"{name}.csv", index=False)
        written += [path, folder / f"{name}.csv"]
    return written


def looks(size: Size) -> dict[str, Any]:
    """What a printed figure has other than a page's: letters that are one with the text, kept as letters, thinner lines."""
    small = size.letters - 1
    letters = {"font.size": size.letters, "axes.labelsize": size.letters, "axes.titlesize": size.letters}
    ticks = {"xtick.labelsize": small, "ytick.labelsize": small, "legend.fontsize": small, "axes.titlepad": 4.0}
    return {**letters, **ticks, "pdf.fonttype": 42, "axes.linewidth": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5}


def draw(figure: PaperFigure, size: Size) -> Figure:
    """The figure of matplotlib."""
    width, columns = size.double if figure.wide else size.single, max(len(row) for row in figure.panels)
    sheet = Figure(figsize=(width, width * figure.tall * len(figure.panels)), layout="constrained")
    FigureCanvasAgg(sheet)
    grid = sheet.subplots(len(figure.panels), columns, squeeze=False)
    letters = iter("abcdefghijklmnopqrstuvwxyz" * 4)
    several = sum(len(row) for row in figure.panels) > 1
    for places, row in zip(grid, figure.panels, strict=True):
        for axes in places[len(row) :]:
            axes.remove()
        shown = list(zip(places, row, strict=False))
        for axes, panel in shown:
            axes.set_title(f"({next(letters)}) {panel.title}" if several else panel.title)
            if isinstance(panel, Curves):
                _curves(axes, panel)
        maps = [(axes, panel) for axes, panel in shown if isinstance(panel, Matrix)]
        if maps:
            images = [_matrix(axes, panel, first=axes is maps[0][0]) for axes, panel in maps]
            widest = min(range(len(maps)), key=lambda at: maps[at][1].scale.low)
            sheet.colorbar(images[widest], ax=[axes for axes, _ in maps], aspect=18, pad=0.02, shrink=0.9)
    names = {name: handle for axes in sheet.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(names) > 1:
        letter = size.letters / 72  # inches
        columns = max(1, min(len(names), int(width / letter / (5 + 0.55 * max(map(len, names))))))
        sheet.legend(names.values(), names, loc="outside upper left", ncols=columns, frameon=False, handlelength=2.4)
        sheet.set_figheight(sheet.get_figheight() + 1.4 * letter * -(-len(names) // columns))
    return sheet


def _curves(axes: Axes, panel: Curves) -> None:
    for line in panel.lines:
        look: dict[str, Any] = {"color": line.colour, "linewidth": 1.1, "markersize": 2.8}
        if line.dash == "":
            reach = None if line.ci95 is None else np.abs(line.ci95.T - line.values)
            axes.errorbar(
                line.x, line.values, yerr=reach, fmt=line.marker, label=line.label, capsize=1.5, elinewidth=0.8, **look
            )
            continue
        axes.plot(line.x, line.values, linestyle=line.dash, marker=line.marker, label=line.label, **look)
        if line.ci95 is not None:
            axes.fill_between(line.x, line.ci95[:, 0], line.ci95[:, 1], color=line.colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=panel.along, ylabel=panel.unit)
    if panel.limits is not None:
        low = min([panel.limits[0], *(float(np.nanmin(line.values, initial=panel.limits[0])) - 0.03 for line in panel.lines)])
        axes.set_ylim(low if low < panel.limits[0] else panel.limits[0], panel.limits[1])
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), list(panel.ticks))
        axes.margins(x=0.12)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(axis="y")


def _matrix(axes: Axes, panel: Matrix, *, first: bool) -> Any:
    """Cells as shapes, so that the figure stays sharp and small."""
    shades, count = ListedColormap(panel.scale.colours.codes), len(panel.values)
    axes.set_facecolor("#eef1f3")  # what is undefined
    edges = np.arange(count + 1) - 0.5
    cells = np.ma.masked_invalid(panel.values)
    image = axes.pcolormesh(edges, edges, cells, cmap=shades, vmin=panel.scale.low, vmax=panel.scale.high, linewidth=0)
    axes.set(aspect="equal", xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), xlabel=panel.along)
    if first:
        axes.set_ylabel(panel.along)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return image


def figures_of(results: Any) -> dict[str, PaperFigure]:
    """The figures that results have numbers for, by the name of their file."""
    if isinstance(results, Interventions):
        return {"replaced-maps": replaced_maps(results)}
    if isinstance(results, Sweep):
        figures = {f"deepvit-figure-3b-by-{axis}": counts_along(results, axis) for axis in results.axes}
        return {name: figure for name, figure in figures.items() if figure.panels[0]}
    subjects, tints = {"": results}, {"": ROLES["measured"].colour}
    if isinstance(results, Comparison):
        names = short_names(list(results.subjects))
        subjects = {names[label]: findings for label, findings in results.subjects.items()}
        tints = {names[label]: colour for label, colour in colours(results).items()}
    similar = [panel for make in (ratio_or_cosine, counts, heads) if (panel := make(subjects, tints)).lines]
    last, maps = with_the_last_depth(subjects, tints), block_by_block(subjects)
    return {
        **({"deepvit-figure-3": PaperFigure([similar])} if similar else {}),
        **({"deepvit-figure-4": PaperFigure([[last]], wide=False, tall=0.66)} if last.lines else {}),
        **({"deepvit-figure-6": maps} if maps is not None else {}),
    }


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """A name for each label that fits into a legend, and is another for each: a number tells those that would look alike."""
    names: dict[str, str] = {}
    seen: list[str] = []
    for label in labels:
        shortest = printable(label, 18)
        seen.append(shortest)
        names[label] = label if seen.count(shortest) == 1 else f"{printable(label, 20)} ({seen.count(shortest)})"
    return names


def _over(
    subjects: Mapping[str, Findings], tints: Mapping[str, str], metric: str, read: Any, nulls: Sequence[str] = tuple(NAMES)
) -> list[Line]:
    """Of every subject what `read` makes of the values and intervals of `metric`, and its chance levels."""
    lines = []
    for at, (label, findings) in enumerate(subjects.items()):
        result = result_of(findings, metric)
        if result is None or len(result.array) < 2:
            continue
        x, values, ci95 = read(result, result.array, result.ci95)
        shown, marker = printable(label, 24), MARKERS[at % len(MARKERS)]
        lines.append(Line(shown or "measured, 95 % CI", x, values, tints[label], ci95, "-", marker))
        for null in nulls:
            if (chance := null_of(result, null)) is not None:
                colour = tints[label] if label else ROLES[null].colour
                x, values, _ = read(result, chance, null_ci95(result, null))
                name = f"{shown}: {NAMES[null]}" if label else NAMES[null]
                lines.append(Line(name, x, values, colour, None, NULL_LINES[null], ""))
    return lines


def _before(result: MetricResult, values: Array, ci95: Array | None) -> tuple[Array, Array, Array | None]:
    """Each block with the one before."""
    return np.arange(1.0, len(values)), adjacent(result, values), None if ci95 is None else adjacent(result, ci95)


def _each(result: MetricResult, values: Array, ci95: Array | None) -> tuple[Array, Array, Array | None]:
    """Each block by itself, the mean over its heads where there are some, with the interval that this has."""
    if values.ndim == 2:
        if ci95 is not None and result.head_mean is not None:
            return np.arange(float(len(values))), result.head_mean[0], result.head_mean[2]
        return np.arange(float(len(values))), over_heads(values), None
    return np.arange(float(len(values))), values, ci95


def _last(result: MetricResult, values: Array, ci95: Array | None) -> tuple[Array, Array, Array | None]:
    """Each depth with the last one."""
    return np.arange(float(len(values))), values[:, -1], None if ci95 is None else ci95[:, -1]


def ratio_or_cosine(subjects: Mapping[str, Findings], tints: Mapping[str, str]) -> Curves:
    """DeepViT's Figure 3a where its ratio was measured, else the mean cosine that it is a share of."""
    if all(result_of(findings, "similarity-ratio") is not None for findings in subjects.values()):
        lines = _over(subjects, tints, "similarity-ratio", _each, ("untrained",))
        return Curves("similarity ratio", "block", "share of similar vectors", lines, (0.0, 1.03))
    lines = _over(subjects, tints, "attention-similarity", _before)
    return Curves("attention, with the block before", "block", "mean cosine", lines, (0.0, 1.03))


def counts(subjects: Mapping[str, Findings], tints: Mapping[str, str]) -> Curves:
    """How many adjacent pairs of blocks count as similar, at each threshold and by κ (DeepViT's Figure 3b, at one depth)."""
    each = {label: found for label, findings in subjects.items() if (found := counts_of(findings))}
    rows = sorted(dict.fromkeys(row for found in each.values() for row in found), key=lambda row: row.startswith("κ"))
    lines = []
    for at, (label, found) in enumerate(each.items()):
        aside = (at - (len(each) - 1) / 2) * min(0.16, 0.7 / len(each))
        held = [(place, found[row]) for place, row in enumerate(rows) if row in found]
        x = np.array([place + aside for place, _ in held])
        values = np.array([count.value for _, count in held])
        ends = np.array([count.ci95 if count.ci95 is not None else (count.value, count.value) for _, count in held])
        marker, shown = MARKERS[at % len(MARKERS)], printable(label, 24)
        lines.append(Line(shown or "measured, 95 % CI", x, values, tints[label], ends, "", marker))
        fresh = [(place, c.untrained) for place, (_, c) in zip(x, held, strict=True) if c.untrained is not None]
        if fresh:
            name = f"{shown}: untrained copy" if label else "untrained copy"
            x, values = (np.array(each, dtype=np.float64) for each in zip(*fresh, strict=True))
            lines.append(Line(name, x, values, tints[label] if label else ROLES["untrained"].colour, None, "", "_"))
    short = [row.removeprefix("raw ") for row in rows]
    return Curves("similar blocks", "cosine (or κ) above", "adjacent pairs", lines, None, short)


def heads(subjects: Mapping[str, Findings], tints: Mapping[str, str]) -> Curves:
    """Heads of one block with one another (DeepViT's Figure 3c)."""
    lines = _over(subjects, tints, "head-similarity", _each, ("untrained",))
    return Curves("heads of one block", "block", "mean cosine", lines, (0.0, 1.03))


def with_the_last_depth(subjects: Mapping[str, Findings], tints: Mapping[str, str]) -> Curves:
    """Features at each depth with those after the last block (DeepViT's Figure 4)."""
    lines = _over(subjects, tints, "feature-similarity", _last)
    return Curves("features, with those after the last block", "depth", "mean cosine", lines, (0.0, 1.03))


def block_by_block(subjects: Mapping[str, Findings]) -> PaperFigure | None:
    """Attention of every block with every other (DeepViT's Figure 6): raw, then κ."""
    rows: list[list[Matrix]] = []
    for kind in ("raw similarity", "κ"):
        held = {}
        for label, findings in subjects.items():
            result = result_of(findings, "attention-similarity")
            values = None if result is None else result.array if kind != "κ" else null_of(result, "kappa")
            if result is not None and values is not None and len(values) > 1:
                held[label] = (values, result.ci95 if kind != "κ" else null_ci95(result, "kappa"), result.dims[0])
        scale = scale_of(*(values for values, _, _ in held.values())) if held else UNSIGNED
        panels = [
            Matrix(f"{printable(label, 18)}: {kind}" if label else kind, values, scale, along, ci95)
            for label, (values, ci95, along) in held.items()
        ]
        rows += [panels[at : at + IN_A_ROW] for at in range(0, len(panels), IN_A_ROW)]
    if not rows:
        return None
    if max(map(len, rows)) == 1:  # one subject: raw and κ side by side
        return PaperFigure([[panel for row in rows for panel in row]], tall=0.42)
    return PaperFigure(rows, tall={2: 0.42, 3: 0.32}.get(max(map(len, rows)), 0.27))


def counts_along(sweep: Sweep, axis: str) -> PaperFigure:
    """The number of similar blocks against what was varied, raw and by κ (DeepViT's Figure 3b), with intervals over seeds."""
    numeric = sweep.is_numeric(axis)
    places = {str(value): float(value) if numeric else float(at) for at, value in enumerate(sweep.varied[axis])}
    panels = []
    for key, title in (("similar_blocks", "similar blocks, raw"), ("similar_blocks_corrected", f"κ above {KAPPA_ABOVE:g}")):
        lines = []
        for at, (label, points) in enumerate(sweep.series(axis).items()):
            name, x = printable(label, 24) or "trained", np.array([places[str(value)] for value, _ in points])
            colour, marker = DISTINCT[at % len(DISTINCT)], MARKERS[at % len(MARKERS)]
            for number, fresh in ((key, False), (f"{UNTRAINED}{key}", True)):
                estimates = [estimate(cell.number(number) for cell in cells) for _, cells in points]
                values = np.array([each.mean for each in estimates])
                ends = np.array([each.ci95 or (np.nan, np.nan) for each in estimates])
                if fresh and np.isfinite(values).any():
                    lines.append(Line(f"{name}: untrained copy", x, values, colour, None, NULL_LINES["untrained"], ""))
                elif np.isfinite(values).any():
                    lines.append(Line(name, x, values, colour, ends, "-", marker))
        if lines:
            ticks = () if numeric else [printable(str(value), 14) for value in sweep.varied[axis]]
            panels.append(Curves(title, axis, "adjacent pairs", lines, None, ticks))
    return PaperFigure([panels], tall=0.36)


def replaced_maps(interventions: Interventions) -> PaperFigure:
    """What the outputs lose where the map of one block, or of a block and all above it, is replaced."""
    rows = []
    panels = [("one block", interventions.single), ("the block and all above it", interventions.cumulative)]
    for title, groups in ((title, groups) for title, groups in panels if any(groups.values())):
        accuracy = any(effect.accuracy_change is not None for effects in groups.values() for effect in effects)
        key = "accuracy_change" if accuracy else "kl"
        lines = []
        for at, (kind, effects) in enumerate(groups.items()):
            known = sorted((e for e in effects if getattr(e, key) is not None), key=lambda effect: min(effect.blocks))
            x = np.array([min(effect.blocks) for effect in known], dtype=np.float64)
            values = np.array([getattr(effect, key) for effect in known], dtype=np.float64)
            ends = np.array([getattr(effect, f"{key}_ci95") or (np.nan, np.nan) for effect in known], dtype=np.float64)
            colour, marker = DISTINCT[at % len(DISTINCT)], MARKERS[at % len(MARKERS)]
            lines.append(Line(kind.replace("_", " "), x, values, colour, ends.reshape(-1, 2), "-", marker))
        unit = "change of accuracy" if accuracy else "KL of the outputs [nats]"
        of_maps = not any("_" in kind for kind in groups)
        rows.append(Curves(f"map replaced in {title}" if of_maps else f"{title} changed", "block", unit, lines))
    if interventions.orders:
        rows.append(_orders(interventions))
    return PaperFigure([rows], tall=0.36)


def _orders(interventions: Interventions) -> Curves:
    """What it costs to leave out one block after the other, against how many are left, in every order."""
    total, lines = int(interventions.model.get("blocks") or 0), []
    orders = [
        (f"{kind.replace('_', ' ')}, {how}", order)
        for kind, each in interventions.orders.items()
        for how, order in each.items()
    ]
    key = "accuracy_change" if any(e.accuracy_change is not None for _, order in orders for e in order.priced) else "kl"
    for at, (label, order) in enumerate(orders):
        x = np.array([total - len(effect.blocks) for effect in order.priced], dtype=np.float64)
        values = np.array([getattr(effect, key) for effect in order.priced], dtype=np.float64)
        ends = np.array([getattr(effect, f"{key}_ci95") or (np.nan, np.nan) for effect in order.priced], dtype=np.float64)
        lines.append(Line(label, x, values, DISTINCT[at % len(DISTINCT)], ends.reshape(-1, 2), "-", MARKERS[at % len(MARKERS)]))
    unit = "change of accuracy" if key == "accuracy_change" else "KL of the outputs [nats]"
    return Curves("one block after the other left out", f"blocks left, of {total}", unit, lines)
