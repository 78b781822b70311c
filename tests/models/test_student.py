from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.branches import branch_names, default_branches, entry_stage, is_branch
from ackd_lightning.models.features import StagePlan
from ackd_lightning.models.finding import plan_for
from ackd_lightning.models.student import BranchyStudent, init_fresh
from ackd_lightning.models.zoo import create_model


class Own(nn.Module):
    """A user's network that states its two stages, the second with a norm at its end."""

    stage_plan = StagePlan(("stem", "low", "norm"), classifier="head")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.low = nn.Conv2d(4, 6, 3, padding=1)
        self.high = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.more = nn.ReLU()
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        feature = self.norm(self.more(self.high(self.low(self.stem(image)))))
        return self.head(feature.mean(dim=(2, 3)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8))
        self.position = nn.Parameter(0.5 + 0.02 * torch.randn(1, 50, 40))

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return feature * self.factor


@pytest.fixture
def backbone() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", 5)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("spec", "entry"), [("D1B3", 1), ("D2B2", 2), ("D3B1", 3)])
def test_a_spec_names_the_stage_whose_input_the_learner_reads(backbone, spec, entry):
    assert entry_stage(spec, plan_for(backbone)) == entry


@pytest.mark.parametrize(
    "spec", ["D3B2", "D4B0", "D0B4", "D4B1", "d3b1", "D3", "B1", "", "D3B1 ", "D-1B5", "3", "D3.0B1"]
)
def test_a_spec_that_does_not_fit_is_refused_with_the_valid_ones(backbone, spec):
    with pytest.raises(ACKDError) as caught:
        BranchyStudent(backbone, [spec])
    message = str(caught.value)
    assert repr(spec) in message
    assert "resnet8, which has 3 stages; use one of D3B1, D2B2, D1B3" in message


def test_four_stages_have_their_own_valid_specs():
    with pytest.raises(ACKDError, match="use one of D4B1, D3B2, D2B3, D1B4"):
        entry_stage("D3B1", plan_for(create_model("mobilenetv2_x0_5", 5)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet8", ("D3B1", "D2B2")),
        ("wrn_16_2", ("D3B1", "D2B2")),
        ("shufflenetv1", ("D3B1", "D2B2")),
        ("mobilenetv2_x0_5", ("D4B1", "D3B2")),
        ("resnet18", ("D4B1", "D3B2")),
    ],
)
def test_the_papers_two_learners_are_the_default(name, expected):
    with torch.device("meta"):
        network = create_model(name, 5)
    assert default_branches(plan_for(network)) == expected
    student = BranchyStudent(network)
    assert student.specs == expected
    assert [branch.entry for branch in student.branches] == [
        len(plan_for(network).features) - 1,
        len(plan_for(network).features) - 2,
    ]


@pytest.mark.parametrize(("name", "spec"), [("resnet8", "D3B1"), ("resnet18", "D4B1")])
def test_last_is_the_last_stage_of_any_backbone(name, spec):
    with torch.device("meta"):
        student = BranchyStudent(create_model(name, 5), ["last", "D1B" + spec[1], "last"])
    assert student.specs == (spec, "D1B" + spec[1], spec)
    assert [branch.entry for branch in student.branches] == [int(spec[1]), 1, int(spec[1])]


def test_a_network_of_one_stage_has_one_default_learner():
    assert default_branches(StagePlan(("a", "b"), "c")) == ("D1B1",)


def test_an_empty_list_grows_nothing(backbone, image):
    student = BranchyStudent(backbone, [])
    assert len(student.branches) == 0
    assert student(image).branches == ()
    assert sum(1 for _ in student.parameters()) == sum(1 for _ in backbone.parameters())


