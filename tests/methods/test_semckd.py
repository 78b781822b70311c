from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import FitInfo, Networks, SemCKD
from ackd_lightning.methods.semckd import semckd_loss, similarities, stage_attention
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import twenty_steps

GOLDEN = Path(__file__).parents[1] / "golden"
VALUES = json.loads((GOLDEN / "losses.json").read_text())["semckd"]
CLASSES, IMAGES = 5, 8
STUDENT = NetSpec(CLASSES, ((3, 16, 16), (4, 16, 16), (8, 8, 8), (16, 4, 4)), 16)
TEACHER = NetSpec(CLASSES, ((3, 16, 16), (6, 16, 16), (12, 8, 8), (24, 4, 4)), 24)
PAIRS = list(itertools.product(range(3), range(3)))
LAYERS = {"0": 0, "1": 1, "3": 3, "4": 4, "6": 6}  # of a projection, as the golden numbers them


def output(spec: NetSpec, seed: int, images: int = IMAGES) -> NetOutput:
    generator = torch.Generator().manual_seed(seed)
    features = tuple(torch.randn(images, *shape, generator=generator).requires_grad_() for shape in spec.features)
    logits = torch.randn(images, CLASSES, generator=generator).requires_grad_()
    return NetOutput(logits, features, features[-1].mean(dim=(2, 3)))


def batch_of(images: int = IMAGES) -> Batch:
    return Batch(torch.zeros(images, 3, 2, 2), torch.arange(images) % CLASSES, torch.arange(images))


def method_for(student: NetSpec = STUDENT, teacher: NetSpec = TEACHER, **options: object) -> SemCKD:
    torch.manual_seed(0)
    method = SemCKD(**options)
    method.build(Networks(student=student, teachers=(teacher,)))
    method.begin_fit(FitInfo(batch_size=IMAGES))
    return method


def golden_scene() -> tuple[SemCKD, NetOutput, NetOutput, Batch, dict[str, torch.Tensor]]:
    """The method with the golden's weights, and the golden's features and logits."""
    with np.load(GOLDEN / "losses.npz") as arrays:
        names = [name for name in arrays if name.startswith("sem") or name in ("logits_s", "logits_t", "target")]
        given = {name: torch.from_numpy(arrays[name]) for name in names}
    method = method_for()
    state = {}
    for stage in range(3):
        for ours, theirs in (("queries", "query_weight"), ("keys", "key_weight")):
            for layer, number in (("hidden", 1), ("out", 2)):
                for part in ("weight", "bias"):
                    state[f"{ours}.{stage}.{layer}.{part}"] = given[f"semckd/{theirs}{stage}.linear{number}.{part}"]
    for place, (i, j) in enumerate(PAIRS):
        for number in LAYERS:
            for part in ("weight", "bias"):
                if (found := given.get(f"semckd/regressor{i}{j}.regressor.{number}.{part}")) is not None:
                    state[f"projections.{place}.{number}.{part}"] = found
    method.load_state_dict(state, strict=True)
    pooled = torch.zeros(8, 1)
    student, teacher = (
        NetOutput(
            given[f"logits_{side}"],
            (pooled, *(given[f"sem_{side}_f{stage}"].requires_grad_() for stage in (1, 2, 3))),
            pooled,
        )
        for side in "st"
    )
    return method, student, teacher, Batch(torch.zeros(8, 3, 2, 2), given["target"], torch.arange(8)), given


def test_training_equals_the_golden_of_the_benchmark():
    method, student, teacher, batch, given = golden_scene()
    terms = method(student, teacher, batch)
    expected = VALUES["values"]["semckd_train_mode.loss (BN batch stats; this is what training uses)"]
    assert terms["semckd"].item() == pytest.approx(expected, rel=2e-4)
    total = sum(method.loss_weights[name] * term for name, term in terms.items()).item()
    assert total == pytest.approx(VALUES["values"]["RepDistiller-style total(-r 1 -a 1 -b 400), train mode"], rel=2e-4)
    attention = method.attention(student.features[1:], teacher.features[1:])
    torch.testing.assert_close(attention, given["sem_attention"], rtol=2e-4, atol=1e-6)


