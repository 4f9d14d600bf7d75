"""The verb `sweep`: the same training over a grid, one folder a cell, one table and one page."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from collapse_probe.analysis.analyze import measure
from collapse_probe.analysis.measurement import RunSettings
from collapse_probe.data.images import ImageSet, open_set
from collapse_probe.data.splits import split_data
from collapse_probe.devices import choose_device, device_name
from collapse_probe.distributed import gathered, rank_and_world, shared_out
from collapse_probe.errors import OutputError, SettingError
from collapse_probe.files import check_output, write_document, write_whole
from collapse_probe.models.batchnorm import recalibrated
from collapse_probe.models.loading import resolve
from collapse_probe.processes.launchers import forget
from collapse_probe.provenance import stamp
from collapse_probe.registry import RECIPES, load_plugin, loaded_plugins
from collapse_probe.results.findings import Findings
from collapse_probe.results.sweep import FAILED, FINISHED, CellResult, Sweep
from collapse_probe.training.recipe import Recipe, differences
from collapse_probe.training.run import Say, states_in
from collapse_probe.training.sweep_grid import Cell, cells
from collapse_probe.training.trainer import Progress, train

RESULT, ERROR, FINDINGS, TWIN = "cell.json", "error.txt", "findings", "untrained"
RECALIBRATION_BATCHES = 20
Watch = Callable[[int], AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class Conditions:
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
    With `jobs` above 1 cells run in processes of their own, which share torch's threads and, with the device "auto", the GPUs.
    Under torchrun every process takes the next cell that none has taken, `jobs` at once, and trains it alone; the first one
    writes, and all return the same. Raises SettingError, UnknownNameError where the grid cannot be, or where a folder holds
    another recipe's run; OutputError.
    """
    base, folder, say = RECIPES[recipe]() if isinstance(recipe, str) else recipe, Path(output), report or (lambda text: None)
    grid, notes = grid_of(base, vary, seeds, changes)
    conditions = Conditions(
        data=data or grid[0].recipe.data,
        val_data=val_data,
        eval_data=eval_data,
        limit=limit,
        null_images=null_images,
        device=device,
        command=command,
    )
    _check(conditions, grid, jobs)
    check_output(folder)
    for cell in grid:
        check_same(cell, folder / cell.name, conditions)
    result = Sweep(
        recipe=base.to_json(),
        varied={name: list(values) for name, values in vary.items()},
        seeds=list(dict.fromkeys(cell.seed for cell in grid)),
        changes=dict(changes or {}),
        data={"data": conditions.data, "val_data": val_data, **conditions.measured()},
        run={
            "device": device_name(choose_device(device)),
            "threads": torch.get_num_threads(),
            "jobs": jobs,
            "command": command,
            **stamp(),
        },
        cells=tuple(_result(cell) for cell in grid),
        notes=tuple(notes),
    )
    for done in _results(grid, folder, conditions, jobs, watch, say):
        result = replace(result, cells=tuple(done if cell.name == done.name else cell for cell in result.cells))
        if rank_and_world()[0] == 0:
            result.save(folder)
    return result


def grid_of(
    recipe: Recipe, vary: Mapping[str, Sequence[Any]], seeds: int, changes: Mapping[str, Any] | None
) -> tuple[list[Cell], list[str]]:
    """The cells of a sweep, and notes on what was decided for all of them without being asked."""
    changes = dict(changes or {})
    if "fix" not in vary or recipe.recalibrate or "recalibrate" in {*changes, *vary}:
        return cells(recipe, vary, seeds, changes), []
    note = (
        f"BatchNorm, where a fix brings it, is re-estimated over {RECALIBRATION_BATCHES} training batches before a cell is "
        "validated and saved, as in the recipes with Re-attention (recalibrate=0 leaves it as it is)."
    )
    return cells(recipe, vary, seeds, {**changes, "recalibrate": RECALIBRATION_BATCHES}), [note]


def _check(conditions: Conditions, grid: Sequence[Cell], jobs: int) -> None:
    """Raise before the first cell is trained what would be raised in each."""
    if not conditions.data:
        raise SettingError(f"the recipe {grid[0].recipe.name} has no data of its own; name a data set with --data")
    if type(jobs) is not int or jobs < 1:
        raise SettingError(f"the number of jobs must be a whole number from 1 up, not {jobs!r}")
    RunSettings(null_images=conditions.null_images)
    images_of(grid[0], conditions)


