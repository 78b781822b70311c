"""A fit that goes on from a checkpoint: schedules, optimizers, and what the settings may change."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from ackd_lightning import ACKD, CE, KD, ACKDError, ACKDModule, DistillationModule, Recipe, StudentConfig
from ackd_lightning.data import DigitsDataModule
from training.helpers import Blobs, TinyNet, build, largest_difference, state, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler"),
]
methods = pytest.mark.parametrize("method", [CE, KD, ACKD], ids=["ce", "kd", "ackd"])


HALF = functools.partial(pow, 0.5)


class Rates(ModelCheckpoint):
    """Learning rate of every epoch, and the last checkpoint."""

    def __init__(self, folder):
        super().__init__(dirpath=folder, save_last=True)
        self.found = []

    def on_train_epoch_start(self, run, module):
        self.found.append(run.optimizers[0].param_groups[0]["lr"])


class KeepAt(Callback):
    """Saves a checkpoint after a step and ends the fit."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, run, *args):
        if run.global_step == self.step and not self.path.exists():
            run.save_checkpoint(self.path)
            raise RuntimeError("killed")


def fit(module, folder, epochs, *, resume=False):
    rates = Rates(folder)
    path = folder / "last.ckpt" if resume else None
    run = trainer(max_epochs=epochs, callbacks=[rates], enable_checkpointing=True)
    run.fit(module, datamodule=Blobs(), ckpt_path=path)
    return rates.found


@methods
@pytest.mark.parametrize("warmup", [0, 2])
def test_a_plateau_misses_no_step_when_it_is_resumed(tmp_path, method, warmup):
    def module():
        plateau = functools.partial(ReduceLROnPlateau, patience=0, threshold=1e9, factor=0.5)
        return build(method(), lr=0.1, lr_scheduler=plateau, recipe=Recipe(warmup_epochs=warmup))

    whole, first, second = module(), module(), module()
    expected = fit(whole, tmp_path / "whole", 4)
    found = fit(first, tmp_path / "parts", 2) + fit(second, tmp_path / "parts", 4, resume=True)
    assert found == pytest.approx(expected)
    assert largest_difference(state(whole), state(second)) == 0


