from __future__ import annotations

import functools
import math

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR
from torch.utils.data import TensorDataset

from ackd_lightning import (
    ACKD,
    CE,
    KD,
    ACKDError,
    ACKDModule,
    DataInfo,
    DigitsDataModule,
    DistillationModule,
    FrozenTeacher,
    Recipe,
    StudentConfig,
    TeacherConfig,
    create_model,
    load_student,
    save_weights,
)
from ackd_lightning.callbacks.health import HealthMonitor
from ackd_lightning.methods import ATSC
from training.helpers import (
    CLASSES,
    DATA,
    SIZE,
    Blobs,
    TinyNet,
    build,
    largest_difference,
    module,
    sgd,
    state,
    teaching,
    trainer,
)


class Doubles(Blobs):
    """Blobs in double precision."""

    def _data(self, seed, count):
        image, target = super()._data(seed, count).tensors
        return TensorDataset(image.double(), target)


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
    loaded = ACKDModule.load_from_checkpoint(
        tmp_path / "last.ckpt", student=TinyNet(), teacher=TinyNet(8), weights_only=True
    )
    assert loaded.method.temperature == 2.0
    assert loaded.student.specs == ("D3B1", "D3B1")
    image = torch.randn(4, 3, SIZE, SIZE)
    assert torch.equal(net.eval()(image), loaded.eval()(image))


@pytest.mark.parametrize("adamw", [False, True])
def test_named_networks_are_built_from_the_checkpoint_alone(tmp_path, adamw):
    recipe = Recipe(interval="step", warmup_epochs=1, gradient_clip_val=1.0, decay_norm_and_bias=False)
    options = {
        "optimizer": functools.partial(AdamW, lr=1e-3, betas=(0.8, 0.9)),
        "lr_scheduler": functools.partial(CosineAnnealingLR, T_max=0),
        "recipe": recipe,
    }
    net = DistillationModule("resnet8", data=DATA, **(options if adamw else {"optimizer": sgd()}))
    saver = ModelCheckpoint(tmp_path, filename="last")
    trainer(enable_checkpointing=True, callbacks=[saver], max_epochs=1).fit(net, datamodule=Blobs())
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    image = torch.randn(4, 3, SIZE, SIZE)
    assert torch.equal(net.eval()(image), loaded.eval()(image))
    assert loaded.recipe == net.recipe
    run = trainer(fast_dev_run=1)
    run.fit(loaded, datamodule=Blobs())
    optimizer = run.optimizers[0]
    expected = (AdamW, (0.8, 0.9)) if adamw else (SGD, 0.9)
    assert (type(optimizer), optimizer.defaults["betas" if adamw else "momentum"]) == expected


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, {"lr_scheduler": None}),
        (functools.partial(LambdaLR, lr_lambda=lambda epoch: 1.0), {}),  # a function is not plain data
        (lambda optimizer: StepLR(optimizer, 1), {}),
        (
            functools.partial(StepLR, step_size=2),
            {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}},
        ),
    ],
    ids=["constant", "partial function", "function", "class"],
)
def test_what_a_checkpoint_keeps_of_a_schedule(given, kept):
    net = build(CE(), lr_scheduler=given)
    assert {key: value for key, value in net.hparams.items() if key == "lr_scheduler"} == kept
    assert net.hparams["optimizer"]["class_path"] == "torch.optim.SGD"


def test_weights_zero_but_ce_is_plain_training_bit_for_bit():
    off = {"lambda_kd_aux": 0.0, "lambda_kd_target": 0.0, "lambda_adv": 0.0, "lambda_ce_aux": 0.0}
    plain, taught = build(CE()), module(ACKD(**off))
    for net in (plain, taught):
        trainer(max_epochs=3).fit(net, datamodule=Blobs())
    assert largest_difference(state(plain.student.plain()), state(taught.student.plain())) == 0.0


def test_training_lowers_the_loss_and_beats_chance():
    net = module(decays=[20])
    run = trainer(max_epochs=12)
    run.fit(net, datamodule=Blobs())
    assert float(run.callback_metrics["val/acc"]) > 0.5


