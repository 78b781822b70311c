"""What a Lightning project of somebody else does with a module: other orders of calls, copies, values of NumPy."""

from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from ackd_lightning import (
    CE,
    KD,
    ACKDError,
    ACKDModule,
    DataInfo,
    DistillationModule,
    Method,
    StudentConfig,
    create_model,
)
from ackd_lightning.methods import SP, Sum
from ackd_lightning.models.heads import SharedClassifiers
from training.helpers import CLASSES, DATA, SIZE, Blobs, TinyNet, build, module, trainer


class Blurred(Method):
    """KD whose loss is a function that is given."""

    def __init__(self, *, loss=F.mse_loss, weight: float = 1.0) -> None:
        super().__init__()
        self.loss, self.loss_weights = loss, {"blurred": weight}

    def forward(self, student, teacher, batch):
        return {"blurred": self.loss(student.logits, teacher.logits)}


class Headed(Method):
    """A method whose own classifier replaces the student's."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_weights = {"headed": 1.0}

    def build(self, networks):
        shape = networks.student.features[-1]
        self.head = SharedClassifiers(shape[0], [shape], CLASSES)

    def forward(self, student, teacher, batch):
        return {"headed": F.cross_entropy(self.head(student.features[-1]), batch.target)}


@pytest.mark.parametrize("before", [["validate"], ["test"], ["fit", "validate"], ["validate", "test"]], ids=str)
def test_a_fit_follows_any_evaluation(before):
    net, data = module(), Blobs()
    for each in before:
        getattr(trainer(max_epochs=1), each)(net, datamodule=data)
    run = trainer(max_epochs=1)
    run.fit(net, datamodule=data)
    assert 0 <= float(run.callback_metrics["val/learners_cka"]) <= 1


def test_a_validation_step_of_ones_own_logs_no_statistics_of_the_learners():
    class Own(ACKDModule):
        def validation_step(self, batch, batch_idx):
            self.log("mine", F.cross_entropy(self(batch[0]), batch[1]))

    run = trainer(max_epochs=1)
    run.fit(module(kind=Own), datamodule=Blobs())
    assert "mine" in run.callback_metrics
    assert not [key for key in run.callback_metrics if "learners" in key]


class Colour(nn.Module):
    """A teacher that is always right on blobs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, image):
        three = image.mean(dim=(2, 3)) * self.weight
        return torch.cat([three, 0.5 * torch.ones_like(three[:, :1])], dim=1)


def test_the_gate_reads_images_as_validation_does():
    stages = []

    class Augmented(Blobs):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            image, target = batch
            stages.append(self.trainer.training)
            return (torch.zeros_like(image) if self.trainer.training else image), target

    net = build(KD(), teacher=Colour())
    trainer(max_epochs=1).fit(net, datamodule=Augmented())
    assert float(net.teacher.metadata["measured_acc"]) == 1.0
    assert stages == [False] * 2 + [True] * 8 + [False] * 2  # the gate, an epoch, its validation


class TestCopies:
    def test_a_copy_in_another_type_leaves_its_original(self):
        net = build(KD())
        image = torch.randn(2, 3, SIZE, SIZE)
        before = net.teacher(image).logits
        twin = copy.deepcopy(net)
        assert twin.teacher.network is net.teacher.network
        twin.double()
        assert {each.dtype for each in net.teacher.parameters()} == {torch.float32}
        assert {each.dtype for each in twin.teacher.parameters()} == {torch.float64}
        assert torch.equal(net.teacher(image).logits, before)
        assert torch.allclose(twin.teacher(image.double()).logits, before, atol=1e-5)

    def test_a_copy_matches_its_classes_alone(self):
        net = build(KD())
        twin = copy.deepcopy(net)
        twin.teacher.select_classes([(3,), (2,), (1,), (0,)])
        assert net.teacher.selection is None

    def test_a_copy_can_be_trained_beside_its_original(self):
        net = build(KD())
        twin = copy.deepcopy(net).double()
        trainer(max_epochs=1, precision="64-true").fit(twin, datamodule=Blobs())
        trainer(max_epochs=1).fit(net, datamodule=Blobs())
        assert {each.dtype for each in net.teacher.parameters()} == {torch.float32}

    def test_a_module_with_defaults_is_pickled(self):
        net = DistillationModule(TinyNet(), method=CE(), data=DATA)
        again = pickle.loads(pickle.dumps(net))
        assert again.hparams["optimizer"] == net.hparams["optimizer"]


