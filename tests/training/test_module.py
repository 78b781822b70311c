from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from ackd_lightning import ACKD, CE, KD, ACKDError, ACKDModule, DistillationModule, FrozenTeacher, create_model
from ackd_lightning.callbacks.health import HealthMonitor, TeacherGate
from ackd_lightning.models.weights import save_weights
from training.helpers import CLASSES, SIZE, Blobs, TinyNet, largest_difference, module, state, trainer


def test_teacher_is_outside_and_unchanged():
    net = module()
    teacher = net.teacher
    before = state(teacher)
    net.train()
    trainer().fit(net, datamodule=Blobs())
    assert largest_difference(before, state(teacher)) == 0.0
    assert not any(each.training for each in teacher.modules())
    assert not any("teacher" in key for key in net.state_dict())
    known = {id(parameter) for parameter in net.parameters()}
    assert not any(id(parameter) in known for parameter in teacher.parameters())
    assert net.double().teacher.network.fc.weight.dtype == torch.float64


def test_checkpoint_loads_safely_and_gives_equal_logits(tmp_path):
    net = module(ACKD(branches=("D3B1", "D3B1"), temperature=2.0))
    saver = ModelCheckpoint(tmp_path, filename="last")
    trainer(enable_checkpointing=True, callbacks=[saver]).fit(net, datamodule=Blobs())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("teacher" in key for key in checkpoint["state_dict"])
    loaded = ACKDModule.load_from_checkpoint(tmp_path / "last.ckpt", student=TinyNet(), teacher=TinyNet(8))
    assert loaded.method.temperature == 2.0
    assert loaded.student.specs == ("D3B1", "D3B1")
    image = torch.randn(4, 3, SIZE, SIZE)
    assert torch.equal(net.eval()(image), loaded.eval()(image))


def test_named_networks_come_back_from_the_checkpoint_alone(tmp_path):
    net = DistillationModule("resnet8", CLASSES, input_size=SIZE, milestones=[1])
    saver = ModelCheckpoint(tmp_path, filename="last")
    trainer(enable_checkpointing=True, callbacks=[saver], max_epochs=1).fit(net, datamodule=Blobs())
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt")
    image = torch.randn(4, 3, SIZE, SIZE)
    assert torch.equal(net.eval()(image), loaded.eval()(image))


def test_weights_zero_but_ce_is_plain_training_bit_for_bit():
    plain_student, taught_student = TinyNet(), TinyNet()
    taught_student.load_state_dict(plain_student.state_dict())
    off = {"lambda_kd_aux": 0.0, "lambda_kd_target": 0.0, "lambda_adv": 0.0, "lambda_ce_aux": 0.0}
    options = {"lr": 0.05, "milestones": [2], "input_size": SIZE, "teacher_gate": "off"}
    plain = DistillationModule(plain_student, CLASSES, method=CE(), **options)
    taught = ACKDModule(taught_student, CLASSES, teacher=TinyNet(8), method=ACKD(**off), **options)
    for net in (plain, taught):
        trainer(max_epochs=3).fit(net, datamodule=Blobs())
    assert largest_difference(state(plain_student), state(taught_student)) == 0.0


def test_training_lowers_the_loss_and_beats_chance():
    net = module(lr=0.05, milestones=[20])
    run = trainer(max_epochs=12)
    run.fit(net, datamodule=Blobs())
    assert float(run.callback_metrics["val/acc"]) > 0.5


def test_noise_is_keyed_by_step_and_not_by_history():
    """A run that is interrupted after an epoch and goes on draws the same dropout masks."""
    whole = module(dropout=0.5)
    trainer(max_epochs=3).fit(whole, datamodule=Blobs())
    other = module(dropout=0.5)

    class Disturb(L.Callback):
        def on_train_batch_start(self, *_):
            torch.rand(7)

        def on_train_epoch_end(self, *_):
            torch.rand(1000)

    trainer(max_epochs=3, callbacks=[Disturb()]).fit(other, datamodule=Blobs())
    # the callback draws before the module seeds, so the masks are the same
    assert largest_difference(state(whole), state(other)) == 0.0


