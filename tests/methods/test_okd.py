from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import kd_loss
from ackd_lightning.methods import OKD
from ackd_lightning.methods.okd import OnlineModule
from ackd_lightning.testing import Harness, RandomImages
from ackd_lightning.types import NetOutput
from methods.helpers import Stages, extreme


def disturbed(harness: Harness) -> Harness:
    harness.begin_fit()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in harness.method.online.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return harness


def test_the_adapted_teacher_equals_a_slow_reference():
    network = Stages().eval()
    harness = disturbed(Harness(OKD(reduction=2), teacher=network))
    batch = harness.data.batch()
    feature = network.stem(batch.image)
    for stage, module in zip((network.first, network.second), harness.method.online, strict=True):
        feature = stage(feature)
        bottleneck = torch.einsum("bchw,dc->bdhw", feature, module.enter.weight) + module.enter.bias[:, None, None]
        change = torch.einsum("bdhw,cd->bchw", bottleneck.relu(), module.leave.weight)
        feature = feature + change + module.leave.bias[:, None, None]
    expected = network.head(feature.mean(dim=(2, 3)))
    found = harness.method.adapted(batch.image).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, network(batch.image), atol=1e-2)


def test_it_starts_as_the_teacher_and_leaves_no_hook_in_it():
    harness = Harness(OKD())
    harness.begin_fit()
    image, teacher = harness.data.batch().image, harness.module.teacher
    assert torch.equal(harness.method.adapted(image).logits, teacher(image).logits)
    before, logits = copy.deepcopy(teacher.network.state_dict()), teacher(image).logits
    for number in range(3):
        harness.step(harness.data.batch(number))
    disturbed(harness)
    assert torch.equal(teacher(image).logits, logits)
    assert not torch.equal(harness.method.adapted(image).logits, logits)
    assert all(torch.equal(value, before[key]) for key, value in teacher.network.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def test_terms_and_where_their_gradients_go():
    harness = disturbed(Harness(OKD(temperature=2.0)))
    student, teacher, batch = harness.outputs()
    terms = harness.method(student, teacher, batch)
    theirs = harness.method.adapted(batch.image).logits
    expected = {
        "ce": F.cross_entropy(student.logits, batch.target),
        "kd": kd_loss(student.logits, theirs, temperature=2.0),
        "ce_teacher": F.cross_entropy(theirs, batch.target),
        "kd_teacher": kd_loss(theirs, student.logits, temperature=2.0),
    }
    modules = list(harness.method.online.parameters())
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)
        into_student = torch.autograd.grad(terms[name], student.logits, retain_graph=True, allow_unused=True)[0]
        into_modules = torch.autograd.grad(terms[name], modules, retain_graph=True, allow_unused=True)
        assert (into_student is None) == name.endswith("teacher"), name
        assert all((each is None) == (not name.endswith("teacher")) for each in into_modules), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients_are_finite_at_the_largest_logits(dtype, monkeypatch):
    method, student, teacher = OKD(), extreme(dtype), extreme(dtype, sign=-1)
    monkeypatch.setattr(method, "adapted", lambda image: NetOutput(teacher))
    terms = method(NetOutput(student), None, RandomImages().batch())
    assert {each.dtype for each in terms.values()} == {torch.float32}
    sum(terms.values()).backward()
    for value in (*terms.values(), student.grad, teacher.grad):
        assert value.isfinite().all()


def test_steps_move_the_teacher_towards_labels_and_student():
    harness = Harness(OKD(weight_ce=0.0, weight_kd=0.0))
    optimizer = torch.optim.SGD(harness.method.parameters(), lr=0.1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(harness.step().item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_a_module_reads_the_channels_of_maps_and_tokens():
    module = OnlineModule(6, 2)
    nn.init.normal_(module.leave.weight)
    feature = torch.randn(2, 6, 4, 5)
    last = feature.permute(0, 2, 3, 1)
    torch.testing.assert_close(module(last).permute(0, 3, 1, 2), module(feature))
    torch.testing.assert_close(module(last.flatten(1, 2)), module(last).flatten(1, 2))


def test_several_teachers_and_stages_that_return_tuples_are_refused():
    with pytest.raises(ACKDError, match="OKD has one teacher"):
        Harness(OKD(), teacher=["resnet8", "resnet14"])

    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(feature), feature

    class Tuples(Stages):
        def __init__(self) -> None:
            super().__init__()
            self.first = Pair(self.first)

        def forward(self, image: Tensor) -> Tensor:
            return self.head(self.second(self.first(self.stem(image))[0]).mean(dim=(2, 3)))

    with pytest.raises(ACKDError, match="'first' of the teacher returns a tuple"):
        Harness(OKD(), teacher=Tuples()).terms()


def test_a_teacher_without_logits_is_refused_before_the_first_step():
    harness = Harness(OKD())
    harness.module.teacher.features_only = True
    with pytest.raises(ACKDError, match="OKD reads logits"):
        harness.begin_fit()
