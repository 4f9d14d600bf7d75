"""A run of training: what it stands on, how it begins or goes on, and what it leaves in its folder."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collapse_probe.data.splits import Split, split_data
from collapse_probe.devices import choose_device, device_name
from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.errors import CheckpointError, OutputError, SettingError
from collapse_probe.files import PARTIAL, write_whole
from collapse_probe.models.batchnorm import recalibrate
from collapse_probe.models.model_file import ModelCard, save_model
from collapse_probe.provenance import names_sha256, versions
from collapse_probe.seeding import random_states, restore_random, seed_all
from collapse_probe.training.batches import Sharing, TrainingData, open_training_data
from collapse_probe.training.loss import Mixer, TrainingLoss, needs_patch_targets
from collapse_probe.training.recipe import Recipe
from collapse_probe.training.step import TrainStep


def settled(model: nn.Module, plain: Iterable[Tensor], count: int) -> nn.Module:
    """A copy of the model in eval mode, with BatchNorm re-estimated over `count` plain batches where it has any.

    The model itself stays as it is. Processes agree on the statistics: they read the same batches, or take
    those of the first process.
    """
    twin = copy.deepcopy(model).eval()
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    if norms and count:
        recalibrate(twin, plain, count)
    elif norms and rank_and_world()[1] > 1:
        for norm in norms:
            for buffer in norm.buffers():
                dist.broadcast(buffer, src=0)
    return twin


FORMAT = "collapse-probe/run-state/1"
PATTERN = re.compile(r"step-(\d{8,})\.pt")


def save_state(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write the state after `step` steps, then remove all but the newest `keep`; the path of the new one."""
    path = folder / f"step-{step:08d}.pt"
    write_whole(path, lambda stream: torch.save({"format": FORMAT, "step": step, **state}, stream))
    for old in states_in(folder)[:-keep]:
        old.unlink(missing_ok=True)
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)
    return path


def states_in(folder: Path) -> list[Path]:
    """The states in a folder, oldest first."""
    found = [path for path in folder.glob("step-*.pt") if PATTERN.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.stem.partition("-")[2]))


