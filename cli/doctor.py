"""`collapse-probe doctor`: can this model be probed? Block by block."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import click
from collapse_probe.cli import options


@click.command("doctor", context_settings={"help_option_names": ["-h", "--help"]})
@options.model
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@options.plugin
@options.talking
def command(model: str, device: str, seed: int, as_json: bool, quiet: bool, verbose: int, **named: Any) -> None:
    """Run two noise images through a model and say how each block's attention is captured, and how exactly."""
    options.load_libraries()
    from collapse_probe.analysis.measurement import plan_of
    from collapse_probe.models.loading import resolve

    named.setdefault("pretrained", None)
    subject = resolve(model, seed=seed, **named)
    facts = diagnosis(subject, plan_of(subject, device, seed))
    if as_json:
        click.echo(json.dumps(facts, allow_nan=False))
    else:
        show(facts)


def diagnosis(subject: Any, plan: Any) -> dict[str, Any]:
    """What the probe found, as plain values."""
    return {
        "model": f"{subject.source}:{subject.name}",
        "weights": subject.weights,
        "class": type(subject.model).__name__,
        "input": [subject.preprocess.channels, *subject.preprocess.size],
        "blocks": len(plan.blocks),
        "tokens": plan.tokens,
        "prefix_tokens": list(plan.prefix),
        "grid": plan.grid,
        "width": plan.width,
        "bytes_per_image": plan.bytes_per_image,
        "self_check": {key: None if math.isnan(value) else value for key, value in vars(plan.check).items()},
        "layers": [
            {
                **{name: value for name, value in vars(layer).items() if name not in ("call", "parts")},
                "operation": layer.operation.removeprefix("aten::"),
                "compared": not layer.reason and layer.block is not None,
                "reason": layer.reason or ("outside the blocks" if layer.block is None else ""),
            }
            for layer in plan.layers
        ],
        "notes": [*subject.notes, *plan.notes],
    }


def show(facts: dict[str, Any]) -> None:
    """The diagnosis as a table."""
    from collapse_probe.cli.console import table
    from rich.table import Table

    console = table()
    say = partial(console.print, markup=False)
    grid = "no grid" if facts["grid"] is None else f"{facts['grid'][0]} × {facts['grid'][1]} patches"
    prefix = f"{len(facts['prefix_tokens'])} prefix tokens {facts['prefix_tokens']}"
    say(f"{facts['model']} ({facts['class']}), weights {facts['weights']}")
    say("images of {} channels, {} × {} pixels".format(*facts["input"]))
    say(f"{facts['blocks']} blocks, {facts['tokens']} tokens ({grid}, {prefix}), width {facts['width']}")
    layers = Table("block", "attention", "captured as", "heads", "map", "weights", "compared", box=None, pad_edge=False)
    for layer in facts["layers"]:
        layers.add_row(
            "–" if layer["block"] is None else str(layer["block"]),
            layer["owner"],
            layer["operation"],
            str(layer["heads"]),
            f"{layer['queries']} × {layer['keys']}",
            "another map" if layer["mixed"] else "the softmax",
            "yes" if layer["compared"] else f"no: {layer['reason']}",
        )
    console.print(layers)
    check = {key: "not given by the kernels" if value is None else f"{value:.1e}" for key, value in facts["self_check"].items()}
    say(f"outputs are equal bit for bit with and without the recording; rows sum to one within {check['row_sum']}")
    say(f"A·V against the kernels' output: {check['output']}; logsumexp: {check['logsumexp']}")
    say(f"{facts['bytes_per_image'] / 2**20:.1f} MiB are held per image while a batch is analysed")
    for note in facts["notes"]:
        say(f"note: {note}")
    able = sum(layer["compared"] for layer in facts["layers"])
    if able:
        say(f"this model can be probed: {able} of {len(facts['layers'])} attention layers can be compared")
    else:
        say("no attention layer of this model can be compared token by token; token metrics still apply")
