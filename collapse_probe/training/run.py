"""A run of training: what it consists of, how it begins or resumes, and what it leaves in its folder."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from collapse_probe.data.splits import Split, split_data
from collapse_probe.devices import choose_device, device_name
from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.errors import CheckpointError, OutputError, SettingError
from collapse_probe.files import PARTIAL, write_document, write_whole
from collapse_probe.models.batchnorm import recalibrate
from collapse_probe.models.model_file import ModelCard, save_model
from collapse_probe.provenance import names_sha256, versions
from collapse_probe.seeding import random_states, restore_random, seed_all
from collapse_probe.training.batches import Sharing, TrainingData, open_training_data
from collapse_probe.training.logs.log import Logs, open_log
from collapse_probe.training.loss import Mixer, TrainingLoss, needs_patch_targets
from collapse_probe.training.recipe import Recipe
from collapse_probe.training.step import TrainStep

FORMAT = "collapse-probe/run-state/1"
PATTERN = re.compile(r"step-(\d{8,})\.pt")
Say = Callable[[str], None]


def state_path(folder: Path, step: int) -> Path:
    """The file of the state after `step` steps."""
    return folder / f"step-{step:08d}.pt"


def save_state(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write the state after `step` steps, then remove all but the newest `keep`; the path of the new one."""
    path, before = state_path(folder, step), states_in(folder)
    try:
        write_whole(path, lambda stream: save_whole({"format": FORMAT, "step": step, **state}, stream))
    except OutputError as error:
        way = f"; --resume goes on from {before[-1].name}" if before else ""
        raise OutputError(f"{error}{way}") from error
    for old in [*states_in(folder)[:-keep], *folder.glob(f"*{PARTIAL}")]:
        old.unlink(missing_ok=True)
    return path


class _Stream:
    """A stream that keeps the error that writing to it raised: torch drops it, and says that a file is damaged."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, content: Any) -> Any:
        try:
            return self.stream.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()


def save_whole(content: Any, stream: Any) -> None:
    """torch.save that raises OSError where a stream cannot be written (a full disk)."""
    kept: Any = _Stream(stream)
    try:
        torch.save(content, kept)
    except RuntimeError as error:
        if kept.error is not None:
            raise kept.error from error
        raise


def states_in(folder: Path) -> list[Path]:
    """The states in a folder, oldest first."""
    states = [path for path in folder.glob("step-*.pt") if PATTERN.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(states, key=lambda path: int(path.stem.partition("-")[2]))


def load_state(path: Path) -> dict[str, Any]:
    """The state at `path`, on the CPU; no code in it is run. Raises CheckpointError where it is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        first = (str(error).splitlines() or [""])[0][:160]
        raise CheckpointError(f"{path} cannot be read as a training state ({type(error).__name__}: {first})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training state of collapse-probe ({FORMAT})")
    return state


def opened_logs(kinds: Sequence[str], output: Path, recipe: Recipe) -> Logs:
    """The logs of these kinds, in the first process, in the folder logs/; without any, TensorBoard's where it is installed."""
    folder, settings = output / "logs", recipe.to_json()
    if rank_and_world()[0] > 0:
        return Logs()
    if kinds:
        return Logs([open_log(kind, folder, output.resolve().name, settings) for kind in dict.fromkeys(kinds)])
    try:
        return Logs([open_log("tensorboard", folder, "", settings)])
    except SettingError:
        return Logs()


@dataclass(kw_only=True)
class Run:
    """One run: its recipe, data and training step, and what has come of it until now.

    `total` is the number of steps; `facts` are what the model file and training.json say of its origin.
    """

    recipe: Recipe
    data: TrainingData
    train_step: TrainStep
    mixer: Mixer
    output: Path
    total: int
    log: Logs
    say: Say
    facts: Mapping[str, Any]
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def accelerator_on(device: str) -> Any:
    """An Accelerator on the device of that name. Raises SettingError where accelerate is missing or holds another device."""
    try:
        make: Any = importlib.import_module("accelerate").Accelerator
    except ImportError as error:
        raise SettingError(f'training needs accelerate ({error}); pip install "collapse-probe[train]"') from error
    wanted = choose_device(device)
    if wanted.index is not None:
        torch.cuda.set_device(wanted)
    try:
        accelerator = make(cpu=wanted.type == "cpu", mixed_precision="no")  # TrainingLoss casts as the recipe says
    except ValueError as error:
        raise SettingError(f"this process already trained elsewhere than on {device}: {error}") from error
    if accelerator.device.type != wanted.type:
        raise SettingError(f"this process trains on {accelerator.device}, not on {device}; begin a new one for that")
    return accelerator


