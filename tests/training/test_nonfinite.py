"""A non-finite loss ends the run with its term and rate, or is skipped and counted; checkpoints stay finite."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from ackd_lightning import ACKD, KD, ACKDError, Recipe
from ackd_lightning.cli import main
from ackd_lightning.errors import NonFiniteError
from ackd_lightning.launch.execute import plan
from ackd_lightning.training.nonfinite import remedies
from training.helpers import BadImages, Blobs, build, largest_difference, state, trainer

skipping = pytest.mark.filterwarnings("ignore:the loss is not finite in epoch.*")


class Broken(KD):
    """KD whose own term is not finite in some steps; neither is its gradient."""

    def __init__(self, *, at: tuple[int, ...] = (5,), value: Any = float("nan")) -> None:
        super().__init__()
        self.at, self.value, self.calls = at, value, 0

    def forward(self, student, teacher, batch):
        terms = super().forward(student, teacher, batch)
        self.calls += self.training
        return {**terms, "kd": terms["kd"] * self.value} if self.calls in self.at and self.training else terms


class BrokenACKD(ACKD):
    calls = 0
    at: tuple[int, ...] = (5,)

    def forward(self, student, teacher, batch):
        terms = super().forward(student, teacher, batch)
        type(self).calls += 1
        return {**terms, "ce": terms["ce"] * float("nan")} if type(self).calls in self.at else terms


def made(method=None, *, several=False, **options):
    """Build a module with automatic optimization, or with several optimizers."""
    return build(method or (ACKD() if several else KD()), **{"decays": [9], **options})


def finite(tensors):
    return all(torch.isfinite(each).all() for each in tensors.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stop_names_step_term_and_rate_before_the_weights_change(value):
    net = made(Broken(at=(5,), value=value))
    weights = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_):
            weights.append(state(net.student.plain().fc))

    run = trainer(callbacks=[Watch()])
    with pytest.raises(NonFiniteError) as caught:
        run.fit(net, datamodule=Blobs())
    sentence = str(caught.value)
    for part in (
        "step 5 (epoch 1)",
        f"kd = {value}",
        "learning rate 0.05",
        "optimizer's lr",
        "warmup_epochs",
        "skip",
    ):
        assert part in sentence
    assert "ce =" not in sentence
    assert "loss =" not in sentence
    assert "\n" not in sentence
    assert len(weights) == 4
    assert largest_difference(weights[-1], state(net.student.plain().fc)) == 0.0


def test_an_infinite_weighted_loss_of_finite_terms_is_named_by_itself():
    net = made(Broken(at=(1,), value=1e20))
    net.method.loss_weights["kd"] = 1e30
    with pytest.raises(NonFiniteError, match="loss = inf"):
        trainer().fit(net, datamodule=Blobs())


def test_stop_is_before_the_student_s_step():
    BrokenACKD.calls = 0
    net = made(BrokenACKD(), several=True)
    with pytest.raises(NonFiniteError, match=r"step 5 \(epoch 1\): ce = nan"):
        trainer().fit(net, datamodule=Blobs())
    assert finite(state(net.student))
    assert finite(state(net.method))


@pytest.mark.parametrize("several", [False, True])
def test_bad_pixels_stop_before_anything_learns_from_them(several):
    net = made(several=several)
    with pytest.raises(NonFiniteError, match=r"step 4 \(epoch 1\): .*learning rate 0.05"):
        trainer().fit(net, datamodule=BadImages())
    assert finite({name: each.detach() for name, each in net.named_parameters()})


def test_the_last_finite_checkpoint_stays(tmp_path):
    """Blobs has 8 batches an epoch: step 13 is in the second."""
    saver = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    run = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[saver])
    with pytest.raises(NonFiniteError, match=r"step 13 \(epoch 2\)"):
        run.fit(made(Broken(at=(13,))), datamodule=Blobs())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (kept["epoch"], kept["global_step"]) == (0, 8)
    assert finite(kept["state_dict"])


@pytest.mark.parametrize("poison", ["parameter", "statistics"])
def test_weights_that_are_not_finite_are_never_written(tmp_path, poison):
    """A finite loss may have a non-finite gradient: then the weights show it, when they are to be written."""

    class Poison(L.Callback):
        def on_train_batch_end(self, run, net, outputs, batch, batch_idx):
            if run.global_step == 16:
                tensor = (
                    net.student.plain().fc.weight if poison == "parameter" else net.student.plain().one[1].running_var
                )
                tensor.data.view(-1)[1] = float("inf")

    saver = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    run = trainer(max_epochs=2, limit_val_batches=0, enable_checkpointing=True, callbacks=[Poison(), saver])
    with pytest.raises(NonFiniteError, match=r"not finite after epoch 2"):
        run.fit(made(KD()), datamodule=Blobs())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert finite(kept["state_dict"])


def half_precision() -> tuple[dict[str, list[MixedPrecision]], torch.amp.GradScaler]:
    """Return Trainer options with a loss scale as on a GPU; on a CPU Lightning makes bfloat16 of 16-mixed."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}, scaler


