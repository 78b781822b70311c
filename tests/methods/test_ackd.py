from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.config.files import find_config, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import standardized
from ackd_lightning.methods import ACKD
from ackd_lightning.methods.base import Networks, weighted_loss
from ackd_lightning.methods.description import from_description
from ackd_lightning.models.finding import probe
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import Batch, NetSpec
from methods.helpers import twenty_steps

TERMS = {"ce", "ce_aux", "kd_aux", "kd_target", "kd_direct", "adv"}


def made(scene_, **arguments) -> ACKD:
    torch.manual_seed(0)
    method = ACKD(**arguments)
    method.build(Networks(student=scene_.spec))
    return method


def divergence(p_logits: Tensor, q_logits: Tensor, tau: float, *, scale: bool = True) -> float:
    """KL(p || q) written out, mean over images, in float64."""
    p, q = ((each.detach().double() / tau).exp() for each in (p_logits, q_logits))
    p, q = (each / each.sum(dim=1, keepdim=True) for each in (p, q))
    value = sum((p[b, c] * math.log(p[b, c] / q[b, c])).item() for b in range(len(p)) for c in range(p.shape[1]))
    return value / len(p) * (tau**2 if scale else 1.0)


def by_direction(learner: Tensor, target: Tensor, direction: str, tau: float, *, scale: bool = True) -> float:
    if direction == "forward":
        return divergence(target, learner, tau, scale=scale)
    if direction == "reverse":
        return divergence(learner, target, tau, scale=scale)
    p, q = ((each.detach().double() / tau).softmax(dim=1) for each in (learner, target))
    middle = ((p + q) / 2).log() * tau
    return 0.5 * (divergence(learner, middle, tau, scale=scale) + divergence(target, middle, tau, scale=scale))


def group_of(method: ACKD, here) -> Tensor:
    """Eq. 3 by hand, for pooled features."""
    x = torch.cat([h.mean(dim=(2, 3)) for h in here.h], dim=1)
    a = method.attention.mlp(x).softmax(dim=1)
    return sum(a[:, k : k + 1] * z for k, z in enumerate(here.z))


def by_formula(method: ACKD, here) -> tuple[float, float]:
    """Eq. 5 by hand with right and with flipped labels."""
    M = len(here.h)
    values = [0.0, 0.0]
    for i, j in product(range(M), range(M)):
        d = method.discriminators.nets[i](here.h[j]).sigmoid()
        share = 1 / M if i == j else 1 / (M * (M - 1))
        right, wrong = d.log().mean().item(), (1 - d).log().mean().item()
        values[0] += share * (right if i == j else wrong)
        values[1] += share * (wrong if i == j else right)
    return values[0], values[1]


@pytest.fixture(scope="module")
def real() -> tuple[BranchyStudent, NetSpec, Batch, Tensor]:
    torch.manual_seed(0)
    student = BranchyStudent(create_model("resnet8", 5), ["D3B1", "D2B2"])
    batch = Batch(torch.randn(2, 3, 16, 16), torch.tensor([1, 4]), torch.arange(2))
    return student, probe(student, 16), batch, torch.randn(2, 5)


def test_terms_of_the_default_equal_the_formulas(scene):
    here = scene(2)
    method = made(here)
    terms = method(here.student, here.teacher, here.batch)
    assert set(terms) == set(method.loss_weights) == TERMS
    assert all(term.shape == () and term.dtype is torch.float32 for term in terms.values())
    group = group_of(method, here)

    def ce(z: Tensor) -> float:
        return -z.log_softmax(dim=1)[range(4), here.batch.target].mean().item()

    assert terms["ce"].item() == pytest.approx(ce(here.z_s), rel=1e-5)
    assert terms["ce_aux"].item() == pytest.approx(sum(ce(z) for z in here.z), rel=1e-5)
    assert terms["kd_aux"].item() == pytest.approx(divergence(here.z_t, group, 4.0), rel=1e-4)
    assert terms["kd_target"].item() == pytest.approx(divergence(group, here.z_s, 4.0), rel=1e-4)
    assert terms["kd_direct"].item() == pytest.approx(divergence(here.z_t, here.z_s, 4.0), rel=1e-4)
    assert terms["adv"].item() == pytest.approx(by_formula(method, here)[0], rel=1e-5)


