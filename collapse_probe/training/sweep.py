"""The verb `sweep`: the same training over a grid, one folder a cell, one table and one page."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from collapse_probe.analysis.analyze import measure
from collapse_probe.analysis.measurement import RunSettings
from collapse_probe.data.images import ImageSet, open_data
from collapse_probe.data.splits import split_data
from collapse_probe.devices import choose_device, device_name
from collapse_probe.distributed import rank_and_world
from collapse_probe.errors import SettingError
from collapse_probe.files import check_writable, write_whole
from collapse_probe.models.batchnorm import recalibrated
from collapse_probe.models.loading import resolve
from collapse_probe.provenance import versions
from collapse_probe.registry import RECIPES, load_plugin, loaded_plugins
from collapse_probe.results.findings import Findings
from collapse_probe.results.sweep import FAILED, FINISHED, CellResult, Sweep
from collapse_probe.training.recipe import Recipe
from collapse_probe.training.run import FREE, states_in, write_json
from collapse_probe.training.sweep_grid import Cell, cells
from collapse_probe.training.trainer import Progress, train

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


def run_cell(cell: Cell, folder: Path, terms: Terms, progress: Progress | None = None, say: Say | None = None) -> CellResult:
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


def finished(cell: Cell, folder: Path, terms: Terms) -> CellResult | None:
    """The outcome of a cell that was trained and measured on these terms before; None where there is work to do."""
    held = _read(folder / OUTCOME)
    if held is None or held.get("measured") != terms.measured() or not (folder / FINDINGS).is_dir():
        return None
    return replace(CellResult.from_json(held["outcome"]), name=cell.name, values=dict(cell.values), seed=cell.seed)


def failed(cell: Cell, folder: Path, reason: str, trace: str = "") -> CellResult:
    """The outcome of a cell that failed, with the reason left in its folder."""
    content = f"{reason}\n\n{trace}".rstrip() + "\n"
    write_whole(folder / ERROR, lambda stream: stream.write(content.encode()))
    return CellResult(name=cell.name, values=dict(cell.values), seed=cell.seed, status=FAILED, reason=reason)


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


def _measured(cell: Cell, folder: Path, terms: Terms, account: Mapping[str, Any], say: Say) -> CellResult:
    began, images = time.perf_counter(), images_of(cell, terms)
    address = f"ours:{folder / 'model.safetensors'}"
    settings = RunSettings(device=terms.device, null_images=terms.null_images, seed=cell.seed, command=terms.command)
    say(f"measuring on {len(images)} images")
    found = measure(resolve(address), images, settings)
    found.save(folder / FINDINGS)
    batch = settings.batch_size
    twin = resolve(address, pretrained=False, seed=cell.seed)
    twin = recalibrated(twin, images, cell.recipe.recalibrate, batch_size=batch, device=terms.device, seed=cell.seed)
    fresh = measure(twin, images, replace(settings, null_images=0, gallery_images=0))
    fresh.save(folder / TWIN)
    return CellResult(
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


SETTLED_OVER = 20  # batches


Task = tuple[Cell, Path, Terms]
Watch = Callable[[int], AbstractContextManager[Progress]]


def sweep(
    recipe: str | Recipe,
    vary: Mapping[str, Sequence[Any]],
    output: str | Path,
    *,
    seeds: int = 1,
    changes: Mapping[str, Any] | None = None,
    data: str | None = None,
    val_data: str | None = None,
    eval_data: str | None = None,
    limit: int | None = None,
    null_images: int = 64,
    device: str = "auto",
    jobs: int = 1,
    watch: Watch | None = None,
    report: Say | None = None,
    command: str = "",
) -> Sweep:
    """Train and measure a recipe for every combination of the `vary`-ed values and every seed, in the folder `output`.

    Each cell has a folder of its own (see `run_cell`). Called again, finished cells are kept, begun ones go on and failed
    ones are tried again; sweep.json and table.csv are written after every cell. A cell that fails does not stop the others.
    `changes` are made in all cells. Measured are the held-out images, or those at `eval_data`; `limit` takes a seeded draw.
    With `jobs` above 1 cells run in processes of their own, which share torch's threads. Raises SettingError,
    UnknownNameError where the grid cannot be, or where a folder holds another recipe's run; OutputError.
    """
    say, folder = report or (lambda text: None), Path(output)
    made, notes = grid_of(recipe, vary, seeds, changes)
    base = made[0].recipe
    terms = Terms(
        data=data or base.data,
        val_data=val_data,
        eval_data=eval_data,
        limit=limit,
        null_images=null_images,
        device=device,
        command=command,
    )
    _check(terms, made, jobs)
    check_writable(folder)
    for cell in made:
        check_same(cell, folder / cell.name, terms)
    named = RECIPES[recipe]() if isinstance(recipe, str) else recipe
    found = Sweep(
        recipe=named.to_json(),
        varied={name: list(values) for name, values in vary.items()},
        seeds=list(dict.fromkeys(cell.seed for cell in made)),
        changes={**(changes or {})},
        data={"data": terms.data, "val_data": terms.val_data, **terms.measured()},
        run=_facts(device, jobs, command),
        cells=tuple(CellResult(name=cell.name, values=dict(cell.values), seed=cell.seed) for cell in made),
        notes=tuple(notes),
    )
    for outcome in _outcomes(made, folder, terms, jobs, watch, say):
        found = replace(found, cells=tuple(outcome if old.name == outcome.name else old for old in found.cells))
        found.write(folder)
    return found


def grid_of(
    recipe: str | Recipe, vary: Mapping[str, Sequence[Any]], seeds: int, changes: Mapping[str, Any] | None
) -> tuple[list[Cell], list[str]]:
    """The cells of a sweep, and what was decided for all of them that nobody asked for."""
    named = RECIPES[recipe]() if isinstance(recipe, str) else recipe
    asked = dict(changes or {})
    if "fix" not in vary or named.recalibrate or "recalibrate" in {*asked, *vary}:
        return cells(named, vary, seeds, asked), []
    note = (
        f"BatchNorm, where a fix brings it, is re-estimated over {SETTLED_OVER} training batches before a cell is validated "
        "and saved, as in the recipes with Re-attention (recalibrate=0 leaves it as it is)."
    )
    return cells(named, vary, seeds, {**asked, "recalibrate": SETTLED_OVER}), [note]


def _check(terms: Terms, made: Sequence[Cell], jobs: int) -> None:
    """Raise now what would otherwise befall every cell."""
    if not terms.data:
        raise SettingError(f"the recipe {made[0].recipe.name} has no data of its own; name a data set with --data")
    if type(jobs) is not int or jobs < 1:
        raise SettingError(f"the number of jobs must be a whole number from 1 up, not {jobs!r}")
    if rank_and_world()[1] > 1:
        raise SettingError("a sweep gives each cell one process; start it without torchrun, with --jobs N for N cells at once")
    RunSettings(null_images=terms.null_images)
    images_of(made[0], terms)


def _facts(device: str, jobs: int, command: str) -> dict[str, Any]:
    return {
        "device": device_name(choose_device(device)),
        "threads": torch.get_num_threads(),
        "jobs": jobs,
        "command": command,
        "versions": versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _outcomes(
    made: Sequence[Cell], folder: Path, terms: Terms, jobs: int, watch: Watch | None, say: Say
) -> Iterator[CellResult]:
    """How the cells end, as they do."""
    work = []
    for cell in made:
        kept = finished(cell, folder / cell.name, terms)
        if kept is None:
            work.append(cell)
        else:
            yield kept
    if len(work) < len(made):
        say(f"{len(made) - len(work)} of {len(made)} cells were finished before and are kept")
    if jobs == 1 or len(work) < 2:
        for at, cell in enumerate(work, 1):
            say(f"cell {at} of {len(work)}: {cell.name}")
            length = cell.recipe.steps
            with nullcontext() if watch is None or length is None else watch(length * cell.recipe.batch_size) as progress:
                outcome = run_cell(cell, folder / cell.name, terms, progress, say)
            say(told(outcome))
            yield outcome
        return
    with _crew(min(jobs, len(work))) as start:
        for outcome in start([(cell, folder / cell.name, terms) for cell in work]):
            say(told(outcome))
            yield outcome


def told(outcome: CellResult) -> str:
    """How a cell ended, in one line."""
    if outcome.status == FAILED:
        return f"{outcome.name} failed: {outcome.reason}"
    counted = outcome.numbers.get("similar_blocks")
    blocks = "" if counted is None else f", {counted:g} of {outcome.numbers['pairs']:g} adjacent pairs similar"
    return f"{outcome.name}: accuracy {outcome.number('accuracy'):.2%}{blocks}, {outcome.train_seconds:.0f} s of training"


@contextmanager
def _crew(jobs: int) -> Iterator[Callable[[Sequence[Task]], Iterator[CellResult]]]:
    """Runs cells in `jobs` processes at once, a fresh one for each, so that one that is killed takes no other along."""
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // jobs)
    running: set[Any] = set()
    stopped = threading.Event()

    def one(task: Task) -> CellResult:
        cell = task[0]
        if stopped.is_set():
            return CellResult(name=cell.name, values=dict(cell.values), seed=cell.seed)
        process = context.Process(target=_alone, args=(*task, threads, loaded_plugins))
        running.add(process)
        process.start()
        process.join()
        running.discard(process)
        return ended(*task, process.exitcode)

    def start(tasks: Sequence[Task]) -> Iterator[CellResult]:
        yield from (future.result() for future in as_completed([pool.submit(one, task) for task in tasks]))

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield start
        except BaseException:
            stopped.set()
            for process in [p for p in running if p.pid is not None]:
                process.terminate()
            raise


def _alone(cell: Cell, folder: Path, terms: Terms, threads: int, plugins: Sequence[str]) -> None:
    for address in plugins:
        load_plugin(address)
    torch.set_num_threads(threads)
    run_cell(cell, folder, terms)


def ended(cell: Cell, folder: Path, terms: Terms, code: int | None) -> CellResult:
    """How a cell ended that ran in a process of its own, from what lies in its folder."""
    kept = finished(cell, folder, terms)
    if kept is not None:
        return kept
    reason = folder / ERROR
    if code == 0 and reason.is_file():
        line = reason.read_text(encoding="utf-8").partition("\n")[0]
        return CellResult(name=cell.name, values=dict(cell.values), seed=cell.seed, status=FAILED, reason=line)
    return failed(cell, folder, f"the process of this cell ended with exit code {code}; it may have run out of memory")