@skipping
@pytest.mark.parametrize("half", [False, True], ids=["32-true", "16-mixed"])
@pytest.mark.parametrize("several", [False, True])
def test_skip_is_as_if_the_step_had_not_been(several, half):
    """The same as a run without that batch: weights, BatchNorm, discriminators, momentum, and the loss scale."""

    class Without(BadImages):
        def train_dataloader(self):
            data = self._data(0, self.count)
            keep = [each for each in range(self.count) if each // self.global_batch != self.bad]
            kept = torch.utils.data.Subset(data, keep)
            return torch.utils.data.DataLoader(kept, batch_size=self.global_batch)

    method = (lambda: ACKD(discriminator_lr=0.1)) if several else KD
    (options, scaler), (other, scaler_without) = half_precision(), half_precision()
    skipped = made(method(), several=several, on_nonfinite="skip")
    run = trainer(max_epochs=2, **(options if half else {}))
    run.fit(skipped, datamodule=BadImages())
    assert float(run.callback_metrics["train/skipped"]) == 2.0
    left_out = made(method(), several=several)
    trainer(max_epochs=2, **(other if half else {})).fit(left_out, datamodule=Without())
    assert scaler.get_scale() == scaler_without.get_scale()
    assert (scaler.get_scale() > 2.0**10) is half  # it has grown, so it has been used
    assert largest_difference(state(left_out), state(skipped)) == 0.0
    assert torch.isfinite(run.callback_metrics["train/loss"])


@skipping
def test_a_bad_loss_of_the_student_skips_its_step():
    BrokenACKD.calls = 0
    net = made(BrokenACKD(), several=True, on_nonfinite="skip")
    run = trainer(max_epochs=1)
    run.fit(net, datamodule=Blobs())
    assert (net.guard.skipped, run.global_step) == (1, 7)
    assert finite(state(net))


@skipping
@pytest.mark.parametrize("bad", [2, 3], ids=["first of a step", "last of a step"])
def test_the_other_batches_of_a_step_count(bad):
    class Bad(BadImages):
        pass

    Bad.bad = bad
    net = made(on_nonfinite="skip")
    before = state(net.student)
    run = trainer(max_epochs=1, accumulate_grad_batches=2, limit_train_batches=4, limit_val_batches=0)
    run.fit(net, datamodule=Bad())
    other = made(on_nonfinite="skip")
    run = trainer(max_epochs=1, accumulate_grad_batches=2, limit_train_batches=2, limit_val_batches=0)
    run.fit(other, datamodule=Bad())
    assert net.guard.skipped == 1
    assert largest_difference(before, state(other.student)) > 0
    assert largest_difference(state(other.student), state(net.student)) > 1e-4  # the second step was taken


@skipping
def test_a_step_without_a_good_batch_is_not_taken():
    net = made(Broken(at=(3, 4)), on_nonfinite="skip")
    run = trainer(max_epochs=1, accumulate_grad_batches=2, limit_train_batches=4, limit_val_batches=0)
    run.fit(net, datamodule=Blobs())
    other = made(Broken(at=()), on_nonfinite="skip")
    run = trainer(max_epochs=1, accumulate_grad_batches=2, limit_train_batches=2, limit_val_batches=0)
    run.fit(other, datamodule=Blobs())
    assert net.guard.skipped == 2
    weights = {name: each for name, each in state(other.student).items() if "running" not in name}
    found = state(net.student)
    assert largest_difference(weights, {name: found[name] for name in weights}) == 0.0


def test_skipped_steps_are_reported_with_their_term():
    with pytest.warns(UserWarning, match="the loss is not finite") as caught:
        trainer(max_epochs=1).fit(made(Broken(at=(2, 3, 4, 5, 6)), on_nonfinite="skip"), datamodule=Blobs())
    reported = [str(each.message) for each in caught if "the loss is not finite" in str(each.message)]
    assert len(reported) == 3
    assert "epoch 1 (kd = nan, learning rate 0.05)" in reported[0]
    assert "1 in all" in reported[0]
    assert "3 in all" in reported[2]


@skipping
def test_an_epoch_of_skipped_steps_ends_the_run():
    net = made(Broken(at=tuple(range(9, 100))), on_nonfinite="skip")
    with pytest.raises(NonFiniteError, match="none of the 8 steps of epoch 2"):
        trainer(max_epochs=5).fit(net, datamodule=Blobs())


@skipping
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_continues_the_count(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    first = trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saver])
    first.fit(made(Broken(at=(2, 4)), on_nonfinite="skip"), datamodule=Blobs())
    net = made(Broken(at=(1,)), on_nonfinite="skip")
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saver]).fit(
        net, datamodule=Blobs(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert net.guard.skipped == 3


def test_remedies_fit_the_run():
    net = made(recipe=Recipe(warmup_epochs=3, gradient_clip_val=1.0))
    run = trainer(fast_dev_run=1)
    run.fit(net, datamodule=Blobs())
    assert remedies(net) == f"lower the optimizer's lr (it is {run.optimizers[0].param_groups[0]['lr']} now)"
    net.recipe = Recipe()
    assert "recipe.warmup_epochs" in remedies(net)
    assert "recipe.gradient_clip_val" in remedies(net)


def test_other_values_are_refused():
    with pytest.raises(ACKDError, match=r"on_nonfinite is 'ignore'.*'stop' or 'skip'"):
        made(on_nonfinite="ignore")


@pytest.mark.gpu
@pytest.mark.parametrize("several", [False, True])
def test_on_a_gpu_the_error_comes_before_a_checkpoint(tmp_path, several):
    saver = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    run = trainer(max_epochs=3, accelerator="cuda", enable_checkpointing=True, callbacks=[saver])
    BrokenACKD.calls, BrokenACKD.at = 0, (16,)
    method = BrokenACKD() if several else Broken(at=(16,))
    try:
        with pytest.raises(NonFiniteError, match=r"step 16 \(epoch 2\)"):
            run.fit(made(method, several=several), datamodule=Blobs())
    finally:
        BrokenACKD.at = (5,)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert finite(kept["state_dict"])


FIT = ["fit", "--config", "digits_resnet8.yaml", "--weights_dir", "null", "--name", "n", "--data.max_per_class", "4"]
FIT += ["--data.batch_size", "20", "--trainer.max_epochs", "2", "--model.lr_scheduler.milestones", "[1]"]
FIT += ["--trainer.enable_progress_bar", "false"]
OWN = """
from ackd_lightning import CE

class Odd(CE):
    calls = 0

    def forward(self, student, teacher, batch):
        terms = super().forward(student, teacher, batch)
        if self.training:
            self.calls += 1
        return {"ce": terms["ce"] * (float("nan") if self.training and self.calls == 3 else 1.0)}
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Two steps an epoch; the third is bad."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "odd_method", raising=False)
    Path("odd_method.py").write_text(OWN)
    Path("odd.yaml").write_text("model: {method: {class_path: odd_method.Odd}}\n")
    return [*FIT, "--config", "odd.yaml"]


def test_the_command_stops_with_code_1_and_a_finite_checkpoint(odd, capsys):
    assert main(odd) == 1
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 3 (epoch 2): ce = nan" in shown
    run = Path("runs/digits_resnet8+odd/n")
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert finite(kept["state_dict"])


def test_the_command_skips_and_counts(odd, capsys):
    with pytest.warns(UserWarning, match="1 in all"):
        assert main([*odd, "--on_nonfinite", "skip"]) == 0
    run = Path("runs/digits_resnet8+odd/n")
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 1
    assert "skipped" in capsys.readouterr().out
    assert "on_nonfinite: skip" in (run / "config.yaml").read_text()
    assert "train/skipped" in (run / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    "flag", [["--on_nonfinite", "skip"], ["--model.on_nonfinite", "skip"], ["--on_nonfinite=skip"]]
)
def test_the_flag_and_the_setting_are_the_same(flag):
    assert plan(["--config", "digits_resnet8.yaml", *flag]).settings()["model"]["on_nonfinite"] == "skip"


def test_the_command_refuses_other_values(odd, capsys):
    assert main([*odd, "--on_nonfinite", "maybe"]) == 2
    assert "'maybe'" in capsys.readouterr().err
