"""The verb `sweep`: the same training over a grid, one folder a cell, one table and one page."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from collapse_probe.analysis import Settings
from collapse_probe.devices import choose_device, device_name
from collapse_probe.errors import SettingError
from collapse_probe.folders import check_writable
from collapse_probe.processes import rank_and_world
from collapse_probe.provenance import versions
from collapse_probe.recipe import Recipe
from collapse_probe.sockets import RECIPES
from collapse_probe.sweep_cell import ERROR, Terms, check_same, failed, finished, images_of, run_cell
from collapse_probe.sweep_grid import Cell, cells
from collapse_probe.sweep_results import FAILED, Outcome, Sweep
from collapse_probe.training import Progress

SETTLED_OVER = 20  # batches
Say = Callable[[str], None]
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
        cells=tuple(Outcome(name=cell.name, values=dict(cell.values), seed=cell.seed) for cell in made),
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
    Settings(null_images=terms.null_images)
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


def _outcomes(made: Sequence[Cell], folder: Path, terms: Terms, jobs: int, watch: Watch | None, say: Say) -> Iterator[Outcome]:
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


def told(outcome: Outcome) -> str:
    """How a cell ended, in one line."""
    if outcome.status == FAILED:
        return f"{outcome.name} failed: {outcome.reason}"
    counted = outcome.numbers.get("similar_blocks")
    blocks = "" if counted is None else f", {counted:g} of {outcome.numbers['pairs']:g} adjacent pairs similar"
    return f"{outcome.name}: accuracy {outcome.number('accuracy'):.2%}{blocks}, {outcome.train_seconds:.0f} s of training"


@contextmanager
def _crew(jobs: int) -> Iterator[Callable[[Sequence[Task]], Iterator[Outcome]]]:
    """Runs cells in `jobs` processes at once, a fresh one for each, so that one that is killed takes no other along."""
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // jobs)
    running: set[Any] = set()
    stopped = threading.Event()

    def one(task: Task) -> Outcome:
        cell = task[0]
        if stopped.is_set():
            return Outcome(name=cell.name, values=dict(cell.values), seed=cell.seed)
        process = context.Process(target=_alone, args=(*task, threads))
        running.add(process)
        process.start()
        process.join()
        running.discard(process)
        return ended(*task, process.exitcode)

    def start(tasks: Sequence[Task]) -> Iterator[Outcome]:
        yield from (future.result() for future in as_completed([pool.submit(one, task) for task in tasks]))

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield start
        except BaseException:
            stopped.set()
            for process in [p for p in running if p.pid is not None]:
                process.terminate()
            raise


def _alone(cell: Cell, folder: Path, terms: Terms, threads: int) -> None:
    torch.set_num_threads(threads)
    run_cell(cell, folder, terms)


def ended(cell: Cell, folder: Path, terms: Terms, code: int | None) -> Outcome:
    """How a cell ended that ran in a process of its own, from what lies in its folder."""
    kept = finished(cell, folder, terms)
    if kept is not None:
        return kept
    reason = folder / ERROR
    if code == 0 and reason.is_file():
        line = reason.read_text(encoding="utf-8").partition("\n")[0]
        return Outcome(name=cell.name, values=dict(cell.values), seed=cell.seed, status=FAILED, reason=line)
    return failed(cell, folder, f"the process of this cell ended with exit code {code}; it may have run out of memory")