def test_value_and_gradient_with_given_statistics_equal_the_golden():
    method, student, teacher, batch, given = golden_scene()
    for place, (i, j) in enumerate(PAIRS):
        for number in (1, 4):
            norm = method.projections[place][number]
            for part in ("running_mean", "running_var"):
                setattr(norm, part, given[f"semckd/regressor{i}{j}.regressor.{number}.{part}"])
    term = method.eval()(student, teacher, batch)["semckd"]
    assert term.item() == pytest.approx(VALUES["values"]["semckd_eval_mode.loss"], rel=2e-4)
    term.backward()
    for stage in (1, 2, 3):
        norm = student.features[stage].grad.norm().item()
        assert norm == pytest.approx(VALUES["grad_l2_eval"][f"sem_s_f{stage}"], rel=1e-3)
        assert teacher.features[stage].grad is None


def test_it_equals_the_printed_equation_in_loops():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 3), (4, 1, 2))
    ours, theirs = ([torch.randn(2, *shape, generator=generator) for shape in shapes * 2] for _ in range(2))
    queries, keys = (torch.randn(2, 2, 3, generator=generator) for _ in range(2))
    total = 0.0
    for b, i in itertools.product(range(2), range(2)):
        powers = [math.exp(float(queries[b, i] @ keys[b, j])) for j in range(2)]
        for j in range(2):
            distance = float(((ours[2 * i + j][b] - theirs[2 * i + j][b]) ** 2).mean())
            total += powers[j] / sum(powers) * distance / (2 * 2)
    assert semckd_loss(ours, theirs, stage_attention(queries, keys)).item() == pytest.approx(total, rel=1e-5)


def test_equal_features_give_nothing():
    maps = [torch.randn(3, 2, 4, 4)] * 4
    assert semckd_loss(maps, maps, torch.full((3, 2, 2), 0.5)).item() == 0.0


def test_similarities_do_not_see_where_in_a_map_something_is():
    feature = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(similarities(feature), similarities(feature.flip(3)))
    expected = torch.einsum("bchw,dchw->bd", feature, feature)
    torch.testing.assert_close(similarities(feature.half()), expected, rtol=1e-2, atol=5e-2)
    assert similarities(feature.half()).dtype is torch.float32


def test_any_numbers_of_stages_and_sizes_are_paired():
    student = NetSpec(CLASSES, ((3, 8, 8), (4, 8, 8), (5, 4, 4)), 5)
    teacher = NetSpec(CLASSES, ((3, 16, 16), (6, 16, 16), (4, 8, 8), (2, 2, 2)), 2)
    method = method_for(student, teacher)
    assert method.layers == ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
    ours, theirs = output(student, 0), output(teacher, 1)
    method(ours, theirs, batch_of())["semckd"].backward()
    assert method.attention(ours.features[1:], theirs.features[1:]).shape == (IMAGES, 2, 3)
    assert all(each.grad is not None and each.grad.isfinite().all() for each in method.parameters())


def test_gradient_reaches_stages_and_the_method_and_nothing_of_the_teacher():
    method, ours, theirs = method_for(), output(STUDENT, 0), output(TEACHER, 1)
    method(ours, theirs, batch_of())["semckd"].backward()
    assert [feature.grad is not None for feature in ours.features] == [False, True, True, True]
    assert all(each.grad is None for each in (*theirs.features, theirs.logits))
    for name, parameter in method.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [6e4, -6e4])
