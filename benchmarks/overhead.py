"""What listening and analysing cost, as ratios to the plain forward pass of the same model on the same images, in one run.

    python benchmarks/overhead.py                       CPU: ViT-B/32, ViT-S/16 (224), ViT-S/16 at 1025 tokens (memory)
    python benchmarks/overhead.py --device cuda         also ViT-B/16 in bf16 at batch 256, and what the kernels return

"analysis" is the default set of metrics, "everything" every metric that hears images with those of every preset, each once.
The variants are interleaved in small batches, so that a busy machine slows all of them alike. Times are CPU seconds of this
process on the CPU, and synchronised wall seconds on a GPU. The peer is what a user would write instead: timm's
AttentionExtract and a NumPy loop over pairs of blocks.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from pathlib import Path

import numpy as np
import timm
import torch

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

IMAGES, BATCH = 256, 16
MODELS = {"vit_base_patch32_224": 1.3, "vit_small_patch16_224": 1.6}
CAPTURE_LIMIT, EVERYTHING_LIMIT, MEMORY_LIMIT = 1.10, 2.5, 1.20


def model_called(name: str, device: torch.device, **settings: object) -> torch.nn.Module:
    """A model with fresh weights and queries and keys large enough that its maps are peaked."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000, **settings).eval().to(device)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 4
    return model


def clock(device: torch.device) -> float:
    """Seconds: CPU time of this process, or wall time after the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def variants(model: torch.nn.Module, size: int, device: torch.device, amp: str | None) -> dict[str, Callable]:
    """What is timed, each a function of one batch."""
    plan = discover_plan(model, (size, size))
    sets = {"analysis": make_metrics(plan, DEFAULT_METRICS), "everything": every_metric(plan)}

    subject = resolve(model)
    settings = RunSettings(device=str(device), amp=amp is not None, amp_dtype=amp or "float16", null_images=0, gallery_images=0)

    @cache
    def run_of(variant: str) -> Measurement:
        return Measurement(subject, plan, sets[variant], settings)  # made when needed: the states of others take memory

    def plain(images: torch.Tensor) -> None:
        with torch.no_grad(), autocast(device, amp):
            model(images)

    def capture(images: torch.Tensor) -> None:
        with torch.no_grad():
            for part in images.split(micro_batch(plan, device, len(images))):
                with record(model, plan) as ears, autocast(device, amp):
                    model(part)
                ears.take()

    def measured(variant: str, images: torch.Tensor) -> None:
        run = run_of(variant)
        first = run.tally.images
        run.update(Batch((), tuple(str(first + i) for i in range(len(images))), images))

    def finish(variant: str) -> None:
        run = run_of(variant)
        run.results(run.table())

    timed = {variant: partial(measured, variant) for variant in sets}
    ends = {f"{variant} end": partial(finish, variant) for variant in sets}
    return {"plain": plain, "plain again": plain, "capture": capture, **timed, **ends}


def every_metric(plan: Plan) -> dict[str, Metric]:
    """Every metric that hears images, under its plain name, and those of every preset."""
    metrics = make_metrics(plan, with_presets(METRICS, PRESETS))
    return {name: metrics[name] for name in need_images(metrics)}


def peer(name: str) -> Callable[[torch.Tensor], None]:
    """timm's AttentionExtract and a NumPy loop over pairs: column cosines alone, no nulls, no intervals, no tokens."""
    from timm.utils import AttentionExtract

    timm.layers.set_fused_attn(False)
    model = model_called(name, torch.device("cpu"))
    timm.layers.set_fused_attn(True)
    extract = AttentionExtract(model, method="fx")

    def run(images: torch.Tensor) -> None:
        with torch.no_grad():
            maps = [m.numpy() for m in extract(images).values()]
        unit = [m / np.linalg.norm(m, axis=-2, keepdims=True) for m in maps]
        matrix = np.eye(len(unit))
        for i in range(len(unit)):
            for j in range(i):
                matrix[i, j] = (unit[i] * unit[j]).sum(-2).mean()

    return run


