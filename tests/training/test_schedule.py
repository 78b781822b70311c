"""Optimizers and learning rate schedules: the rates that were given, and the same training after a stop."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from ackd_lightning import ACKD, KD, ACKDError, ACKDModule, DistillationModule, Recipe
from ackd_lightning.data.sampling import EpochSampler, ResumableLoader
from ackd_lightning.methods import CE, CRD
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.training.factories import describe_factory
from ackd_lightning.training.schedule import WarmUp, build_scheduler, step_scheduler
from training.helpers import (
    BadImages,
    Blobs,
    IndexedBlobs,
    TinyNet,
    build,
    largest_difference,
    module,
    state,
    trainer,
)
from training.test_nonfinite import skipping

EPOCHS, STEPS = 3, 8  # steps an epoch
COSINE = functools.partial(CosineAnnealingLR, T_max=0)
RECIPES: dict[str, dict[str, Any]] = {
    "sgd, milestones": {"decays": [1, 2], "recipe": Recipe(warmup_epochs=1)},
    "adamw, cosine by epoch": {
        "optimizer": functools.partial(AdamW, lr=0.01),
        "lr_scheduler": COSINE,
        "recipe": Recipe(warmup_epochs=1),
    },
    "adamw, cosine by step": {
        "optimizer": functools.partial(AdamW, lr=0.01),
        "lr_scheduler": COSINE,
        "recipe": Recipe(interval="step", warmup_epochs=1, decay_norm_and_bias=False),
    },
}
every_recipe = pytest.mark.parametrize("recipe", list(RECIPES))
both_loops = pytest.mark.parametrize("method", [KD, ACKD], ids=["automatic", "manual"])


class Shuffled(torch.utils.data.Dataset):
    """Reads the entries ``(epoch, index)`` of an `EpochSampler`."""

    def __init__(self, data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, entry):
        return self.data[entry[1]]


class ResumableBlobs(Blobs):
    """Blobs in a loader that is resumed in the middle of an epoch."""

    def train_dataloader(self):
        data = Shuffled(self._data(0, self.count))
        return ResumableLoader(data, batch_size=self.global_batch, sampler=EpochSampler(data))


def rates_of(run: L.Trainer) -> list[list[float]]:
    return [[group["lr"] for group in optimizer.param_groups] for optimizer in run.optimizers]


class Rates(L.Callback):
    """Keep the learning rates of every optimizer's first group, before each step or epoch."""

    def __init__(self, every: str = "epoch") -> None:
        self.every, self.seen = every, []

    def _note(self, run: L.Trainer) -> None:
        self.seen.append([optimizer.param_groups[0]["lr"] for optimizer in run.optimizers])

    def on_train_epoch_start(self, trainer, pl_module):
        if self.every == "epoch":
            self._note(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.every == "step":
            self._note(trainer)

    def of(self, number: int) -> list[float]:
        return [each[number] for each in self.seen]


# ---------------------------------------------------------------- resumed runs


class Save(L.Callback):
    """Save a checkpoint after a step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / "step.ckpt")


class SaveEpoch(Checkpoint):
    """Save a checkpoint at the end of an epoch, when all else is done."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self.folder, self.epoch = folder, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.folder / "epoch.ckpt")


def finished(method, recipe: str, *callbacks: L.Callback, checkpoint: Path | None = None) -> dict[str, Any]:
    """Run a fit with averaged weights to its end."""
    net = build(method(), dropout=0.2, kind=ACKDModule if method is ACKD else DistillationModule, **RECIPES[recipe])
    average = EMAWeightAveraging(decay=0.8)
    options = {"enable_checkpointing": bool(callbacks), "limit_val_batches": 0}
    run = trainer(max_epochs=EPOCHS, callbacks=[average, *callbacks], **options)
    run.fit(net, datamodule=ResumableBlobs(), ckpt_path=checkpoint, weights_only=True)
    moments = [each for optimizer in run.optimizers for each in optimizer.state_dict()["state"].values()]
    return {"state": state(net), "moments": moments, "lr": rates_of(run), "steps": run.global_step}


@both_loops
@every_recipe
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, method, recipe):
    whole = finished(method, recipe, Save(tmp_path, STEPS + 3), SaveEpoch(tmp_path, 1))
    assert whole["steps"] == EPOCHS * STEPS
    for name in ("step.ckpt", "epoch.ckpt"):
        again = finished(method, recipe, checkpoint=tmp_path / name)
        assert largest_difference(again["state"], whole["state"]) == 0.0, name
        assert (again["lr"], again["steps"]) == (whole["lr"], whole["steps"])
        for first, second in zip(again["moments"], whole["moments"], strict=True):
            assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first), name


