"""Reference jobs: the program run on fixed inputs, and every number that it writes held against an earlier run.

    python benchmarks/reference_jobs.py record before/     # run all jobs, keep what they write
    python benchmarks/reference_jobs.py record after/      # the same after a change
    python benchmarks/reference_jobs.py compare before/ after/ [--words]

A change that should not move numbers shows none here, bit for bit on one machine. `--words` also prints how the text of
the pages differs. Models are bundled or have random weights with fixed seeds; images are bundled; no network.
"""

from __future__ import annotations

import csv
import difflib
import html
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

DIGITS, PHOTOS = "--data bundled:digits", "--data bundled:photos"
SMALL = "--no-pretrained --model-kwargs 'depth=4 embed_dim=48 num_heads=3'"
TINY_SWIN = "--no-pretrained --model-kwargs 'embed_dim=24 depths=(1,1,2,1) num_heads=(1,2,4,8)'"
PAPERS = "deepvit diverse-vit patch-diversification anti-oversmoothing rank-collapse entropy-collapse registers"
EVERYTHING = " ".join(["--level all", *(f"--preset {name}" for name in PAPERS.split())])
REPLACEMENTS = "--replace share --replace mean --replace uniform --replace identity --replace skip"
JOBS = {
    "plain": f"analyze -m ours:digits-mhsa {DIGITS} --limit 40 {EVERYTHING} --null-seeds 2 --null-images 16",
    "re-attention": f"analyze -m ours:digits-re-attention {DIGITS} --limit 40",
    "windowed": f"analyze -m timm:swin_tiny_patch4_window7_224 {TINY_SWIN} {PHOTOS} --limit 6 --level tokens",
    "distilled": f"analyze -m timm:deit_tiny_distilled_patch16_224 {SMALL} {PHOTOS} --limit 8 --null-images 4",
    "weights-only": f"analyze -m timm:vit_tiny_patch16_224 {SMALL} --level weights --null-seeds 2",
    "compare": f"compare ours:digits-mhsa ours:digits-re-attention ours:digits-tied-mhsa --cka {DIGITS} --limit 24 "
    "--null-images 8",
    "intervene": f"intervene -m ours:digits-tied-mhsa {DIGITS} --limit 32 --blocks 0-5 {REPLACEMENTS}",
    "sweep": "sweep digits-mhsa --vary fix=none,re-attention --set depth=4 --steps 12 --limit 24 --null-images 8",
    "demo": "demo",
}
CHANGING = {"seconds", "images_per_second", "peak_memory_bytes", "created", "versions", "command", "class", "path", "folder"}
TIMED = {"images_per_second", "flops_seconds", "train_seconds", "measure_seconds", "runs"}


@click.group()
def group() -> None:
    """Record the reference jobs, or compare two records."""


@group.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(list(JOBS)))
def record(folder: Path, only: tuple[str, ...]) -> None:
    """Run the jobs into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in only or JOBS:
        start = time.perf_counter()
        words = [sys.executable, "-m", "collapse_probe", *shlex.split(JOBS[name]), "-o", name]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        (folder / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
        if done.returncode:
            raise click.ClickException(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
        click.echo(f"{name}: {time.perf_counter() - start:.0f} s")


@group.command()
@click.argument("before", type=click.Path(exists=True, path_type=Path))
@click.argument("after", type=click.Path(exists=True, path_type=Path))
@click.option("--words", is_flag=True, help="Also print how the pages' text and the terminal's differ.")
@click.option("--most", default=20, help="Differences printed for each job.")
def compare(before: Path, after: Path, words: bool, most: int) -> None:
    """Print every number that differs; exit with 1 where one does."""
    wrong = 0
    for name in JOBS:
        if not (after / name).exists():
            click.echo(f"{name}: not recorded in {after}")
            continue
        old, new = numbers(before / name), numbers(after / name)
        differing = [key for key in old if key not in new or not same(old[key], new[key])]
        added = [key for key in new if key not in old]
        wrong += len(differing)
        click.echo(f"{name}: {len(old)} numbers, {len(differing)} differ or are gone, {len(added)} new")
        for key in differing[:most]:
            click.echo(f"    {key}: {old[key]!r} -> {new.get(key, 'gone')!r}")
        for key in added[:most]:
            click.echo(f"  + {key}: {new[key]!r}")
        if words:
            lines = difflib.unified_diff(text(before, name), text(after, name), lineterm="", n=0)
            click.echo("\n".join(line for line in lines if line[:2] not in ("@@", "--", "++")))
    raise SystemExit(1 if wrong else 0)


def same(one: Any, other: Any) -> bool:
    """Equal to the bit; two NaN are equal."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


def numbers(folder: Path) -> dict[str, Any]:
    """Every number in the JSON, CSV and npz files below a folder, by file and place."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json" and path.name != "metadata.json":
            found |= {f"{name}:{key}": value for key, value in leaves(json.loads(path.read_text(encoding="utf-8")))}
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                for i, row in enumerate(csv.DictReader(file)):
                    found |= {f"{name}:{i}.{key}": value for key, value in row.items() if key not in CHANGING | TIMED}
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                for key in arrays.files:
                    array = arrays[key]
                    for i, value in enumerate(array.ravel().tolist()):
                        found[f"{name}:{key}{list(array.shape)}[{i}]"] = value
    return found


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Places and numbers of a JSON document; what differs from run to run is left out, and so are texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in CHANGING | TIMED:
                # what a metric was asked and what else came out stood in one place at first
                name = "settings" if key == "details" else key
                yield from leaves(inner, f"{place}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{place}[{i}]")
    elif value is None or isinstance(value, (bool, int, float)):
        yield place, value


def text(root: Path, name: str) -> list[str]:
    """What the pages of a job and its terminal say, a line a piece, without markup, pictures, times and versions."""
    lines = (root / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    for path in sorted((root / name).rglob("*.html")):
        page = path.read_text(encoding="utf-8")
        page = re.sub(r"<(style|svg|script)\b.*?</\1>", "", page, flags=re.S)
        lines += [html.unescape(piece).strip() for piece in re.split(r"<[^>]+>", page)]
    return [" ".join(line.split()) for line in lines if line.strip()]


if __name__ == "__main__":
    group()
