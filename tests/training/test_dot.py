"""DOT: one momentum for the gradient of the task, one for that of the distillation."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import TensorDataset

from ackd_lightning import DataInfo, DistillationModule
from ackd_lightning.config.files import config_folder, load_configs, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACKD, CE, KD, SP, VID, Sum
from ackd_lightning.methods.base import is_task_term
from ackd_lightning.methods.description import from_description
from ackd_lightning.training import DOT, Recipe
from ackd_lightning.training.dot import gradients_of
from training.helpers import CLASSES, BadImages, IndexedBlobs, build, largest_difference, sgd, state, teaching, trainer

IMAGES = DataInfo(CLASSES, 16, (0.5,) * 3, (0.5,) * 3)
FRAGMENTS = sorted((config_folder() / "methods").glob("*.yaml"))


def dot(**arguments):
    return functools.partial(DOT, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, **arguments})


class Sixteen(IndexedBlobs):
    """Images of 16 x 16 pixels."""

    def _data(self, seed, count):
        images, *others = super()._data(seed, count).tensors
        return TensorDataset(nn.functional.interpolate(images, 16), *others)


class Steps(Callback):
    """Images and weights of every step."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)


def fitted(method, optimizer, *, epochs=1, recipe=None, **options):
    net = build(method, optimizer=optimizer, decays=[50], recipe=recipe)
    seen = Steps()
    run = trainer(max_epochs=epochs, callbacks=[seen], limit_val_batches=0, **options)
    run.fit(net, IndexedBlobs())
    return net, run, seen


def slow(method, batches, *, lr, momentum, delta, decay, clip=None):
    """Two backward passes and two velocities for each parameter, as in the authors' code."""
    net = build(method, decays=[50])
    net.load_teacher()
    net.train()
    names = dict(net.named_parameters())
    velocities = {name: [torch.zeros_like(each) for _ in range(2)] for name, each in names.items()}
    for batch in batches:
        read = net.as_batch(batch)
        method.set_epoch(0)
        terms = method(*net.outputs(read), read)
        parts = []
        for task in (True, False):
            net.zero_grad()
            loss = sum(method.loss_weights[each] * term for each, term in terms.items() if is_task_term(each) is task)
            loss.backward(retain_graph=True)
            parts.append({name: None if each.grad is None else each.grad.clone() for name, each in names.items()})
        if clip is not None:
            whole = [sum(part[name] for part in parts if part[name] is not None) for name in names]
            norm = torch.stack([each.norm() for each in whole]).norm()
            for part in parts:
                for name, each in part.items():
                    part[name] = None if each is None else each * min(1.0, float(clip / norm))
        with torch.no_grad():
            for name, each in names.items():
                task, distillation = (part[name] for part in parts)
                if task is None or distillation is None:
                    gradient = (distillation if task is None else task) + decay * each
                    velocities[name][0].mul_(momentum).add_(gradient)
                else:
                    velocities[name][0].mul_(momentum - delta).add_(task + decay * each)
                    velocities[name][1].mul_(momentum + delta).add_(distillation)
                each -= lr * (velocities[name][0] + velocities[name][1])
    return state(net)


@pytest.mark.parametrize("make", [KD, VID, lambda: Sum([KD(), SP(weight_sp=1.0)])], ids=["kd", "vid", "sum"])
def test_it_equals_a_slow_reference(make):
    net, _, seen = fitted(make(), dot(delta=0.08))
    expected = slow(make(), seen.batches, lr=0.05, momentum=0.9, delta=0.08, decay=5e-4)
    assert largest_difference(state(net), expected) < 1e-4
    other, _, _ = fitted(make(), sgd())
    assert largest_difference(state(net), state(other)) > 1e-3


def test_clipped_gradients_are_split_in_the_same_proportion():
    net, _, seen = fitted(KD(), dot(delta=0.08), recipe=Recipe(gradient_clip_val=0.05))
    expected = slow(KD(), seen.batches, lr=0.05, momentum=0.9, delta=0.08, decay=5e-4, clip=0.05)
    assert largest_difference(state(net), expected) < 1e-4
    assert largest_difference(state(net), state(fitted(KD(), dot(delta=0.08))[0])) > 1e-4


@pytest.mark.parametrize("make", [KD, VID], ids=["kd", "vid"])
def test_with_equal_momenta_it_is_sgd(make):
    ours, plain = fitted(make(), dot(delta=0.0))[0], fitted(make(), sgd())[0]
    assert largest_difference(state(ours), state(plain)) < 1e-4


def test_scaled_losses_of_16_bit_training_are_unscaled_in_both_parts():
    def net(optimizer):
        half = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
        return state(fitted(KD(), optimizer, plugins=[half])[0])

    assert largest_difference(net(dot(delta=0.0)), net(sgd())) < 1e-3
    assert largest_difference(net(dot(delta=0.08)), net(sgd())) > 1e-3


def test_accumulated_gradients_are_those_of_the_larger_step():
    """Without BatchNorm two batches of 4 are one of 8."""

    def net(batch_size, **options):
        net = build(KD(), optimizer=dot(delta=0.08), decays=[50], norm=False, teacher_norm=False)
        data = IndexedBlobs()
        data.batch_size = data.global_batch = batch_size
        trainer(max_epochs=1, limit_val_batches=0, **options).fit(net, data)
        return state(net)

    assert largest_difference(net(8), net(4, accumulate_grad_batches=2)) < 1e-5


