"""`collapse-probe analyze`: one pass over the data, all metrics, findings and report."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options


@click.command("analyze", context_settings={"help_option_names": ["-h", "--help"]})
@options.model
@options.data_if_needed
@options.level
@options.preset
@options.running
@options.surer
@options.remedies
@options.failing
@options.output
@click.option("--json", "as_json", is_flag=True, help="Print findings.json on stdout; a folder is written only with -o.")
@options.plugin
@options.talking
def command(output: str | None, as_json: bool, quiet: bool, verbose: int, **flags: Any) -> None:
    """Measure the collapse of one model over a data set: one pass, all metrics, findings and report."""
    from collapse_probe.distributed import joined

    with joined():
        run(output=output, as_json=as_json, quiet=quiet, **flags)


def run(*, model: str, data: str | None, output: str | None, as_json: bool, quiet: bool, **flags: Any) -> Path | None:
    """Analyse, write the folder, print the answer; the folder's path where one was written."""
    from collapse_probe.cli.console import Talk, answer
    from collapse_probe.cli.fail_on import stop_if_tripped, thresholds

    from collapse_probe.analysis.analyze import measure
    from collapse_probe.analysis.measurement import RunSettings
    from collapse_probe.data.images import open_data
    from collapse_probe.distributed import rank_and_world
    from collapse_probe.files import check_writable, write_with_page
    from collapse_probe.metrics.presets import with_presets
    from collapse_probe.report.findings.page import write_report

    talk, rules = Talk(quiet), thresholds(flags.pop("fail_on", ()))
    asked = with_presets(flags["metrics"], flags.get("presets", ()))
    flags["metrics"] = chosen(flags.pop("levels", ()), asked, data)
    some = {key: flags.pop(key) for key in ("split", "limit")}
    images = None if data is None else open_data(data, seed=flags["seed"], **some)
    subject = opened(model, images, flags)
    folder = None if as_json and output is None else Path(output or Path("findings") / subject.name.replace("/", "-"))
    if folder is not None:
        check_writable(folder)
    talk.say(f"model {subject.source}:{subject.name}, weights {subject.weights}")
    talk.say("preprocessing " + ", ".join(f"{k} {v}" for k, v in subject.preprocess.description.items()))
    talk.say("no data: the weights alone" if images is None else f"data {images.address}, {len(images)} images")
    settings = RunSettings(**flags, command=command_line())
    with talk.bar(0 if images is None else len(images)) as progress:
        findings = measure(subject, images, settings, progress=progress, report=talk.say)
    if rank_and_world()[0] > 0:
        return None
    if folder is not None:
        write_with_page(folder, findings, write_report)
    if as_json:
        click.echo(json.dumps(findings.to_json(), allow_nan=False))
    else:
        click.echo(answer(findings))
        click.echo(f"\nreport: {folder / 'report.html'}" if folder is not None else "")
    stop_if_tripped(rules, {"": findings.summary})
    return folder


def chosen(levels: tuple[str, ...], metrics: tuple[str, ...], data: str | None) -> tuple[str, ...]:
    """The metrics that --level, --preset and --metric ask for (none: the default set); wrong usage where data are missing."""
    from collapse_probe.metrics.metric import of_level
    from collapse_probe.registry import METRICS

    asked = (*of_level(*levels), *metrics)
    hungry = [name for name in asked if METRICS[name.partition("@")[0]].level != "weights"]
    if data is None and (hungry or not asked):
        why = f"{hungry[0]} needs images" if hungry else "the default metrics need images"
        raise click.UsageError(f"Missing option '--data': {why}; only `--level weights` and metrics of the weights do without.")
    return tuple(dict.fromkeys(asked))


def opened(address: str, images: Any, flags: dict[str, Any]) -> Any:
    """The subject that the flags of model and remedies describe; takes these flags out of `flags`."""
    from collapse_probe.cli.options import blocks_in

    from collapse_probe.models.batchnorm import recalibrated
    from collapse_probe.models.loading import resolved

    named = {key: flags.pop(key) for key in ("checkpoint", "partial", "pretrained", "model_kwargs", "img_size")}
    fixes, where, count = flags.pop("fixes", ()), flags.pop("fix_blocks", None), flags.pop("recalibrate_bn", 0)
    subject = resolved(address, fixes, None if where is None else blocks_in(where), seed=flags["seed"], **named)
    if count and images is None:
        raise click.UsageError("--recalibrate-bn needs images: give --data.")
    facts = {key: flags[key] for key in ("batch_size", "device", "seed")}
    return recalibrated(subject, images, count, **facts)


def command_line() -> str:
    """The command as it was typed."""
    context = click.get_current_context(silent=True)
    words = None if context is None else context.find_root().obj
    return shlex.join(["collapse-probe", *(sys.argv[1:] if words is None else words)])
