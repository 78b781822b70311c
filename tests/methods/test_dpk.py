from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.methods import DPK
from ackd_lightning.methods.dpk import prior_mask, unbiased_cka
from ackd_lightning.random import mix, stateless_bits
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


def slow_norm(feature: Tensor, norm: nn.Module) -> Tensor:
    mean = feature.mean(dim=(0, 2, 3), keepdim=True)
    spread = ((feature - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    return (feature - mean) / (spread + norm.eps) ** 0.5 * norm.weight[:, None, None] + norm.bias[:, None, None]


def slow_conv(feature: Tensor, conv: nn.Module) -> Tensor:
    kernel, (height, width) = conv.weight.shape[2], feature.shape[2:]
    padded = feature.new_zeros(*feature.shape[:2], height + kernel - 1, width + kernel - 1)
    edge = kernel // 2
    padded[:, :, edge : edge + height, edge : edge + width] = feature
    found = 0.0 if conv.bias is None else conv.bias[:, None, None]
    for y in range(kernel):
        for x in range(kernel):
            moved = padded[:, :, y : y + height, x : x + width]
            found = found + torch.einsum("bchw,dc->bdhw", moved, conv.weight[:, :, y, x])
    return found


def slow_prior(decoder: nn.Module, ours: Tensor, theirs: Tensor, keys: list[int]) -> float:
    share = 1 - min(max(slow_cka(ours.flatten(1), theirs.flatten(1)), 0.0), 1.0)
    stitched = slow_norm(slow_conv(ours, decoder.student[0]), decoder.student[1])
    prior = slow_norm(slow_conv(theirs, decoder.teacher[0]), decoder.teacher[1])
    width = ours.shape[3]
    for image, key in enumerate(keys):
        for place in range(ours.shape[2] * width):
            if (mix(key, place) >> 39) / 2**24 < share:
                stitched[image, :, place // width, place % width] = prior[image, :, place // width, place % width]
    conv_1, norm_1, _, conv_2, norm_2, _, last = decoder.decoder
    for conv, norm in ((conv_1, norm_1), (conv_2, norm_2)):
        stitched = slow_norm(slow_conv(stitched, conv), norm).clamp_min(0)
    return ((slow_conv(stitched, last) - theirs) ** 2).mean().item()


@torch.no_grad()
@pytest.mark.parametrize(("student", "teacher"), [("resnet8", "wrn_16_2"), ("mobilenetv2_x0_5", "resnet8")])
def test_the_term_is_the_distance_from_the_teachers_maps(student, teacher):
    harness = Harness(DPK(), student=student, teacher=teacher)
    method = harness.method
    ours, theirs, batch = harness.outputs()
    expected = 0.0
    for number, (n, m) in enumerate(method.layers):
        size = min(ours.features[n].shape[2], theirs.features[m].shape[2])
        maps = [F.adaptive_avg_pool2d(each, size) for each in (ours.features[n], theirs.features[m])]
        keys = [mix(0x44504B, 0, 0, number, int(index)) for index in batch.index]
        expected += slow_prior(method.decoders[number], *maps, keys)
    assert method(ours, theirs, batch)["prior"].item() == pytest.approx(expected, rel=1e-4)


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
