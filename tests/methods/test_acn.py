from __future__ import annotations

import copy
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning import DataInfo, DistillationModule
from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import mean_log_probability
from ackd_lightning.methods import ACN
from ackd_lightning.methods.acn_losses import disagreement, js_divergence
from ackd_lightning.methods.acn_networks import Generator, image_noise
from ackd_lightning.methods.base import FitInfo, Networks
from ackd_lightning.methods.description import describe
from ackd_lightning.methods.peers import mutual_loss
from ackd_lightning.models.finding import probe
from ackd_lightning.models.freezing import evaluated, statistics_kept
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.testing import Harness, RandomImages
from ackd_lightning.types import Batch
from training.helpers import CLASSES, SIZE, TinyNet

IMAGES = 6
OPTIMIZERS = ("image_discriminator", "generator")


class Run:
    """Method and student, made as the training module makes them; no warm-up unless told."""

    def __init__(self, *, norm: bool = True, **arguments) -> None:
        torch.manual_seed(11)
        self.method = ACN(**{"generator_width": 4, "warmup_epochs": 0, **arguments})
        data = RandomImages(num_classes=CLASSES, input_size=SIZE)  # whose pixels are from -2 to 2
        self.harness = Harness(self.method, student=TinyNet(norm=norm), teacher=(), data=data, seed=11)
        self.student = self.harness.module.student
        self.batch = batch()

    def terms(self, given: Batch | None = None) -> dict[str, Tensor]:
        return self.harness.terms(given or self.batch)

    def loss(self, given: Batch | None = None) -> Tensor:
        return self.harness.loss(given or self.batch)

    def auxiliary(self, name: str, given: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        result = self.method.auxiliary_loss(name, *self.harness.outputs(given or self.batch))
        assert result is not None
        return result

    def state(self) -> dict[str, Tensor]:
        return {**self.student.state_dict(prefix="student."), **self.method.state_dict(prefix="method.")}

    def every_parameter(self) -> dict[str, nn.Parameter]:
        return {**dict(self.student.named_parameters("student")), **dict(self.method.named_parameters("method"))}


def batch(seed: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(IMAGES) % CLASSES
    image = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator).clamp(-2, 2)
    return Batch(image, target, torch.randperm(100, generator=generator)[:IMAGES])


def logits(count: int, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(13)
    return [scale * torch.randn(IMAGES, CLASSES, generator=generator) for _ in range(count)]


def rows(values: list[Tensor], temperature: float = 1.0) -> list[list[list[float]]]:
    return [(each.detach().double() / temperature).softmax(dim=1).tolist() for each in values]


def slow_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow_entropy(p: list[float]) -> float:
    return -sum(a * math.log(a) for a in p)


def slow_mutual(values: list[Tensor], temperature: float) -> float:
    every, total = rows(values, temperature), 0.0
    for i, j in itertools.permutations(range(len(values)), 2):
        total += sum(slow_kl(p, q) for p, q in zip(every[j], every[i], strict=True)) / len(values[0])
    return temperature**2 * total / (len(values) - 1)


def slow_mean(values: list[Tensor]) -> list[list[float]]:
    return [[sum(cell) / len(values) for cell in zip(*row, strict=True)] for row in zip(*rows(values), strict=True)]


def slow_js(values: list[Tensor]) -> list[float]:
    every, means = rows(values), slow_mean(values)
    return [
        slow_entropy(mean) - sum(slow_entropy(own[b]) for own in every) / len(values) for b, mean in enumerate(means)
    ]


def slow_ce(values: Tensor, target: Tensor) -> float:
    (every,) = rows([values])
    return -sum(math.log(row[int(label)]) for row, label in zip(every, target, strict=True)) / len(target)


def eval_logits(student: BranchyStudent, image: Tensor) -> list[Tensor]:
    """Of a copy in evaluation mode."""
    with torch.no_grad():
        out = copy.deepcopy(student).eval()(image)
    return [out.logits, *(each.logits for each in out.branches)]


# ------------------------------------------------------------------------------------------------------ functions


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_mutual_distillation_equals_a_slow_reference(count, temperature):
    values = logits(count)
    expected = slow_mutual(values, temperature)
    assert mutual_loss(values, temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


def test_mutual_distillation_teaches_every_classifier_and_is_zero_at_equality():
    values = [each.requires_grad_() for each in logits(3)]
    gradients = torch.autograd.grad(mutual_loss(values, temperature=3.0), values)
    for own, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        fresh = value.detach().requires_grad_()  # every other one is a constant
        alone = sum(
            9 * F.kl_div((fresh / 3).log_softmax(1), (other.detach() / 3).softmax(1), reduction="batchmean") / 2
            for j, other in enumerate(values)
            if j != own
        )
        torch.testing.assert_close(gradient, *torch.autograd.grad(alone, fresh))
    same = logits(1) * 3
    assert mutual_loss(same, temperature=3.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.1, 3.0, 15.0])
def test_divergence_equals_its_definition_and_keeps_its_bounds(count, scale):
    values = logits(count, scale)
    found = js_divergence(values)
    assert found.tolist() == pytest.approx(slow_js(values), rel=1e-4, abs=1e-6)
    assert (found >= -1e-6).all()
    assert (found <= math.log(count) + 1e-6).all()
    torch.testing.assert_close(js_divergence(values[::-1]), found)


def test_divergence_at_its_ends():
    sure = [100 * F.one_hot(torch.full((2,), own), CLASSES).float() for own in range(3)]
    assert js_divergence(sure).tolist() == pytest.approx([math.log(3)] * 2)
    assert js_divergence(logits(1) * 3).tolist() == pytest.approx([0.0] * IMAGES, abs=1e-6)


def test_mean_prediction_and_disagreement():
    values = logits(3)
    assert mean_log_probability(values).exp().tolist() == [pytest.approx(row, rel=1e-5) for row in slow_mean(values)]
    answers = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0], [0, 2, 2, 1]])
    assert disagreement([F.one_hot(each, CLASSES).float() for each in answers]).item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients_are_finite_at_the_largest_logits(dtype):
    first = torch.full((2, CLASSES), -6e4, dtype=dtype)
    first[:, 1] = 6e4
    values = [first.requires_grad_(), (-first.detach()).requires_grad_()]
    hinge = F.nll_loss(mean_log_probability(values), torch.tensor([0, 2]))
    for loss in (mutual_loss(values, temperature=3.0), js_divergence(values).sum(), hinge):
        assert loss.dtype is torch.float32
        assert loss.isfinite()
        assert all(each.isfinite().all() for each in torch.autograd.grad(loss, values))


