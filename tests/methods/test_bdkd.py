from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import kl_per_image
from ackd_lightning.methods import BDKD
from ackd_lightning.methods.bdkd import balanced_loss
from ackd_lightning.testing import Harness
from methods.helpers import check_finite, extreme, slow_divergences, softened, twenty_steps


def inputs(images: int = 6, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(3 * torch.randn(images, classes, generator=generator) for _ in range(2))


def slow(student: Tensor, peer: Tensor, temperature: float) -> list[float]:
    losses = []
    forward, reverse = (slow_divergences(*each, temperature) for each in ((peer, student), (student, peer)))
    for z_s, z_t, ahead, back in zip(student.tolist(), peer.tolist(), forward, reverse, strict=True):
        h_s, h_t = (-sum(each * math.log(each) for each in softened(z, temperature)) for z in (z_s, z_t))
        losses.append((h_t * ahead + h_s * back) / (h_s + h_t))
    return losses


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_equals_a_slow_reference(temperature):
    assert balanced_loss(*inputs(), temperature=temperature).tolist() == pytest.approx(
        slow(*inputs(), temperature), rel=1e-4
    )


def test_it_is_zero_at_equality_and_ignores_shifts():
    student, peer = inputs()
    assert balanced_loss(peer, peer, temperature=2.0).abs().max() < 1e-5
    shifted = balanced_loss(student + 5.0, peer - 3.0, temperature=2.0)
    torch.testing.assert_close(shifted, balanced_loss(student, peer, temperature=2.0), rtol=1e-4, atol=1e-5)


def test_the_less_sure_side_decides_the_direction():
    sure, even = torch.tensor([[40.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.0, 0.0]])
    for student, peer, direction in ((sure, even, "forward"), (even, sure, "reverse")):
        expected = kl_per_image(student, peer, temperature=1.0, direction=direction)
        torch.testing.assert_close(balanced_loss(student, peer, temperature=1.0), expected, rtol=1e-4, atol=1e-5)
    other = torch.tensor([[0.0, 40.0, 1.0]])  # both are sure of another class: one half of each
    both = [kl_per_image(sure, other, temperature=1.0, direction=each) for each in ("forward", "reverse")]
    torch.testing.assert_close(balanced_loss(sure, other, temperature=1.0), sum(both) / 2, rtol=1e-3, atol=1e-3)


def test_the_student_learns_from_the_balanced_term_and_the_peer_from_its_own(scene):
    here = scene(1)
    terms = BDKD(temperature=2.0)(here.student, None, here.batch)
    expected = slow(here.z_s.detach(), here.z[0].detach(), 2.0)
    assert terms["balanced"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    reverse = kl_per_image(here.z_s, here.z[0], temperature=2.0, direction="reverse").mean()
    assert terms["peer"].item() == pytest.approx(reverse.item(), rel=1e-5)
    reached = {
        term: {name for name, gradient in here.gradients(value).items() if gradient is not None}
        for term, value in terms.items()
    }
    assert reached == {"ce": {"z_s"}, "ce_aux": {"z_0"}, "balanced": {"z_s"}, "peer": {"z_0"}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype, sign):
    student, peer = extreme(dtype), extreme(dtype, sign=sign)
    loss = balanced_loss(student, peer, temperature=1.0).mean()
    check_finite(loss, student)


def test_steps_lower_it():
    student, peer = inputs()
    student.requires_grad_()
    losses = twenty_steps(lambda: balanced_loss(student, peer, temperature=3.0).mean(), [student], lr=1.5)
    assert losses[-1] < 0.5 * losses[0]


def test_a_larger_network_is_trained_along():
    harness = Harness(BDKD(peer="resnet14"))
    before = [each.detach().clone() for each in harness.module.student.branches[0].parameters()]
    harness.train(steps=2)
    assert harness.module.teacher is None
    after = list(harness.module.student.branches[0].parameters())
    assert len(after) > len(list(harness.module.student.plain().parameters()))
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_twin_as_peer_is_named(capsys):
    for peer, lines in (("peer", 1), ("resnet14", 0)):
        Harness(BDKD(peer=peer)).begin_fit()
        assert capsys.readouterr().out.count("BDKD") == lines


@pytest.mark.parametrize("peer", ["D3B1", "last"])
def test_a_branch_is_refused(peer):
    with pytest.raises(ACKDError, match="BDKD"):
        BDKD(peer=peer)
