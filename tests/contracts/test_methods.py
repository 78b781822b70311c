"""Rules that every shipped method keeps; the methods are found in ``configs/methods``, not listed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods import AdversarialMethod, Method
from ackd_lightning.methods.base import describe, from_description
from ackd_lightning.models.features import probe
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import Batch, NetOutput

CLASSES, SIDE, IMAGES = 5, 16, 4
TARGETS = torch.arange(40) % CLASSES  # of the training images by index
FRAGMENTS = sorted((config_folder() / "methods").glob("*.yaml"))
every_method = pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)


class Loop(NamedTuple):
    method: Method
    student: BranchyStudent
    teacher: FrozenTeacher | None

    @property
    def teachers(self) -> list[FrozenTeacher]:
        return [self.teacher] if self.teacher else []

    def outputs(self, batch: Batch) -> tuple[NetOutput, NetOutput | None, Batch]:
        teacher = self.teacher(batch.image) if self.teacher and not self.method.takes_teachers else None
        return self.student(batch.image), teacher, batch

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return self.method(*self.outputs(batch))

    def loss(self, batch: Batch) -> Tensor:
        weights, terms = self.method.weights(), self.terms(batch)
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def description_in(path: Path) -> dict:
    return read_config(path)["model"]["init_args"]["method"]


def loop_of(description: dict, backbone: nn.Module | None = None) -> Loop:
    torch.manual_seed(0)
    teacher = FrozenTeacher(create_model("resnet8", CLASSES))
    method = from_description(description)
    backbone = backbone or create_model("resnet8", CLASSES)
    student = BranchyStudent(backbone, method.branches, num_classes=CLASSES)
    taught_by = [teacher] if method.needs_teacher else []
    build(method, student, taught_by)
    begin_fit(method, taught_by)
    return Loop(method, student, teacher if method.needs_teacher else None)


def build(method: Method, student: BranchyStudent, teachers: Sequence[FrozenTeacher]) -> None:
    method.set_range([-2.0] * 3, [2.0] * 3)
    networks = [each.network for each in teachers]
    method.teacher_specs = tuple(probe(each, SIDE) for each in networks)
    method.attach(student, networks)
    method.build(probe(student, SIDE), method.teacher_specs[0] if networks else None)


def begin_fit(method: Method, teachers: Sequence[FrozenTeacher], *, epochs: Sequence[int] = (49, 50)) -> None:
    """What a fit tells the method about teachers and data; far in the training, so that no warm-up is left."""
    method.adopt(teachers)
    method.set_total_epochs(100)
    if method.needs_targets:
        method.set_targets(TARGETS)
    method.set_batch_size(IMAGES)
    for epoch in epochs:
        method.set_epoch(epoch)


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(len(TARGETS), generator=generator).split(IMAGES)[:count]
    return [Batch(torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator), TARGETS[each], each) for each in indices]


def train_step(loop: Loop, batch: Batch) -> Tensor:
    """Loss of one step as the training module takes it, without an optimizer."""
    outputs = loop.outputs(batch)
    weights, terms = loop.method.weights(), loop.method(*outputs)
    with torch.no_grad():
        loop.method.observe(*outputs)
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def players_of(method: Method) -> dict[str, list[nn.Parameter]]:
    return method.players() if isinstance(method, AdversarialMethod) else {}


def opponents_of(method: Method) -> list[nn.Parameter]:
    return [parameter for parameters in players_of(method).values() for parameter in parameters]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in module.named_parameters() if each.requires_grad}


def moves(method: Method, key: str) -> bool:
    """A running statistic of a network that is trained beside the student: moved by every forward pass."""
    return key.startswith(tuple(f"{name}." for name in method.networks)) and key.endswith(
        ("running_mean", "running_var", "num_batches_tracked")
    )


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
    for parameter in opponents:
        parameter.requires_grad_(False)
    loop.loss(batch).backward()
    own = {f"student.{name}": each for name, each in trainable(loop.student).items()}
    own |= {f"method.{name}": each for name, each in trainable(loop.method).items()}
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        parameter.grad = None
    for parameter in opponents:
        assert parameter.grad is None
        parameter.requires_grad_(True)
    for player, parameters in players_of(loop.method).items():
        loss, values = loop.method.player_loss(player, *loop.outputs(batch))
        loss.backward()
        assert all(value.isfinite() and not value.requires_grad for value in values.values())
        for parameter in parameters:
            assert parameter.grad is not None, player
            assert parameter.grad.isfinite().all(), player
            parameter.grad = None
        for name, parameter in {**own, **dict(enumerate(opponents))}.items():
            assert parameter.grad is None, (player, name)
        assert all(parameter.requires_grad for parameter in own.values())


@every_method
def test_the_optimizers_share_all_parameters_between_them(path):
    method = loop_of(description_in(path)).method
    grouped = [id(each) for group in method.parameter_groups() for each in group["params"]]
    grouped += [id(each) for each in opponents_of(method)]
    assert sorted(grouped) == sorted(id(each) for each in trainable(method).values())
    for player, parameters in players_of(method).items():
        optimizer = method.player_optimizer(player)
        assert [id(each) for group in optimizer.param_groups for each in group["params"]] == [
            id(each) for each in parameters
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_method
def test_terms_are_finite_float32_under_autocast(path, dtype):
    loop = loop_of(description_in(path))
    (batch,) = batches(1)
    with torch.autocast("cpu", dtype=dtype):
        output = loop.student(batch.image)
        assert output.logits.dtype is dtype
        terms = loop.terms(batch)
        loss = train_step(loop, batch)
    loss.backward()
    for name, term in terms.items():
        assert term.dtype is torch.float32, name
        assert term.isfinite(), name
    opponents = {id(each) for each in opponents_of(loop.method)}
    own = {f"student.{name}": each for name, each in trainable(loop.student).items()}
    own |= {f"method.{name}": each for name, each in trainable(loop.method).items() if id(each) not in opponents}
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for player, parameters in players_of(loop.method).items():
        with torch.autocast("cpu", dtype=dtype):
            loss, _ = loop.method.player_loss(player, *loop.outputs(batch))
        loss.backward()
        assert loss.dtype is torch.float32
        assert all(each.grad.isfinite().all() for each in parameters)
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
    build(again, loop.student, loop.teachers)
    if fit:
        begin_fit(again, loop.teachers, epochs=[])
    again.load_state_dict(loop.method.state_dict(), strict=True)
    if fit:
        again.set_epoch(50)
    else:
        begin_fit(again, loop.teachers, epochs=[50])
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
        gradients.append([each.grad for each in (*loop.student.parameters(), *trainable(loop.method).values())])
    for first, second in zip(*gradients, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@every_method
def test_a_step_keeps_no_graph_of_the_last_one(path):
    loop = loop_of(description_in(path))
    for batch in batches(2):
        train_step(loop, batch).backward()  # torch refuses to go through a graph a second time
        for name, value in loop.method.state_dict(keep_vars=True).items():
            assert value.grad_fn is None, name
            assert isinstance(value, nn.Parameter) or not value.requires_grad, name


@every_method
def test_no_term_leaves_a_trace_in_the_method(path):
    loop = loop_of(description_in(path))
    state = copy.deepcopy(loop.method.state_dict())
    first, second = (loop.terms(batch) for batch in batches(1) * 2)
    for key, value in loop.method.state_dict().items():
        assert moves(loop.method, key) or torch.equal(value, state[key]), key
    for name, term in first.items():
        assert torch.equal(term, second[name]), name