def prepare(
    recipe: Recipe,
    data: str,
    val_data: str | None,
    output: Path,
    resume: bool,
    accelerator: Any,
    say: Say,
    command: str,
    logs: Sequence[str] = (),
) -> Run:
    """The run before its first step, or with `resume` as its newest checkpoint left it; writes recipe.json."""
    states = states_in(output / "state")
    if states and not resume:
        raise OutputError(f"{output} already holds a run ({states[-1].name}); --resume goes on with it, or choose another -o")
    gathered(None)  # no process writes before all have looked
    split = split_data(data, val_data, share=recipe.val_share)
    for note in dict.fromkeys((*split.train.notes, *split.held_out.notes)):
        say(note)
    facts = {"data": data, "val_data": val_data}
    run = _assembled(recipe, split, output, accelerator, say, facts)
    run.facts = {**run.facts, "command": command, "versions": versions()}
    if states:
        _resume(run, states)
    elif resume:
        say("there is no checkpoint yet; the run begins")
    if rank_and_world()[0] == 0:
        write_document(output / "recipe.json", recipe.to_json())
    run.log = opened_logs(logs, output, recipe)
    return run


def _assembled(recipe: Recipe, split: Split, output: Path, accelerator: Any, say: Say, origin: Mapping[str, Any]) -> Run:
    """The run of a recipe on a split, with fresh parameters. The generators are seeded anew before its first step."""
    rank, world = rank_and_world()
    seed_all(recipe.seed, rank)
    model = recipe.architecture.build(recipe.seed)
    size, classes = input_size(model), output_classes(model)
    if classes != len(split.classes):
        came = f"{origin['data']} has {len(split.classes)} classes, the model {classes}"
        raise SettingError(f"{came}; --set classes={len(split.classes)}")
    data = open_training_data(split, recipe, size, Sharing(rank, world, accelerator.device))
    length = recipe.length(data.steps_per_epoch)
    train_step = TrainStep(TrainingLoss(model, recipe.penalties, recipe.amp), recipe, length, accelerator)
    mixer = Mixer(recipe, classes, patch_side(model) if needs_patch_targets(recipe.penalties) else None)
    seed_all(recipe.seed, rank)
    facts = {
        **origin,
        "train_images": len(split.train),
        "held_out_images": len(split.held_out),
        "names_sha256": names_sha256([*split.train.names, *split.held_out.names]),
        "input_size": [3, *size],
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(accelerator.device),
        "world_size": world,
    }
    parts: dict[str, Any] = {"data": data, "train_step": train_step, "mixer": mixer, "log": Logs(), "facts": facts}
    return Run(recipe=recipe, output=output, total=length[0], say=say, **parts)


def _resume(run: Run, states: list[Path]) -> None:
    """Go on from the newest state that can be read; SettingError where it is of another recipe or of other images."""
    while True:
        path = states.pop()
        try:
            state = load_state(path)
            break
        except CheckpointError as error:
            if not states:
                raise
            run.say(f"{error}; taking the one before")
    if other := run.recipe.differences(state["recipe"]):
        raise SettingError(
            f"{path} was trained with another {'; '.join(other)}; resume with the same recipe, or choose another -o"
        )
    if state["names_sha256"] != run.facts["names_sha256"]:
        raise SettingError(f"{path} was trained on other images than those of {run.facts['data']}; resume with the same --data")
    run.train_step.restore(state, state["step"])
    run.evaluations, run.seconds = list(state["evaluations"]), state["seconds"]
    rank, world = rank_and_world()
    if len(state["random"]) == world:
        restore_random(state["random"][rank])
    else:
        run.say(f"the run had {len(state['random'])} processes and has {world}: dropout will draw otherwise than unbroken")
    run.say(f"going on after step {state['step']} of {run.total}, from {path}")


def settled_model(run: Run) -> nn.Module:
    """A copy of the model to validate or save, in eval mode, with BatchNorm re-estimated as the recipe says.

    Processes agree on the statistics: they read the same batches, or take those of the first process.
    """
    count, model = run.recipe.recalibrate, copy.deepcopy(run.train_step.best).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    if norms and count:
        recalibrate(model, run.data.plain(count), count)
    elif norms and rank_and_world()[1] > 1:
        for norm in norms:
            for buffer in norm.buffers():
                dist.broadcast(buffer, src=0)
    return model


def save_run_state(run: Run) -> Path:
    """Write the complete state of all processes; its path."""
    step, folder, random = run.train_step.done, run.output / "state", gathered(random_states())
    if rank_and_world()[0] == 0:
        epoch, batch = divmod(step, run.data.steps_per_epoch)
        state = {
            "recipe": run.recipe.to_json(),
            "names_sha256": run.facts["names_sha256"],
            "random": random,
            "evaluations": run.evaluations,
            "seconds": run.seconds,
            "sampler": {"epoch": epoch, "batch": batch},
        }
        save_state(folder, step, {**state, **run.train_step.state()})
    return state_path(folder, step)


def save_run_model(run: Run, path: Path, model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Write the model file, in the first process, with the run's facts and these, which count where both have one."""
    if rank_and_world()[0] > 0:
        return
    recipe = run.recipe
    origin = {
        **run.facts,
        "step": run.train_step.done,
        "recipe": recipe.to_json(),
        "weights": "live" if recipe.ema is None else f"average with decay {recipe.ema}",
        "recalibrated_batches": recipe.recalibrate,
        **facts,
    }
    names = ("architecture", "mean", "std", "interpolation", "crop_pct")
    card = ModelCard(**{name: getattr(recipe, name) for name in names}, input_size=tuple(run.facts["input_size"]), facts=origin)
    save_model(path, model, card)


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
