from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import StagePlan, staged_forward
from ackd_lightning.models.finding import plan_for
from ackd_lightning.models.heads import (
    HeadedNetwork,
    Projector,
    SharedClassifiers,
    after_last_map,
    shared_classifier,
    with_head,
)
from ackd_lightning.models.zoo import create_model

CLASSES, SIDE = 5, 16


def head_of(*teachers: tuple[int, int, int], channels: int = 64, **options) -> SharedClassifiers:
    torch.manual_seed(0)
    return SharedClassifiers(channels, teachers, CLASSES, **options)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("factor", "inner"), [(1, 12), (2, 6), (5, 2), (100, 1)])
def test_a_projector_is_that_of_the_paper(factor, inner):
    projector = Projector(8, 12, factor=factor)
    kinds = [type(layer) for layer in projector]
    assert kinds == 3 * [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    convolutions = [layer for layer in projector if isinstance(layer, nn.Conv2d)]
    assert [tuple(each.weight.shape) for each in convolutions] == [
        (inner, 8, 1, 1),
        (inner, inner, 3, 3),
        (12, inner, 1, 1),
    ]
    assert all(each.bias is None for each in convolutions)
    out = projector(torch.randn(2, 8, 5, 3))
    assert out.shape == (2, 12, 5, 3)
    assert out.min() == 0


@pytest.mark.parametrize(
    ("own", "teachers", "projected"),
    [
        ((4, 4), [(12, 4, 4)], [(12, 4, 4)]),
        ((8, 8), [(12, 4, 4)], [(12, 4, 4)]),
        ((2, 2), [(12, 4, 4)], [(12, 2, 2)]),
        ((4, 4), [(12, 2, 8), (6, 8, 8)], [(12, 2, 4), (6, 4, 4)]),
    ],
)
def test_the_larger_map_decides_what_is_pooled(own, teachers, projected):
    head = head_of(*teachers, channels=8)
    maps = head.project(torch.randn(2, 8, *own))
    assert [tuple(each.shape[1:]) for each in maps] == projected


def test_a_pooled_map_is_the_mean_of_its_blocks():
    head = head_of((12, 2, 2), channels=8).eval()
    feature = torch.randn(2, 8, 4, 4)
    blocks = torch.stack([feature[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]).mean(dim=0)
    torch.testing.assert_close(head.project(feature)[0], head.projectors[0](blocks))


def test_one_teacher_predicts_by_its_own_classifier():
    head = head_of((12, 4, 4), channels=8).eval()
    feature = torch.randn(3, 8, 4, 4)
    layer = head.classifiers[0]
    slow = head.projectors[0](feature).mean(dim=(2, 3)) @ layer.weight.T + layer.bias
    torch.testing.assert_close(head(feature), slow)


def test_several_teachers_are_averaged():
    feature = torch.randn(3, 8, 4, 4)
    shapes = ((12, 4, 4), (6, 2, 2))
    head = head_of(*shapes, channels=8).eval()
    each = [net(maps.mean(dim=(2, 3))) for net, maps in zip(head.classifiers, head.project(feature), strict=True)]
    torch.testing.assert_close(head(feature), (each[0] + each[1]) / 2)
    head.average = "probabilities"
    mean = (each[0].softmax(dim=1) + each[1].softmax(dim=1)) / 2
    torch.testing.assert_close(head(feature), mean.log())
    torch.testing.assert_close(head(feature).softmax(dim=1), mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_probabilities_is_finite_at_the_largest_logits(dtype):
    head = head_of((12, 4, 4), (12, 4, 4), channels=8, average="probabilities")
    head.classifiers = nn.ModuleList(nn.Identity() for _ in range(2))
    low = torch.full((2, 5, 1, 1), -6e4, dtype=dtype)
    low[:, 1] = 6e4
    low.requires_grad_()
    out = head.classify([low, -low])
    out.sum().backward()
    assert out.dtype is torch.float32
    assert out.isfinite().all()
    assert low.grad.isfinite().all()


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_a_description_brings_the_head_back_through_json(average):
    head = head_of((12, 4, 4), (6, 2, 2), factor=3, average=average).eval()
    again = SharedClassifiers(**json.loads(json.dumps(head.description()))).eval()
    again.load_state_dict(head.state_dict(), strict=True)
    feature = torch.randn(2, 64, 4, 4)
    assert torch.equal(again(feature), head(feature))
    assert again.description() == head.description()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"factor": 0}, "factor is 0"),
        ({"factor": 1.5}, "factor is 1.5"),
        ({"channels": True}, "channels is True"),
        ({"teachers": []}, r"teachers is \[\]"),
        ({"teachers": [(12, 4)]}, r"teachers is \[\(12, 4\)\]"),
        ({"teachers": [(12, 4, -1)]}, r"teachers is \[\(12, 4, -1\)\]"),
        ({"average": "votes"}, "average is 'votes'.*'logits' or 'probabilities'"),
    ],
)
def test_bad_arguments_are_refused(changed, message):
    arguments = {"channels": 8, "teachers": [(12, 4, 4)], "num_classes": 5} | changed
    with pytest.raises(ACKDError, match=message):
        SharedClassifiers(**arguments)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "mobilenetv2_x0_5", "resnet18"])
