"""Random command lines of real flags and wrong values: exit code 0 to 3, errors of one line, no traceback, no hang."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import click
from collapse_probe.cli.main import COMMANDS, group, main
from fuzz_trials import Kind
from PIL import Image

BARE = "(-v shows where)"  # behind an exception that nobody turned into a message


@dataclass(frozen=True)
class Said:
    """What one command line came to."""

    code: Any
    out: str
    err: str

    def check(self, names: tuple[object, ...] = ()) -> None:
        """Raise AssertionError for a wrong exit code, a traceback, or an error that is not one line or names no name."""
        assert self.code in (0, 1, 2, 3), f"exit code {self.code!r}: {self.err[-300:]}"
        assert "Traceback" not in self.err, self.err[-1000:]
        assert BARE not in self.err, self.err[-300:]
        errors = [line for line in self.err.splitlines() if line.lower().startswith("error: ")]
        assert len(errors) == (self.code in (1, 2)), f"exit code {self.code}, {self.err[-300:]!r}"
        if errors and names:
            assert any(str(name) in errors[0] for name in names), f"names none of {names}: {errors[0]}"


@contextlib.contextmanager
def without_figures() -> Iterator[None]:
    """Pages are written without their figures, which take seconds."""
    with contextlib.ExitStack() as stack:
        for kind in ("findings", "comparison", "intervention", "sweep"):
            stack.enter_context(mock.patch(f"collapse_probe.report.{kind}.page.draw_all", return_value={}))
        yield


def said_of(*words: object) -> Said:
    """Run one command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.dict(os.environ):
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            return Said(stop.code, out.getvalue(), err.getvalue())
    raise AssertionError("it did not exit")


NOTHING = (
    "",
    "x",
    "-1",
    "0",
    "1.5",
    "nan",
    "é\u200b",
    "a b",
    "x" * 5000,
    "../..",
    "/proc/no/x",
    "\udcff",
    "%s{}",
    "--",
    "\n",
)
NUMBERS = ("-1", "0", "1", "2", "3", "1.5", "x", "", "1e3", "٣", "9" * 30)
TINY = ("--img-size", "32", "--model-kwargs", "depth=2 num_classes=3 embed_dim=24 num_heads=2", "--device", "cpu")
MODEL = ("-m", "timm:vit_tiny_patch16_224", "--no-pretrained", *TINY)
TRAINED = ("digits-quick", "--set", "width=16 heads=2 depth=2 batch_size=8", "--steps", "2", "--device", "cpu")
BASES: dict[str, tuple[str, ...]] = {
    "analyze": (*MODEL, "--data", "photos", "--null-images", "0", "--json=full"),
    "compare": ("timm:vit_tiny_patch16_224", "--no-pretrained", *TINY, "--data", "photos", "--null-images", "0", "--json=full"),
    "intervene": (*MODEL, "--data", "photos", "--drop", "block", "--json=full"),
    "train": (*TRAINED, "--dry-run"),
    "sweep": (*TRAINED, "--vary", "depth=2,3", "--dry-run"),
    "merge": ("results", "--json=full"),
    "gallery": ("models.txt", "--data", "photos", "--null-images", "0", "-o", "site"),
    "cite": ("results",),
    "report": ("results",),
    "doctor": MODEL,
    "ls": ("metrics",),
    "demo": ("--nothing",),
}
VALUES: dict[str, tuple[str, ...]] = {
    "model": (
        "timm:",
        "timm:nothing",
        "import:os:getcwd",
        "import:no.such:x",
        "hf-hub:a/b",
        "hf:a/b",
        "local-dir:/nowhere",
        "vit_b_99",
    ),
    "data": (
        "photos",
        "photos/0.png",
        "photos/*.png",
        "empty",
        "bundled:nothing",
        "hfds/a/b",
        "torch/nothing",
        "wds/nowhere",
        "text.txt",
    ),
    "config": ("config.yaml", "list.yaml", "bomb.yaml", "photos", "photos/0.png"),
    "plugin": ("broken.py", "raises.py", "no.such.module", "photos"),
    "checkpoint": ("photos", "photos/0.png", "text.txt", "results"),
    "junit": ("cases.xml", "photos", "nowhere/cases.xml"),
    "fail_on": ("images > 0", "images >", "nothing > 1", "kappa_adjacent < nan", "similar_blocks > 1e400"),
    "metrics": ("attention-entropy", "attention-similarity@row", "attention-similarity@nothing", "weight-norm"),
    "model_kwargs": (
        "depth=0",
        "depth=-1",
        "nothing=1",
        "depth",
        "num_heads=7",
        "depth=[",
        "embed_dim=None",
        "=",
        "depth=2 depth=3",
    ),
    "img_size": ("32x48", "0", "1", "32x", "17", "9" * 20),
    "fixes": ("re-attention", "nothing", "re-attention:nothing=1", "re-attention:", ":"),
    "blocks": ("0", "1", "0-1", "5-9", "1-0", "0,0", "-", ",", "0-" + "9" * 6),
    "output": ("out", "photos/0.png", "photos", "results", "."),
    "folder": ("results", "photos", "empty", "nowhere"),
    "kind": ("models", "metrics", "fixes", "nothing"),
    "pattern": ("vit_tiny*", "[", "*", "nothing"),
    "replace": ("mean", "skip", "donor", "nothing"),
    "drop": ("attention", "mlp", "nothing"),
    "prefix": ("zero", "donor", "nothing"),
    "sinks": ("redirect", "mean-value", "nothing"),
    "window": ("2", "0", "x", "9" * 20),
    "keep": ("0", "2", "9" * 20, "-1"),
    "export": ("pruned.safetensors", "pruned.pth", "pruned.onnx", "photos", "nowhere/pruned.pth", "text.txt"),
    "device": ("cpu", "auto", "cuda:99", "mps", "tpu"),
    "subjects": ("results", "photos", "ours:nothing", "text.txt"),
    "vary": ("depth=2", "nothing=1", "depth=", "depth=2,2", "seed=1", "width=17", "fix=nothing"),
    "changes": ("depth=0", "nothing=1", "width=17", "lr=x", "batch_size=-1", "heads=0"),
    "penalties": ("nothing=1", "attention-cosine=x", "="),
}
LIKE = {"val_data": "data", "fix_blocks": "blocks"}
LEFT_ALONE = {"verbose", "workers", "monitor_every", "dry_run", "steps", "limit_steps"}