def test_everything_is_logged():
    run = trainer(max_epochs=1)
    run.fit(module(), datamodule=Blobs())
    expected = {
        "train/loss",
        "train/ce",
        "train/ce_aux",
        "train/kd_aux",
        "train/kd_target",
        "train/kd_direct",
        "train/adv",
    }
    expected |= {f"val/{learner}acc{top}" for learner in ("", "aux0_", "aux1_", "ensemble_") for top in ("", "_top5")}
    expected |= {"attention/weight_aux0", "attention/weight_aux1", "attention/entropy", "disc/acc", "disc/loss"}
    expected |= {"learners/cka", "learners/disagreement", "learners/spread"}
    assert expected <= set(run.callback_metrics)
    assert all(math.isfinite(float(value)) for value in run.callback_metrics.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("method", [CE(), KD()], ids=["ce", "kd"])
def test_automatic_methods_in_both_precisions(method, precision):
    net = DistillationModule(
        TinyNet(),
        CLASSES,
        method=method,
        teacher=TinyNet(8),
        input_size=SIZE,
        lr=0.05,
        milestones=[5],
        teacher_gate="off",
    )
    run = trainer(max_epochs=2, precision=precision)
    run.fit(net, datamodule=Blobs())
    assert math.isfinite(float(run.callback_metrics["train/loss"]))


class TestTeacherGate:
    def test_untrained_teacher_stops_the_run(self):
        with pytest.raises(ACKDError, match="near chance"):
            trainer().fit(module(teacher_gate="stop"), datamodule=Blobs())

    def test_warn_goes_on(self):
        run = trainer(max_epochs=1)
        with pytest.warns(UserWarning, match="near chance"):
            run.fit(module(teacher_gate="warn"), datamodule=Blobs())
        assert run.global_step == 8

    def test_good_teacher_is_let_through_and_logged(self, capsys, tmp_path):
        plain = DistillationModule(TinyNet(8), CLASSES, input_size=SIZE, lr=0.05, milestones=[20])
        trainer(max_epochs=12).fit(plain, datamodule=Blobs())
        net = ACKDModule(TinyNet(), CLASSES, teacher=plain.student.plain(), input_size=SIZE)
        logger = CSVLogger(tmp_path, name="", version="")
        trainer(max_epochs=1, logger=logger).fit(net, datamodule=Blobs())
        assert "accuracy" in capsys.readouterr().out
        assert "teacher/val_acc" in (tmp_path / "metrics.csv").read_text()
        assert float(net.teacher.metadata["measured_acc"]) > 0.5

    @pytest.mark.parametrize(
        ("measured", "classes", "stated", "words"),
        [
            (0.012, 100, None, "near chance"),
            (0.55, 100, "0.74", "far below"),
            (0.72, 100, "0.74", None),
            (0.51, 2, None, "near chance"),
            (0.60, 100, None, None),
        ],
    )
    def test_judgement(self, measured, classes, stated, words):
        verdict = TeacherGate.judge(measured, classes, {"val_acc": stated} if stated else {}, 10_000)
        assert (verdict is None) == (words is None)
        assert words is None or words in verdict

    def test_few_images_widen_the_tolerance(self):
        assert TeacherGate.judge(0.65, 100, {"val_acc": "0.74"}, 50) is None


class TestTeacherFile:
    def test_missing_weights_name_the_command(self, tmp_path):
        net = ACKDModule(
            "resnet20", 100, teacher="resnet110", teacher_weights=f"{tmp_path}/cifar100_resnet110.safetensors"
        )
        with pytest.raises(ACKDError, match=r"ackd fit --config cifar100_resnet110\.yaml"):
            net.load_teacher()

    def test_metadata_sets_normalisation_and_size(self, tmp_path):
        metadata = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]", "input_size": "16", "val_acc": "0.9"}
        save_weights(create_model("resnet8", CLASSES), tmp_path / "t.safetensors", metadata)
        net = ACKDModule(
            "resnet8",
            CLASSES,
            teacher="resnet8",
            teacher_weights=str(tmp_path / "t.safetensors"),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
        net.load_teacher()
        raw = torch.rand(2, 3, 32, 32)
        by_hand = nn.functional.interpolate((raw - 0.5) / 0.2, size=(16, 16), mode="bilinear", antialias=True)
        expected = net.teacher.network(by_hand)
        assert torch.allclose(net.teacher(raw).logits, expected, atol=1e-4)


def test_health_monitor_comes_with_the_module_and_yields_to_ones_own():
    run = trainer(max_epochs=1)
    run.fit(module(), datamodule=Blobs())
    assert sum(isinstance(each, HealthMonitor) for each in run.callbacks) == 1
    own = HealthMonitor(least_entropy=0.0)
    run = trainer(max_epochs=1, callbacks=[own])
    run.fit(module(), datamodule=Blobs())
    assert [each for each in run.callbacks if isinstance(each, HealthMonitor)] == [own]


def test_lambda_warm_up_reaches_the_loss():
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.method.weights()["adv"])

    net = module(ACKD(adversarial_warmup_epochs=2, lambda_adv=3.0))
    trainer(max_epochs=3, callbacks=[Watch()], limit_train_batches=1).fit(net, datamodule=Blobs())
    assert seen == [0.0, 1.5, 3.0]