def test_the_group_of_the_default_is_equation_3(scene):
    here = scene(3)
    method = made(here)
    torch.testing.assert_close(method.ensemble(here.student), group_of(method, here))


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_directions_temperature_and_scale(scene, direction, scale, temperature):
    here = scene(2)
    arguments = {"temperature": temperature, "scale_temperature": scale}
    group = group_of(made(here), here)
    aux = made(here, direction_aux=direction, **arguments)(here.student, here.teacher, here.batch)
    expected = by_direction(group, here.z_t, direction, temperature, scale=scale)
    assert aux["kd_aux"].item() == pytest.approx(expected, rel=1e-3)
    expected = divergence(group, here.z_s, temperature, scale=scale)
    assert aux["kd_target"].item() == pytest.approx(expected, rel=1e-3)  # the other one stays forward
    target = made(here, direction_target=direction, **arguments)(here.student, here.teacher, here.batch)
    expected = by_direction(here.z_s, group, direction, temperature, scale=scale)
    assert target["kd_target"].item() == pytest.approx(expected, rel=1e-3)
    expected = divergence(here.z_t, group, temperature, scale=scale)
    assert target["kd_aux"].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("standardize", [True, False])
def test_equation_6_may_have_a_temperature_of_its_own(scene, standardize):
    here = scene(2)
    group = group_of(made(here), here)
    here_too = {"standardize": standardize, "temperature": 4.0}
    usual = made(here, **here_too)(here.student, here.teacher, here.batch)
    terms = made(here, temperature_target=1.0, **here_too)(here.student, here.teacher, here.batch)
    sides = [standardized(z) if standardize else z for z in (group, here.z_s)]
    assert terms["kd_target"].item() == pytest.approx(divergence(*sides, 1.0), rel=1e-3)
    assert terms["kd_target"].item() != pytest.approx(usual["kd_target"].item(), rel=1e-2)
    assert {name: terms[name].item() for name in ("kd_aux", "kd_direct")} == {
        name: usual[name].item() for name in ("kd_aux", "kd_direct")
    }


@pytest.mark.parametrize("learners", [2, 3])
def test_who_is_taught(scene, learners):
    here = scene(learners)
    group = divergence(here.z_t, group_of(made(here), here), 4.0)
    each = sum(divergence(here.z_t, z, 4.0) for z in here.z) / learners

    def taught(**arguments) -> float:
        return made(here, **arguments)(here.student, here.teacher, here.batch)["kd_aux"].item()

    assert taught(teach="ensemble") == pytest.approx(group, rel=1e-4)
    assert taught(teach="learners", attention="off") == pytest.approx(each, rel=1e-4)
    assert taught(teach="learners") == pytest.approx(each, rel=1e-4)
    assert taught(teach="both") == pytest.approx(group + each, rel=1e-4)


def test_equation_2_is_zero_when_the_group_equals_the_teacher(scene):
    here = scene(2)
    here.z_t.data.copy_(here.z[0].data)
    here.z[1].data.copy_(here.z[0].data)
    terms = made(here)(here.student, here.teacher, here.batch)
    assert abs(terms["kd_aux"].item()) < 1e-5
    assert terms["kd_target"].item() > 0.01


@pytest.mark.parametrize("inputs", ["pooled", "flattened", "scaled"])
def test_attention_has_the_asked_input_and_width(scene, inputs):
    method = made(scene(2), attention=inputs, attention_hidden=9)
    assert method.attention.inputs == inputs
    assert method.attention.mlp[0].out_features == 9
    weights = method.attention_weights(scene(2).student)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))


