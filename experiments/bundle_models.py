"""Makes the bundled models: trains three seeds of each, compares them, ships the one in the middle and reports the spread.

    python -m collapse_probe.bundling bundled-runs     (or: make bundled)

Runs that are there already are kept. Of each recipe the seed whose kappa is the middle one of three is shipped: neither the
clearest nor the faintest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collapse_probe.analysis.analyze import analyze
from collapse_probe.data.splits import split_data
from collapse_probe.models.model_file import load_model, save_model
from collapse_probe.models.sources.ours import FOLDER, MODELS, file_of
from collapse_probe.registry import RECIPES
from collapse_probe.training.trainer import train

SEEDS = (0, 1, 2)
DATA = "bundled:digits"
NUMBERS = (
    "attention_similarity_adjacent",
    "other_token_adjacent",
    "kappa_adjacent",
    "attention_similarity_centred_adjacent",
    "similar_blocks",
    "similar_blocks_corrected",
    "attention_similarity_probs_adjacent",
    "kappa_probs_adjacent",
)
ACCOUNT = "spread.json"


def command_of(name: str, seed: int) -> str:
    """The command that trains one of the models."""
    return f"collapse-probe train {name} --seed {seed} --device cpu -o bundled-runs/{name}-{seed}"


def bundle(runs: Path, folder: Path = FOLDER) -> dict[str, Any]:
    """Train what is missing in `runs`, measure all on the held-out digits, write model files and spread.json to `folder`."""
    account: dict[str, Any] = {"data": f"{DATA}, its 360 held-out images", "models": {}}
    for name in MODELS:
        found = {seed: _measured(name, seed, runs) for seed in SEEDS}
        order = sorted(SEEDS, key=lambda seed: found[seed]["kappa_adjacent"])
        shipped = order[len(order) // 2]
        shrink(runs / f"{name}-{shipped}" / "model.safetensors", folder / file_of(name).name)
        account["models"][name] = {
            "shipped_seed": shipped,
            "rule": "the seed with the middle kappa_adjacent of three",
            "command": command_of(name, shipped),
            "seeds": {str(seed): numbers for seed, numbers in found.items()},
        }
    (folder / ACCOUNT).write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")
    return account


def _measured(name: str, seed: int, runs: Path) -> dict[str, Any]:
    output = runs / f"{name}-{seed}"
    path = output / "model.safetensors"
    if not path.is_file():
        recipe = RECIPES[name]().vary(seed=seed)
        train(recipe, DATA, output, device="cpu", resume=(output / "state").is_dir(), command=command_of(name, seed))
    model, card = load_model(path)
    findings = analyze(f"ours:{path}", split_data(DATA).held_out, device="cpu", null_images=0)
    numbers = {key: findings.summary[key] for key in NUMBERS if findings.summary.get(key) is not None}
    parameters = sum(p.numel() for p in model.parameters())
    return {"accuracy": card.facts["accuracy"], "parameters": parameters, **numbers}


def shrink(source: Path, target: Path) -> None:
    """Copy a model file with its matrices rounded to float16.

    Vectors, the statistics of BatchNorm and the mixing of Re-attention stay as they are: variances of near-uniform maps lie
    below what float16 can hold.
    """
    model, card = load_model(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith("patch_embed.proj.weight"):
                parameter.data = parameter.data.to(torch.float16)
    facts = {key: value for key, value in card.facts.items() if key != "versions"} | {"rounded": "matrices to float16"}
    versions: dict[str, Any] = {"versions": card.facts.get("versions")}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(target, model, type(card)(**{**vars(card), "facts": {**facts, **versions}}))


def largest_rounding(source: Path, target: Path) -> float:
    """The largest relative change of an entry of any tensor between two files of one model."""
    states: list[dict[str, Tensor]] = [load_model(path)[0].state_dict() for path in (source, target)]
    changes = [
        float(((a - b).abs() / a.abs().max().clamp_min(1e-30)).max())
        for a, b in zip(*(s.values() for s in states), strict=True)
    ]
    return max(changes)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(bundle(Path(sys.argv[1] if len(sys.argv) > 1 else "bundled-runs")), indent=1) + "\n")
