from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ONE, Networks, one
from ackd_lightning.methods.one import Gate, one_loss
from ackd_lightning.models.finding import probe
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import Batch
from methods.helpers import check_finite, twenty_steps

IMAGES, CLASSES, SIDE = 6, 5, 16


class Run:
    def __init__(self, **arguments) -> None:
        torch.manual_seed(9)
        self.method = ONE(**arguments)
        self.student = BranchyStudent(create_model("resnet8", CLASSES), self.method.branches)
        self.method.build(Networks(student=probe(self.student, SIDE)))
        target = torch.randint(CLASSES, (IMAGES,))
        self.batch = Batch(torch.randn(IMAGES, 3, SIDE, SIDE), target, torch.arange(IMAGES))

    def loss(self) -> Tensor:
        weights, terms = self.method.loss_weights, self.method(self.student(self.batch.image), None, self.batch)
        assert set(terms) == set(weights)
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def logits(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10)
    return [3 * torch.randn(IMAGES, CLASSES, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_equals_a_slow_reference(temperature):
    *learners, ensemble = logits(4)
    total = 0.0
    for learner in learners:
        for row, taught in zip(learner.double(), ensemble.double(), strict=True):
            p, q = ((each / temperature).softmax(dim=0).tolist() for each in (taught, row))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / IMAGES
    value = one_loss(learners, ensemble, temperature=temperature).item()
    assert value == pytest.approx(temperature**2 * total, rel=1e-5)


def test_the_loss_is_zero_at_equality_and_does_not_reach_the_ensemble():
    learner, ensemble = (each.requires_grad_() for each in logits(2))
    assert one_loss([ensemble, ensemble], ensemble, temperature=3.0).item() == pytest.approx(0.0, abs=1e-6)
    one_loss([learner], ensemble, temperature=3.0).backward()
    assert learner.grad.abs().sum() > 0
    assert ensemble.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype):
    learner = torch.full((2, 5), -6e4, dtype=dtype)
    learner[:, 1] = 6e4
    ensemble = -learner
    learner.requires_grad_()
    loss = one_loss([learner, learner], ensemble, temperature=3.0)
    check_finite(loss, learner)
    assert loss > 1e4


def test_terms_are_those_of_the_paper():
    run = Run()
    output = run.student(run.batch.image)
    terms = run.method(output, None, run.batch)
    feature = output.features[2].mean(dim=(2, 3))  # F_2, the input of the last of three stages
    gate = copy.deepcopy(run.method.gate)
    weights = torch.relu(gate.norm(gate.score(feature))).softmax(dim=1)
    every = [output.logits, *(branch.logits for branch in output.branches)]
    group = sum(weights[:, [k]] * each for k, each in enumerate(every))
    torch.testing.assert_close(run.method.ensemble(output), group)
    cross = [torch.nn.functional.cross_entropy(each, run.batch.target).item() for each in (*every, group)]
    assert terms["ce"].item() == pytest.approx(cross[0], rel=1e-5)
    assert terms["ce_aux"].item() == pytest.approx(cross[1] + cross[2], rel=1e-5)
    assert terms["ce_ensemble"].item() == pytest.approx(cross[3], rel=1e-5)
    assert terms["one"].item() == pytest.approx(one_loss(every, group, temperature=3.0).item(), rel=1e-5)


def test_what_each_term_reaches():
    run = Run()
    terms = run.method(run.student(run.batch.image), None, run.batch)
    parts = {
        "target": list(run.student.backbone.fc.parameters()),
        "auxiliary": list(run.student.branches.parameters()),
        "trunk": list(run.student.backbone.layer1.parameters()),
        "gate": list(run.method.gate.parameters()),
    }
    reached = {
        "ce": {"target", "trunk"},
        "ce_aux": {"auxiliary", "trunk"},
        "ce_ensemble": {"target", "auxiliary", "trunk", "gate"},
        "one": {"target", "auxiliary", "trunk"},
    }
    for name, term in terms.items():
        for part, parameters in parts.items():
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            assert all((each is not None) is (part in reached[name]) for each in gradients), (name, part)


def test_forward_changes_no_statistics_and_update_does():
    run = Run()
    run.method.gate.norm.running_mean += 1.0
    before = copy.deepcopy(run.method.state_dict())
    output = run.student(run.batch.image)
    run.method(output, None, run.batch)
    assert all(torch.equal(value, before[key]) for key, value in run.method.state_dict().items())
    with torch.no_grad():
        run.method.update(output, None, run.batch)
    scores = run.method.gate.score(output.features[2].mean(dim=(2, 3)))
    torch.testing.assert_close(run.method.gate.norm.running_mean, 0.9 * torch.ones(3) + 0.1 * scores.mean(dim=0))
    torch.testing.assert_close(run.method.gate.norm.running_var, 0.9 * torch.ones(3) + 0.1 * scores.var(dim=0))


def test_evaluation_uses_running_statistics_so_that_images_do_not_depend_on_each_other():
    run = Run()
    output = run.student.eval()(run.batch.image)
    with torch.no_grad():
        run.method.update(output, None, run.batch)
        run.method.eval()
        state = copy.deepcopy(run.method.state_dict())
        run.method.update(output, None, run.batch)  # not outside training
        whole = run.method.ensemble(output)
        single = run.method.ensemble(run.student(run.batch.image[:1]))
        shares = run.method.statistics(output)
    torch.testing.assert_close(single, whole[:1], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in run.method.state_dict().items())
    assert set(shares) == {"gate_weight_target", "gate_weight_aux1", "gate_weight_aux2"}
    assert sum(shares.values()).item() == pytest.approx(1.0)


def test_the_gate_normalises_over_the_batch_of_all_processes(monkeypatch):
    torch.manual_seed(11)
    gate, features = Gate(8, 3), torch.randn(6, 8, 2, 2)
    expected = gate(features)
    scores = gate.score(features.mean(dim=(2, 3)))
    monkeypatch.setattr(one, "whole_batch", lambda shard: scores)
    torch.testing.assert_close(gate(features[:3]), expected[:3])


def test_a_single_image_trains():
    run = Run()
    output = run.student.eval()(run.batch.image[:1])
    batch = Batch(*(each[:1] for each in run.batch[:3]))
    terms = run.method(output, None, batch)
    before = copy.deepcopy(run.method.state_dict())
    run.method.update(output, None, batch)
    assert all(term.isfinite() for term in terms.values())
    assert all(torch.equal(value, before[key]) for key, value in run.method.state_dict().items())


@pytest.mark.parametrize(
    ("epochs", "epoch", "ramp"),
    [(80, 0, math.exp(-5)), (80, 40, math.exp(-1.25)), (80, 80, 1.0), (80, 300, 1.0), (0, 0, 1.0)],
)
def test_the_weight_of_distillation_grows_along_a_gaussian(epochs, epoch, ramp):
    method = ONE(ramp_epochs=epochs, weight_one=2.0)
    method.set_epoch(epoch)
    assert method.loss_weights == {"ce": 1.0, "ce_aux": 1.0, "ce_ensemble": 1.0, "one": pytest.approx(2 * ramp)}


def test_twenty_steps_lower_the_loss():
    run = Run()
    parameters = [*run.student.parameters(), *run.method.parameters()]
    losses = twenty_steps(lambda: run.loss(), parameters, lr=0.02)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("learners", [1, 3])
def test_auxiliary_learners_copy_the_last_stage(learners):
    run = Run(learners=learners)
    assert run.student.specs == ("D3B1",) * learners
    assert run.method.gate_weights(run.student(run.batch.image)).shape == (IMAGES, learners + 1)


def test_it_needs_no_teacher():
    assert ONE.teacher == "none"
    assert ONE().temperature == 3.0


@pytest.mark.parametrize(
    ("name", "value"), [("learners", 0), ("temperature", 0.0), ("temperature", -1.0), ("ramp_epochs", -1)]
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ACKDError, match=rf"{name} is {value} in ONE; it must be"):
        ONE(**{name: value})
