"""What a command does with its result: it writes the folder, and prints the answer or the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

ANSWER = "collapse-probe/answer/1"


def output_folder(output: str | None, as_json: str | None, default: Path) -> Path | None:
    """The folder to write, which must take a run's files; None where JSON on stdout is all that was asked for."""
    if as_json and output is None:
        return None
    folder = Path(output or default)
    prepare(folder)
    return folder


def prepare(folder: str | Path, quiet: bool = False) -> None:
    """Raise OutputError unless a folder can take a run's files; clear what dead runs left there, and say so on stderr."""
    from collapse_probe.files import check_output
    from collapse_probe.processes.launchers import announced

    launch = announced()
    if launch is None or launch.rank == 0:  # no other process writes
        say_tidied(folder, quiet)
        check_output(folder)


def say_tidied(folder: str | Path, quiet: bool = False) -> None:
    """Put in order what stopped runs left of their work on a folder, and say so on stderr."""
    from collapse_probe.files import tidy

    for line in tidy(folder):
        if not quiet:
            click.echo(line, err=True)


def open_results(folder: str | Path) -> Any:
    """The numbers in `folder`: a comparison, interventions, a sweep, a gallery, or findings."""
    folder = Path(folder)
    if (folder / "comparison.json").exists():
        from collapse_probe.results.comparison import Comparison

        return Comparison.load(folder)
    if (folder / "interventions.json").exists():
        from collapse_probe.results.intervention import Interventions

        return Interventions.load(folder)
    if (folder / "sweep.json").exists():
        from collapse_probe.results.sweep import Sweep

        return Sweep.load(folder)
    if (folder / "gallery.json").exists():
        from collapse_probe.results.survey import Survey

        return Survey.load(folder)
    from collapse_probe.results.findings import Findings

    return Findings.load(folder)


def keep(result: Any, folder: Path | None, no_page: bool) -> None:
    """Write the folder, with its page unless `no_page`."""
    from collapse_probe.files import write_with_page
    from collapse_probe.results.overview.display import draw_page

    if folder is None:
        return
    if no_page:
        result.save(folder)
    else:
        write_with_page(folder, result, draw_page)


def tell(result: Any, folder: Path | None, text: str, content: Mapping[str, Any], as_json: str | None, no_page: bool) -> None:
    """Print `text` and where the folder is, or as JSON the whole result or `content`."""
    from collapse_probe.files import PAGE

    if as_json == "full":
        click.echo(json.dumps(result.to_json(), allow_nan=False))
    elif as_json:
        from collapse_probe.results.findings import plain

        page = None if folder is None or no_page else str(folder / PAGE)
        facts = {"schema": ANSWER, **content, "output": None if folder is None else str(folder), "page": page}
        click.echo(json.dumps(plain(facts), allow_nan=False))
    else:
        later = f"the numbers are in {folder}; `collapse-probe report {folder}` draws their page"
        click.echo(text)
        click.echo("" if folder is None else f"\n{later}" if no_page else f"\nreport: {folder / PAGE}")


def answers_of(answers: Iterable[Any]) -> list[dict[str, Any]]:
    """Verdicts as the JSON of `--json` holds them."""
    names = ("label", "case", "sentences", "caveats")
    return [{name: getattr(answer, name) for name in names} for answer in answers]


def of_findings(findings: Any) -> dict[str, Any]:
    """What `--json` prints of findings: the verdict, and the summary with intervals, chance levels and the untrained copy."""
    from collapse_probe.results.findings import SCHEMA
    from collapse_probe.results.readings import untrained_summary
    from collapse_probe.results.verdict import verdict_of

    data = findings.data
    return {
        "of": SCHEMA,
        **subject_facts(findings),
        "answers": answers_of([verdict_of(findings)]),
        "summary": findings.summary,
        "untrained": untrained_summary(findings),
        "skipped": len(data.get("skipped") or ()),
        "notes": findings.run.get("notes", []),
    }


def subject_facts(result: Any) -> dict[str, Any]:
    """Which model was measured on which images."""
    model, data = result.model, result.data
    facts = {"model": {name: model.get(name) for name in ("address", "name", "weights", "checkpoint", "blocks")}}
    return {**facts, "data": {name: data[name] for name in ("address", "images", "partial") if name in data}}


def of_comparison(comparison: Any, answers: Iterable[Any]) -> dict[str, Any]:
    """What `--json` prints of a comparison: verdicts, each subject's summary, and the mean paired differences."""
    from collapse_probe.results.comparison import SCHEMA
    from collapse_probe.results.readings import untrained_summary

    pairs = [
        {
            **{name: getattr(pair, name) for name in ("first", "second", "images")},
            "same_top_answer": pair.agreement.top1,
            "kl": pair.agreement.kl,
            "differences": {
                name: {
                    "difference": each.overall.difference[0],
                    "ci95": None if each.unsampled else each.overall.ci95[0],
                    "p": None if each.unsampled else each.overall.p[0],
                }
                for name, each in pair.differences.items()
            },
        }
        for pair in comparison.pairs
    ]
    return {
        "of": SCHEMA,
        "subjects": {label: subject_facts(findings) for label, findings in comparison.subjects.items()},
        "answers": answers_of(answers),
        "summary": {label: findings.summary for label, findings in comparison.subjects.items()},
        "untrained": {label: untrained_summary(findings) for label, findings in comparison.subjects.items()},
        "pairs": pairs,
        "notes": {label: findings.run.get("notes", []) for label, findings in comparison.subjects.items()},
    }


def of_interventions(interventions: Any, answers: Iterable[Any]) -> dict[str, Any]:
    """What `--json` prints of interventions: verdicts, and the largest effect of one block and that of all, by kind."""
    from collapse_probe.results.intervention import SCHEMA

    return {
        "of": SCHEMA,
        **subject_facts(interventions),
        "answers": answers_of(answers),
        "summary": interventions.summary,
        "notes": interventions.run.get("notes", []),
    }


def of_sweep(sweep: Any) -> dict[str, Any]:
    """What `--json` prints of a sweep: the answers along each curve, and the headline numbers of every cell and its twin."""
    from collapse_probe.report.sweep.verdict import caveats, headline, verdicts
    from collapse_probe.results.sweep import SCHEMA

    names = (
        *("similar_blocks", "similar_blocks_pairs", "similar_blocks_corrected", "attention_similarity_adjacent"),
        *("other_token_adjacent", "kappa_adjacent", "patch_diversity_last"),
    )
    cells = {
        cell.name: {
            **{name: getattr(cell, name) for name in ("values", "seed", "status", "reason", "accuracy")},
            **{name: cell.numbers.get(name) for name in names},
            "untrained": {name: cell.untrained.get(name) for name in names},
        }
        for cell in sweep.cells
    }
    return {
        "of": SCHEMA,
        "recipe": sweep.recipe.get("name"),
        "varied": sweep.varied,
        "seeds": sweep.seeds,
        "headline": headline(sweep),
        "answers": answers_of(verdicts(sweep)),
        "caveats": caveats(sweep),
        "summary": cells,
        "notes": sweep.notes,
    }
