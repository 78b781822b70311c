from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import image_channels
from ackd_lightning.models.features import StagePlan, pooled, require_embedding, require_stages, staged_forward
from ackd_lightning.models.finding import check_plan, plan_for, probe, require_plan
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher, Teacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import DataInfo, NetOutput, NetSpec


class Plain(nn.Module):
    """A network without feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(image.mean(dim=(2, 3)))


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
def test_features_are_what_the_named_modules_return_in_the_networks_own_forward(name, size):
    torch.manual_seed(0)
    network = create_model(name, 7).eval()
    seen = {}
    for each in plan_for(network).features:
        network.get_submodule(each).register_forward_hook(lambda _, __, value, name=each: seen.update({name: value}))
    image = torch.randn(2, 3, size, size)
    plan = plan_for(network)
    with torch.no_grad():
        output = staged_forward(network, plan, image)
        assert torch.equal(output.logits, network(image))
    assert len(output.features) == len(plan.features)
    assert all(torch.equal(value, seen[name]) for name, value in zip(plan.features, output.features, strict=True))
    torch.testing.assert_close(output.embedding, output.features[-1].mean(dim=(2, 3)))
    assert output.branches == ()


def test_the_last_feature_of_a_wide_resnet_includes_its_batchnorm_and_relu():
    network = create_model("wrn_16_2", 7).eval()
    output = staged_forward(network, plan_for(network), torch.randn(2, 3, 16, 16))
    assert (output.features[-1] >= 0).all()
    assert (output.features[-2] < 0).any()  # earlier stages return the residual sums


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
    assert probe(network, 8, channels=1) == NetSpec(num_classes=6)


def test_a_teacher_is_not_moved_to_the_meta_device_by_probing():
    teacher = FrozenTeacher(create_model("resnet8", 7))
    with pytest.raises(ValueError, match="probe its network"):
        probe(teacher, 32)
    assert all(each.device.type == "cpu" for each in teacher.parameters())
    assert probe(teacher.network, 32).num_classes == 7


def test_a_network_without_stages_gives_logits_only():
    network = Plain()
    image = torch.randn(2, 3, 4, 4)
    assert plan_for(network) is None
    output = staged_forward(network, None, image)
    assert torch.equal(output.logits, network(image))
    assert output.features is None
    assert output.embedding is None


@pytest.mark.parametrize("wrong", ["layer1", ("layer1", "layer2")])
def test_an_attribute_that_is_not_a_plan_is_refused(wrong):
    network = Plain()
    network.stage_plan = wrong
    with pytest.raises(ACKDError, match=r"Plain.*layer1.*StagePlan"):
        plan_for(network)


def test_a_plan_on_an_instance_wins_over_what_is_found():
    network = create_model("resnet18", 7)
    found = StagePlan(("maxpool", "layer1", "layer2", "layer3", "layer4"), "fc")
    assert plan_for(network) == found
    assert plan_for(network) is network.stage_plan  # searched once
    own = StagePlan(("maxpool", "layer2", "layer4"), "fc")
    network.stage_plan = own
    assert plan_for(network) is own
    assert plan_for(create_model("resnet18", 7)) == found


def test_pooling_is_the_mean_over_positions():
    feature = torch.arange(16.0).view(1, 2, 2, 4)
    torch.testing.assert_close(pooled(feature), torch.tensor([[3.5, 11.5]]))


class Chain(nn.Module):
    """A network with a norm that a stage plan can leave out."""

    stage_plan = StagePlan(("stem", "relu"), classifier="fc")

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
        self.norm, self.relu, self.fc = nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.norm(self.stage(self.stem(image)))).mean(dim=(2, 3)))


BUILT = {
    "student": lambda network: BranchyStudent(network, [], input_size=16),
    "branches": lambda network: BranchyStudent(network, input_size=16),
    "teacher": lambda network: Teacher(network, input_size=16),
    "frozen teacher": lambda network: FrozenTeacher(network, input_size=16),
    "teacher of the data's size": lambda network: FrozenTeacher(network).adapt_to(DataInfo(10, 16)),
    "teacher of its own size": lambda network: FrozenTeacher(network, input_size=24).adapt_to(DataInfo(10, 16)),
}


@pytest.mark.parametrize("features", [("stem", "stage"), ("stem", "norm"), ("stage", "relu")])
def test_no_plan_changes_what_a_network_computes(features):
    torch.manual_seed(0)
    network, image = Chain(), torch.randn(4, 3, 8, 8)
    network.stage_plan = StagePlan(features, "fc")
    student = BranchyStudent(network, input_size=8)
    twin = copy.deepcopy(network)
    for _ in range(2):  # in training mode, where every call changes running statistics
        assert torch.equal(student(image).logits, twin(image))
    student.eval()
    assert torch.equal(student(image).logits, twin.eval()(image))
    (branch,) = student.branches
    branch.suffix.network.load_state_dict(twin.state_dict(), strict=False)
    torch.testing.assert_close(student(image).branches[0].logits, twin(image))
    assert torch.equal(FrozenTeacher(network)(image).logits, network(image))


WRONG = {
    "unknown": (StagePlan(("stem", "rule"), "fc"), "'rule'.*relu"),
    "unknown classifier": (StagePlan(("stem", "relu"), "head"), "'head'"),
    "order": (StagePlan(("relu", "stem"), "fc"), r"\['stem', 'relu'\]"),
    "not a map": (StagePlan(("stem", "fc"), "fc"), "'fc'"),
}


@pytest.mark.parametrize(("plan", "found"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
def test_a_wrong_plan_is_refused_in_one_sentence_when_a_network_is_built(build, plan, found):
    network = Chain()
    network.stage_plan = plan
    with pytest.raises(ACKDError, match=found) as caught:
        build(network)
    assert "\n" not in str(caught.value)
    assert "Chain" in str(caught.value)
    network.stage_plan = Chain.stage_plan
    build(network)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "mobilenetv2_x0_5", "shufflenetv1", "resnet18"])
def test_right_plans_pass_in_every_precision(name):
    network = create_model(name, 5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check_plan(network.to(dtype), plan_for(network), 32)


class Restless(nn.Sequential):
    """A network that draws random numbers and counts its calls in evaluation mode too."""

    stage_plan = StagePlan(("0", "1"), classifier="3")

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        feature = self[1](self[0](nn.functional.dropout(image, 0.0, training=True)))
        return self[3](pooled(feature))


def test_checking_a_plan_leaves_weights_modes_hooks_and_random_numbers_alone():
    network = Restless()
    network[1].eval()
    seen = []
    network[0].register_forward_hook(lambda *_: seen.append("called"))
    before, modes = copy.deepcopy(network.state_dict()), [each.training for each in network.modules()]
    state = torch.get_rng_state()
    check_plan(network, network.stage_plan, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert seen == []


def test_networks_on_the_meta_device_can_be_checked_and_grow_branches():
    with torch.device("meta"):
        network = Chain()
    BranchyStudent(network, input_size=16)


def test_weights_that_are_not_finite_are_no_fault_of_the_plan():
    network = create_model("resnet8", 5)
    nn.init.constant_(network.conv1.weight, float("nan"))
    check_plan(network, plan_for(network), 16)


def test_the_first_convolution_may_be_defined_after_others():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1, self.layer2 = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
            self.stem, self.fc = nn.Conv2d(3, 8, 3, 1, 1), nn.Linear(32, 5)

        def forward(self, image):
            return self.fc(self.layer2(self.layer1(self.stem(image).relu()).relu()).relu().mean(dim=(2, 3)))

    assert image_channels(Late()) == 3
    assert plan_for(Late()) is not None
    six = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1))
    assert image_channels(six) == 6


def test_a_plan_is_checked_on_images_with_the_channels_of_the_network():
    network = create_model("resnet8", 5)
    network.conv1 = nn.Conv2d(1, 16, 3, padding=1)
    assert image_channels(network) == 1
    assert image_channels(Plain()) == 3
    BranchyStudent(network, input_size=16)
    FrozenTeacher(network, input_size=16)


def test_probing_takes_the_precision_and_torchs_own_hooks_of_a_network():
    network = create_model("resnet8", 7).double()
    network.fc = torch.nn.utils.spectral_norm(network.fc)
    seen = []
    network.fc.register_forward_hook(lambda *_: seen.append("called"))
    assert probe(network, 16).num_classes == 7
    assert seen == []


def test_features_and_embedding_are_returned_when_stages_are_known():
    network = create_model("resnet8", 7)
    spec, output = probe(network, 16), staged_forward(network, plan_for(network), torch.zeros(2, 3, 16, 16))
    assert require_stages(spec, "the teacher", "method AT") is spec.features
    assert require_stages(output, "the teacher", "method AT") is output.features
    assert require_embedding(spec, "the teacher", "method CRD") == 64
    assert require_embedding(output, "the teacher", "method CRD") is output.embedding
    assert require_plan(network, "the teacher", "method ATSC") is network.stage_plan


def test_unknown_stages_are_refused_by_one_message():
    asked = [
        lambda: require_stages(probe(Plain(), 4), "the teacher", "method AT"),
        lambda: require_stages(NetOutput(torch.zeros(1, 5)), "the teacher", "method AT"),
        lambda: require_embedding(probe(Plain(), 4), "the teacher", "method AT"),
        lambda: require_embedding(NetOutput(torch.zeros(1, 5)), "the teacher", "method AT"),
        lambda: require_plan(Plain(), "the teacher", "method AT"),
    ]
    messages = set()
    for ask in asked:
        with pytest.raises(ACKDError) as caught:
            ask()
        messages.add(str(caught.value))
    (message,) = messages
    for part in ("the teacher", "method AT", "`taps`"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "options", "channels"),
    [
        ("timm:tresnet_m", {}, 3),
        ("timm:tresnet_m", {"in_chans": 1}, 1),
        ("timm:csatv2", {}, 3),
        ("timm:test_byobnet", {"in_chans": 5}, 5),
        ("resnet8", {"in_chans": 4}, 4),
    ],
)
def test_channels_of_networks_whose_first_convolution_reads_blocks_or_frequencies(name, options, channels):
    if name.startswith("timm:") and not timm.is_model(name.removeprefix("timm:")):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        network = create_model(name, 4, **options)
    assert image_channels(network) == channels