def test_without_attention_the_group_is_the_mean_of_logits(scene):
    here = scene(3)
    method = made(here, attention="off")
    torch.testing.assert_close(method.ensemble(here.student), sum(here.z) / 3)
    assert not list(method.attention.parameters())
    assert method.parameter_groups() == []


def test_attention_learns_at_its_own_rate_and_discriminators_are_not_in_its_group(scene):
    method = made(scene(2), attention_lr_scale=0.3)
    (group,) = method.parameter_groups()
    assert group["lr_scale"] == 0.3
    assert [id(each) for each in group["params"]] == [id(each) for each in method.attention.parameters()]
    assert ACKD().lr_scales == {"attention": 0.1}


def test_forms_of_the_game(scene):
    here = scene(3)
    right, flipped = by_formula(made(here), here)

    def adv(**arguments) -> float:
        return made(here, **arguments)(here.student, here.teacher, here.batch)["adv"].item()

    assert adv(adversarial="fool", adversarial_form="minimax") == pytest.approx(right, rel=1e-5)
    assert adv(adversarial="fool", adversarial_form="non_saturating") == pytest.approx(-flipped, rel=1e-5)
    assert adv(adversarial="diversify") == pytest.approx(-right, rel=1e-5)
    assert adv(adversarial="off") == 0.0
    assert adv(adversarial="fool") + adv(adversarial="diversify") == pytest.approx(0.0, abs=1e-6)


def test_both_forms_of_fooling_pull_in_the_same_direction_and_diversify_against_them(scene):
    here = scene(2)
    gradients = {}
    for form in ({"adversarial_form": "minimax"}, {"adversarial_form": "non_saturating"}, {"adversarial": "diversify"}):
        value = made(here, **form)(here.student, here.teacher, here.batch)["adv"]
        gradients[next(iter(form.values()))] = here.gradients(value)["h_0"].flatten()
    minimax = gradients["minimax"]
    assert torch.cosine_similarity(minimax, gradients["non_saturating"], dim=0) > 0.5
    torch.testing.assert_close(gradients["diversify"], -minimax)


def test_non_saturating_keeps_its_gradient_when_the_discriminators_win(scene):
    here = scene(2)
    norms = {}
    for form in ("minimax", "non_saturating"):
        method = made(here, adversarial_form=form, branches=["D3B1", "D2B2"])
        # D_i sees the sign of the features' sum and is sure
        here.h[0].data.abs_()
        here.h[1].data.abs_().neg_()
        for sign, net in zip((1.0, -1.0), method.discriminators.nets, strict=True):
            for layer in net:
                if isinstance(layer, nn.Conv2d):
                    nn.init.constant_(layer.weight, 1.0)
                    nn.init.zeros_(layer.bias)
            net[4].bias.data.fill_(-10.0 * sign)
            net[4].weight.data.mul_(sign)
        value = method(here.student, here.teacher, here.batch)["adv"]
        norms[form] = here.gradients(value)["h_0"].norm()
    assert norms["non_saturating"] > 10 * norms["minimax"]


def test_gradients_of_the_default_flow_where_they_should(scene):
    here = scene(2)
    method = made(here)
    terms = method(here.student, here.teacher, here.batch)
    groups, learners = {"h_0", "h_1"}, {"z_0", "z_1"}
    expected = {
        "ce": {"z_s"},
        "ce_aux": learners,
        "kd_aux": learners | groups | {"z_t"},  # the teacher's own output carries no gradient: FrozenTeacher sees to it
        "kd_target": {"z_s"} | learners | groups,
        "kd_direct": {"z_s", "z_t"},
        "adv": groups,
    }
    for name, term in terms.items():
        reached = {leaf for leaf, gradient in here.gradients(term).items() if gradient is not None}
        assert reached == expected[name], name
    mlp = list(method.attention.parameters())
    for name in ("kd_aux", "kd_target"):
        assert all(each.abs().sum() > 0 for each in torch.autograd.grad(terms[name], mlp, None, True)), name


