"""Recalibration: the plain average of batch statistics, everything else as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from collapse_probe.errors import DataError, ModelError, SettingError
from collapse_probe.models.batchnorm import recalibrate
from collapse_probe.models.vit import ViT


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return model.append(nn.BatchNorm2d(2, momentum=0.3))


def batches(count: int, sizes: tuple[int, ...] = (4, 2)) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(sizes[i % len(sizes)], 3, 8, 8) for i in range(count)]


def test_it_is_the_mean_of_batch_means_and_variances() -> None:
    model, given = small(), batches(3)
    model(torch.full((2, 3, 8, 8), 9.0))  # statistics from before, which must not count
    assert recalibrate(model, given) == 3
    outs = [model[1](batch) for batch in given]  # dropout is off
    mean = torch.stack([out.mean((0, 2, 3)) for out in outs]).mean(0)
    var = torch.stack([out.transpose(0, 1).flatten(1).var(1) for out in outs]).mean(0)
    torch.testing.assert_close(model[2].running_mean, mean)
    torch.testing.assert_close(model[2].running_var, var)
    assert model[2].num_batches_tracked == 3


def test_it_stops_after_n_batches_and_takes_no_further_one() -> None:
    taken: list[int] = []

    def endless() -> Iterator[tuple[Tensor, int]]:
        while True:
            taken.append(1)
            yield torch.randn(2, 3, 8, 8), 7

    assert recalibrate(small(), endless(), n=4) == 4
    assert len(taken) == 4


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_momenta_come_back(training: bool) -> None:
    model = small().train(training)
    model[0].train(not training)
    recalibrate(model, batches(2))
    assert [m.training for m in model] == [not training, *[training] * 5]
    assert [model[2].momentum, model[5].momentum] == [0.1, 0.3]


def test_after_a_failure_everything_is_as_it_was() -> None:
    model = small()
    model(batches(1)[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DataError, match="expected images"):
        recalibrate(model, [batches(1)[0], "no images"])
    with pytest.raises(DataError, match="no images"):
        recalibrate(model, [])
    with pytest.raises(RuntimeError):
        recalibrate(model, [torch.zeros(2, 5, 8, 8)])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model[2].momentum == 0.1
    assert model.training


def test_it_is_refused_where_there_is_nothing_to_do() -> None:
    with pytest.raises(ModelError, match="ViT has no BatchNorm2d"):
        recalibrate(ViT(depth=1, width=8, heads=1, patch_size=8, image_size=16), batches(1))
    with pytest.raises(SettingError, match="at least one batch"):
        recalibrate(small(), batches(1), n=0)


def test_re_attention_is_recalibrated() -> None:
    torch.manual_seed(0)
    settings = {"depth": 2, "width": 8, "heads": 2, "patch_size": 8, "image_size": 16, "classes": 3}
    model = ViT(**settings, fixes={"re-attention": {}}).eval()
    images = torch.randn(4, 3, 16, 16)
    before = model(images)
    recalibrate(model, [images])
    model.train()
    trained = model(images)
    model.eval()
    assert (before - trained).abs().max() > (model(images) - trained).abs().max()
