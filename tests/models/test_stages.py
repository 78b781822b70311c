from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import StagePlan, staged_forward
from ackd_lightning.models.finding import plan_for, probe, use_taps
from ackd_lightning.models.freezing import parts_by_stage
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from models.networks import (
    CLASSES,
    Checks,
    Chooses,
    CifarLike,
    OnlyAt,
    PoolingBlocks,
    SkipsAhead,
    Tuples,
    TwoBranches,
    VGGLike,
    ViTLike,
)


def lenet() -> nn.Module:
    convolutions = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def normed(norm) -> nn.Module:
    network = CifarLike()
    network.conv = norm(network.conv)
    network.blocks[2].second = norm(network.blocks[2].second)
    network(torch.zeros(1, 3, 32, 32))  # the old kind keeps a weight that is not a leaf and cannot be copied
    return network


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return normed(nn.utils.weight_norm)


STAGED = {
    "three resolutions": (CifarLike, 32, ("conv", "blocks.1", "blocks.3", "blocks.5"), True),
    "VGG": (VGGLike, 32, ("features.1", "features.3", "features.8", "features.13"), False),
    "pooling in blocks": (PoolingBlocks, 32, ("block1", "block2.2", "block3"), True),
    "LeNet": (lenet, 28, ("2", "4"), False),
    "ViT": (ViTLike, 32, ("patches", "blocks.0", "blocks.1", "blocks.2", "blocks.3"), False),
    "tuples": (Tuples, 32, ("stem", "one", "two", "three"), False),
    "values": (Checks, 32, ("conv", "blocks.1", "blocks.3", "blocks.5"), True),
    "skip around a stage": (SkipsAhead, 32, ("conv", "blocks.1", "blocks.5"), True),
    "only 32 pixels": (lambda: OnlyAt(32), 32, ("stem", "one", "two"), False),
    "only 224 pixels": (lambda: OnlyAt(224), 224, ("stem", "one", "two"), False),
    "weight_norm": (
        lambda: normed(nn.utils.parametrizations.weight_norm),
        32,
        ("conv", "blocks.1", "blocks.3", "blocks.5"),
        True,
    ),
    "old weight_norm": (old_weight_norm, 32, ("conv", "blocks.1", "blocks.3", "blocks.5"), True),
    "four channels": (lambda: CifarLike(4), 32, ("conv", "blocks.1", "blocks.3", "blocks.5"), True),
    "64-bit": (lambda: CifarLike().double(), 32, ("conv", "blocks.1", "blocks.3", "blocks.5"), True),
}


@pytest.mark.parametrize(("make", "size", "features", "pooled"), STAGED.values(), ids=STAGED)
def test_stages_of_networks_as_people_write_them(make, size, features, pooled):
    network = make()
    plan = plan_for(network)
    assert plan.features == features
    assert plan.pooled is pooled
    channels = next(each.in_channels for each in network.modules() if isinstance(each, nn.Conv2d))
    image = torch.randn(2, channels, size, size, dtype=next(network.parameters()).dtype)
    output = staged_forward(network.eval(), plan, image)
    assert torch.equal(output.logits, network(image))
    spec = probe(network, size)
    assert spec.features == tuple(tuple(each.shape[1:]) for each in output.features)
    assert spec.embedding == output.embedding.shape[1]
    assert spec.num_classes == CLASSES
    if pooled:
        torch.testing.assert_close(output.embedding, output.features[-1].mean(dim=(2, 3)))
    student = BranchyStudent(network, input_size=size).train()
    output = student(image)
    assert len(output.branches) == min(2, len(features) - 1)
    sum(branch.logits.square().sum() for branch in output.branches).backward()
    assert all(each.grad is not None for each in student.branches.parameters())


@pytest.mark.parametrize("make", [TwoBranches, Chooses, lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))])
def test_networks_without_stages_have_logits_and_peers(make):
    network, image = make(), torch.randn(2, 3, 32, 32)
    network(image)
    assert plan_for(network) is None
    assert probe(network, 32).num_classes == CLASSES
    assert FrozenTeacher(network, input_size=32)(image).features is None
    student = BranchyStudent(network, ["peer"], input_size=32)
    assert student(image).branches[0].logits.shape == (2, CLASSES)
    with pytest.raises(ACKDError, match="taps"):
        BranchyStudent(network, input_size=32)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_torchscript_has_logits_alone(kind):
    network, image = create_model("resnet8", CLASSES).eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.jit.script(network) if kind == "script" else torch.jit.trace(network, image)
    assert plan_for(compiled) is None
    assert probe(compiled, 32).num_classes == CLASSES
    teacher = FrozenTeacher(compiled, input_size=32)
    torch.testing.assert_close(teacher(image).logits, network(image))
    assert not any(each.requires_grad for each in teacher.parameters())
    assert all(each.requires_grad for each in compiled.parameters())
    assert BranchyStudent(compiled, [], input_size=32)(image).logits.shape == (2, CLASSES)
    with pytest.raises(ACKDError, match="branch 'D3B1'"):
        BranchyStudent(compiled, ["D3B1"], input_size=32)


def test_one_architecture_of_two_libraries_has_the_same_stages():
    plans = []
    for name in ("resnet18", "timm:resnet18"):
        with torch.device("meta"):
            plans.append(plan_for(create_model(name, CLASSES)))
    assert plans[0] == plans[1] == StagePlan(("maxpool", "layer1", "layer2", "layer3", "layer4"), "fc")


def stages_of(name: str) -> StagePlan:
    with torch.device("meta"):
        return plan_for(create_model(name, CLASSES))


