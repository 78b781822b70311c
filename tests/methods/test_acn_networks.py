from __future__ import annotations

import copy
import itertools

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.acn_networks import Generator, ImageDiscriminator, image_noise, without_weight_cache

LOW, HIGH = (-2.0, -1.0, -0.5), (2.5, 1.0, 3.0)


def generator(**arguments) -> Generator:
    torch.manual_seed(3)
    return Generator(LOW, HIGH, **{"width": 4, **arguments})


def images(count: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    share = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(4))
    low, high = (torch.tensor(each).view(1, 3, 1, 1) for each in (LOW, HIGH))
    return low + (high - low) * share


def noise(image: torch.Tensor, epoch: int = 0) -> torch.Tensor:
    return image_noise(torch.arange(len(image)), epoch, *image.shape[2:])


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 5), (13, 6), (1, 3), (32, 32)])
def test_any_size_of_image_comes_back(size):
    image = images(2, *size)
    made = generator()(image, noise(image))
    assert made.shape == image.shape
    assert made.dtype is torch.float32
    assert ImageDiscriminator(width=4)(image).shape[0] == 2


def test_it_paints_within_the_range_of_every_channel():
    net = generator()
    with torch.no_grad():
        net.last.bias.copy_(torch.tensor([50.0, -50.0, 0.0]))
    image = images()
    painted = net.paint(image, noise(image))
    torch.testing.assert_close(painted[:, 0], torch.full_like(painted[:, 0], HIGH[0]))
    torch.testing.assert_close(painted[:, 1], torch.full_like(painted[:, 1], LOW[1]))
    assert (painted[:, 2] > LOW[2]).all()
    assert (painted[:, 2] < HIGH[2]).all()


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.5, 0.9])
def test_the_convex_connection_bounds_the_change(rho):
    net, image = generator(rho=rho), images()
    with torch.no_grad():
        net.last.weight.mul_(100)  # to the ends of the range
    made, painted = net(image, noise(image)), net.paint(image, noise(image))
    torch.testing.assert_close(made, rho * image + (1 - rho) * painted)
    extent = (torch.tensor(HIGH) - torch.tensor(LOW)).view(1, 3, 1, 1)
    assert ((made - image).abs() <= (1 - rho) * extent + 1e-6).all()
    assert (made - image).abs().max() > 0.5 * (1 - rho) * extent.min()


def test_with_rho_one_the_image_stays_bit_for_bit():
    image = images()
    assert torch.equal(generator(rho=1.0)(image, noise(image)), image)


def test_the_additive_connection_is_clamped():
    net, image = generator(residual="additive", rho=1.0), images()
    painted = net.paint(image, noise(image))
    for channel in range(3):
        expected = (image + painted)[:, channel].clamp(LOW[channel], HIGH[channel])
        torch.testing.assert_close(net(image, noise(image))[:, channel], expected)


def test_a_learned_rho_is_a_parameter_that_begins_where_it_is_told():
    net, image = generator(residual="learned", rho=0.7), images()
    assert net.rho.item() == pytest.approx(0.7)
    assert "share" in dict(net.named_parameters())
    net(image, noise(image)).sum().backward()
    assert net.share.grad.abs() > 0
    with torch.no_grad():
        net.share.fill_(-100.0)
    assert 0 <= net.rho.item() < 1e-6
    fixed = generator(rho=0.7)
    assert "share" not in dict(fixed.named_parameters())


@pytest.mark.parametrize("residual", ["convex", "learned", "additive"])
def test_every_parameter_gets_a_gradient_and_noise_counts(residual):
    net, image = generator(residual=residual), images()
    net(image, noise(image)).square().mean().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in net.parameters())
    assert sum(bool(each.grad.abs().sum() > 0) for each in net.parameters()) == len(list(net.parameters()))
    assert not torch.equal(net(image, noise(image, 0)), net(image, noise(image, 1)))


def test_images_do_not_influence_each_other_and_modes_are_one():
    net, image = generator(), images()
    whole = net(image, noise(image))
    torch.testing.assert_close(net(image[1:2], noise(image)[1:2]), whole[1:2])
    assert torch.equal(net.eval()(image, noise(image)), whole)
    assert not [name for name in net.state_dict() if "running" in name]


def test_the_range_is_known_from_the_data_and_not_stored():
    stored = generator().state_dict()
    assert not {"low", "high", "share"} & set(stored)
    other = Generator((-1.0,) * 3, (1.0,) * 3, width=4)
    other.load_state_dict(stored)
    assert other.low.flatten().tolist() == [-1.0] * 3
    assert other.double().low.dtype is torch.float64  # moves along


