from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import DCM
from ackd_lightning.methods.dcm import dense_loss
from ackd_lightning.models.student import Peer
from ackd_lightning.testing import Harness
from ackd_lightning.types import Batch, NetOutput
from methods.helpers import check_finite, slow_divergence


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [(2 * torch.randn(4, 5, generator=generator)).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_classifier_learns_from_every_one_of_the_other_network(temperature):
    first, second = inputs(5)[:3], inputs(5)[3:]
    expected = 0.0
    for ours in first:
        for theirs in second:
            expected += slow_divergence(theirs.detach(), ours.detach(), temperature)
            expected += slow_divergence(ours.detach(), theirs.detach(), temperature)
    assert dense_loss(first, second, temperature=temperature).item() == pytest.approx(expected, rel=1e-4)


def test_the_map_of_connections_is_that_of_the_authors_code():
    """With three classifiers each, learner i and source j are connected where their networks differ."""
    every = inputs(6)
    connected = [[int((i < 3) != (j < 3)) for j in range(6)] for i in range(6)]
    gradients = torch.autograd.grad(dense_loss(every[:3], every[3:], temperature=1.0), every)
    for i, learner in enumerate(every):
        sources = [each.detach() for j, each in enumerate(every) if connected[i][j]]
        loss = sum(
            torch.nn.functional.kl_div(learner.log_softmax(1), each.softmax(1), reduction="batchmean")
            for each in sources
        )
        torch.testing.assert_close(gradients[i], torch.autograd.grad(loss, learner)[0])


def test_it_is_zero_where_all_agree_and_ignores_shifts():
    (same,) = inputs(1)
    assert dense_loss([same, same + 1.0], [same - 2.0, same], temperature=2.0).item() == pytest.approx(0.0, abs=1e-5)


def test_the_terms_read_the_right_classifiers():
    every = inputs(6)
    peer = NetOutput(every[3], branches=(NetOutput(every[4]), NetOutput(every[5])))
    student = NetOutput(every[0], branches=(NetOutput(every[1]), NetOutput(every[2]), peer))
    batch = Batch(torch.zeros(4, 3, 4, 4), torch.tensor([0, 4, 2, 2]), torch.arange(4))
    terms = DCM()(student, None, batch)
    assert terms["dense"].item() == pytest.approx(dense_loss(every[:3], every[3:], temperature=1.0).item(), rel=1e-6)
    each = [torch.nn.functional.cross_entropy(logits, batch.target).item() for logits in every]
    assert terms["ce"].item() == pytest.approx(each[0], rel=1e-5)
    assert terms["ce_aux"].item() == pytest.approx(sum(each[1:]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype):
    first = torch.full((2, 5), -6e4, dtype=dtype)
    first[:, 1] = 6e4
    second = (-first).requires_grad_()
    first.requires_grad_()
    loss = dense_loss([first], [second], temperature=1.0)
    check_finite(loss, first, second)


@pytest.mark.parametrize("peer", ["peer", "resnet14"])
def test_both_networks_have_auxiliary_classifiers_and_train(peer):
    harness = Harness(DCM(peer=peer))
    student = harness.module.student
    assert student.specs == ("D2B2", "D3B1", f"{peer}+last2+last")
    other = student.branches[2]
    assert isinstance(other, Peer)
    assert [each.entry for each in other.branches] == [each.entry for each in student.branches[:2]] == [2, 3]
    losses = harness.train(steps=10)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"peer": "D3B1"}, "peer"), ({"classifiers": ["resnet8"]}, "resnet8"), ({"classifiers": []}, "classifiers")],
)
def test_what_does_not_fit_is_refused(arguments, named):
    with pytest.raises(ACKDError, match=named):
        DCM(**arguments)