def test_detached_the_group_does_not_learn_from_the_target(scene):
    here = scene(2)
    method = made(here, detach_group=True)
    terms = method(here.student, here.teacher, here.batch)
    gradients = here.gradients(terms["kd_target"])
    assert {leaf for leaf, gradient in gradients.items() if gradient is not None} == {"z_s"}
    mlp = list(method.attention.parameters())
    assert all(each is None for each in torch.autograd.grad(terms["kd_target"], mlp, None, True, allow_unused=True))
    undetached = made(here)(here.student, here.teacher, here.batch)["kd_target"]
    torch.testing.assert_close(terms["kd_target"], undetached)  # the value is the same


@pytest.mark.parametrize(
    "arguments", [{}, {"adversarial_form": "non_saturating"}, {"adversarial": "diversify"}], ids=str
)
def test_the_game_moves_learners_and_trunk_but_not_the_targets_own_layers(real, arguments):
    student, spec, batch, z_t = real
    torch.manual_seed(0)
    method = ACKD(**arguments)
    method.build(Networks(student=spec))
    method.discriminators.requires_grad_(False)  # as in the student's step
    output = student(batch.image)
    student.zero_grad()
    teacher = type(output)(z_t, (), torch.empty(2, 0))
    method(output, teacher, batch)["adv"].backward()
    got = {name: each.grad for name, each in student.named_parameters()}
    for name, gradient in got.items():
        own = name.startswith(("backbone.layer3", "backbone.fc")) or ".fc." in name
        if own:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
    assert got["backbone.conv1.weight"].abs().sum() > 0
    assert got["backbone.layer2.0.conv1.weight"].abs().sum() > 0  # below D3B1
    assert got["branches.0.suffix.network.layer3.0.conv1.weight"].abs().sum() > 0
    assert got["branches.1.suffix.network.layer2.0.conv1.weight"].abs().sum() > 0
    assert all(each.grad is None for each in method.discriminators.parameters())


def test_the_discriminators_loss_reaches_no_student(scene):
    here = scene(2)
    method = made(here)
    loss, logs = method.auxiliary_loss("discriminators", here.student, None, here.batch)
    assert all(gradient is None for gradient in here.gradients(loss).values())
    loss.backward()
    assert all(each.grad is not None for each in method.discriminators.parameters())
    assert all(each.grad is None for each in method.attention.parameters())
    assert loss.item() == pytest.approx(-by_formula(method, here)[0], rel=1e-5)
    assert set(logs) == {"disc_loss", "disc_acc"}
    assert logs["disc_loss"].item() == loss.item()
    assert 0 <= logs["disc_acc"].item() <= 1
    assert not any(value.requires_grad for value in logs.values())


@pytest.mark.parametrize("adversarial", ["fool", "diversify"])
def test_discriminators_always_maximise_the_same_value(scene, adversarial):
    here = scene(2)
    loss, _ = made(here, adversarial=adversarial, adversarial_form="non_saturating").auxiliary_loss(
        "discriminators", here.student, None, here.batch
    )
    assert loss.item() == pytest.approx(-by_formula(made(here), here)[0], rel=1e-5)


def test_inputs_of_the_discriminators(scene):
    here = scene(2)
    assert made(here).discriminators.inputs == "map"
    pooled = made(here, discriminator_inputs="pooled")
    assert pooled.discriminators.inputs == "pooled"
    assert pooled.discriminators.logits(list(here.h)).shape == (2, 2, 4)


