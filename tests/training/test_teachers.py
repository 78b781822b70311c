"""One teacher and several, by name and as networks."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ackd_lightning import DataInfo, DistillationModule, TeacherConfig
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import AT, ATSC, CE, KD
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model
from training.helpers import DATA, Blobs, TinyNet, build, trainer

TEN = DataInfo(10)


@pytest.fixture
def files(tmp_path):
    """Weight files of two networks: ``files[name]``."""
    torch.manual_seed(0)
    found = {}
    for name in ("resnet8", "wrn_16_2"):
        path = tmp_path / f"{name}.safetensors"
        found[name] = str(save_weights(create_model(name, 10), path, {"model": name}))
    return found


def several(files):
    teachers = [TeacherConfig(network=name, weights=path) for name, path in files.items()]
    return DistillationModule("resnet8", method=ATSC(), teacher=teachers, data=TEN)


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


def test_a_checkpoint_of_this_package_says_as_much_as_an_exported_file(tmp_path):
    info = DataInfo(4, 8, mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, class_names=("ant", "bee", "cat", "dog"))
    module = build(CE(), student="resnet8", data=info)
    run = trainer(max_epochs=1)
    run.fit(module, datamodule=Blobs())
    run.save_checkpoint(tmp_path / "last.ckpt")
    module.save_student(tmp_path / "student.safetensors")
    found = [
        FrozenTeacher.from_name("resnet8", 4, weights=str(tmp_path / name))
        for name in ("last.ckpt", "student.safetensors")
    ]
    assert found[0].given.mean == info.mean
    assert found[0].given == dataclasses.replace(found[1].given, origin=found[0].given.origin)
    assert [(each.name, each.class_names) for each in found] == [("resnet8", info.class_names)] * 2


def test_names_and_networks_mix(files):
    own = create_model("resnet14", 10)
    named = TeacherConfig(network="wrn_16_2", weights=files["wrn_16_2"])
    net = DistillationModule("resnet8", method=ATSC(), teacher=[own, named], data=TEN)
    net.load_teacher()
    first, second = net.teachers.frozen
    assert first.network is not own
    assert torch.equal(first.network.fc.weight, own.fc.weight)
    assert second.metadata["model"] == "wrn_16_2"
    assert not any("resnet14" in str(value) for value in net.hparams.values())
    assert len(net.hparams["teacher"]["specs"]) == 2


def test_teachers_move_with_the_module(files):
    net = several(files).double()
    net.load_teacher()
    net.to(torch.bfloat16)
    assert {each.dtype for teacher in net.teachers.frozen for each in teacher.parameters()} == {torch.bfloat16}


def test_teachers_are_in_no_state_and_no_optimizer():
    net = DistillationModule(TinyNet(), method=KD(), teacher=TinyNet(8), data=DATA)
    assert not any("teacher" in key for key in net.state_dict())
    assert not {id(each) for each in net.teacher.parameters()} & {id(each) for each in net.parameters()}


@pytest.mark.parametrize(
    ("method", "teacher", "named"),
    [
        (AT(), ["resnet8", "resnet14"], "AT .* 2"),
        (KD(), [], "`teacher` is empty"),
        (KD(), None, "`teacher` is empty"),
    ],
    ids=["two", "empty", "none"],
)
def test_a_method_that_reads_features_gets_one_teacher(method, teacher, named):
    with pytest.raises(ACKDError, match=named):
        DistillationModule("resnet8", method=method, teacher=teacher, data=TEN)


def test_a_named_teacher_needs_a_file():
    net = DistillationModule("resnet8", method=KD(), teacher="resnet14", data=TEN)
    with pytest.raises(ACKDError, match=r"'resnet14'.*teacher\.weights"):
        net.load_teacher()


def test_a_missing_file_is_named_before_anything_is_trained(files, tmp_path):
    gone = TeacherConfig(network="wrn_16_2", weights=str(tmp_path / "gone.safetensors"))
    first = TeacherConfig(network="resnet8", weights=files["resnet8"])
    net = DistillationModule("resnet8", method=ATSC(), teacher=[first, gone], data=TEN)
    with pytest.raises(ACKDError, match=r"gone\.safetensors"):
        net.load_teacher()
    assert net.teachers.frozen == ()


def test_teachers_by_name_are_plain_data_in_a_checkpoint(files):
    net = several(files)
    again = DistillationModule(**net.hparams)
    again.load_teacher()
    assert [each.metadata["model"] for each in again.teachers.frozen] == list(files)
    assert isinstance(net.hparams["teacher"][0], dict)


def test_a_method_without_a_teacher_takes_none():
    net = DistillationModule("resnet8", teacher="resnet14", data=TEN)
    net.load_teacher()
    assert net.teacher is None
    assert net.teacher_spec is None


def test_a_copy_of_the_module_shares_its_teachers():
    """An average of the student's weights needs no second teacher."""
    net = DistillationModule(TinyNet(), method=KD(), teacher=TinyNet(8), data=DATA)
    twin = copy.deepcopy(net)
    assert twin.student is not net.student
    assert twin.teacher.network is net.teacher.network


