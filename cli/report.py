"""`collapse-probe report`: figures and page again, from a folder alone."""

from __future__ import annotations

from pathlib import Path

import click
from collapse_probe.cli import options


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", metavar="DIR")
@click.option("--figures", type=click.Choice(("pdf", "svg", "png")), help="Write figures for papers too, as this kind of file.")
@click.option(
    "--style",
    "size",
    type=click.Choice(("paper", "screen")),
    help="Their size: for the columns of a paper (default), or for slides. Alone: as PDF.",
)
@options.talking
def command(folder: str, figures: str | None, size: str | None, quiet: bool, verbose: int) -> None:
    """Rebuild figures and page from what DIR holds (findings, a comparison, interventions, a sweep, a gallery); needs no model.

    With --figures or --style also what DeepViT's Figures 3, 4 and 6 show, into figures/paper (or figures/screen), with the
    numbers of each as CSV.
    """
    from collapse_probe.cli.output import open_results, say_tidied

    from collapse_probe.errors import CollapseProbeError, OutputError
    from collapse_probe.files import INDEX, PAGE, changed_since, page_folder
    from collapse_probe.results.overview.display import draw_page

    say_tidied(folder, quiet)
    place = Path(folder)
    numbers, written = open_results(place), list[Path]()
    with page_folder(place) as inside:
        try:
            draw_page(numbers, inside)
            if figures or size:
                from collapse_probe.report.paper import write_figures

                written = write_figures(numbers, inside / "figures" / (size or "paper"), figures or "pdf", size or "paper")
        except (CollapseProbeError, OSError):
            raise
        except Exception as error:
            why = f"the page of {folder} cannot be drawn from its numbers ({type(error).__name__}: {error})"
            raise OutputError(f"{why}; {changed_since(place)}") from error
    click.echo(f"report: {place / (INDEX if (place / INDEX).exists() else PAGE)}")
    if written:
        names = ", ".join(path.stem for path in written[::2])
        click.echo(f"figures: {names} in {place / 'figures' / written[0].parent.name}, each with its numbers (CSV)")
