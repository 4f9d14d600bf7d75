"""Things that several tests make: traces out of arrays, small models, folders of real photographs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from collapse_probe.measure import make
from collapse_probe.sums import Fold
from collapse_probe.trace import Attention, Layer, Plan, SelfCheck, Tap, Trace

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10}


def plan_for(blocks, heads, tokens, width=8, prefix=(), patches=None, mixed=False):
    """A plan as the probe would make it for maps [B, blocks, heads, tokens, tokens]."""
    layers = tuple(Layer(f"blocks.{i}.attn", 0, i, "softmax", heads, tokens, tokens, mixed=mixed) for i in range(blocks))
    taps = tuple(Tap(f"blocks.{max(i - 1, 0)}", 0, "output") for i in range(blocks + 1))
    count = tokens - len(prefix) if patches is None else patches
    side = math.isqrt(count)
    return Plan(
        blocks=tuple(f"blocks.{i}" for i in range(blocks)),
        layers=layers,
        taps=taps,
        prefix=tuple(prefix),
        tokens=tokens,
        width=width,
        patch_shapes=tuple((count, width) for _ in range(blocks + 1)),
        grid=(side, side) if side * side == count else None,
        bytes_per_image=1,
        check=SelfCheck(0.0, 0.0, 0.0),
    )


def trace_of(maps, tokens=None, prefix=(), weights=None):
    """A trace of given maps [B, L, H, N, N] and tokens [B, L + 1, N, D]."""
    maps = torch.as_tensor(np.asarray(maps))
    b, blocks, heads, n, _ = maps.shape
    if tokens is None:
        tokens = np.random.default_rng(0).normal(size=(b, blocks + 1, n, 8))
    tokens = torch.as_tensor(np.asarray(tokens))
    plan = plan_for(blocks, heads, n, tokens.shape[-1], prefix, mixed=weights is not None)
    heard = tuple(
        Attention(
            owner=f"blocks.{i}.attn",
            operation="softmax",
            probs=maps[:, i],
            weights=None if weights is None else torch.as_tensor(np.asarray(weights))[:, i],
        )
        for i in range(blocks)
    )
    return Trace(plan=plan, images=b, tokens=tuple(tokens.unbind(1)), attention=heard, output=None)


def readings(traces, names, budget=2**24, image_names=None):
    """Run metrics over traces (batches of one data set) and read them."""
    metrics = {name: make(name, traces[0].plan) for name in names}
    folds: dict[object, Fold] = {}
    for metric in metrics.values():
        for key, build in metric.needs().values():
            folds.setdefault(key, None)
            folds[key] = folds[key] or build()
    records: dict[object, dict[str, list[np.ndarray]]] = {key: {} for key in folds}
    seen = 0
    for trace in traces:
        labels = [f"image {seen + i}" for i in range(trace.images)]
        labels = labels if image_names is None else image_names[seen : seen + trace.images]
        seen += trace.images
        for fold in folds.values():
            fold.begin(trace, labels)
        for tile in trace.tiles(budget):
            for fold in folds.values():
                fold.tile(tile)
        for key, fold in folds.items():
            for name, values in fold.end(trace).items():
                records[key].setdefault(name, []).append(values.double().numpy())
    joined = {key: {name: np.concatenate(parts) for name, parts in found.items()} for key, found in records.items()}
    return {
        name: metric.read(
            {part: folds[key] for part, (key, _) in metric.needs().items()},
            {part: joined[key] for part, (key, _) in metric.needs().items()},
        )
        for name, metric in metrics.items()
    }


def random_maps(shape, sharpness=1.5, seed=0):
    """Softmax maps of the given shape [..., N, N]."""
    logits = np.random.default_rng(seed).normal(size=shape) * sharpness
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def small_vit(seed=0, sharpness=1.0, **settings):
    """A small timm ViT with fresh weights whose queries and keys are `sharpness` times as large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.models.VisionTransformer(**{**SMALL, **settings}).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * model.embed_dim] *= sharpness
    return model


def photographs(folder: Path, count=6, side=96):
    """A folder of real photographs (crops of what scikit-image ships), as PNG and JPEG files."""
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    sources = [data.astronaut(), data.coffee(), data.rocket()]
    for i in range(count):
        picture = sources[i % 3]
        top, left = 37 * (i // 3), 53 * (i // 3)
        crop = Image.fromarray(picture[top : top + 220, left : left + 220]).resize((side, side))
        crop.save(folder / (f"photo_{i}.png" if i % 2 else f"photo_{i}.jpg"))
    return folder


def noise_by_class(root: Path, count, side):
    """Two class folders of noise, `count` pictures in all, dark ones first: sorted by name, they are sorted by class."""
    digits = len(str(count - 1))
    for i in range(count):
        dark = i < count // 2
        folder = root / ("a_dark" if dark else "b_bright")
        folder.mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (side, side, 3))
        Image.fromarray((noise * (0.1 if dark else 1.0)).astype(np.uint8)).save(folder / f"{i:0{digits}d}.png")
    return root