class TestCheckpoints:
    def fit_and_test(self, net, data=None):
        data = data or Blobs()
        run = trainer(max_epochs=1, enable_checkpointing=True, callbacks=[ModelCheckpoint()])
        run.fit(net, datamodule=data)
        path = run.checkpoint_callback.best_model_path
        run.test(net, datamodule=data, ckpt_path=path, verbose=False)
        return path

    @pytest.fixture(autouse=True)
    def _in_its_own_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        "options",
        [
            {"data": DataInfo(CLASSES, SIZE, mean=tuple(np.full(3, 0.5)), std=np.full(3, 0.2))},
            {"data": DataInfo(np.int64(CLASSES), np.int64(SIZE), class_names=np.array(list("abcd")))},
            {"method": KD(temperature=np.float64(3.0))},
            {"method": Sum([KD(temperature=np.float64(3.0)), SP()], weights=[np.float64(1.0), 0.5])},
        ],
        ids=["mean and std", "names", "argument", "arguments in a sum"],
    )
    def test_values_of_numpy_are_stored_as_pythons(self, options):
        net = build(**{"method": KD(), **options})
        path = self.fit_and_test(net)
        assert DistillationModule.load_from_checkpoint(path, student=TinyNet()).data == net.data

    def test_class_names_of_numpy_are_stored_as_text(self):
        data = Blobs()
        data.class_names = np.array(list("abcd"))
        path = self.fit_and_test(build(KD()), data)
        assert torch.load(path, weights_only=True)["ackd_lightning"]["class_names"] == ["a", "b", "c", "d"]

    @pytest.mark.parametrize("argument", [functools.partial(F.l1_loss), nn.MSELoss()], ids=["function", "module"])
    def test_an_argument_that_is_no_plain_data_is_asked_for(self, argument):
        path = self.fit_and_test(build(Blurred(loss=argument, weight=0.5)))
        with pytest.raises(ACKDError, match=r"does not hold 'loss' of method Blurred.*pass method=Blurred"):
            DistillationModule.load_from_checkpoint(path, student=TinyNet())
        again = DistillationModule.load_from_checkpoint(path, student=TinyNet(), method=Blurred(loss=argument))
        assert isinstance(again.method, Blurred)

    @pytest.mark.parametrize("named", [True, False], ids=["named", "network"])
    def test_a_network_with_a_function_as_option_is_ones_own(self, named, tmp_path):
        options = {"norm_layer": nn.BatchNorm2d}
        own = StudentConfig("resnet18", options=options) if named else create_model("resnet18", CLASSES, **options)
        net = build(CE(), student=own, data=DataInfo(CLASSES, 32), teacher=None)
        assert "student" not in net.hparams
        with pytest.raises(ACKDError, match="create_model does not build"):
            net.save_student(tmp_path / "student.safetensors")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((0, 1, 2), "0 among 3 names"),
        (("a", "a", "b"), "'a' among 3 names"),
        ({0: "cat", 1: "dog", 2: "emu"}, "a list of names"),
        ("abc", "a list of names"),
    ],
    ids=["numbers", "twice", "mapping", "text"],
)
def test_class_names_are_a_list_of_different_texts(names, words):
    with pytest.raises(ACKDError, match=f"class_names is.*{words}"):
        DataInfo(3, class_names=names)


def test_a_method_with_a_head_cannot_be_summed():
    with pytest.raises(ACKDError, match="Headed replaces the student's classifier"):
        build(Sum([KD(), Headed()]))


def test_a_sum_reads_a_teachers_own_classes_if_one_of_its_methods_does():
    own = SP()
    own.raw_classes = True
    assert Sum([KD(), own]).raw_classes
    assert not Sum([KD(), SP()]).raw_classes
