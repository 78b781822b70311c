from __future__ import annotations

import pytest
import torch

from ackd_lightning.functional import weighted_logits
from ackd_lightning.methods.ackd_attention import LearnerAttention, _Pooled
from ackd_lightning.models.features import pooled

SHAPES = [(4, 2, 2), (6, 2, 2), (5, 2, 2)]
INPUTS = ("pooled", "flattened", "scaled")


def maps(batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, *shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("inputs", INPUTS)
def test_rows_are_distributions_over_the_learners(inputs):
    torch.manual_seed(0)
    weights = LearnerAttention(SHAPES, inputs=inputs)(maps())
    assert weights.shape == (3, 3)
    assert weights.dtype is torch.float32
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert not torch.allclose(weights[0], weights[1])  # per sample


@pytest.mark.parametrize(
    ("inputs", "g"),
    [
        ("pooled", lambda h: h.mean(dim=(2, 3))),
        ("flattened", lambda h: h.reshape(h.shape[0], -1)),
        ("scaled", lambda h: h.reshape(h.shape[0], -1) / (h.shape[2] * h.shape[3])),
    ],
)
def test_weights_are_the_softmax_of_the_mlp_of_the_joined_features(inputs, g):
    torch.manual_seed(0)
    attention = LearnerAttention(SHAPES, inputs=inputs, hidden=7)
    first, _, last = attention.mlp
    x = torch.cat([g(h) for h in maps()], dim=1)
    hidden = (x @ first.weight.T + first.bias).clamp_min(0)
    scores = (hidden @ last.weight.T + last.bias).exp()
    torch.testing.assert_close(attention(maps()), scores / scores.sum(dim=1, keepdim=True))


@pytest.mark.parametrize(("inputs", "width"), [("pooled", 15), ("flattened", 60), ("scaled", 60)])
def test_the_input_has_the_width_of_its_kind(inputs, width):
    attention = LearnerAttention(SHAPES, inputs=inputs)
    assert attention.mlp[0].in_features == width
    assert attention.mlp[0].out_features == 128
    assert attention.mlp[2].out_features == 3


def test_input_sizes_of_the_specification():
    assert LearnerAttention([(64, 8, 8)] * 2, inputs="flattened").mlp[0].in_features == 8192
    assert LearnerAttention([(1280, 2, 2)] * 2, inputs="flattened").mlp[0].in_features == 10240


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_gradient_reaches_every_learners_features(inputs):
    torch.manual_seed(0)
    features = [each.requires_grad_() for each in maps()]
    LearnerAttention(SHAPES, inputs=inputs)(features)[:, 0].sum().backward()
    for feature in features:
        assert feature.grad.abs().sum() > 0


def test_one_learner_gets_all_weight():
    attention = LearnerAttention([(4, 2, 2)])
    assert attention(maps()[:1]).tolist() == [[1.0], [1.0], [1.0]]


def test_weighted_logits_equal_a_loop():
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(2, 3, generator=generator)
    logits = [torch.randn(2, 4, generator=generator) for _ in range(3)]
    slow = torch.zeros(2, 4)
    for b in range(2):
        for k in range(4):
            for m in range(3):
                slow[b, k] += weights[b, m] * logits[m][b, k]
    torch.testing.assert_close(weighted_logits(weights, logits), slow)


def test_equal_logits_give_a_group_that_equals_each():
    torch.manual_seed(0)
    logits = torch.randn(3, 5)
    weights = LearnerAttention(SHAPES)(maps())
    torch.testing.assert_close(weighted_logits(weights, [logits] * 3), logits)


def test_the_group_of_one_learner_is_that_learner():
    logits = torch.randn(3, 5)
    assert torch.equal(weighted_logits(torch.ones(3, 1), [logits]), logits)


def test_logits_of_the_group_stay_float32_under_autocast():
    weights, logits = torch.full((2, 3), 1 / 3), [torch.randn(2, 4) for _ in range(3)]
    plain = weighted_logits(weights, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = weighted_logits(weights, logits)
    assert cast.dtype is torch.float32
    assert torch.equal(cast, plain)
    assert weighted_logits(weights, [each.bfloat16() for each in logits]).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_pooling_is_that_of_the_mean_and_takes_no_memory(dtype):
    given = []
    for layout in (torch.contiguous_format, torch.channels_last):
        feature = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
        first, second = (feature.clone().to(memory_format=layout).requires_grad_() for _ in range(2))
        first.register_hook(given.append)
        weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
        results = [_Pooled.apply(first), pooled(second)]
        for each in results:
            (each * weights).sum().backward()
        assert torch.equal(*results)
        assert torch.equal(first.grad, second.grad)
    assert [each.stride()[2:] for each in given] == [(0, 0)] * 2