def prepare(place: Path) -> Path:
    """A folder of what the command lines name."""
    for name in ("photos", "empty"):
        (place / name).mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (60 * i, 90, 30)).save(place / "photos" / f"{i}.png")
    bomb = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12))
    texts = {
        "config.yaml": "batch-size: x\nnothing: 1\n",
        "list.yaml": "[1, 2",
        "bomb.yaml": f"a: &a [x, x]\n{bomb}model: *m\n",
        "broken.py": "def",
        "raises.py": "raise RuntimeError('no')",
        "text.txt": "nothing\n",
        "models.txt": f"tiny = {shlex.join([*MODEL[1:-2]])}\n",
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    with without_figures():
        said = said_of(*analysis_of(place), "-o", place / "results")
    assert said.code == 0, said.err
    return place


def analysis_of(place: Path) -> list[str]:
    """The words of a small analysis, without its output folder."""
    words = [str(place / word) if word == "photos" else word for word in BASES["analyze"] if word != "--json=full"]
    return ["analyze", *words, "-q"]


def _value(random: Random, parameter: click.Parameter) -> str:
    name = LIKE.get(str(parameter.name), str(parameter.name))
    choices = tuple(getattr(parameter.type, "choices", ()))
    numeric = isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType))
    fitting = choices or VALUES.get(name) or (NUMBERS if numeric else NOTHING)
    return random.choice(fitting if random.random() < 0.7 else NOTHING)


def line_of(random: Random) -> list[str]:
    """A command line, most of it as it should be."""
    name = random.choice(list(COMMANDS))
    words = [name, *BASES[name]]
    command = group.get_command(click.Context(group), name)
    assert command is not None
    parameters = [each for each in command.params if each.name not in LEFT_ALONE]
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        parameter = random.choice(parameters)
        value = _value(random, parameter)
        if isinstance(parameter, click.Option):
            flag = random.choice([*parameter.opts, *parameter.secondary_opts])
            words += [flag] if parameter.is_flag or parameter.count else random.choice(([flag, value], [f"{flag}={value}"]))
        else:
            words.insert(1, value)
    way = random.random()
    if way < 0.1 and name not in ("train", "sweep", "demo"):
        del words[random.randrange(len(words))]
    elif way < 0.2:
        words.insert(random.randrange(len(words) + 1), random.choice(NOTHING))
    elif way < 0.25:
        words.insert(1, random.choice(("-h", "--nothing", "--version", "-")))
    return words


def trial(random: Random, folder: Path, place: Path) -> str:
    """One command line, where nothing else lies; the network answers nothing."""
    words = line_of(random)
    for name in place.iterdir():
        if name.is_dir() or name.suffix:
            (folder / name.name).symlink_to(name)
    with contextlib.chdir(folder), without_figures(), mock.patch("socket.socket.connect", side_effect=OSError("no network")):
        said = said_of(*words)
    try:
        said.check()
    except AssertionError as error:
        raise AssertionError(f"{shlex.join(word[:60] for word in words)}: {error}") from error
    return f"exit code {said.code}"


KIND = Kind(600, prepare, trial, seconds=60)
