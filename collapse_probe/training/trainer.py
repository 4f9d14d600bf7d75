"""The loop that trains and watches: one recipe, one data set, one output folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.devices import autocast, peak_memory
from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.seeding import random_kept
from collapse_probe.training.recipe import Recipe
from collapse_probe.training.run import (
    Run,
    Say,
    accelerator_on,
    monitor_of,
    prepare,
    save_run_model,
    save_run_state,
    settled_best,
    write_json,
)
from collapse_probe.training.step import DivergedError, StepResult


@torch.no_grad()
def score(model: nn.Module, held_out: Iterable[tuple[Tensor, Tensor]], amp: str | None = None) -> tuple[float, float]:
    """Top-1 accuracy (a share) and mean cross entropy (nats) of a model in eval mode, over all processes."""
    right = images = 0
    loss = 0.0
    for pixels, labels in held_out:
        with autocast(pixels.device, amp):
            logits = model(pixels)
        right += int((logits.argmax(dim=-1) == labels).sum())
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        images += len(labels)
    found = gathered((right, loss, images))
    right, loss, images = (sum(each[i] for each in found) for i in range(3))
    return right / images, loss / images


FORMAT = "collapse-probe/training/1"
Progress = Callable[[int, int], None]  # images done, images skipped


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended: `accuracy` (a share) and `loss` (nats) on the held-out images, after `steps` steps.

    `model` is the model file, `checkpoint` the complete state from which the run could go on. `finished` is
    False where the run was told to stop earlier; there is no model file then, and no accuracy.
    """

    recipe: Recipe
    steps: int
    seconds: float
    checkpoint: Path
    model: Path | None = None
    accuracy: float | None = None
    loss: float | None = None
    finished: bool = True
    evaluations: tuple[dict[str, float], ...] = ()


def train(
    recipe: Recipe,
    data: str,
    output: str | Path,
    *,
    val_data: str | None = None,
    device: str = "auto",
    resume: bool = False,
    monitor: Any = None,
    progress: Progress | None = None,
    report: Say | None = None,
    stop_after: int | None = None,
    command: str = "",
) -> Trained:
    """Train `recipe` on the data at an address and write everything into the folder `output`.

    model.safetensors (weights with all that is needed to build the model), training.json, recipe.json,
    state/ (complete checkpoints), logs/ (TensorBoard), models/ (with `snapshot_every`), monitor/ (with
    `monitor_every`). Under torchrun or `accelerate launch` every process calls this alike. With `resume` the
    run goes on from the newest checkpoint, on the CPU to the bit; without one it begins. `monitor.step(model,
    step)` is called before the first step and after each; `stop_after` ends the run after that many steps.

    Raises SettingError, DataError, ModelError, OutputError, CheckpointError; DivergedError where a loss is no
    number any more, which names the step, the term and the last checkpoint.
    """
    output, accelerator = Path(output), accelerator_on(device)
    with random_kept(accelerator.device):
        run = prepare(recipe, data, val_data, output, resume, accelerator, report or (lambda text: None), command)
        if monitor is None and recipe.monitor_every and accelerator.is_main_process:
            monitor = monitor_of(run)
        try:
            return _learn(run, monitor, progress, min(run.total, stop_after or run.total))
        finally:
            run.log.close()


def _learn(run: Run, monitor: Any, progress: Progress | None, until: int) -> Trained:
    learner, recipe, began = run.learner, run.recipe, time.perf_counter()
    earlier, main = run.seconds, rank_and_world()[0] == 0
    if learner.done == 0:
        _watch(run, monitor)
    checkpoint = _latest(run)
    for images, labels in run.lessons.batches(learner.done, until):
        try:
            stepped = learner.step(run.mixer(images, labels, learner.done))
        except DivergedError as error:
            last = checkpoint or "none yet"
            hint = "try a lower lr, a longer warmup, clip, or another precision"
            raise DivergedError(f"{error}; the weights were left as they were; last good checkpoint: {last}; {hint}") from error
        run.seconds = earlier + time.perf_counter() - began
        step = learner.done
        if progress is not None:
            progress(step * recipe.batch_size, 0)
        if main and _due(step, recipe.log_every):
            run.log.scalars("train", _row(stepped, run), step)
        if _due(step, recipe.evaluate_every) and step < run.total:
            _evaluate(run)
        _watch(run, monitor)
        if _due(step, recipe.snapshot_every):
            save_run_model(run, run.output / "models" / f"step-{step:08d}.safetensors", settled_best(run), {})
        if _due(step, recipe.checkpoint_every) or step == until:
            checkpoint = save_run_state(run)
    if checkpoint is None:
        checkpoint = save_run_state(run)
    ended: dict[str, Any] = {"recipe": recipe, "steps": learner.done, "seconds": run.seconds, "checkpoint": checkpoint}
    if learner.done < run.total:
        return Trained(**ended, finished=False, evaluations=tuple(run.evaluations))
    return _finish(run, ended)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _latest(run: Run) -> Path | None:
    path = run.output / "state" / f"step-{run.learner.done:08d}.pt"
    return path if run.learner.done else None


def _row(stepped: StepResult, run: Run) -> dict[str, float]:
    speed = run.learner.done * run.recipe.batch_size / max(run.seconds, 1e-9)
    return {
        **stepped.terms,
        "total": stepped.total,
        "gradient norm": stepped.gradient_norm,
        "lr": stepped.lr,
        "images per second": speed,
    }


def _watch(run: Run, monitor: Any) -> None:
    if monitor is None:
        return
    findings = monitor.step(run.learner.lesson.model, run.learner.done)
    if findings is not None:
        held = {name: value for name, value in findings.summary.items() if isinstance(value, (int, float))}
        run.log.scalars("collapse", held, run.learner.done)


def _evaluate(run: Run) -> tuple[float, float]:
    accuracy, loss = score(settled_best(run), run.lessons.held_out(), run.recipe.amp)
    step = run.learner.done
    run.evaluations.append({"step": step, "accuracy": accuracy, "loss": loss})
    run.log.scalars("validation", {"accuracy": accuracy, "loss": loss}, step)
    run.say(f"step {step} of {run.total}: accuracy {accuracy:.2%}, loss {loss:.4f} on held-out images")
    return accuracy, loss


def _finish(run: Run, ended: Mapping[str, Any]) -> Trained:
    model = settled_best(run)
    accuracy, loss = score(model, run.lessons.held_out(), run.recipe.amp)
    run.evaluations.append({"step": run.learner.done, "accuracy": accuracy, "loss": loss})
    run.log.scalars("validation", {"accuracy": accuracy, "loss": loss}, run.learner.done)
    path = run.output / "model.safetensors"
    save_run_model(run, path, model, {"accuracy": accuracy, "loss": loss})
    trained = Trained(**ended, model=path, accuracy=accuracy, loss=loss, evaluations=tuple(run.evaluations))
    if rank_and_world()[0] == 0:
        write_json(run.output / "training.json", _account(run, trained))
    gathered(None)  # nobody reads the model before it is there
    return trained


def _account(run: Run, trained: Trained) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "recipe": run.recipe.to_json(),
        **run.facts,
        "steps": trained.steps,
        "seconds": trained.seconds,
        "accuracy": trained.accuracy,
        "loss": trained.loss,
        "evaluations": list(trained.evaluations),
        "peak_memory_bytes": peak_memory(run.learner.accelerator.device),
    }