def test_noise_follows_the_users_own_seed():
    assert [module(seed=seed).seed for seed in (1, 2)] == [1, 2]


def test_teacher_and_student_are_two_networks():
    net = TinyNet()
    with pytest.raises(ACKDError, match="same network"):
        ACKDModule(net, CLASSES, teacher=net, input_size=SIZE)


def test_unknown_normalisation_of_the_data_is_said():
    teacher = FrozenTeacher(TinyNet(8), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    with pytest.warns(UserWarning, match="normalisation"):
        ACKDModule(TinyNet(), CLASSES, teacher=teacher, input_size=SIZE)


def test_collapse_is_reported_once():
    monitor = HealthMonitor()
    net = module()

    class Fake:
        sanity_checking = False
        current_epoch = 3
        callback_metrics: ClassVar = {"attention/entropy": torch.tensor(0.001), "learners/spread": torch.tensor(1.0)}

    with pytest.warns(UserWarning, match="attention has collapsed onto one learner"):
        monitor.on_validation_end(Fake(), net)
    Fake.callback_metrics = {"attention/entropy": torch.tensor(0.001), "learners/spread": torch.tensor(0.2)}
    with pytest.warns(UserWarning, match="lost their spread") as caught:
        monitor.on_validation_end(Fake(), net)
    assert len(caught) == 1
    again = HealthMonitor()
    again.load_state_dict(monitor.state_dict())
    again.on_validation_end(Fake(), net)  # a warning would be an error here


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"teacher": None}, "needs a teacher"),
        ({"teacher_gate": "maybe"}, "stop, warn, off"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"num_classes": 7}, "4 classes and num_classes is 7"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 9))}, "teacher has 9 classes"),
    ],
)
def test_bad_arguments(arguments, sentence):
    usual = {"student": TinyNet(), "num_classes": CLASSES, "teacher": TinyNet(8), "input_size": SIZE}
    with pytest.raises(ACKDError, match=sentence):
        ACKDModule(**{**usual, **arguments})


def test_images_of_another_size_are_named():
    net = module(input_size=16)
    with pytest.raises(ACKDError, match="images are 8 x 8 and input_size is 16"):
        trainer().fit(net, datamodule=Blobs())


def test_frozen_teacher_is_taken_as_it_is():
    teacher = FrozenTeacher(TinyNet(8), bf16=True)
    net = ACKDModule(TinyNet(), CLASSES, teacher=teacher, input_size=SIZE)
    assert net.teacher is teacher


def test_readme_script_runs(tmp_path, monkeypatch):
    """The 30 lines in README that train ACKDModule from somebody's own Lightning script."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    script = text.split("<!-- script -->")[1].split("```python\n")[1].split("```")[0]
    assert len(script.splitlines()) <= 32
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(compile(script, "README.md", "exec"), namespace)
    assert (tmp_path / "student.safetensors").is_file()
    assert (tmp_path / "student.safetensors").stat().st_size > 100_000
