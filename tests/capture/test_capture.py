"""Recording changes nothing while it lasts and leaves nothing behind when it ends."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint
from toy_models import (
    CHANGED,
    EAGER,
    FUSED,
    SIZE,
    Block,
    Encoder,
    Matmul,
    Projected,
    ToyAttention,
    ToyViT,
    images,
    reference,
    toy,
)

from collapse_probe.capture.attention_operators import OperatorCall
from collapse_probe.capture.capture import discover_plan, record
from collapse_probe.capture.discovery import call_frames
from collapse_probe.capture.recorder import Recorder
from collapse_probe.capture.softmax_tracking import Softmaxes
from collapse_probe.errors import CaptureError

MODELS = {
    "fused": lambda: toy(ToyAttention),
    "biased": lambda: toy(FUSED[4]),
    "math": lambda: toy(EAGER[0]),
    "eager": lambda: toy(Matmul),
    "talking": lambda: toy(CHANGED[0]),
    "in-place": lambda: toy(CHANGED[2]),
    "multi-head": lambda: ToyViT([Block(Projected(call={"need_weights": False})) for _ in range(2)]),
    "encoder": lambda: ToyViT([Encoder() for _ in range(2)]),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(params=[name for name in MODELS if name != "in-place"])  # autograd forbids that one
def trainable(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("amp", [False, True])
def test_outputs_are_equal_bit_for_bit(model, mode, amp):
    plan = discover_plan(model, SIZE)
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        plain = model(images())
        with record(model, plan) as recording:
            recorded = model(images())
    assert torch.equal(plain, recorded)
    assert torch.equal(plain, recording.last.output)


def test_gradients_are_equal_and_nothing_recorded_holds_the_graph(trainable):
    def gradients():
        trainable.zero_grad()
        trainable(images()).square().sum().backward()
        return [p.grad.clone() for p in trainable.parameters()]

    plan, plain = discover_plan(trainable, SIZE), gradients()
    with record(trainable, plan) as recording:
        recorded = gradients()
    assert all(map(torch.equal, plain, recorded))
    trace = recording.last
    kept = [getattr(a, name) for a in trace.attention for name in ("q", "k", "bias", "probs", "weights")]
    assert not any(t.requires_grad for t in [*kept, *trace.tokens] if t is not None)


def test_checkpointed_blocks_are_recorded_once():
    class Checkpointed(ToyViT):
        def forward(self, x):
            tokens = self.embed(x)
            for block in self.blocks:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            return self.head(tokens.mean(1))

    model = Checkpointed([Block(Matmul()) for _ in range(2)]).eval()
    with record(model) as recording:
        model(images()).sum().backward()
        assert len(recording.last.attention) == 2


def test_a_model_may_be_called_by_keyword_and_return_nothing():
    class Silent(ToyViT):
        def forward(self, *, pixels):
            super().forward(pixels)

    model = Silent([Block(Matmul()) for _ in range(2)]).eval()
    with torch.no_grad(), record(model) as recording:
        model(pixels=images())
    assert recording.last.images == 3
    assert recording.last.plan.prefix == (0,)
    assert recording.last.output is None


def test_tokens_are_those_before_a_block_overwrites_them():
    class Overwriting(Block):
        def forward(self, x):
            x += self.attn(self.norm1(x))
            x += self.mlp(self.norm2(x))
            return (x,)

    class Unpacking(ToyViT):
        def forward(self, x, keep=None):
            tokens = self.embed(x)
            for block in self.blocks:
                if keep is not None:
                    keep.append(tokens.clone())
                (tokens,) = block(tokens)
            return self.head(tokens.mean(1))

    model, expected = Unpacking([Overwriting(ToyAttention()) for _ in range(3)]), []
    with torch.no_grad(), record(model, discover_plan(model, SIZE)) as recording:
        model(images())
        model(images(), expected)
    assert all(map(torch.equal, recording.last.tokens, expected))
    assert len(recording.last.tokens) == 4


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_wrappers_are_seen_through():
    model = toy()
    plan, inside = discover_plan(model, SIZE), reference(model, images())
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager"), distributed(model)):
        with torch.no_grad(), record(wrapped, plan) as recording:
            wrapped(images())
        assert torch.allclose(recording.last.maps(1).double(), inside[1][0], atol=1e-5)
        assert discover_plan(wrapped, SIZE) == plan
    torch.distributed.destroy_process_group()


def distributed(model):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


# ---- what is left behind ----


def residue():
    """Everything global that a recording touches, and how many tensors and traces there are to see."""
    tables = [getattr(hooks, name) for name in vars(hooks) if name.startswith("_global_") and "hooks" in name]
    stance = torch._dynamo.eval_frame._stance.stance
    return [len(t) for t in tables if isinstance(t, dict)], len(_get_current_dispatch_mode_stack()), stance


class Failing(ToyAttention):
    """Attention that raises what it is told to, in the middle of its work."""

    error = None

    def mix(self, q, k, v):
        mixed = super().mix(q, k, v)
        if self.error is not None:
            raise self.error
        return mixed


ERRORS = {"error": ValueError("wrong"), "interrupt": KeyboardInterrupt()}


@pytest.mark.parametrize("name", [None, *ERRORS])
def test_nothing_is_left_behind(name):
    model, before = toy(Failing), residue()
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    plan, expected = discover_plan(model, SIZE), reference(model, images())
    model.blocks[1].attn.error = error = ERRORS.get(name)
    with pytest.raises(type(error)) if error else nullcontext(), torch.no_grad(), record(model, plan):
        model(images())
    assert residue() == before
    model.blocks[1].attn.error = None
    with torch.no_grad(), record(model, plan) as recording:
        model(images())
    assert torch.allclose(recording.last.maps(1).double(), expected[1][0], atol=1e-5)
    assert list(model.blocks[0]._forward_hooks) == [handle.id]
    assert residue() == before


@pytest.mark.parametrize("name", ERRORS)
def test_recording_goes_on_after_a_pass_that_failed(name):
    model, before = toy(Failing), residue()
    plan, expected = discover_plan(model, SIZE), reference(model, images())
    with torch.no_grad(), record(model, plan) as recording:
        model.blocks[1].attn.error = ERRORS[name]
        with pytest.raises(type(ERRORS[name])):
            model(images())
        with pytest.raises(CaptureError, match="no forward pass was recorded"):
            _ = recording.last
        model.blocks[1].attn.error = None
        model(images())
    assert len(recording.last.attention) == 2
    assert torch.allclose(recording.last.maps(0).double(), expected[0][0], atol=1e-5)
    assert residue() == before


def test_one_recording_at_a_time():
    model = toy()
    with record(model):
        with pytest.raises(CaptureError, match="recorded already"), record(nn.DataParallel(model)):
            pass
        with pytest.raises(CaptureError, match="recorded already"):
            discover_plan(model, SIZE)
        with record(toy()):
            pass
    with record(model):
        pass


def test_a_taken_trace_can_go_while_the_recording_lasts():
    model = toy()
    plan = discover_plan(model, SIZE)
    with torch.no_grad(), record(model, plan) as recording:
        model(images())
        trace = recording.take()
        memory = weakref.ref(trace.attention[0].q)
        with pytest.raises(CaptureError, match="no forward pass was recorded"):
            _ = recording.last
        del trace
        gc.collect()
        assert memory() is None


@pytest.mark.parametrize("attention", [ToyAttention, Matmul, *CHANGED[:2], EAGER[0]], ids=lambda a: a.__name__)
def test_a_steady_run_holds_no_more_than_the_plan_says(attention):
    model, logs = toy(attention, depth=6), []
    plan = discover_plan(model, SIZE)
    with torch.no_grad(), Recorder(model, logs.append, watched=call_frames(plan.taps)).attached():
        model(images(6))
    assert {(call.path, call.number) for call in logs[0].calls} == call_frames(plan.taps)
    assert all(event.kernel is None and event.operand is None for event in logs[0].events)
    with torch.no_grad(), record(model, plan) as recording:
        model(images(6))
    tensors = [getattr(a, n) for a in recording.last.attention for n in ("q", "k", "probs", "weights")]
    tensors = [t for t in [*tensors, *recording.last.tokens] if t is not None]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(held.values()) <= 6 * plan.bytes_per_image


def test_a_softmax_is_forgotten_some_modules_up():
    softmaxes, logits = Softmaxes(), torch.rand(2, 3, 3)
    call = OperatorCall(torch.ops.aten._softmax.default, (logits, -1, False), {}, logits.softmax(-1))
    softmaxes.begin(call, (), "a.b.c.d.e", direct=False, sampled=False)
    for path in ("a.b.c.d.e", "a.b.c.d", "a.b.other", "a.b.c", "a.b"):
        assert len(softmaxes.pending) == 1
        softmaxes.hand_up(path, path.rpartition(".")[0])
    assert softmaxes.pending == []


def test_the_first_pass_without_a_plan_makes_one_and_later_passes_are_lean():
    model = toy()
    with torch.no_grad(), record(model) as recording:
        model(images())
        assert recording.plan.prefix == (0,)
        assert recording.recorder.thorough is False
        model(images(5))
        assert recording.last.images == 5
        assert torch.equal(recording.last.tokens[-1], model.blocks[1](recording.last.tokens[1]))
