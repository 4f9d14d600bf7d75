"""What is timed, each a function of one batch of images: the plain forward pass, capture, analyses, and what people write."""

from __future__ import annotations

import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from subjects import Case, make_model
from torch import Tensor, nn

from collapse_probe.analysis.measurement import DEFAULT_METRICS, Measurement, RunSettings, make_metrics, need_images
from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import micro_batch
from collapse_probe.data.loading import Batch
from collapse_probe.devices import autocast
from collapse_probe.metrics.metric import Metric
from collapse_probe.metrics.presets import with_presets
from collapse_probe.models.loading import resolve
from collapse_probe.provenance import versions
from collapse_probe.registry import METRICS, PRESETS

Job = Callable[[Tensor], object]
PLAIN, AGAIN, CAPTURE, DEFAULT, EVERYTHING = "plain", "plain again", "capture", "default analysis", "everything"
NEIGHBOURS = "neighbours alone"
OURS = (PLAIN, AGAIN, CAPTURE, NEIGHBOURS, DEFAULT, EVERYTHING)


class Variants:
    """The jobs of one model by name, made when they are asked for: the states of others would take memory.

    `dtype` is that of automatic mixed precision, None for float32.
    """

    def __init__(self, case: Case, device: torch.device, dtype: str | None) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.runs: dict[str, Measurement] = {}
        self._model: nn.Module | None = None
        self._plan: Plan | None = None

    @property
    def model(self) -> nn.Module:
        """The model, on the device."""
        if self._model is None:
            self._model = make_model(self.case, self.device)
        return self._model

    @property
    def plan(self) -> Plan:
        """What the probe finds in the model."""
        if self._plan is None:
            self._plan = discover_plan(self.model, (self.case.side, self.case.side))
        return self._plan

    def job(self, name: str) -> Job:
        """The job called `name`: one of OURS or of PEERS."""
        if name in (PLAIN, AGAIN):
            return self.plain
        if name == CAPTURE:
            return self.capture
        return self.analysis(name) if name in OURS else PEERS[name](self)

    def plain(self, images: Tensor) -> Tensor:
        """The forward pass alone."""
        with torch.no_grad(), autocast(self.device, self.dtype):
            output: Tensor = self.model(images)
        return output

    def capture(self, images: Tensor) -> None:
        """The forward pass with everything heard, and nothing made of it."""
        with torch.no_grad():
            for part in images.split(micro_batch(self.plan, self.device, len(images))):
                with record(self.model, self.plan) as recordings, autocast(self.device, self.dtype):
                    self.model(part)
                recordings.take()

    def analysis(self, name: str) -> Job:
        """The pass of a measurement, without its ends."""
        names = {DEFAULT: DEFAULT_METRICS, NEIGHBOURS: ("neighbour-similarity",)}.get(name)
        metrics = every_metric(self.plan) if names is None else make_metrics(self.plan, names)
        amp = {"amp": self.dtype is not None, "amp_dtype": self.dtype}
        settings = RunSettings(device=str(self.device), null_images=0, gallery_images=0, **amp)
        run = self.runs[name] = Measurement(resolve(self.model), self.plan, metrics, settings)

        def job(images: Tensor) -> None:
            first = run.tally.images
            run.update(Batch((), tuple(f"{first + i}.jpg" for i in range(len(images))), images))

        return job

    def finish(self, name: str) -> None:
        """The ends of a measurement: every number with its interval."""
        run = self.runs[name]
        run.results(run.table())


def every_metric(plan: Plan) -> dict[str, Metric]:
    """Every metric that hears images, under its plain name, and those of every preset."""
    metrics = make_metrics(plan, with_presets(METRICS, PRESETS))
    return {name: metrics[name] for name in need_images(metrics)}