def check_same(cell: Cell, folder: Path, conditions: Conditions) -> None:
    """Raise SettingError where the folder holds a run with another recipe or other data."""
    before, account = _read(folder / "recipe.json"), _account(folder) or {}
    if before is None:
        return
    data = {name: getattr(conditions, name) for name in account if name in ("data", "val_data")}
    other = cell.recipe.differences(before) + differences({name: account[name] for name in data}, data)
    if other:
        raise SettingError(
            f"the cell in {folder} was trained with another {'; '.join(other[:5])}; sweep with the same recipe and data, "
            "or choose another -o"
        )


def _results(
    grid: Sequence[Cell], folder: Path, conditions: Conditions, jobs: int, watch: Watch | None, say: Say
) -> Iterator[CellResult]:
    """The results of the cells, in the order in which they are done; those of other processes at the end."""
    rank, world = rank_and_world()
    done = gathered({cell.name: finished_result(cell, folder / cell.name, conditions) for cell in grid})[0]
    yield from (result for result in done.values() if result is not None)
    work = [cell for cell in grid if done[cell.name] is None]
    if len(work) < len(grid):
        say(f"{len(grid) - len(work)} of {len(grid)} cells were finished before and are kept")
    if world > 1 or (jobs > 1 and len(work) > 1):
        own = []
        for result in _in_processes(work, folder, conditions, min(jobs, max(1, len(work)))):
            say(result_line(result))
            own.append(result)
            yield result
        others = [result for i, part in enumerate(gathered(own)) if i != rank for result in part]
        for result in others:
            say(result_line(result))
        yield from others
        return
    for at, cell in enumerate(work, 1):
        say(f"cell {at} of {len(work)}: {cell.name}")
        length = cell.recipe.steps
        with nullcontext() if watch is None or length is None else watch(length * cell.recipe.batch_size) as progress:
            result = run_cell(cell, folder / cell.name, conditions, progress, say)
        say(result_line(result))
        yield result


def _in_processes(work: Sequence[Cell], folder: Path, conditions: Conditions, jobs: int) -> Iterator[CellResult]:
    """Run `jobs` cells at once, each in a fresh process: where one is killed, the others go on."""
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // jobs)
    running: set[Any] = set()
    stopped, turns, lock = threading.Event(), shared_out(len(work)), threading.Lock()
    places: SimpleQueue[str] = SimpleQueue()
    for place in _places(conditions.device, jobs):
        places.put(place)

    def run() -> CellResult | None:
        with lock:
            at = None if stopped.is_set() else next(turns, None)
        if at is None:  # another process has taken the rest
            return None
        cell, place = work[at], places.get()
        arguments = (cell, folder / cell.name, replace(conditions, device=place), threads, loaded_plugins)
        process = context.Process(target=_process, args=arguments)
        running.add(process)
        process.start()
        process.join()
        running.discard(process)
        places.put(place)
        return process_result(*arguments[:3], process.exitcode)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            results = (future.result() for future in as_completed([pool.submit(run) for _ in work]))
            yield from (result for result in results if result is not None)
        except BaseException:
            stopped.set()
            for process in [p for p in running if p.pid is not None]:
                process.terminate()
            raise


def _places(device: str, jobs: int) -> list[str]:
    """The device of each of `jobs` cells at once: all GPUs of the machine in turn, or the one of this process in a group."""
    if device != "auto" or not torch.cuda.is_available():
        return [device] * jobs
    if rank_and_world()[1] > 1:
        return [str(choose_device(device))] * jobs
    return [f"cuda:{i % torch.cuda.device_count()}" for i in range(jobs)]


def _process(cell: Cell, folder: Path, conditions: Conditions, threads: int, plugins: Sequence[str]) -> None:
    forget()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    for address in plugins:
        load_plugin(address)
    torch.set_num_threads(threads)
    run_cell(cell, folder, conditions)


def _end_with(parent: Any) -> None:
    """End this process when its parent is killed, so that nobody else writes where the sweep goes on later."""
    parent.join()
    os._exit(1)


def process_result(cell: Cell, folder: Path, conditions: Conditions, code: int | None) -> CellResult:
    """The result of a cell whose process ended with this exit code, from what lies in its folder."""
    done = finished_result(cell, folder, conditions)
    if done is not None:
        return done
    reason = folder / ERROR
    if code == 0 and reason.is_file():
        return _result(cell, status=FAILED, reason=reason.read_text(encoding="utf-8").partition("\n")[0])
    return failed_result(cell, folder, f"the process of this cell ended with exit code {code}; it may have run out of memory")