SCHEDULES = {
    "cosine": (functools.partial(CosineAnnealingLR, T_max=0), functools.partial(CosineAnnealingLR, T_max=0)),
    "eta_min": (
        functools.partial(CosineAnnealingLR, T_max=2),
        functools.partial(CosineAnnealingLR, T_max=4, eta_min=0.01),
    ),
    "milestones": (
        functools.partial(MultiStepLR, milestones=[1]),
        functools.partial(MultiStepLR, milestones=[1, 3]),
    ),
    "step": (functools.partial(StepLR, step_size=1), functools.partial(StepLR, step_size=3)),
    "polynomial": (functools.partial(PolynomialLR, total_iters=0), functools.partial(PolynomialLR, total_iters=0)),
    "one_cycle": (
        functools.partial(OneCycleLR, max_lr=0.1, total_steps=3),
        functools.partial(OneCycleLR, max_lr=0.1, total_steps=6),
    ),
    "lambda": (
        functools.partial(LambdaLR, lr_lambda=lambda n: 0.5**n),
        functools.partial(LambdaLR, lr_lambda=lambda n: 0.5**n),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("method", "warmup"), [pytest.param(CE, 3, id="warmup"), pytest.param(ACKD, 0, id="ackd", marks=pytest.mark.slow)]
)
def test_a_longer_fit_follows_the_schedule_of_its_settings(tmp_path, method, name, warmup):
    short, long = SCHEDULES[name]

    def module(schedule):
        return build(method(), lr=0.1, lr_scheduler=schedule, recipe=Recipe(warmup_epochs=warmup))

    expected = fit(module(long), tmp_path / "whole", 5)
    fit(module(short), tmp_path / "parts", 2)
    found = fit(module(long), tmp_path / "parts", 5, resume=True)
    assert found == pytest.approx(expected[2:], abs=1e-9)


@pytest.mark.parametrize(("method", "kind"), [(CE, AdamW), (ACKD, Adam)])
def test_another_optimizer_is_refused_in_one_sentence(tmp_path, method, kind):
    fit(build(method()), tmp_path, 1)
    with pytest.raises(ACKDError, match=f"SGD.*{kind.__name__}") as caught:
        fit(build(method(), optimizer=functools.partial(kind, lr=1e-3)), tmp_path, 2, resume=True)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"recipe": Recipe(decay_norm_and_bias=False)},
        {"freeze": ["stem"]},
        {"backbone_lr_scale": 0.5},
    ],
    ids=lambda value: next(iter(value)),
)
def test_other_parameter_groups_are_refused_in_one_sentence(tmp_path, changed):
    fit(build(CE()), tmp_path, 1)
    network = build(CE()).student.plain()
    config = StudentConfig(network, **{key: each for key, each in changed.items() if key != "recipe"})
    with pytest.raises(ACKDError, match="parameter groups"):
        fit(build(CE(), student=config, recipe=changed.get("recipe")), tmp_path, 2, resume=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"optimizer": functools.partial(AdamW, betas=(2.0, 3.0))}, "AdamW"),
        ({"optimizer": functools.partial(SGD, lr=0.1, nesterov=True)}, "SGD"),
        ({"optimizer": functools.partial(AdamW, momentum=0.9)}, "momentum"),
        ({"optimizer": functools.partial(Adam, lr=1e-3, eps=-1.0)}, "Adam"),
        ({"lr_scheduler": functools.partial(OneCycleLR, max_lr=0.1)}, "OneCycleLR"),
        ({"lr_scheduler": StepLR}, "step_size"),
        ({"lr_scheduler": functools.partial(ReduceLROnPlateau, mode="most")}, "ReduceLROnPlateau"),
        ({"lr_scheduler": functools.partial(ReduceLROnPlateau, factor=2.0)}, "ReduceLROnPlateau"),
    ],
    ids=str,
)
def test_values_that_torch_refuses_end_in_one_sentence(arguments, named):
    with pytest.raises(ACKDError, match=named) as caught:
        trainer().fit(build(CE(), **arguments), datamodule=Blobs())
    assert len(str(caught.value).splitlines()) == 1


def test_errors_in_a_function_of_ones_own_are_left_alone():
    def mine(groups):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        trainer().fit(build(CE(), optimizer=mine), datamodule=Blobs())


class Everything(ACKDModule):
    """The override that every Lightning tutorial shows."""

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=1e-3)


class Scheduled(ACKDModule):
    """The same with a schedule."""

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1)}


class Listed(ACKDModule):
    """Two lists."""

    def configure_optimizers(self):
        optimizer = SGD([{"params": self.student.parameters()}, {"params": self.method.parameters()}], lr=1e-2)
        return [optimizer], [StepLR(optimizer, 1)]


@pytest.mark.filterwarnings("ignore:method ACKD trains attention")  # no rate of its own in these
@pytest.mark.parametrize("kind", [Everything, Scheduled, Listed])
def test_an_optimizer_of_all_parameters_leaves_the_method_its_own(kind, capsys):
    module = build(ACKD(), kind=kind)
    before = state(module)
    run = trainer(max_epochs=1)
    run.fit(module, datamodule=Blobs())
    assert len(run.optimizers) == 1 + len(module.auxiliary)
    held = [id(each) for optimizer in run.optimizers for group in optimizer.param_groups for each in group["params"]]
    assert len(held) == len(set(held)) == len(list(module.parameters()))
    trainable = {name for name, each in module.named_parameters() if each.ndim > 1}
    assert all(not torch.equal(before[name], module.state_dict()[name]) for name in trainable)
    assert kind.__name__ in capsys.readouterr().out


