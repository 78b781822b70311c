"""Rules that every shipped method keeps; the methods are found in ``configs/methods``, not listed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.configs import config_folder, read_config
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods import AdversarialMethod, Method
from ackd_lightning.methods.base import describe, from_description
from ackd_lightning.models.branchy import BranchyStudent
from ackd_lightning.models.taps import probe
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import Batch

CLASSES, SIDE, IMAGES = 5, 16, 4
TARGETS = torch.arange(40) % CLASSES  # of the training images by index
FRAGMENTS = sorted((config_folder() / "methods").glob("*.yaml"))
every_method = pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)


class Loop(NamedTuple):
    method: Method
    student: BranchyStudent
    teacher: FrozenTeacher | None

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        output = self.student(batch.image)
        return self.method(output, self.teacher(batch.image) if self.teacher else None, batch)

    def loss(self, batch: Batch) -> Tensor:
        weights, terms = self.method.weights(), self.terms(batch)
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def description_in(path: Path) -> dict:
    return read_config(path)["model"]["init_args"]["method"]


def loop_of(description: dict, backbone: nn.Module | None = None) -> Loop:
    torch.manual_seed(0)
    teacher = FrozenTeacher(create_model("resnet8", CLASSES))
    method = from_description(description)
    student = BranchyStudent(backbone or create_model("resnet8", CLASSES), method.branches)
    build(method, student, teacher)
    begin_fit(method)
    return Loop(method, student, teacher if method.needs_teacher else None)


def build(method: Method, student: BranchyStudent, teacher: FrozenTeacher | None) -> None:
    method.build(probe(student, SIDE), probe(teacher.network, SIDE) if teacher and method.needs_teacher else None)


def begin_fit(method: Method) -> None:
    """What a fit tells the method about the data."""
    if method.needs_targets:
        method.set_targets(TARGETS)
    method.set_batch_size(IMAGES)


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(len(TARGETS), generator=generator).split(IMAGES)[:count]
    return [Batch(torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator), TARGETS[each], each) for each in indices]


def train_step(loop: Loop, batch: Batch) -> Tensor:
    """Loss of one step as the training module takes it, without an optimizer."""
    student = loop.student(batch.image)
    teacher = loop.teacher(batch.image) if loop.teacher else None
    weights, terms = loop.method.weights(), loop.method(student, teacher, batch)
    with torch.no_grad():
        loop.method.observe(student, teacher, batch)
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def opponents_of(method: Method) -> dict[str, nn.Parameter]:
    return dict(method.discriminators.named_parameters()) if isinstance(method, AdversarialMethod) else {}


def test_there_are_methods():
    assert len(FRAGMENTS) >= 9


@every_method
def test_terms_are_finite_scalars_with_a_weight_each(path):
    loop = loop_of(description_in(path))
    (batch,) = batches(1)
    terms = loop.terms(batch)
    assert set(terms) == set(loop.method.weights())
    assert "ce" in terms
    for name, term in terms.items():
        assert term.shape == (), name
        assert term.dtype is torch.float32, name
        assert term.isfinite(), name
    output = loop.student(batch.image)
    group = loop.method.ensemble(output)
    assert group is None or group.shape == (IMAGES, CLASSES)
    assert all(value.isfinite() for value in loop.method.statistics(output).values())


@every_method
def test_every_trainable_parameter_gets_a_gradient(path):
    loop = loop_of(description_in(path))
    (batch,) = batches(1)
    opponents = opponents_of(loop.method)
    for parameter in opponents.values():
        parameter.requires_grad_(False)
    loop.loss(batch).backward()
    own = {f"student.{name}": each for name, each in loop.student.named_parameters()}
    own |= {
        f"method.{name}": each
        for name, each in loop.method.named_parameters()
        if not any(each is opponent for opponent in opponents.values())
    }
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        parameter.grad = None
    for name, parameter in opponents.items():
        assert parameter.grad is None, name
        parameter.requires_grad_(True)
    if opponents:
        loss, _ = loop.method.discriminator_terms(loop.student(batch.image))
        loss.backward()
        for name, parameter in opponents.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        for name, parameter in own.items():
            assert parameter.grad is None, name


@every_method
def test_the_optimizers_share_all_parameters_between_them(path):
    method = loop_of(description_in(path)).method
    grouped = [id(each) for group in method.parameter_groups() for each in group["params"]]
    grouped += [id(each) for each in opponents_of(method).values()]
    assert sorted(grouped) == sorted(id(each) for each in method.parameters())
    if opponents_of(method):
        optimizer = method.discriminator_optimizer()
        assert [id(each) for group in optimizer.param_groups for each in group["params"]] == [
            id(each) for each in opponents_of(method).values()
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_method
def test_terms_are_finite_float32_under_autocast(path, dtype):
    loop = loop_of(description_in(path))
    (batch,) = batches(1)
    opponents = opponents_of(loop.method)
    with torch.autocast("cpu", dtype=dtype):
        output = loop.student(batch.image)
        assert output.logits.dtype is dtype
        terms = loop.terms(batch)
        loss = train_step(loop, batch)
    loss.backward()
    for name, term in terms.items():
        assert term.dtype is torch.float32, name
        assert term.isfinite(), name
    own = dict(loop.student.named_parameters(prefix="student"))
    own |= {f"method.{name}": each for name, each in loop.method.named_parameters()}
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if opponents:
        with torch.autocast("cpu", dtype=dtype):
            loss, _ = loop.method.discriminator_terms(loop.student(batch.image))
        loss.backward()
        assert loss.dtype is torch.float32
        assert all(each.grad.isfinite().all() for each in opponents.values())
    assert all(each.isfinite().all() for each in loop.method.state_dict().values())


@every_method
def test_with_cross_entropy_alone_it_is_plain_training_bit_for_bit(path):
    torch.manual_seed(1)
    backbone = create_model("resnet8", CLASSES)
    alone = copy.deepcopy(backbone).train()
    description = copy.deepcopy(description_in(path))
    weights = {
        name
        for name in from_description(description).__init__.__kwdefaults__ or {}
        if name.startswith(("lambda_", "weight_"))
    }
    assert weights & {"lambda_ce", "weight_ce"}
    arguments = description.setdefault("init_args", {})
    arguments |= {name: 1.0 if name in ("lambda_ce", "weight_ce") else 0.0 for name in weights}
    loop = loop_of(description, backbone)
    assert {name for name, weight in loop.method.weights().items() if weight} == {"ce"}
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    ours = torch.optim.SGD(loop.student.train().parameters(), **settings)
    plain = torch.optim.SGD(alone.parameters(), **settings)
    for batch in batches(2):
        for optimizer, loss in ((ours, loop.loss(batch)), (plain, cross_entropy(alone(batch.image), batch.target))):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for key, value in alone.state_dict().items():
        assert torch.equal(loop.student.plain().state_dict()[key], value), key


@every_method
def test_the_teacher_and_its_gradient_are_left_alone(path):
    loop = loop_of(description_in(path))
    if loop.teacher is None:
        return
    before = copy.deepcopy(loop.teacher.network.state_dict())
    (batch,) = batches(1)
    loop.loss(batch).backward()
    assert all(each.grad is None for each in loop.teacher.parameters())
    for key, value in loop.teacher.network.state_dict().items():
        assert torch.equal(value, before[key]), key
    kept = [*loop.method.state_dict().values(), *loop.student.state_dict().values()]
    assert not {each.data_ptr() for each in loop.teacher.network.state_dict().values()} & {
        each.data_ptr() for each in kept if each.numel()
    }


@pytest.mark.parametrize("fit", [True, False], ids=["in a fit", "without one"])
@every_method
def test_state_and_description_bring_the_method_back(path, fit):
    """Memories, too: after steps that moved them, another process goes on with the same losses."""
    loop = loop_of(description_in(path))
    first, second, third = batches(3)
    for batch in (first, second):
        train_step(loop, batch)
    torch.manual_seed(2)
    again = from_description(describe(loop.method))
    build(again, loop.student, loop.teacher)
    if fit:
        begin_fit(again)
    again.load_state_dict(loop.method.state_dict(), strict=True)
    if not fit:
        begin_fit(again)
    resumed = loop._replace(method=again)
    state = copy.deepcopy(loop.student.state_dict())
    for batch in (third, first):
        losses = []
        for each in (loop, resumed):
            loop.student.load_state_dict(state)
            losses.append(train_step(each, batch))
        assert torch.equal(*losses)
    for key, value in loop.method.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@every_method
def test_observing_before_the_backward_pass_changes_no_gradient(path):
    (batch,) = batches(1)
    gradients = []
    for loss in (Loop.loss, train_step):
        loop = loop_of(description_in(path))
        loss(loop, batch).backward()
        gradients.append([each.grad for each in (*loop.student.parameters(), *loop.method.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@every_method
def test_a_step_keeps_no_graph_of_the_last_one(path):
    loop = loop_of(description_in(path))
    for batch in batches(2):
        train_step(loop, batch).backward()  # torch refuses to go through a graph a second time
        for name, value in loop.method.state_dict(keep_vars=True).items():
            assert value.grad_fn is None, name
            assert value.requires_grad is isinstance(value, nn.Parameter), name


@every_method
def test_no_term_leaves_a_trace_in_the_method(path):
    loop = loop_of(description_in(path))
    state = copy.deepcopy(loop.method.state_dict())
    first, second = (loop.terms(batch) for batch in batches(1) * 2)
    for key, value in loop.method.state_dict().items():
        assert torch.equal(value, state[key]), key
    for name, term in first.items():
        assert torch.equal(term, second[name]), name
