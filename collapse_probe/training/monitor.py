"""A monitor of a training: at certain steps it measures the model on a few fixed images, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from collapse_probe.analysis.analyze import measure
from collapse_probe.analysis.comparison import first_patches
from collapse_probe.analysis.comparison.first_patches import LastPatches
from collapse_probe.analysis.comparison.gram_drift import NAME as GRAM_DRIFT
from collapse_probe.analysis.measurement import DEFAULT_METRICS, PROBS_METRICS, SKIP, RunSettings, restored
from collapse_probe.data.images import ImageSet, check_count, images_from
from collapse_probe.data.preprocessing import Preprocess, from_callable, given_pixels
from collapse_probe.distributed import alone, rank_and_world
from collapse_probe.errors import DataError, ModelError, NonFiniteError, SettingError
from collapse_probe.files import check_writable
from collapse_probe.models.loading import Subject, resolve
from collapse_probe.results.findings import Findings
from collapse_probe.seeding import random_kept
from collapse_probe.settings import names_in
from collapse_probe.training.alarm import Alarm, Save, save_weights
from collapse_probe.training.logs.log import Log

Points = Callable[[int, dict[str, float]], None]
Transform = Callable[[Image], Tensor]
NONFINITE = "nonfinite"
GROUP = "collapse"
SQUARE = (("block", "block"), ("depth", "depth"))


class Monitor:
    """Measures a model on the same few images whenever `step` is a multiple of `every`::

        monitor = Monitor("photos/", every=1000, folder="monitor")
        for step, (images, labels) in enumerate(loader):
            ...
            monitor.step(model, step)

    `data` is a data address, an ImageSet or a data set of (image, label), of which a seeded subset of `limit` images is
    taken, or images made ready as a float tensor [n, 3, height, width] (the first `limit`). `metrics` are names as in
    `analyze`, by default its default set; no untrained copy is measured, which would be the same at every step.
    `preprocess` is a Preprocess or a transform from picture to tensor; by default what the model declares. With a `folder`
    each measurement becomes a findings folder, `folder/step-0001000`; `collapse-probe compare folder` draws all of them
    over the training. `log` is a log of `collapse_probe.training.logs` (TensorBoard, Weights & Biases, trackio, MLflow), or
    any object like it: it takes the defined numbers of the summary as `collapse/NAME`, every block × block matrix as a picture
    and, with a `folder`, each findings folder. Or it is a function of (step, numbers), which takes the numbers alone.

    The training goes on as if the monitor were not there: train and eval modes, random states, buffers, gradients and autocast
    are as before, after errors too. The measurement itself is in eval mode, in the parameters' own precision, with the
    BatchNorm statistics of the moment (which lag behind early in a training). It runs only in the process that calls it and
    waits for no other. Hooks of one's own on the model are called for the monitor's forward passes as well. Weights and
    activations that are NaN or infinite stop no training: images that have some are left out, and their share is in the row
    (`nonfinite`); where nothing is left the row holds that alone, and `unmeasured` (by step) and a text in `folder` say why.

    With an `alarm` the training stops where a number of the summary passes a threshold, as those of `--fail-on` are written
    (`alarm="attention_entropy_share < 0.05"`, or several): `step` raises AlarmError, which names the number, where it is
    lowest or highest, and the file of the newest model for which no alarm held. That is `folder/last-good/step-0001000.pth`,
    written at every measurement in place of the one before (`save` writes it otherwise); no state is kept in memory, and none
    without a `folder`. A number of the summary is a mean over blocks and heads, and the alarm is about the mean. One that
    cannot be told trips, and so does any alarm where activations are not finite. Under torch.distributed call `step` in every
    process, of monitors made alike: the first one measures, and all raise.

    With `gram_drift` each measurement also says how far the similarities between the patches of an image have moved since the
    first one, after the last block: the metric `gram-drift`, and `gram_drift_last` in the summary with the ends of its interval
    over images. For that the patches of the first measurement are kept in float32 on the CPU (images × patches × width × 4
    bytes: 37 MiB for 64 images of a ViT-B/16), and with a `folder` in `folder/gram-drift/first.pt`, from where a training that
    goes on takes them; one that begins at their step or before replaces them. It costs one more forward pass.
    """

    def __init__(
        self,
        data: str | Path | ImageSet | Tensor | Dataset[Any],
        *,
        every: int,
        folder: str | Path | None = None,
        limit: int | None = 64,
        metrics: str | Sequence[str] = (),
        preprocess: Preprocess | Transform | None = None,
        seed: int = 0,
        log: Log | Points | None = None,
        alarm: str | Sequence[str] = (),
        save: Save = save_weights,
        gram_drift: bool = False,
    ) -> None:
        if every < 1:
            raise SettingError(f"a monitor measures every so many steps, from 1 on, not every {every}")
        self.every, self.log, self.seed = every, log, seed
        self.images = _images(data, limit, seed)
        self.metrics = names_in(metrics)
        self.preprocess = _preprocess(preprocess, self.images)
        self.unmeasured: dict[int, str] = {}
        self.gram_drift = gram_drift
        self._first: LastPatches | None = None
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and rank_and_world()[0] == 0:
            check_writable(self.folder)
        asked = (*(self.metrics or (*DEFAULT_METRICS, *PROBS_METRICS)), *((GRAM_DRIFT,) if gram_drift else ()))
        self.alarm = Alarm(names_in(alarm), asked, self.folder, save) if alarm else None

    def wanted_in(self, first: bool) -> bool:
        """Whether `step` is to be called in this process, `first` or another one of the training."""
        return first or (self.alarm is not None and rank_and_world()[1] > 1)

    def step(self, model: nn.Module, step: int) -> Findings | None:
        """Measure `model` where `step` is a multiple of `every`, write and log the findings, and return them; None at other
        steps, and where the model is not finite.

        `model` may be wrapped in DistributedDataParallel or torch.compile. Raises AlarmError where an alarm holds, after what
        was measured is written and logged, ModelError for parameters that are spread over devices or processes,
        CollapseProbeError where the model cannot be measured.
        """
        if step % self.every:
            return None
        if self.alarm is None:
            return self._step(model, step)[0]
        findings, tripped = None, None
        if rank_and_world()[0] == 0:
            try:
                findings, why = self._step(model, step)
                tripped = self.alarm.undecided(step, why) if findings is None else self.alarm.judge(findings, step)
                if tripped is None:
                    self.alarm.keep(model, step)
            except BaseException as error:
                self.alarm.failed(error)
                raise
        if (tripped := self.alarm.everywhere(tripped)) is not None:
            raise tripped.error()
        return findings

    def _step(self, model: nn.Module, step: int) -> tuple[Findings | None, str]:
        """The findings, written and logged; or why there are none."""
        try:
            findings = self.measure(model, step)
        except NonFiniteError as error:
            self._say_why(step, str(error))
            return None, str(error)
        if self.folder is not None:
            findings.save(self.folder / f"step-{step:07d}")
        self._log(step, row_of(findings))
        if isinstance(self.log, Log):
            for name, result in findings.metrics.items():
                if result.values is not None and result.dims in SQUARE:
                    self.log.image(step, f"{GROUP}/{name}", pixels(findings.plot(name)))
            if self.folder is not None:
                self.log.artifact(step, "findings", self.folder / f"step-{step:07d}")
        return findings, ""

    def _log(self, step: int, row: dict[str, float]) -> None:
        if isinstance(self.log, Log):
            self.log.numbers(step, {f"{GROUP}/{name}": value for name, value in row.items()})
        elif self.log is not None:
            self.log(step, row)

    def _say_why(self, step: int, why: str) -> None:
        """Nothing could be measured at `step`: into the log, and beside the findings of other steps."""
        self.unmeasured[step] = why
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"step-{step:07d}.txt").write_text(f"not measured: {why}\n", encoding="utf-8")
        self._log(step, {NONFINITE: 1.0})

    def measure(self, model: nn.Module, step: int) -> Findings:
        """The findings of `model` now, at any `step`; nothing is logged, and only the start of a `gram_drift` is written."""
        device = _device(model)
        settings = RunSettings(device=str(device), seed=self.seed, metrics=self.metrics, null_images=0, on_nonfinite=SKIP)
        with undisturbed(model, device), alone():
            subject = replace(resolve(model), weights=f"in training, at step {step}")
            if self.preprocess is not None:
                subject = replace(subject, preprocess=self.preprocess, notes=())
            findings = measure(subject, self.images, settings)
            if self.gram_drift:
                findings = self._with_drift(findings, subject, step)
        return findings.with_run(step=step)

    def _with_drift(self, findings: Findings, subject: Subject, step: int) -> Findings:
        """The findings with the drift from the first measurement, which this one may be."""
        content = str(findings.data.get("content_sha256"))
        device = str(_device(subject.model))
        now = LastPatches.of(subject, self.images, device=device, seed=self.seed, step=step, content=content)
        if self._first is None and self.folder is not None:
            stored = LastPatches.read(self.folder)
            self._first = stored if stored is not None and stored.step < step and stored.content == content else None
        if self._first is None:
            self._first = now
            if self.folder is not None:
                now.write(self.folder)
        result = self._first.drift_to(now)
        metrics = {**findings.metrics, GRAM_DRIFT: result}
        return replace(findings, metrics=metrics, summary={**findings.summary, **first_patches.last(result)})


def pixels(figure: Any) -> NDArray[np.uint8]:
    """A figure of matplotlib as bytes [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def row_of(findings: Findings) -> dict[str, float]:
    """The defined numbers of the summary, and the share of images that were left out because they are not finite, if any."""
    ill = findings.run.get("nonfinite") or {}
    share = {NONFINITE: ill["images"] / ill["of"]} if ill.get("images") else {}
    return {**share, **{name: float(value) for name, value in findings.summary.items() if value is not None}}


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """After the `with` modes, buffers and random states are as before; inside, autocast is off."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    autocast = torch.autocast(device.type, enabled=False)
    with random_kept(device), torch.inference_mode(False), torch.no_grad(), autocast:
        try:
            with restored(model):
                yield
        finally:
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # a needless write would break a backward pass that still reads it
                    buffer.copy_(before)


def _device(model: nn.Module) -> torch.device:
    parameters = list(model.parameters())
    devices = {p.device for p in parameters}
    if len(devices) != 1:
        came = ", ".join(sorted(map(str, devices))) or "none"
        raise ModelError(f"a monitor takes a model whose parameters are on one device; they are on {came}")
    sharded = any(type(p).__name__ == "DTensor" or hasattr(p, "_sharded_size") for p in parameters)
    if sharded or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ModelError(
            "the parameters are sharded over processes (FSDP), so that one process alone cannot run the model; "
            "measure its gathered checkpoints with compare"
        )
    return devices.pop()


def _images(data: Any, limit: int | None, seed: int) -> ImageSet:
    if isinstance(data, Tensor) and limit is not None:
        check_count(limit)
        data, limit = data[:limit], None
    images = images_from(data, limit=limit, seed=seed)
    if not isinstance(images, ImageSet):
        raise DataError("a monitor measures the same images again and again: give an address, a tensor or a data set")
    return images


def _preprocess(given: Preprocess | Transform | None, images: ImageSet) -> Preprocess | None:
    if images.shape is not None:
        if given is not None:
            raise SettingError("images that come as a tensor are made ready already; leave preprocess out")
        channels, *size = images.shape
        return given_pixels(channels, (size[0], size[1]))
    if given is None or isinstance(given, Preprocess):
        return given
    return from_callable(given, {"transform": repr(given)[:500]})