@methods
@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"warmup_epochs": 2}, {}, "has a warm-up and recipe.warmup_epochs asks for none"),
        ({}, {"warmup_epochs": 2}, "has no warm-up and recipe.warmup_epochs asks for one"),
        ({}, {"interval": "step"}, "counts each epoch and recipe.interval is step"),
        ({"interval": "step"}, {}, "counts each step and recipe.interval is epoch"),
    ],
)
def test_a_schedule_that_counts_otherwise_is_refused(tmp_path, method, first, second, said):
    def module(recipe):
        cosine = functools.partial(CosineAnnealingLR, T_max=0)
        return build(method(), lr=0.1, lr_scheduler=cosine, recipe=Recipe(**recipe))

    fit(module(first), tmp_path, 2)
    with pytest.raises(ACKDError, match=said):
        fit(module(second), tmp_path, 4, resume=True)


def test_arguments_of_the_optimizer_that_are_kept_are_said(tmp_path):
    def module(**arguments):
        return build(CE(), optimizer=functools.partial(SGD, lr=0.1, **arguments))

    fit(module(momentum=0.9, weight_decay=1e-4), tmp_path, 1)
    with pytest.warns(UserWarning, match="momentum 0.9 and not 0.5, weight_decay 0.0001 and not 0.01"):
        fit(module(momentum=0.5, weight_decay=0.01), tmp_path, 2, resume=True)


def test_a_factor_of_the_learning_rate_that_is_kept_is_said(tmp_path):
    def module(scale):
        return build(CE(), lr=0.1, student=StudentConfig(TinyNet(), backbone_lr_scale=scale))

    fit(module(0.1), tmp_path, 1)
    with pytest.warns(UserWarning, match=r"not student\.backbone_lr_scale of this fit"):
        fit(module(0.5), tmp_path, 2, resume=True)


def test_a_resumed_fit_in_float64_keeps_all_digits(tmp_path):
    def ended(folder, epochs, *, resume=False):
        module = build(KD(), lr=0.1)
        run = trainer(max_epochs=epochs, callbacks=[Rates(folder)], enable_checkpointing=True, precision="64-true")
        run.fit(module, datamodule=Blobs(), ckpt_path=folder / "last.ckpt" if resume else None)
        return module

    whole = ended(tmp_path / "whole", 4)
    ended(tmp_path / "parts", 2)
    assert largest_difference(state(whole), state(ended(tmp_path / "parts", 4, resume=True))) == 0


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_a_fit_of_a_few_batches_does_not_go_on_inside_an_epoch(tmp_path):
    def fitted(steps, resume=None):
        run = trainer(
            max_epochs=4, max_steps=steps, overfit_batches=3, enable_checkpointing=True, default_root_dir=tmp_path
        )
        run.fit(build(CE()), datamodule=Blobs(), ckpt_path=resume)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return run.global_step

    fitted(4)
    with pytest.raises(ACKDError, match="written inside an epoch, and with trainer"):
        fitted(9, tmp_path / "4.ckpt")
    fitted(6)
    assert fitted(9, tmp_path / "6.ckpt") == 9


@pytest.mark.filterwarnings("ignore")  # of Lightning, about few steps
@pytest.mark.parametrize("stopped", [2, 8])
@pytest.mark.parametrize("changed", [{"batch_size": 16}, {"seed": 2}, {"sampling": "balanced"}, {}], ids=str)
def test_a_schedule_of_steps_does_not_go_on_within_an_epoch_of_other_batches(tmp_path, changed, stopped):
    """The loader is made to count the steps, before the checkpoint says which epoch it is."""

    def fit(place=None, **options):
        data = DigitsDataModule(**{"batch_size": 32, "max_per_class": 17, "seed": 1, **options})  # 6 batches an epoch
        cosine = functools.partial(CosineAnnealingLR, T_max=0)
        net = DistillationModule("resnet8", data=data.info, lr_scheduler=cosine, recipe=Recipe(interval="step"))
        run = trainer(max_epochs=2, callbacks=[KeepAt(tmp_path / "a.ckpt", stopped)])
        run.fit(net, datamodule=data, ckpt_path=place)

    with pytest.raises(RuntimeError, match="killed"):
        fit()
    said = pytest.raises(ACKDError, match=f"after batch 2 of epoch {1 + stopped // 6} and cannot go on within it")
    with said if changed else contextlib.nullcontext():
        fit(tmp_path / "a.ckpt", **changed)