# ------------------------------------------------------------------------------------------------ co-distillation


@pytest.mark.parametrize("classifiers", [("peer",), ("peer", "peer")])
def test_terms_equal_a_slow_reference(classifiers):
    run = Run(classifiers=classifiers)
    output = run.student(run.batch.image)
    terms = run.method(output, None, run.batch)
    own = [output.logits, *(each.logits for each in output.branches)]
    target = run.batch.target
    assert len(own) == 1 + len(classifiers)
    assert terms["ce"].item() == pytest.approx(slow_ce(own[0], target), rel=1e-5)
    assert terms["ce_aux"].item() == pytest.approx(sum(slow_ce(each, target) for each in own[1:]), rel=1e-5)
    assert terms["mutual"].item() == pytest.approx(slow_mutual(own, 3.0), rel=1e-4)
    made = 0.5 * run.batch.image + 0.5 * run.method.generator.paint(
        run.batch.image, image_noise(run.batch.index, 0, SIZE, SIZE)
    )
    out = copy.deepcopy(run.student)(made.detach())  # training mode: statistics of the generated batch
    other = [out.logits, *(each.logits for each in out.branches)]
    expected = sum(slow_ce(each, target) for each in other) + slow_mutual(other, 3.0)
    assert terms["generated"].item() == pytest.approx(expected, rel=1e-4)
    group = run.method.ensemble(output)
    torch.testing.assert_close(group, sum(own) / len(own))
    statistics = run.method.statistics(output)
    assert statistics["divergence_js"].item() == pytest.approx(sum(slow_js(own)) / IMAGES, rel=1e-4)
    assert statistics["divergence_rate"] == disagreement(own)