def test_noise_depends_on_the_step_and_not_on_its_history():
    """A run that is resumed after an epoch draws the same dropout masks."""
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
        "train/acc",
        "train/ce",
        "train/ce_aux",
        "train/kd_aux",
        "train/kd_target",
        "train/kd_direct",
        "train/adv",
    }
    expected |= {
        f"val/{learner}acc{top}" for learner in ("", "aux1_", "aux2_", "ensemble_", "group_") for top in ("", "_top5")
    }
    expected |= {"val/attention_weight_aux1", "val/attention_weight_aux2", "val/attention_entropy"}
    expected |= {"train/disc_acc", "train/disc_loss", "train/loss_step", "val/loss"}
    expected |= {"val/learners_cka", "val/learners_disagreement", "val/learners_feature_std"}
    assert set(run.callback_metrics) == expected
    assert all(math.isfinite(float(value)) for value in run.callback_metrics.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("method", [CE(), KD()], ids=["ce", "kd"])
def test_automatic_methods_in_both_precisions(method, precision):
    net = build(method, decays=[5])
    run = trainer(max_epochs=2, precision=precision)
    run.fit(net, datamodule=Blobs())
    assert math.isfinite(float(run.callback_metrics["train/loss"]))


class TestTeacherGate:
    def test_untrained_teacher_stops_the_run(self):
        with pytest.raises(ACKDError, match="near chance"):
            trainer().fit(module(gate="stop"), datamodule=Blobs())

    def test_warn_continues(self):
        run = trainer(max_epochs=1)
        with pytest.warns(UserWarning, match="near chance"):
            run.fit(module(gate="warn"), datamodule=Blobs())
        assert run.global_step == 8

    def test_a_good_teacher_is_accepted_and_logged(self, capsys, tmp_path):
        plain = build(CE(), student=TinyNet(8), decays=[20])
        trainer(max_epochs=12).fit(plain, datamodule=Blobs())
        net = ACKDModule(TinyNet(), teacher=plain.student.plain(), data=DATA)
        logger = CSVLogger(tmp_path, name="", version="")
        trainer(max_epochs=1, logger=logger).fit(net, datamodule=Blobs())
        assert "accuracy" in capsys.readouterr().out
        assert "val/teacher_acc" in (tmp_path / "metrics.csv").read_text()
        assert float(net.teacher.metadata["measured_acc"]) > 0.5


class TestTeacherFile:
    def test_missing_weights_name_the_command(self, tmp_path):
        teacher = TeacherConfig(network="resnet110", weights=f"{tmp_path}/cifar100_resnet110.safetensors")
        net = ACKDModule("resnet20", teacher=teacher, data=DataInfo(100))
        with pytest.raises(ACKDError, match=r"ackd fit --config cifar100_resnet110\.yaml"):
            net.load_teacher()

    def test_metadata_sets_normalisation_and_size(self, tmp_path):
        metadata = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]", "input_size": "16", "val_acc": "0.9"}
        save_weights(create_model("resnet8", CLASSES), tmp_path / "t.safetensors", metadata)
        net = ACKDModule(
            "resnet8",
            teacher=TeacherConfig(network="resnet8", weights=str(tmp_path / "t.safetensors")),
            data=DataInfo(CLASSES, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
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
            seen.append(pl_module.method.loss_weights["adv"])

    net = module(ACKD(adversarial_warmup_epochs=2, lambda_adv=3.0))
    trainer(max_epochs=3, callbacks=[Watch()], limit_train_batches=1).fit(net, datamodule=Blobs())
    assert seen == [0.0, 1.5, 3.0]


def test_noise_follows_the_users_own_seed():
    assert [module(seed=seed).seed for seed in (1, 2)] == [1, 2]


def test_teacher_and_student_are_two_networks():
    net = TinyNet()
    with pytest.raises(ACKDError, match="same network"):
        ACKDModule(net, teacher=net, data=DATA)


def test_unknown_normalisation_of_the_data_is_reported():
    teacher = FrozenTeacher(TinyNet(8), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    module = ACKDModule(TinyNet(), teacher=teacher, data=DATA)
    assert "normalisation of the data is unknown" in module.teachers.announce()[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"teacher": None}, "ACKD needs a teacher"),
        ({"on_nonfinite": "maybe"}, "'maybe'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"data": DataInfo(7, SIZE)}, "4 classes .* 7"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 9))}, "9 classes"),
        ({"student": "resnet8", "data": None}, "'resnet8'"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ACKDError, match=named):
        ACKDModule(**{"student": TinyNet(), "teacher": TinyNet(8), "data": DATA, **arguments})


def test_a_method_that_does_not_call_its_base_is_named():
    class Hasty(KD):
        def __init__(self):
            self.loss_weights = {"ce": 1.0}

    with pytest.raises(ACKDError, match=r"method is a Hasty; pass an instance, .* calls super\(\)\.__init__\(\) first"):
        DistillationModule(TinyNet(), method=Hasty(), data=DATA)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"interval": "batch"}, "'batch'"), ({"warmup_epochs": -1}, "-1"), ({"gradient_clip_val": 0.0}, "0.0")],
)
def test_bad_recipes(arguments, named):
    with pytest.raises(ACKDError, match=named):
        Recipe(**arguments)


