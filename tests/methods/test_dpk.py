from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ackd_lightning.methods import DPK
from ackd_lightning.methods.dpk import prior_mask, unbiased_cka
from ackd_lightning.random import stateless_bits
from ackd_lightning.testing import Harness, RandomImages


def features(images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(images, 3, generator=generator)
    return first, torch.cat([first[:, :2], torch.randn(images, 2, generator=generator)], dim=1)


def slow_hsic(first: list[list[float]], second: list[list[float]]) -> float:
    """Mean of k_ij l_ij + k_ij l_uv - 2 k_ij l_iu over all images i, j, u, v that differ: an unbiased estimate."""
    images = range(len(first))
    total, count = 0.0, 0
    for i in images:
        for j in images:
            for u in images:
                for v in images:
                    if len({i, j, u, v}) == 4:
                        total += first[i][j] * (second[i][j] + second[u][v] - 2 * second[i][u])
                        count += 1
    return total / count


def slow_cka(first: Tensor, second: Tensor) -> float:
    one, other = ((each.double() @ each.double().T).tolist() for each in (first, second))
    return slow_hsic(one, other) / (slow_hsic(one, one) * slow_hsic(other, other)) ** 0.5


def test_the_cka_equals_a_slow_reference():
    first, second = features(images=10)
    expected = slow_cka(first, second)
    assert 0.1 < expected < 0.9
    assert unbiased_cka(first, second).item() == pytest.approx(expected, rel=1e-4)


def test_the_cka_ignores_rotation_scale_and_shift_and_is_near_0_for_unrelated_wide_features():
    first, second = features(images=40)
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    torch.testing.assert_close(unbiased_cka(5 * first @ rotation + 2, second), unbiased_cka(first, second))
    assert unbiased_cka(torch.randn(64, 2000), torch.randn(64, 2000)).item() < 0.2  # 0.97 with the biased estimate


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_cka_of_constant_and_of_the_largest_features_is_finite(dtype):
    constant = torch.full((5, 3), 7.0, dtype=dtype)
    large = torch.full((5, 3000), 6e4, dtype=dtype)
    large[0] = -6e4
    assert unbiased_cka(constant, large).item() == 0.0
    assert 0 <= unbiased_cka(large, large).item() <= 1


def test_the_mask_has_the_share_and_depends_on_the_image_alone():
    keys = stateless_bits(1, torch.arange(64))
    mask = prior_mask(torch.tensor(0.3), keys, 8, 8)
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(prior_mask(torch.tensor(0.3), keys.flip(0), 8, 8).flip(0), mask)
    assert not torch.equal(mask[0], mask[1])
    assert not prior_mask(torch.tensor(0.0), keys, 4, 4).any()
    assert prior_mask(torch.tensor(1.0), keys, 4, 4).all()


def test_the_decoder_reads_the_teacher_where_the_mask_is_set_and_the_student_elsewhere():
    harness = Harness(DPK())
    pair = harness.method.decoders[1]
    ours, theirs = torch.randn(4, 32, 8, 8, requires_grad=True), torch.randn(4, 32, 8, 8)
    mask = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    expected = pair.decoder(torch.cat([pair.teacher(theirs)[:, :, :4], pair.student(ours)[:, :, 4:]], dim=2))
    torch.testing.assert_close(pair(ours, theirs, mask), expected)
    pair(ours, theirs, ~torch.zeros_like(mask)).square().sum().backward()
    assert not ours.grad.any()
    pair(ours, theirs, mask).square().sum().backward()
    assert ours.grad.any()


@pytest.mark.parametrize(("student", "teacher"), [("resnet8", "wrn_16_2"), ("mobilenetv2_x0_5", "resnet8")])
def test_the_term_is_the_distance_from_the_teachers_maps(student, teacher):
    harness = Harness(DPK(), student=student, teacher=teacher)
    method = harness.method
    ours, theirs, batch = harness.outputs()
    found = method(ours, theirs, batch)["prior"]
    expected = 0.0
    for number, (n, m) in enumerate(method.layers):
        size = min(ours.features[n].shape[2], theirs.features[m].shape[2])
        ours_n, theirs_m = (
            torch.nn.functional.adaptive_avg_pool2d(each, size) for each in (ours.features[n], theirs.features[m])
        )
        keys = stateless_bits(0x44504B, method.seed, method.epoch, number, batch.index)
        mask = prior_mask(1 - unbiased_cka(ours_n, theirs_m), keys, size, size)
        expected += (method.decoders[number](ours_n, theirs_m, mask) - theirs_m).square().mean().item()
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_masks_differ_between_epochs_and_seeds():
    harness = Harness(DPK(weight_ce=0.0))
    values = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        harness.begin_fit(epoch=epoch)
        harness.method.seed = seed
        values.append(harness.loss().item())
    assert values[0] == values[3]
    assert len(set(values)) == 3


def test_steps_lower_it():
    harness = Harness(DPK(weight_ce=0.0))
    optimizer = torch.optim.SGD([*harness.method.parameters(), *harness.module.student.parameters()], lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(harness.step().item())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("images", [2, 3, 4])
def test_a_batch_that_is_too_small_for_the_cka_gives_the_whole_prior(images):
    harness = Harness(DPK(weight_ce=0.0), data=RandomImages(batch_size=images))
    loss = harness.step()
    assert loss.isfinite()
    encoders = [parameter.grad for pair in harness.method.decoders for parameter in pair.student.parameters()]
    assert any(gradient.any() for gradient in encoders) is (images >= 4)
    line = torch.arange(images)[:, None].square()
    assert unbiased_cka(line, line).item() == (1.0 if images >= 4 else 0.0)
