"""Findings made up for the tests of figures and page: any number of blocks, any part missing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.findings import Findings, Gallery, Nulls, Reading

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


def _similarities(blocks: int, rng: np.random.Generator, *, nulls: bool, signed: bool) -> dict[str, Reading]:
    found = {}
    for name, axis in (("", "column"), ("@row", "row"), ("@centred", "column")):
        values = similarity(blocks, -0.3 if signed else 0.2 if name == "@centred" else 0.6, rng)
        found[f"attention-similarity{name}"] = Reading(
            dims=("block", "block"),
            definition="cosine of the attention vectors of the same head and token in two blocks",
            collapsed="high",
            point="weights",
            settings={"axis": axis, "centred": name == "@centred", "prefix": "in"},
            nulls=nulls_of(values, rng) if nulls else None,
            **with_interval(values),
        )
    return found


def _entropy(blocks: int, heads: int, rng: np.random.Generator) -> Reading:
    values = math.log(TOKENS) * rng.uniform(0.4, 0.98, (blocks, heads))
    mean = with_interval(values.mean(1), 0.05)
    return Reading(
        dims=("block", "head"),
        definition="entropy of the rows of the map, nats",
        collapsed="low",
        point="probs",
        settings={"tokens": [TOKENS] * blocks, "share": values / math.log(TOKENS)},
        nulls=Nulls({"untrained": np.full(values.shape, 0.97 * math.log(TOKENS))}, {"untrained": 16}),
        head_mean=(mean["values"], mean["stderr"], mean["ci95"]),
        **with_interval(values, 0.05),
    )


def _over_depth(blocks: int, rng: np.random.Generator, *, nulls: bool) -> dict[str, Reading]:
    features = similarity(blocks + 1, 0.7, rng)
    diversity = np.linspace(0.9, 0.3, blocks + 1)
    heads = rng.uniform(0.3, 0.7, blocks)
    fresh = {"untrained": 16}
    return {
        "head-similarity": Reading(
            ("block",), "cosine between heads", collapsed="high", **with_interval(heads),
            nulls=Nulls({"untrained": heads + 0.2, "other_token": heads - 0.1}, fresh) if nulls else None,
        ),
        "image-similarity": Reading(
            ("block",), "cosine between images", collapsed="high", **with_interval(heads / 2)
        ),
        "feature-similarity": Reading(
            ("depth", "depth"), "cosine of embeddings", collapsed="high", **with_interval(features),
            nulls=nulls_of(features, rng) if nulls else None,
        ),
        "patch-diversity": Reading(
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
    return Gallery(names, pictures, np.repeat(maps[None], count, 0), "the class token")


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
    metrics["similar-blocks"] = Reading(
        ("threshold",), "blocks above a threshold", collapsed="high",
        settings={"thresholds": [0.8, 0.9, 0.95], "pairs": blocks - 1, **corrected},
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
