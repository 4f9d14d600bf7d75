"""Findings made by hand for comparisons: per-image similarities and nulls that a test chooses."""

from __future__ import annotations

import numpy as np

from collapse_probe.findings import Findings, Nulls, Reading
from collapse_probe.provenance import names_sha256
from collapse_probe.statistics import kappa


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
    reading = Reading(
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
