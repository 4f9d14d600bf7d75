"""Untrained copies are measured with several seeds where the answer hangs on them, and shared weights are seen."""

from __future__ import annotations

import pytest
import torch

import collapse_probe as cp
from collapse_probe.models.vit import ViT

SHAPE = {"classes": 10, "image_size": 8, "patch_size": 2, "mlp_ratio": 2.0, "depth": 4, "width": 32, "heads": 2}
MORE = "because whether attention has collapsed hangs on them"


def alike() -> ViT:
    """A user's own architecture: every block starts with the attention of the first, in tensors of its own."""
    model = ViT(**SHAPE)
    for block in model.blocks[1:]:
        block.attn.load_state_dict(model.blocks[0].attn.state_dict())
    return model


def trained_alike() -> ViT:
    """An ordinary ViT whose weights happen to be those of `alike`."""
    return ViT(**SHAPE)


def analysed(model, limit=16, **more):
    metrics = ("attention-similarity", "attention-similarity@row", "attention-entropy", "patch-diversity")
    return cp.analyze(model, "bundled:digits", limit=limit, metrics=metrics, gallery_images=0, **more)


@pytest.fixture(scope="module")
def by_architecture():
    return analysed(f"import:{__name__}:alike")


def test_what_untrained_twins_share_as_well_is_not_called_collapsed(by_architecture):
    assert by_architecture.answer["case"] == "as-untrained"
    assert by_architecture.answer["collapsed"] is None
    assert "untrained copies, with fresh parameters, they do so about as much" in by_architecture.answer["sentences"][0]
    assert not any("has collapsed across depth in" in sentence for sentence in by_architecture.answer["sentences"])


def test_five_seeds_decide_and_the_other_metrics_keep_one(by_architecture):
    assert any(MORE in note for note in by_architecture.run["notes"])
    seeds = {
        name: result.nulls.untrained_seeds
        for name, result in by_architecture.metrics.items()
        if result.nulls is not None and result.nulls.values.get("untrained") is not None
    }
    assert seeds["attention-similarity"]["seeds"] == seeds["attention-similarity@row"]["seeds"] == [1, 2, 3, 4, 5]
    assert seeds["patch-diversity"] is None


def test_what_the_twins_do_not_share_is_called_collapsed(tmp_path):
    torch.manual_seed(0)
    model = alike()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 6
    torch.save(model.state_dict(), tmp_path / "alike.pth")
    found = analysed(f"import:{__name__}:trained_alike", checkpoint=tmp_path / "alike.pth")
    assert found.answer["collapsed"] is True
    assert any(MORE in note for note in found.run["notes"])
    outcomes = {row["rule"]: row["answer"] for row in found.verdict}
    assert outcomes["shared"] == outcomes["beyond-untrained"] == "yes"


def test_no_more_twins_where_nothing_hangs_on_them():
    for found in (analysed(f"import:{__name__}:trained_alike"), analysed(f"import:{__name__}:alike", limit=8)):
        assert not any(MORE in note for note in found.run["notes"])
        assert found.metrics["attention-similarity"].nulls.untrained_seeds is None


def test_blocks_made_with_the_same_tensors_are_the_same_by_construction():
    found = analysed("ours:digits-tied-mhsa")
    assert found.model["shares_weights"] == [True] * 23
    assert found.answer["collapsed"] is True
    assert found.answer["sentences"][0].startswith("Attention is the same across depth by construction in 2")
    assert "Untrained copies share their attention as much: it comes with the architecture." in found.answer["sentences"]
    model = ViT(**SHAPE)
    model.blocks[2].attn.qkv = model.blocks[1].attn.qkv
    assert analysed(model).model["shares_weights"] == [False, True, False]
