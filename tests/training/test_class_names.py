"""Classes in another order are matched, other classes are refused, and nothing happens in silence."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ackd_lightning import (
    CE,
    KD,
    DataInfo,
    DistillationModule,
    Recipe,
    TeacherConfig,
    create_model,
    load_student,
    save_weights,
)
from ackd_lightning.errors import ACKDError
from training.helpers import CLASSES, SIZE, Blobs, TinyNet, trainer

NAMES = ("ant", "bee", "cat", "dog")
OTHER = ("dog", "cat", "bee", "ant")


class NamedBlobs(Blobs):
    """Images whose classes have names, given in any order."""

    def __init__(self, names: tuple[str, ...] = NAMES) -> None:
        super().__init__()
        self.class_names = names
        self.place = torch.tensor([NAMES.index(name) if name in NAMES else k for k, name in enumerate(names)])

    def use_class_order(self, names) -> bool:
        self.class_names = tuple(names)
        self.place = torch.tensor([NAMES.index(name) for name in names])
        return True

    def _data(self, seed: int, count: int):
        data = super()._data(seed, count)
        number = torch.empty(CLASSES, dtype=torch.int64)
        number[self.place] = torch.arange(CLASSES)  # the k-th class of NAMES has this number here
        data.tensors = (data.tensors[0], number[data.tensors[1]])
        return data


def module(**arguments) -> DistillationModule:
    torch.manual_seed(0)
    return DistillationModule(TinyNet(), data=DataInfo(CLASSES, SIZE), method=CE(), **arguments)


@pytest.fixture
def checkpoint(tmp_path):
    net, run = module(), trainer(max_epochs=8)
    run.fit(net, datamodule=NamedBlobs())
    run.save_checkpoint(tmp_path / "last.ckpt")
    (result,) = trainer().test(net, datamodule=NamedBlobs(), verbose=False)
    return tmp_path / "last.ckpt", result["test/acc"]


def test_another_order_of_the_same_names_gives_the_same_accuracy_and_is_said(checkpoint, capsys):
    path, accuracy = checkpoint
    assert accuracy > 0.5
    assert torch.load(path, weights_only=True)["ackd_lightning"]["class_names"] == list(NAMES)
    (result,) = trainer().test(module(), datamodule=NamedBlobs(OTHER), ckpt_path=path, verbose=False)
    assert result["test/acc"] == accuracy
    assert "reordered" in capsys.readouterr().out


def test_other_names_are_refused_unless_told_otherwise(checkpoint):
    path, accuracy = checkpoint
    renamed = ("ant", "bee", "cat", "eel")
    with pytest.raises(ACKDError, match=r"'dog'.*'eel'"):
        trainer().test(module(), datamodule=NamedBlobs(renamed), ckpt_path=path, verbose=False)
    net = module(on_class_mismatch="ignore")
    (result,) = trainer().test(net, datamodule=NamedBlobs(renamed), ckpt_path=path, verbose=False)
    assert result["test/acc"] == accuracy


@pytest.mark.parametrize("reaction", ["stop", "ignore"])
def test_a_class_map_may_have_the_names_of_the_data(reaction):
    given = {"ant": 0, "bee": [1, 2], "cat": 3, "dog": [4, 5]}
    teacher = TeacherConfig(network=create_model("resnet8", 6), class_map=given, gate="off")
    data = DataInfo(CLASSES, SIZE, class_names=NAMES)
    net = DistillationModule("resnet8", data=data, method=KD(), teacher=teacher, on_class_mismatch=reaction)
    net.match_classes(NamedBlobs())
    assert net.teacher.selection.groups == ((0,), (1, 2), (3,), (4, 5))


def test_a_run_goes_on_with_the_order_that_it_began_with(checkpoint):
    path, _ = checkpoint
    states = []
    for names in (NAMES, OTHER):
        net = module()
        trainer(max_epochs=9).fit(net, datamodule=NamedBlobs(names), ckpt_path=path)
        states.append(net.student.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_module_keeps_the_order_and_the_names_that_it_was_trained_with(checkpoint, tmp_path, capsys):
    path, accuracy = checkpoint
    net = DistillationModule.load_from_checkpoint(path, student=TinyNet(), method=CE(), data=DataInfo(CLASSES, SIZE))
    assert net.data.class_names == NAMES
    for twice in range(2):
        (result,) = trainer().test(net, datamodule=NamedBlobs(OTHER), verbose=False)
        assert (result["test/acc"], net.data.class_names) == (accuracy, NAMES), twice
    assert "reordered to those of the module" in capsys.readouterr().out
    trainer(max_epochs=1).fit(net, datamodule=NamedBlobs(OTHER))
    assert net.data.class_names == NAMES
    renamed = NamedBlobs(("ant", "bee", "cat", "eel"))
    for run in (trainer().test, trainer(max_epochs=1).fit):
        with pytest.raises(ACKDError, match=r"^the module and the data .*'dog'.*'eel'"):
            run(net, datamodule=renamed)
    other = module(on_class_mismatch="ignore")
    trainer(max_epochs=1).fit(other, datamodule=NamedBlobs())
    trainer().test(other, datamodule=renamed, verbose=False)
    assert other.data.class_names == renamed.class_names


@pytest.mark.parametrize(("limits", "said"), [({"max_epochs": 2}, "2"), ({"max_steps": 5}, "1.25")])
def test_files_state_the_epochs_that_the_weights_were_trained_for(limits, said, tmp_path):
    teacher = TeacherConfig(network=create_model("resnet8", CLASSES), gate="off")
    net = DistillationModule("resnet8", data=DataInfo(CLASSES, SIZE), method=KD(), teacher=teacher)
    run = trainer(limit_train_batches=4, **limits)
    run.fit(net, datamodule=NamedBlobs())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", teacher=teacher)
    alone = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt")
    for number, each in enumerate((net, again, alone)):
        each.save_student(tmp_path / f"{number}.safetensors")
        origin = load_student(tmp_path / f"{number}.safetensors").description.origin
        assert (origin["epochs"], origin["teacher"]) == (said, "resnet8"), number
    trainer(max_epochs=1).fit(again, datamodule=NamedBlobs())
    assert again.metadata()["epoch"] == 1


def teacher_file(path, names):
    network = create_model("resnet8", CLASSES)
    save_weights(network, path, {"class_names": json.dumps(names), "model": "resnet8"})
    return network


def test_a_teacher_answers_in_the_order_of_the_data(tmp_path, capsys):
    network = teacher_file(tmp_path / "t.safetensors", OTHER).eval()
    config = TeacherConfig(network="resnet8", weights=str(tmp_path / "t.safetensors"), gate="off")
    net = DistillationModule(TinyNet(), data=DataInfo(CLASSES, SIZE), method=KD(), teacher=config)
    trainer(max_epochs=1).fit(net, datamodule=NamedBlobs())
    image = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = network(image)[:, [OTHER.index(name) for name in NAMES]]
    assert torch.equal(net.teacher(image).logits, expected)
    assert "reordered" in capsys.readouterr().out


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    teacher_file(tmp_path / "t.safetensors", ("ant", "bee", "cat", "eel"))
    config = TeacherConfig(network="resnet8", weights=str(tmp_path / "t.safetensors"), gate="off")
    for action in ("stop", "ignore"):
        net = DistillationModule(
            TinyNet(), data=DataInfo(CLASSES, SIZE), method=KD(), teacher=config, on_class_mismatch=action
        )
        if action == "ignore":
            trainer(max_epochs=1).fit(net, datamodule=NamedBlobs())
        else:
            with pytest.raises(ACKDError, match=r"teacher resnet8.*'eel'"):
                trainer(max_epochs=1).fit(net, datamodule=NamedBlobs())


def test_names_are_in_the_exported_file(tmp_path):
    net = DistillationModule("resnet8", data=DataInfo(CLASSES, SIZE), method=CE())
    trainer(max_epochs=1).fit(net, datamodule=NamedBlobs())
    net.save_student(tmp_path / "s.safetensors")
    network: nn.Module = load_student(tmp_path / "s.safetensors")
    assert network.class_names == NAMES


def test_listed_class_weights_follow_their_classes(checkpoint):
    path, _ = checkpoint
    net, run = module(recipe=Recipe(class_weights=[4.0, 1.0, 2.0, 3.0])), trainer(max_epochs=9)
    run.fit(net, datamodule=NamedBlobs(("dog", "ant", "bee", "cat")), ckpt_path=path)
    assert net.data.class_names == NAMES
    assert net.labelling.weights.tolist() == [1.0, 2.0, 3.0, 4.0]
    run.save_checkpoint(path)
    again = DistillationModule.load_from_checkpoint(path, student=TinyNet())
    assert again.labelling.weights.tolist() == [1.0, 2.0, 3.0, 4.0]
