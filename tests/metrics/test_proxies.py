from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.metrics.cka import linear_cka
from ackd_lightning.metrics.proxies import proxy_measurements
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import Batch, DataInfo, NetOutput

IMAGES, CLASSES = 23, 5
PAIRS = ("teacher_proxy", "proxy_student", "teacher_student")


class Fixed(nn.Module):
    """Features and logits of its own for every image, whose number is its only pixel."""

    def __init__(self, seed: int, width: int = 6, classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(IMAGES, width, generator=generator) + seed
        self.logits = 2 * torch.randn(IMAGES, classes, generator=generator)
        self.eval()

    def forward(self, image: Tensor) -> NetOutput:
        rows = image.flatten().long()
        return NetOutput(self.logits[rows], None, self.embedding[rows])


def numbered(size: int = IMAGES) -> list[Batch]:
    generator = torch.Generator().manual_seed(99)
    image, target = torch.arange(IMAGES).float(), torch.randint(CLASSES, (IMAGES,), generator=generator)
    return [
        Batch(rows.view(-1, 1, 1, 1), labels, torch.full_like(labels, -1))
        for rows, labels in zip(image.split(size), target.split(size), strict=True)
    ]


def slow_kl(first: Tensor, second: Tensor) -> float:
    total = 0.0
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        norms = [math.log(sum(math.exp(value) for value in row)) for row in (one, other)]
        total += sum(
            math.exp(a - norms[0]) * ((a - norms[0]) - (b - norms[1])) for a, b in zip(one, other, strict=True)
        )
    return total / len(first)


def test_measurements_equal_a_slow_reference_on_all_images_at_once():
    networks = {"teacher": Fixed(1, width=6), "proxy": Fixed(2, width=3), "student": Fixed(3, width=4)}
    (everything,) = numbered()
    found = proxy_measurements(*networks.values(), numbered(size=7))
    right = {
        role: sum(int(row.argmax() == label) for row, label in zip(network.logits, everything.target, strict=True))
        for role, network in networks.items()
    }
    assert len(set(right.values())) > 1
    expected = {f"acc_{role}": 100 * count / IMAGES for role, count in right.items()}
    expected["acc_gap"] = expected["acc_teacher"] - expected["acc_proxy"]
    for pair in PAIRS:
        first, second = (networks[role] for role in pair.split("_"))
        expected[f"cka_{pair}"] = linear_cka(first.embedding, second.embedding).item()
        expected[f"kl_{pair}"] = slow_kl(first.logits, second.logits)
    assert list(found) == [
        *("acc_teacher", "acc_proxy", "acc_student", "acc_gap"),
        *(f"{what}_{pair}" for what in ("cka", "kl") for pair in PAIRS),
    ]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("size", [1, 5, 22])
def test_the_size_of_batches_does_not_matter(size):
    networks = Fixed(1), Fixed(2), Fixed(3)
    whole, parts = (proxy_measurements(*networks, numbered(each)) for each in (IMAGES, size))
    assert parts == pytest.approx(whole, rel=1e-10)


def test_a_network_and_itself_have_cka_one_and_no_divergence():
    network, other = Fixed(1), Fixed(2)
    found = proxy_measurements(network, network, other, numbered(size=6))
    assert found["cka_teacher_proxy"] == pytest.approx(1.0, abs=1e-12)
    assert found["kl_teacher_proxy"] == 0.0
    assert found["acc_gap"] == 0.0
    assert found["cka_teacher_student"] == found["cka_proxy_student"] < 1
    assert found["kl_teacher_student"] == found["kl_proxy_student"] > 0


def test_cka_does_not_see_rotation_scale_or_shift_of_a_network():
    teacher, proxy, student, turned = Fixed(1), Fixed(2), Fixed(3), Fixed(2)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(4)).double())
    turned.embedding = -7 * proxy.embedding.double() @ rotation + 3
    plain = proxy_measurements(teacher, proxy, student, numbered(size=6))
    assert proxy_measurements(teacher, turned, student, numbered(size=6)) == pytest.approx(plain, rel=1e-9)


def test_cka_keeps_its_digits_under_a_large_common_offset():
    teacher, proxy, student, far = Fixed(1), Fixed(2), Fixed(3), Fixed(2)
    far.embedding = proxy.embedding.double() + 1e7
    plain = proxy_measurements(teacher, proxy, student, numbered(size=6))
    assert proxy_measurements(teacher, far, student, numbered(size=6)) == pytest.approx(plain, rel=1e-6)


def test_divergence_is_that_of_the_first_from_the_second_at_temperature_one():
    first, second = Fixed(1, classes=2), Fixed(2, classes=2)
    first.logits = torch.tensor([[math.log(3.0), 0.0]]).expand(IMAGES, 2)
    second.logits = torch.zeros(IMAGES, 2)
    found = proxy_measurements(first, second, first, numbered())
    assert found["kl_teacher_proxy"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert found["kl_proxy_student"] == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)


def test_frozen_networks_see_images_in_their_own_normalisation():
    torch.manual_seed(0)
    network, student = (create_model(name, CLASSES) for name in ("resnet14", "resnet8x4"))
    # the same weights, with and without a normalisation of their own
    adapted = FrozenTeacher(network, mean=(0.5,) * 3, std=(0.25,) * 3)
    adapted.adapt_to(DataInfo(CLASSES, 16, (0.0,) * 3, (1.0,) * 3))
    plain = FrozenTeacher(network)
    pixels = torch.rand(8, 3, 16, 16)
    target = torch.randint(CLASSES, (8,))
    found = proxy_measurements(
        adapted, plain, FrozenTeacher(student), [Batch(pixels, target, target), Batch(pixels.flip(0), target, target)]
    )
    own = plain((pixels - 0.5) / 0.25)
    assert found["kl_teacher_proxy"] == pytest.approx(slow_kl(own.logits, plain(pixels).logits), rel=1e-4)
    assert found["cka_teacher_proxy"] == pytest.approx(
        linear_cka(own.embedding, plain(pixels).embedding).item(), rel=1e-4
    )
    assert found["kl_teacher_proxy"] > 1e-4


def test_no_gradient_is_computed():
    network = Fixed(1)
    network.logits.requires_grad_(True)
    seen: list[NetOutput] = []
    network.register_forward_hook(lambda _module, _args, output: seen.append(output))
    proxy_measurements(network, Fixed(2), Fixed(3), numbered(size=9))
    assert len(seen) == 3
    assert not any(output.logits.requires_grad for output in seen)


@pytest.mark.parametrize(
    ("networks", "batches", "message"),
    [
        ((Fixed(1), Fixed(2), Fixed(3)), [], "batches is empty"),
        ((Fixed(1), Fixed(2).train(), Fixed(3)), numbered(), "the proxy is in training mode"),
        ((Fixed(1), Fixed(2), Fixed(3, classes=7)), numbered(), "the student has 7 classes"),
    ],
)
def test_what_cannot_be_measured_is_refused(networks, batches, message):
    with pytest.raises(ACKDError, match=message):
        proxy_measurements(*networks, batches)
