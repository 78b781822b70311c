from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning import StudentConfig, load_student
from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ATSC
from ackd_lightning.methods.atsc_networks import anchor_distance, feature_distance
from ackd_lightning.methods.base import FitInfo, Networks, weighted_loss
from ackd_lightning.methods.description import describe, from_description
from ackd_lightning.models.features import StagePlan, staged_forward
from ackd_lightning.models.finding import plan_for, probe
from ackd_lightning.models.freezing import frozen
from ackd_lightning.models.heads import HeadedNetwork, shared_classifier, with_head
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.weights import read_metadata
from ackd_lightning.models.zoo import create_model
from ackd_lightning.testing import Harness
from ackd_lightning.types import Batch, DataInfo

IMAGES, CLASSES, SIDE = 6, 5, 16
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


class Small(nn.Module):
    """A network with a last map of a size of its own, 12 x 2 x 2 for images of 16 x 16."""

    stage_plan = StagePlan(("stem", "low", "norm"), classifier="head")

    def __init__(self, *, bias: bool = True, channels: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.low = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.high = nn.Conv2d(6, channels, 3, stride=2, padding=1)
        self.norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, CLASSES, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.high(self.low(self.stem(image)))).mean(dim=(2, 3)))


def settled(network: nn.Module, seed: int) -> nn.Module:
    """Running statistics that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(0.5 + torch.randn(8, 3, SIDE, SIDE, generator=generator))
    return network.eval()


class Run:
    """A student and its teachers as the training module puts them together."""

    def __init__(self, *networks: nn.Module, student: nn.Module | None = None, **arguments) -> None:
        torch.manual_seed(3)
        given = networks or (Small(),)
        self.teachers = [
            each if isinstance(each, FrozenTeacher) else FrozenTeacher(settled(each, number))
            for number, each in enumerate(given)
        ]
        self.method = ATSC(**arguments)
        torch.manual_seed(4)
        self.student = BranchyStudent(student or create_model("resnet8", CLASSES), self.method.branches)
        self.put_together(self.method)
        self.method.begin_fit(FitInfo(teachers=tuple(self.teachers)))
        generator = torch.Generator().manual_seed(5)
        self.batches = [
            Batch(
                torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator),
                torch.randint(CLASSES, (IMAGES,), generator=generator),
                torch.arange(IMAGES),
            )
            for _ in range(3)
        ]

    def put_together(self, method: ATSC, *, meta: bool = False) -> None:
        networks = [copy.deepcopy(each.network).to("meta") if meta else each.network for each in self.teachers]
        torch.manual_seed(6)
        method.build(
            Networks(
                student=probe(self.student, SIDE),
                teachers=tuple(probe(each.network, each.input_size or SIDE) for each in self.teachers),
                student_network=self.student,
                teacher_networks=tuple(networks),
            )
        )

    def prediction(self) -> Tensor:
        return self.method.head(self.student(self.batch.image).features[-1])

    @property
    def batch(self) -> Batch:
        return self.batches[0]

    @property
    def own(self) -> list[nn.Module]:
        return [each.network for each in self.method.teachers]

    def terms(self, batch: Batch | None = None) -> dict[str, Tensor]:
        batch = batch or self.batch
        return self.method(self.student(batch.image), None, batch)

    def loss(self, batch: Batch | None = None) -> Tensor:
        return weighted_loss(self.method, self.terms(batch))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        groups = [{"params": list(self.student.parameters())}]
        groups += [{"params": group["params"]} for group in self.method.parameter_groups()]
        return [torch.optim.SGD(groups, **SGD), *self.method.auxiliary_optimizers().values()]

    def step(self, optimizers: Sequence[torch.optim.Optimizer], batch: Batch) -> None:
        """One batch as the training module takes it: auxiliary steps, then the student's."""
        first, *others = optimizers
        parameters = self.method.auxiliary_parameters()
        student = self.student(batch.image)
        for name, optimizer in zip(parameters, others, strict=True):
            optimizer.zero_grad()
            self.method.auxiliary_loss(name, student, None, batch)[0].backward()
            optimizer.step()
        first.zero_grad()
        with frozen(each for group in parameters.values() for each in group):
            weighted_loss(self.method, self.method(student, None, batch)).backward()
        first.step()

    def train(self) -> Run:
        optimizers = self.optimizers()
        for batch in self.batches:
            self.step(optimizers, batch)
        return self


