"""One cell of a sweep: train it, or go on with it, then measure it beside its untrained twin."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collapse_probe.analysis import Settings, measure
from collapse_probe.data import ImageSet, open_data
from collapse_probe.errors import SettingError
from collapse_probe.findings import Findings
from collapse_probe.remedied import recalibrated
from collapse_probe.run_state import states_in, write_whole
from collapse_probe.sources import resolve
from collapse_probe.splitting import split_data
from collapse_probe.sweep_grid import Cell
from collapse_probe.sweep_results import FAILED, FINISHED, Outcome
from collapse_probe.training import Progress, train
from collapse_probe.training_run import FREE, write_json

OUTCOME, ERROR, FINDINGS, TWIN = "cell.json", "error.txt", "findings", "untrained"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all cells of a sweep have in common beside their recipe: the data, and how they are measured.

    Measured are the images at `eval_data`, or those held out from the training; of these a seeded draw of `limit`.
    """

    data: str
    val_data: str | None = None
    eval_data: str | None = None
    limit: int | None = None
    null_images: int = 64
    device: str = "auto"
    command: str = ""

    def measured(self) -> dict[str, Any]:
        """What decides the numbers of a measurement."""
        return {"eval_data": self.eval_data, "limit": self.limit, "null_images": self.null_images}


def run_cell(cell: Cell, folder: Path, terms: Terms, progress: Progress | None = None, say: Say | None = None) -> Outcome:
    """Bring one cell to its end in its folder and say how it ended; what is finished there already is kept.

    Writes what `train` writes, findings/ (of the trained model), untrained/ (of its twin) and cell.json; where it fails,
    error.txt. KeyboardInterrupt is passed on.
    """
    say = say or (lambda text: None)
    kept = finished(cell, folder, terms)
    if kept is not None:
        return kept
    try:
        account = _account(folder) or _trained(cell, folder, terms, progress, say)
        outcome = _measured(cell, folder, terms, account, say)
    except Exception as error:  # whatever befalls one cell must not end the others
        return failed(cell, folder, " ".join(f"{type(error).__name__}: {error}".split()), traceback.format_exc())
    write_json(folder / OUTCOME, {"measured": terms.measured(), "outcome": outcome.to_json()})
    (folder / ERROR).unlink(missing_ok=True)
    return outcome


def finished(cell: Cell, folder: Path, terms: Terms) -> Outcome | None:
    """The outcome of a cell that was trained and measured on these terms before; None where there is work to do."""
    held = _read(folder / OUTCOME)
    if held is None or held.get("measured") != terms.measured() or not (folder / FINDINGS).is_dir():
        return None
    return replace(Outcome.from_json(held["outcome"]), name=cell.name, values=dict(cell.values), seed=cell.seed)


def failed(cell: Cell, folder: Path, reason: str, trace: str = "") -> Outcome:
    """The outcome of a cell that failed, with the reason left in its folder."""
    content = f"{reason}\n\n{trace}".rstrip() + "\n"
    write_whole(folder / ERROR, lambda stream: stream.write(content.encode()))
    return Outcome(name=cell.name, values=dict(cell.values), seed=cell.seed, status=FAILED, reason=reason)


def check_same(cell: Cell, folder: Path, terms: Terms) -> None:
    """Raise SettingError where the folder holds a run with another recipe or other data."""
    held, account = _read(folder / "recipe.json"), _account(folder) or {}
    if held is None:
        return
    now = {key: value for key, value in cell.recipe.to_json().items() if key not in FREE}
    other = differences({key: held.get(key) for key in now}, now)
    for name in ("data", "val_data"):
        if name in account:
            other += differences({name: account[name]}, {name: getattr(terms, name)})
    if other:
        raise SettingError(
            f"the cell in {folder} was trained with another {'; '.join(other[:5])}; sweep with the same recipe and data, "
            "or choose another -o"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """What differs between two plain mappings, by dotted name.

    >>> differences({"lr": 1, "vit": {"depth": 2}}, {"lr": 1, "vit": {"depth": 3}})
    ['vit.depth (2 then, 3 now)']
    """
    found = []
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{within}{key}.")
        elif one != other:
            found.append(f"{within}{key} ({one!r} then, {other!r} now)")
    return found


def _account(folder: Path) -> dict[str, Any] | None:
    """training.json of a training that came to its end."""
    return _read(folder / "training.json") if (folder / "model.safetensors").is_file() else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _trained(cell: Cell, folder: Path, terms: Terms, progress: Progress | None, say: Say) -> dict[str, Any]:
    train(
        cell.recipe,
        terms.data,
        folder,
        val_data=terms.val_data,
        device=terms.device,
        resume=bool(states_in(folder / "state")),
        progress=progress,
        report=say,
        command=terms.command,
    )
    account = _account(folder)
    assert account is not None
    return account


def images_of(cell: Cell, terms: Terms) -> ImageSet:
    """The images on which a cell is measured."""
    if terms.eval_data is not None:
        return open_data(terms.eval_data, limit=terms.limit)
    held_out = split_data(terms.data, terms.val_data, share=cell.recipe.val_share).held_out
    return held_out if terms.limit is None else held_out.subset(terms.limit)


def _measured(cell: Cell, folder: Path, terms: Terms, account: Mapping[str, Any], say: Say) -> Outcome:
    began, images = time.perf_counter(), images_of(cell, terms)
    address = f"ours:{folder / 'model.safetensors'}"
    settings = Settings(device=terms.device, null_images=terms.null_images, seed=cell.seed, command=terms.command)
    say(f"measuring on {len(images)} images")
    found = measure(resolve(address), images, settings)
    found.save(folder / FINDINGS)
    batch = settings.batch_size
    twin = resolve(address, pretrained=False, seed=cell.seed)
    twin = recalibrated(twin, images, cell.recipe.recalibrate, batch_size=batch, device=terms.device, seed=cell.seed)
    fresh = measure(twin, images, replace(settings, null_images=0, gallery_images=0))
    fresh.save(folder / TWIN)
    return Outcome(
        name=cell.name,
        values=dict(cell.values),
        seed=cell.seed,
        status=FINISHED,
        accuracy=account["accuracy"],
        loss=account["loss"],
        parameters=account["parameters"],
        train_seconds=round(account["seconds"], 3),
        measure_seconds=round(time.perf_counter() - began, 3),
        names_sha256=account["names_sha256"],
        numbers=numbers(found),
        untrained=numbers(fresh),
    )


def numbers(findings: Findings) -> dict[str, float | None]:
    """The summary, and how many adjacent pairs of blocks the count is out of."""
    counted = findings.metrics.get("similar-blocks")
    pairs = None if counted is None or counted.values is None else counted.settings["pairs"]
    return {**findings.summary, "pairs": pairs}