@pytest.mark.parametrize(("spec", "stages"), [("D3B1", ["layer3"]), ("D2B2", ["layer2", "layer3"])])
def test_a_learner_owns_the_structure_of_the_stages_from_its_entry(backbone, spec, stages):
    (branch,) = BranchyStudent(backbone, [spec]).branches
    owned = sum(each.numel() for name in stages for each in backbone.get_submodule(name).parameters())
    owned += sum(each.numel() for each in backbone.fc.parameters())
    assert sum(each.numel() for each in branch.parameters()) == owned


def test_weights_of_learners_are_fresh_and_not_shared(backbone):
    before = copy.deepcopy(backbone.state_dict())
    nn.init.constant_(backbone.layer3[0].bn1.weight, 3.0)
    student = BranchyStudent(backbone, ["D3B1", "D3B1"])
    first, second = (branch.state_dict() for branch in student.branches)
    own = backbone.layer3.state_dict()
    convolutions = [key for key, value in own.items() if value.dim() == 4]
    assert convolutions
    for key in convolutions:
        one, two = first[f"suffix.network.layer3.{key}"], second[f"suffix.network.layer3.{key}"]
        assert not torch.equal(one, own[key]), key
        assert not torch.equal(two, own[key]), key
        assert not torch.equal(one, two), key
    assert not torch.equal(first["suffix.network.fc.weight"], backbone.fc.weight)
    assert not torch.equal(first["suffix.network.fc.weight"], second["suffix.network.fc.weight"])
    assert (first["suffix.network.layer3.0.bn1.weight"] == 1).all()  # BatchNorm starts as new
    assert backbone.layer3[0].conv1.weight.equal(before["layer3.0.conv1.weight"])  # the backbone keeps its own
    pointers = [each.data_ptr() for each in student.parameters()]
    assert len(pointers) == len(set(pointers))


def test_fresh_running_statistics_do_not_come_from_the_backbone(backbone):
    nn.init.constant_(backbone.layer3[0].bn1.running_mean, 7.0)
    (branch,) = BranchyStudent(backbone, ["D3B1"]).branches
    assert (branch.suffix.network.layer3[0].bn1.running_mean == 0).all()


def test_fresh_convolutions_are_he_normal_over_the_fan_out():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 64, 3)
    init_fresh(layer)
    assert layer.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert (layer.bias == 0).all()


def test_parameters_of_a_layer_without_an_initialisation_are_drawn_anew():
    torch.manual_seed(0)
    layer = Scale()
    before = layer.position.detach().clone()
    init_fresh(nn.Sequential(nn.ReLU(), layer))
    assert not torch.equal(layer.position, before)
    torch.testing.assert_close(layer.position.std(), before.std(), rtol=0.1, atol=0)
    torch.testing.assert_close(layer.position.mean(), before.mean(), rtol=0, atol=0.1)
    assert (layer.factor == 1).all()  # constant, as a layer scale


def test_the_plain_backbone_is_the_same_object_and_loads_strictly(backbone):
    state = copy.deepcopy(backbone.state_dict())
    student = BranchyStudent(backbone)
    plain = student.plain()
    assert plain is backbone
    fresh = create_model("resnet8", 5)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert {key.removeprefix("backbone.") for key in student.state_dict() if key.startswith("backbone.")} == set(state)


@pytest.mark.parametrize("training", [True, False])
def test_branches_do_not_change_the_target_learner(backbone, image, training):
    twin = copy.deepcopy(backbone)
    student = BranchyStudent(backbone, ["D3B1", "D1B3"]).train(training)
    alone = BranchyStudent(twin, []).train(training)
    both, one = student(image), alone(image)
    assert torch.equal(both.logits, one.logits)
    assert torch.equal(both.embedding, one.embedding)
    for with_branches, without in zip(both.features, one.features, strict=True):
        assert torch.equal(with_branches, without)
    for key, value in twin.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key