@pytest.mark.parametrize(
    ("low", "high"), [((), ()), ((0.0,), (1.0, 2.0)), ((0.0, 1.0), (1.0, 1.0)), ((0.0, float("nan")), (1.0, 1.0))]
)
def test_a_range_without_extent_is_refused(low, high):
    with pytest.raises(ACKDError, match=r"pixels are from \[.*\] to \[.*\] for the generator"):
        Generator(low, high, width=4)


def test_one_channel_will_do():
    image = torch.rand(2, 1, 6, 6)
    assert Generator((0.0,), (1.0,), width=3)(image, noise(image)).shape == image.shape
    assert ImageDiscriminator(1, width=3)(image).shape[0] == 2


# ------------------------------------------------------------------------------------------------------- noise


def test_noise_is_a_function_of_epoch_image_and_pixel_alone():
    index = torch.tensor([7, 3, 50_000, 11])
    whole = image_noise(index, 4, 5, 6)
    assert whole.shape == (4, 1, 5, 6)
    assert torch.equal(image_noise(index.flip(0), 4, 5, 6), whole.flip(0))
    assert torch.equal(torch.cat([image_noise(part, 4, 5, 6) for part in index.split(1)]), whole)
    state = torch.get_rng_state()
    assert torch.equal(image_noise(index, 4, 5, 6), whole)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (image_noise(index, 5, 5, 6), image_noise(index + 1, 4, 5, 6)):
        assert not torch.isclose(other, whole).all(dim=(1, 2, 3)).any()
    for first, second in itertools.combinations(range(4), 2):
        assert not torch.equal(whole[first], whole[second])


def test_noise_is_uniform():
    whole = image_noise(torch.arange(64), 0, 16, 16)
    assert whole.min() >= -1
    assert whole.max() < 1
    assert whole.mean().abs() < 0.02
    assert whole.var().item() == pytest.approx(1 / 3, abs=0.01)
    one = whole.flatten(1)
    assert torch.corrcoef(one).fill_diagonal_(0).abs().max() < 0.3


def test_images_of_unknown_position_have_noise_from_their_place():
    unknown = torch.full((3,), -1)
    assert torch.equal(image_noise(unknown, 2, 4, 4), image_noise(torch.arange(3), 2, 4, 4))
    mixed = image_noise(torch.tensor([-1, 9, -1]), 2, 4, 4)
    assert torch.equal(mixed, image_noise(torch.tensor([0, 9, 2]), 2, 4, 4))


# ------------------------------------------------------------------------------------------------ discriminator


def test_weights_of_the_discriminator_have_spectral_norm_one():
    torch.manual_seed(5)
    net = ImageDiscriminator(width=4)
    with torch.no_grad():
        for layer in net.layers[::2]:
            layer.parametrizations.weight.original.mul_(30)
    for _ in range(50):
        net(images())
    for layer in net.layers[::2]:
        largest = torch.linalg.svdvals(layer.weight.flatten(1).double())[0]
        assert largest.item() == pytest.approx(1.0, abs=0.02)


def test_a_patch_has_23_pixels():
    net = ImageDiscriminator(width=4).eval()
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    opinion = net(image).view(16, 16)
    opinion[8, 8].backward()
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 23


def test_the_discriminator_is_still_in_evaluation_mode_and_can_be_copied():
    net = ImageDiscriminator(width=4).eval()
    before = copy.deepcopy(net.state_dict())
    first = net(images())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(copy.deepcopy(net)(images()), first)
    net.train()(images())
    assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_step_between_two_passes(dtype):
    """Autocast keeps converted weights: those of a pass without gradient have none, and grow old."""
    torch.manual_seed(0)
    net, judge, image = generator(), ImageDiscriminator(width=4), images()
    with torch.autocast("cpu", dtype=dtype):
        with torch.no_grad():
            first = net(image, noise(image))
        opinion = judge(net(image, noise(image)))
        assert opinion.dtype is torch.float32
        opinion.mean().backward()
        for parameter in (*net.parameters(), *judge.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
        with torch.no_grad():
            net.last.weight.mul_(-3)
            judge.layers[0].bias.add_(5)
        assert not torch.equal(net(image, noise(image)), first)
        assert (judge(image) - opinion).abs().max() > 0.1
    assert all(value.dtype is torch.float32 for value in judge.state_dict().values())


def test_outside_of_autocast_nothing_is_switched_on():
    with without_weight_cache(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_shapes_can_be_probed_on_the_meta_device():
    image = torch.empty(2, 3, 9, 7, device="meta")
    net = generator().to("meta")
    assert net(image, image[:, :1]).shape == image.shape
    assert ImageDiscriminator(width=4).to("meta").eval()(image).shape == (2, 3 * 2)
