"""Rules that every shipped method keeps; the methods are found in ``configs/methods``, not listed.

Cheap rules run for every fragment. The others run once for each code path: presets that only change a weight, a sign or
a direction of ACKD share the path of another fragment.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.launch.preflight import check_checkpoint
from ackd_lightning.methods import ACKD, CE, KD, FitInfo, Method, Networks, Sum
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.methods.description import describe, from_description
from ackd_lightning.methods.guides import GuidedMethod
from ackd_lightning.models.freezing import frozen
from ackd_lightning.models.zoo import create_model
from ackd_lightning.testing import Harness, RandomImages
from ackd_lightning.types import Batch, NetOutput

CLASSES, SIDE, IMAGES = 5, 16, 4
FRAGMENTS = sorted((config_folder() / "methods").glob("*.yaml"))
PATH_OF_ANOTHER = {
    f"ackd_{each}" for each in ("adversarial", "attention", "detached", "direct", "diversify", "literal", "teach_all")
}
PATHS = [path for path in FRAGMENTS if path.stem not in PATH_OF_ANOTHER]
every_fragment = pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
every_method = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def description_in(path: Path) -> dict[str, Any]:
    return copy.deepcopy(read_config(path)["model"]["method"])


def teachers_of(method: Method) -> list[str]:
    return ["resnet14", "resnet8"] if isinstance(method, GuidedMethod) else ["resnet8"]


def harness_for(method: Method, **arguments: Any) -> Harness:
    """A method in the middle of a training, so that no warm-up is left."""
    usual: dict[str, Any] = {
        "teacher": teachers_of(method),
        "data": RandomImages(num_classes=CLASSES, input_size=SIDE, count=40, batch_size=IMAGES),
    }
    harness = Harness(method, **{**usual, **arguments})
    harness.begin_fit(epoch=50)
    return harness


def harness_in(path: Path, **arguments: Any) -> Harness:
    return harness_for(from_description(description_in(path)), **arguments)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in module.named_parameters() if each.requires_grad}


def auxiliary(method: Method) -> list[nn.Parameter]:
    return [parameter for parameters in method.auxiliary_parameters().values() for parameter in parameters]


def of_the_students_step(harness: Harness) -> dict[str, nn.Parameter]:
    left_out = {id(each) for each in auxiliary(harness.method)}
    own = {f"student.{name}": each for name, each in trainable(harness.module.student).items()}
    own |= {f"method.{name}": each for name, each in trainable(harness.method).items()}
    return {name: each for name, each in own.items() if id(each) not in left_out}


def moves(method: Method, key: str) -> bool:
    """A running statistic of a network that a method trains itself, which every forward pass moves."""
    return method.teacher == "own" and key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_there_are_methods():
    assert len(FRAGMENTS) >= 9
    assert {path.stem for path in FRAGMENTS} >= PATH_OF_ANOTHER


# ---------------------------------------------------------------- rules for every fragment


@every_fragment
def test_terms_are_finite_scalars_with_a_weight_each(path):
    harness = harness_in(path)
    terms = harness.terms()
    assert set(terms) == set(harness.method.loss_weights)
    assert "ce" in terms
    for name, term in terms.items():
        assert term.shape == (), name
        assert term.dtype is torch.float32, name
        assert term.isfinite(), name
    output, _, _ = harness.outputs()
    group = harness.method.ensemble(output)
    assert group is None or group.shape == (IMAGES, CLASSES)
    statistics = harness.method.statistics(output)
    assert all(value.isfinite() for value in statistics.values())
    assert not any("/" in name for name in statistics)


@every_fragment
def test_the_optimizers_share_all_parameters_between_them(path):
    method = harness_in(path).method
    grouped = [id(each) for group in method.parameter_groups() for each in group["params"]]
    grouped += [id(each) for each in auxiliary(method)]
    assert sorted(grouped) == sorted(id(each) for each in trainable(method).values())


@every_fragment
def test_a_description_names_the_public_class(path):
    method = from_description(description_in(path))
    description = describe(method)
    assert description["class_path"] == f"ackd_lightning.methods.{type(method).__name__}"
    assert describe(from_description(description)) == description


# ---------------------------------------------------------------- rules for every code path


@every_method
def test_every_trainable_parameter_gets_a_gradient_in_its_own_step(path):
    harness = harness_in(path)
    method, own, opponents = harness.method, of_the_students_step(harness), auxiliary(harness.method)
    harness.step()
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        parameter.grad = None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in opponents)
    for name, parameters in method.auxiliary_parameters().items():
        result = method.auxiliary_loss(name, *harness.outputs())
        assert result is not None
        loss, values = result
        loss.backward()
        assert all(value.isfinite() and not value.requires_grad and "/" not in key for key, value in values.items())
        for parameter in parameters:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            parameter.grad = None
        for other, parameter in {**own, **dict(enumerate(opponents))}.items():
            assert parameter.grad is None, (name, other)
    assert all(parameter.requires_grad for parameter in own.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_method
def test_terms_are_finite_float32_under_autocast(path, dtype):
    harness = harness_in(path)
    method = harness.method
    with frozen(auxiliary(method)):
        with torch.autocast("cpu", dtype=dtype):
            outputs = harness.outputs()
            assert outputs[0].logits.dtype is dtype
            terms = method(*outputs)
            loss = weighted_loss(method, terms)
        loss.backward()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        method.update(*outputs)
    for name, term in terms.items():
        assert term.dtype is torch.float32, name
        assert term.isfinite(), name
    for name, parameter in of_the_students_step(harness).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, parameters in method.auxiliary_parameters().items():
        with torch.autocast("cpu", dtype=dtype):
            loss, _ = method.auxiliary_loss(name, *harness.outputs())
        loss.backward()
        assert loss.dtype is torch.float32
        assert all(each.grad.isfinite().all() for each in parameters)
    assert all(each.isfinite().all() for each in method.state_dict().values())


@every_method
def test_with_cross_entropy_alone_it_is_plain_training_bit_for_bit(path):
    torch.manual_seed(1)
    backbone = create_model("resnet8", CLASSES)
    alone = copy.deepcopy(backbone).train()
    description = description_in(path)
    weights = {
        name
        for name in inspect.signature(type(from_description(description))).parameters
        if name.startswith(("lambda_", "weight_"))
    }
    assert weights & {"lambda_ce", "weight_ce"}
    arguments = description.setdefault("init_args", {})
    arguments |= {name: 1.0 if name in ("lambda_ce", "weight_ce") else 0.0 for name in weights}
    harness = harness_for(from_description(description), student=backbone)
    assert {name for name, weight in harness.method.loss_weights.items() if weight} == {"ce"}
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    ours = SGD(harness.module.student.parameters(), **settings)
    plain = SGD(alone.parameters(), **settings)
    for number in range(2):
        batch = harness.data.batch(number)
        for optimizer in (ours, plain):
            optimizer.zero_grad()
        harness.step(batch)
        cross_entropy(alone(batch.image), batch.target).backward()
        for optimizer in (ours, plain):
            optimizer.step()
    for key, value in alone.state_dict().items():
        assert torch.equal(harness.module.student.plain().state_dict()[key], value), key


@every_method
def test_the_teacher_and_its_gradient_are_left_alone(path):
    harness = harness_in(path)
    networks = nn.ModuleList(teacher.network for teacher in harness.module.teachers)
    before = copy.deepcopy(networks.state_dict())
    harness.step()
    assert all(each.grad is None for each in networks.parameters())
    for key, value in networks.state_dict().items():
        assert torch.equal(value, before[key]), key
    kept = [*harness.method.state_dict().values(), *harness.module.student.state_dict().values()]
    assert not {each.data_ptr() for each in networks.state_dict().values()} & {
        each.data_ptr() for each in kept if each.numel()
    }


@pytest.mark.parametrize("name", [*(path.stem for path in FRAGMENTS), "kd+semckd", "ce+crd"])
def test_a_checkpoint_fits_the_settings_that_it_was_made_with(name):
    """What only a fit creates, such as memories, is no part of the settings; in a sum, too."""
    methods = [from_description(description_in(config_folder() / f"methods/{each}.yaml")) for each in name.split("+")]
    first = harness_for(methods[0] if len(methods) == 1 else Sum(methods))
    first.step()
    content = {"state_dict": first.module.state_dict(), "ackd_lightning": first.module.metadata()}
    again = from_description(describe(first.method))
    check_checkpoint(Path("a.ckpt"), Harness(again, teacher=teachers_of(again), data=first.data).module, content)


@pytest.mark.parametrize("fit", [True, False], ids=["restored in a fit", "restored before it"])
@every_method
def test_state_and_description_bring_the_method_back(path, fit):
    """Memories, too: after steps that moved them, another process resumes with the same losses."""
    teacher = [create_model(name, CLASSES) for name in teachers_of(from_description(description_in(path)))]
    first = harness_in(path, teacher=teacher)
    for number in range(2):
        first.step(first.data.batch(number))
    arguments = {"teacher": teacher, "data": first.data, "seed": 2}
    again = Harness(from_description(describe(first.method)), **arguments)
    again.module.seed = first.module.seed  # the same run, whose networks start with other weights
    if fit:
        again.begin_fit(epoch=50)
    again.method.load_state_dict(first.method.state_dict(), strict=True)
    again.module.student.load_state_dict(first.module.student.state_dict())
    if fit:
        again.method.set_epoch(50)
    else:
        again.begin_fit(epoch=50)
    for number in (2, 0):
        assert torch.equal(*(each.step(first.data.batch(number)) for each in (first, again)))
    for key, value in first.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[key], value), key


@every_method
def test_a_step_keeps_no_graph_of_the_last_one(path):
    harness = harness_in(path)
    for number in range(2):
        harness.step(harness.data.batch(number))  # torch refuses to go through a graph a second time
        for name, value in harness.method.state_dict(keep_vars=True).items():
            assert value.grad_fn is None, name
            assert isinstance(value, nn.Parameter) or not value.requires_grad, name


@every_method
def test_forward_leaves_no_trace_in_the_method(path):
    harness = harness_in(path)
    state = copy.deepcopy(harness.method.state_dict())
    first, second = (harness.terms() for _ in range(2))
    for key, value in harness.method.state_dict().items():
        assert moves(harness.method, key) or torch.equal(value, state[key]), key
    for name, term in first.items():
        assert torch.equal(term, second[name]), name


# ---------------------------------------------------------------- sums


@every_method
def test_a_sum_with_cross_entropy_has_the_terms_weights_and_gradients_of_both(path):
    method = from_description(description_in(path))
    if method.teacher == "own":
        with pytest.raises(ACKDError, match=type(method).__name__):
            Sum([method, CE()])
        return
    alone = harness_in(path)
    summed = harness_for(Sum([from_description(description_in(path)), CE()], weights=[0.5, 2.0]))
    summed.method.methods[0].load_state_dict(alone.method.state_dict())
    weights = alone.method.loss_weights
    assert summed.method.loss_weights == {**{name: 0.5 * each for name, each in weights.items()}, "ce_2": 2.0}
    assert list(summed.method.auxiliary_parameters()) == list(alone.method.auxiliary_parameters())
    terms, both = alone.terms(), summed.terms()
    assert set(both) == {*terms, "ce_2"}
    for name, term in {**terms, "ce_2": terms["ce"]}.items():
        torch.testing.assert_close(both[name], term, msg=name)
    with frozen(auxiliary(alone.method)), frozen(auxiliary(summed.method)):
        (0.5 * weighted_loss(alone.method, terms) + 2.0 * terms["ce"]).backward()
        weighted_loss(summed.method, both).backward()
    for (name, one), (_, other) in zip(
        of_the_students_step(alone).items(), of_the_students_step(summed).items(), strict=True
    ):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5, msg=name)
    for name in alone.method.auxiliary_parameters():
        losses = [each.method.auxiliary_loss(name, *each.outputs())[0] for each in (alone, summed)]
        torch.testing.assert_close(*losses)


# ---------------------------------------------------------------- methods from outside the package


class Memory(Method):
    """The memory that anybody would write first: written in place, and read by a product that saves it."""

    def build(self, networks: Networks) -> None:
        self.loss_weights = {"ce": 1.0, "memory": 0.1}
        self.classes = networks.student.num_classes

    def begin_fit(self, fit: FitInfo) -> None:
        self.register_buffer("memory", torch.zeros(len(fit.required_targets(self)), self.classes))

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        return {
            "ce": cross_entropy(student.logits, batch.target),
            "memory": (student.logits @ self.memory.T).square().mean(),
        }

    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        self.memory[batch.index] = student.logits.softmax(dim=1)


class MemoryWithOptimizer(Memory):
    """The same in the loop with several optimizers."""

    def build(self, networks: Networks) -> None:
        super().build(networks)
        self.critic = nn.Linear(self.classes, 1)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        return {**super().forward(student, teacher, batch), "adv": self.critic(student.logits).mean()}

    def begin_fit(self, fit: FitInfo) -> None:
        super().begin_fit(fit)
        self.loss_weights["adv"] = 0.1

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        return {"critic": SGD(self.critic.parameters(), lr=0.01)}

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -self.critic(student.logits.detach()).mean() + self.critic.weight.square().sum()
        return loss, {"critic_loss": loss.detach()}


@pytest.mark.parametrize("cls", [Memory, MemoryWithOptimizer])
def test_the_memory_that_anybody_would_write_first_works_in_both_loops(cls):
    harness = Harness(cls())
    assert harness.module.automatic_optimization is (cls is Memory)
    losses = harness.train(steps=12)
    assert len(losses) == 12
    assert all(loss == loss for loss in losses)
    written = harness.method.memory.sum(dim=1)
    torch.testing.assert_close(written, torch.ones_like(written))
    assert not harness.method.memory.requires_grad


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("method", "argument", "value", "remedy"),
    [
        (ACKD, "adversarial", "foool", "did you mean 'fool'"),
        (ACKD, "teach", "studnet", "'learners'"),
        (ACKD, "discriminator_optimizer", "adamw", "did you mean 'adam'"),
        (ACKD, "attention", "flat", "'flattened'"),
        (ACKD, "lambda_adv", -1.0, "at least 0"),
        (KD, "weight_kd", -1, "at least 0"),
        (KD, "temperature", 0.0, "above 0"),
        (KD, "temperature", "4", "a number"),
        (KD, "weight_ce", float("nan"), "a finite number"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(method, argument, value, remedy):
    with pytest.raises(ACKDError) as caught:
        method(**{argument: value})
    for part in (argument, repr(value), method.__name__, remedy):
        assert part in str(caught.value)