def column_cosines(maps: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """What a loop over pairs of blocks makes of maps [B, H, N, N]: mean cosines of their columns. No nulls, no intervals."""
    unit = [m / np.linalg.norm(m, axis=-2, keepdims=True) for m in maps]
    matrix = np.eye(len(unit))
    for i, j in itertools.combinations(range(len(unit)), 2):
        matrix[i, j] = matrix[j, i] = (unit[i] * unit[j]).sum(-2).mean()
    return matrix


@contextmanager
def unfused():  # type: ignore[no-untyped-def]
    """timm's models that are made inside compute their maps outright."""
    timm.layers.set_fused_attn(False)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(True)


def extract_with_timm(variants: Variants) -> Job:
    """timm's AttentionExtract, NumPy after it."""
    from timm.utils import AttentionExtract

    with unfused():
        extract = AttentionExtract(make_model(variants.case, variants.device), method="fx")

    def job(images: Tensor) -> object:
        with torch.no_grad(), autocast(variants.device, variants.dtype):
            maps = extract(images)
        return column_cosines([m.float().cpu().numpy() for m in maps.values()])

    return job


def output_attentions(variants: Variants) -> Job:
    """transformers' model of the same sizes asked for its attentions, NumPy after it."""
    from transformers import ViTConfig, ViTModel

    if "deepvit" in variants.case.name:
        raise NotImplementedError("transformers has no such model")
    own: Any = variants.model
    first = own.blocks[0]
    config = ViTConfig(
        hidden_size=own.embed_dim,
        num_hidden_layers=len(own.blocks),
        num_attention_heads=first.attn.num_heads,
        intermediate_size=first.mlp.fc1.out_features,
        image_size=variants.case.side,
        patch_size=own.patch_embed.patch_size[0],
        attn_implementation="eager",
    )
    model = ViTModel(config, add_pooling_layer=False).eval().to(variants.device)

    def job(images: Tensor) -> object:
        with torch.no_grad(), autocast(variants.device, variants.dtype):
            maps = model(images, output_attentions=True).attentions
        return column_cosines([m.float().cpu().numpy() for m in maps])

    return job


def hook_and_store(variants: Variants) -> Job:
    """Forward hooks that keep the maps of every block, torch after them on the same device."""
    with unfused():
        model: Any = make_model(variants.case, variants.device)
    maps: list[Tensor] = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output.detach().float()))

    def job(images: Tensor) -> object:
        maps.clear()
        with torch.no_grad(), autocast(variants.device, variants.dtype):
            model(images)
        unit = torch.nn.functional.normalize(torch.stack(maps), dim=-2)
        return torch.stack([(unit[i] * unit).sum(-2).mean((1, 2, 3)) for i in range(len(unit))]).cpu()

    return job


PEERS: Mapping[str, Callable[[Variants], Job]] = {
    "timm AttentionExtract + NumPy": extract_with_timm,
    "output_attentions + NumPy": output_attentions,
    "hooks that store + torch": hook_and_store,
}
"""What a user would write instead: column cosines alone, no nulls, no intervals, no tokens."""


def clock(device: torch.device) -> tuple[float, float]:
    """Seconds of the wall and of this process on the processor, after the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def alternated(
    jobs: Mapping[str, Job], case: Case, device: torch.device, rounds: int, fewer: Mapping[str, int] | None = None
) -> dict[str, list[tuple[float, float]]]:
    """Seconds (wall, processor) of every job on the same batches, one batch a round, in an order that turns with the round.

    Every job runs once before; those in `fewer` take part in so many rounds only.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch(device), 3, case.side, case.side)
    for job in jobs.values():
        job(torch.randn(shape, generator=generator).to(device))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in range(rounds):
        images = torch.randn(shape, generator=generator).to(device)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn < (fewer or {}).get(name, rounds):
                start = clock(device)
                jobs[name](images)
                end = clock(device)
                seconds[name].append((end[0] - start[0], end[1] - start[1]))
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, the software, the threads and the date."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
    return {
        "date": date.today().isoformat(),
        "machine": name,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
    }


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process had: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status").read_text()  # ru_maxrss would carry over the parent's peak
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