# ---------------------------------------------------------------- averaged weights and skipped steps


class ByHand(L.Callback):
    """Average the student's weights in an obvious way."""

    def __init__(self, decay: float) -> None:
        self.decay, self.average, self.steps = decay, {}, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.steps:
            return  # skipped
        self.steps = trainer.global_step
        for name, value in state(pl_module.student).items():
            self.average[name] = self.decay * self.average.get(name, value) + (1 - self.decay) * value


@skipping
@both_loops
@every_recipe
def test_weights_are_averaged_over_the_steps_that_were_taken(method, recipe):
    net, by_hand = build(method(), on_nonfinite="skip", **RECIPES[recipe]), ByHand(0.7)
    run = trainer(callbacks=[by_hand, EMAWeightAveraging(decay=0.7, use_buffers=True)], limit_val_batches=0)
    run.fit(net, datamodule=BadImages())
    assert net.guard.skipped == 2
    floating = {name: value for name, value in state(net.student).items() if value.is_floating_point()}
    assert largest_difference(floating, {name: by_hand.average[name] for name in floating}) < 1e-5


class WithoutBadImages(BadImages):
    """The same without the batch that is skipped."""

    def train_dataloader(self):
        data = self._data(0, self.count)
        keep = [each for each in range(self.count) if each // self.global_batch != self.bad]
        return torch.utils.data.DataLoader(torch.utils.data.Subset(data, keep), batch_size=self.global_batch)


@skipping
@both_loops
@every_recipe
def test_a_skipped_step_leaves_no_trace(method, recipe):
    """The run equals one without that batch; a schedule by step gets its length, which depends on the batches."""
    options = dict(RECIPES[recipe])
    if options["recipe"].interval == "step":
        options |= {"lr_scheduler": functools.partial(CosineAnnealingLR, T_max=16)}
        options |= {"recipe": Recipe(interval="step", decay_norm_and_bias=False)}
    found = []
    for data, how in ((BadImages(), "skip"), (WithoutBadImages(), "stop")):
        net = build(method(), on_nonfinite=how, **options)
        run = trainer(limit_val_batches=0)
        run.fit(net, datamodule=data)
        found.append((state(net), rates_of(run)))
    (skipped, rates), (without, expected) = found
    assert largest_difference(skipped, without) == 0.0
    assert rates == expected


# ---------------------------------------------------------------- learning rates that were given


class Own(DistillationModule):
    def configure_optimizers(self):
        return AdamW(self.learner_groups(), lr=1e-3)


class OwnACKD(ACKDModule):
    def configure_optimizers(self):
        return AdamW(self.learner_groups(), lr=1e-3)


class Scaled(ACKDModule):
    def configure_optimizers(self):
        optimizer = AdamW(self.learner_groups(), lr=1e-3)
        self.scale_learning_rates(optimizer)
        return optimizer


class Scheduled(ACKDModule):
    def configure_optimizers(self):
        optimizer = SGD(self.learner_groups(), lr=1e-3)
        self.scale_learning_rates(optimizer)
        schedule = {"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": "step", "frequency": 4}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class OnPlateau(ACKDModule):
    def configure_optimizers(self):
        optimizer = SGD(self.learner_groups(), lr=1e-3)
        self.scale_learning_rates(optimizer)
        schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "train/loss"}


class Extended(ACKDModule):
    def configure_optimizers(self):
        return super().configure_optimizers()


