"""One step of training, and all that changes with it: weights, their average, optimizer, schedule, scaler."""

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


class DivergedError(CollapseProbeError):
    """A loss or a gradient that is NaN or infinite; the weights are those of the step before."""


@dataclass(frozen=True)
class StepResult:
    """The loss terms of a step by name (means over all processes, unweighted), their weighted sum, the norm of the gradient
    before clipping, and the learning rate.
    """

    terms: Mapping[str, float]
    total: float
    gradient_norm: float
    lr: float


class TrainStep:
    """Updates the weights once a call; `done` counts the steps. `accelerator` brings device and data parallelism."""

    def __init__(self, loss: TrainingLoss, recipe: Recipe, length: tuple[int, int, int], accelerator: Any) -> None:
        self.recipe, self.accelerator, self.done = recipe, accelerator, 0
        self.loss = loss.to(accelerator.device)
        self.optimizer = _optimizer(self.loss, recipe)
        self.scheduler = _scheduler(self.optimizer, recipe, length)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=recipe.amp == "float16")
        self.wrapped = accelerator.prepare(self.loss)
        self.ema: Any = None
        if recipe.ema is not None:
            from timm.utils.model_ema import ModelEmaV3

            # buffers are left out: weights that blocks share would be averaged once a block
            self.ema = ModelEmaV3(self.loss.model, decay=recipe.ema, exclude_buffers=True)
        share = recipe.batch_size // accelerator.num_processes
        if share % recipe.accumulate:
            raise SettingError(f"a process's share of {share} images cannot be cut into {recipe.accumulate} equal pieces")

    @property
    def best(self) -> nn.Module:
        """The model that is validated and saved: the average where there is one."""
        model: nn.Module = self.loss.model if self.ema is None else self.ema.module
        return model

    def __call__(self, batch: Mixed) -> StepResult:
        """One update of the weights. Raises DivergedError, before anything is changed."""
        self.loss.train()
        self.scheduler.step_update(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        mean = self.accelerator.reduce(self._backward(batch), reduction="mean")  # a bad value in one process stops all
        terms = dict(zip(self.loss.terms, mean.tolist(), strict=True))
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.recipe.clip is None else self.recipe.clip
        norm = float(nn.utils.clip_grad_norm_(self.loss.parameters(), limit))
        bad = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(norm) and not self.scaler.is_enabled():
            bad = [f"norm of the gradient is {norm} (all loss terms are finite)"]
        if bad:
            self.optimizer.zero_grad(set_to_none=True)
            raise DivergedError(f"step {self.done + 1}: {', '.join(bad)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1
        if self.ema is not None:
            self.ema.update(self.loss.model)
        total = sum(weight * term for weight, term in zip(self.loss.weights.tolist(), terms.values(), strict=True))
        return StepResult(terms, total, norm, max(float(group["lr"]) for group in self.optimizer.param_groups))

    def _backward(self, batch: Mixed) -> Tensor:
        """The gradient of the weighted sum, left on the parameters; the mean of the terms over the pieces of the batch."""
        pieces = list(zip(*(tensor.chunk(self.recipe.accumulate) for tensor in batch.tensors), strict=True))
        terms = []
        for at, piece in enumerate(pieces):
            with nullcontext() if at == len(pieces) - 1 else self.accelerator.no_sync(self.wrapped):
                terms_T = self.wrapped(*piece)
                self.scaler.scale((terms_T * self.loss.weights).sum() / len(pieces)).backward()
            terms.append(terms_T.detach())
        return torch.stack(terms).mean(dim=0)

    def state(self) -> dict[str, Any]:
        """All that changes, as torch saves it."""
        return {
            "model": self.loss.model.state_dict(),
            "penalties": None if self.loss.penalties is None else self.loss.penalties.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {key: value for key, value in self.scheduler.state_dict().items() if _plain(value)},
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any], done: int) -> None:
        """Go on where `state` was taken, after `done` steps."""
        self.loss.model.load_state_dict(state["model"])
        if self.loss.penalties is not None:
            self.loss.penalties.load_state_dict(state["penalties"])
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


def _optimizer(loss: TrainingLoss, recipe: Recipe) -> torch.optim.Optimizer:
    import timm.optim

    make: Any = timm.optim  # untyped
    betas = {} if recipe.betas is None else {"betas": recipe.betas}
    rates = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    try:
        optimizer: torch.optim.Optimizer = make.create_optimizer_v2(loss, opt=recipe.optimizer, **rates, **betas)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        values = f"lr {recipe.lr}, weight_decay {recipe.weight_decay}, betas {recipe.betas}"
        raise SettingError(f"timm makes no optimizer {recipe.optimizer!r} with {values}: {error}") from error
    return optimizer


def _scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, length: tuple[int, int, int]) -> Any:
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.step_lr import StepLRScheduler

    total, warmup, cooldown = length
    rise: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": recipe.warmup_lr, "t_in_epochs": False}
    if recipe.schedule == "constant":
        return StepLRScheduler(optimizer, decay_t=total, decay_rate=1.0, **rise)
    return CosineLRScheduler(optimizer, t_initial=max(total - cooldown, 1), lr_min=recipe.min_lr, **rise)
