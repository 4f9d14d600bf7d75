"""Weights find their model under whatever prefix and wrapper they were saved, and where that cannot be told it is asked."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from collapse_probe.errors import CheckpointError
from collapse_probe.models.checkpoints import load_checkpoint
from collapse_probe.models.loading import resolve

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def vit(seed=0, name=NAME, **changes):
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **changes}).eval()
    for parameter in model.parameters():  # no two tensors alike
        nn.init.normal_(parameter, std=0.1)
    return model


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def equal(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "net.",
        "backbone.",
        "encoder.",
        "module.base_encoder.",
        "base_model.model.",
        "student.",
        "a.b.c.blocks.",
        "model.model.",
    ],
)
def test_whatever_prefix_all_names_have_comes_off(path, prefix):
    state = vit(1).state_dict()
    torch.save({"state_dict": prefixed(prefix, state), "epoch": 3}, path)
    model = vit(2)
    report = load_checkpoint(model, path)
    assert equal(model, state)
    assert report.complete
    assert report.key_used == f"state_dict.{prefix.removeprefix('module.').removesuffix('.')}"
    assert (report.loaded, report.total) == (len(state), len(state))
    assert report.notes[0].endswith("; 3 of 3 blocks whole")


def test_a_lightning_file_with_more_than_the_model(path):
    class Lit(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = vit(1), nn.Linear(10, 10)

    lit = Lit()
    content = {"state_dict": lit.state_dict(), "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{"state": {}}]}
    torch.save(content, path)
    model = vit(2)
    report = load_checkpoint(model, path)
    assert equal(model, lit.net.state_dict())
    assert (
        "2 tensors that do not stand under 'state_dict.net' were set aside (criterion.weight, criterion.bias)" in report.remarks
    )


@pytest.mark.filterwarnings("ignore")
def test_a_real_lightning_file(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = vit(1)

        def training_step(self, batch, index):
            return self.backbone(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    lit = Lit()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(2, 3, 64, 64)), batch_size=2)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": True}
    trainer = lightning.Trainer(max_steps=1, default_root_dir=tmp_path, accelerator="cpu", **silent)
    trainer.fit(lit, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    subject = resolve(f"timm:{NAME}", checkpoint=tmp_path / "last.ckpt", model_kwargs=SMALL)
    assert equal(subject.model, lit.backbone.state_dict())
    assert subject.loading.key_used == "state_dict.backbone"


def test_the_model_may_have_the_prefix_that_the_file_lacks(path):
    class Probe(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.backbone, self.head = vit(seed), nn.Linear(10, 2)

    state = vit(1).state_dict()
    torch.save(state, path)
    model = Probe(2)
    with pytest.raises(
        CheckpointError, match=r"2 missing in the file \(head.weight, head.bias\).*under 'backbone' of the model"
    ):
        load_checkpoint(model, path)
    load_checkpoint(model, path, partial=True)
    assert equal(model.backbone, state)


def test_a_head_beside_the_backbone_is_part_of_the_model(path):
    state = vit(1).state_dict()
    parts = {name if name.startswith("head.") else f"backbone.{name}": tensor for name, tensor in state.items()}
    torch.save(parts, path)
    model = vit(2)
    assert load_checkpoint(model, path).complete
    assert equal(model, state)


def both(first, second, one=1, other=2):
    return {**prefixed(first, vit(one).state_dict()), **prefixed(second, vit(other).state_dict())}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("student.", "teacher."),
        ("student.backbone.", "teacher.backbone."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("", "ema."),
    ],
)
def test_two_sets_of_weights_in_one_dictionary_are_asked_about(path, first, second):
    torch.save({"state_dict": both(first, second)}, path)
    model = vit(3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="several sets of weights") as caught:
        load_checkpoint(model, path)
    assert equal(model, before)
    names = [f"state_dict.{each.removeprefix('module.')}".strip(".") for each in (first, second)]
    assert all(name in str(caught.value) for name in names)
    assert "--checkpoint-key" in str(caught.value)
    for seed, each in ((1, first), (2, second)):
        if each:
            load_checkpoint(model, path, key=each.strip(".").split(".")[-1 if "encoder" in each else 0])
            assert equal(model, vit(seed).state_dict())


def test_the_same_weights_twice_are_no_question(path):
    torch.save({"state_dict": both("model.", "alias.", 1, 1)}, path)
    model = vit(3)
    assert load_checkpoint(model, path).complete
    assert equal(model, vit(1).state_dict())


def test_of_a_nested_student_and_teacher_the_teacher(path):
    sets = {who: prefixed("module.backbone.", vit(seed).state_dict()) for who, seed in (("student", 1), ("teacher", 2))}
    torch.save({**sets, "epoch": 9}, path)
    model = vit(3)
    report = load_checkpoint(model, path)
    assert equal(model, vit(2).state_dict())
    assert report.key_used == "teacher.backbone"
    assert "the file also holds student.backbone" in report.remarks
    assert load_checkpoint(model, path, key="student").key_used == "student.backbone"
    assert equal(model, vit(1).state_dict())


def test_two_entries_of_unknown_names_are_asked_about(path):
    torch.save({"net": vit(1).state_dict(), "best": vit(2).state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"\(net, best: 44 of 44 tensors each\)"):
        load_checkpoint(vit(3), path)


def test_a_key_that_the_file_does_not_have_is_answered_with_those_it_has(path):
    state = prefixed("module.base_encoder.", vit(1).state_dict())
    torch.save({"state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, path)
    with pytest.raises(CheckpointError, match=r"no weights under 'nonsense'; it holds state_dict\.base_encoder"):
        load_checkpoint(vit(2), path, key="nonsense")
    torch.save({"model": vit(1).state_dict()}, path)
    with pytest.raises(CheckpointError, match="no weights under 'teacher'; it holds model"):
        load_checkpoint(vit(2), path, key="teacher")


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrapper_names_come_off_wherever_they_stand(path, wrapper):
    state = vit(1).state_dict()
    names = {name: name.replace("blocks.1.", f"blocks.1.{wrapper}.").replace("attn.", f"attn.{wrapper}.") for name in state}
    torch.save({f"module.{wrapper}.{names[name]}": tensor for name, tensor in state.items()}, path)
    model = vit(2)
    assert load_checkpoint(model, path).complete
    assert equal(model, state)


def test_blocks_compiled_one_by_one_and_a_compiled_model_to_load_into(path):
    compiled, state = vit(1), vit(1).state_dict()
    for i, block in enumerate(compiled.blocks):
        compiled.blocks[i] = torch.compile(block, backend="eager")
    torch.save(compiled.state_dict(), path)
    model = vit(2)
    assert load_checkpoint(model, path).complete
    assert equal(model, state)
    torch.save(state, path)
    for parameter in compiled.parameters():
        nn.init.zeros_(parameter)
    assert load_checkpoint(compiled, path).complete
    assert all(torch.equal(a, b) for a, b in zip(compiled.state_dict().values(), state.values(), strict=True))


def test_two_keys_that_become_one_are_named(path):
    state = dict(vit(1).state_dict())
    state["blocks.0._orig_mod.norm1.weight"] = torch.zeros(48)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"'blocks.0.norm1.weight' and 'blocks.0._orig_mod.norm1.weight'"):
        load_checkpoint(vit(2), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor.to(torch.complex64), r"complex values \(complex64: blocks.0.attn.qkv.weight\)"),
        (lambda tensor: (tensor * 10).to(torch.int8), r"quantised values \(int8: blocks.0.attn.qkv.weight\)"),
        (lambda tensor: (tensor * 10).to(torch.uint8).flatten()[:100, None], r"quantised values \(uint8"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), r"quantised values \(float8_e4m3fn"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), r"quantised values \(qint8"),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_complex_and_quantised_values_are_refused_by_name(path, change, said, partial):
    state = dict(vit(1).state_dict())
    state["blocks.0.attn.qkv.weight"] = change(state["blocks.0.attn.qkv.weight"])
    torch.save(state, path)
    model = vit(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(model, path, partial=partial)
    assert equal(model, before)


@pytest.mark.filterwarnings("ignore")
def test_a_model_quantised_by_torch_and_the_names_of_other_libraries(path):
    quantised = torch.ao.quantization.quantize_dynamic(vit(1), {nn.Linear})
    torch.save(quantised.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"quantised values \(qint8: blocks.0.attn.qkv._packed_params"):
        load_checkpoint(vit(2), path, partial=True)
    state = dict(vit(1).state_dict())
    state["blocks.0.attn.qkv.qweight"] = torch.zeros(6, 144, dtype=torch.int32)
    del state["blocks.0.attn.qkv.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"quantised values \(int32: blocks.0.attn.qkv.qweight\)"):
        load_checkpoint(vit(2), path, partial=True)


def test_half_precision_is_no_quantisation(path):
    torch.save(vit(1).half().state_dict(), path)
    model = vit(2)
    assert load_checkpoint(model, path).complete
    torch.testing.assert_close(model.head.weight, vit(1).half().head.weight.float())


def test_an_adapter_is_named(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(vit(1), peft.LoraConfig(target_modules=["qkv"], r=2))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter without the weights.*lora_A.*merge"):
        resolve(f"timm:{NAME}", checkpoint=tmp_path / "adapter", model_kwargs=SMALL)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"adapters beside the weights.*lora_A.*merge"):
        resolve(f"timm:{NAME}", checkpoint=tmp_path / "whole.pth", model_kwargs=SMALL, partial=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    merged = model.merge_and_unload()
    torch.save(merged.state_dict(), tmp_path / "merged.pth")
    assert equal(resolve(f"timm:{NAME}", checkpoint=tmp_path / "merged.pth", model_kwargs=SMALL).model, merged.state_dict())


def test_tied_weights_that_a_file_holds_once(tmp_path):
    def tied():
        model = vit(1)
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        return model

    first, state = tied(), dict(tied().state_dict())
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, tmp_path / "model.safetensors")
    for parameter in first.parameters():
        nn.init.zeros_(parameter)
    assert load_checkpoint(first, tmp_path / "model.safetensors").complete
    assert torch.equal(first.blocks[1].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])


def test_positions_of_another_size_are_resized_by_timm_and_said(path):
    state = vit(1, img_size=96).state_dict()
    torch.save({"model": state}, path)
    model = vit(2)
    report = load_checkpoint(model, path)
    assert report.complete
    assert "checkpoint: pos_embed resized from [1, 37, 48] to [1, 17, 48] by timm" in report.notes
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], new_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed.data, expected)
    assert torch.equal(model.blocks[2].mlp.fc2.weight, state["blocks.2.mlp.fc2.weight"])


def test_positions_of_torchvisions_vit(path):
    from torchvision.models import VisionTransformer

    def made(size, seed):
        torch.manual_seed(seed)
        return VisionTransformer(size, 16, 2, 2, 32, 64, num_classes=4)

    torch.save(prefixed("model.", made(64, 1).state_dict()), path)
    model = made(32, 2)
    report = load_checkpoint(model, path)
    assert "encoder.pos_embedding resized from [1, 17, 32] to [1, 5, 32] by torchvision" in report.remarks
    assert torch.equal(model.heads.head.weight, made(64, 1).heads.head.weight)


def test_the_names_of_dinov2_with_registers(path):
    own = vit(1, "vit_small_patch14_reg4_dinov2", num_classes=0, img_size=56, init_values=1.0)
    state = dict(own.state_dict())
    positions, first = state.pop("pos_embed"), torch.randn(1, 1, 48)
    official = {"mask_token": torch.zeros(1, 48), "register_tokens": state.pop("reg_token"), **state}
    official |= {"pos_embed": torch.cat([first, positions], 1), "cls_token": state["cls_token"] - first}
    torch.save({"teacher": prefixed("backbone.", official)}, path)
    model = vit(2, "vit_small_patch14_reg4_dinov2", num_classes=0, img_size=56, init_values=1.0)
    report = load_checkpoint(model, path)
    assert report.complete
    assert "names converted by timm" in report.remarks
    assert not any("resized" in remark for remark in report.remarks)
    assert torch.equal(model.reg_token, own.reg_token)
    torch.testing.assert_close(model.cls_token, own.cls_token)
    assert torch.equal(model.pos_embed, own.pos_embed)


def test_the_names_of_beit(path):
    name = "beit_base_patch16_224"
    state = dict(vit(1, name).state_dict())
    windows = state["blocks.0.attn.relative_position_bias_table"].shape[0]
    torch.save({"module": state | {"blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}}, path)
    model = vit(2, name)
    report = load_checkpoint(model, path)
    assert "left out by timm: blocks.0.attn.relative_position_index" in report.remarks
    assert equal(model, state)
    larger = vit(2, name, img_size=96)
    report = load_checkpoint(larger, path)
    assert sum("relative_position_bias_table resized" in remark for remark in report.remarks) == 3
    assert larger.blocks[0].attn.relative_position_bias_table.shape[0] > windows


def test_a_masked_autoencoder_leaves_its_decoder_aside(path):
    state = vit(1, num_classes=0).state_dict()
    decoder = {
        "mask_token": torch.zeros(1, 1, 24),
        "decoder_embed.weight": torch.zeros(24, 48),
        "decoder_blocks.0.norm1.bias": torch.zeros(24),
    }
    torch.save({"model": {**state, **decoder}}, path)
    model = vit(2, num_classes=0)
    report = load_checkpoint(model, path)
    assert report.complete
    assert equal(model, state)
    assert any("decoder_embed.weight" in remark for remark in report.remarks)


def test_averaged_weights_of_torch(path):
    averaged = torch.optim.swa_utils.AveragedModel(vit(1))
    torch.save(averaged.state_dict(), path)
    model = vit(2)
    assert load_checkpoint(model, path).complete
    assert equal(model, vit(1).state_dict())


def test_another_patch_size_is_resized_and_said(path):
    torch.save(vit(1, "vit_tiny_patch16_224", img_size=32, patch_size=8).state_dict(), path)
    report = load_checkpoint(vit(2), path)
    assert any("patch_embed.proj.weight resized" in remark for remark in report.remarks)


def hf(seed, kind="ViTForImageClassification", **changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64}
    torch.manual_seed(seed)
    return getattr(transformers, kind)(transformers.ViTConfig(**{**sizes, "patch_size": 16, "num_labels": 3, **changes}))


@pytest.mark.parametrize("folder", [False, True])
def test_what_transformers_wrote_into_the_model_it_was_made_from(tmp_path, folder):
    model = hf(1)
    model.save_pretrained(tmp_path)
    file = tmp_path if folder else tmp_path / "model.safetensors"
    subject = resolve(f"hf:{tmp_path}", checkpoint=file)
    assert equal(subject.model.wrapped, model.state_dict())
    assert subject.weights == "checkpoint"
    assert any("names converted by transformers" in note for note in subject.notes)


def test_what_only_transformers_knows_to_be_missing_stays_missing(tmp_path):
    hf(1).save_pretrained(tmp_path)
    hf(2, "ViTModel", num_labels=3).save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"2 missing in the file \(classifier.weight, classifier.bias\)"):
        resolve(f"hf:{tmp_path}", checkpoint=tmp_path / "bare")
    hf(3, num_labels=5).save_pretrained(tmp_path / "five")
    with pytest.raises(CheckpointError, match=r"2 of another shape \(classifier.weight: \[5, 48\], \[3, 48\]"):
        resolve(f"hf:{tmp_path}", checkpoint=tmp_path / "five")


def test_a_file_of_a_trainer_that_wrapped_a_transformers_model(tmp_path):
    model = hf(1)
    model.save_pretrained(tmp_path)
    torch.save({"state_dict": prefixed("model.", model.state_dict())}, tmp_path / "lit.ckpt")
    assert equal(resolve(f"hf:{tmp_path}", checkpoint=tmp_path / "lit.ckpt").model.wrapped, model.state_dict())


def trainer_folder(folder, state, weights="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / weights) if weights.endswith("safetensors") else torch.save(state, folder / weights)
    for other in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "optimizer.bin",
        "scaler.pt",
        "training_args.bin",
        "rng_state_0.pth",
    ):
        torch.save({"state": {}}, folder / other)
    (folder / "random_states_0.pkl").write_bytes(b"x")
    (folder / "config.json").write_text("{}")
    return folder


def test_of_the_same_weights_in_two_formats_the_newer(tmp_path):
    trainer_folder(tmp_path, vit(2).state_dict(), "pytorch_model.bin")
    trainer_folder(tmp_path, vit(1).state_dict())
    model = vit(3)
    load_checkpoint(model, tmp_path)
    assert equal(model, vit(1).state_dict())


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_trainers_folder_is_its_weights(tmp_path, weights):
    model = vit(2)
    assert load_checkpoint(model, trainer_folder(tmp_path / "run", vit(1).state_dict(), weights)).complete
    assert equal(model, vit(1).state_dict())


def test_the_folder_of_a_run_lists_its_checkpoints(tmp_path):
    trainer_folder(tmp_path / "checkpoint-500", vit(1).state_dict())
    assert load_checkpoint(vit(2), tmp_path).complete
    trainer_folder(tmp_path / "checkpoint-1000", vit(2).state_dict())
    listed = r"found 2 \(checkpoint-1000/model.safetensors, checkpoint-500/model.safetensors\); name one"
    with pytest.raises(CheckpointError, match=listed):
        load_checkpoint(vit(2), tmp_path)


def sharded(folder, state):
    folder.mkdir()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for part, own in parts.items():
        save_file({name: state[name] for name in own}, folder / part)
    where = {name: part for part, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_a_checkpoint_in_parts(tmp_path):
    folder, model = sharded(tmp_path / "parts", vit(1).state_dict()), vit(2)
    whole = load_checkpoint(model, folder)
    assert equal(model, vit(1).state_dict())
    assert load_checkpoint(vit(2), folder / "model.safetensors.index.json").sha256 == whole.sha256
    with pytest.raises(CheckpointError, match="one part of a checkpoint in several files"):
        load_checkpoint(vit(2), folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists the part model-00002-of-00002\.safetensors, which is not there"):
        load_checkpoint(vit(2), folder)


def test_a_partial_load_says_which_blocks_are_not_from_the_file(path):
    state = {name.replace("blocks.1.", "layers.1."): tensor for name, tensor in vit(1).state_dict().items()}
    torch.save(state, path)
    report = load_checkpoint(vit(2), path, partial=True)
    assert report.notes[0] == "checkpoint: 32 of 44 tensors of the model came from the file; 2 of 3 blocks whole, not blocks.1"
    assert len(report.not_loaded) == 12


def test_blocks_of_another_name_are_no_prefix(path):
    state = {name.replace("blocks.", "layers."): tensor for name, tensor in vit(1).state_dict().items()}
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"--partial for the 8 of 44 tensors that fit: 0 of 3 blocks whole, not blocks.0"):
        load_checkpoint(vit(2), path)