def test_a_network_without_data_tells_its_classes():
    net = DistillationModule(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7)))
    assert (net.data.num_classes, net.data.input_size, net.data.mean) == (7, 32, None)


def test_a_module_takes_its_data_from_a_data_module():
    data = DigitsDataModule()
    net = DistillationModule.from_data(data, "resnet8", method=CE())
    assert net.data == data.info
    with pytest.raises(ACKDError, match="Blobs"):
        DistillationModule.from_data(Blobs(), "resnet8")


def test_images_of_another_size_are_named():
    net = module(data=DataInfo(CLASSES, 16))
    with pytest.raises(ACKDError, match=r"8 x 8 .* 16"):
        trainer().fit(net, datamodule=Blobs())


class TestUsersTeacher:
    """A network that a user passes as a teacher stays as it is."""

    @pytest.mark.parametrize("method", [KD(), ACKD(), ATSC(classifier_lr=0.5)], ids=["kd", "ackd", "atsc"])
    def test_a_fit_does_not_change_it(self, method):
        teacher = TinyNet(8).train()
        before = state(teacher)
        modes = [each.training for each in teacher.modules()]
        net = build(method, teacher=teaching(teacher), channels_last=True)
        trainer(max_epochs=1).fit(net.double(), datamodule=Doubles())
        assert largest_difference(before, state(teacher)) == 0.0
        assert [each.training for each in teacher.modules()] == modes
        assert all(each.requires_grad and each.grad is None for each in teacher.parameters())
        assert teacher.fc.weight.dtype is torch.float32
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in teacher.modules())


class TestSavedStudent:
    """A file that ``save_student`` writes gives the logits of the module."""

    def check(self, net, tmp_path):
        written = net.save_student(tmp_path / "student.safetensors")
        image = torch.randn(4, 3, SIZE, SIZE)
        net.eval()
        assert torch.equal(net(image), load_student(written.path)(image))
        with torch.no_grad():
            assert torch.equal(net(image), net.kept_network().eval()(image))
        with pytest.raises(ACKDError, match=r"student\.safetensors exists"):
            net.save_student(written.path)
        net.save_student(written.path, overwrite=True)

    @pytest.mark.parametrize("given", ["by name", "by name with options", "network", "network with options"])
    def test_a_student_by_name_and_a_network(self, tmp_path, given):
        options = {"dropout": 0.1} if "options" in given else {}
        name = "mobilenet_v3_small" if options else "resnet8"
        if given.startswith("network"):
            net = build(KD(), student=create_model(name, CLASSES, **options))
        else:
            net = build(KD(), student=StudentConfig(name, options=options))
        trainer(fast_dev_run=1).fit(net, datamodule=Blobs())
        self.check(net, tmp_path)

    @pytest.mark.parametrize("adapts", [True, False], ids=["atsc", "simkd"])
    def test_a_head_is_part_of_it(self, tmp_path, adapts):
        teacher = create_model("resnet14", CLASSES)
        net = build(ATSC(adapt_teacher=adapts), student="resnet8", teacher=teaching(teacher))
        trainer(fast_dev_run=1).fit(net, datamodule=Blobs())
        self.check(net, tmp_path)

    def test_branches_are_not_part_of_it(self, tmp_path):
        net = build(ACKD(), student="resnet8")
        trainer(fast_dev_run=1).fit(net, datamodule=Blobs())
        self.check(net, tmp_path)

    def test_a_network_of_ones_own_is_refused_with_another_way(self, tmp_path):
        net = build(KD())
        with pytest.raises(ACKDError, match="TinyNet") as caught:
            net.save_student(tmp_path / "student.safetensors")
        assert "save_student" not in str(caught.value)
        save_weights(net.kept_network(), tmp_path / "student.safetensors")  # which the message names


def test_frozen_teacher_is_used_as_it_is():
    teacher = FrozenTeacher(TinyNet(8), bf16=True)
    net = ACKDModule(TinyNet(), teacher=teacher, data=DATA)
    assert net.teacher.network is teacher.network
    assert net.teacher.bf16


@pytest.mark.parametrize(("epochs", "said"), [(2, True), (3, False)])
def test_a_fit_that_is_mostly_warm_up_is_said(capsys, epochs, said):
    net = build(KD(), recipe=Recipe(warmup_epochs=1))
    trainer(max_epochs=epochs, limit_train_batches=1, limit_val_batches=0).fit(net, datamodule=Blobs())
    assert ("the warm-up of the learning rate takes 1 of 2 epochs" in capsys.readouterr().out) is said