def test_generated_images_teach_the_classifiers_and_leave_statistics_and_generator_alone():
    run = Run()
    output = run.student(run.batch.image)
    before = copy.deepcopy(run.state())
    term = run.method(output, None, run.batch)["generated"]
    term.backward()
    after = run.state()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(each.grad is not None for each in run.student.parameters())
    assert all(each.grad is None for each in run.method.parameters())
    layers = [each for each in run.student.modules() if isinstance(each, nn.BatchNorm2d)]
    assert layers
    assert all(layer.track_running_stats and layer.training for layer in layers)
    run.student(run.batch.image)
    assert not torch.equal(
        run.student.state_dict()["backbone.stem.1.running_mean"], before["student.backbone.stem.1.running_mean"]
    )


def test_generated_images_have_the_weighted_labels_of_their_images():
    run = Run()
    shares = F.one_hot(run.batch.target, CLASSES).float()
    one, none, tenfold = (run.terms(run.batch._replace(soft=each * shares))["generated"].item() for each in (1, 0, 10))
    assert one == pytest.approx(run.terms()["generated"].item(), rel=1e-5)
    assert none < one - 0.1  # what the classifiers teach each other
    assert tenfold - none == pytest.approx(10 * (one - none), rel=1e-4)


def test_statistics_are_followed_again_after_an_error():
    student = Run().student
    with pytest.raises(ZeroDivisionError), statistics_kept(student):
        raise ZeroDivisionError
    assert all(each.track_running_stats for each in student.modules() if isinstance(each, nn.BatchNorm2d))