class Two(ACKDModule):
    def configure_optimizers(self):
        groups = self.learner_groups()
        return [SGD(groups[:1], lr=0.1), SGD(groups[1:], lr=0.1)]


class Nothing(ACKDModule):
    def configure_optimizers(self):
        return None


class TestOwnOptimizer:
    """A sub-class with ``configure_optimizers`` trains at the rates that it gives."""

    def rates(self, net, **options) -> list[list[float]]:
        run = trainer(max_epochs=1, **options)
        run.fit(net, datamodule=Blobs())
        assert [type(each) for each in run.optimizers[1:]] == [SGD] * (len(run.optimizers) - 1)
        return rates_of(run)

    def test_of_one_optimizer(self):
        before = state((net := build(KD(), kind=Own)).student)
        assert self.rates(net) == [[1e-3]]
        assert largest_difference(before, state(net.student)) > 1e-3

    def test_of_several_optimizers_with_a_warning_about_the_scale(self):
        net = build(ACKD(discriminator_lr=0.07), kind=OwnACKD)
        with pytest.warns(UserWarning, match=r"attention at 0\.1 .* OwnACKD"):
            assert self.rates(net) == [[1e-3, 1e-3], [0.07]]

    def test_with_the_scale_there_is_no_warning(self):
        assert self.rates(build(ACKD(discriminator_lr=0.07), kind=Scaled)) == [[1e-3, 1e-4], [0.07]]

    def test_without_attention_there_is_no_warning(self):
        assert self.rates(build(ACKD(attention="off"), kind=OwnACKD)) == [[1e-3], [0.1]]

    def test_with_its_own_schedule(self, capsys):
        found = self.rates(build(ACKD(discriminator_lr=0.08), kind=Scheduled, decays=[1]))
        assert found[0] == pytest.approx([1e-3 / 4, 1e-4 / 4])  # twice in 8 steps
        assert found[1] == pytest.approx([0.008])  # the module's schedule
        shown = capsys.readouterr().out
        assert "on the module's own schedule MultiStepLR, which Scheduled.configure_optimizers does not change" in shown

    def test_with_its_own_schedule_on_a_plateau(self):
        run = trainer(max_epochs=3, limit_val_batches=0)
        run.fit(build(ACKD(discriminator_lr=0.08), kind=OnPlateau, decays=[9]), datamodule=Blobs())
        assert rates_of(run)[0] == pytest.approx([1e-3 / 8, 1e-4 / 8])  # in every epoch

    def test_by_extension(self):
        assert self.rates(build(ACKD(discriminator_lr=0.07), kind=Extended, decays=[9])) == [[0.05, 0.05 * 0.1], [0.07]]

    @pytest.mark.parametrize(("kind", "named"), [(Two, r"Two.* 2 optimizers"), (Nothing, r"Nothing.* 0 optimizers")])
    def test_another_number_of_optimizers_is_refused(self, kind, named):
        with pytest.raises(ACKDError, match=named):
            trainer(max_epochs=1).fit(build(ACKD(), kind=kind), datamodule=Blobs())


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (functools.partial(OneCycleLR, max_lr=0.4, total_steps=17), 0.4),
        (functools.partial(CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=4), 0.2),
        (ReduceLROnPlateau, 0.05),
    ],
    ids=["one cycle", "cyclic", "plateau"],
)
def test_a_group_of_the_method_follows_the_largest_rate_of_the_student(schedule, peak):
    net = module(ACKD(), lr_scheduler=schedule, recipe=Recipe(interval="epoch", warmup_epochs=4))
    run = trainer(limit_val_batches=1, max_epochs=1)
    run.fit(net, datamodule=Blobs())
    found = []
    for config in run.lr_scheduler_configs:
        own, group = config.scheduler.scheduler, config.scheduler.optimizer.param_groups[0]
        found.append(own.max_lrs[0] if isinstance(own, CyclicLR) else group.get("max_lr", config.scheduler.unscaled[0]))
    assert found == pytest.approx([peak, peak])