LIBRARY = {
    "vgg11": (("features.5", "features.9", "features.14", "features.19"), False),
    "mobilenet_v2": (("features.1", "features.3", "features.6", "features.13", "features"), True),
    "efficientnet_b0": (("features.1", "features.2", "features.3", "features.5", "features"), True),
    "convnext_tiny": (("features.0", "features.1", "features.3", "features.5", "features"), False),
    "swin_t": (("features.0", "features.1", "features.3", "features.5", "permute"), True),
    "timm:convnext_atto": (("stem", "stages.0", "stages.1", "stages.2", "norm_pre"), False),
    "timm:pvt_v2_b0": (("patch_embed", "stages.0", "stages.1", "stages.2", "stages"), True),
    "timm:vit_tiny_patch16_224": (("norm_pre", "blocks.2", "blocks.5", "blocks.8", "blocks.11"), False),
    "timm:mobilenetv3_small_050": (("bn1", "blocks.0", "blocks.1", "blocks.3", "blocks"), False),
}


@pytest.mark.parametrize(("name", "expected"), LIBRARY.items(), ids=LIBRARY)
def test_stages_of_known_architectures_are_those_of_their_papers(name, expected):
    plan = stages_of(name)
    assert (plan.features, plan.pooled) == expected


def test_looking_for_stages_changes_nothing():
    network = CifarLike().train()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    plan_for(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(each.training for each in network.modules())
    assert plan_for(copy.deepcopy(network)) == plan_for(network)


class Loose(CifarLike):
    """Parameters that no called module holds, before, between and after the stages."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.power = nn.Parameter(torch.zeros(3, 1, 1)), nn.Parameter(torch.tensor(3.0))
        self.between, self.temperature = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        feature = self.conv(image + self.shift)
        for number, block in enumerate(self.blocks):
            feature = block(feature * self.between if number == 1 else feature)
        embedding = feature.relu().add(1e-3).pow(self.power).mean(dim=(2, 3))
        return nn.functional.linear(embedding, nn.functional.normalize(self.head.weight)) * self.temperature


class SharedNorm(CifarLike):
    """A BatchNorm that is called in two stages, of which the first is not that of the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        feature = self.conv(image)
        for number, block in enumerate(self.blocks):
            feature = block(self.norm(feature) if number in (1, 2) else feature)
        return self.head(feature.mean(dim=(2, 3)))


PARTS = {
    "loose": (Loose, {"stem": {"shift", "conv"}, "stage1": {"between", "blocks.0", "blocks.1"}}),
    "called twice": (SharedNorm, {"stem": {"conv"}, "stage1": {"norm.weight", "norm.bias", "blocks.0", "blocks.1"}}),
    "ViT": (ViTLike, {"stem": {"patches"}, "stage1": {"token", "position", "blocks.0"}}),
}


@pytest.mark.parametrize(("make", "first"), PARTS.values(), ids=PARTS)
def test_a_stage_has_the_parameters_that_its_feature_is_the_first_to_depend_on(make, first):
    network = make()
    parts = {name: set(each) for name, each in parts_by_stage(network).items()}
    assert {name: parts[name] for name in first} == first
    assert not {"head", "head.weight", "head.bias", "power", "temperature"} & set().union(*parts.values())
    assert all(each.requires_grad for each in network.parameters())


# ------------------------------------------------------------------------------------------------------------- taps


def test_taps_name_the_stages():
    network = CifarLike()
    plan = use_taps(network, ["blocks.0", "blocks.3"])
    assert plan.features == ("conv", "blocks.0", "blocks.3")
    assert plan_for(network) is plan
    student = BranchyStudent(network, input_size=32)
    assert student.specs == ("D2B1", "D1B2")
    assert [tuple(each.shape) for each in student(torch.zeros(1, 3, 32, 32)).features[1:]] == [
        (1, 4, 32, 32),
        (1, 8, 16, 16),
    ]


class Unused(CifarLike):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.shared = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(self.shared(self.shared(image)))


BAD_PLANS = {
    "one": StagePlan(("conv",)),
    "none": StagePlan(()),
    "twice": StagePlan(("conv", "conv", "blocks.3")),
    "order": StagePlan(("blocks.3", "blocks.1")),
    "no classifier": StagePlan(("conv", "blocks.3"), "blocks.1"),
    "uncalled classifier": StagePlan(("conv", "blocks.3"), "unused"),
}


@pytest.mark.parametrize("plan", BAD_PLANS.values(), ids=BAD_PLANS)
@pytest.mark.parametrize("build", [FrozenTeacher, BranchyStudent])
def test_wrong_plans_are_refused_in_one_sentence(plan, build):
    network = Unused()
    network.stage_plan = plan
    with pytest.raises(ACKDError, match="stage plan") as caught:
        build(network, input_size=32)
    assert "\n" not in str(caught.value)


BAD_TAPS = {
    "unknown": (["blocks.1", "block.3"], "block.3"),
    "not called": (["unused"], "unused"),
    "a list, not called": (["blocks"], "blocks"),
    "called twice": (["shared", "blocks.5"], "shared"),
    "not a map": (["blocks.1", "head"], "head"),
    "order": (["blocks.3", "blocks.1"], r"\['blocks.1', 'blocks.3'\]"),
    "twice": (["blocks.1", "blocks.1"], "blocks.1"),
    "none": ([], "taps"),
}


@pytest.mark.parametrize(("names", "said"), BAD_TAPS.values(), ids=BAD_TAPS)
def test_wrong_taps_are_refused_in_one_sentence(names, said):
    network = Unused()
    with pytest.raises(ACKDError, match=said) as caught:
        use_taps(network, names, "the student")
    assert "\n" not in str(caught.value)
    assert "taps" in str(caught.value)
    assert "stage_plan" not in network.__dict__
