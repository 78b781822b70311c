"""``load_from_checkpoint``: sub-classes with constructors of their own, and inference without the teacher."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ackd_lightning import ACKD, CE, KD, ACKDError, ACKDModule, DistillationModule, Recipe, StudentConfig, create_model
from ackd_lightning.methods import AT, ATSC, FitNet, ReviewKD
from training.helpers import DATA, SIZE, Blobs, TinyNet, build, milestones, sgd, state, teaching, trainer


class Fixed(DistillationModule):
    """Fixes the student and passes everything else on."""

    def __init__(self, **kwargs):
        super().__init__("resnet8", **kwargs)


class FixedMethod(DistillationModule):
    """Fixes the method and the data."""

    def __init__(self, student="resnet8", **kwargs):
        super().__init__(student, method=CE(), data=DATA, **kwargs)


class Everything(ACKDModule):
    """Takes nothing."""

    def __init__(self):
        super().__init__(StudentConfig("resnet8", freeze=("conv1",)), method=CE(), data=DATA)


class Passed(DistillationModule):
    """Passes positions on."""

    def __init__(self, *args, extra=0, **kwargs):
        super().__init__(*args, **kwargs)


CASES = [
    (Fixed, (), {"data": DATA, "method": CE(), "optimizer": sgd()}),
    (FixedMethod, (), {"lr_scheduler": milestones(3)}),
    (FixedMethod, ("resnet14",), {}),
    (Everything, (), {}),
    (Passed, ("resnet8",), {"data": DATA}),
    (Passed, (), {"student": "resnet8", "data": DATA}),
    (DistillationModule, ("resnet8",), {"data": DATA}),
]


@pytest.mark.parametrize(("kind", "args", "kwargs"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_module_with_its_own_constructor_is_loaded(tmp_path, kind, args, kwargs):
    module = kind(*args, **kwargs)
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(module, datamodule=Blobs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(each, state(again)[key]) for key, each in state(module).items())
    assert again.student_config.freeze == module.student_config.freeze
    assert again.model_name == module.model_name


@pytest.mark.filterwarnings("ignore:the validation loss")
@pytest.mark.parametrize("method", [KD, ACKD, AT, FitNet, ReviewKD])
@pytest.mark.parametrize("student", [TinyNet, lambda: create_model("resnet8", 4)], ids=["own", "named"])
def test_inference_needs_no_teacher(tmp_path, method, student):
    module = build(method(), student=student(), teacher=teaching(TinyNet(8)))
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(module, datamodule=Blobs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    given = {} if module.model_name else {"student": student()}
    again = DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, **given).eval()
    image = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(again(image), module.eval()(image))
    trainer().test(again, datamodule=Blobs(), verbose=False)
    with pytest.raises(ACKDError, match="teacher"):
        trainer().fit(again, datamodule=Blobs())
    taught = DistillationModule.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, teacher=teaching(TinyNet(8)), **given
    )
    trainer(max_epochs=1, limit_train_batches=1).fit(taught, datamodule=Blobs())


class ReadsTeacher(CE):
    teacher = "logits"

    def build(self, networks):
        self.width = sum(each.numel() for each in networks.teacher_networks[0].parameters())


def test_a_method_that_reads_a_teachers_network_says_so(tmp_path):
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(build(ReadsTeacher(), teacher=teaching(TinyNet(8))), datamodule=Blobs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ACKDError, match="ReadsTeacher reads its teachers' networks in `build`; pass it"):
        DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", student=TinyNet(), method=ReadsTeacher())


class Study(DistillationModule):
    def __init__(self, student, data, note="x", recipe=None):
        self.classes = data.num_classes
        super().__init__(student, data=data, recipe=recipe)
        self.save_hyperparameters(ignore=["student"])


def test_settings_that_a_sub_class_saves_itself_can_be_read(tmp_path):
    study = Study("resnet8", DATA, note="y", recipe=Recipe(label_smoothing=0.1))
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(study, datamodule=Blobs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Study.load_from_checkpoint(tmp_path / "a.ckpt", student="resnet8", weights_only=True)
    assert (again.hparams["note"], again.recipe, again.data) == ("y", study.recipe, study.data)
    command = [
        sys.executable,
        "-m",
        "ackd_lightning",
        "export",
        "a.ckpt",
        "--out",
        "a.safetensors",
        "--check",
        "random",
    ]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


def test_a_method_that_is_built_from_its_teachers_says_so(tmp_path):
    module = build(ATSC(), student=create_model("resnet8", 4), teacher=teaching(TinyNet(8)))
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(module, datamodule=Blobs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ACKDError, match="ATSC"):
        DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
