"""A recipe: everything that decides a training run but the data, as plain values that can be varied and written down."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from collapse_probe.errors import SettingError
from collapse_probe.models.architecture import OWN_FIELDS, TIMM_NAMES, Architecture, read_fix
from collapse_probe.models.vit import ViTSettings
from collapse_probe.registry import PENALTIES

FORMAT = "collapse-probe/recipe/1"
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

        `augmentation` takes a mapping of what changes. New `steps` or `epochs` keep the shares of warm-up and
        cooldown. Raises SettingError for a name that nothing has.
        """
        recipe = self
        for name, value in changes.items():
            recipe = _varied(recipe, name, value)
        return recipe

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain values."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ARCHITECTURE}
        own["penalties"] = {name: [weight, dict(settings)] for name, (weight, settings) in self.penalties.items()}
        own["augmentation"] = asdict(self.augmentation)
        held = {"format": FORMAT, **own, "architecture": self.architecture.plain()}
        plain: dict[str, Any] = json.loads(json.dumps(held, allow_nan=False))
        return plain

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote; SettingError for anything else."""
        if held.get("format") != FORMAT:
            raise SettingError(f"this is no recipe: its format is {held.get('format')!r}, expected {FORMAT!r}")
        own = {key: value for key, value in held.items() if key not in ("format", "architecture")}
        made = Architecture.of_plain(held["architecture"])
        try:
            own["penalties"] = {name: (weight, settings) for name, (weight, settings) in own["penalties"].items()}
            own["augmentation"] = Augmentation(**own["augmentation"])
            for name in ("betas", "mean", "std"):
                own[name] = None if own[name] is None else tuple(own[name])
            return cls(**{name: getattr(made, name) for name in ARCHITECTURE}, **own)
        except (KeyError, TypeError, ValueError) as error:
            raise SettingError(f"these values describe no recipe: {error}") from error


FIELDS = tuple(f.name for f in fields(Recipe))


def _varied(recipe: Recipe, name: str, value: Any) -> Recipe:
    if name == "fix":
        words = [value] if isinstance(value, str) else list(value or ())
        return replace(recipe, fixes=dict(read_fix(word) for word in words))
    if name == "penalty":
        return replace(recipe, penalties={key: _term(key, weight, recipe) for key, weight in dict(value or {}).items()})
    if name in ("steps", "epochs"):
        return _lengthened(recipe, name, value)
    if name == "augmentation" and isinstance(value, Mapping):
        return replace(recipe, augmentation=_changed(recipe.augmentation, value))
    if name in FIELDS:
        return replace(recipe, **{name: value})
    if name in OWN_FIELDS or name in TIMM_NAMES:
        made = recipe.architecture.varied(name, value)
        return replace(recipe, model=made.model, model_kwargs=made.model_kwargs)
    known = sorted({*FIELDS, *OWN_FIELDS, "fix", "penalty"})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    raise SettingError(f"a recipe has no {name!r}; did you mean {', '.join(near)}?")


def _term(name: str, weight: Any, recipe: Recipe) -> PenaltyTerm:
    """The coefficient with the settings that the recipe has for this penalty; a name that exists."""
    PENALTIES[name]
    return float(weight), recipe.penalties.get(name, (0.0, {}))[1]


def _changed(augmentation: Augmentation, changes: Mapping[str, Any]) -> Augmentation:
    try:
        return replace(augmentation, **changes)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(Augmentation))
        raise SettingError(f"augmentation has {known}, not {', '.join(changes)}") from error


def _lengthened(recipe: Recipe, unit: str, value: int) -> Recipe:
    before = recipe.steps if recipe.steps is not None else recipe.epochs
    assert before is not None
    if type(value) is not int or value < 1:
        raise SettingError(f"{unit} must be a whole number from 1 up, not {value!r}")
    warmup, cooldown = (round(part * value / before) for part in (recipe.warmup, recipe.cooldown))
    steps, epochs = (value, None) if unit == "steps" else (None, value)
    return replace(recipe, warmup=warmup, cooldown=cooldown, steps=steps, epochs=epochs)


def _check(recipe: Recipe) -> None:
    def demand(name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise SettingError(f"recipe {recipe.name}: {name} must be {expected}, not {getattr(recipe, name)!r}")

    if (recipe.steps is None) == (recipe.epochs is None):
        raise SettingError(f"recipe {recipe.name}: give its length either in steps or in epochs")
    length = recipe.steps if recipe.steps is not None else recipe.epochs
    wholes = ("warmup", "cooldown", "recalibrate", "workers", "log_every", "evaluate_every", "monitor_every")
    for name in (*wholes, "snapshot_every", "checkpoint_every", "seed"):
        demand(name, type(getattr(recipe, name)) is int and getattr(recipe, name) >= 0, "a whole number from 0 up")
    for name in ("batch_size", "accumulate", "monitor_images"):
        demand(name, type(getattr(recipe, name)) is int and getattr(recipe, name) >= 1, "a whole number from 1 up")
    demand("steps" if recipe.steps is not None else "epochs", type(length) is int and length >= 1, "a whole number from 1 up")
    assert length is not None
    demand("warmup", recipe.warmup + recipe.cooldown <= length, f"so short that it and the cooldown fit into {length}")
    for name in ("lr", "weight_decay", "mixup", "cutmix", "warmup_lr", "min_lr"):
        demand(name, _number(getattr(recipe, name), math.inf), "a number from 0 up")
    for name in ("label_smoothing", "switch"):
        demand(name, _number(getattr(recipe, name), 1.0), "a number from 0 to 1")
    demand("clip", recipe.clip is None or (_number(recipe.clip, math.inf) and recipe.clip > 0), "a number above 0, or None")
    demand("ema", recipe.ema is None or _number(recipe.ema, 1.0), "a decay from 0 to 1, or None")
    demand("val_share", _number(recipe.val_share, 1.0) and 0 < recipe.val_share < 1, "a share between 0 and 1")
    demand("amp", recipe.amp in (None, "bfloat16", "float16"), "bfloat16, float16 or None")
    demand("schedule", recipe.schedule in ("cosine", "constant"), "cosine or constant")
    mixes = recipe.mixup > 0 or recipe.cutmix > 0
    demand("batch_size", not mixes or recipe.batch_size % 2 == 0, "even where images are mixed in pairs")


def _number(value: object, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most