def test_optimizers_of_the_discriminators(scene):
    method = made(scene(2), discriminator_lr=0.02)
    optimizer = method.auxiliary_optimizers()["discriminators"]
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.9, 5e-4)
    assert [id(each) for each in group["params"]] == [id(each) for each in method.discriminators.parameters()]
    (group,) = made(scene(2)).auxiliary_optimizers()["discriminators"].param_groups
    assert group["lr_scale"] == 1.0  # of the student's rate
    optimizer = made(scene(2), discriminator_optimizer="adam").auxiliary_optimizers()["discriminators"]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_without_the_game_there_are_no_discriminators(scene):
    method = made(scene(2), adversarial="off")
    assert method.auxiliary_parameters() == {}
    assert list(made(scene(2)).auxiliary_parameters()) == ["discriminators"]


def test_lambdas_are_the_papers_and_each_goes_to_its_term():
    assert ACKD().loss_weights == {"ce": 1, "ce_aux": 1, "kd_aux": 1, "kd_target": 1, "kd_direct": 0, "adv": 1}
    method = ACKD(
        lambda_kd_aux=1.5, lambda_kd_target=2.0, lambda_adv=3.0, lambda_ce=4.0, lambda_ce_aux=5.0, lambda_direct=6.0
    )
    assert method.loss_weights == {
        "ce": 4.0, "ce_aux": 5.0, "kd_aux": 1.5, "kd_target": 2.0, "kd_direct": 6.0, "adv": 3.0
    }  # fmt: skip


def test_the_weight_of_the_game_grows_linearly_from_zero():
    method = ACKD(adversarial_warmup_epochs=4, lambda_adv=2.0)
    seen = []
    for epoch in range(6):
        method.set_epoch(epoch)
        seen.append(method.loss_weights["adv"])
        assert {name: value for name, value in method.loss_weights.items() if name != "adv"} == {
            name: value for name, value in ACKD().loss_weights.items() if name != "adv"
        }
    assert seen == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    plain = ACKD(lambda_adv=2.0)
    plain.set_epoch(0)
    assert plain.loss_weights["adv"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0 in ACKD; it must be above 0"),
        ({"temperature_target": 0.0}, "temperature_target is 0.0 in ACKD; it must be above 0"),
        ({"temperature": -2.0}, "temperature is -2.0"),
        ({"branches": []}, "branches is empty in method ACKD"),
        ({"branches": ["D3B1"]}, r"branches is \['D3B1'\].*add a second branch or set adversarial to off"),
        ({"teach": "learners", "detach_group": True}, "attention has nothing to learn from"),
        ({"teach": "learners", "lambda_kd_target": 0.0}, "nothing to learn from with teach=learners and lambda_kd_"),
    ],
)
def test_values_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ACKDError, match=message):
        ACKD(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"branches": ["D3B1"], "adversarial": "off"},
        {"teach": "learners", "attention": "off"},
        {"teach": "learners"},
    ],
    ids=str,
)
def test_values_that_fit_are_taken(arguments):
    assert isinstance(ACKD(**arguments), ACKD)


def test_a_student_with_too_few_learners_is_refused(scene):
    with pytest.raises(ACKDError, match="needs two branches or more and the student has 1"):
        ACKD().build(Networks(student=scene(1).spec))
    with pytest.raises(ACKDError, match="needs one branch or more and the student has 0"):
        ACKD(adversarial="off").build(Networks(student=scene(0).spec))


def test_one_learner_alone_is_the_group(scene):
    here = scene(1)
    method = made(here, branches=["D3B1"], adversarial="off")
    assert torch.equal(method.ensemble(here.student), here.z[0])
    terms = method(here.student, here.teacher, here.batch)
    assert terms["kd_aux"].item() == pytest.approx(divergence(here.z_t, here.z[0], 4.0), rel=1e-4)
    assert terms["adv"].item() == 0.0


@pytest.mark.parametrize("learners", [2, 3])
def test_equal_attention_has_the_entropy_log_m(scene, learners):
    here = scene(learners)
    numbers = made(here, attention="off").statistics(here.student)
    assert numbers["attention_entropy"].item() == pytest.approx(math.log(learners), rel=1e-6)
    for number in range(learners):
        assert numbers[f"attention_weight_aux{number + 1}"].item() == pytest.approx(1 / learners)