def result_line(result: CellResult) -> str:
    """How a cell ended, in one line."""
    if result.status == FAILED:
        return f"{result.name} failed: {result.reason}"
    count = result.numbers.get("similar_blocks")
    blocks = "" if count is None else f", {count:g} of {result.numbers['pairs']:g} adjacent pairs similar"
    return f"{result.name}: accuracy {result.number('accuracy'):.2%}{blocks}, {result.train_seconds:.0f} s of training"


def run_cell(
    cell: Cell, folder: Path, conditions: Conditions, progress: Progress | None = None, say: Say | None = None
) -> CellResult:
    """Train and measure one cell in its folder; what is finished there already is kept.

    Writes what `train` writes, findings/ (of the trained model), untrained/ (of its twin) and cell.json; where it fails,
    error.txt. KeyboardInterrupt is passed on.
    """
    done, say = finished_result(cell, folder, conditions), say or (lambda text: None)
    if done is not None:
        return done
    try:
        if _account(folder) is None:
            train(
                cell.recipe,
                conditions.data,
                folder,
                val_data=conditions.val_data,
                device=conditions.device,
                resume=bool(states_in(folder / "state")),
                progress=progress,
                report=say,
                command=conditions.command,
            )
        result = _measured(cell, folder, conditions, say)
    except Exception as error:  # of any kind: the other cells are still to be run
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return failed_result(cell, folder, reason, traceback.format_exc())
    write_document(folder / RESULT, {"measured": conditions.measured(), "outcome": result.to_json()})
    (folder / ERROR).unlink(missing_ok=True)
    return result


def _measured(cell: Cell, folder: Path, conditions: Conditions, say: Say) -> CellResult:
    """Measure the trained model of a cell and its untrained copy."""
    began, images, account = time.perf_counter(), images_of(cell, conditions), _account(folder)
    assert account is not None
    address, device, null_images = f"ours:{folder / 'model.safetensors'}", conditions.device, conditions.null_images
    settings = RunSettings(device=device, null_images=null_images, seed=cell.seed, command=conditions.command)
    say(f"measuring on {len(images)} images")
    trained = measure(resolve(address), images, settings)
    trained.save(folder / FINDINGS)
    twin = resolve(address, pretrained=False, seed=cell.seed)
    twin = recalibrated(twin, images, cell.recipe.recalibrate, device=device, seed=cell.seed)
    untrained = measure(twin, images, replace(settings, null_images=0, gallery_images=0))
    untrained.save(folder / TWIN)
    return _result(
        cell,
        status=FINISHED,
        **{name: account[name] for name in ("accuracy", "loss", "parameters", "names_sha256")},
        train_seconds=round(account["seconds"], 3),
        measure_seconds=round(time.perf_counter() - began, 3),
        numbers=_numbers(trained),
        untrained=_numbers(untrained),
    )


def images_of(cell: Cell, conditions: Conditions) -> ImageSet:
    """The images on which a cell is measured."""
    if conditions.eval_data is not None:
        return open_set(conditions.eval_data, limit=conditions.limit)
    held_out = split_data(conditions.data, conditions.val_data, share=cell.recipe.val_share).held_out
    return held_out if conditions.limit is None else held_out.subset(conditions.limit)


def _numbers(findings: Findings) -> dict[str, float | None]:
    """The summary, and how many adjacent pairs of blocks were counted."""
    similar = findings.metrics.get("similar-blocks")
    return {**findings.summary, "pairs": None if similar is None else similar.details.get("pairs")}


def finished_result(cell: Cell, folder: Path, conditions: Conditions) -> CellResult | None:
    """The result of a cell that was trained and measured under these conditions before; None where there is work to do."""
    content = _read(folder / RESULT)
    if content is None or content.get("measured") != conditions.measured() or not (folder / FINDINGS).is_dir():
        return None
    try:
        result = CellResult.from_json(content.get("outcome"))
    except OutputError as error:
        raise OutputError(f"{folder / RESULT} is damaged ({error}); remove it, and the cell is measured again") from error
    return replace(result, name=cell.name, values=dict(cell.values), seed=cell.seed)


def failed_result(cell: Cell, folder: Path, reason: str, trace: str = "") -> CellResult:
    """The result of a cell that failed, with the reason left in its folder."""
    content = f"{reason}\n\n{trace}".rstrip() + "\n"
    write_whole(folder / ERROR, lambda stream: stream.write(content.encode()))
    return _result(cell, status=FAILED, reason=reason)


def _result(cell: Cell, **facts: Any) -> CellResult:
    return CellResult(name=cell.name, values=dict(cell.values), seed=cell.seed, **facts)


def _account(folder: Path) -> dict[str, Any] | None:
    """training.json of a training that came to its end."""
    return _read(folder / "training.json") if (folder / "model.safetensors").is_file() else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