class Complete(ACKDModule):
    """The method's optimizers are returned by the sub-class itself."""

    def configure_optimizers(self):
        student = SGD(self.learner_groups(), lr=0.02)
        return [student, *self.method.auxiliary_optimizers().values()]


class CompleteAndScheduled(ACKDModule):
    def configure_optimizers(self):
        optimizers = [SGD(self.learner_groups(), lr=0.02), *self.method.auxiliary_optimizers().values()]
        return optimizers, [LinearLR(each, 0.5, total_iters=99) for each in optimizers]


class Chosen(ACKDModule):
    def configure_optimizers(self):
        (own,) = self.method.auxiliary_optimizers().values()
        own.param_groups[0]["lr"] = 0.3
        return [SGD(self.learner_groups(), lr=0.02), own]


@pytest.mark.parametrize(
    ("kind", "options", "rates", "said"),
    [
        (ACKDModule, {}, [0.05, 0.05], "SGD with learning rate 0.05"),
        (ACKDModule, {"optimizer": functools.partial(AdamW, lr=1e-3)}, [1e-3, 0.1], "SGD with learning rate 0.1"),
        (Own, {}, [1e-3, 0.1], "SGD with learning rate 0.1"),
        (Scheduled, {}, [1e-3, 1e-3], "SGD with learning rate 0.001"),
        (Extended, {}, [0.05, 0.05], "SGD with learning rate 0.05"),
        (Complete, {}, [0.02, 0.02], "SGD with learning rate 0.02"),
        (CompleteAndScheduled, {}, [0.02, 0.02], "SGD with learning rate 0.02"),
        (Chosen, {}, [0.02, 0.3], None),
    ],
)
def test_discriminators_have_the_rate_of_a_student_with_sgd_and_else_that_of_the_paper(
    kind, options, rates, said, capsys
):
    net = build(ACKD(attention="off"), kind=kind, decays=[9], **options)
    net.trainer = trainer(max_epochs=1, limit_val_batches=0)
    found, schedules = net.configure_optimizers()
    groups = [each.param_groups[0] for each in found]
    assert [group.get("initial_lr", group["lr"]) for group in groups] == pytest.approx(rates)
    if kind is CompleteAndScheduled:
        assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.01])
        assert [each.base_lrs[0] for each in schedules] == pytest.approx(rates)
    lines = [line for line in capsys.readouterr().out.splitlines() if "learning rate" in line]
    assert [said in line for line in lines] == ([True] if said else [])


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (functools.partial(OneCycleLR, max_lr=0.4, total_steps=17), 0.4),
        (functools.partial(CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=4), 0.2),
    ],
    ids=["one cycle", "cyclic"],
)
def test_schedules_with_rates_of_their_own_keep_the_method_s(schedule, peak):
    """Such a schedule gives all groups one rate; the attention has 0.1 of it, and the discriminators their own."""
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append([rate for optimizer in rates_of(trainer) for rate in optimizer])

    net = module(ACKD(discriminator_lr=0.003), lr_scheduler=schedule, recipe=Recipe(interval="step"))
    trainer(callbacks=[Watch()], limit_val_batches=0).fit(net, datamodule=Blobs())
    student, attention, discriminators = (torch.tensor(each) for each in zip(*seen, strict=True))
    assert float(student.max()) == pytest.approx(peak, rel=0.1)
    assert torch.allclose(attention, 0.1 * student)
    assert torch.allclose(discriminators, 0.003 / peak * student)
    assert len(set(student.tolist())) > 4


# ---------------------------------------------------------------- weight decay


@pytest.mark.parametrize("everything", [True, False])
def test_norms_and_biases_have_no_weight_decay_where_the_recipe_says_so(everything):
    net = module(optimizer=functools.partial(AdamW, lr=0.1, weight_decay=0.05))
    net.recipe = Recipe(decay_norm_and_bias=everything)
    run = trainer(fast_dev_run=1)
    run.fit(net, datamodule=Blobs())
    found = {id(each): group for group in run.optimizers[0].param_groups for each in group["params"]}
    for name, parameter in [*net.student.named_parameters(), *net.method.attention.named_parameters("attention")]:
        group = found.pop(id(parameter))
        assert group["weight_decay"] == (0.05 if everything or parameter.ndim > 1 else 0.0), name
        assert group["lr"] == pytest.approx(0.01 if name.startswith("attention") else 0.1), name
    assert not found  # each parameter is in one group


