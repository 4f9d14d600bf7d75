"""The self-check bites: a capture that is a little wrong is an error with the number in it."""

from __future__ import annotations

import pytest
import torch
from toy_models import SIZE, Block, Encoder, Matmul, Projected, ToyViT, toy

from collapse_probe.capture import capture
from collapse_probe.capture import discovery as planning
from collapse_probe.capture import operators as kernels
from collapse_probe.capture.capture import discover_plan
from collapse_probe.errors import CaptureError


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("what", ["scale", "k", "bias", "causal"])
def test_the_self_check_bites(monkeypatch, what):
    model, read = toy(), kernels.read_fused

    def wrong(operator, bound, out):
        attention, value, result, finish = read(operator, bound, out)
        if what == "bias":
            attention.bias = torch.eye(attention.q.shape[2])
        elif what == "causal":
            attention.causal = True
        else:
            setattr(attention, what, getattr(attention, what) * 1.01)
        return attention, value, result, finish

    discover_plan(model, SIZE)
    monkeypatch.setattr(kernels, "read_fused", wrong)
    with pytest.raises(CaptureError, match="not the model's"):
        discover_plan(model, SIZE)


@pytest.mark.parametrize("fast_path", ["read_multi_head", "read_encoder_layer"])
def test_the_self_check_bites_on_fast_paths(monkeypatch, fast_path):
    layers = [Block(Projected(call={"need_weights": False}))] if fast_path == "read_multi_head" else [Encoder()]
    model, read = ToyViT(layers), getattr(kernels, fast_path)

    def wrong(operator, bound, out):
        attention, *others = read(operator, bound, out)
        attention.scale *= 1.01
        return attention, *others

    discover_plan(model, SIZE)
    monkeypatch.setattr(kernels, fast_path, wrong)
    with pytest.raises(CaptureError, match="not the model's"):
        discover_plan(model, SIZE)


def test_the_self_check_bites_on_rows_that_do_not_sum_to_one(monkeypatch):
    def wrong(event, count):
        event = planning.regular(event, count)
        event.attention.probs = event.attention.probs * 1.01
        return event

    monkeypatch.setattr(capture, "regular", wrong)
    with pytest.raises(CaptureError, match=r"rows sum to one within 1\.0e-02"):
        discover_plan(toy(Matmul), SIZE)
