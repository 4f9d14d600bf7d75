"""What changes while a model is trained: weights, their average, optimizer, schedule, precision; one step of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collapse_probe.errors import CollapseProbeError, SettingError
from collapse_probe.training.loss import Mixed, TrainingLoss
from collapse_probe.training.recipe import Recipe

GRADIENT = "norm of the gradient"


class DivergedError(CollapseProbeError):
    """A loss or a gradient that is no number any more; the weights are those of the step before."""


@dataclass(frozen=True)
class StepResult:
    """What one step said: its terms by name (means over all processes, unweighted), their weighted sum, the
    norm of the gradient before clipping, and the learning rate.
    """

    terms: Mapping[str, float]
    total: float
    gradient_norm: float
    lr: float


class TrainStep:
    """Takes steps; `done` counts them. `accelerator` brings device, data parallelism and gradients together."""

    def __init__(self, lesson: TrainingLoss, recipe: Recipe, length: tuple[int, int, int], accelerator: Any) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.lesson = lesson.to(accelerator.device)
        self.optimizer = _optimizer(self.lesson, recipe)
        self.scheduler = _scheduler(self.optimizer, recipe, length)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=recipe.amp == "float16")
        self.wrapped = accelerator.prepare(self.lesson)
        self.ema = None if recipe.ema is None else _average(self.lesson.model, recipe.ema)
        self.done = 0
        share = recipe.batch_size // accelerator.num_processes
        if share % recipe.accumulate:
            raise SettingError(f"a process's share of {share} images cannot be cut into {recipe.accumulate} equal pieces")

    @property
    def best(self) -> nn.Module:
        """The model that is validated and saved: the average where there is one."""
        chosen: nn.Module = self.lesson.model if self.ema is None else self.ema.module
        return chosen

    def step(self, batch: Mixed) -> StepResult:
        """One update of the weights. Raises DivergedError, before anything is changed."""
        self.lesson.train()
        self.scheduler.step_update(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._mean(self._backward(batch))
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.recipe.clip is None else self.recipe.clip
        norm = float(nn.utils.clip_grad_norm_(self.lesson.parameters(), limit))
        self._refuse(terms, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1
        if self.ema is not None:
            self.ema.update(self.lesson.model)
        total = sum(weight * term for weight, term in zip(self.lesson.weights.tolist(), terms.values(), strict=True))
        return StepResult(terms, total, norm, max(float(group["lr"]) for group in self.optimizer.param_groups))

    def _backward(self, batch: Mixed) -> Tensor:
        """The gradient of the weighted sum, left on the parameters; the mean of the terms."""
        pieces = list(zip(*(each.chunk(self.recipe.accumulate) for each in self.lesson.chosen(batch)), strict=True))
        found = []
        for at, piece in enumerate(pieces):
            last = at == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms = self.wrapped(*piece)
                self.scaler.scale((terms * self.lesson.weights).sum() / len(pieces)).backward()
            found.append(terms.detach())
        return torch.stack(found).mean(dim=0)

    def _mean(self, terms: Tensor) -> dict[str, float]:
        """Over all processes, so that each of them sees what goes bad in any."""
        mean = self.accelerator.reduce(terms, reduction="mean")
        return dict(zip(self.lesson.terms, mean.tolist(), strict=True))

    def _refuse(self, terms: Mapping[str, float], norm: float) -> None:
        bad = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(norm) and not self.scaler.is_enabled():
            bad = [f"{GRADIENT} is {norm} (all loss terms are finite)"]
        if bad:
            self.optimizer.zero_grad(set_to_none=True)
            raise DivergedError(f"step {self.done + 1}: {', '.join(bad)}")

    def state(self) -> dict[str, Any]:
        """All of it, as torch saves it."""
        return {
            "model": self.lesson.model.state_dict(),
            "penalties": None if self.lesson.penalised is None else self.lesson.penalised.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {key: value for key, value in self.scheduler.state_dict().items() if _plain(value)},
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any], done: int) -> None:
        """Go on where `state` was taken, after `done` steps."""
        self.lesson.model.load_state_dict(state["model"])
        if self.lesson.penalised is not None:
            self.lesson.penalised.load_state_dict(state["penalties"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})
        self.scaler.load_state_dict(state["scaler"])
        self.done = done


def _plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (int, float, str, bool))


def _optimizer(lesson: TrainingLoss, recipe: Recipe) -> torch.optim.Optimizer:
    import timm.optim

    make: Any = timm.optim  # untyped
    betas = {} if recipe.betas is None else {"betas": recipe.betas}
    rates = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    try:
        made: torch.optim.Optimizer = make.create_optimizer_v2(lesson, opt=recipe.optimizer, **rates, **betas)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        given = f"lr {recipe.lr}, weight_decay {recipe.weight_decay}, betas {recipe.betas}"
        raise SettingError(f"timm makes no optimizer {recipe.optimizer!r} with {given}: {error}") from error
    return made


def _scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, length: tuple[int, int, int]) -> Any:
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.step_lr import StepLRScheduler

    total, warmup, cooldown = length
    rise: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": recipe.warmup_lr, "t_in_epochs": False}
    if recipe.schedule == "constant":
        return StepLRScheduler(optimizer, decay_t=total, decay_rate=1.0, **rise)
    return CosineLRScheduler(optimizer, t_initial=max(total - cooldown, 1), lr_min=recipe.min_lr, **rise)


def _average(model: nn.Module, decay: float) -> Any:
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(model, decay=decay, exclude_buffers=True)  # else weights that blocks share would be averaged once a block