def equal(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# -------------------------------------------------------------------- formulas


def test_the_distance_of_features_equals_a_slow_reference():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 3, 2, 2, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    total = 0.0
    for image in range(2):
        for channel in range(3):
            for row in range(2):
                for column in range(2):
                    block = theirs[image, channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                    total += (ours[image, channel, row, column].item() - block.mean().item()) ** 2
    assert feature_distance(ours, theirs).item() == pytest.approx(total / 24, rel=1e-5)
    assert feature_distance(theirs, ours).item() == pytest.approx(total / 24, rel=1e-5)
    assert feature_distance(ours, ours).item() == 0.0


def test_the_distance_of_features_reaches_both_sides():
    ours, theirs = torch.randn(2, 3, 2, 2).requires_grad_(), torch.randn(2, 3, 4, 4).requires_grad_()
    feature_distance(ours, theirs).backward()
    assert ours.grad.abs().sum() > 0
    torch.testing.assert_close(theirs.grad.sum(), -ours.grad.sum())


def test_the_anchor_is_a_sum_of_squares_that_pulls_back():
    parameters = [nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), nn.Parameter(torch.tensor([5.0]))]
    start = torch.tensor([1.0, 0.0, 3.0, 5.0, 7.0])
    value = anchor_distance(parameters, start)
    value.backward()
    assert value.item() == 4.0 + 1.0 + 4.0
    torch.testing.assert_close(parameters[0].grad, torch.tensor([[0.0, 4.0], [0.0, -2.0]]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([-4.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_are_finite_float32_for_large_numbers_in_half_precision(dtype):
    large = torch.full((2, 3, 4, 4), 6e4, dtype=dtype).requires_grad_()
    for value in (feature_distance(large, -large), anchor_distance([large], -large.detach().flatten())):
        value.backward()
        assert value.dtype is torch.float32
        assert value.isfinite()
        assert value > 1e9
    small = torch.full((2, 3, 4, 4), 6e4, dtype=dtype).requires_grad_()
    feature_distance(small, -small.detach()).backward()
    assert small.grad.isfinite().all()


@pytest.mark.parametrize("count", [1, 2])
def test_terms_are_the_equations(count):
    here = {"temperature": 3.0, "weight_ce": 1.0, "weight_kd": 1.0, "anchor_scope": "weights"}
    run = Run(*[Small(), create_model("resnet8", CLASSES)][:count], **here)
    for own in run.own:
        with torch.no_grad():
            for parameter in own.parameters():
                parameter += 0.01
    shadow = copy.deepcopy(run.method)
    output = run.student(run.batch.image)
    terms = run.method(output, None, run.batch)
    features, anchors, divergences = [], [], []
    for number, (teacher, own) in enumerate(zip(run.teachers, shadow.teachers, strict=True)):
        out = own(run.batch.image)
        ours = shadow.head.projectors[number](
            F.adaptive_avg_pool2d(output.features[-1], min(4, out.features[-1].shape[-1]))
        )
        theirs = F.adaptive_avg_pool2d(out.features[-1], ours.shape[-1])
        features.append((ours - theirs).square().mean().item())
        pairs = zip(own.network.parameters(), teacher.network.parameters(), strict=True)
        anchors.append(sum((now - start).square().sum().item() for now, start in pairs if now.ndim > 1))
        p, q = (out.logits / 3).softmax(dim=1), (output.logits / 3).softmax(dim=1)
        divergences.append(9 * (p * (p / q).log()).sum(dim=1).mean().item())
    assert terms["ce"].item() == pytest.approx(F.cross_entropy(output.logits, run.batch.target).item(), rel=1e-5)
    assert terms["features"].item() == pytest.approx(sum(features) / count, rel=1e-4)
    assert terms["anchor"].item() == pytest.approx(sum(anchors) / count, rel=1e-4)
    assert terms["kd"].item() == pytest.approx(sum(divergences) / count, rel=1e-3)
    assert min(terms.values()) > 1e-4


@pytest.mark.parametrize(
    ("scope", "update", "left_out"),
    [
        ("weights", "bias", set()),
        ("weights", "none", set()),
        ("weights", "layer", {"head.weight"}),
        ("weights_no_classifier", "none", {"head.weight"}),
        ("weights_no_classifier", "layer", {"head.weight"}),
        ("all", "bias", {"head.bias"}),
        ("all", "layer", {"head.weight", "head.bias"}),
        ("all", "none", set()),
    ],
)
def test_what_is_anchored(scope, update, left_out):
    run = Run(anchor_scope=scope, classifier_update=update)
    (own,) = run.own
    assert run.terms()["anchor"].item() == 0.0
    for name, parameter in own.named_parameters():
        with torch.no_grad():
            parameter += 1
        held = (scope == "all" or parameter.ndim > 1) and name not in left_out
        assert run.terms()["anchor"].item() == pytest.approx(parameter.numel() if held else 0.0, rel=1e-4), name
        with torch.no_grad():
            parameter -= 1


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        ({}, {"head.weight"}),
        ({"classifier_update": "none", "anchor_scope": "weights"}, {"head.weight"}),
        ({"classifier_update": "layer"}, set()),
        ({"anchor_scope": "weights_no_classifier"}, set()),
        ({"classifier_update": "none"}, {"head.weight", "head.bias"}),
        ({"weight_anchor": 0.0}, set()),
    ],
)
def test_what_the_learners_step_trains(arguments, trained):
    run = Run(**arguments)
    (own,) = run.own
    (group,) = run.method.parameter_groups()
    assert group["lr_scale"] == 1.0
    ids = [id(parameter) for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    names = {name for name, parameter in own.named_parameters() if id(parameter) in ids}
    rest = {name for name, _ in own.named_parameters() if not name.startswith("head.")}
    assert names == rest | trained
    assert {id(each) for each in run.method.head.projectors.parameters()} <= set(ids)
    for parameter in (each for each in run.method.parameters() if id(each) not in ids):
        parameter.requires_grad_(False)
    run.loss().backward()
    assert all(each.grad is not None for each in group["params"])


def test_terms_without_weight_are_not_computed_and_what_they_train_stays():
    """SGD would shrink the student's own classifier by weight decay alone."""
    run = Run()
    terms = run.terms()
    assert (terms["ce"].item(), terms["kd"].item()) == (0.0, 0.0)
    assert not any(each.requires_grad for each in run.student.backbone.fc.parameters())
    for weights in ({"weight_ce": 1.0}, {"weight_kd": 1.0}):
        assert all(each.requires_grad for each in Run(**weights).student.backbone.fc.parameters())


@pytest.mark.parametrize("name", ["weight_ce", "weight_kd", "weight_features"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_out_of_range_are_refused(name, value):
    with pytest.raises(ACKDError, match=f"{name} is {value} in ATSC"):
        ATSC(**{name: value})


def test_what_each_term_reaches():
    run = Run(weight_ce=1.0, weight_kd=1.0)
    (own,) = run.own
    terms = run.terms()
    parts = {
        "trunk": list(run.student.backbone.layer1.parameters()),
        "classifier": list(run.student.backbone.fc.parameters()),
        "projector": list(run.method.head.projectors.parameters()),
        "teacher": [own.stem.weight, own.high.weight],
        "shared weight": [own.head.weight],
        "shared bias": [own.head.bias],
    }
    reached = {
        "ce": {"trunk", "classifier"},
        "kd": {"trunk", "classifier", "teacher", "shared weight", "shared bias"},
        "features": {"trunk", "projector", "teacher"},
        "anchor": {"teacher", "shared weight"},
    }
    for name, term in terms.items():
        for part, parameters in parts.items():
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            assert all((each is not None) is (part in reached[name]) for each in gradients), (name, part)


# -------------------------------------------------------------------- SimKD


class ByHand(nn.Module):
    """SimKD as in the paper: a projector in front of the frozen teacher's classifier."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        inner = out_channels // 2
        self.first, self.norm1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.second, self.norm2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.third, self.norm3 = nn.Conv2d(inner, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)

    def forward(self, feature: Tensor) -> Tensor:
        feature = self.norm1(self.first(feature)).relu()
        feature = self.norm2(self.second(feature)).relu()
        return self.norm3(self.third(feature)).relu()


@pytest.mark.parametrize(
    "fixed",
    [
        {"adapt_teacher": False, "classifier_update": "none"},
        {"adapt_teacher": False},
    ],
    ids=["no step of the classifier", "whatever the classifier's step"],
)
def test_with_a_teacher_that_does_not_move_it_is_simkd(fixed):
    run = Run(create_model("resnet8", CLASSES), **fixed)
    teacher = copy.deepcopy(run.teachers[0].network)
    before = copy.deepcopy(teacher)
    student, projector = copy.deepcopy(run.student.backbone), ByHand(64, 64)
    with torch.no_grad():
        for mine, theirs in zip(projector.parameters(), run.method.head.projectors.parameters(), strict=True):
            mine.copy_(theirs)
    optimizer = torch.optim.SGD([*student.parameters(), *projector.parameters()], **SGD)
    for batch in run.batches:
        feature = student.layer3(student.layer2(student.layer1(student.bn1(student.conv1(batch.image)).relu())))
        with torch.no_grad():
            taught = teacher.layer3(teacher.layer2(teacher.layer1(teacher.bn1(teacher.conv1(batch.image)).relu())))
        optimizer.zero_grad()
        (projector(feature) - taught).square().mean().backward()
        optimizer.step()
    run.train()
    for key in ("layer1.0.conv1.weight", "layer3.0.bn2.weight", "bn1.running_mean"):
        torch.testing.assert_close(
            run.student.backbone.state_dict()[key], student.state_dict()[key], rtol=1e-5, atol=1e-6
        )
    values = zip(projector.state_dict().values(), run.method.head.projectors.state_dict().values(), strict=True)
    for mine, theirs in values:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for network in (run.student, run.method, student, projector):
        network.eval()
    with torch.no_grad():
        output = run.student(run.batch.image)
        logits = projector(output.features[-1]).mean(dim=(2, 3)) @ before.fc.weight.T + before.fc.bias
        torch.testing.assert_close(run.method.head(output.features[-1]), logits, rtol=1e-4, atol=1e-5)
    assert equal(run.teachers[0].network, before)
    assert run.method.auxiliary_parameters() == {}
    assert run.method.loss_weights["anchor"] == 0.0
    assert not [key for key in run.method.state_dict() if key.startswith("teachers.")]


def test_an_adapting_teacher_that_no_optimizer_moves_is_a_fixed_one():
    adapting = Run(teacher_bn="eval", classifier_update="none")
    adapting.method.teachers.requires_grad_(False)
    fixed = Run(adapt_teacher=False)
    for run in (adapting, fixed):
        run.train()
    assert equal(adapting.student, fixed.student)
    assert equal(adapting.method.head, fixed.method.head)


def test_a_fixed_teacher_lends_a_classifier_that_does_not_learn():
    run = Run(adapt_teacher=False)
    classifier = run.teachers[0].network.head
    before = copy.deepcopy(classifier)
    (shared,) = run.method.head.classifiers
    run.train()
    assert shared is not classifier
    assert equal(shared, before)
    assert not any(each.requires_grad for each in shared.parameters())


def test_simkd_is_shipped_as_its_own_configuration():
    folder = config_folder() / "methods"
    ours, simkd = (read_config(folder / name)["model"]["method"] for name in ("atsc.yaml", "simkd.yaml"))
    assert ours["class_path"] == simkd["class_path"] == "ackd_lightning.methods.ATSC"
    assert ATSC(**ours.get("init_args", {})).adapts
    assert not ATSC(**simkd["init_args"]).adapts
    assert simkd["init_args"]["classifier_update"] == "none"


# -------------------------------------------------------------------- adapting teachers


def test_the_teacher_moves_and_the_one_that_was_given_does_not():
    run = Run()
    before = copy.deepcopy(run.teachers[0].network)
    run.train()
    assert equal(run.teachers[0].network, before)
    moved = {key for key, value in run.own[0].state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert {"stem.weight", "high.weight", "norm.0.weight", "norm.0.running_mean", "head.bias"} <= moved


def test_the_anchor_grows_as_the_teacher_moves_and_pulls_it_back():
    free, held = Run(weight_anchor=0.0).train(), Run(weight_anchor=1.0).train()
    gone, kept = (run.terms()["anchor"].item() for run in (free, held))
    assert 0 < kept < gone
    (own,) = held.own
    start = held.teachers[0].network.high.weight
    (gradient,) = torch.autograd.grad(held.terms()["anchor"], own.high.weight)
    torch.testing.assert_close(gradient, 2 * (own.high.weight - start))


def spread_after_training(weight: float, scope: str) -> float:
    run = Run(student=Small(channels=8), weight_anchor=weight, anchor_scope=scope)
    learners, *others = run.optimizers()
    for group in learners.param_groups:
        group["lr"] = 0.2
    for number in range(24):
        run.step([learners, *others], run.batches[number % 3])
    return run.method.auxiliary_loss("classifier", None, None, run.batch)[1]["teacher_feature_std"].item()


def test_an_anchor_of_all_parameters_keeps_the_features_from_collapsing():
    """One that leaves the scales of BatchNorm free does not."""
    held = spread_after_training(1.0, "all")
    assert spread_after_training(0.0, "all") < 0.5 * held
    assert spread_after_training(1.0, "weights") < 0.5 * held


@pytest.mark.parametrize("update", ["bias", "layer"])
def test_the_classifiers_step_is_a_step_of_cross_entropy(update):
    run = Run(Small(), Small(channels=7), classifier_update=update)
    networks = [copy.deepcopy(own).train() for own in run.own]
    parameters = run.method.auxiliary_parameters()["classifier"]
    assert [id(each) for each in parameters] == [
        id(each)
        for own in run.own
        for each in ([own.head.bias] if update == "bias" else [own.head.weight, own.head.bias])
    ]
    loss, values = run.method.auxiliary_loss("classifier", run.student(run.batch.image), None, run.batch)
    loss.backward()
    slow = [F.cross_entropy(network(run.batch.image), run.batch.target) for network in networks]
    ((slow[0] + slow[1]) / 2).backward()
    assert loss.item() == pytest.approx((slow[0].item() + slow[1].item()) / 2, rel=1e-5)
    right = [(network(run.batch.image).argmax(dim=1) == run.batch.target).float().mean().item() for network in networks]
    assert values["teacher_acc"].item() == pytest.approx(sum(right) / 2)
    assert values["teacher_loss"].item() == loss.item()
    spread = [staged_forward(each, each.stage_plan, run.batch.image).embedding.var(dim=0) for each in networks]
    slow_spread = sum((each * (IMAGES - 1) / IMAGES).sqrt().mean().item() for each in spread) / 2
    assert values["teacher_feature_std"].item() == pytest.approx(slow_spread, rel=1e-4)
    assert not any(value.requires_grad for value in values.values())
    for own, network in zip(run.own, networks, strict=True):
        torch.testing.assert_close(own.head.bias.grad, network.head.bias.grad)
        if update == "layer":
            torch.testing.assert_close(own.head.weight.grad, network.head.weight.grad)
    own = {id(each) for each in parameters}
    others = [each for each in (*run.student.parameters(), *run.method.parameters()) if id(each) not in own]
    assert all(each.grad is None for each in others)
    optimizer = run.method.auxiliary_optimizers()["classifier"]
    (group,) = optimizer.param_groups
    assert [id(each) for each in group["params"]] == [id(each) for each in parameters]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)
    imagenet = Run(classifier_lr=0.1, classifier_weight_decay=1e-4).method.auxiliary_optimizers()["classifier"]
    assert (imagenet.param_groups[0]["lr"], imagenet.param_groups[0]["weight_decay"]) == (0.1, 1e-4)


def test_without_the_classifiers_step_there_is_no_auxiliary_optimizer():
    run = Run(classifier_update="none", anchor_scope="weights")  # so that nothing trains the bias
    assert run.method.auxiliary_parameters() == {}
    before = copy.deepcopy(run.own[0].head.bias)
    run.train()
    assert torch.equal(run.own[0].head.bias, before)


def test_a_steps_two_forward_passes_move_the_running_statistics_twice():
    run = Run()
    network = copy.deepcopy(run.own[0]).train()
    (norm,) = (each for each in network.modules() if isinstance(each, nn.BatchNorm2d))
    start = norm.num_batches_tracked.item()
    run.method.auxiliary_loss("classifier", run.student(run.batch.image), None, run.batch)
    run.terms()
    for _ in range(2):
        network(run.batch.image)
    own = run.own[0].norm[0]
    assert own.num_batches_tracked.item() == start + 2
    torch.testing.assert_close(own.running_mean, norm.running_mean)


def test_batchnorm_of_the_teachers_can_stay_in_evaluation_mode():
    run = Run(teacher_bn="eval")
    before = copy.deepcopy(run.own[0].norm[0])
    run.method.eval()
    run.method.train()
    run.train()
    own = run.own[0].norm[0]
    assert torch.equal(own.running_mean, before.running_mean)
    assert not torch.equal(own.weight, before.weight)
    assert run.own[0].high.training
    assert not own.training
    assert all(each.training for each in run.method.head.projectors.modules())
    assert Run().own[0].norm[0].training


def test_evaluation_changes_nothing():
    run = Run().train()
    run.method.eval()
    run.student.eval()
    before = copy.deepcopy(run.method)
    with torch.no_grad():
        run.terms()
        run.prediction()
    assert equal(run.method, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_learners_get_their_gradients_after_the_classifiers_step(dtype):
    run = Run()
    with torch.autocast("cpu", dtype=dtype):
        student = run.student(run.batch.image)
        loss, _ = run.method.auxiliary_loss("classifier", student, None, run.batch)
        terms = run.method(student, None, run.batch)
        total = run.loss()
    assert loss.dtype is torch.float32
    assert all(term.dtype is torch.float32 for term in terms.values())
    assert all(term.isfinite() for term in terms.values())
    total.backward()
    (own,) = run.own
    for parameter in (own.stem.weight, own.high.weight, *run.method.head.projectors.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


# -------------------------------------------------------------------- several teachers, prediction


def mixed(**arguments) -> Run:
    """Teachers of three architectures, with maps of 64 x 4 x 4, 12 x 2 x 2 and 1280 x 1 x 1."""
    return Run(create_model("resnet8", CLASSES), Small(), create_model("mobilenetv2_x0_5", CLASSES), **arguments)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_several_teachers_of_different_architectures(average):
    run = mixed(average=average).train()
    head = run.method.head
    assert [tuple(each) for each in head.sizes] == [(64, 4, 4), (12, 2, 2), (1280, 1, 1)]
    own = [run.own[0].fc, run.own[1].head, run.own[2].classifier[0]]
    assert all(mine is theirs for mine, theirs in zip(head.classifiers, own, strict=True))
    run.student.eval()
    run.method.eval()
    with torch.no_grad():
        output = run.student(run.batch.image)
        each = [net(maps.mean(dim=(2, 3))) for net, maps in zip(own, head.project(output.features[-1]), strict=True)]
        if average == "logits":
            slow = (each[0] + each[1] + each[2]) / 3
        else:
            slow = ((each[0].softmax(dim=1) + each[1].softmax(dim=1) + each[2].softmax(dim=1)) / 3).log()
        torch.testing.assert_close(run.prediction(), slow, rtol=1e-4, atol=1e-4)
    assert run.method.layers == ()
    assert Run().method.layers == ((3, 2),)


def test_a_student_with_a_smaller_map_than_its_teacher():
    run = Run(create_model("resnet8", CLASSES), student=create_model("mobilenetv2_x0_5", CLASSES))
    run.train()
    assert run.terms()["features"].isfinite()
    assert run.prediction().shape == (IMAGES, CLASSES)


def test_what_is_predicted_does_not_come_from_the_students_own_classifier():
    run = Run(weight_ce=1.0)

    (weight,) = torch.autograd.grad(run.prediction().sum(), run.student.backbone.fc.weight, allow_unused=True)
    assert weight is None


@pytest.mark.parametrize("adapt", [True, False])
def test_the_network_that_is_kept_predicts_the_same_and_has_no_unused_classifier(adapt):
    run = mixed(adapt_teacher=adapt).train()
    run.student.eval()
    run.method.eval()
    kept = HeadedNetwork(run.student.plain(), run.method.head).eval()
    description = json.loads(json.dumps(run.method.head.description()))
    again = with_head(create_model("resnet8", CLASSES), description).eval()
    again.load_state_dict(kept.state_dict(), strict=True)
    with torch.no_grad():
        expected = run.prediction()
        assert torch.equal(kept(run.batch.image), expected)
        assert torch.equal(again(run.batch.image), expected)
    assert not [name for name, _ in kept.named_parameters() if "fc" in name]


def test_layers_of_the_student_that_its_new_head_replaces_are_neither_trained_nor_kept(tmp_path):
    harness = Harness(ATSC(adapt_teacher=False), student=create_model("mobilenet_v3_small", 5))
    harness.train(steps=1)
    student = harness.module.student
    assert not any(each.requires_grad for each in student.plain().classifier.parameters())
    assert [key for key, each in student.named_parameters() if each.requires_grad and each.grad is None] == []
    exported = harness.module.save_student(tmp_path / "student.safetensors")
    assert [key for key in exported.network.state_dict() if key.startswith("backbone.classifier")] == []


def test_a_file_holds_the_network_that_was_measured_when_the_user_names_the_stages(tmp_path):
    taps = StudentConfig(network="wrn_16_2", taps=("conv1", "block1", "block2", "block3"))  # before BatchNorm and ReLU
    harness = Harness(ATSC(adapt_teacher=False), student=taps)
    harness.train(steps=2)
    module, image = harness.module.eval(), harness.data.batch().image
    exported = module.save_student(tmp_path / "student.safetensors")
    assert json.loads(read_metadata(exported.path)["head"])["reads"] == "block3"
    with torch.no_grad():
        expected = module(image)
        for network in (module.kept_network(), exported.network, load_student(exported.path)):
            torch.testing.assert_close(network.eval()(image), expected)


def test_a_teacher_gets_its_own_normalisation_and_image_size():
    torch.manual_seed(0)
    network = settled(create_model("resnet8", CLASSES), 0)
    given = FrozenTeacher(network, mean=(0.5,) * 3, std=(0.25,) * 3, input_size=24)
    given.adapt_to(DataInfo(CLASSES, SIDE, (0.4,) * 3, (0.2,) * 3))
    adapting, fixed = (Run(given, adapt_teacher=adapt) for adapt in (True, False))
    adapting.method.eval()
    image = adapting.batch.image
    with torch.no_grad():
        expected = network(F.interpolate(image * 0.8 - 0.4, size=(24, 24), mode="bilinear", antialias=True))
        torch.testing.assert_close(adapting.method.teachers[0](image).logits, expected, rtol=1e-4, atol=1e-5)
    assert adapting.method.head.sizes == fixed.method.head.sizes == ((64, 6, 6),)
    assert fixed.terms()["features"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_of_another_precision_is_copied_in_float32(dtype):
    harness = Harness(ATSC(), teacher=create_model("resnet14", 5).to(dtype))
    harness.train(steps=2)
    assert {each.dtype for each in harness.method.teachers.parameters()} == {torch.float32}
    with torch.no_grad():
        assert harness.module.eval()(harness.data.batch().image).dtype == torch.float32


# -------------------------------------------------------------------- state


def test_the_weights_come_with_the_fit_when_there_was_only_a_structure():
    run = Run()
    method = ATSC()
    run.put_together(method, meta=True)
    for value in method.teachers.state_dict().values():
        assert not value.any()
    with pytest.raises(ACKDError, match="no weights of its teachers yet"):
        method(run.student(run.batch.image), None, run.batch)
    with pytest.raises(ACKDError, match="no weights of its teachers yet"):
        method.auxiliary_loss("classifier", run.student(run.batch.image), None, run.batch)
    method.begin_fit(FitInfo(teachers=tuple(run.teachers)))
    assert equal(method.teachers[0].network, run.teachers[0].network)
    assert all(torch.equal(*pair) for pair in zip(method.buffers(), run.method.buffers(), strict=True))
    method.head.projectors.load_state_dict(run.method.head.projectors.state_dict())
    output = run.student(run.batch.image)
    ours, theirs = (each(output, None, run.batch) for each in (run.method, method))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("fit", [True, False], ids=["restored in a fit", "restored before it"])
def test_a_state_brings_the_teachers_back_as_they_have_become(adapt, fit):
    run = Run(adapt_teacher=adapt).train()
    method = from_description(json.loads(json.dumps(describe(run.method))))
    run.put_together(method, meta=True)
    if fit:
        method.begin_fit(FitInfo(teachers=tuple(run.teachers)))
    method.load_state_dict(copy.deepcopy(run.method.state_dict()), strict=True)
    if not fit:
        method.begin_fit(FitInfo(teachers=tuple(run.teachers)))
    assert equal(method, run.method)
    again = copy.deepcopy(run)
    again.method = method
    for each in (run, again):
        each.train()
    assert equal(again.method, run.method)
    assert equal(again.student, run.student)
    assert run.terms()["anchor"].item() == again.terms()["anchor"].item()


def test_a_second_fit_goes_on_with_the_teachers_as_they_are():
    run = Run().train()
    before = copy.deepcopy(run.method)
    run.method.begin_fit(FitInfo(teachers=tuple(run.teachers)))
    assert equal(run.method, before)
    assert run.terms()["anchor"] > 0


def test_the_anchors_start_is_in_no_state_and_is_sent_to_no_process():
    run = mixed()
    assert run.method.replicated_buffers == ("start_0", "start_1", "start_2")
    buffers = dict(run.method.named_buffers())
    assert set(run.method.replicated_buffers) <= set(buffers)
    assert not set(run.method.replicated_buffers) & set(run.method.state_dict())
    sizes = [
        sum(each.numel() for each in own.parameters()) - CLASSES for own in run.own
    ]  # the bias has an optimizer of its own
    assert [buffers[name].numel() for name in run.method.replicated_buffers] == sizes


@pytest.mark.parametrize("again", ["deepcopy", "load"])
def test_classifiers_stay_shared(again):
    run = Run().train()
    if again == "deepcopy":
        method = copy.deepcopy(run.method)
    else:
        method = ATSC()
        run.put_together(method)
        method.load_state_dict(run.method.state_dict())
    (own,), (shared,) = method.teachers, method.head.classifiers
    assert shared is own.network.head
    assert shared is not run.own[0].head
    assert equal(shared, run.own[0].head)
    names = [name for name, _ in method.named_parameters() if name.endswith("head.bias")]
    assert names == ["teachers.0.network.head.bias"], "each parameter has one name"


def test_a_forward_pass_moves_running_statistics_of_what_the_method_runs_and_nothing_else():
    for run, parts in ((Run(), {"teachers", "head"}), (Run(adapt_teacher=False), {"head"})):
        before = copy.deepcopy(run.method.state_dict())
        run.terms()
        moved = {key for key, value in run.method.state_dict().items() if not torch.equal(value, before[key])}
        assert {key.split(".")[0] for key in moved} == parts
        assert all(key.endswith(("running_mean", "running_var", "num_batches_tracked")) for key in moved)


def test_twenty_steps_lower_the_loss():
    run = Run(student=Small(channels=8))
    first = run.loss().item()
    optimizers = run.optimizers()
    for _ in range(20):
        run.step(optimizers, run.batch)
    assert run.loss().item() < 0.7 * first


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("classifier_lr", 0.0),
        ("classifier_lr", math.inf),
        ("classifier_weight_decay", -1e-4),
        ("weight_anchor", -1.0),
        ("weight_anchor", math.nan),
        ("factor", 0),
        ("classifier_update", "weight"),
        ("anchor_scope", "biases"),
        ("teacher_bn", "off"),
        ("average", "votes"),
    ],
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ACKDError, match=rf"{name} is .* in ATSC; it must be"):
        ATSC(**{name: value})


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


def test_networks_of_unknown_stages_are_refused():
    with pytest.raises(ACKDError, match=r"the teacher.*method ATSC"):
        Run(Bare())
    with pytest.raises(ACKDError, match=r"the student.*method ATSC"):
        Run(student=Bare())


def test_a_classifier_that_cannot_be_shared_is_refused():
    odd = Small()
    odd.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(12, CLASSES))
    for network in (Small(bias=False), odd):
        for adapt in (True, False):
            with pytest.raises(ACKDError, match="shares a linear layer with a bias"):
                Run(network, adapt_teacher=adapt)


@pytest.mark.parametrize("name", ["timm:dla46x_c", "timm:resnetv2_18"])
def test_a_convolution_of_the_pooled_map_is_shared_as_a_linear_layer(name):
    torch.manual_seed(0)
    network = create_model(name, 4).eval()
    with pytest.raises(ACKDError, match="Conv2d"):
        shared_classifier(network, "ATSC")
    layer = shared_classifier(network, "ATSC", fixed=True)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = staged_forward(network, plan_for(network), image)
    torch.testing.assert_close(layer(output.embedding), output.logits)


def test_a_convolution_that_pooling_follows_is_not_shared():
    with pytest.raises(ACKDError, match="Conv2d"):
        shared_classifier(create_model("squeezenet1_1", 4), "ATSC", fixed=True)
