"""A model without blocks as a file: timm builds it again, and it gives the logits of the dropped run to the bit."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import timm
import torch

import collapse_probe as cp
from collapse_probe.capture.capture import discover_plan
from collapse_probe.capture.edits.places import Places, edited
from collapse_probe.data.images import open_data
from collapse_probe.errors import ModelError, OutputError, SettingError
from collapse_probe.models.loading import resolve
from collapse_probe.models.pruning import Pruning
from collapse_probe.report.intervention.page import render
from collapse_probe.results.intervention import GREEDY, Interventions

NAME = "vit_tiny_patch16_224"
KWARGS = {"depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 10}
ADDRESS = {"pretrained": False, "model_kwargs": KWARGS, "img_size": 32}
DATA = {"limit": 12, "device": "cpu"}

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(size=32):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def dropped(subject, gone, images):
    """The logits of the subject without some blocks, as a run gives them."""
    size = subject.preprocess.size
    plan = discover_plan(subject.model, size)
    places = Places.of(subject.model, plan, ["drop_block"], size)
    with edited(subject.model, plan, places.edit("drop_block", gone)):
        return subject.model(images)


def logits(model, images):
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_timm_loads_it_and_gives_the_logits_of_the_dropped_run_to_the_bit(suffix, tmp_path):
    file = tmp_path / f"pruned{suffix}"
    found = cp.intervene(f"timm:{NAME}", "bundled:digits", drop="block", keep=2, export=file, **ADDRESS, **DATA)
    said, order = found.run["export"], found.orders["drop_block"][GREEDY]
    gone = sorted(order.blocks)
    assert (said["dropped_blocks"], said["depth"], len(gone)) == (gone, 2, 2)
    expected = dropped(resolve(f"timm:{NAME}", seed=0, **ADDRESS), gone, pictures())
    built = {**KWARGS, "depth": 2, "img_size": 32}
    assert torch.equal(logits(timm.create_model(NAME, **built, checkpoint_path=str(file)), pictures()), expected)
    by_lines = {}
    exec("\n".join(said["lines"]), by_lines)
    assert torch.equal(logits(by_lines["model"], pictures()), expected)
    ours = resolve(f"timm:{NAME}", checkpoint=file, model_kwargs={**KWARGS, "depth": 2}, img_size=32)
    assert ours.loading.complete
    assert torch.equal(logits(ours.model, pictures()), expected)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert said["lines"][1].replace("'", "&#39;") in render(found, {})


def test_the_file_says_how_it_is_built(tmp_path):
    from safetensors import safe_open

    file = tmp_path / "pruned.safetensors"
    cp.intervene(f"timm:{NAME}", "bundled:digits", drop="block", blocks=[1, 2], export=file, **ADDRESS, **DATA)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
        names = {name.split(".")[1] for name in opened.keys() if name.startswith("blocks.")}  # noqa: SIM118
    assert json.loads(header["model_kwargs"]) == {**KWARGS, "depth": 2, "img_size": 32}
    assert json.loads(header["dropped_blocks"]) == [1, 2]
    assert names == {"0", "1"}


@pytest.mark.parametrize("name", ["digits-mhsa", "digits-tied-re-attention"])
def test_our_own_models_are_written_as_model_files(name, tmp_path):
    file, subject = tmp_path / "pruned.safetensors", resolve(f"ours:{name}")
    size = subject.preprocess.size[0]
    pruning, gone = Pruning.of(subject, file), [0, 5, 6, 23]
    pruning.write(pruning.pruned(gone), gone)
    again = resolve(f"ours:{file}")
    images = torch.randn(2, subject.model.patch_embed.proj.in_channels, size, size)
    assert len(again.model.blocks) == 20
    assert torch.equal(logits(again.model, images), dropped(subject, gone, images))


def test_a_fix_in_some_blocks_goes_with_its_blocks():
    from collapse_probe.models.architecture import Architecture
    from collapse_probe.models.pruning import _shorter
    from collapse_probe.models.vit import ViTSettings

    fixes = {"re-attention": {"blocks": [1, 3, 4]}, "layer-scale": {}}
    shorter = _shorter(Architecture(model=ViTSettings(depth=5, fixes=fixes)), [0, 2, 3, 4])
    assert shorter.model.fixes["re-attention"] == {"blocks": [2, 3]}
    assert (shorter.model.depth, shorter.model.fixes["layer-scale"]) == (4, {})


@pytest.mark.parametrize(
    ("address", "more", "error", "said"),
    [
        ("timm:swin_tiny_patch4_window7_224", {"img_size": 224}, ModelError, "do not stand in one list `blocks`"),
        ("timm:hiera_tiny_224", {"img_size": 224}, ModelError, "cannot make"),
        ("torchvision:vit_b_16", {}, ModelError, "do not stand in one list `blocks`"),
        (f"timm:{NAME}", {"export": "x.onnx"}, OutputError, "ends in .safetensors or .pth or .pt"),
        (f"timm:{NAME}", {"export": "."}, OutputError, "ends in"),
        (f"timm:{NAME}", {"drop": "attention"}, SettingError, "drop block"),
    ],
)
def test_what_cannot_be_exported_is_told_before_any_run(address, more, error, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("collapse_probe.analysis.intervene.read_all", lambda *_, **__: pytest.fail("a run began"))
    options = {"drop": "block", "export": "pruned.safetensors", "pretrained": False, **DATA, **more}
    with pytest.raises(error, match=said):
        cp.intervene(address, "bundled:digits", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_as_an_object_and_one_with_a_fix_have_no_other_depth(tmp_path):
    module = timm.create_model(NAME, img_size=32, **KWARGS).eval()
    with pytest.raises(ModelError, match="it came as an object"):
        Pruning.of(resolve(module), tmp_path / "x.pth")
    with pytest.raises(ModelError, match="fixes were put into it"):
        Pruning.of(resolve(f"timm:{NAME}", ("attn-scale",), **ADDRESS), tmp_path / "x.pth")


def test_a_model_whose_blocks_depend_on_their_place_is_not_written(tmp_path, monkeypatch):
    file = tmp_path / "pruned.safetensors"
    pruned = Pruning.pruned

    def other(self, gone):
        model = pruned(self, gone)
        torch.nn.init.ones_(model.blocks[1].norm1.bias)
        return model

    monkeypatch.setattr(Pruning, "pruned", other)
    with pytest.raises(ModelError, match="is another model"):
        cp.intervene(f"timm:{NAME}", "bundled:digits", drop="block", keep=3, export=file, **ADDRESS, **DATA)
    assert not file.exists()


def test_from_the_command_line_and_measured_again(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kwargs = "depth=4 embed_dim=24 num_heads=2 num_classes=10"
    model = ("-m", f"timm:{NAME}", "--no-pretrained", "--img-size", "32", "--model-kwargs", kwargs, "--device", "cpu")
    words = ("--data", "bundled:digits", "--limit", "12", "--no-page", "-o", "out", "--drop", "block")
    code, out, err = run("intervene", *model, *words, "--keep", "3", "--export", "pruned.safetensors")
    assert code == 0, err
    assert "model: pruned.safetensors, 3 blocks" in out
    line = next(line for line in out.splitlines() if line.strip().startswith("collapse-probe analyze"))
    flags = shlex.split(line.split("analyze ")[1].split(" --data")[0])
    again = ("--data", "bundled:digits", "--limit", "4", "--null-images", "0", "--metric", "block-influence", "--json")
    code, out, err = run("analyze", *flags, *again)
    assert code == 0, err
    assert json.loads(out)["model"]["blocks"] == 3
    code, _, err = run("intervene", *model, *words, "--export", "none.pth")  # of an untrained model no answer stays
    exported = Path("none.pth").exists()
    assert (code, exported) in ((0, True), (1, False))
    assert exported or "no model was exported: no block can go" in err


def test_an_untrained_copy_stands_beside_the_blocks_that_go(tmp_path):
    found = cp.intervene(f"timm:{NAME}", "bundled:digits", drop=("block", "mlp"), **ADDRESS, **DATA)
    order, copy = found.orders["drop_block"][GREEDY], found.untrained
    assert copy.images == 4
    assert [effect.blocks for effect in copy.effects] == [
        each[GREEDY].priced[max(each[GREEDY].spared, 1) - 1].blocks for each in found.orders.values()
    ]
    twin, own = resolve(f"timm:{NAME}", seed=1, **ADDRESS), open_data("bundled:digits", limit=12)
    names = set(found.images["names"][found.images["priced"]])
    places = [i for i, name in enumerate(own.names) if name in names]
    pixels = torch.stack([own.pixels(i, twin.preprocess) for i in places])
    plain, other = logits(twin.model, pixels), dropped(twin, order.priced[max(order.spared, 1) - 1].blocks, pixels)
    assert copy.effects[0].agreement == pytest.approx(float((plain.argmax(1) == other.argmax(1)).double().mean()))
    found.save(tmp_path / "out")
    assert Interventions.load(tmp_path / "out").untrained == copy
    assert "an untrained copy keeps" in render(found, {})
