"""The self-check bites: a capture that is a little wrong is an error with the number in it."""

from __future__ import annotations

import pytest
import torch
from toy_models import SIZE, Block, Encoder, Matmul, Projected, ToyViT, toy

from collapse_probe.capture import attention_operators, discovery
from collapse_probe.capture.capture import discover_plan
from collapse_probe.errors import CaptureError

pytestmark = pytest.mark.usefixtures("one_thread")


def patch_reader(monkeypatch, kind, change):
    """Let the operators of a kind be read with a change to their attention."""
    for func in kind:
        read = attention_operators.READERS[func]

        def wrong(call, read=read):
            kernel = read(call)
            change(kernel.attention)
            return kernel

        monkeypatch.setitem(attention_operators.READERS, func, wrong)


@pytest.mark.parametrize("what", ["scale", "k", "bias", "causal"])
def test_the_self_check_bites(monkeypatch, what):
    def change(attention):
        if what == "bias":
            attention.bias = torch.eye(attention.q.shape[2])
        elif what == "causal":
            attention.causal = True
        else:
            setattr(attention, what, getattr(attention, what) * 1.01)

    model = toy()
    discover_plan(model, SIZE)
    patch_reader(monkeypatch, attention_operators.FUSED, change)
    with pytest.raises(CaptureError, match="not the model's"):
        discover_plan(model, SIZE)


@pytest.mark.parametrize("fast_path", ["multi-head", "encoder"])
def test_the_self_check_bites_on_fast_paths(monkeypatch, fast_path):
    layers = [Block(Projected(call={"need_weights": False}))] if fast_path == "multi-head" else [Encoder()]
    model = ToyViT(layers)
    discover_plan(model, SIZE)
    patch_reader(
        monkeypatch,
        attention_operators.MULTI_HEAD if fast_path == "multi-head" else attention_operators.ENCODER_LAYER,
        lambda attention: setattr(attention, "scale", attention.scale * 1.01),
    )
    with pytest.raises(CaptureError, match="not the model's"):
        discover_plan(model, SIZE)


def test_the_self_check_bites_on_rows_that_do_not_sum_to_one(monkeypatch):
    errors = discovery.errors_of

    def wrong(event):
        event.attention.probs = event.attention.probs * 1.01
        return errors(event)

    monkeypatch.setattr(discovery, "errors_of", wrong)
    with pytest.raises(CaptureError, match=r"rows sum to one within 1\.0e-02"):
        discover_plan(toy(Matmul), SIZE)
