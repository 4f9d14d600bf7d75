"""`collapse-probe compare`: two or more subjects side by side on the same images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options

MODEL = (
    click.option("-m", "--model", metavar="ADDRESS", help="The architecture of the subjects that are checkpoints."),
    click.option("--partial", is_flag=True, help="Accept checkpoints that fit only in part."),
    click.option(
        "--pretrained/--no-pretrained",
        default=None,
        help="Published or fresh weights of the subjects that are addresses.",
    ),
    click.option(
        "--model-kwargs",
        multiple=True,
        callback=options.keywords,
        metavar="K=V",
        help="Arguments of every model's constructor.",
    ),
    click.option("--img-size", type=click.IntRange(min=1), metavar="N", help="Side of the input in pixels."),
    click.option("--data", metavar="ADDRESS", help="The images; findings folders need none."),
    click.option("--split", metavar="NAME", help="A subfolder, or a split of the data set."),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="A seeded subset.  [default: everything]",
    ),
    click.option("--cka", is_flag=True, help="Also the CKA between each model's depths and the first's."),
)


def _with_model(function: Any) -> Any:
    for option in reversed(MODEL):
        function = option(function)
    return function


@click.command("compare", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("subjects", nargs=-1, required=True, metavar="SUBJECT...")
@_with_model
@options.running
@options.remedies
@options.failing
@options.output
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print comparison.json on stdout; a folder is written only with -o.",
)
@options.plugin
@options.talking
def command(output: str | None, as_json: bool, quiet: bool, verbose: int, **flags: Any) -> None:
    """Set two or more subjects side by side on the same images; each is compared with the first.

    A SUBJECT is a model address, a checkpoint file (with --model for its architecture), a findings folder,
    or a folder of checkpoints: alone, its checkpoints in natural order are shown over the training. A
    --fix goes into every model after the first; one model alone is compared with itself with the fix.
    """
    from collapse_probe.distributed import joined

    with joined():
        run(output=output, as_json=as_json, quiet=quiet, **flags)


def run(
    *,
    subjects: Sequence[str],
    output: str | None,
    as_json: bool,
    quiet: bool,
    fail_on: Sequence[str],
    fix_blocks: str | None,
    **flags: Any,
) -> None:
    """Compare, write the folder, print the answer."""
    from collapse_probe.cli.analyze import command_line
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.fail_on import stop_if_tripped, thresholds
    from collapse_probe.cli.options import blocks_in

    from collapse_probe.analysis.compare import compare
    from collapse_probe.distributed import rank_and_world
    from collapse_probe.files import check_writable, write_with_page
    from collapse_probe.report.comparison.page import write_comparison

    talk, rules = Talk(quiet), thresholds(fail_on)
    folder = None if as_json and output is None else Path(output or "comparison")
    if folder is not None:
        check_writable(folder)
    flags["metrics"] = tuple(flags["metrics"])
    comparison = compare(
        list(subjects),
        flags.pop("data"),
        fix_blocks=None if fix_blocks is None else blocks_in(fix_blocks),
        watch=lambda label, total: talk.bar(total),
        report=talk.say,
        command=command_line(),
        **flags,
    )
    if rank_and_world()[0] > 0:
        return
    if folder is not None:
        write_with_page(folder, comparison, write_comparison)
    if as_json:
        click.echo(json.dumps(comparison.to_json(), allow_nan=False))
    else:
        click.echo(told(comparison))
        click.echo(f"\nreport: {folder / 'report.html'}" if folder is not None else "")
    stop_if_tripped(rules, {label: comparison.numbers(label) for label in comparison.subjects})


def told(comparison: Any) -> str:
    """The answers, and the summaries side by side."""
    from collapse_probe.report.comparison.verdict import answers

    lines: list[str] = []
    for answer in answers(comparison):
        lines += [*answer.sentences, *(f"Note: {caveat}" for caveat in answer.caveats), ""]
    held = [findings.summary for findings in comparison.subjects.values()]
    names = list(dict.fromkeys(name for summary in held for name in summary))
    wide = max(map(len, names))
    widths = [max(len(label), 12) for label in comparison.subjects]
    lines.append(
        "  ".join(
            [
                " " * (wide + 2),
                *(f"{label:>{w}}" for label, w in zip(comparison.subjects, widths, strict=True)),
            ]
        )
    )
    for name in names:
        cells = (_shown(summary.get(name)) for summary in held)
        lines.append("  ".join([f"  {name:<{wide}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))]))
    return "\n".join(lines)


def _shown(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.6g}"
