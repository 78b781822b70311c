from __future__ import annotations

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import Networks, ReviewKD
from ackd_lightning.methods.base import FitInfo
from ackd_lightning.methods.reviewkd import Fusion, hcl_loss
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import check_finite, twenty_steps

BATCH = Batch(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 3]), torch.arange(4))


def feature(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def network(channels, sides):
    """Leaf features and a leaf embedding, so that it is seen who is reached."""
    features = [feature(4, channels + stage, side, side, seed=stage) for stage, side in enumerate(sides)]
    width = features[-1].shape[1] + 2
    shapes = NetSpec(4, tuple(tuple(each.shape[1:]) for each in features), width)
    return shapes, NetOutput(torch.zeros(4, 4), tuple(features), feature(4, width, seed=99))


def built(student, teacher, **options):
    method = ReviewKD(**options)
    method.build(Networks(student=student, teachers=(teacher,)))
    return method


@pytest.mark.parametrize(
    ("side", "levels"), [(8, (4, 2, 1)), (4, (2, 1)), (3, (2, 1)), (2, (1,)), (1, ())], ids=lambda value: str(value)
)
def test_the_context_loss_equals_loops_and_pools_only_to_smaller_maps(side, levels):
    ours, theirs = feature(2, 3, side, side), feature(2, 3, side, side, seed=1)
    total, share, shares = 0.0, 1.0, 0.0
    for level in (side, *levels):
        values = []
        for row in range(level):
            for column in range(level):
                top, bottom = row * side // level, -(-(row + 1) * side // level)
                left, right = column * side // level, -(-(column + 1) * side // level)
                a, b = (each[:, :, top:bottom, left:right].mean(dim=(2, 3)).flatten() for each in (ours, theirs))
                values += [(x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        total, shares, share = total + share * sum(values) / len(values), shares + share, share / 2
    assert hcl_loss([ours], [theirs]).item() == pytest.approx(total / shares, rel=1e-5)
    twice = hcl_loss([ours, ours], [theirs, theirs]).item()
    assert twice == pytest.approx(2 * total / shares, rel=1e-5)
    assert hcl_loss([ours], [ours]).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_is_finite_float32(dtype):
    signs = feature(4, 3, 8, 8).detach().sign()
    ours = (6e4 * signs).to(dtype).requires_grad_()
    loss = hcl_loss([ours], [(-6e4 * signs).to(dtype)])
    check_finite(loss, ours)


def test_a_fusion_weighs_both_maps_by_their_attention():
    torch.manual_seed(0)
    fusion = Fusion(3, 4, 5, deepest=False)
    own, deeper = feature(2, 3, 4, 4), feature(2, 4, 2, 2, seed=1)
    handed_on, prediction = fusion(own, deeper, (8, 8))
    first = fusion.enter(own)
    second = deeper.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    kernel, bias = fusion.attention.weight[:, :, 0, 0], fusion.attention.bias
    scores = torch.einsum("bchw,ac->bahw", torch.cat([first, second], dim=1), kernel) + bias.reshape(1, 2, 1, 1)
    weights = 1 / (1 + (-scores).exp())
    fused = weights[:, :1] * first + weights[:, 1:] * second
    expected = fused.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(handed_on, expected)
    torch.testing.assert_close(prediction, fusion.leave(expected))
    assert prediction.shape == (2, 5, 8, 8)


@pytest.mark.parametrize(
    "sides",
    [((8, 8, 4, 2), (8, 8, 4, 2)), ((8, 8, 4, 2), (8, 4)), ((8, 4), (16, 8, 8, 2)), ((4, 2, 1), (7, 5, 3))],
    ids=["equal", "fewer", "more", "larger"],
)
def test_each_level_learns_from_its_own_and_all_deeper_features(sides):
    (ours, student), (theirs, teacher) = network(3, sides[0]), network(5, sides[1])
    method = built(ours, theirs)
    assert {pair[0] for pair in method.layers} == set(range(1, len(sides[0])))
    assert {pair[1] for pair in method.layers} == set(range(1, len(sides[1])))
    predictions, targets = method.review(student, teacher)
    assert [each.shape for each in predictions] == [each.shape for each in targets]
    assert len(predictions) == len(method.layers) + 1
    leaves = [*student.features, student.embedding]
    for level, prediction in enumerate(predictions):
        known = {stage for stage, _ in method.layers[level:]} | {len(leaves) - 1}
        value = (prediction * torch.randn_like(prediction)).sum()  # the sum alone is fixed by BatchNorm
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        reached = {stage for stage, each in enumerate(gradients) if each is not None and each.abs().sum() > 0}
        assert reached == known, level
    term = method(student, teacher, BATCH)["review"]
    assert term.item() == pytest.approx(hcl_loss(predictions, targets).item(), rel=1e-6)
    term.backward()
    assert all(each.grad.abs().sum() > 0 for each in method.parameters())
    assert all(each.grad is None for each in (*teacher.features, teacher.embedding))
    assert not list(method.buffers())


@pytest.mark.parametrize(("width", "given", "expected"), [(64, None, 64), (1280, None, 512), (64, 7, 7)])
def test_the_middle_is_as_wide_as_the_embedding_up_to_a_limit(width, given, expected):
    shapes = NetSpec(4, ((3, 4, 4), (6, 4, 4)), width)
    method = built(shapes, NetSpec(4, ((3, 4, 4), (6, 4, 4)), 32), mid_channels=given)
    assert {fusion.enter[0].out_channels for fusion in method.fusions} == {expected}
    assert [fusion.attention is None for fusion in method.fusions] == [False, True]


def test_the_weight_grows_over_the_warm_up():
    method = ReviewKD(weight_review=2.0)
    assert method.loss_weights == {"ce": 1.0, "review": pytest.approx(0.1)}
    grown = {}
    for epoch in (0, 9, 18, 19, 20, 100):
        method.set_epoch(epoch)
        grown[epoch] = method.loss_weights["review"]
    assert grown == pytest.approx({0: 0.1, 9: 1.0, 18: 1.9, 19: 2.0, 20: 2.0, 100: 2.0})
    assert ReviewKD(warmup_epochs=0, weight_ce=0.5).loss_weights == {"ce": 0.5, "review": 1.0}


def test_twenty_steps_lower_it():
    (ours, student), (theirs, teacher) = network(3, (8, 4, 2)), network(5, (8, 4, 2))
    method = built(ours, theirs)
    leaves = [*method.parameters(), *student.features[1:], student.embedding]
    losses = twenty_steps(lambda: method(student, teacher, BATCH)["review"], leaves, lr=0.1)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("name", "value"), [("warmup_epochs", -1), ("mid_channels", 0)])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ACKDError, match=rf"{name} is {value} in ReviewKD; it must be"):
        ReviewKD(**{name: value})


@pytest.mark.parametrize("shapes", [([], []), ([(2, 3, 4, 4)], [(2, 3, 1, 4)]), ([(2, 3, 4, 4)] * 2, [(2, 3, 4, 4)])])
def test_features_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ACKDError, match="hcl_loss got features"):
        hcl_loss(*([torch.zeros(each) for each in side] for side in shapes))


def test_networks_without_stages_are_refused():
    (ours, _) = network(3, (8, 4))
    with pytest.raises(ACKDError, match=r"the teacher.*method ReviewKD"):
        ReviewKD().build(Networks(student=ours, teachers=(NetSpec(4),)))


@pytest.mark.parametrize(("epochs", "said"), [(5, "25%"), (19, "95%"), (20, None), (None, None)])
def test_a_fit_that_is_shorter_than_the_warm_up_is_told(capsys, epochs, said):
    ReviewKD().begin_fit(FitInfo(epochs=epochs))
    out = capsys.readouterr().out
    assert said in out if said else out == ""
