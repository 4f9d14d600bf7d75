"""Things that several tests make: traces out of arrays, small models, folders of real photographs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from collapse_probe.capture.plan import Layer, Plan, SelfCheck, Tap
from collapse_probe.capture.trace import Attention, Trace
from collapse_probe.metrics.accumulators import Accumulator
from collapse_probe.metrics.metric import make
from collapse_probe.provenance import names_sha256
from collapse_probe.results.findings import Findings, Gallery, MetricResult, Nulls
from collapse_probe.statistics.kappa import kappa

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
        adjacent=(True,) * (blocks - 1),
        middles=tuple(Tap(f"blocks.{i}.norm2", 0, "input") for i in range(blocks)),
    )


def trace_of(maps, tokens=None, prefix=(), weights=None):
    """A trace of given maps [B, L, H, N, N] and tokens [B, L + 1, N, D], with values, and a stream half way in each block."""
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
            v=tokens[:, i, None].expand(-1, heads, -1, -1),
        )
        for i in range(blocks)
    )
    middles = ((tokens[:, :-1] + tokens[:, 1:]) / 2).unbind(1)
    return Trace(plan=plan, images=b, tokens=tuple(tokens.unbind(1)), attention=heard, output=None, middles=middles)


def readings(traces, names, budget=2**24, image_names=None):
    """Run metrics over traces (batches of one data set) and read them."""
    metrics = {name: make(name, traces[0].plan) for name in names}
    folds: dict[object, Accumulator] = {}
    for metric in metrics.values():
        for key, build in metric.accumulators():
            folds.setdefault(key, None)
            folds[key] = folds[key] or build()
    records: dict[object, dict[str, list[np.ndarray]]] = {key: {} for key in folds}
    seen = 0
    for trace in traces:
        labels = [f"image {seen + i}" for i in range(trace.images)]
        labels = labels if image_names is None else image_names[seen : seen + trace.images]
        seen += trace.images
        for fold in folds.values():
            fold.start_batch(trace, labels)
        for tile in trace.tiles(budget):
            for fold in folds.values():
                fold.take(tile)
        for key, fold in folds.items():
            for name, values in fold.end_batch(trace).items():
                records[key].setdefault(name, []).append(values.double().numpy())
    joined = {key: {name: np.concatenate(parts) for name, parts in found.items()} for key, found in records.items()}
    return {
        name: metric.compute(
            [folds[key] for key, _ in metric.accumulators()], [joined[key] for key, _ in metric.accumulators()]
        )
        for name, metric in metrics.items()
    }


def random_maps(shape, sharpness=1.5, seed=0):
    """Softmax maps of the given shape [..., N, N]."""
    logits = np.random.default_rng(seed).normal(size=shape) * sharpness
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def small_vit(seed=0, sharpness=1.0, **settings):
    """A small timm ViT with fresh parameters whose queries and keys are `sharpness` times as large."""
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


Array = NDArray[np.float64]
TOKENS = 50


def similarity(blocks: int, base: float, rng: np.random.Generator) -> Array:
    """A symmetric matrix with ones on the diagonal that falls off with the distance of two blocks."""
    apart = np.abs(np.subtract.outer(np.arange(blocks), np.arange(blocks)))
    noise = rng.normal(0, 0.01, (blocks, blocks))
    matrix = base + (1 - base) * np.exp(-apart / 3.0) + (noise + noise.T) * (apart > 0)
    return np.clip(matrix, -1.0, 1.0)


def with_interval(values: Array, width: float = 0.02) -> dict[str, Array]:
    """Values with a standard error and the interval that belongs to it."""
    stderr = np.full(values.shape, width / 1.96)
    return {"values": values, "stderr": stderr, "ci95": np.stack([values - width, values + width], -1)}


def nulls_of(values: Array, rng: np.random.Generator) -> Nulls:
    """Nulls a little below the values; the last row and column of kappa are undefined."""
    token = np.clip(values - 0.05, -1, 0.999)
    kappa = (values - token) / (1 - token)
    kappa[-1, :] = kappa[:, -1] = np.nan
    return Nulls(
        values={
            "untrained": np.clip(values + 0.02, -1, 1),
            "other_token": token,
            "other_image": np.clip(values - 0.1, -1, 1),
            "other_head": None,
            "kappa": kappa,
        },
        images={"untrained": 16, "other_token": 64, "other_image": 64},
        reasons={"other_head": "one head only"},
        kappa_ci95=np.stack([kappa - 0.03, kappa + 0.03], -1),
    )


def _similarities(blocks: int, rng: np.random.Generator, *, nulls: bool, signed: bool) -> dict[str, MetricResult]:
    found = {}
    for name, axis in (("", "column"), ("@row", "row"), ("@centred", "column")):
        values = similarity(blocks, -0.3 if signed else 0.2 if name == "@centred" else 0.6, rng)
        found[f"attention-similarity{name}"] = MetricResult(
            dims=("block", "block"),
            definition="cosine of the attention vectors of the same head and token in two blocks",
            collapsed="high",
            point="weights",
            settings={"axis": axis, "centred": name == "@centred", "prefix": "in"},
            nulls=nulls_of(values, rng) if nulls else None,
            **with_interval(values),
        )
    return found


def _entropy(blocks: int, heads: int, rng: np.random.Generator) -> MetricResult:
    values = math.log(TOKENS) * rng.uniform(0.4, 0.98, (blocks, heads))
    mean = with_interval(values.mean(1), 0.05)
    return MetricResult(
        dims=("block", "head"),
        definition="entropy of the rows of the map, nats",
        collapsed="low",
        point="probs",
        details={"tokens": [TOKENS] * blocks, "share": values / math.log(TOKENS)},
        nulls=Nulls({"untrained": np.full(values.shape, 0.97 * math.log(TOKENS))}, {"untrained": 16}),
        head_mean=(mean["values"], mean["stderr"], mean["ci95"]),
        **with_interval(values, 0.05),
    )


def _over_depth(blocks: int, rng: np.random.Generator, *, nulls: bool) -> dict[str, MetricResult]:
    features = similarity(blocks + 1, 0.7, rng)
    diversity = np.linspace(0.9, 0.3, blocks + 1)
    heads = rng.uniform(0.3, 0.7, blocks)
    fresh = {"untrained": 16}
    return {
        "head-similarity": MetricResult(
            ("block",), "cosine between heads", collapsed="high", **with_interval(heads),
            nulls=Nulls({"untrained": heads + 0.2, "other_token": heads - 0.1}, fresh) if nulls else None,
        ),
        "image-similarity": MetricResult(
            ("block",), "cosine between images", collapsed="high", **with_interval(heads / 2)
        ),
        "feature-similarity": MetricResult(
            ("depth", "depth"), "cosine of embeddings", collapsed="high", **with_interval(features),
            nulls=nulls_of(features, rng) if nulls else None,
        ),
        "patch-diversity": MetricResult(
            ("depth",), "one minus P", collapsed="low", **with_interval(diversity),
            nulls=Nulls({"untrained": diversity * 0.9}, fresh) if nulls else None,
        ),
    }  # fmt: skip


def make_gallery(blocks: int, *, signed: bool = False, names: tuple[str, ...] = ("cat.png", "sea.png")) -> Gallery:
    """Smooth pictures with one bright spot of attention that wanders with the block."""
    y, x = np.mgrid[0:96, 0:96] / 95.0
    picture = np.stack([x, y, np.sin(6 * x) ** 2 * np.cos(5 * y) ** 2], -1)
    rows, columns = np.mgrid[0:7, 0:7]
    maps = np.stack([np.exp(-((rows - b % 7) ** 2 + (columns - (b * 3) % 7) ** 2) / 4.0) for b in range(blocks)])
    maps = maps / maps.sum((1, 2), keepdims=True)
    if signed:
        maps = maps - maps.mean()
    count = len(names)
    pictures = np.repeat((picture * 255).astype(np.uint8)[None], count, 0)
    heads = np.stack([maps, np.flip(maps, 1)], 1)
    patches = np.broadcast_to(np.stack([maps, np.flip(maps, 2)], 1)[:, :, None], (blocks, 2, 2, 7, 7))
    more = {"heads": np.repeat(heads[None], count, 0), "patches": np.repeat(patches[None], count, 0)}
    return Gallery(names, pictures, np.repeat(maps[None], count, 0), "the class token", **more)


def synthetic(
    blocks: int = 12,
    *,
    heads: int = 6,
    nulls: bool = True,
    signed: bool = False,
    gallery: bool = True,
    weights: str = "IMAGENET1K_V1",
    name: str = "vit_b_32",
    images: tuple[str, ...] = ("cat.png", "sea.png"),
) -> Findings:
    """Complete findings of a made-up model."""
    rng = np.random.default_rng(blocks)
    metrics = _similarities(blocks, rng, nulls=nulls, signed=signed)
    pairs = np.diagonal(metrics["attention-similarity"].values, offset=-1)  # type: ignore[arg-type]
    corrected = {"corrected": {"kappa_above": 0.5, "value": 1.0, "ci95": [0.0, 2.0]}} if nulls else {}
    counts = np.array([(pairs > t).sum() for t in (0.8, 0.9, 0.95)], dtype=np.float64)
    metrics["similar-blocks"] = MetricResult(
        ("threshold",), "blocks above a threshold", collapsed="high",
        settings={"thresholds": [0.8, 0.9, 0.95]},
        details={"pairs": blocks - 1, **corrected},
        **with_interval(counts, 1.0),
    )  # fmt: skip
    metrics["attention-entropy"] = _entropy(blocks, heads, rng)
    metrics |= _over_depth(blocks, rng, nulls=nulls)
    summary: dict[str, Any] = {
        "similar_blocks": int(counts[1]),
        "similar_blocks_ci_low": int(counts[1]) - 1,
        "similar_blocks_ci_high": int(counts[1]) + 1,
        "similar_blocks_corrected": 1 if nulls else None,
        "attention_similarity_adjacent": float(pairs.mean()),
        "kappa_adjacent": 0.14 if nulls else None,
        "patch_diversity_last": 0.3,
        "attention_entropy_mean": 2.7,
        "images": 64,
    }
    return Findings(
        model={
            "address": name, "source": "torchvision", "name": name, "weights": weights, "checkpoint": None,
            "checkpoint_sha256": None, "class": "VisionTransformer", "parameters": 88224232, "blocks": blocks,
            "heads": heads, "tokens": TOKENS, "prefix_tokens": 1, "width": 768,
            "preprocess": {"size": [224, 224], "mean": [0.485, 0.456, 0.406], "interpolation": "bilinear"},
        },
        data={
            "address": "photos", "images": 64, "skipped": [{"name": "bad.jpg", "reason": "truncated file"}],
            "names_sha256": "ab" * 32, "bundled": False,
        },
        run={
            "device": "cpu", "dtype": "float32", "batch_size": 16, "world_size": 1, "seed": 0,
            "seconds": 12.25, "images_per_second": 5.2, "peak_memory_bytes": 2**30,
            "command": "collapse-probe analyze -m vit_b_32", "versions": {"torch": "2.13", "timm": "1.0.31"},
            "created": "2026-01-01T00:00:00+00:00",
            "self_check": {"rows": 3e-7, "output": 2e-6, "logsumexp": None},
        },
        metrics=metrics,
        summary=summary,
        gallery=make_gallery(blocks, signed=signed, names=images) if gallery else None,
    )  # fmt: skip


def below_diagonal(values):
    """A block × block matrix with the given values between neighbours."""
    matrix = np.eye(len(values) + 1)
    for i, value in enumerate(values):
        matrix[i + 1, i] = matrix[i, i + 1] = value
    return matrix


def findings_of(raw, null, *, weights="checkpoint", mixes=False, twin=0.9, names=None, top1=None, label=None):
    """Findings with attention-similarity alone, from per-image values and nulls [images, pairs]."""
    raw, null = np.asarray(raw, dtype=np.float64), np.asarray(null, dtype=np.float64)
    names = [f"image {i}" for i in range(len(raw))] if names is None else names
    real, token = np.nanmean(raw, 0), np.nanmean(null, 0)
    values = below_diagonal(real)
    reading = MetricResult(
        dims=("block", "block"),
        definition="made up",
        values=values,
        stderr=np.zeros_like(values),
        ci95=np.stack([values, values], -1),
        collapsed="high",
        point="weights",
        nulls=Nulls(
            {
                "untrained": below_diagonal(np.full(len(real), twin)),
                "other_token": below_diagonal(token),
                "kappa": below_diagonal(kappa(real, token)),
            },
            {"untrained": 4},
        ),
    )
    images = {"names": np.array(names, dtype=np.str_), "attention-similarity": raw, "attention-similarity/other_token": null}
    images |= {key: np.array(v, dtype=np.int64) for key, v in (("top1", top1), ("label", label)) if v is not None}
    return Findings(
        model={"name": "made up", "weights": weights, "blocks": len(real) + 1, "mixes_maps": mixes, "tokens": 17, "heads": 2},
        data={"address": "nowhere", "images": len(raw), "names_sha256": names_sha256(names), "skipped": []},
        run={"outputs": {"classes": 10}} if top1 is not None else {},
        metrics={"attention-similarity": reading},
        summary={
            "images": len(raw),
            "attention_similarity_adjacent": float(real.mean()),
            "kappa_adjacent": float(kappa(real, token).mean()),
        },
        images=images,
    )
