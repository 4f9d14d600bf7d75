"""`collapse-probe demo`: the main job on what ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options

MODEL = "timm:vit_tiny_patch16_224"
DATA = "bundled:photos"


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", default="demo", show_default=True, metavar="DIR", help="The output folder.")
@options.talking
def command(output: str, quiet: bool, verbose: int) -> None:
    """Analyse a small untrained ViT on bundled photographs; needs no network."""
    from collapse_probe.cli.analyze import run

    flags: dict[str, Any] = {
        "checkpoint": None,
        "partial": False,
        "pretrained": False,
        "model_kwargs": {},
        "img_size": None,
        "split": None,
        "limit": None,
        "batch_size": 32,
        "workers": 0,
        "device": "auto",
        "amp": False,
        "amp_dtype": "float16",
        "seed": 0,
        "metrics": (),
        "null_images": 32,
    }
    folder = run(model=MODEL, data=DATA, output=output, as_json=False, quiet=quiet, **flags)
    if folder is not None:
        click.echo(f"open this page in a browser: {(Path(folder) / 'report.html').absolute().as_uri()}")
