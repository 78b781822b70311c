from __future__ import annotations

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import P2P
from ackd_lightning.testing import Harness
from methods.helpers import extreme, slow_divergence


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("others", [1, 2])
def test_the_terms_equal_a_slow_reference_and_reach_those_who_learn(scene, others, online):
    here = scene(others + online)
    method = P2P(students=["peer"] * others, online_teacher="resnet14" if online else None, temperature=2.0)
    assert method.teacher == ("none" if online else "logits")
    terms = method(here.student, here.teacher, here.batch)  # beside an online teacher for the other part of a sum
    students = [each.detach() for each in (here.z_s, *here.z[:others])]
    teacher = (here.z[-1] if online else here.z_t).detach()
    assert terms["kd"].item() == pytest.approx(sum(slow_divergence(teacher, each, 2.0) for each in students), rel=1e-4)
    mutual = sum(
        slow_divergence(other, own, 2.0) / others
        for i, own in enumerate(students)
        for j, other in enumerate(students)
        if i != j
    )
    assert terms["mutual"].item() == pytest.approx(mutual, rel=1e-4)
    learners = {"z_s", *(f"z_{number}" for number in range(others))}
    reached = {
        term: {name for name, gradient in here.gradients(value).items() if gradient is not None}
        for term, value in terms.items()
    }
    labelled = {f"z_{number}" for number in range(others + online)}
    assert reached == {"ce": {"z_s"}, "ce_aux": labelled, "kd": learners, "mutual": learners}
    torch.testing.assert_close(method.ensemble(here.student), sum(students) / len(students))


def test_it_is_zero_for_students_that_equal_their_teacher(scene):
    here = scene(1)
    here.z_s.data.copy_(here.z_t)
    here.z[0].data.copy_(here.z_t + 2.0)
    terms = P2P()(here.student, here.teacher, here.batch)
    assert terms["kd"].item() == pytest.approx(0.0, abs=1e-5)
    assert terms["mutual"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients_are_finite_at_the_largest_logits(scene, dtype):
    here = scene(1)
    for leaf, sign in ((here.z_s, 1), (here.z_t, -1), (here.z[0], -1)):
        leaf.data = extreme(dtype, sign=sign, images=4).data
    terms = P2P()(here.student, here.teacher, here.batch)
    for name, term in terms.items():
        assert term.dtype is torch.float32, name
        assert term.isfinite(), name
        gradients = [each for each in here.gradients(term).values() if each is not None]
        assert gradients, name
        assert all(each.isfinite().all() for each in gradients), name


def test_both_kinds_of_teacher_train():
    for method in (P2P(), P2P(online_teacher="resnet14")):
        harness = Harness(method)
        losses = harness.train(steps=10)
        assert losses[-1] < losses[0]
        assert (harness.module.teacher is None) is (method.teacher == "none")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"students": []}, "students"), ({"students": ["D3B1"]}, "D3B1"), ({"online_teacher": "last"}, "online_teacher")],
)
def test_what_is_no_network_is_refused(arguments, named):
    with pytest.raises(ACKDError, match=named):
        P2P(**arguments)
