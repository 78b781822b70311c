"""Stages that a configuration names, for student and teacher."""

from __future__ import annotations

import pytest
import torch

from ackd_lightning import DataInfo, DistillationModule, StudentConfig, TeacherConfig
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACKD, AT
from ackd_lightning.models.zoo import create_model

DATA = DataInfo(4, 32)


def build(method, *, student=("layer2", "layer4"), teacher=("layer1", "layer2", "layer3")) -> DistillationModule:
    torch.manual_seed(0)
    return DistillationModule(
        StudentConfig("resnet18", taps=student),
        method=method,
        teacher=TeacherConfig(create_model("resnet14", 4), taps=teacher, gate="off"),
        data=DATA,
    )


def test_features_are_read_where_the_configuration_says():
    module = build(AT())
    assert [shape[0] for shape in module.spec.features] == [64, 128, 512]  # what is before layer2, layer2, layer4
    assert module.student.specs == ()
    assert [shape[0] for shape in module.teacher_spec.features] == [16, 16, 32, 64]


def test_branches_are_counted_by_the_named_stages():
    module = build(ACKD())
    assert module.student.specs == ("D2B1", "D1B2")
    owned = sum(
        each.numel()
        for name in ("layer3", "layer4")
        for each in module.student.backbone.get_submodule(name).parameters()
    )
    found = sum(each.numel() for each in module.student.branches[0].parameters())
    assert found == owned + sum(each.numel() for each in module.student.backbone.fc.parameters())


def test_a_checkpoint_keeps_the_named_stages(tmp_path):
    module = build(ACKD())
    again = DistillationModule(**{**module.hparams, "teacher": create_model("resnet14", 4)})
    assert again.student.plan == module.student.plan


def test_a_named_teacher_has_them_before_and_after_its_weights_are_read(tmp_path):
    torch.save(create_model("resnet14", 4).state_dict(), tmp_path / "teacher.pt")
    config = TeacherConfig("resnet14", weights=str(tmp_path / "teacher.pt"), taps=("layer1", "layer3"), gate="off")
    module = DistillationModule("resnet8", method=AT(), teacher=config, data=DATA)
    assert [shape[0] for shape in module.teacher_spec.features] == [16, 16, 64]
    module.load_teacher()
    output = module.teacher(torch.zeros(1, 3, 32, 32))
    assert [each.shape[1] for each in output.features] == [16, 16, 64]


@pytest.mark.parametrize(
    ("taps", "named"),
    [(("layer9",), "layer9"), (("layer4", "layer2"), "order"), (("fc",), "'fc'"), (("layer1.0.relu",), "once")],
)
def test_wrong_names_are_refused_for_student_and_teacher(taps, named):
    with pytest.raises(ACKDError, match=named):
        build(AT(), student=taps)
    teacher = tuple({"layer4": "layer3"}.get(each, each) for each in taps)
    if "relu" not in taps[0]:
        with pytest.raises(ACKDError, match=named):
            build(AT(), teacher=teacher)