class PlainDML:
    """Deep mutual learning as anyone would write it down: K networks, one optimizer each, one forward pass each."""

    def __init__(self, nets: list[nn.Module]) -> None:
        self.nets = nets
        self.optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for each in nets]

    def step(self, given: Batch) -> None:
        outputs = [net(given.image) for net in self.nets]
        for own, optimizer in enumerate(self.optimizers):
            loss = F.cross_entropy(outputs[own], given.target)
            for other, output in enumerate(outputs):
                if other != own:
                    p = output.detach().softmax(dim=1)
                    kl = (p * (p.log() - outputs[own].log_softmax(dim=1))).sum(dim=1).mean()
                    loss = loss + kl / (len(outputs) - 1)
            optimizer.zero_grad()
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("classifiers", [("peer",), ("peer", "peer")])
def test_without_generated_images_it_is_deep_mutual_learning(classifiers):
    description = read_config(config_folder() / "methods" / "dml.yaml")["model"]["method"]
    run = Run(**{**description["init_args"], "classifiers": classifiers})
    nets = [run.student.backbone, *(each.network for each in run.student.branches)]
    plain = PlainDML(copy.deepcopy(nets))
    optimizer = torch.optim.SGD(run.student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    before = copy.deepcopy(nets[0].state_dict())
    for seed in range(6):
        given = batch(seed)
        plain.step(given)
        optimizer.zero_grad()
        run.loss(given).backward()
        optimizer.step()
    for ours, theirs in zip(nets, plain.nets, strict=True):
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(nets[0].state_dict()["fc.weight"], before["fc.weight"], atol=1e-2)


def test_dml_has_no_generator():
    run = Run(weight_generated=0.0)
    assert run.method.auxiliary_parameters() == {}
    assert not list(run.method.parameters())
    assert run.method.examples(run.batch) is None
    assert run.terms()["generated"].item() == 0
    assert not Run(weight_generated=0.0).method.is_searching
    with pytest.raises(ACKDError, match="has no generator; set weight_generated above 0"):
        run.method.make(run.batch)


def test_the_two_configurations():
    folder = config_folder() / "methods"
    acn, dml = (read_config(folder / f"{name}.yaml")["model"] for name in ("acn", "dml"))
    assert acn["method"]["class_path"] == dml["method"]["class_path"] == "ackd_lightning.methods.ACN"
    assert "init_args" not in acn["method"]
    assert dml["method"]["init_args"] == {"weight_generated": 0.0, "temperature": 1.0}


# --------------------------------------------------------------------------------------------- adversarial phase


def test_the_discriminators_loss_and_accuracy():
    run = Run()
    with torch.no_grad():
        made = run.method.make(run.batch)
    loss, values = run.auxiliary("image_discriminator")
    judge = copy.deepcopy(run.method.image_discriminator).eval()  # after its own pass has moved the vectors
    real, fake = judge(run.batch.image).double(), judge(made).double()
    expected = -torch.log(real.sigmoid()).mean() - torch.log(1 - fake.sigmoid()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert values["disc_loss"].item() == loss.item()
    right = [*(real.flatten() > 0).tolist(), *(fake.flatten() < 0).tolist()]
    assert values["disc_acc"].item() == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("margin", [1.4, None])
@pytest.mark.parametrize("cap", [0.01, 0.5, 1.0])
def test_the_generators_loss_and_numbers(cap, margin):
    run = Run(
        cap=cap, margin=margin, weight_gan=0.3, weight_divergence=2.0, weight_label=0.7, classifiers=("peer",) * 2
    )
    with torch.no_grad():
        made = run.method.make(run.batch)
        for net in (run.student.backbone, *(each.network for each in run.student.branches)):
            net.fc.weight.mul_(20)  # classifiers with opinions
    opinion = copy.deepcopy(run.method.image_discriminator).eval()(made).double()
    loss, values = run.auxiliary("generator")
    learners = eval_logits(run.student, made)
    divergences, means = slow_js(learners), slow_mean(learners)
    short = sum(max(0.0, cap * math.log(3) - each) for each in divergences) / IMAGES
    unknown = [-math.log(row[int(label)]) for row, label in zip(means, run.batch.target, strict=True)]
    assert margin is None or min(unknown) < margin < max(unknown)
    hinge = sum(max(0.0, each - margin) for each in unknown) / IMAGES if margin is not None else 0.0
    expected = 2.0 * short + 0.7 * hinge - 0.3 * opinion.sigmoid().log().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert short > 0 or cap < 0.1
    assert values["generator_loss"].item() == loss.item()
    assert values["generator_js"].item() == pytest.approx(sum(divergences) / IMAGES, rel=1e-4)
    assert values["generator_divergence"] == disagreement(learners)
    known = [row.index(max(row)) == int(label) for row, label in zip(means, run.batch.target, strict=True)]
    assert values["generator_label_consistency"].item() == pytest.approx(sum(known) / IMAGES)
    assert values["generator_change"].item() == pytest.approx((made - run.batch.image).abs().mean().item(), rel=1e-5)
    assert "generator_rho" not in values
    assert all(not each.requires_grad for each in values.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("residual", ["convex", "learned", "additive"])
def test_an_auxiliary_loss_reaches_its_own_parameters_only_and_leaves_everything_as_it_was(name, residual):
    run = Run(residual=residual)
    run.student.backbone.two.eval()  # as some keep frozen stages
    run.student.backbone.stem[0].weight.requires_grad_(False)
    flags = {name: each.requires_grad for name, each in run.every_parameter().items()}
    modes = [each.training for each in (*run.student.modules(), *run.method.modules())]
    output = run.student(run.batch.image)
    before = copy.deepcopy(run.state())
    loss, _ = run.method.auxiliary_loss(name, output, None, run.batch)
    assert modes == [each.training for each in (*run.student.modules(), *run.method.modules())]
    assert flags == {name: each.requires_grad for name, each in run.every_parameter().items()}
    after = run.state()
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert all("image_discriminator" in key and key.endswith(("_u", "_v")) for key in changed)
    assert bool(changed) is (name == "image_discriminator")
    loss.backward()
    own = {id(each) for each in run.method.auxiliary_parameters()[name]}
    for name, parameter in run.every_parameter().items():
        assert (parameter.grad is not None) is (id(parameter) in own), name
        assert parameter.grad is None or parameter.grad.isfinite().all()
    run.loss().backward()  # the graph of the student's step is untouched


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_an_auxiliary_optimizer_lower_its_loss(name):
    run = Run(adversary_lr=5e-3)
    optimizer = run.method.auxiliary_optimizers()[name]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 5e-3
    assert optimizer.defaults["betas"] == (0.5, 0.999)
    first = run.auxiliary(name)[0].item()
    for _ in range(20):
        optimizer.zero_grad()
        run.auxiliary(name)[0].backward()
        optimizer.step()
    assert run.auxiliary(name)[0].item() < first - 0.05


def test_steps_of_the_generator_raise_the_divergence():
    run = Run(adversary_lr=1e-2, weight_gan=0.0, weight_label=0.0, cap=1.0, rho=0.2)
    with torch.no_grad():
        for net in (run.student.backbone, run.student.branches[0].network):
            net.fc.weight.mul_(10)
    assert list(run.method.auxiliary_parameters()) == ["generator"]  # nobody asks a discriminator
    optimizer = run.method.auxiliary_optimizers()["generator"]
    first = run.auxiliary("generator")[1]["generator_js"].item()
    for _ in range(20):
        optimizer.zero_grad()
        run.auxiliary("generator")[0].backward()
        optimizer.step()
    assert run.auxiliary("generator")[1]["generator_js"].item() > first + 0.1


def test_beyond_the_cap_and_within_the_margin_there_is_nothing_to_gain():
    run = Run(weight_gan=0.0, cap=1e-6, margin=50.0)
    loss, _ = run.auxiliary("generator")
    loss.backward()
    assert loss.item() == 0
    assert all(each.grad.abs().sum() == 0 for each in run.method.auxiliary_parameters()["generator"])


def test_a_learned_rho_is_the_generators_and_is_shown():
    run = Run(residual="learned", rho=0.8)
    loss, values = run.auxiliary("generator")
    assert values["generator_rho"].item() == pytest.approx(0.8)
    loss.backward()
    assert run.method.generator.share.grad.abs() > 0
    assert any(each is run.method.generator.share for each in run.method.auxiliary_parameters()["generator"])


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_any_number_of_channels_with_an_unknown_normalisation(channels):
    student = TinyNet()
    student.stem[0] = nn.Conv2d(channels, 4, 3, padding=1)
    module = DistillationModule(student, method=ACN(warmup_epochs=0), data=DataInfo(CLASSES, SIZE, channels=channels))
    assert module.method.generator.low.flatten().tolist() == [-1.0] * channels
    image = torch.zeros(2, channels, SIZE, SIZE)
    assert module.method.generator(image, torch.zeros(2, 1, SIZE, SIZE)).shape == image.shape


def test_evaluated_networks_are_as_before_after_an_error():
    student = Run().student
    with evaluated(student):
        assert not any(each.training for each in student.modules())
        assert not any(each.requires_grad for each in student.parameters())
    with pytest.raises(ZeroDivisionError), evaluated(student):
        raise ZeroDivisionError
    assert all(each.training for each in student.modules())
    assert all(each.requires_grad for each in student.parameters())


# --------------------------------------------------------------------------------------- keys, warm-up, parts of it


def test_an_image_is_made_of_its_own_key_alone():
    run = Run()
    whole = run.method.make(run.batch)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = Batch(*(each[order] for each in run.batch[:3]))
    torch.testing.assert_close(run.method.make(shuffled), whole[order])
    halves = [Batch(*(each[part] for each in run.batch[:3])) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat([run.method.make(half) for half in halves]), whole)
    torch.manual_seed(99)
    assert torch.equal(run.method.make(run.batch), whole)
    run.method.set_epoch(1)
    assert not torch.allclose(run.method.make(run.batch), whole)


def test_two_halves_of_a_batch_give_the_generators_gradient_of_the_whole():
    run = Run()
    run.student.eval()  # whose running statistics would move from call to call
    own = run.method.auxiliary_parameters()["generator"]
    whole = torch.autograd.grad(run.auxiliary("generator")[0], own)
    halves = [Batch(*(each[part] for each in run.batch[:3])) for part in (slice(0, 3), slice(3, 6))]
    parts = [torch.autograd.grad(run.auxiliary("generator", half)[0], own) for half in halves]
    for total, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close((first + second) / 2, total, rtol=1e-3, atol=1e-5)


def test_nothing_is_generated_in_warm_up():
    run = Run(warmup_epochs=3)
    output = run.student(run.batch.image)
    for epoch, generates in ((0, False), (2, False), (3, True), (7, True)):
        run.method.set_epoch(epoch)
        for name in OPTIMIZERS:
            assert (run.method.auxiliary_loss(name, output, None, run.batch) is not None) is generates
        assert (run.terms()["generated"].item() > 0) is generates
        assert (run.method.examples(run.batch) is not None) is generates
    assert list(run.method.auxiliary_parameters()) == list(OPTIMIZERS)  # their optimizers are there from the start
    assert run.method.loss_weights == {"ce": 1.0, "ce_aux": 1.0, "mutual": 1.0, "generated": 1.0}


@pytest.mark.parametrize(("epochs", "warmup"), [(240, 10), (40, 10), (39, 9), (8, 2), (1, 0)])
def test_the_default_warm_up_is_short_in_a_short_training(epochs, warmup):
    method = ACN()
    assert method.warmup_epochs == 10
    method.begin_fit(FitInfo(epochs=epochs))
    assert method.warmup_epochs == warmup


def test_a_warm_up_that_never_ends_is_told():
    method = ACN(warmup_epochs=8)
    method.begin_fit(FitInfo(epochs=9))
    with pytest.warns(UserWarning, match="generates no images: warmup_epochs is 8 of 8 epochs"):
        method.begin_fit(FitInfo(epochs=8))
    ACN(warmup_epochs=8, weight_generated=0.0).begin_fit(FitInfo(epochs=8))  # makes none anyway


def test_an_unknown_range_is_told_when_a_fit_begins():
    run = Run()
    run.method.knows_range = False
    with pytest.warns(UserWarning, match="pass mean and std of the data"):
        run.method.begin_fit(FitInfo())


def test_the_images_of_a_step_are_made_twice_and_not_more(monkeypatch):
    run, calls = Run(), []
    forward = Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda self, *images: calls.append(1) or forward(self, *images))
    output = run.student(run.batch.image)
    for name in OPTIMIZERS:
        loss, _ = run.method.auxiliary_loss(name, output, None, run.batch)
        loss.backward()
    run.terms()
    assert len(calls) == 2
    run.method.auxiliary_loss("generator", output, None, run.batch)  # alone, it makes its own
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["D3B1", "last"])
def test_a_branch_is_no_classifier(name):
    with pytest.raises(ACKDError, match=f"classifiers names '{name}'"):
        ACN(classifiers=["peer", name])


def test_three_classifiers_of_different_architectures():
    run = Run(classifiers=("peer", "resnet8"))
    names = [type(each.network).__name__ for each in run.student.branches]
    assert names[0] == "TinyNet"
    assert names[1] != "TinyNet"
    run.loss().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in run.student.parameters())
    for name in OPTIMIZERS:
        run.auxiliary(name)[0].backward()
    assert list(run.method.examples(run.batch).predictions) == ["0 student", "1 peer", "2 resnet8"]


