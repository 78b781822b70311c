from __future__ import annotations

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACKD, ACN, ATSC, CE, CRD, KD, ONE, SP, FitInfo, Networks, Sum
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.testing import Harness


def test_terms_keep_their_names_and_a_taken_one_gets_the_number_of_its_method(scene):
    method = Sum([KD(temperature=2.0), CE(weight_ce=3.0), KD()], weights=[1.0, 0.5, 2.0])
    assert method.loss_weights == {"ce": 0.1, "kd": 0.9, "ce_2": 1.5, "ce_3": 0.2, "kd_3": 1.8}
    here = scene(0)
    terms = method(here.student, here.teacher, here.batch)
    assert set(terms) == set(method.loss_weights)
    assert torch.equal(terms["kd"], KD(temperature=2.0)(here.student, here.teacher, here.batch)["kd"])
    assert torch.equal(terms["kd_3"], KD()(here.student, here.teacher, here.batch)["kd"])


class Logging(CE):
    """Cross-entropy with an optimizer and logged values of its own."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.net = value, torch.nn.Linear(1, 1)

    def auxiliary_optimizers(self):
        return {"disc": torch.optim.SGD(self.net.parameters(), 0.1)}

    def auxiliary_loss(self, name, student, teacher, batch):
        return self.net.weight.sum(), {"disc_loss": torch.tensor(self.value)}

    def statistics(self, student):
        return {"stat": self.value}

    def examples(self, batch):
        return self.value


def test_logged_values_of_the_same_name_are_kept_apart(scene):
    here = scene(0)
    method = Sum([KD(), Logging(1.0), Logging(3.0)])
    logged = {}
    for name in method.auxiliary_optimizers():
        logged |= method.auxiliary_loss(name, here.student, here.teacher, here.batch)[1]
    assert logged == {"disc_loss": 1.0, "disc_loss_3": 3.0}
    assert method.statistics(here.student) == {"stat": 1.0, "stat_3": 3.0}


def test_pictures_of_a_method_are_those_of_its_sum():
    assert Sum([KD(), Logging(2.0)]).examples(None) == 2.0
    assert not hasattr(Sum([KD(), CE()]), "examples")


def test_the_loss_is_the_weighted_sum_of_the_losses(scene):
    here = scene(0)
    scenes = here.student, here.teacher, here.batch
    first, second = KD(), CE()
    parts = [weighted_loss(each, each(*scenes)).item() for each in (first, second)]
    both = Sum([first, second], weights=[0.5, 3.0])
    assert weighted_loss(both, both(*scenes)).item() == pytest.approx(0.5 * parts[0] + 3 * parts[1], rel=1e-6)


@pytest.mark.parametrize(
    ("methods", "access"),
    [
        ([CE(), CE()], "none"),
        ([CE(), KD()], "logits"),
        ([SP(), KD()], "output"),
        ([ONE(), CE()], "none"),
    ],
    ids=["none", "logits", "output", "no teacher with learners"],
)
def test_it_reads_as_much_of_the_teacher_as_the_most_curious_method(methods, access):
    assert Sum(methods).teacher == access


def test_learners_optimizers_and_weights_of_an_epoch_are_those_of_its_methods(scene):
    here = scene(2)
    method = Sum([CE(), ACKD(adversarial_warmup_epochs=4, lambda_adv=2.0)], weights=[1.0, 0.5])
    assert method.branches is None
    method.build(Networks(student=here.spec))
    method.begin_fit(FitInfo(epochs=8))
    method.set_epoch(1)
    assert method.loss_weights["adv"] == 0.25
    assert list(method.auxiliary_optimizers()) == ["discriminators"]
    assert method.lr_scales == {"methods.1.attention": 0.1}
    assert method.compile_modules == ("methods.1.discriminators",)
    assert {group["name"]: group["lr_scale"] for group in method.parameter_groups()} == {"methods.1.attention": 0.1}
    assert torch.equal(method.ensemble(here.student), method.methods[1].ensemble(here.student))
    assert set(method.statistics(here.student)) == set(method.methods[1].statistics(here.student))
    for name in method.compile_modules:
        method.get_submodule(name)


def test_buffers_that_are_replicated_keep_their_place():
    method = Sum([CE(), CRD(negatives=4)])
    names = {name for name, _ in method.named_buffers()}
    assert method.replicated_buffers
    assert set(method.replicated_buffers) <= names


@pytest.mark.parametrize(
    ("methods", "weights", "named"),
    [
        ([], None, "methods"),
        ([CE(), KD()], [1.0], "1 weights"),
        ([CE()] * 2, None, "twice"),
        ([KD(), ATSC()], None, "ATSC"),
        ([ONE(), ACN()], None, "ONE and ACN"),
        ([CE(), KD()], [1.0, -1.0], "weights"),
    ],
    ids=["none", "weights", "twice", "own teachers", "learners", "negative"],
)
def test_what_cannot_be_summed_is_refused(methods, weights, named):
    with pytest.raises(ACKDError, match=named):
        Sum(methods, weights=weights)


def test_terms_of_nested_sums_all_count():
    single = [KD(temperature=2.0), KD(), KD(temperature=8.0)]
    nested = Sum([Sum([KD(temperature=2.0), KD()]), KD(temperature=8.0)])
    total = sum(float(Harness(each).loss().detach()) for each in single)
    assert float(Harness(nested).loss().detach()) == pytest.approx(total)
    assert len(nested.loss_weights) == 6
