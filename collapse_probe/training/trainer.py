"""The loop that trains and monitors: one recipe, one data set, one output folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collapse_probe.devices import autocast, peak_memory
from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.errors import SettingError
from collapse_probe.files import write_document
from collapse_probe.models.model_file import SUFFIX
from collapse_probe.seeding import random_kept
from collapse_probe.training.monitor import Monitor
from collapse_probe.training.recipe import Recipe
from collapse_probe.training.run import (
    Run,
    Say,
    accelerator_on,
    prepare,
    save_run_model,
    save_run_state,
    settled_model,
    state_path,
)
from collapse_probe.training.step import DivergedError


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
    right, loss, images = (sum(parts) for parts in zip(*gathered((right, loss, images)), strict=True))
    return right / images, loss / images


FORMAT = "collapse-probe/training/1"
Progress = Callable[[int, int], None]  # images done, images skipped


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended: `accuracy` (a share) and `loss` (nats) on the held-out images, after `steps` steps.

    `model` is the model file, `checkpoint` the complete state from which the run can go on. `finished` is
    False after `stop_after` steps; there is no model file then, and no accuracy.
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
    alarm: str | Sequence[str] = (),
    logs: Sequence[str] = (),
) -> Trained:
    """Train `recipe` on the data at an address and write everything into the folder `output`.

    model.safetensors (weights with all that is needed to build the model), training.json, recipe.json,
    state/ (complete checkpoints), logs/ (see `logs`), models/ (with `snapshot_every`), monitor/ (with
    `monitor_every`). Under torchrun or `accelerate launch` every process calls this alike. With `resume` the
    run goes on from the newest checkpoint, on the CPU to the bit; without one it begins. `monitor.step(model,
    step)` is called before the first step and after each; `stop_after` ends the run after that many steps. An `alarm`
    (see Monitor) ends it with AlarmError in all processes; the last good model is a model file in monitor/last-good/.
    `logs` names where curves and heatmaps go: tensorboard (alone by default, where it is installed), wandb, trackio, mlflow.

    Raises SettingError, DataError, ModelError, OutputError, CheckpointError; DivergedError where a loss is NaN or infinite,
    which names the step, the term and the last checkpoint.
    """
    if alarm and not recipe.monitor_every:
        raise SettingError("an alarm is about what a monitor measures, and this run has none: --monitor-every N")
    output, accelerator = Path(output), accelerator_on(device)
    with random_kept(accelerator.device):
        run = prepare(recipe, data, val_data, output, resume, accelerator, report or (lambda text: None), command, logs)
        failed = True
        try:
            if monitor is None and recipe.monitor_every and (accelerator.is_main_process or alarm):
                monitor = _monitor_of(run, alarm)
            trained = _train(run, monitor, progress, min(run.total, stop_after or run.total))
            failed = False
            return trained
        finally:
            run.log.close(failed)


def _monitor_of(run: Run, alarm: str | Sequence[str]) -> Monitor:
    """The monitor that a recipe asks for, on held-out images."""

    def save(model: nn.Module, path: Path, step: int) -> Path:
        path = path.with_suffix(SUFFIX)
        save_run_model(run, path, model, {"weights": "live", "recalibrated_batches": 0, "step": step})
        return path

    count, every, folder = run.recipe.monitor_images, run.recipe.monitor_every, run.output / "monitor"
    images, drift = run.data.sample(count), run.recipe.monitor_gram_drift
    return Monitor(images, every=every, folder=folder, limit=count, log=run.log, alarm=alarm, save=save, gram_drift=drift)


def _train(run: Run, monitor: Any, progress: Progress | None, until: int) -> Trained:
    """Take the steps up to `until`, with all that is due on the way."""
    train_step, recipe, earlier, began = run.train_step, run.recipe, run.seconds, time.perf_counter()
    checkpoint = state_path(run.output / "state", train_step.done) if train_step.done else None
    if train_step.done == 0:
        _monitor(run, monitor)
    for images, labels in run.data.batches(train_step.done, until):
        try:
            result = train_step(run.mixer(images, labels, train_step.done))
        except DivergedError as error:
            last = checkpoint or "none yet"
            hint = "try a lower lr, a longer warmup, clip, or another precision"
            raise DivergedError(f"{error}; the weights were left as they were; last good checkpoint: {last}; {hint}") from error
        run.seconds = earlier + time.perf_counter() - began
        step = train_step.done
        if progress is not None:
            progress(step * recipe.batch_size, 0)
        if _due(step, recipe.log_every):
            speed = step * recipe.batch_size / max(run.seconds, 1e-9)
            curves = {"total": result.total, "gradient norm": result.gradient_norm, "lr": result.lr, "images per second": speed}
            run.log.numbers(step, {f"train/{name}": value for name, value in {**result.terms, **curves}.items()})
        if _due(step, recipe.evaluate_every) and step < run.total:
            accuracy, loss = _evaluate(run, settled_model(run))
            run.say(f"step {step} of {run.total}: accuracy {accuracy:.2%}, loss {loss:.4f} on held-out images")
        _monitor(run, monitor)
        if _due(step, recipe.snapshot_every):
            save_run_model(run, run.output / "models" / f"step-{step:08d}.safetensors", settled_model(run), {})
        if _due(step, recipe.checkpoint_every) or step == until:
            checkpoint = save_run_state(run)
    trained = Trained(
        recipe=recipe,
        steps=train_step.done,
        seconds=run.seconds,
        checkpoint=checkpoint or save_run_state(run),
        finished=train_step.done >= run.total,
        evaluations=tuple(run.evaluations),
    )
    return _finish(run, trained) if trained.finished else trained


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _monitor(run: Run, monitor: Any) -> None:
    step = run.train_step.done
    findings = None if monitor is None else monitor.step(run.train_step.loss.model, step)
    if findings is None and (why := getattr(monitor, "unmeasured", {}).get(step)):
        run.say(f"step {step}: nothing measured, {why}")


def _evaluate(run: Run, model: nn.Module) -> tuple[float, float]:
    """Accuracy and loss on the held-out images, also entered in the run's evaluations and its log."""
    accuracy, loss = score(model, run.data.held_out(), run.recipe.amp)
    numbers = {"accuracy": accuracy, "loss": loss}
    run.evaluations.append({"step": run.train_step.done, **numbers})
    run.log.numbers(run.train_step.done, {f"validation/{name}": value for name, value in numbers.items()})
    return accuracy, loss


def _finish(run: Run, trained: Trained) -> Trained:
    """Evaluate and write the model file and training.json."""
    model, path = settled_model(run), run.output / "model.safetensors"
    accuracy, loss = _evaluate(run, model)
    save_run_model(run, path, model, {"accuracy": accuracy, "loss": loss})
    evaluations = tuple(run.evaluations)
    trained = replace(trained, model=path, accuracy=accuracy, loss=loss, evaluations=evaluations)
    if rank_and_world()[0] == 0:
        account = {
            "format": FORMAT,
            "recipe": run.recipe.to_json(),
            **run.facts,
            "steps": trained.steps,
            "seconds": trained.seconds,
            "accuracy": accuracy,
            "loss": loss,
            "evaluations": evaluations,
            "peak_memory_bytes": peak_memory(run.train_step.accelerator.device),
        }
        write_document(run.output / "training.json", account)
    gathered(None)  # no process reads the model before it is there
    return trained