def test_norms_without_decay_stay_where_they_are_without_gradient():
    net = build(CE(), optimizer=functools.partial(SGD, lr=0.1, weight_decay=0.5), lr_scheduler=None)
    net.recipe = Recipe(decay_norm_and_bias=False)
    optimizer = net.optimizer_factory(net.learner_groups())
    before = state(net.student)
    for parameter in net.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.student.named_parameters():
        assert torch.allclose(parameter, before[name] * (0.95 if parameter.ndim > 1 else 1.0)), name


# ---------------------------------------------------------------- warm-up and lengths


def by_hand(schedule, warmup: int, steps: int, metrics: list[float]) -> list[list[float]]:
    """Rates of two groups: those of the schedule alone, times 1/(n+1), 2/(n+1), ... in a warm-up of n steps."""
    optimizer = two_groups()
    scheduler, rates = schedule(optimizer), []
    for step in range(steps):
        factor = (step + 1) / (warmup + 1) if step < warmup else 1.0
        rates.append([group["lr"] * factor for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(metrics[step])
        else:
            scheduler.step()
    return rates


def two_groups() -> SGD:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    return SGD([{"params": [first]}, {"params": [second], "lr": 0.02}], lr=0.2, momentum=0.9)


@pytest.mark.parametrize(
    "schedule",
    [
        functools.partial(MultiStepLR, milestones=[2, 5], gamma=0.1),
        functools.partial(CosineAnnealingLR, T_max=10),
        functools.partial(ReduceLROnPlateau, patience=1, factor=0.5),
        functools.partial(OneCycleLR, max_lr=[0.3, 0.03], total_steps=11),
    ],
    ids=lambda schedule: schedule.func.__name__,
)
@pytest.mark.parametrize("warmup", [1, 3, 20])
def test_warm_up_multiplies_the_rates_of_any_schedule(schedule, warmup):
    metrics = [1.0, 0.9, 0.9, 0.95, 0.95, 0.5, 0.6, 0.6, 0.6, 0.6]
    expected, found = by_hand(schedule, warmup, 10, metrics), []
    optimizer = two_groups()
    warm = WarmUp(schedule(optimizer), warmup)
    for step in range(10):
        if step == 4:  # as in a resumed run
            saved, groups = warm.state_dict(), optimizer.state_dict()
            optimizer = two_groups()
            warm = WarmUp(schedule(optimizer), warmup)
            optimizer.load_state_dict(groups)
            warm.load_state_dict(saved)
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        step_scheduler(warm, metrics[step])
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)
    assert warm.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@both_loops
def test_warm_up_then_milestones(method):
    rates = Rates()
    net = build(method(), decays=[3], lr=0.1, recipe=Recipe(warmup_epochs=2))
    trainer(max_epochs=5, callbacks=[rates], limit_train_batches=1).fit(net, datamodule=Blobs())
    expected = torch.tensor([1 / 3, 2 / 3, 1.0, 0.1, 0.1])
    assert rates.of(0) == pytest.approx((0.1 * expected).tolist())
    if method is ACKD:
        assert rates.of(1) == pytest.approx((0.1 * expected).tolist())


@both_loops
@pytest.mark.parametrize("warmup", [0, 2])
def test_warm_up_then_a_plateau(method, warmup):
    """The monitored loss never improves by the threshold, so every epoch halves the rate."""
    rates, plateau = Rates(), functools.partial(ReduceLROnPlateau, patience=0, threshold=1e9, factor=0.5)
    net = build(method(), lr=0.1, lr_scheduler=plateau, recipe=Recipe(warmup_epochs=warmup))
    trainer(max_epochs=4, callbacks=[rates], limit_train_batches=1).fit(net, datamodule=Blobs())
    factors = [1 / 3, 2 / 3, 1.0, 1.0] if warmup else [1.0] * 4
    expected = [0.1 * factor * decay for factor, decay in zip(factors, (1, 0.5, 0.25, 0.125), strict=True)]
    assert rates.of(0) == pytest.approx(expected)


@both_loops
def test_a_warm_up_before_a_plateau_counts_epochs_without_validation(method):
    rates, plateau = Rates(), functools.partial(ReduceLROnPlateau, patience=0, threshold=1e9, factor=0.5)
    net = build(method(), lr=0.1, lr_scheduler=plateau, recipe=Recipe(warmup_epochs=3))
    run = trainer(max_epochs=8, check_val_every_n_epoch=3, callbacks=[rates], limit_train_batches=1)
    run.fit(net, datamodule=Blobs())
    # each validation halves the rate, and the warm-up ends after three epochs
    assert rates.of(0) == pytest.approx([0.025, 0.05, 0.075, 0.05, 0.05, 0.05, 0.025, 0.025])


def test_a_plateau_of_a_metric_that_is_not_logged_is_refused():
    net = module(lr_scheduler=ReduceLROnPlateau)
    with pytest.raises(ACKDError, match="val/loss"):
        trainer(limit_val_batches=0).fit(net, datamodule=Blobs())


@both_loops
def test_a_plateau_where_validation_is_counted_in_steps_is_refused(method):
    net = build(method(), lr_scheduler=ReduceLROnPlateau)
    with pytest.raises(ACKDError, match="validation is counted in steps"):
        trainer(max_epochs=3, val_check_interval=11, check_val_every_n_epoch=None).fit(net, datamodule=Blobs())


@both_loops
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3}, {"max_epochs": 100, "max_steps": 7}, {"max_epochs": -1, "max_steps": 7}]
)
def test_a_cosine_without_length_ends_with_the_fit(method, interval, limits):
    if interval == "epoch" and "max_steps" in limits:
        return  # the number of epochs is not known
    net = build(method(), lr=0.1, lr_scheduler=COSINE, recipe=Recipe(interval=interval))
    run = trainer(**limits, limit_train_batches=4, limit_val_batches=0)
    run.fit(net, datamodule=Blobs())
    assert all(rate == pytest.approx(0.0, abs=1e-9) for rates in rates_of(run) for rate in rates)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_cosine_of_unknown_length_is_refused(interval):
    net = build(CE(), lr_scheduler=COSINE, recipe=Recipe(interval=interval))
    with pytest.raises(ACKDError, match=f"T_max.*max_{interval}s"):
        trainer(max_epochs=-1).fit(net, datamodule=Blobs())


