"""How the metrics of weights are told to a reader."""

from __future__ import annotations

from collapse_probe.family import ONE_HEAD, Family, other_readings

WEIGHTS: dict[str, Family] = {
    "weight-similarity": Family(
        other_readings("similarity of the rows of the weights"),
        "weights",
        "|cosine| between rows",
        "|cosine|",
        {"signed": "with its sign", "head": ONE_HEAD, "depth": "entry by entry", "directions": "by directions"},
        {"signed": "cosine"},
    ),
    "weight-rank": Family(
        other_readings("rank of the weights"),
        "weights",
        "effective rank",
        "rank",
        {
            "squared": "effective rank, squared singular values",
            "stable": "stable rank",
            "share": "effective rank over the full one",
            "head": f"effective rank, {ONE_HEAD}",
            **{f"pca{p}": f"left over by the leading {p} % of components" for p in (90, 95, 99)},
            **{f"components{p}": f"components that hold {p} % of the variance" for p in (90, 95, 99)},
        },
        {
            "share": "share",
            **{f"pca{p}": "share of variance" for p in (90, 95, 99)},
            **{f"components{p}": "components" for p in (90, 95, 99)},
        },
    ),
    "weight-orthogonality": Family(
        other_readings("orthogonality of the weights"),
        "weights",
        "λmax − λmin of W Wᵀ",
        "squared units",
        {
            "squared": "(λmax − λmin)² of W Wᵀ",
            "relative": "(λmax − λmin) / λmax",
            "soft": "‖W Wᵀ − I‖²",
            "head": f"λmax − λmin, {ONE_HEAD}",
        },
        {"squared": "fourth power of units", "relative": "share", "soft": "squared norm"},
    ),
    "hyperspherical-energy": Family(
        other_readings("rows of the weights on the sphere"),
        "weights",
        "mean 1 / distance",
        "mean 1 / distance",
        {
            "separation": "smallest squared distance of two rows",
            "gram": "−log det of the rows' kernel",
            "squared": "mean 1 / distance²",
            "log": "mean −log distance",
            "head": f"mean 1 / distance, {ONE_HEAD}",
        },
        {"separation": "squared distance", "gram": "nats", "squared": "1 / distance²", "log": "nats"},
    ),
}
