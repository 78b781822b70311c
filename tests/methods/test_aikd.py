from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import FitInfo, Networks, aikd
from ackd_lightning.methods.aikd import AIKD
from ackd_lightning.methods.aikd_networks import PredictionDiscriminator, gradient_penalty, soft_cross_entropy
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.models.finding import probe
from ackd_lightning.models.freezing import frozen
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.random import mix
from ackd_lightning.types import Batch, NetOutput, NetSpec
from training.helpers import CLASSES, SIZE, TinyNet, largest_difference, state

IMAGES, BATCH, EPOCHS = 12, 4, 3
TARGETS = torch.arange(IMAGES) % CLASSES
PSKD = {"previous": "table", "weight_det": 0.0, "weight_adv": 0.0}


def images() -> Tensor:
    return torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def order(epoch: int) -> list[Tensor]:
    """Indices of every batch of an epoch."""
    return list(torch.randperm(IMAGES, generator=torch.Generator().manual_seed(100 + epoch)).split(BATCH))


class Run:
    """A training of the method on a dozen images, step by step as the training module has it."""

    def __init__(self, *, seed: int = 0, dropout: float = 0.0, epochs: int = EPOCHS, **arguments) -> None:
        torch.manual_seed(seed)
        self.student = BranchyStudent(TinyNet(dropout=dropout), AIKD.branches)
        self.teacher = FrozenTeacher(TinyNet())
        self.method = AIKD(**arguments)
        spec = probe(self.student, SIZE)
        self.method.build(Networks(student=spec, teachers=(spec,), student_network=self.student))
        self.method.begin_fit(FitInfo(epochs=epochs, targets=TARGETS))
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)
        self.auxiliary = self.method.auxiliary_optimizers()
        self.images = images()

    def batch(self, index: Tensor) -> Batch:
        return Batch(self.images[index], TARGETS[index], index)

    def outputs(self, batch: Batch) -> tuple[NetOutput, NetOutput | None, Batch]:
        return self.student(batch.image), self.teacher(batch.image) if self.method.teacher != "none" else None, batch

    def loss(self, *outputs) -> Tensor:
        return weighted_loss(self.method, self.method(*outputs))

    def step(self, epoch: int, number: int) -> None:
        self.method.set_epoch(epoch)
        torch.manual_seed(mix(epoch, number))
        outputs = self.outputs(self.batch(order(epoch)[number]))
        for name, optimizer in self.auxiliary.items():
            optimizer.zero_grad()
            self.method.auxiliary_loss(name, *outputs)[0].backward()
            optimizer.step()
        self.optimizer.zero_grad()
        with frozen(each for parameters in self.method.auxiliary_parameters().values() for each in parameters):
            self.loss(*outputs).backward()
        self.method.update(*outputs)
        self.optimizer.step()

    def train(self, epochs: int = EPOCHS) -> Run:
        for epoch, number in steps(epochs):
            self.step(epoch, number)
        return self

    def checkpoint(self) -> dict:
        parts = [self.student, self.method, self.optimizer, *self.auxiliary.values()]
        file = io.BytesIO()
        torch.save([each.state_dict() for each in parts], file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    def restore(self, checkpoint: dict) -> None:
        parts = [self.student, self.method, self.optimizer, *self.auxiliary.values()]
        for each, saved in zip(parts, checkpoint, strict=True):
            each.load_state_dict(saved)


def steps(epochs: int = EPOCHS) -> Iterator[tuple[int, int]]:
    return ((epoch, number) for epoch in range(epochs) for number in range(IMAGES // BATCH))


def equal(first: nn.Module, second: nn.Module) -> bool:
    return largest_difference(state(first), state(second)) == 0.0


def leaf(seed: int, rows: int = BATCH) -> Tensor:
    return (2 * torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def output(logits: Tensor) -> NetOutput:
    return NetOutput(logits)


class Known(nn.Module):
    """A student whose logits are the images."""

    def forward(self, image: Tensor) -> NetOutput:
        return output(image.flatten(1)[:, :CLASSES])


def bare(**arguments) -> AIKD:
    torch.manual_seed(0)
    method = AIKD(**{"discriminator_hidden": 8, **arguments})
    method.build(Networks(student=NetSpec(CLASSES), student_network=Known()))
    method.begin_fit(FitInfo(epochs=10, targets=TARGETS))
    return method


def bare_batch(index: list[int] | None = None) -> Batch:
    where = torch.tensor(index if index is not None else [1, 6, 3, 8])
    return Batch(images()[where], TARGETS[where], where)


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(sum(math.exp(each - top) for each in row)) + top
    return [each - total for each in row]


# ---------------------------------------------------------------- values


def by_hand(method: AIKD, z_s: Tensor, z_t: Tensor, q: Tensor, target: Tensor) -> dict[str, float]:
    """Every term of one batch, class by class in float64."""
    terms = dict.fromkeys(("ce", "progressive", "det", "adv"), 0.0)
    tau, critic = method.temperature, copy.deepcopy(method.discriminator).double()
    for row, taught, soft, label in zip(z_s.tolist(), z_t.tolist(), q.tolist(), target.tolist(), strict=True):
        log_p = log_softmax(row)
        terms["ce"] -= log_p[label]
        terms["progressive"] -= sum(a * b for a, b in zip(soft, log_p, strict=True))
        p, t = (log_softmax([each / tau for each in logits]) for logits in (row, taught))
        terms["det"] += tau**2 * sum(math.exp(b) * (b - a) for a, b in zip(p, t, strict=True))
        seen = torch.tensor(row if method.discriminator_inputs == "logits" else [math.exp(each) for each in log_p])
        value = seen.double()
        for number, layer in enumerate(critic.layers):
            value = layer.weight @ value + layer.bias
            if number < 2:
                value = torch.where(value > 0, value, 0.2 * value)
        verdict = value.item()
        terms["adv"] += -verdict if method.adversarial_form == "wgan_gp" else math.log1p(math.exp(-verdict))
    return {name: value / len(z_s) for name, value in terms.items()}


@pytest.mark.parametrize("form", ["gan", "wgan_gp"])
@pytest.mark.parametrize("inputs", ["probabilities", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_terms_equal_a_slow_reference(form, inputs, temperature):
    method = bare(adversarial_form=form, discriminator_inputs=inputs, temperature=temperature)
    method.set_epoch(3)
    batch, z_s, z_t = bare_batch(), leaf(1), leaf(2)
    terms = method(output(z_s), output(z_t), batch)
    previous = batch.image.flatten(1)[:, :CLASSES].double().softmax(dim=1)
    for name, value in by_hand(method, z_s, z_t, previous, batch.target).items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5), name
        assert terms[name].dtype is torch.float32


@pytest.mark.parametrize(("epoch", "alpha"), [(0, 0.08), (1, 0.16), (4, 0.4), (9, 0.8), (12, 0.8)])
def test_the_weights_mix_the_target_as_the_epoch_has_it(epoch, alpha):
    method = bare(weight_ce=2.0)
    method.set_epoch(epoch)
    expected = {"ce": 2 * (1 - alpha), "progressive": 2 * alpha, "det": 1.0, "adv": 0.1}
    assert method.loss_weights == pytest.approx(expected)
    logits, batch = leaf(1), bare_batch()
    terms = method(output(logits), output(leaf(2)), batch)
    one_hot = torch.eye(CLASSES)[batch.target]
    previous = one_hot if epoch == 0 else batch.image.flatten(1)[:, :CLASSES].softmax(dim=1)
    mixed = soft_cross_entropy(logits, (1 - alpha) * one_hot + alpha * previous)
    weights = method.loss_weights
    assert (weights["ce"] * terms["ce"] + weights["progressive"] * terms["progressive"]).item() == pytest.approx(
        2 * mixed.item(), rel=1e-5
    )


def test_in_the_first_epoch_the_targets_are_the_labels():
    for arguments in ({}, PSKD):
        terms = bare(**arguments)(output(leaf(1)), output(leaf(2)), bare_batch())
        assert torch.equal(terms["progressive"], terms["ce"])


def test_distillation_is_zero_at_equality_and_the_same_for_shifted_logits():
    method, logits = bare(), leaf(1)
    same = method(output(logits), output(logits.detach()), bare_batch())
    assert same["det"].item() == pytest.approx(0.0, abs=1e-6)
    method.set_epoch(2)
    terms = [method(output(z), output(leaf(2)), bare_batch()) for z in (logits, logits + 3.0)]
    for name, value in terms[0].items():
        assert terms[1][name].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("inputs", ["probabilities", "logits"])
def test_the_discriminators_loss_and_accuracy_equal_a_slow_reference(inputs):
    method, z_s, z_t = bare(discriminator_inputs=inputs), leaf(1), leaf(2)
    loss, values = method.auxiliary_loss("discriminator", output(z_s), output(z_t), bare_batch())
    view = (lambda z: z) if inputs == "logits" else (lambda z: z.softmax(dim=1))
    of_real, of_fake = (method.discriminator(view(z)).sigmoid().tolist() for z in (z_t, z_s))
    expected = -sum(math.log(each) for each in of_real) / BATCH - sum(math.log(1 - each) for each in of_fake) / BATCH
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert values["disc_loss"].item() == loss.item()
    right = sum(each > 0.5 for each in of_real) + sum(each <= 0.5 for each in of_fake)
    assert values["disc_acc"].item() == pytest.approx(right / (2 * BATCH))


def test_the_critics_loss_equals_a_slow_reference():
    method, z_s, z_t = bare(adversarial_form="wgan_gp", gradient_penalty=3.0), leaf(1), leaf(2)
    batch, critic = bare_batch(), method.discriminator
    loss, values = method.auxiliary_loss("discriminator", output(z_s), output(z_t), batch)
    real, fake = z_t.detach().softmax(dim=1), z_s.detach().softmax(dim=1)
    penalty = 0.0
    for share, a, b in zip(method._shares(batch), real, fake, strict=True):
        slope = torch.autograd.functional.jacobian(lambda x: critic(x[None])[0], share * a + (1 - share) * b)
        penalty += (slope.norm().item() - 1) ** 2 / BATCH
    expected = critic(fake).mean() - critic(real).mean() + 3.0 * penalty
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert 0 <= values["disc_acc"] <= 1


def test_the_penalty_of_a_linear_critic_is_that_of_its_slope():
    slope = torch.tensor([3.0, 0.0, 4.0, 0.0]).requires_grad_()
    penalty = gradient_penalty(lambda x: x @ slope, leaf(1), leaf(2), torch.rand(BATCH))
    assert penalty.item() == pytest.approx(16.0)
    penalty.backward()
    assert torch.allclose(slope.grad, 8 * slope.detach() / 5)
    flat = torch.zeros(CLASSES, requires_grad=True)
    gradient_penalty(lambda x: x @ flat, leaf(1), leaf(2), torch.rand(BATCH)).backward()
    assert flat.grad.isfinite().all()


def test_where_the_slope_is_measured_depends_on_epoch_and_image_alone():
    method = bare(adversarial_form="wgan_gp")
    first, second = bare_batch([1, 6, 3, 8]), bare_batch([8, 3, 6, 1])
    shares = method._shares(first)
    assert torch.equal(shares, method._shares(second).flip(0))
    assert ((shares >= 0) & (shares < 1)).all()
    assert len(set(shares.tolist())) == BATCH
    method.set_epoch(1)
    assert not torch.equal(shares, method._shares(first))
    unknown = first._replace(index=torch.full((BATCH,), -1))
    drawn = [(torch.manual_seed(seed), method._shares(unknown))[1] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(set(drawn[0].tolist())) == BATCH


def test_a_term_without_weight_is_not_computed():
    method = bare(weight_progressive=0.0, weight_det=0.0, weight_adv=0.0)
    assert method.teacher == "none"
    assert method.auxiliary_parameters() == {}
    assert method.parameter_groups() == []
    assert [*method.parameters()] == []
    terms = method(output(leaf(1)), None, bare_batch())
    assert {name for name, term in terms.items() if term.item() != 0} == {"ce"}
    assert {name for name, weight in method.loss_weights.items() if weight} == {"ce"}


@pytest.mark.parametrize(
    ("arguments", "teacher", "targets"),
    [
        ({}, True, False),
        ({"weight_det": 0.0}, True, False),
        ({"weight_adv": 0.0}, True, False),
        ({"weight_det": 0.0, "weight_adv": 0.0}, False, False),
        (PSKD, False, True),
        ({"previous": "table", "weight_progressive": 0.0}, True, False),
    ],
)
def test_it_asks_for_what_it_needs(arguments, teacher, targets):
    method = AIKD(**arguments)
    assert method.teacher == ("logits" if teacher else "none")
    method.build(Networks(student=NetSpec(CLASSES), student_network=Known()))
    if targets:
        with pytest.raises(ACKDError, match=r"AIKD.*`train_targets`"):
            method.begin_fit(FitInfo(epochs=10))
    else:
        method.begin_fit(FitInfo(epochs=10))


# ---------------------------------------------------------------- equalities


def pskd_by_hand(net: nn.Module, *, table: bool, share: float = 0.8) -> nn.Module:
    """PS-KD as its paper has it, or with the last epoch's network in the place of the table."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    labels, everything = torch.eye(CLASSES)[TARGETS], images()
    predictions, last = torch.zeros(IMAGES, CLASSES), None
    for epoch in range(EPOCHS):
        alpha = share * (epoch + 1) / EPOCHS
        for index in order(epoch):
            if epoch == 0:
                predictions[index] = labels[index]
            elif not table:
                with torch.no_grad():
                    predictions[index] = last(everything[index]).softmax(dim=1)
            logits = net(everything[index])
            q = (1 - alpha) * labels[index] + alpha * predictions[index]
            loss = (-q * logits.log_softmax(dim=1)).mean(dim=0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if table:
                predictions[index] = logits.detach().softmax(dim=1)
        last = copy.deepcopy(net).eval()
    return net


@pytest.mark.parametrize("previous", ["table", "snapshot"])
def test_without_determinism_and_adversary_it_is_pskd(previous):
    run = Run(**{**PSKD, "previous": previous})
    start = copy.deepcopy(run.student.plain())
    run.train()
    nets = {kind: pskd_by_hand(copy.deepcopy(start), table=kind == "table") for kind in ("table", "snapshot")}
    ours = state(run.student.plain())
    assert largest_difference(ours, state(nets.pop(previous))) < 1e-5
    (other,) = nets.values()
    assert largest_difference(ours, state(other)) > 1e-3
    assert largest_difference(ours, state(pskd_by_hand(copy.deepcopy(start), table=True, share=0.0))) > 1e-3


def test_the_config_is_pskd():
    description = read_config(config_folder() / "methods" / "pskd.yaml")["model"]["method"]
    assert description["init_args"] == PSKD
    assert AIKD(**PSKD).weight_progressive == 0.8


@pytest.mark.parametrize("previous", ["table", "snapshot"])
def test_with_alpha_zero_besides_it_is_plain_training_bit_for_bit(previous):
    run = Run(**{**PSKD, "previous": previous, "weight_progressive": 0.0}, dropout=0.2)
    net = copy.deepcopy(run.student.plain()).train()
    run.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch, number in steps():
        torch.manual_seed(mix(epoch, number))
        index = order(epoch)[number]
        optimizer.zero_grad()
        F.cross_entropy(net(images()[index]), TARGETS[index]).backward()
        optimizer.step()
    assert equal(run.student.plain(), net)


# ---------------------------------------------------------------- the epoch before


def test_the_snapshot_is_the_student_as_an_epoch_ended():
    run = Run()
    assert equal(run.method.snapshot, run.student)
    for number in range(3):
        run.step(0, number)
    ended = copy.deepcopy(run.student)
    assert not equal(run.method.snapshot, ended)
    calls = []
    run.method.snapshot.register_forward_hook(lambda *_: calls.append(1))
    for number in range(3):
        run.step(1, number)
        assert equal(run.method.snapshot, ended)
    assert len(calls) == 3
    assert run.method.epoch_begun.item() == 1
    run.method.set_epoch(2)
    assert equal(run.method.snapshot, run.student)
    assert run.method.state_dict()["snapshot.backbone.stem.1.running_mean"].abs().sum() > 0


def test_the_snapshot_is_not_run_in_the_first_epoch():
    run = Run()
    run.method.snapshot.register_forward_hook(lambda *_: pytest.fail("was run"))
    for number in range(3):
        run.step(0, number)
    assert Run(weight_progressive=0.0).method.snapshot is None
    assert Run(**PSKD).method.snapshot is None


def test_the_snapshot_stays_in_evaluation_mode_and_frozen():
    run = Run(dropout=0.5)
    holder = nn.ModuleList([run.student, run.method])
    for mode in (True, False, True):
        holder.train(mode)
        assert run.student.training is mode
        assert run.method.discriminator.training is mode
        assert not any(each.training for each in run.method.snapshot.modules())
    run.train(2)
    frozen = [*run.method.snapshot.parameters()]
    assert frozen
    assert not any(each.requires_grad or each.grad is not None for each in frozen)
    assert not {id(each) for each in frozen} & {
        id(each) for group in run.method.parameter_groups() for each in group["params"]
    }
    assert not {each.data_ptr() for each in frozen} & {each.data_ptr() for each in run.student.parameters()}


@pytest.mark.parametrize("arguments", [{}, {"adversarial_form": "wgan_gp"}, {"previous": "table"}, PSKD])
@pytest.mark.parametrize("at", [2, 3, 4, 6])  # of three steps an epoch: in the middle and at the end
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(arguments, at):
    arguments = {**arguments, "discriminator_hidden": 8, "discriminator_lr": 0.01, "dropout": 0.2}
    whole = Run(**arguments).train()
    first, second = Run(**arguments), Run(seed=7, **arguments)
    every = list(steps())
    for epoch, number in every[:at]:
        first.step(epoch, number)
    second.restore(first.checkpoint())
    second.teacher = first.teacher
    for epoch, number in every[at:]:
        second.step(epoch, number)
    assert equal(second.student, whole.student)
    assert equal(second.method, whole.method)
    assert ("discriminator.layers.0.weight" in state(whole.method)) is bool(whole.method.auxiliary_parameters())
    assert not equal(first.student, whole.student)


def test_a_checkpoint_of_the_middle_is_not_overwritten_by_a_new_copy():
    run, again = Run().train(1), Run(seed=7)
    run.step(1, 0)
    again.restore(run.checkpoint())
    assert again.method.epoch == 1
    again.method.set_epoch(1)
    assert equal(again.method.snapshot, run.method.snapshot)
    assert not equal(again.method.snapshot, again.student)


def test_a_new_training_forgets_the_last_one():
    for arguments in ({}, PSKD):
        run = Run(**arguments).train(2)
        run.method.set_epoch(0)
        terms = run.method(*run.outputs(run.batch(order(0)[0])))
        assert torch.equal(terms["ce"], terms["progressive"])
        assert run.method.epoch_begun.item() == 0
        assert run.method.table is None or not run.method.table.any()


def test_a_copy_of_both_follows_its_own_student():
    run = Run()
    holder = nn.ModuleList([run.student, run.method])
    student, method = copy.deepcopy(holder)
    assert method.student is student
    assert run.method.student is run.student
    assert not [name for name in run.method.state_dict() if name.startswith("student")]


def test_terms_leave_no_trace():
    for arguments in ({}, {"previous": "table"}):
        run = Run(**arguments).train(2)
        before = state(run.method)
        outputs = run.outputs(run.batch(order(1)[0]))
        first, second = run.method(*outputs), run.method(*outputs)
        run.method.auxiliary_loss("discriminator", *outputs)
        assert largest_difference(state(run.method), before) == 0.0
        assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- table


def test_the_table_holds_what_was_predicted_in_training():
    method, batch = bare(**PSKD), bare_batch([1, 6, 3, 8])
    logits = leaf(1)
    method.update(output(logits), None, batch)
    expected = torch.zeros(IMAGES, CLASSES)
    expected[batch.index] = logits.detach().softmax(dim=1)
    assert torch.equal(method.table, expected)
    assert not method.table.requires_grad
    method.set_epoch(1)
    half = bare_batch([3, 0, 6, 2])  # two rows that were never written
    labels = torch.eye(CLASSES)[half.target]
    rows = method.previous_probabilities(half)
    assert torch.equal(rows, torch.stack([expected[3], labels[1], expected[6], labels[3]]))


def test_an_image_that_stands_in_a_batch_twice_leaves_its_last_prediction():
    method, logits = bare(**PSKD), leaf(1)
    method.update(output(logits), None, bare_batch([5, 2, 5, 5]))
    rows = logits.detach().softmax(dim=1)
    assert torch.equal(method.table[5], rows[3])
    assert torch.equal(method.table[2], rows[1])


def test_two_processes_equal_one(monkeypatch):
    arguments = {"previous": "table", "adversarial_form": "wgan_gp"}
    batch, z_s, z_t = bare_batch([1, 6, 3, 8]), leaf(1), leaf(2)

    def gradients(method: AIKD, part: slice) -> tuple[list[Tensor], Tensor]:
        index = batch.index[part]
        here = output(z_s[part]), output(z_t[part]), Batch(batch.image[part], batch.target[part], index)
        method.set_epoch(1)
        method.table.copy_(torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(3)).softmax(dim=1))
        weights, terms = method.loss_weights, method(*here)
        (student,) = torch.autograd.grad(sum(weights[name] * term for name, term in terms.items()), z_s)
        loss, _ = method.auxiliary_loss("discriminator", *here)
        found = torch.autograd.grad(loss, [*method.discriminator.parameters()], allow_unused=True)
        method.update(*here)
        return [student, *(each for each in found if each is not None)], method.table

    alone, table = gradients(bare(**arguments), slice(None))
    everyone = {torch.int64: batch.index, torch.float32: z_s.detach().softmax(dim=1)}
    monkeypatch.setattr(aikd, "whole_batch", lambda shard: everyone[shard.dtype])
    parts = [gradients(bare(**arguments), slice(rank, None, 2)) for rank in range(2)]
    for one, (first, second) in zip(alone, zip(*(each for each, _ in parts), strict=True), strict=True):
        assert torch.allclose((first + second) / 2, one, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(each, table) for _, each in parts)


def test_a_checkpoint_tells_the_number_of_images_where_nobody_has():
    run = Run(**PSKD).train(2)
    method = AIKD(**PSKD)
    method.build(Networks(student=probe(run.student, SIZE)))
    method.load_state_dict(run.method.state_dict(), strict=True)
    assert torch.equal(method.table, run.method.table)
    assert method.epoch == 1
    method.begin_fit(FitInfo(targets=TARGETS))
    assert torch.equal(method.table, run.method.table)


def test_a_checkpoint_of_other_data_is_refused():
    run = Run(**PSKD)
    method = AIKD(**PSKD)
    method.build(Networks(student=probe(run.student, SIZE)))
    method.begin_fit(FitInfo(targets=TARGETS[:8]))
    with pytest.raises(ACKDError, match=r"has 12 training images for method AIKD and the data have 8; use"):
        method.load_state_dict(run.method.state_dict())


@pytest.mark.parametrize(
    ("index", "target", "message"),
    [
        ([-1, -1, -1, -1], [0, 0, 0, 0], r"is from -1 to -1 and method AIKD has 12 .* set previous"),
        ([0, 1, 2, 12], [0, 1, 2, 0], r"is from 0 to 12 and method AIKD has 12 training images"),
        ([0, 1, 2, 3], [0, 1, 2, 0], r"does not fit batch.target in method AIKD"),
    ],
)
def test_indices_that_do_not_fit_are_refused_from_the_first_step_on(index, target, message):
    method = bare(**PSKD)
    batch = Batch(images()[:4], torch.tensor(target), torch.tensor(index))
    with pytest.raises(ACKDError, match=message):
        method(output(leaf(1)), None, batch)
    with pytest.raises(ACKDError, match=message):
        method.update(output(leaf(1)), None, batch)
    assert not method.table.any()


def test_what_was_not_told_is_asked_for():
    method = AIKD(**PSKD)
    method.build(Networks(student=NetSpec(CLASSES)))
    with pytest.raises(ACKDError, match=r"images are unknown to method .*; call begin_fit"):
        method(output(leaf(1)), None, bare_batch())
    with pytest.raises(ACKDError, match=r"set trainer.max_epochs"):
        method.set_epoch(0)
    AIKD(weight_progressive=0.0).set_epoch(5)
    unattached = AIKD(weight_det=0.0, weight_adv=0.0)
    unattached.begin_fit(FitInfo(epochs=10))
    unattached.set_epoch(1)
    with pytest.raises(ACKDError, match=r"has no student to copy; call build"):
        unattached(output(leaf(1)), None, bare_batch())


# ---------------------------------------------------------------- gradients


def test_every_step_reaches_its_own_parameters_only():
    run = Run().train(2)
    nets = {
        "student": run.student,
        "teacher": run.teacher,
        "snapshot": run.method.snapshot,
        "discriminator": run.method.discriminator,
    }

    def reached() -> set[str]:
        found = {name for name, net in nets.items() if any(each.grad is not None for each in net.parameters())}
        for name in found:
            assert all(each.grad is not None for each in nets[name].parameters())
            nets[name].zero_grad()
        return found

    run.optimizer.zero_grad()
    run.method.discriminator.zero_grad()
    outputs = run.outputs(run.batch(order(1)[0]))
    run.method.auxiliary_loss("discriminator", *outputs)[0].backward()
    assert reached() == {"discriminator"}
    run.method.discriminator.requires_grad_(False)
    terms = run.method(*outputs)
    for name in ("progressive", "det", "adv"):
        terms[name].backward(retain_graph=True)
        assert run.student.backbone.fc.weight.grad.abs().sum() > 0, name
        assert reached() == {"student"}


def test_the_pretrained_network_gets_no_gradient_even_where_it_could():
    method, pretrained, batch = bare(), leaf(2), bare_batch()
    method.set_epoch(1)
    terms = method(output(leaf(1)), output(pretrained), batch)
    torch.stack(list(terms.values())).sum().backward()
    method.auxiliary_loss("discriminator", output(leaf(1)), output(pretrained), batch)[0].backward()
    assert pretrained.grad is None


@pytest.mark.parametrize("form", ["gan", "wgan_gp"])
def test_gradient_steps_train_the_discriminator_and_then_confuse_it(form):
    method = bare(adversarial_form=form, discriminator_lr=0.01, discriminator_hidden=32)
    student, teacher, batch = leaf(1), output(leaf(2).detach()), bare_batch()

    def discriminator_loss() -> tuple[Tensor, float]:
        loss, values = method.auxiliary_loss("discriminator", output(student), teacher, batch)
        assert values["disc_loss"].requires_grad is False
        return loss, values["disc_acc"].item()

    optimizer = method.auxiliary_optimizers()["discriminator"]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["betas"] == (0.5, 0.999)
    before = discriminator_loss()[0].item()
    for _ in range(20):
        optimizer.zero_grad()
        discriminator_loss()[0].backward()
        optimizer.step()
    trained, accuracy = discriminator_loss()
    assert trained.item() < before
    assert accuracy > 0.5
    method.discriminator.requires_grad_(False)
    values = []
    for _ in range(20):
        adversarial = method(output(student), teacher, batch)["adv"]
        (gradient,) = torch.autograd.grad(adversarial, student)
        student = (student - 5 * gradient).detach().requires_grad_()
        values.append(adversarial.item())
    assert values[-1] < values[0]
    method.discriminator.requires_grad_(True)
    assert discriminator_loss()[0].item() > trained.item()


@pytest.mark.parametrize("term", ["progressive", "det"])
def test_gradient_steps_lower_the_term(term):
    method, student, teacher, batch = bare(), leaf(1), output(leaf(2).detach()), bare_batch()
    method.set_epoch(5)
    values = []
    for _ in range(20):
        value = method(output(student), teacher, batch)[term]
        (gradient,) = torch.autograd.grad(value, student)
        student = (student - gradient).detach().requires_grad_()
        values.append(value.item())
    assert values[-1] < values[0]


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["gan", "wgan_gp"])
@pytest.mark.parametrize("inputs", ["probabilities", "logits"])
@pytest.mark.parametrize("previous", ["snapshot", "table"])
def test_values_and_gradients_are_finite_at_the_largest_logits(dtype, form, inputs, previous):
    method = bare(adversarial_form=form, discriminator_inputs=inputs, previous=previous)
    student = torch.full((BATCH, CLASSES), -6e4, dtype=dtype)
    student[:, 1] = 6e4
    teacher, batch = -student, bare_batch()
    batch.image.flatten(1)[:, :CLASSES] = -6e4
    student.requires_grad_()
    method.update(output(-student), None, batch)
    method.set_epoch(1)
    terms = method(output(student), output(teacher), batch._replace(image=batch.image.to(dtype)))
    for name, term in terms.items():
        assert term.dtype is torch.float32, name
        assert term.isfinite(), name
        (gradient,) = torch.autograd.grad(term, student, retain_graph=True)
        assert gradient.isfinite().all(), name
    assert terms["progressive"] > 1e4
    loss, values = method.auxiliary_loss("discriminator", output(student), output(teacher), batch)
    loss.backward()
    assert loss.dtype is torch.float32
    assert all(value.isfinite() for value in (loss, *values.values()))
    # the last bias moves a critic's two means alike, so that its penalised loss does not depend on it
    assert all(each.grad is None or each.grad.isfinite().all() for each in method.discriminator.parameters())


@pytest.mark.parametrize("form", ["gan", "wgan_gp"])
def test_the_discriminator_computes_in_float32_under_autocast(form):
    method, z_s, z_t, batch = bare(adversarial_form=form), leaf(1), leaf(2), bare_batch()
    results = []
    for enabled in (False, True):
        method.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, _ = method.auxiliary_loss("discriminator", output(z_s), output(z_t), batch)
            adversarial = method(output(z_s), output(z_t), batch)["adv"]
        loss.backward()
        results.append([loss, adversarial, *(each.grad.clone() for each in method.discriminator.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_discriminator_works_where_weights_are_in_half_precision():
    torch.manual_seed(0)
    net = PredictionDiscriminator(CLASSES, 8).bfloat16()
    verdict = net(leaf(1).bfloat16())
    assert verdict.shape == (BATCH,)
    assert verdict.dtype is torch.float32


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"previous": "epoch"}, r"previous is 'epoch' in AIKD; it must be 'snapshot' or 'table'"),
        ({"adversarial_form": "lsgan"}, r"adversarial_form is 'lsgan' in AIKD; it must be 'gan' or 'wgan_gp'"),
        ({"discriminator_inputs": "x"}, r"discriminator_inputs is 'x' in AIKD; it must be 'probabilities' or"),
        ({"weight_ce": -1.0}, r"weight_ce is -1.0 in AIKD; it must be at least 0"),
        ({"weight_progressive": 1.5}, r"weight_progressive is 1.5 in AIKD; it must be at least 0 and at most 1"),
        ({"weight_progressive": -0.1}, r"weight_progressive is -0.1 in AIKD; it must be at least 0 and at most 1"),
        ({"weight_progressive": math.nan}, r"weight_progressive is nan in AIKD"),
        ({"weight_det": -1.0}, r"weight_det is -1.0 in AIKD; it must be at least 0"),
        ({"weight_det": math.inf}, r"weight_det is inf in AIKD"),
        ({"weight_adv": -0.1}, r"weight_adv is -0.1 in AIKD; it must be at least 0"),
        ({"temperature": 0.0}, r"temperature is 0.0 in AIKD; it must be above 0"),
        ({"gradient_penalty": -1.0}, r"gradient_penalty is -1.0 in AIKD; it must be at least 0"),
        ({"discriminator_hidden": 0}, r"discriminator_hidden is 0 in AIKD; it must be at least 1 and at most 65536"),
        ({"discriminator_lr": 0.0}, r"discriminator_lr is 0.0 in AIKD; it must be above 0"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ACKDError, match=message):
        AIKD(**arguments)
