"""How results show themselves: a few lines of text, a card in a notebook, a figure, a page.

What draws stands in `report`, which reads results; so that results need not import it, it is named here and imported when
something is drawn.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse_probe.files import PAGE, Numbers, write_with_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGES = {  # by the class of a result: the package of its page, and what writes it
    "Findings": ("findings", "write_report"),
    "Comparison": ("comparison", "write_comparison"),
    "Interventions": ("intervention", "write_interventions"),
    "Sweep": ("sweep", "write_sweep"),
    "Survey": ("survey", "write_survey"),
}


def draw_page(result: Any, inside: Path) -> None:
    """Write the page and the figures of a result into an existing folder."""
    package, write = PAGES[type(result).__name__]
    _late(f"report.{package}.page", write)(result, inside)


def _late(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"collapse_probe.{module}"), name)


class Shown(Numbers):
    """Results that show themselves."""

    def __repr__(self) -> str:
        text: str = _late("results.overview.text", "lines_of")(self)
        return text

    def _repr_html_(self) -> str:
        card: str = _late("report.notebook.card", "card")(self)
        return card

    def plot(self, name: str | None = None) -> Figure:
        """One figure of these results, of matplotlib: without a name the main one.

        Findings and comparisons take the name of a metric, interventions kl, agreement or accuracy_change, a sweep the name of
        a number of its cells; a wrong one is answered with the nearest. The figure shows itself at the end of a notebook's
        cell, and `savefig` writes it.

        Example::

            findings.plot("attention-similarity").savefig("similarity.pdf")
        """
        figure: Figure = _late("report.notebook.plots", "plot")(self, name)
        return figure

    def report(self, folder: str | Path) -> Path:
        """Write the numbers and their page into `folder`, new or there; returns the page, which a browser opens from disk.

        Example::

            page = findings.report("out")
        """
        write_with_page(folder, self, draw_page)
        return Path(folder) / PAGE