def test_a_headed_network_reads_the_last_map_and_has_no_classifier_of_its_own(name):
    torch.manual_seed(0)
    backbone = create_model(name, CLASSES).eval()
    plan = plan_for(backbone)
    with torch.no_grad():
        feature = staged_forward(backbone, plan, images()).features[-1]
        head = head_of((12, *feature.shape[2:]), channels=feature.shape[1]).eval()
        network = HeadedNetwork(backbone, head)
        torch.testing.assert_close(network(images()), head(feature))
    assert backbone(images()).shape == (3, CLASSES), "the backbone itself is left alone"
    own = sum(each.numel() for each in backbone.parameters())
    removed = sum(each.numel() for each in backbone.get_submodule(plan.classifier).parameters())
    extra = sum(each.numel() for each in head.parameters())
    assert sum(each.numel() for each in network.parameters()) == own - removed + extra
    assert not [key for key in network.state_dict() if key.startswith(f"backbone.{plan.classifier}.")]


def test_every_parameter_of_a_headed_network_gets_a_gradient():
    network = HeadedNetwork(create_model("resnet8", CLASSES), head_of((12, 4, 4), (6, 2, 2)))
    F.cross_entropy(network(images()), torch.tensor([0, 1, 2])).backward()
    assert all(each.grad is not None for each in network.parameters())


def test_layers_between_the_last_map_and_the_classifier_are_left_out():
    backbone = create_model("mobilenet_v3_small", CLASSES)
    assert after_last_map(backbone, plan_for(backbone)) == ("classifier",), "two linear layers and a Hardswish"
    network = HeadedNetwork(backbone, head_of((12, 1, 1), channels=576))
    F.cross_entropy(network(images()), torch.tensor([0, 1, 2])).backward()
    assert [key for key, each in network.named_parameters() if each.grad is None] == []


def test_a_network_that_cannot_run_without_such_layers_loses_its_classifier_alone():
    class Narrow(nn.Module):
        stage_plan = StagePlan(("stem", "body"), "fc", pooled=False)

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
            self.halve, self.fc = nn.Linear(16, 8), nn.Linear(8, CLASSES)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            pooled = self.body(self.stem(image)).mean(dim=(2, 3))
            return self.fc(self.halve(pooled).unflatten(1, (8, 1)).squeeze(2))

    backbone = Narrow()
    assert after_last_map(backbone, backbone.stage_plan) == ("fc",)
    assert HeadedNetwork(backbone, head_of((12, 4, 4), channels=16)).eval()(images()).shape == (3, CLASSES)


def test_a_head_reads_the_module_that_its_description_names():
    backbone, head = create_model("wrn_16_2", CLASSES).eval(), head_of((12, 4, 4), channels=128).eval()
    features: list[torch.Tensor] = []
    backbone.block3.register_forward_hook(lambda _, __, out: features.append(out))
    network = with_head(backbone, {**head.description(), "reads": "block3"}).eval()
    network.head.load_state_dict(head.state_dict())
    with torch.no_grad():
        backbone(images())
        assert torch.equal(network(images()), head(features[0]))
    with pytest.raises(ACKDError, match=r"reads the module 'layer9', which wrn_16_2 has not"):
        with_head(backbone, {**head.description(), "reads": "layer9"})


def test_with_head_builds_what_a_description_names():
    backbone = create_model("resnet8", CLASSES)
    assert with_head(backbone, None) is backbone
    head = head_of((12, 4, 4))
    trained = HeadedNetwork(backbone, head).eval()
    fresh = with_head(create_model("resnet8", CLASSES), head.description()).eval()
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(fresh(images()), trained(images()))


def test_a_headed_network_is_built_without_memory_on_the_meta_device():
    with torch.device("meta"):
        network = with_head(create_model("resnet8", CLASSES), head_of((12, 4, 4)).description())
    assert all(each.is_meta for each in network.parameters())
    assert network(images().to("meta")).shape == (3, CLASSES)


def test_a_copy_of_a_headed_network_learns_alone():
    network = HeadedNetwork(create_model("resnet8", CLASSES), head_of((12, 4, 4))).eval()
    again = copy.deepcopy(network)
    with torch.no_grad():
        again.head.classifiers[0].bias += 1
    torch.testing.assert_close(again(images()), network(images()) + 1)


def test_a_backbone_without_known_stages_is_refused():
    with pytest.raises(ACKDError, match=r"Sequential.*another head.*`taps`"):
        HeadedNetwork(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), head_of((12, 4, 4)))


class Own(nn.Module):
    """A network that calls its classifier, or reads its weight alone."""

    def __init__(self, head: nn.Module, *, called: bool) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.head, self.called = head, called
        self.stage_plan = StagePlan(("stem", "body"), "head" if called else None)

    def forward(self, image):
        feature = self.body(self.stem(image)).mean(dim=(2, 3))
        return self.head(feature) if self.called else F.linear(feature, self.head.weight)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (Own(nn.Linear(4, CLASSES), called=False), "no classifier is known in the teacher Own"),
        (Own(nn.Linear(4, CLASSES, bias=False), called=True), r"is Linear\(in_features=4, .*bias=False\)"),
        (Own(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES)), called=True), "is a Sequential"),
    ],
)
def test_a_classifier_that_cannot_be_shared_is_refused_in_one_line(network, said):
    with pytest.raises(ACKDError, match=said) as caught:
        shared_classifier(network, "ATSC")
    assert "\n" not in str(caught.value)