def test_a_student_may_have_the_name_of_its_teacher(files):
    teacher = TeacherConfig(network="resnet8", weights=files["resnet8"])
    net = DistillationModule("resnet8", method=KD(), teacher=teacher, data=TEN)
    net.load_teacher()
    assert net.teacher.network is not net.student.plain()


def test_the_same_network_cannot_teach_itself():
    net = TinyNet()
    with pytest.raises(ACKDError, match="same network"):
        DistillationModule(net, method=KD(), teacher=[net], data=DATA)


def test_a_frozen_teacher_is_used_as_it_is():
    frozen = FrozenTeacher(TinyNet(8))
    net = DistillationModule(TinyNet(), method=KD(), teacher=frozen, data=DATA)
    assert net.teacher.network is frozen.network


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_fit_goes_on_with_the_teacher_that_it_began_with(files, tmp_path):
    def fit(place=None):
        teacher = TeacherConfig(network="resnet8", weights=files["resnet8"], gate="off")
        net = build(KD(), student="resnet8", teacher=teacher, data=DataInfo(4, 8))
        saver = ModelCheckpoint(tmp_path, filename="last")
        run = trainer(max_epochs=1 if place is None else 2, enable_checkpointing=True, callbacks=[saver])
        run.fit(net, datamodule=Blobs(), ckpt_path=place, weights_only=True)

    save_weights(create_model("resnet8", 4), files["resnet8"], {"model": "resnet8"})
    fit()
    fit(tmp_path / "last.ckpt")
    save_weights(create_model("resnet8", 4), files["resnet8"], {"model": "resnet8"})
    with pytest.raises(ACKDError, match=r"learned from a teacher resnet8 with SHA-256 .* and the file here has"):
        fit(tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_fit_goes_on_with_the_network_that_it_was_given(tmp_path, precision):
    def fit(network, place=None, **settings):
        net = build(KD(), teacher=TeacherConfig(network, gate="off", **settings), data=DataInfo(4, 8))
        saver = ModelCheckpoint(tmp_path, filename="last")
        run = trainer(
            max_epochs=1 if place is None else 2, enable_checkpointing=True, callbacks=[saver], precision=precision
        )
        run.fit(net, datamodule=Blobs(), ckpt_path=place, weights_only=True)

    network, half = TinyNet(8), {"mean": tuple(np.array([0.5] * 3)), "std": (0.5,) * 3}
    fit(network, **half)
    converted = build(KD(), teacher=TeacherConfig(network, gate="off", **half), data=DataInfo(4, 8)).double()
    facts = torch.load(tmp_path / "last.ckpt", weights_only=True)["ackd_lightning"]["teacher_facts"]
    assert [each.fingerprint() for each in converted.teachers] == [each["weights_sha256"] for each in facts]
    with pytest.raises(ACKDError, match=r"learned from a teacher TinyNet with weights_sha256 \w{12} and this run has"):
        fit(TinyNet(8), tmp_path / "last.ckpt", **half)
    with pytest.raises(ACKDError, match=r"TinyNet with std \[0.5, 0.5, 0.5\] and this run has \[0.25, 0.5, 0.5\]"):
        fit(network, tmp_path / "last.ckpt", mean=half["mean"], std=(0.25, 0.5, 0.5))
    fit(network, tmp_path / "last.ckpt", **half)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_fit_goes_on_with_the_class_map_that_it_began_with(files, tmp_path):
    def fit(order, place=None):
        (tmp_path / "map.yaml").write_text(str(order))
        teacher = TeacherConfig("resnet8", files["resnet8"], gate="off", class_map=str(tmp_path / "map.yaml"))
        net = build(KD(), student="resnet8", teacher=teacher, data=DataInfo(4, 8))
        saver = ModelCheckpoint(tmp_path, filename="last")
        run = trainer(max_epochs=1 if place is None else 2, enable_checkpointing=True, callbacks=[saver])
        run.fit(net, datamodule=Blobs(), ckpt_path=place, weights_only=True)

    save_weights(create_model("resnet8", 4), files["resnet8"], {"model": "resnet8"})
    fit([0, 1, 2, 3])
    with pytest.raises(ACKDError, match=r"from resnet8 with another class_map than \[3, 2, 1, 0\]"):
        fit([3, 2, 1, 0], tmp_path / "last.ckpt")
    fit([0, 1, 2, 3], tmp_path / "last.ckpt")


@pytest.mark.parametrize("method", [lambda: ATSC(), lambda: ATSC(adapt_teacher=False)], ids=["atsc", "simkd"])
@pytest.mark.parametrize("classes", [4, 7])
def test_a_classifier_of_other_classes_is_not_shared(method, classes):
    teacher = TeacherConfig(create_model("resnet14", classes), gate="off", class_map="features")
    net = build(method(), student="resnet8", teacher=teacher, data=DataInfo(4, 8))
    with pytest.raises(ACKDError, match=r"is features and this method uses the teacher's own classes; choose"):
        trainer(max_epochs=1).fit(net, datamodule=Blobs())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("count", [1, 3])
def test_a_fit_goes_on_with_as_many_teachers_and_their_weights_as_it_began_with(count, tmp_path):
    networks = [TinyNet(8) for _ in range(3)]

    def fit(count, place=None, weight=1.0):
        teachers = [
            TeacherConfig(network, gate="off", ensemble_weight=weight + number)
            for number, network in enumerate(networks[:count])
        ]
        net = build(KD(), student=TinyNet(), teacher=teachers, data=DATA)
        saver = ModelCheckpoint(tmp_path, filename="last")
        run = trainer(max_epochs=1 if place is None else 2, enable_checkpointing=True, callbacks=[saver])
        run.fit(net, datamodule=Blobs(), ckpt_path=place, weights_only=True)

    fit(2)
    with pytest.raises(ACKDError, match=rf"learned from 2 teachers and this run has {count}; give those"):
        fit(count, tmp_path / "last.ckpt")
    with pytest.raises(ACKDError, match=r"with ensemble_weight \[1\.0, 2\.0\] and this run has \[0\.5, 1\.5\]; give"):
        fit(2, tmp_path / "last.ckpt", weight=0.5)
    fit(2, tmp_path / "last.ckpt")


def test_a_teacher_of_two_modules_is_not_rounded_by_the_fit_of_one():
    given = FrozenTeacher(TinyNet(8))
    first, second = (build(KD(), teacher=TeacherConfig(network=given, gate="off")) for _ in range(2))
    first.to(torch.bfloat16)
    assert {each.dtype for each in first.teachers.frozen[0].parameters()} == {torch.bfloat16}
    for each in (given, second.teachers.frozen[0]):
        assert {tensor.dtype for tensor in each.parameters()} == {torch.float32}
    assert all(
        torch.equal(*pair) for pair in zip(given.parameters(), second.teachers.frozen[0].parameters(), strict=True)
    )
