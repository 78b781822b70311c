from __future__ import annotations

import math

import pytest

from ackd_lightning.methods import CE


def test_the_only_term_is_the_cross_entropy_of_the_target_learner(scene):
    here = scene(2)
    terms = CE()(here.student, None, here.batch)
    expected = 0.0
    for row, label in zip(here.z_s.tolist(), here.batch.target.tolist(), strict=True):
        expected += math.log(sum(math.exp(each) for each in row)) - row[label]
    assert set(terms) == {"ce"}
    assert terms["ce"].item() == pytest.approx(expected / 4, rel=1e-5)
    reached = {name for name, gradient in here.gradients(terms["ce"]).items() if gradient is not None}
    assert reached == {"z_s"}


def test_it_needs_no_teacher_and_its_weight_is_an_argument():
    assert CE.teacher == "none"
    assert CE().loss_weights == {"ce": 1.0}
    assert CE(weight_ce=0.5).loss_weights == {"ce": 0.5}
