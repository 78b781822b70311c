"""Quantisation-aware training: a trained student is fine-tuned for int8 with the teacher."""

from __future__ import annotations

import signal

import pytest
import torch

from ackd_lightning import DataInfo, DigitsDataModule, DistillationModule, StudentConfig
from ackd_lightning.deploy.student import load_student
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACKD, AIKD, ATSC, CC, CE, DKD, KD, Sum
from ackd_lightning.models.quantization import FakeQuantized, quantize
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training import Recipe
from training import resume_script
from training.helpers import TinyNet, largest_difference, milestones, sgd, state, teaching, trainer

pytest.importorskip("torchao")
pytest.importorskip("executorch")

DATA = DataInfo(10, 16, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A student that was trained for a moment."""
    torch.manual_seed(0)
    net = DistillationModule("resnet8", method=CE(), data=DATA, optimizer=sgd(), lr_scheduler=None, seed=0)
    trainer(max_epochs=4, limit_val_batches=0).fit(net, DigitsDataModule(batch_size=64))
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    net.save_student(path)
    return str(path)


def module(weights, method=None, *, backend="x86", **options):
    student = StudentConfig("resnet8", weights=weights, quantization=backend)
    torch.manual_seed(1)
    usual = {
        "teacher": teaching(create_model("resnet8", 10)),
        "optimizer": sgd(0.001),
        "lr_scheduler": milestones(1, 2),
    }
    return DistillationModule(student, method=method or KD(), data=DATA, seed=0, **{**usual, **options})


def digits():
    return DigitsDataModule(batch_size=16, max_per_class=8, seed=0)


def batches(data):
    data.trainer = None
    data.setup("validate")
    return [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]


@torch.no_grad()
def accuracy(network, data):
    right = [network(batch.image).argmax(1) == batch.target for batch in batches(data)]
    return float(torch.cat(right).float().mean())


@pytest.mark.parametrize("backend", ["x86", pytest.param("xnnpack", marks=pytest.mark.slow)])
def test_a_student_is_fine_tuned_and_its_int8_network_is_as_good_as_validation_says(weights, backend, tmp_path):
    net = module(weights, CE(), backend=backend, teacher=None, lr_scheduler=None)
    run = trainer(max_epochs=2)
    data = DigitsDataModule(batch_size=64)
    run.fit(net, data)
    measured = float(run.callback_metrics["val/acc"])
    int8 = net.student.plain().converted()
    assert accuracy(int8, DigitsDataModule(batch_size=64)) == pytest.approx(measured)
    assert measured > 0.5
    net.save_student(tmp_path / "student.safetensors")
    plain = load_student(tmp_path / "student.safetensors")
    assert type(plain).__name__ == type(create_model("resnet8", 10)).__name__
    assert accuracy(plain, data) == pytest.approx(measured, abs=0.05)


def test_before_the_first_step_validation_reads_the_trained_student(weights):
    run = trainer()
    (found,) = run.validate(module(weights), DigitsDataModule(batch_size=64), verbose=False)
    assert found["val/acc"] == pytest.approx(accuracy(load_student(weights), DigitsDataModule(batch_size=64)))


def test_every_weight_learns_and_the_ranges_stay_at_the_end(weights):
    net = module(weights)
    before, seen = state(net), []
    backbone = net.student.plain()
    run = trainer(max_epochs=4)
    net.on_train_epoch_end = lambda: seen.append(backbone.fixed_ranges)
    run.fit(net, digits())
    assert seen == [False, False, False, True]
    names = [name for name, each in net.student.named_parameters()]
    assert all(not torch.equal(before[f"student.{name}"], state(net)[f"student.{name}"]) for name in names)
    running = [name for name in before if "running_" in name]
    assert running
    assert all(torch.equal(before[name], state(net)[name]) for name in running)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_mixed_precision_and_a_batch_of_one_image(weights, precision):
    net = module(weights)
    trainer(precision=precision, max_steps=2, limit_val_batches=1, max_epochs=1).fit(
        net, DigitsDataModule(batch_size=1, max_per_class=1)
    )
    assert net.student.plain().has_ranges


def test_other_precisions_are_refused(weights):
    with pytest.raises(ACKDError, match="bfloat16"):
        trainer(precision="bf16-true").fit(module(weights), digits())


def test_a_checkpoint_needs_neither_the_weights_nor_code(weights, tmp_path):
    run = trainer(max_epochs=1, limit_val_batches=0)
    net = module(weights, CE(), teacher=None)
    run.fit(net, digits())
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    torch.load(path, weights_only=True)
    again = DistillationModule.load_from_checkpoint(path, map_location="cpu")
    assert again.student_config.quantization == "x86"
    assert largest_difference(state(again), state(net)) == 0
    image = torch.randn(8, 3, 16, 16)
    assert torch.equal(again.eval()(image), net.eval()(image))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_stopped_fit_goes_on_exactly(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_script, "module", lambda method: module(weights))
    monkeypatch.setattr(resume_script, "EMAWeightAveraging", lambda decay: resume_script.L.Callback())
    whole = resume_script.fit(tmp_path / "whole", "qat")
    stop = resume_script.Signal(7, signal.SIGTERM)
    stopped = resume_script.fit(tmp_path / "stopped", "qat", stop=stop)
    assert stopped["code"]
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    again = resume_script.fit(tmp_path / "stopped", "qat", resume=last)
    assert again["steps"] == whole["steps"] == 15
    assert again["best"] == whole["best"]
    assert largest_difference(again["state"], whole["state"]) == 0
    assert any("activation_post_process" in key for key in whole["state"])


@pytest.mark.parametrize("method", [KD(), CE(), DKD(), Sum([KD(), DKD()])], ids=lambda each: type(each).__name__)
def test_methods_that_read_logits_work(weights, method):
    assert isinstance(module(weights, method).student.plain(), FakeQuantized)


@pytest.mark.parametrize("method", [ACKD, AIKD, CC, ATSC], ids=lambda each: each.__name__)
def test_methods_that_read_more_are_refused(weights, method):
    with pytest.raises(ACKDError, match=method.__name__):
        module(weights, method())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"recipe": Recipe(ema_decay=0.9)}, "ema_decay"),
        ({"compile": True}, "compile"),
    ],
)
def test_settings_that_do_not_go_with_it(weights, arguments, named):
    with pytest.raises(ACKDError, match=named):
        module(weights, **arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"quantization": "arm"}, "xnnpack"),
        ({"quantization": "x86", "freeze": ("stem",)}, "freeze"),
        ({"quantization": "x86", "taps": ("layer1",)}, "taps"),
    ],
)
def test_values_that_are_not_allowed(arguments, named):
    with pytest.raises(ACKDError, match=named):
        StudentConfig("resnet8", **arguments)


def test_fresh_weights_are_refused_and_ones_own_network_is_taken_as_it_is():
    with pytest.raises(ACKDError, match=r"student\.weights"):
        trainer().fit(module(None), digits())
    torch.manual_seed(0)
    net = DistillationModule(
        StudentConfig(TinyNet(), quantization="x86"), method=CE(), data=DataInfo(4, 8), optimizer=sgd()
    )
    assert isinstance(net.kept_network(), TinyNet)


@pytest.mark.slow
def test_it_is_not_worse_than_calibration(weights):
    data = DigitsDataModule(batch_size=64)
    images = (batch.image for batch in batches(data))
    after = accuracy(quantize(load_student(weights), images, backend="x86"), data)
    net = module(weights, CE(), teacher=None, lr_scheduler=None)
    trainer(max_epochs=2).fit(net, data)
    assert accuracy(net.student.plain().converted(), data) >= after - 0.02


def test_a_file_of_another_head_gets_a_fresh_one(tmp_path):
    path = tmp_path / "other.safetensors"
    save_weights(create_model("resnet8", 7).state_dict(), path, {"model": "resnet8", "num_classes": "7"})
    net = module(str(path))
    assert net.spec.num_classes == 10
