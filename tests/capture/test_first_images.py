"""The trace of the first images of a batch holds what the whole trace holds of them, and nothing of the others."""

from __future__ import annotations

from collections import defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from padded_models import KINDS, SIZE, model_and_plan, pixels_of
from toy_models import FUSED, Changed, Matmul, Padded, images, toy

from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.capture.trace import first_of
from collapse_probe.metrics.nonfinite import nonfinite_images

BATCH = 8
MODELS = {kind: (lambda kind=kind: (*model_and_plan(kind), SIZE)) for kind in KINDS} | {
    each.__name__: (lambda each=each: (toy(each), None, (32, 24))) for each in (*FUSED, Matmul, Changed)
}


def traced(model, plan, pixels):
    with torch.no_grad(), record(model, plan) as recordings:
        model(pixels)
    return recordings.take()


@pytest.fixture(params=MODELS)
def whole(request):
    """A trace of eight images, and their pixels."""
    model, plan, size = MODELS[request.param]()
    plan = plan or discover_plan(model, size)
    pixels = torch.stack([pixels_of(i) for i in range(BATCH)]) if size == SIZE else images(BATCH)
    return traced(model, plan, pixels), pixels


@pytest.mark.parametrize("count", [1, 3, 8])
def test_maps_tokens_and_outputs_are_those_of_the_first_images(whole, count):
    trace, _ = whole
    first = trace.first(count)
    assert first.images == count
    assert first.output.shape == (count, 5)
    assert torch.equal(first.output, trace.output[:count])
    for mine, all_images in zip(first.tokens, trace.tokens, strict=True):
        assert torch.equal(mine, all_images[:count])
    for mine, all_images in zip(first.attention, trace.attention, strict=True):
        for point, maps in all_images.maps().items():
            assert torch.equal(mine.maps()[point], maps[: len(maps) * count // BATCH])
    held = [tile.images for tile in first.tiles(2**24)]
    assert max(images.stop for images in held) == count


def test_a_padding_image_that_is_not_finite_reaches_no_check(whole):
    trace, pixels = whole
    for tokens in trace.tokens:
        tokens[3:] = torch.nan
    for attention in trace.attention:
        held = attention.probs if attention.q is None else attention.q
        held[len(held) * 3 // BATCH :] = torch.nan
    trace.output[3:] = torch.nan
    assert nonfinite_images(trace.first(3), pixels[:3]) == {}
    assert [*nonfinite_images(trace, pixels)] == [3, 4, 5, 6, 7]


def test_a_mask_of_every_image_is_cut_and_one_for_all_is_not():
    model = toy(Padded)
    trace = traced(model, discover_plan(model, (32, 24)), images(BATCH))
    assert [len(attention.first(2, BATCH).bias) for attention in trace.attention] == [2, 2]
    for attention in trace.attention:
        attention.bias = attention.bias[:1]
    assert [len(attention.first(2, BATCH).bias) for attention in trace.attention] == [1, 1]


Pair = namedtuple("Pair", "one other")


@dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    more: tuple[torch.Tensor, ...]
    made: int = field(init=False, default=3)


def test_outputs_of_any_build_are_cut():
    logits, scale = torch.arange(12.0).view(4, 3), torch.tensor(2.0)
    found = first_of(Pair([logits, scale], {"a": (logits[:, 0], None)}), 2, 4)
    assert isinstance(found, Pair)
    assert found.one[0].tolist() == logits[:2].tolist()
    assert found.one[1] is scale
    assert found.other["a"][0].tolist() == [0.0, 3.0]
    assert found.other["a"][1] is None
    cut = first_of(Output(logits, (logits,)), 1, 4)
    assert (len(cut.logits), len(cut.more[0]), cut.made) == (1, 1, 3)
    by_name = first_of(defaultdict(list, a=logits), 3, 4)
    assert (len(by_name["a"]), by_name["b"]) == (3, [])
    assert first_of("words", 1, 4) == "words"


def test_outputs_of_transformers_are_cut():
    modeling_outputs = pytest.importorskip("transformers.modeling_outputs")
    logits = torch.arange(12.0).view(4, 3)
    found = first_of(modeling_outputs.ImageClassifierOutput(logits=logits, hidden_states=(logits,)), 2, 4)
    assert len(found.logits) == len(found["logits"]) == len(found.hidden_states[0]) == 2
    assert found.attentions is None
