"""Training data: what is held out, which images a step sees, how they are changed and mixed; the same for any process."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from PIL import Image

from collapse_probe.data.splits import TILES, split_data, stratified
from collapse_probe.errors import DataError, SettingError
from collapse_probe.models.vit import ViTSettings
from collapse_probe.training.batches import Sharing, augmented, open_training_data, order_of, share_of
from collapse_probe.training.loss import Mixer, smoothed
from collapse_probe.training.penalties.base import MixedLabels
from collapse_probe.training.recipe import Augmentation, Recipe

RECIPE = Recipe(
    name="tiny",
    model=ViTSettings(image_size=8, patch_size=2, classes=10, depth=1, width=16, heads=2),
    steps=10,
    batch_size=8,
    augmentation=Augmentation(shift=1, contrast=0.2, noise=0.05, flip=True),
)
PICTURES = Augmentation(crop=0.3, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, erase=0.5, flip=True)


def test_digits_are_split_1437_to_360_each_class_by_its_share():
    split = split_data("bundled:digits")
    assert (len(split.train), len(split.held_out)) == (1437, 360)
    assert not set(split.train.names) & set(split.held_out.names)
    whole, held = (
        collections.Counter(labels) for labels in (split.train.labels + split.held_out.labels, split.held_out.labels)
    )
    assert all(abs(held[c] - 0.2 * whole[c]) <= 1 for c in whole)
    assert split_data("bundled:digits").held_out.names == split.held_out.names


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_stratified_split_is_exact(share):
    labels = np.random.default_rng(0).integers(0, 5, 103).tolist()
    kept, held = stratified(labels, share)
    assert sorted(kept + held) == list(range(103))
    assert len(held) == int(np.ceil(103 * share))


def test_no_photograph_has_pixels_on_both_sides():
    split = split_data("bundled:photos")
    crops = [{name.partition("#")[0] for name in part.names} for part in (split.train, split.held_out)]
    assert not crops[0] & crops[1]
    assert not any(crop.endswith("/0.png") for crop in crops[0] | crops[1])  # the whole photograph
    assert len(split.held_out) == TILES**2 * len(split.classes)
    assert set(split.train.labels) == set(split.held_out.labels) == set(range(len(split.classes)))
    tile = split.train[0]
    assert tile.width == tile.height >= 32


def folders(root, classes=("cat", "dog"), count=4, splits=("train", "val")):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_a_folder_is_taken_as_it_is_laid_out(tmp_path):
    split = split_data(str(folders(tmp_path)))
    assert (len(split.train), len(split.held_out), split.classes) == (8, 8, ("cat", "dog"))


def test_held_out_images_may_lie_elsewhere(tmp_path):
    one, other = folders(tmp_path / "a", splits=("train",)), folders(tmp_path / "b", splits=("val",), count=2)
    split = split_data(str(one), str(other / "val"))
    assert (len(split.train), len(split.held_out)) == (8, 4)


def test_other_classes_and_missing_labels_are_told(tmp_path):
    one, other = folders(tmp_path / "a"), folders(tmp_path / "b", classes=("cat", "cow"))
    with pytest.raises(DataError, match="cow, dog"):
        split_data(str(one), str(other))
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    with pytest.raises(DataError, match="no labels"):
        split_data(str(flat))


@pytest.mark.parametrize(("batch", "world"), [(8, 1), (8, 2), (32, 4), (6, 3)])
def test_shares_are_a_partition_closed_under_the_mirror(batch, world):
    shares = [share_of(batch, rank, world) for rank in range(world)]
    assert sorted(place for share in shares for place in share) == list(range(batch))
    for share in shares:
        assert [batch - 1 - place for place in share] == share[::-1]


def test_a_batch_that_cannot_be_shared_is_told():
    with pytest.raises(SettingError, match="multiple of 6"):
        share_of(8, 0, 3)


def test_an_epoch_shows_every_image_at_most_once_and_epochs_differ():
    epochs = [torch.cat([order_of(35, 8, step, seed=0) for step in range(4 * e, 4 * e + 4)]) for e in range(2)]
    assert all(len(set(each.tolist())) == 32 for each in epochs)
    assert not torch.equal(*epochs)
    assert not torch.equal(order_of(35, 8, 0, seed=0), order_of(35, 8, 0, seed=1))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_see_the_batch_of_one(world):
    split = split_data("bundled:digits")
    whole = list(open_training_data(split, RECIPE, (8, 8), Sharing()).batches(3, 6))
    for rank in range(world):
        part = list(open_training_data(split, RECIPE, (8, 8), Sharing(rank, world)).batches(3, 6))
        for (images, labels), (mine, own) in zip(whole, part, strict=True):
            share = share_of(8, rank, world)
            assert torch.equal(images[share], mine)
            assert torch.equal(labels[share], own)


def test_held_out_images_are_shared_out_each_once():
    split = split_data("bundled:digits")
    parts = [list(open_training_data(split, RECIPE, (8, 8), Sharing(rank, 2)).held_out()) for rank in range(2)]
    labels = torch.cat([labels for part in parts for _, labels in part])
    assert len(labels) == 360
    assert sorted(labels.tolist()) == sorted(split.held_out.labels)


def test_without_augmentation_images_are_what_the_analysis_sees():
    from collapse_probe.data.images import batches
    from collapse_probe.data.preprocessing import from_timm_config

    recipe = RECIPE.vary(augmentation=Augmentation(), batch_size=1437)
    images, labels = next(open_training_data(split_data("bundled:digits"), recipe, (8, 8), Sharing()).batches(0, 1))
    train = split_data("bundled:digits").train
    half = (0.5, 0.5, 0.5)
    preprocess = from_timm_config(
        {"input_size": (3, 8, 8), "mean": half, "std": half, "crop_pct": 1.0, "interpolation": "bicubic"}
    )
    seen = torch.cat([batch.pixels for batch in batches(train, preprocess, batch_size=500)])
    order = order_of(1437, 1437, 0, 0)
    assert torch.equal(images, seen[order])
    assert labels.tolist() == [train.labels[i] for i in order.tolist()]


def test_a_shift_moves_an_image_and_repeats_its_edge():
    images = torch.arange(9.0).reshape(1, 1, 3, 3)
    seen = {tuple(augmented(images, Augmentation(shift=1), seed, [0], 1).flatten().tolist()) for seed in range(60)}
    expected = set()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            rows, columns = (np.clip(np.arange(3) - by, 0, 2) for by in (down, right))
            expected.add(tuple(images[0, 0].numpy()[np.ix_(rows, columns)].flatten().tolist()))
    assert seen == expected


def test_contrast_and_noise_stay_in_their_bounds():
    images = torch.ones(4000, 1, 1, 1)
    share = list(range(4000))
    factors = augmented(images, Augmentation(contrast=0.2), 0, share, 4000).flatten()
    assert 0.8 <= factors.min() < 0.805
    assert 1.195 < factors.max() <= 1.2
    noise = augmented(images, Augmentation(noise=0.05), 0, share, 4000).flatten() - 1
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)


def lessons(tmp_path, **changes):
    root = folders(tmp_path / "data") if not (tmp_path / "data").exists() else tmp_path / "data"
    recipe = RECIPE.vary(batch_size=4, augmentation=PICTURES, **changes)
    return open_training_data(split_data(str(root)), recipe, (8, 8), Sharing())


def test_pictures_changed_one_by_one_depend_on_seed_step_and_place_alone(tmp_path):
    whole = list(lessons(tmp_path).batches(0, 5))
    later = list(lessons(tmp_path, workers=1).batches(2, 5))
    state = torch.get_rng_state()
    for (images, labels), (again, same) in zip(whole[2:], later, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(next(lessons(tmp_path, seed=1).batches(0, 1))[0], whole[0][0])


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    folders(tmp_path / "data")
    (tmp_path / "data" / "train" / "cat" / "0.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cat/0\.png"):
        list(lessons(tmp_path).batches(0, 2))


def mixed_slowly(images, labels, patch, classes, smoothing, mixed):
    """The share of each patch that is the image's own, pixel by pixel, from images of distinct constant colour."""
    batch, _, height, width = images.shape
    expected = torch.zeros(batch, (height // patch) * (width // patch), classes)
    for b in range(batch):
        own, other = float(images[b, 0, 0, 0]), float(images[batch - 1 - b, 0, 0, 0])
        one, two = (smoothed(labels[i : i + 1], classes, smoothing)[0] for i in (b, batch - 1 - b))
        for p in range(expected.shape[1]):
            row, column = divmod(p, width // patch)
            cell = mixed[b, 0, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            share = float(((cell - other) / (own - other)).mean())
            expected[b, p] = share * one + (1 - share) * two
    return expected


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_patch_targets_are_the_labels_of_the_pixels_in_the_patch(mixup, cutmix):
    recipe = RECIPE.vary(mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    mixer = Mixer(recipe, classes=10, patch=2)
    images = torch.linspace(-1, 1, 8)[:, None, None, None].expand(8, 3, 8, 8).contiguous()
    labels = torch.arange(8)
    for step in range(6):
        found = mixer(images.clone(), labels, step)
        expected = mixed_slowly(images, labels, 2, 10, 0.1, found.images)
        torch.testing.assert_close(found.patch_targets_BPK, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.patch_targets_BPK.mean(1), found.targets_BK, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.targets_BK.sum(1), torch.ones(8), rtol=0, atol=1e-6)


def test_mixing_the_shares_is_mixing_the_batch():
    recipe = RECIPE.vary(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    images, labels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    for step in range(4):
        whole = Mixer(recipe, 10, 2)(images.clone(), labels, step)
        for rank in range(2):
            share = share_of(8, rank, 2)
            part = Mixer(recipe, 10, 2)(images[share].clone(), labels[share], step)
            assert torch.equal(part.images, whole.images[share])
            assert torch.equal(part.targets_BK, whole.targets_BK[share])
            assert torch.equal(part.patch_targets_BPK, whole.patch_targets_BPK[share])


def test_without_mixing_the_targets_are_smoothed_as_in_timm():
    found = Mixer(RECIPE.vary(label_smoothing=0.1), 10, 2)(torch.zeros(2, 3, 8, 8), torch.tensor([3, 0]), 0)
    assert found.targets_BK[0, 3] == pytest.approx(0.91)
    assert found.targets_BK[0, 0] == pytest.approx(0.01)
    assert torch.equal(MixedLabels(found.targets_BK, found.patch_targets_BPK).of_patches(16)[:, 5], found.targets_BK)