def test_a_run_resumes_bit_for_bit(tmp_path):
    def run(epochs, **options):
        net = build(VID(), optimizer=dot(), decays=[50])
        one = trainer(max_epochs=epochs, limit_val_batches=0)
        one.fit(net, IndexedBlobs(), **options)
        return net, one

    whole, _ = run(2)
    _, first = run(1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    second, _ = run(2, ckpt_path=tmp_path / "first.ckpt")
    assert largest_difference(state(whole), state(second)) == 0.0
    content = torch.load(tmp_path / "first.ckpt", weights_only=True)
    assert content["hyper_parameters"]["optimizer"]["class_path"] == "ackd_lightning.training.DOT"
    again = DistillationModule.load_from_checkpoint(
        tmp_path / "first.ckpt", student=whole.student_config.network, teacher=teaching(), weights_only=True
    )
    assert isinstance(again.optimizer_factory([nn.Parameter(torch.zeros(1))]), DOT)


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_every_method_trains_with_it_or_is_refused_in_one_sentence(path):
    method = from_description(copy.deepcopy(read_config(path)["model"]["method"]))
    manual, weights = bool(method.auxiliary_optimizers()) or path.stem == "acn", method.loss_weights
    both = {is_task_term(name) for name, weight in weights.items() if weight} == {True, False}
    net = build(method, optimizer=dot(lr=1e-3), student="resnet8", data=IMAGES)
    run = trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    if net.automatic_optimization and both:
        before = state(net.student)
        run.fit(net, Sixteen())
        assert all(each.isfinite().all() for each in net.parameters())
        assert largest_difference(before, state(net.student)) > 0
        assert net._dot.state_dict()["state"]
    else:
        assert manual or not both or not net.automatic_optimization
        with pytest.raises(ACKDError, match="optimizer DOT"):
            run.fit(net, Sixteen())


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        (ACKD(), {}, "discriminators"),
        (CE(), {}, "method CE"),
        (KD(weight_kd=0.0), {}, "of distillation"),
        (KD(weight_ce=0.0), {}, "with the labels"),
        (KD(), {"gradient_clip_val": 1.0}, "trainer.gradient_clip_val"),
    ],
    ids=["manual", "no teacher", "no distillation", "no labels", "clipping"],
)
def test_what_has_no_two_gradients_is_refused(method, options, named):
    net = build(method, optimizer=dot(), data=IMAGES, student="resnet8")
    with pytest.raises(ACKDError, match=named):
        trainer(max_epochs=1, **options).fit(net, Sixteen())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"delta": 0.2}, "delta is 0.2"),
        ({"momentum": 0.05}, "momentum 0.05"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"delta": -0.1}, "delta is -0.1"),
    ],
)
def test_bad_arguments_are_refused(arguments, named):
    with pytest.raises(ACKDError, match=named):
        DOT([nn.Parameter(torch.zeros(1))], **arguments)


def test_a_skipped_step_leaves_no_gradient_behind():
    class Indexed(BadImages, IndexedBlobs):
        pass

    net = build(KD(), optimizer=dot(), on_nonfinite="skip", decays=[50])
    with pytest.warns(UserWarning, match="skipped"):
        trainer(max_epochs=1, limit_val_batches=0).fit(net, Indexed())
    assert net.guard.skipped == 1
    assert all(each.isfinite().all() for each in net.parameters())


def test_the_fragment_is_laid_over_a_pair():
    settings, name = load_configs(["digits_resnet20_resnet8", "kd", "recipes/dot"])
    assert settings["model"]["optimizer"]["class_path"] == "ackd_lightning.training.DOT"
    assert settings["model"]["method"]["class_path"] == "ackd_lightning.methods.KD"
    assert name == "digits_resnet20_resnet8+kd+dot"


@pytest.mark.slow
def test_compiled_networks_have_two_gradients(tmp_path):
    pytest.importorskip("torch._inductor")
    net = build(KD(), optimizer=dot(delta=0.08), decays=[50], compile=True)
    trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0).fit(net, IndexedBlobs())
    plain = build(KD(), optimizer=dot(delta=0.08), decays=[50])
    trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0).fit(plain, IndexedBlobs())
    assert largest_difference(state(net), state(plain)) < 1e-3


def test_a_distillation_that_is_constant_at_first_has_no_gradient():
    layer = nn.Linear(1, 1)
    assert gradients_of(torch.zeros(()), list(layer.parameters())) == {}
    assert set(gradients_of(layer.weight.sum(), list(layer.parameters()))) == {layer.weight}


class Late(KD):
    """KD whose term with the labels starts at the second step."""

    started = False

    def forward(self, *outputs):
        terms = super().forward(*outputs)
        late, self.started = not self.started, True
        return {**terms, "ce": terms["ce"].detach() * 0} if late else terms


def test_a_term_with_labels_that_starts_later_has_its_momentum(monkeypatch):
    reached = []
    keep = DOT.keep_distillation
    monkeypatch.setattr(DOT, "keep_distillation", lambda *given, task: (reached.append(task), keep(*given, task=task)))
    net, *_ = fitted(Late(), dot(), limit_train_batches=3)
    first, *others = [[each in task for each in net.student.parameters()] for task in reached]
    assert not any(first)
    assert len(others) == 2
    assert all(all(each) for each in others)