def test_the_classifiers_belong_to_the_student_and_a_copy_follows_its_own():
    run = Run()
    assert not [name for name in run.method.state_dict() if "classifier" in name]
    together = nn.ModuleDict({"student": run.student, "method": run.method})
    copied = copy.deepcopy(together)
    assert copied["method"].classifier_nets is copied["student"]
    assert copied["method"].classifier_nets is not run.student
    assert describe(run.method)["init_args"] == {"generator_width": 4, "warmup_epochs": 0}


def test_examples_show_images_and_answers():
    run = Run()
    run.student.backbone.two.eval()
    state = copy.deepcopy(run.student.state_dict())
    modes, drawn = [each.training for each in run.student.modules()], torch.get_rng_state()
    with torch.inference_mode():
        found = run.method.examples(run.batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert modes == [each.training for each in run.student.modules()]
    assert all(each.requires_grad for each in run.student.parameters())
    assert all(torch.equal(value, state[key]) for key, value in run.student.state_dict().items())
    assert torch.equal(found.original, run.batch.image)
    torch.testing.assert_close(found.made, run.method.make(run.batch).detach())
    assert not found.made.requires_grad
    assert torch.equal(found.target, run.batch.target)
    before, after = (eval_logits(run.student, each) for each in (found.original, found.made))
    for name, first, second in zip(("0 student", "1 peer"), before, after, strict=True):
        assert torch.equal(found.predictions[name], torch.stack([first.argmax(1), second.argmax(1)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whole_step_in_half_precision(dtype):
    run = Run()
    with torch.autocast("cpu", dtype=dtype):
        output = run.student(run.batch.image)
        assert output.logits.dtype is dtype
        for name in OPTIMIZERS:
            loss, values = run.method.auxiliary_loss(name, output, None, run.batch)
            optimizer = run.method.auxiliary_optimizers()[name]
            loss.backward()
            optimizer.step()
            for key, value in {"loss": loss, **values}.items():
                assert value.dtype is torch.float32, key
                assert value.isfinite(), key
            for parameter in run.method.auxiliary_parameters()[name]:
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()
        terms = run.method(output, None, run.batch)
        torch.stack(list(terms.values())).sum().backward()
        made = run.method.make(run.batch)
    for name, term in terms.items():
        assert term.dtype is torch.float32, name
        assert term.isfinite(), name
    assert all(each.grad.isfinite().all() for each in run.student.parameters())
    torch.testing.assert_close(made, run.method.make(run.batch), atol=0.05, rtol=0.05)  # the generator as it is now
    run.method.ensemble(output)


def test_learning_lowers_the_loss():
    run = Run(norm=False)
    optimizer = torch.optim.SGD(run.student.parameters(), lr=0.1)
    first = run.loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        run.loss().backward()
        optimizer.step()
    assert run.loss().item() < 0.95 * first


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classifiers", "peer"),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("weight_ce", -1.0),
        ("weight_ce_aux", -0.1),
        ("weight_mutual", math.nan),
        ("weight_generated", -1.0),
        ("weight_gan", math.inf),
        ("weight_divergence", -1.0),
        ("weight_label", -1.0),
        ("rho", -0.1),
        ("rho", 1.1),
        ("rho", math.nan),
        ("residual", "strong"),
        ("cap", 0.0),
        ("cap", 1.5),
        ("margin", -1.0),
        ("warmup_epochs", -1),
        ("generator_width", 0),
        ("generator_width", 5000),
        ("adversary_lr", 0.0),
        ("adversary_lr", math.inf),
    ],
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ACKDError, match=rf"^{name} is .* in (method )?ACN; ") as caught:
        ACN(**{name: value})
    assert repr(value) in str(caught.value)


def test_no_peers_are_refused():
    with pytest.raises(ACKDError, match="classifiers is empty in method ACN"):
        ACN(classifiers=[])


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_a_learned_rho_begins_between_the_ends(rho):
    ACN(rho=rho)
    with pytest.raises(ACKDError, match=f"rho is {rho} in method ACN"):
        ACN(rho=rho, residual="learned")


def test_all_weights_but_that_of_cross_entropy_may_be_zero():
    weights = [name for name in inspect.signature(ACN).parameters if name.startswith("weight_") and name != "weight_ce"]
    run = Run(**dict.fromkeys(weights, 0.0))
    output = run.student(run.batch.image)
    assert {name for name, weight in run.method.loss_weights.items() if weight} == {"ce"}
    assert run.method(output, None, run.batch)["ce"].item() == pytest.approx(
        F.cross_entropy(output.logits, run.batch.target).item()
    )


def test_without_peers_or_classifiers_it_says_what_to_do():
    method = ACN(warmup_epochs=0)
    with pytest.raises(ACKDError, match="needs at least two classifiers and the student has no peer"):
        method.build(Networks(student=probe(BranchyStudent(TinyNet(), ()), SIZE)))
    student = BranchyStudent(TinyNet(), ("peer",))
    method.build(Networks(student=probe(student, SIZE)))
    given = batch()
    with pytest.raises(ACKDError, match="call `build` with the student's network"):
        method(student(given.image), None, given)
    assert ACN.teacher == "none"
