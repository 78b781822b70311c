from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ackd_lightning.models.features import StagePlan, call_in_order, plan_for, pooled, probe, staged_forward
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import NetSpec


class Plain(nn.Module):
    """A network without a plan whose forward is its own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(image.mean(dim=(2, 3)))


def randomise_statistics(network: nn.Module) -> None:
    """Move running statistics away from 0 and 1, so that a BatchNorm that is left out shows."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet8", 32),
        ("resnet8x4", 16),
        ("wrn_16_2", 32),
        ("mobilenetv2_x0_5", 32),
        ("shufflenetv1", 32),
        ("resnet18", 64),
    ],
)
def test_stages_in_order_equal_the_networks_own_forward(name, size):
    torch.manual_seed(0)
    network = create_model(name, 7).eval()
    randomise_statistics(network)
    image = torch.randn(2, 3, size, size)
    plan = plan_for(network)
    with torch.no_grad():
        output = staged_forward(network, plan, image)
        assert torch.equal(output.logits, network(image))
    assert len(output.features) == len(plan.stages) + 1
    torch.testing.assert_close(output.embedding, output.features[-1].mean(dim=(2, 3)))
    assert output.branches == ()
    first = call_in_order(network, plan.stem, image)
    assert torch.equal(output.features[0], first)
    assert torch.equal(output.features[1], call_in_order(network, plan.stages[0], first))


def test_the_last_feature_of_a_wide_resnet_includes_its_batchnorm_and_relu():
    network = create_model("wrn_16_2", 7).eval()
    output = staged_forward(network, plan_for(network), torch.randn(2, 3, 16, 16))
    assert (output.features[-1] >= 0).all()
    assert (output.features[-2] < 0).any()  # earlier stages hand out the residual sums


# cut points of the paper's students; None where only the size is given
SPECS = [
    ("resnet20", 32, ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8))),
    ("resnet56", 32, ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8))),
    ("wrn_40_1", 32, ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8))),
    ("mobilenetv2_x0_5", 32, ((None, 16, 16), (None, 16, 16), (None, 8, 8), (None, 4, 4), (1280, 2, 2))),
    ("shufflenetv1", 32, ((None, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4))),
    ("resnet18", 64, ((64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2))),
    ("resnet18", 224, ((64, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))),
]


@pytest.mark.parametrize(("name", "size", "features"), SPECS)
def test_probed_shapes_are_those_of_the_specification(name, size, features):
    with torch.device("meta"):
        network = create_model(name, 100)
    spec = probe(network, size)
    assert spec.num_classes == 100
    assert spec.embedding == features[-1][0]
    assert len(spec.features) == len(features)
    for (channels, *size_found), (expected, *size_expected) in zip(spec.features, features, strict=True):
        assert size_found == size_expected
        assert expected in (None, channels)


def test_probing_equals_what_a_real_image_gives_and_includes_branches():
    student = BranchyStudent(create_model("resnet8", 7)).eval()
    spec = probe(student, 16)
    output = student(torch.zeros(1, 3, 16, 16))
    assert spec.features == tuple(tuple(feature.shape[1:]) for feature in output.features)
    branch = NetSpec(num_classes=7, features=((64, 4, 4),), embedding=64)
    assert spec.branches == (branch, branch)


@pytest.mark.parametrize("training", [True, False])
def test_probing_leaves_weights_mode_and_device_alone(training):
    network = create_model("resnet8", 7).train(training)
    before = copy.deepcopy(network.state_dict())
    probe(network, 32)
    assert all(each.training is training for each in network.modules())
    assert all(each.device.type == "cpu" for each in network.parameters())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_network_in_training_whose_last_map_is_one_pixel_can_be_probed():
    assert probe(create_model("resnet8", 7).train(), 4).features[-1] == (64, 1, 1)  # BatchNorm would refuse one value


def test_probing_takes_other_channels():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
    assert probe(network, 8, in_channels=1) == NetSpec(num_classes=6, features=(), embedding=0)


def test_a_teacher_is_not_moved_to_the_meta_device_by_probing():
    teacher = FrozenTeacher(create_model("resnet8", 7))
    with pytest.raises(ValueError, match="probe its network"):
        probe(teacher, 32)
    assert all(each.device.type == "cpu" for each in teacher.parameters())
    assert probe(teacher.network, 32).num_classes == 7


def test_a_network_without_a_plan_gives_logits_only():
    network = Plain()
    image = torch.randn(2, 3, 4, 4)
    assert plan_for(network) is None
    output = staged_forward(network, None, image)
    assert torch.equal(output.logits, network(image))
    assert output.features == ()
    assert output.embedding.shape == (2, 0)


def test_an_attribute_that_is_no_plan_is_not_taken_for_one():
    network = Plain()
    network.stage_plan = "layer1"
    assert plan_for(network) is None


def test_a_plan_on_an_instance_wins_over_torchvisions():
    network = create_model("resnet18", 7)
    assert plan_for(network).stages == (("layer1",), ("layer2",), ("layer3",), ("layer4",))
    own = StagePlan(("conv1", "bn1", "relu", "maxpool"), (("layer1", "layer2"), ("layer3", "layer4")), (), "fc")
    network.stage_plan = own
    assert plan_for(network) is own


def test_pooling_is_the_mean_over_positions():
    feature = torch.arange(16.0).view(1, 2, 2, 4)
    torch.testing.assert_close(pooled(feature), torch.tensor([[3.5, 11.5]]))