def test_extreme_features_give_finite_values_and_gradients(dtype, value):
    ours = [torch.full((2, 4, 4, 4), value, dtype=dtype, requires_grad=True) for _ in range(2)]
    theirs = [torch.full((2, 4, 4, 4), -value, dtype=dtype) for _ in range(2)]
    embed = method_for(batch_size=2, reduction=1).queries[0]
    query = embed(similarities(ours[0]))[:, None]
    key = embed(similarities(theirs[0]))[:, None].repeat(1, 2, 1)
    loss = semckd_loss(ours, theirs, stage_attention(query, key))
    gradients = torch.autograd.grad(loss, ours)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(1.2e5**2, rel=1e-2)
    assert all(each.isfinite().all() for each in gradients)


def test_twenty_steps_lower_it():
    method, ours, theirs = method_for(), output(STUDENT, 0), output(TEACHER, 1)
    leaves = [*ours.features, *method.parameters()]
    losses = twenty_steps(lambda: method(ours, theirs, batch_of())["semckd"], leaves, lr=0.5)
    assert losses[-1] < 0.9 * losses[0]


def test_default_weights_are_the_benchmark_s_and_all_are_arguments():
    assert SemCKD().loss_weights == {"ce": 1.0, "kd": 1.0, "semckd": 400.0}
    assert SemCKD(weight_ce=0.1, weight_kd=0.0, weight_semckd=50).loss_weights == {"ce": 0.1, "kd": 0.0, "semckd": 50}


# ---------------------------------------------------------------- the batch size


def test_the_constructor_s_batch_size_goes_before_the_data_s():
    method = method_for(batch_size=6)
    assert method.batch_size == 6
    method(output(STUDENT, 0, 6), output(TEACHER, 1, 6), batch_of(6))


def test_the_batch_size_comes_from_a_checkpoint():
    first, second = method_for(), SemCKD()
    second.build(Networks(student=STUDENT, teachers=(TEACHER,)))
    second.load_state_dict(first.state_dict(), strict=True)
    assert second.batch_size == IMAGES
    ours, theirs = output(STUDENT, 0), output(TEACHER, 1)
    values = [each(ours, theirs, batch_of())["semckd"] for each in (first, second)]
    assert torch.equal(*values)
    with pytest.raises(ACKDError, match="was trained with batches of 8 images and the data give 16"):
        second.begin_fit(FitInfo(batch_size=16))


def test_a_checkpoint_of_another_batch_size_is_refused():
    other = SemCKD(batch_size=16)
    other.build(Networks(student=STUDENT, teachers=(TEACHER,)))
    with pytest.raises(ACKDError, match="trained with batches of 16 images and this one is for 8"):
        method_for().load_state_dict(other.state_dict())


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ACKDError, match=r"a batch has 4 images in all processes .* built for 8"):
        method_for()(output(STUDENT, 0, 4), output(TEACHER, 1, 4), batch_of(4))


def test_a_batch_size_that_nobody_told_is_asked_for():
    method = SemCKD()
    method.build(Networks(student=STUDENT, teachers=(TEACHER,)))
    with pytest.raises(ACKDError, match="batch size is unknown to method SemCKD; pass batch_size"):
        method(output(STUDENT, 0), output(TEACHER, 1), batch_of())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0.0 in SemCKD; it must be above 0"),
        ({"reduction": 0}, "reduction is 0 in SemCKD; it must be at least 1"),
        ({"batch_size": 3}, "batch_size is 3 and method SemCKD with reduction 4 needs at least 4 images"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(ACKDError, match=sentence):
        method_for(**arguments)


def test_networks_without_known_stages_are_refused():
    with pytest.raises(ACKDError, match=r"the student.*method SemCKD"):
        SemCKD().build(Networks(student=NetSpec(CLASSES), teachers=(TEACHER,)))


def test_features_of_different_shape_are_refused():
    with pytest.raises(ACKDError, match=r"\(2, 3, 4, 4\) of the student and \(2, 3, 2, 2\) of the teacher"):
        semckd_loss([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 2, 2)], torch.ones(2, 1, 1))