def test_other_schedules_and_lengths_that_are_given_stay():
    make = functools.partial(build_scheduler, recipe=Recipe(), steps_per_epoch=1.0, length=30.0)
    assert make(functools.partial(CosineAnnealingLR, T_max=5), two_groups()).T_max == 5
    assert make(COSINE, two_groups()).T_max == 30
    assert make(functools.partial(PolynomialLR, total_iters=0), two_groups()).total_iters == 30
    assert make(functools.partial(StepLR, step_size=4), two_groups()).step_size == 4


def test_warm_up_by_step_needs_the_number_of_batches():
    recipe = Recipe(interval="step", warmup_epochs=1)
    with pytest.raises(ACKDError, match="warmup_epochs is 1"):
        build_scheduler(
            functools.partial(StepLR, step_size=1), two_groups(), recipe, steps_per_epoch=float("inf"), length=9.0
        )


def test_warm_up_by_step_works_in_a_fit_of_some_steps():
    rates = Rates("step")
    net = build(CE(), lr=0.1, lr_scheduler=COSINE, recipe=Recipe(interval="step", warmup_epochs=1))
    trainer(max_epochs=-1, max_steps=12, callbacks=[rates], limit_val_batches=0).fit(net, datamodule=Blobs())
    assert rates.of(0)[0] < 0.1 / 4  # 8 batches in an epoch
    assert len(rates.of(0)) == 12