def timed(name: str, device: torch.device, amp: str | None, images: int, batch: int) -> dict[str, float]:
    """Seconds of each variant over the same images, interleaved."""
    model = model_called(name, device)
    size = model.pretrained_cfg["input_size"][-1]
    jobs = variants(model, size, device, amp)
    ends = {name.removesuffix(" end"): jobs.pop(name) for name in list(jobs) if name.endswith(" end")}
    if device.type == "cpu":
        jobs["peer"] = peer(name)
    seconds = dict.fromkeys(jobs, 0.0)
    generator = torch.Generator().manual_seed(1)
    for job in jobs.values():
        job(torch.randn(batch, 3, size, size, generator=generator).to(device))
    for _ in range(images // batch):
        pixels = torch.randn(batch, 3, size, size, generator=generator).to(device)
        for variant, job in jobs.items():
            start = clock(device)
            job(pixels)
            seconds[variant] += clock(device) - start
    for variant, finish in ends.items():
        start = clock(device)
        finish()
        seconds[variant] += clock(device) - start
    return seconds


def peak_memory(variant: str, side: int = 512) -> int:
    """Peak resident bytes of one variant in a process of its own, ViT-S/16 at 1025 tokens, batch 4."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", variant, "--side", str(side)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def show_peak(variant: str, side: int) -> None:
    """The child process of `peak_memory`."""
    device = torch.device("cpu")
    model = model_called("vit_small_patch16_224", device, img_size=side)
    pixels = torch.randn(4, 3, side, side)
    with torch.no_grad():
        model(pixels)
    if variant != "plain":
        job = variants(model, side, device, None)[variant]
        for _ in range(2):
            job(pixels)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would carry over the parent's peak
    print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))


def kernels_on_gpu() -> list[str]:
    """The kernels that PyTorch chooses on this GPU, what they return, and whether listening changes the logits."""
    lines, device = [], torch.device("cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = model_called("vit_base_patch16_224", device).to(dtype)
        images = torch.randn(4, 3, 224, 224, device=device, dtype=dtype)
        with torch.no_grad():
            before = model(images)
            with record(model, discover_plan(model, (224, 224))) as ears:
                after = model(images)
        heard = ears.last.attention[0]
        shape = None if heard.logsumexp is None else tuple(heard.logsumexp.shape)
        lines.append(
            f"{dtype}: {heard.operation}, logsumexp {shape}, q {tuple(heard.q.shape)}, equal {torch.equal(before, after)}"
        )
    return lines


def hardware(device: torch.device) -> str:
    """What this ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Run, print the table, store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, default=512, help=argparse.SUPPRESS)
    parser.add_argument("--store", action="store_true", help="keep the result under benchmarks/results")
    args = parser.parse_args()
    if args.peak_of:
        show_peak(args.peak_of, args.side)
        return
    device = torch.device(args.device)
    found: dict[str, object] = {
        "date": str(date.today()),
        "hardware": hardware(device),
        "versions": versions(),
        "images": args.images,
    }
    table = []
    jobs = (
        [("vit_base_patch16_224", "bfloat16", 256, 2.0)]
        if device.type == "cuda"
        else [(n, None, BATCH, limit) for n, limit in MODELS.items()]
    )
    for name, amp, batch, limit in jobs:
        seconds = timed(name, device, amp, max(args.images, batch), batch)
        ratios = {variant: value / seconds["plain"] for variant, value in seconds.items()}
        limits = {"capture": CAPTURE_LIMIT, "analysis": limit, "everything": EVERYTHING_LIMIT}
        found[name] = {"seconds": seconds, "ratios": ratios, "limits": limits}
        lines = [f"{name:<24} {v:<12} {seconds[v]:8.2f} s  {ratios[v]:5.2f} × plain" for v in seconds]
        print("\n".join(lines), flush=True)
    if device.type == "cuda":
        found["kernels"] = kernels_on_gpu()
        table += found["kernels"]
    else:
        peaks = {variant: peak_memory(variant) for variant in ("plain", "capture", "analysis")}
        found["peak memory at 1025 tokens"] = {**peaks, "limit": MEMORY_LIMIT}
        table += [
            f"1025 tokens, batch 4       {v:<12} {b / 2**20:8.0f} MiB {b / peaks['plain']:5.2f} × plain"
            for v, b in peaks.items()
        ]
    print("\n".join(table))
    if args.store:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        path = folder / f"overhead-{found['date']}-{device.type}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"stored {path}")


if __name__ == "__main__":
    main()