def test_every_learner_returns_its_last_map_before_pooling(backbone, image):
    output = BranchyStudent(backbone, ["D3B1", "D2B2", "D1B3"])(image)
    assert len(output.branches) == 3
    for branch in output.branches:
        assert branch.logits.shape == (2, 5)
        assert branch.embedding.shape == (2, 64)
        assert [tuple(feature.shape) for feature in branch.features] == [(2, 64, 4, 4)]
        torch.testing.assert_close(branch.embedding, branch.features[0].mean(dim=(2, 3)))
        assert branch.branches == ()


def test_a_learner_reads_the_input_of_its_entry_stage(backbone, image):
    student = BranchyStudent(backbone, ["D2B2"]).eval()
    output = student(image)
    (branch,) = student.branches
    own = branch.suffix.network
    feature = own.layer3(own.layer2(output.features[1]))  # F_1, the input of stage 2
    assert torch.equal(output.branches[0].features[0], feature)
    assert torch.equal(output.branches[0].logits, own.fc(feature.mean(dim=(2, 3))))


def test_the_gradient_of_a_learner_reaches_the_trunk_below_its_entry_only(backbone, image):
    student = BranchyStudent(backbone, ["D3B1", "D2B2"])
    student(image).branches[1].logits.square().sum().backward()  # D2B2 reads F_1
    reached = {name for name, each in backbone.named_parameters() if each.grad is not None}
    below = {name for name, _ in backbone.named_parameters() if name.startswith(("conv1", "bn1", "layer1"))}
    assert reached == below
    assert all(
        each.grad.abs().sum() > 0 for name, each in backbone.named_parameters() if name in below and each.dim() > 1
    )
    assert all(each.grad is None for each in student.branches[0].parameters())
    assert all(each.grad is not None for each in student.branches[1].parameters())


def test_a_learner_of_a_wide_resnet_has_its_own_batchnorm_and_relu_at_the_end():
    student = BranchyStudent(create_model("wrn_16_2", 5), ["D3B1"]).eval()
    output = student(torch.randn(2, 3, 16, 16))
    assert (output.branches[0].features[0] >= 0).all()
    own = student.branches[0].suffix.network
    assert torch.equal(output.branches[0].features[0], own.bn1(own.block3(output.features[2])).relu())


def test_torchvisions_resnet18_grows_branches():
    student = BranchyStudent(create_model("resnet18", 5)).eval()
    with torch.no_grad():
        image = torch.randn(1, 3, 64, 64)
        output = student(image)
        assert torch.equal(output.logits, student.plain()(image))
    assert [tuple(branch.features[0].shape) for branch in output.branches] == [(1, 512, 2, 2)] * 2


def test_a_network_of_ones_own_with_a_plan_grows_branches():
    network = Own()
    student = BranchyStudent(network)
    assert student.specs == ("D2B1", "D1B2")
    image = torch.randn(2, 3, 8, 8)
    student.eval()
    output = student(image)
    torch.testing.assert_close(output.logits, network(image))
    assert [tuple(branch.features[0].shape) for branch in output.branches] == [(2, 8, 4, 4)] * 2
    with pytest.raises(ACKDError, match="Own, which has 2 stages; use one of D2B1, D1B2"):
        BranchyStudent(network, ["D3B1"])


@pytest.mark.parametrize("branches", [None, ["D3B1"]])
def test_a_network_without_stages_cannot_grow_branches(branches):
    with pytest.raises(ACKDError, match=r"Sequential.*`taps`"):
        BranchyStudent(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), branches)


def test_a_network_without_stages_trains_without_branches():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(BranchyStudent(network, [])(image).logits, network(image))


def test_a_peer_is_a_network_of_its_own():
    torch.manual_seed(0)
    student = BranchyStudent(create_model("resnet8", 10), ["peer", "resnet14"], num_classes=10).eval()
    image = torch.randn(2, 3, 16, 16)
    out = student(image)
    assert student.specs == ("peer", "resnet14")
    for branch, peer in zip(out.branches, student.branches, strict=True):
        assert torch.allclose(branch.logits, peer.network(image), atol=1e-6)
        assert len(branch.features) == 1
        assert branch.embedding.shape == (2, 64)
    own, peer = student.plain().state_dict(), student.branches[0].network.state_dict()
    assert own.keys() == peer.keys()
    assert not torch.equal(own["conv1.weight"], peer["conv1.weight"])  # fresh weights
    out.branches[0].logits.sum().backward()
    assert all(each.grad is None for each in student.plain().parameters())


