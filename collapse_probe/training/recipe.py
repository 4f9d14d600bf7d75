"""A recipe: everything that decides a training run but the data, as plain values that can be varied and written down."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from collapse_probe.errors import SettingError
from collapse_probe.models.architecture import OWN_FIELDS, TIMM_NAMES, Architecture
from collapse_probe.models.fixes.apply import read_fix
from collapse_probe.models.vit import ViTSettings
from collapse_probe.registry import PENALTIES
from collapse_probe.settings import between

FORMAT = "collapse-probe/recipe/1"
PARTS = ("warmup", "cooldown")
EVERY = ("log_every", "evaluate_every", "monitor_every", "snapshot_every", "checkpoint_every")
FREE = ("about", "workers", "monitor_images", "monitor_gram_drift", *EVERY)  # a resumed run may change these
ARCHITECTURE = ("model", "model_kwargs", "fixes", "embedding_std")
PenaltyTerm = tuple[float, Mapping[str, Any]]  # coefficient, settings


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images.

    On whole batches, in normalised pixels: `shift` by up to that many pixels each way, `contrast` times
    1 ± up to that much, `noise` of that standard deviation, `flip` of every second image. By picture, with
    timm's transforms, where any of these is set: `crop` (least share of the area of a random resized crop),
    `auto_augment`, `color_jitter`, `erase` (probability of random erasing with noise).
    """

    shift: int = 0
    contrast: float = 0.0
    noise: float = 0.0
    flip: bool = False
    crop: float | None = None
    auto_augment: str | None = None
    color_jitter: float | None = None
    erase: float = 0.0

    @property
    def by_picture(self) -> bool:
        """Whether pictures must be decoded anew each time, rather than held in memory as one tensor."""
        return self.crop is not None or bool(self.auto_augment) or bool(self.color_jitter) or self.erase > 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete training run.

    model, model_kwargs, fixes,   the architecture (see `Architecture`)
    embedding_std
    penalties                     {name: (coefficient, settings)}: loss = cross entropy + Σ coefficient · term
    optimizer, lr, betas,         timm's optimizer of that name; `betas` None: its own; biases and norms do not
    weight_decay, clip            decay; `clip` is the largest norm of the gradient
    epochs or steps               the length (one of the two); an epoch leaves out the last incomplete batch
    warmup, cooldown              in the unit of the length: linear warm-up from `warmup_lr`, then the cosine (or
    schedule                      "constant"), then `cooldown` at `min_lr`
    batch_size                    images per step, over all processes; each takes its share in `accumulate` pieces
    mixup, cutmix, switch         timm's Mixup, by batch; 0 is off
    ema                           decay of the average of the weights that is validated and saved; None: no average
    amp                           "bfloat16", "float16" or None
    recalibrate                   batches over which BatchNorm is re-estimated before it is validated or saved
    val_share                     what is held out, by class, of data that have no split of their own
    *_every                       steps between two; 0 is never (evaluations and the model file at the end are always)
    """

    name: str
    about: str = ""
    data: str = ""
    model: str | ViTSettings
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    fixes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    embedding_std: float | None = None
    penalties: Mapping[str, PenaltyTerm] = field(default_factory=dict)
    optimizer: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] | None = None
    weight_decay: float = 0.05
    clip: float | None = None
    epochs: int | None = None
    steps: int | None = None
    warmup: int = 0
    cooldown: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    batch_size: int = 32
    accumulate: int = 1
    augmentation: Augmentation = Augmentation()
    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5
    label_smoothing: float = 0.0
    ema: float | None = None
    amp: Literal["bfloat16", "float16"] | None = None
    recalibrate: int = 0
    seed: int = 0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    val_share: float = 0.2
    workers: int = 0
    log_every: int = 20
    evaluate_every: int = 0
    monitor_every: int = 0
    monitor_images: int = 64
    monitor_gram_drift: bool = False
    snapshot_every: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        _check(self)

    @property
    def architecture(self) -> Architecture:
        """The model and its fixes."""
        return Architecture(**{name: getattr(self, name) for name in ARCHITECTURE})

    def length(self, steps_per_epoch: int) -> tuple[int, int, int]:
        """Steps, those of the warm-up and those of the cooldown, for data of `steps_per_epoch`."""
        if self.steps is not None:
            return self.steps, self.warmup, self.cooldown
        assert self.epochs is not None
        return self.epochs * steps_per_epoch, self.warmup * steps_per_epoch, self.cooldown * steps_per_epoch

    def vary(self, **changes: Any) -> Recipe:
        """The recipe with some values changed: its fields, the settings of its model (`depth`, `width`,
        `heads`, …), `fix` (one name, `NAME:K=V`, several, or None for none) and `penalty` ({name:
        coefficient}, or None).

        `augmentation` takes a mapping of what changes. New `steps` or `epochs` keep the shares of warm-up and cooldown, unless
        these are changed too. All changes are made at once. Raises SettingError for a name that nothing has, and for a recipe
        that cannot be.
        """
        settings = {name: value for name, value in changes.items() if name in (*OWN_FIELDS, *TIMM_NAMES)}
        own: dict[str, Any] = {}
        try:
            for name, value in changes.items():
                own |= {} if name in settings else self._change(name, value)
            own |= {part: changes[part] for part in PARTS if part in changes}
            made = Architecture(**{name: own.get(name, getattr(self, name)) for name in ARCHITECTURE}).varied(settings)
            return replace(self, **{**own, "model": made.model, "model_kwargs": made.model_kwargs})
        except TypeError as error:
            asked = ", ".join(f"{name}={value!r}" for name, value in changes.items())
            raise SettingError(f"the recipe {self.name} cannot have {asked}: {error}") from error

    def _change(self, name: str, value: Any) -> dict[str, Any]:
        """The fields that change where `name` is set to `value`."""
        if name == "fix":
            return {"fixes": dict(read_fix(word) for word in ([value] if isinstance(value, str) else value or ()))}
        if name == "penalty":  # the settings that the recipe has for a penalty stay
            weights = dict(value or {})
            for penalty in weights:
                PENALTIES[penalty]  # an unknown name is refused
            return {
                "penalties": {key: (float(weight), self.penalties.get(key, (0.0, {}))[1]) for key, weight in weights.items()}
            }
        if name in ("steps", "epochs"):
            if type(value) is not int or value < 1:
                raise SettingError(f"{name} must be a whole number from 1 up, not {value!r}")
            before = self.steps or self.epochs or 1
            return {"steps": None, "epochs": None, name: value, **{p: round(getattr(self, p) * value / before) for p in PARTS}}
        if name == "augmentation" and isinstance(value, Mapping):
            known = [f.name for f in fields(Augmentation)]
            if unknown := [key for key in value if key not in known]:
                raise SettingError(f"augmentation has {', '.join(known)}, not {', '.join(unknown)}")
            return {name: replace(self.augmentation, **value)}
        if name not in FIELDS:
            known = sorted({*FIELDS, *OWN_FIELDS, "fix", "penalty"})
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise SettingError(f"a recipe has no {name!r}; did you mean {', '.join(near)}?")
        return {name: value}

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain values."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ARCHITECTURE}
        own["penalties"] = {name: [weight, dict(settings)] for name, (weight, settings) in self.penalties.items()}
        own["augmentation"] = asdict(self.augmentation)
        content = {"format": FORMAT, **own, "architecture": self.architecture.plain()}
        plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
        return plain

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """How this recipe differs from one as `to_json` wrote it, in what decides the weights; see `differences`."""
        now = {key: value for key, value in self.to_json().items() if key not in FREE}
        return differences({key: before.get(key) for key in now}, now)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote; SettingError for anything else."""
        if content.get("format") != FORMAT:
            raise SettingError(f"this is no recipe: its format is {content.get('format')!r}, expected {FORMAT!r}")
        own = {key: value for key, value in content.items() if key not in ("format", "architecture")}
        made = Architecture.of_plain(content["architecture"])
        try:
            own["penalties"] = {name: (weight, settings) for name, (weight, settings) in own["penalties"].items()}
            own["augmentation"] = Augmentation(**own["augmentation"])
            for name in ("betas", "mean", "std"):
                own[name] = None if own[name] is None else tuple(own[name])
            return cls(**{name: getattr(made, name) for name in ARCHITECTURE}, **own)
        except (KeyError, TypeError, ValueError) as error:
            raise SettingError(f"these values describe no recipe: {error}") from error