def load_state(path: Path) -> dict[str, Any]:
    """The state at `path`, on the CPU; no code in it is run. Raises CheckpointError where it is none."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        first = (str(error).splitlines() or [""])[0][:160]
        raise CheckpointError(f"{path} cannot be read as a training state ({type(error).__name__}: {first})") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training state of collapse-probe ({FORMAT})")
    return held


class TrainingLog:
    """Writes scalars into `folder`; without one (other processes), or without tensorboard, nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: Any = None

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """One point of each curve, called `group/name`."""
        if self._folder is None:
            return
        if self._writer is None:
            self._writer = _writer(self._folder, step)
            if self._writer is None:
                self._folder = None
                return
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name.replace(' ', '_')}", value, step)

    def close(self) -> None:
        """Let everything reach the disk."""
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path, step: int) -> Any:
    """A writer that takes back what an interrupted run wrote from `step` on; None without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    make: Any = SummaryWriter  # untyped
    return make(str(folder), purge_step=step)


FREE = (
    "about",
    "workers",
    "log_every",
    "evaluate_every",
    "monitor_every",
    "monitor_images",
    "snapshot_every",
    "checkpoint_every",
)

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Run:
    """One run and what it stands on."""

    recipe: Recipe
    split: Split
    lessons: TrainingData
    learner: TrainStep
    mixer: Mixer
    output: Path
    total: int
    log: TrainingLog
    say: Say
    facts: Mapping[str, Any]
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def accelerator_on(device: str) -> Any:
    try:
        make: Any = importlib.import_module("accelerate").Accelerator
    except ImportError as error:
        raise SettingError(f'training needs accelerate ({error}); pip install "collapse-probe[train]"') from error
    chosen = choose_device(device)
    if chosen.index is not None:
        torch.cuda.set_device(chosen)
    try:
        accelerator = make(cpu=chosen.type == "cpu", mixed_precision="no")  # the recipe's precision is the learner's
    except ValueError as error:
        raise SettingError(f"this process already trained elsewhere than on {device}: {error}") from error
    if accelerator.device.type != chosen.type:
        raise SettingError(f"this process trains on {accelerator.device}, not on {device}; begin a new one for that")
    return accelerator


def prepare(
    recipe: Recipe, data: str, val_data: str | None, output: Path, resume: bool, accelerator: Any, say: Say, command: str
) -> Run:
    rank, world = rank_and_world()
    states = _states(output, resume)
    split = split_data(data, val_data, share=recipe.val_share)
    seed_all(recipe.seed, rank)
    model = recipe.architecture.build(recipe.seed)
    size, classes = input_size(model), output_classes(model)
    if classes != len(split.classes):
        raise SettingError(f"{data} has {len(split.classes)} classes, the model {classes}; --set classes={len(split.classes)}")
    lessons = open_training_data(split, recipe, size, Sharing(rank, world, accelerator.device))
    length = recipe.length(lessons.steps_per_epoch)
    learner = TrainStep(TrainingLoss(model, recipe.penalties, recipe.amp), recipe, length, accelerator)
    mixer = Mixer(recipe, classes, patch_side(model) if needs_patch_targets(recipe.penalties) else None)
    seed_all(recipe.seed, rank)
    facts = {
        "data": data,
        "val_data": val_data,
        "train_images": len(split.train),
        "held_out_images": len(split.held_out),
        "names_sha256": names_sha256([*split.train.names, *split.held_out.names]),
        "input_size": [3, *size],
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(accelerator.device),
        "world_size": world,
        "command": command,
        "versions": versions(),
    }
    log = TrainingLog(output / "logs" if rank == 0 else None)
    run = Run(
        recipe=recipe,
        split=split,
        lessons=lessons,
        learner=learner,
        mixer=mixer,
        output=output,
        total=length[0],
        log=log,
        say=say,
        facts=facts,
    )
    if states:
        _go_on(run, states)
    elif resume:
        say("there is no checkpoint yet; the run begins")
    if rank == 0:
        write_json(output / "recipe.json", recipe.to_json())
    return run


def _states(output: Path, resume: bool) -> list[Path]:
    states = states_in(output / "state")
    if states and not resume:
        raise OutputError(f"{output} already holds a run ({states[-1].name}); --resume goes on with it, or choose another -o")
    gathered(None)  # nobody writes before all have looked
    return states


def _go_on(run: Run, states: list[Path]) -> None:
    for at, path in enumerate(reversed(states)):
        try:
            held = load_state(path)
            break
        except CheckpointError as error:
            if at == len(states) - 1:
                raise
            run.say(f"{error}; taking the one before")
    same = {key: value for key, value in run.recipe.to_json().items() if key not in FREE}
    other = [key for key, value in same.items() if held["recipe"].get(key) != value]
    if other:
        raise SettingError(
            f"{path} was trained with another {', '.join(other)}; resume with the same recipe, or choose another -o"
        )
    if held["names_sha256"] != run.facts["names_sha256"]:
        raise SettingError(f"{path} was trained on other images than those of {run.facts['data']}; resume with the same --data")
    run.learner.restore(held, held["step"])
    run.evaluations, run.seconds = list(held["evaluations"]), held["seconds"]
    rank, world = rank_and_world()
    if len(held["random"]) == world:
        restore_random(held["random"][rank])
    else:
        run.say(f"the run had {len(held['random'])} processes and has {world}: dropout will draw otherwise than unbroken")
    run.say(f"going on after step {held['step']} of {run.total}, from {path}")


def settled_best(run: Run) -> nn.Module:
    """The model to validate or save, with BatchNorm as the recipe wants it."""
    count = run.recipe.recalibrate
    return settled(run.learner.best, run.lessons.plain(count), count)


def save_run_state(run: Run) -> Path:
    step = run.learner.done
    states = gathered(random_states())
    path = run.output / "state" / f"step-{step:08d}.pt"
    if rank_and_world()[0] == 0:
        held = {"recipe": run.recipe.to_json(), "names_sha256": run.facts["names_sha256"], "random": states}
        held |= {"evaluations": run.evaluations, "seconds": run.seconds}
        held["sampler"] = dict(zip(("epoch", "batch"), divmod(step, run.lessons.steps_per_epoch), strict=True))
        save_state(path.parent, step, {**held, **run.learner.state()})
    return path


def save_run_model(run: Run, path: Path, model: nn.Module, facts: Mapping[str, Any]) -> None:
    if rank_and_world()[0] > 0:
        return
    recipe = run.recipe
    held = {**run.facts, **facts, "step": run.learner.done, "recipe": recipe.to_json()}
    held["weights"] = "live" if recipe.ema is None else f"average with decay {recipe.ema}"
    held["recalibrated_batches"] = recipe.recalibrate
    channels, *size = run.facts["input_size"]
    card = ModelCard(
        architecture=recipe.architecture,
        input_size=(channels, *size),
        mean=recipe.mean,
        std=recipe.std,
        interpolation=recipe.interpolation,
        crop_pct=recipe.crop_pct,
        facts=held,
    )
    save_model(path, model, card)


def monitor_of(run: Run) -> Any:
    from collapse_probe.training.monitor import Monitor

    recipe = run.recipe
    images = run.lessons.sample(recipe.monitor_images)
    return Monitor(images, every=recipe.monitor_every, folder=run.output / "monitor", limit=recipe.monitor_images)


def write_json(path: Path, held: Mapping[str, Any]) -> None:
    """Write plain values as JSON, whole or not at all."""
    text = json.dumps(held, indent=2, allow_nan=False)
    write_whole(path, lambda stream: stream.write(text.encode()))


def input_size(model: Any) -> tuple[int, int]:
    """Height and width of the images that a ViT takes, in pixels."""
    height, width = model.patch_embed.img_size
    return int(height), int(width)


def patch_side(model: Any) -> int:
    """The side of a patch in pixels."""
    return int(model.patch_embed.patch_size[0])


def output_classes(model: Any) -> int:
    """How many classes the model tells apart."""
    return int(model.num_classes)