def test_steps_of_the_schedule_are_those_of_the_optimizer_with_accumulated_gradients():
    rates = Rates("step")
    net = build(CE(), lr=0.1, lr_scheduler=COSINE, recipe=Recipe(interval="step", warmup_epochs=1))
    trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[rates], limit_val_batches=0).fit(
        net, datamodule=Blobs()
    )
    expected = by_hand(functools.partial(CosineAnnealingLR, T_max=8), 4, 8, [])
    assert rates.of(0)[::2] == pytest.approx([first / 2 for first, _ in expected])


def test_no_schedule_is_a_constant_rate():
    rates = Rates()
    net = module(lr_scheduler=None, lr=0.1)
    trainer(max_epochs=3, callbacks=[rates], limit_train_batches=1).fit(net, datamodule=Blobs())
    assert rates.seen == [[0.1, 0.1]] * 3


def test_a_tiny_net_trains_with_defaults():
    run = trainer(max_epochs=1)
    run.fit(DistillationModule(TinyNet(), data=build(CE()).data), datamodule=Blobs())
    assert isinstance(run.optimizers[0], SGD)
    assert rates_of(run) == [[0.1]]


class StudentAlone(ACKDModule):
    def configure_optimizers(self):
        return SGD(self.student.parameters(), lr=0.01)


class BackboneAlone(DistillationModule):
    def configure_optimizers(self):
        return [AdamW(self.student.backbone.parameters(), lr=0.01)], []


class WithoutFirstLayer(DistillationModule):
    def configure_optimizers(self):
        return {"optimizer": SGD([each for each in self.student.parameters() if each.ndim < 4], lr=0.01)}


@pytest.mark.parametrize(
    ("kind", "method", "named"),
    [
        (StudentAlone, ACKD(), "method"),
        (StudentAlone, ACKD(discriminator_lr=0.07), "method"),
        (BackboneAlone, ACKD(attention="off"), "student"),
        (WithoutFirstLayer, KD(), "student"),
        (BackboneAlone, CRD(negatives=8), "method"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*times the learning rate")
def test_parameters_that_no_optimizer_gets_are_named(kind, method, named):
    net = build(method, kind=kind)
    said = rf"^{named}\..* in no optimizer .*{kind.__name__}\.configure_optimizers.*learner_groups"
    with pytest.warns(UserWarning, match=said):
        trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(net, datamodule=IndexedBlobs())


@pytest.mark.parametrize("kind", [Own, StudentAlone])
def test_parameters_that_all_have_an_optimizer_or_are_frozen_are_not_named(kind, recwarn):
    net = build(KD(), kind=kind, student=StudentConfig(TinyNet(), freeze=["stem"]))
    trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(net, datamodule=Blobs())
    assert not [each for each in recwarn if "in no optimizer" in str(each.message)]


class Mixin:
    def configure_optimizers(self):
        return AdamW(self.learner_groups(), lr=1e-3)


class Mixed(Mixin, ACKDModule):
    """Takes its optimizer from a class that knows nothing of methods."""


def test_an_optimizer_of_a_mixin_is_completed():
    net = build(ACKD(attention="off"), kind=Mixed)
    trainer(max_epochs=1).fit(net, datamodule=Blobs())
    student, _ = net.trainer.optimizers
    assert {group["lr"] for group in student.param_groups} == {1e-3}


def test_the_plain_data_of_a_factory_stay():
    given = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    assert describe_factory(given) == given


@pytest.mark.parametrize(
    "scheduler",
    [functools.partial(OneCycleLR, max_lr=-0.1, total_steps=9), functools.partial(CosineAnnealingLR, T_max=-3)],
)
def test_a_negative_rate_or_length_is_refused(scheduler):
    with pytest.raises(ACKDError, match="use 0 or more"):
        trainer(max_epochs=1).fit(build(KD(), lr_scheduler=scheduler), datamodule=Blobs())