def test_collapsed_attention_has_the_entropy_zero(scene):
    here = scene(2)
    method = made(here)
    before = method.statistics(here.student)["attention_entropy"].item()
    assert 0 < before <= math.log(2)
    with torch.no_grad():
        method.attention.mlp[2].bias.copy_(torch.tensor([200.0, 0.0]))
    numbers = method.statistics(here.student)
    assert numbers["attention_entropy"].item() == pytest.approx(0.0, abs=1e-6)
    assert numbers["attention_weight_aux1"].item() == pytest.approx(1.0)
    assert set(numbers) == {"attention_weight_aux1", "attention_weight_aux2", "attention_entropy"}


def test_the_literal_preset_is_what_the_equations_say(scene):
    method = from_description(read_config(find_config("ackd_literal"))["model"]["method"])
    assert isinstance(method, ACKD)
    here = scene(2)
    torch.manual_seed(0)
    method.build(Networks(student=here.spec))
    assert method.loss_weights == {"ce": 1, "ce_aux": 1, "kd_aux": 1, "kd_target": 1, "kd_direct": 0, "adv": 1}
    assert method.teach == "ensemble"
    assert method.branches is None
    assert method.attention.inputs == "flattened"
    assert method.parameter_groups()[0]["lr_scale"] == 1.0
    terms = method(here.student, here.teacher, here.batch)
    x = torch.cat([h.flatten(1) for h in here.h], dim=1)
    a = method.attention.mlp(x).softmax(dim=1)
    group = a[:, :1] * here.z[0] + a[:, 1:] * here.z[1]
    assert terms["kd_aux"].item() == pytest.approx(divergence(group, here.z_t, 4.0, scale=False), rel=1e-3)
    # Eq. 6 with its sign put right
    assert terms["kd_target"].item() == pytest.approx(divergence(here.z_s, group, 4.0, scale=False), rel=1e-3)
    assert terms["adv"].item() == pytest.approx(by_formula(method, here)[0], rel=1e-5)


def test_ablation_presets_switch_their_part_off():
    parts = {
        name: from_description(read_config(find_config(name))["model"]["method"])
        for name in (
            "ackd",
            "ackd_attention",
            "ackd_adversarial",
            "ackd_collaboration",
            "ackd_diversify",
            "ackd_direct",
            "ackd_teach_all",
        )
    }
    found = {name: (method.attention_inputs, method.adversarial) for name, method in parts.items()}
    assert found == {
        "ackd": ("pooled", "fool"),
        "ackd_attention": ("pooled", "off"),
        "ackd_adversarial": ("off", "fool"),
        "ackd_collaboration": ("off", "off"),
        "ackd_diversify": ("pooled", "diversify"),
        "ackd_direct": ("pooled", "fool"),
        "ackd_teach_all": ("off", "off"),
    }
    assert {
        name: method.loss_weights["kd_direct"] for name, method in parts.items() if method.loss_weights["kd_direct"]
    } == {"ackd_direct": 1.0, "ackd_teach_all": 3.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_give_finite_terms_and_gradients(scene, dtype):
    here = scene(2)
    for number, z in enumerate((here.z_s, here.z_t, *here.z)):
        z.data = (6e4 * (2.0 * torch.eye(5).roll(number, 0)[:4] - 1)).to(dtype)
    terms = made(here)(here.student, here.teacher, here.batch)
    for name, term in terms.items():
        assert term.isfinite(), name
        for leaf, gradient in here.gradients(term).items():
            assert gradient is None or gradient.isfinite().all(), (name, leaf)


def test_twenty_steps_lower_the_loss(scene):
    here = scene(2)
    method = made(here, adversarial="off")
    leaves = [here.z_s, *here.z, *method.attention.parameters()]
    losses = twenty_steps(
        lambda: weighted_loss(method, method(here.student, here.teacher, here.batch)), leaves, lr=0.05
    )
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]
