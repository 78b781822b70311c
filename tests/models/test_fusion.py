"""BatchNorm fusion: the same outputs, and nothing is changed that another layer reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ackd_lightning.models.fusion import fused
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import DataInfo

IMAGE = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def used(network: nn.Module) -> nn.Module:
    """Give BatchNorms statistics and weights that are not those of the identity."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 3.0)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(each, nn.BatchNorm2d) for each in network.modules())


def run(network):
    return [network(IMAGE)]


@pytest.mark.parametrize(
    ("name", "left"), [("resnet8", 0), ("wrn_16_2", 6), ("mobilenetv2_x0_5", 0), ("shufflenetv1", 0), ("resnet18", 0)]
)
def test_outputs_stay_and_norms_go(name, left):
    network = used(create_model(name, 10))
    before = copy.deepcopy(network.state_dict())
    result = fused(network, run)
    torch.testing.assert_close(run(result)[0], run(network)[0], rtol=1e-3, atol=1e-3)
    assert norms(network) > norms(result) == left  # a BatchNorm before its convolution has none to fuse with
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(each.requires_grad for each in result.parameters())


class Shared(nn.Module):
    """The output of a convolution goes through BatchNorm, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, image):
        feature = self.conv(image)
        return (self.norm(feature) + feature).mean(dim=(2, 3))


class Twice(nn.Module):
    """A convolution that is called twice, with BatchNorm after one of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, image):
        return self.norm(self.conv(self.conv(image))).mean(dim=(2, 3))


@pytest.mark.parametrize("network", [Shared(), Twice(), nn.Sequential(nn.Flatten(), nn.Linear(768, 2))])
def test_what_cannot_be_fused_is_left_alone(network):
    assert fused(used(network), run) is None


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch advises against the old forms
@pytest.mark.parametrize(
    "norm",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm],
    ids=lambda each: each.__module__,
)
def test_a_convolution_whose_weight_is_computed_keeps_its_norm(norm):
    network = create_model("resnet8", 10)
    network.conv1 = norm(network.conv1)
    result = fused(used(network), run)
    torch.testing.assert_close(run(result)[0], run(network)[0], rtol=1e-3, atol=1e-3)
    assert norms(result) == 1


def test_a_teacher_runs_the_copy_and_remains_what_it_was():
    teacher = FrozenTeacher(used(create_model("resnet8", 10)), mean=[0.5] * 3, std=[0.25] * 3)
    teacher.adapt_to(DataInfo(10, 16, (0.4,) * 3, (0.2,) * 3))
    before, keys = teacher(IMAGE), list(teacher.network.state_dict())
    assert teacher.fuse(16)
    assert norms(teacher.running()) == 0
    assert list(teacher.network.state_dict()) == keys
    after = teacher(IMAGE)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(after.features, before.features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert not teacher.train().running().training
    assert {each.dtype for each in teacher.double().running().parameters()} == {torch.float64}  # the copy follows
