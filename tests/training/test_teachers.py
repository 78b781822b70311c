"""One teacher and several, by name and as networks."""

from __future__ import annotations

import copy

import pytest
import torch

from ackd_lightning import AdversarialModule, DistillationModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ATSC, KD
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model
from training.helpers import CLASSES, SIZE, TinyNet


@pytest.fixture
def files(tmp_path):
    """Weight files of two networks: ``files[name]``."""
    torch.manual_seed(0)
    found = {}
    for name in ("resnet8", "wrn_16_2"):
        path = tmp_path / f"{name}.safetensors"
        found[name] = str(save_weights(create_model(name, 10), path, {"model": name}))
    return found


def several(files, **options):
    names = list(files)
    return AdversarialModule(
        "resnet8", 10, method=ATSC(), teacher=names, teacher_weights=[files[name] for name in names], **options
    )


def test_several_teachers_are_loaded_in_their_order(files):
    net = several(files)
    assert net.teachers.frozen == ()
    assert net.teacher is None
    assert [spec.features[-1][0] for spec in net.teachers.specs] == [64, 128]
    net.load_teacher()
    assert [each.metadata["model"] for each in net.teachers.frozen] == ["resnet8", "wrn_16_2"]
    assert [len(each.metadata["sha256"]) for each in net.teachers.frozen] == [64, 64]
    first = net.teachers.frozen
    net.load_teacher()
    assert net.teachers.frozen is first  # once


def test_names_and_networks_mix(files):
    own = create_model("resnet14", 10)
    net = AdversarialModule("resnet8", 10, method=ATSC(), teacher=[own, "wrn_16_2"], teacher_weights=files["wrn_16_2"])
    net.load_teacher()
    first, second = net.teachers.frozen
    assert first.network is own
    assert second.metadata["model"] == "wrn_16_2"
    assert not any("resnet14" in str(value) for value in net.hparams.values())
    assert "teacher" not in net.hparams


def test_teachers_move_with_the_module(files):
    net = several(files).double()
    net.load_teacher()
    net.to(torch.bfloat16)
    assert {each.dtype for teacher in net.teachers.frozen for each in teacher.parameters()} == {torch.bfloat16}


def test_teachers_are_in_no_state_and_no_optimizer(files):
    net = DistillationModule(TinyNet(), CLASSES, method=KD(), teacher=TinyNet(8), input_size=SIZE)
    assert not any("teacher" in key for key in net.state_dict())
    assert not {id(each) for each in net.teacher.parameters()} & {id(each) for each in net.parameters()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"method": KD(), "teacher": ["resnet8", "resnet14"]},
            "method KD learns from one teacher and `teacher` names 2",
        ),
        ({"method": KD(), "teacher": []}, "`teacher` is empty"),
        ({"method": ATSC(), "teacher": ["resnet8", "resnet14"], "teacher_weights": "a.safetensors"}, "1 files"),
        (
            {
                "method": ATSC(),
                "teacher": ["resnet8", "resnet14"],
                "teacher_weights": ["a", "b"],
                "teacher_options": {"x": 1},
            },
            "teacher_options are for one teacher",
        ),
    ],
    ids=["kd", "none", "files", "options"],
)
def test_lists_that_do_not_fit_are_refused(arguments, words):
    kind = AdversarialModule if isinstance(arguments["method"], ATSC) else DistillationModule
    with pytest.raises(ACKDError, match=words):
        kind("resnet8", 10, **arguments)


def test_a_missing_file_is_named_before_anything_is_trained(files, tmp_path):
    net = AdversarialModule(
        "resnet8",
        10,
        method=ATSC(),
        teacher=["resnet8", "wrn_16_2"],
        teacher_weights=[files["resnet8"], str(tmp_path / "gone.safetensors")],
    )
    with pytest.raises(ACKDError, match=r"gone\.safetensors do not exist"):
        net.load_teacher()
    assert net.teachers.frozen == ()


def test_a_method_without_a_teacher_takes_none():
    net = DistillationModule("resnet8", 10, teacher="resnet14")
    net.load_teacher()
    assert net.teacher is None
    assert net.teacher_spec is None


def test_a_copy_of_the_module_shares_its_teachers():
    """An average of the student's weights needs no second teacher."""
    net = DistillationModule(TinyNet(), CLASSES, method=KD(), teacher=TinyNet(8), input_size=SIZE)
    twin = copy.deepcopy(net)
    assert twin.student is not net.student
    assert twin.teachers is net.teachers


def test_the_same_network_cannot_teach_itself():
    net = TinyNet()
    with pytest.raises(ACKDError, match="same network"):
        DistillationModule(net, CLASSES, method=KD(), teacher=[net], input_size=SIZE)


def test_a_frozen_teacher_is_taken_as_it_is():
    frozen = FrozenTeacher(TinyNet(8))
    net = DistillationModule(TinyNet(), CLASSES, method=KD(), teacher=frozen, input_size=SIZE)
    assert net.teacher is frozen