FIELDS = tuple(f.name for f in fields(Recipe))


def _check(recipe: Recipe) -> None:
    def demand(name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise SettingError(f"recipe {recipe.name}: {name} must be {expected}, not {getattr(recipe, name)!r}")

    if (recipe.steps is None) == (recipe.epochs is None):
        raise SettingError(f"recipe {recipe.name}: give its length either in steps or in epochs")
    unit = "steps" if recipe.steps is not None else "epochs"
    from_zero = (*PARTS, *EVERY, "recalibrate", "workers", "seed")
    from_one = ("batch_size", "accumulate", "monitor_images", unit)
    for low, names in ((0, from_zero), (1, from_one)):
        for name in names:
            value = getattr(recipe, name)
            demand(name, type(value) is int and value >= low, f"a whole number from {low} up")
    length = getattr(recipe, unit)
    demand("warmup", recipe.warmup + recipe.cooldown <= length, f"so short that it and the cooldown fit into {length}")
    for name in ("lr", "weight_decay", "mixup", "cutmix", "warmup_lr", "min_lr"):
        demand(name, between(getattr(recipe, name), 0, math.inf), "a number from 0 up")
    for name in ("label_smoothing", "switch", "val_share"):
        demand(name, between(getattr(recipe, name), 0, 1), "a number from 0 to 1")
    demand("clip", recipe.clip is None or (between(recipe.clip, 0, math.inf) and recipe.clip > 0), "a number above 0, or None")
    demand("ema", recipe.ema is None or between(recipe.ema, 0, 1), "a decay from 0 to 1, or None")
    demand("val_share", 0 < recipe.val_share < 1, "a share between 0 and 1")
    demand("monitor_gram_drift", isinstance(recipe.monitor_gram_drift, bool), "true or false")
    demand("amp", recipe.amp in (None, "bfloat16", "float16"), "bfloat16, float16 or None")
    demand("schedule", recipe.schedule in ("cosine", "constant"), "cosine or constant")
    mixes = recipe.mixup > 0 or recipe.cutmix > 0
    demand("batch_size", not mixes or recipe.batch_size % 2 == 0, "even where images are mixed in pairs")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """What differs between two plain mappings, by dotted name.

    >>> differences({"lr": 1, "vit": {"depth": 2}}, {"lr": 1, "vit": {"depth": 3}})
    ['vit.depth (2 then, 3 now)']
    """
    lines = []
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += differences(one, other, f"{within}{key}.")
        elif one != other:
            lines.append(f"{within}{key} ({one!r} then, {other!r} now)")
    return lines
