from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from ackd_lightning.data.sampling import STREAM_CROP_X, STREAM_CROP_Y, STREAM_FLIP
from ackd_lightning.data.transforms import RawBatch, crop_flip, normalise, random_crop, shift_and_flip
from ackd_lightning.random import mix


def batch(count=40, size=(10, 10), epoch=3, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    image = torch.randint(1, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)
    index = torch.randperm(1000, generator=generator)[:count]
    return RawBatch(image, torch.zeros(count, dtype=torch.long), index, torch.full((count,), epoch))


def slow(raw, pad, flip, seed):
    """Pad, crop and mirror one image after the other."""
    out = []
    for image, index, epoch in zip(raw.image, raw.index.tolist(), raw.epoch.tolist(), strict=True):
        if epoch < 0:
            out.append(image)
            continue
        height, width = image.shape[1:]
        top = mix(seed, epoch, index, STREAM_CROP_Y) % (2 * pad + 1)
        left = mix(seed, epoch, index, STREAM_CROP_X) % (2 * pad + 1)
        cut = F.pad(image, (pad, pad, pad, pad))[:, top : top + height, left : left + width]
        out.append(cut.flip(2) if flip and mix(seed, epoch, index, STREAM_FLIP) % 2 else cut)
    return torch.stack(out)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("size", "pad"), [((10, 10), 4), ((8, 12), 2), ((6, 6), 0)])
def test_augmentation_equals_the_slow_reference(size, pad, flip):
    raw = batch(size=size)
    raw.epoch[5] = -1
    fast = crop_flip(raw, pad=pad, flip=flip, seed=7)
    assert fast.dtype == torch.uint8
    assert fast.is_contiguous()
    assert torch.equal(fast, slow(raw, pad, flip, 7))
    assert torch.equal(fast[5], raw.image[5])


def test_a_sample_does_not_depend_on_its_batch():
    raw = batch()
    whole = crop_flip(raw, pad=4, flip=True, seed=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:11]
    part = RawBatch(*(field[order] for field in raw[:4]))
    assert torch.equal(crop_flip(part, pad=4, flip=True, seed=0), whole[order])


def test_seed_and_epoch_change_the_augmentation():
    raw = batch()
    first = crop_flip(raw, pad=4, flip=True, seed=0)
    assert not torch.equal(first, crop_flip(raw, pad=4, flip=True, seed=1))
    assert not torch.equal(first, crop_flip(raw._replace(epoch=raw.epoch + 1), pad=4, flip=True, seed=0))


def test_shift_by_hand():
    image = torch.arange(1, 10).view(1, 1, 3, 3)
    moved = shift_and_flip(image, torch.tensor([1]), torch.tensor([-1]), torch.tensor([False]))
    assert moved[0, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]
    mirrored = shift_and_flip(image, torch.tensor([1]), torch.tensor([-1]), torch.tensor([True]))
    assert mirrored[0, 0].tolist() == [[5, 4, 0], [8, 7, 0], [0, 0, 0]]


def test_normalise():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    done = normalise(image, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
    assert done.dtype == torch.float32
    torch.testing.assert_close(done.flatten(), torch.tensor([-2.0, (128 / 255 - 0.4) / 0.2, 7.0]))


def test_random_crops_are_spread_like_those_of_torchvision():
    width, height, count = 90, 60, 3000
    mine = [random_crop(width, height, seed) for seed in range(count)]
    transform = v2.RandomResizedCrop(1)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = [transform.make_params([torch.zeros(3, height, width)]) for _ in range(count)]
    torch.set_rng_state(state)

    def described(left, top, wide, tall):
        share, ratio = wide * tall / (width * height), (wide / tall).log()
        return torch.stack([share, ratio, left / (width - wide + 1), top / (height - tall + 1)], dim=1)

    boxes = torch.tensor([box for box, _ in mine]).double()
    drawn = torch.tensor([[each[key] for key in ("left", "top", "width", "height")] for each in theirs]).double()
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double()
    crops = described(boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    quantiles = [torch.quantile(each, levels, dim=0) for each in (crops, described(*drawn.T))]
    torch.testing.assert_close(*quantiles, rtol=0, atol=0.04)
    assert abs(sum(mirror for _, mirror in mine) / count - 0.5) < 0.03
    assert [*boxes.amin(dim=0)[:2].tolist(), *boxes.amax(dim=0)[2:].tolist()] == [0, 0, width, height]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1, 1), (0, 0, 1, 1)),
        ((1000, 1), (499, 0, 500, 1)),
        ((9, 1000), (0, 494, 9, 506)),
        ((1000, 9), (494, 0, 506, 9)),
    ],
)
def test_random_crop_of_an_image_that_no_crop_fits_is_its_centre(size, box):
    assert {random_crop(*size, seed)[0] for seed in range(5)} == {box}


@pytest.mark.gpu
def test_same_numbers_on_the_gpu():
    raw = batch()
    cuda = RawBatch(*(field.cuda() for field in raw[:4]))
    assert torch.equal(crop_flip(cuda, pad=4, flip=True, seed=3).cpu(), crop_flip(raw, pad=4, flip=True, seed=3))


def test_the_smallest_crop_can_be_set():
    boxes = [random_crop(90, 60, seed, 0.5)[0] for seed in range(300)]
    shares = [(right - left) * (lower - upper) / (90 * 60) for left, upper, right, lower in boxes]
    assert 0.48 < min(shares) < 0.6  # edges are whole pixels
    assert max(shares) > 0.85  # what is drawn and does not fit becomes a crop of 4:3


def test_numbers_are_sent_to_a_device_once(monkeypatch):
    image = torch.zeros(2, 3, 4, 4, device="meta")
    mean, std = (0.11, 0.2, 0.3), [0.4, 0.5, 0.6]
    expected = normalise(image, mean, std)
    monkeypatch.setattr(torch, "tensor", None)
    assert normalise(image, mean, std).shape == expected.shape
