from __future__ import annotations

import pytest
import torch

from ackd_lightning.metrics.cka import WIDEST, LearnerStatistics, linear_cka


def features(seed: int, images: int = 12, width: int = 4) -> torch.Tensor:
    return torch.randn(images, width, generator=torch.Generator().manual_seed(seed))


def slow_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """By Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T."""
    count = len(first)
    centring = torch.eye(count, dtype=torch.float64) - 1 / count
    gram = [centring @ (each.double() @ each.double().T) @ centring for each in (first, second)]

    def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
        return sum((k[i, j] * m[i, j]).item() for i in range(count) for j in range(count))

    return hsic(*gram) / (hsic(gram[0], gram[0]) * hsic(gram[1], gram[1])) ** 0.5


def test_cka_equals_the_gram_matrix_form():
    first, second = features(0), features(1, width=6)
    assert linear_cka(first, second).item() == pytest.approx(slow_cka(first, second), rel=1e-9)


def test_cka_does_not_see_rotation_scale_or_shift():
    first, second = features(0), features(1)
    rotation, _ = torch.linalg.qr(features(2, images=4))
    value = linear_cka(first, second).item()
    assert 0 < value < 1
    assert linear_cka(first @ rotation, second).item() == pytest.approx(value, rel=1e-5)
    assert linear_cka(-3 * first, second).item() == pytest.approx(value, rel=1e-5)
    assert linear_cka(first + 7, second).item() == pytest.approx(value, rel=1e-5)
    assert linear_cka(first, first @ rotation * 5 + 2).item() == pytest.approx(1.0, rel=1e-5)
    assert linear_cka(second, first).item() == pytest.approx(value, rel=1e-9)


def test_cka_sees_a_linear_map_that_is_not_a_rotation():
    first = features(0)
    assert linear_cka(first, first * torch.tensor([10.0, 1.0, 0.1, 0.01])).item() < 0.95


def test_cka_of_unrelated_directions_and_of_constants_is_zero():
    first = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    second = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert linear_cka(first, second).item() == 0.0
    assert linear_cka(first, torch.ones(4, 3)).item() == 0.0


@pytest.mark.parametrize("learners", [2, 3])
def test_statistics_over_batches_equal_those_of_all_images(learners):
    embeddings = [features(seed) + seed for seed in range(learners)]
    logits = [features(10 + seed, width=3) for seed in range(learners)]
    metric = LearnerStatistics(learners, 4)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        metric.update([each[part] for each in embeddings], [each[part] for each in logits])
    found = metric.compute()
    pairs = [(i, j) for i in range(learners) for j in range(i + 1, learners)]
    cka = sum(slow_cka(embeddings[i], embeddings[j]) for i, j in pairs) / len(pairs)
    apart = [(logits[i].argmax(dim=1) != logits[j].argmax(dim=1)).float().mean().item() for i, j in pairs]
    feature_std = torch.stack([each.std(dim=0, unbiased=False) for each in embeddings]).mean().item()
    assert set(found) == {"cka", "disagreement", "feature_std"}
    assert found["cka"].item() == pytest.approx(cka, rel=1e-5)
    assert found["disagreement"].item() == pytest.approx(sum(apart) / len(pairs))
    assert found["feature_std"].item() == pytest.approx(feature_std, rel=1e-5)
    assert all(value.dtype is torch.float32 for value in found.values())


def test_disagreement_is_the_share_of_images_with_different_answers():
    same = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    other = torch.tensor([[9.0, 1.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    metric = LearnerStatistics(2, 4)
    metric.update([features(0, images=4)] * 2, [same, other])
    assert metric.compute()["disagreement"].item() == 0.25


def test_equal_learners_have_cka_one_and_no_disagreement():
    metric = LearnerStatistics(2, 4)
    metric.update([features(0)] * 2, [features(1)] * 2)
    found = metric.compute()
    assert found["cka"].item() == pytest.approx(1.0)
    assert found["disagreement"].item() == 0.0


def test_one_learner_has_a_feature_std_only():
    metric = LearnerStatistics(1, 4)
    metric.update([features(0)], [features(1)])
    assert set(metric.compute()) == {"feature_std"}


def test_collapsed_features_have_no_std():
    metric = LearnerStatistics(1, 4)
    metric.update([torch.full((5, 4), 3.0)], [features(1, images=5)])
    assert metric.compute()["feature_std"].item() == pytest.approx(0.0, abs=1e-6)


def test_sums_of_two_processes_add_up():
    whole, first, second = (LearnerStatistics(2, 4) for _ in range(3))
    embeddings, logits = [features(0), features(1)], [features(2), features(3)]
    whole.update(embeddings, logits)
    first.update([each[:5] for each in embeddings], [each[:5] for each in logits])
    second.update([each[5:] for each in embeddings], [each[5:] for each in logits])
    for name in ("total", "sums", "squares", "products", "disagreements"):
        setattr(first, name, getattr(first, name) + getattr(second, name))
        assert first._reductions[name] is torch.sum or "sum" in first._reductions[name].__name__
    for name, value in whole.compute().items():
        torch.testing.assert_close(first.compute()[name], value)


def test_wide_embeddings_are_measured_without_matrices_of_their_width():
    wide, narrow = LearnerStatistics(2, WIDEST + 1), LearnerStatistics(2, WIDEST)
    assert set(narrow.names) - set(wide.names) == {"cka"}
    assert sum(each.numel() for each in wide._defaults.values()) < 5 * (WIDEST + 1)
    assert sum(each.numel() for each in LearnerStatistics(1, WIDEST)._defaults.values()) < 5 * WIDEST
    embeddings = [torch.randn(6, WIDEST + 1) for _ in range(2)]
    wide.update(embeddings, [features(2, images=6), features(3, images=6)])
    found = wide.compute()
    assert found.keys() == set(wide.names)
    expected = torch.stack([each.double().std(dim=0, correction=0) for each in embeddings]).mean().float()
    torch.testing.assert_close(found["feature_std"], expected)


def test_reset_starts_anew():
    metric = LearnerStatistics(2, 4)
    metric.update([features(0), features(1)], [features(2), features(3)])
    metric.reset()
    metric.update([features(4)] * 2, [features(5)] * 2)
    assert metric.compute()["cka"].item() == pytest.approx(1.0)
    assert metric.total.item() == 12


def test_large_offsets_do_not_hide_the_feature_std():
    metric = LearnerStatistics(1, 4)
    metric.update([1000 + 0.1 * features(0)], [features(1)])
    expected = (1000 + 0.1 * features(0)).double().std(dim=0, unbiased=False).mean().item()
    assert metric.compute()["feature_std"].item() == pytest.approx(expected, rel=1e-4)


def test_a_device_without_float64_sums_in_float32():
    """As the GPU of a Mac."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return tensor.clone()

    wide, narrow = LearnerStatistics(2, 4), LearnerStatistics(2, 4)
    narrow._apply(moved)
    for metric in (wide, narrow):
        metric.update([features(0), features(1)], [features(2), features(3)])
    assert narrow.sums.dtype == torch.float32
    for name, value in wide.compute().items():
        assert narrow.compute()[name].item() == pytest.approx(value.item(), rel=1e-4)
    narrow.reset()
    assert narrow.sums.dtype == torch.float32