def test_a_peer_can_have_branches_of_its_own():
    torch.manual_seed(0)
    specs = ["last2", "peer+last2+last", "resnet14+D3B1"]
    student = BranchyStudent(create_model("resnet8", 10), specs, num_classes=10, input_size=16).eval()
    image = torch.randn(2, 3, 16, 16)
    out = student(image)
    assert student.specs == ("D2B2", *specs[1:])
    assert [len(each.branches) for each in out.branches] == [0, 2, 1]
    for branch, peer in zip(out.branches[1:], student.branches[1:], strict=True):
        assert torch.allclose(branch.logits, peer.network(image), atol=1e-6)
        alone = BranchyStudent(peer.network, [])(image)
        for output, learner in zip(branch.branches, peer.branches, strict=True):
            assert torch.allclose(output.logits, learner(alone.features[learner.entry - 1]).logits, atol=1e-6)
    loss = sum(each.logits.sum() for each in out.branches[1].branches)
    loss.backward()
    assert all(each.grad is None for each in student.plain().parameters())
    reached = [name for name, each in student.branches[1].network.named_parameters() if each.grad is not None]
    assert any(name.startswith("layer2") for name in reached)
    assert not any(name.startswith(("layer3", "fc")) for name in reached)
    with pytest.raises(ACKDError, match="D9B1"):
        BranchyStudent(create_model("resnet8", 10), ["peer+D9B1"], num_classes=10)


def test_a_peer_needs_no_known_stages():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    out = BranchyStudent(backbone, ["peer"])(torch.zeros(2, 3, 8, 8))
    assert out.branches[0].logits.shape == (2, 5)
    assert out.branches[0].features is None
    assert out.branches[0].embedding is None


@pytest.mark.parametrize(("spec", "words"), [("resnet15", "did you mean"), ("D9B1", "use one of D3B1"), ("D9", "D3B1")])
def test_a_learner_that_is_neither_branch_nor_network_is_named(spec, words):
    with pytest.raises(ACKDError, match=spec) as caught:
        BranchyStudent(create_model("resnet8", 10), [spec], num_classes=10)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "branch"),
    [
        ("D3B1", True),
        ("D9", True),
        ("last", True),
        ("last2", True),
        ("peer", False),
        ("peer+D3B1", False),
        ("resnet20", False),
        ("D-net", False),
    ],
)
def test_a_branch_is_told_from_a_network_of_its_own(spec, branch):
    assert is_branch(spec) is branch


def test_branches_are_listed_from_the_shortest(backbone):
    assert branch_names(plan_for(backbone)) == ("D3B1", "D2B2", "D1B3")
    assert entry_stage("last", plan_for(backbone)) == 3
    assert entry_stage("last2", plan_for(backbone)) == 2


@pytest.mark.parametrize("branches", [["D3B1", "D2B2"], ["peer", "resnet14"], []])
def test_checking_the_plans_does_not_change_the_fresh_weights(branches):
    built = []
    for size in (None, 16):
        torch.manual_seed(0)
        built.append(BranchyStudent(create_model("resnet8", 5), branches, num_classes=5, input_size=size).state_dict())
    assert all(torch.equal(built[0][key], value) for key, value in built[1].items())


def test_a_peer_of_another_architecture_reads_the_students_channels():
    student = BranchyStudent(
        create_model("resnet8", 10, in_chans=1), ["resnet14", "peer"], num_classes=10, input_size=24
    )
    out = student(torch.zeros(2, 1, 24, 24))
    assert [tuple(branch.logits.shape) for branch in out.branches] == [(2, 10), (2, 10)]
