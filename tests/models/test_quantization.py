"""Quantisation to int8 after training, and networks that are fine-tuned for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import image_channels, name_of
from ackd_lightning.models.finding import probe
from ackd_lightning.models.quantization import FakeQuantized, Quantized, quantize, ranges_fixed
from ackd_lightning.models.start import head_names
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.zoo import create_model

pytest.importorskip("torchao")
pytest.importorskip("executorch")

BACKENDS = ["x86", "xnnpack"]


def images(count=16, size=16, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def trained(name="resnet8", **options):
    """A network whose BatchNorm statistics are those of the images."""
    torch.manual_seed(0)
    network = create_model(name, 10, **options).train()
    for _ in range(30):
        network(images(size=32 if name.startswith("timm") else 16, channels=options.get("in_chans", 3)))
    return network.eval()


class Twice(nn.Module):
    """Calls one layer twice, has a bias before its norm, a linear layer with a norm, and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.same, self.plain = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.hidden, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, image):
        value = self.act(self.norm(self.first(image)))
        value = self.act(self.plain(self.same(value))) + self.act(self.same(value))
        return self.fc(self.drop(self.last(self.hidden(value.mean((2, 3))))))


def relative(first, second):
    return float((first - second).detach().norm() / second.detach().norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["resnet8", "timm:test_byobnet"])
def test_a_quantised_network_has_a_byte_a_weight_and_nearly_the_logits(name, backend):
    network = trained(name)
    before, mode = copy.deepcopy(network.state_dict()), network.training
    given = images(size=32 if name.startswith("timm") else 16)
    result = quantize(network, given, backend=backend)
    assert isinstance(result, Quantized)
    assert relative(result(given), network(given)) < 0.1
    bytes_ = sum(each.numel() * each.element_size() for each in result.state_dict().values())
    assert bytes_ < 0.4 * sum(each.numel() * 4 for each in network.parameters())
    assert any(each.dtype == torch.int8 for each in result.state_dict().values())
    assert network.training == mode
    assert all(torch.equal(each, before[key]) for key, each in network.state_dict().items())
    for count in (1, 3, 33):  # any batch, and each image on its own
        batch = given[:1].expand(count, *given.shape[1:])
        assert torch.allclose(result(batch)[0], result(given[:1])[0], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantised_network_is_exported_as_it_is(backend, tmp_path):
    result = quantize(trained(), images(), backend=backend)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.export.save(torch.export.export(result, (images(2),), dynamic_shapes=(batch,)), tmp_path / "a.pt2")
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    assert torch.equal(loaded(images(33)), result(images(33)))
    weights = sum(each.numel() for each in trained().parameters())
    assert (tmp_path / "a.pt2").stat().st_size < 2 * weights + 200_000  # the graph itself is text


def test_batches_calibrate_as_all_images_at_once():
    network = trained()
    given = images(128)
    first = quantize(network, given, backend="x86")
    second = quantize(network, iter(given.split(64)), backend="x86")
    assert torch.equal(first(given), second(given))


@pytest.mark.parametrize("given", [torch.zeros(0, 3, 16, 16), []])
def test_no_images_are_refused(given):
    with pytest.raises(ACKDError, match="512"):
        quantize(trained(), given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_before_the_first_step_it_computes_as_the_network(backend):
    network = trained()
    student = FakeQuantized(network, backend, 16).eval()
    assert torch.allclose(student(images()), network(images()), atol=1e-5)
    assert not student.has_ranges
    with pytest.raises(ACKDError, match="resnet8"):
        student.converted()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["resnet8", "timm:test_byobnet"])
def test_the_converted_network_computes_what_was_trained(name, backend):
    size = 32 if name.startswith("timm") else 16
    student = FakeQuantized(trained(name), backend, size).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        student(images(size=size)).square().mean().backward()
        optimizer.step()
    assert all(each.grad is not None for each in student.parameters())
    student.eval()
    fresh = images(64, size) * 2
    assert torch.equal(student.converted()(fresh), student(fresh))
    given = images(size=size)
    assert 0 < relative(student(given), student.float_network()(given)) < 0.2


def test_tensors_keep_their_names_and_the_float_network_is_the_plain_one():
    network = trained()
    student = FakeQuantized(network, "x86", 16)
    assert [name.removeprefix("body.") for name, _ in student.named_parameters()] == [
        name for name, _ in network.named_parameters()
    ]
    plain = create_model("resnet8", 10)
    plain.load_state_dict(student.float_state())
    assert torch.equal(plain.eval()(images()), network(images()))
    assert head_names(student) == ("body.fc",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shapes_of_the_state_do_not_change(backend):
    student = FakeQuantized(trained(), backend, 16).train()
    before = {key: each.shape for key, each in student.state_dict().items()}
    student(images())
    assert {key: each.shape for key, each in student.state_dict().items()} == before
    assert student.has_ranges


def test_evaluation_changes_no_range():
    student = FakeQuantized(trained(), "x86", 16).train()
    student(images())
    before = copy.deepcopy(student.state_dict())
    student.eval()
    student(images() * 10)
    student.train()
    student.fixed_ranges = True
    student(images() * 10)
    after = student.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if not key.endswith("_enabled"))
    student.fixed_ranges = False
    student(images() * 10)
    assert any(not torch.equal(student.state_dict()[key], before[key]) for key in before if key.endswith("max_val"))


def test_a_state_of_training_that_is_loaded_for_evaluation_observes_nothing():
    student = FakeQuantized(trained(), "x86", 16).train()
    student(images())
    other = FakeQuantized(create_model("resnet8", 10), "x86", 16).eval()
    other(images())
    other.load_state_dict(student.state_dict())
    before = copy.deepcopy(other.state_dict())
    assert torch.equal(other(images()), student.eval()(images()))
    other(images() * 10)
    assert all(torch.equal(each, before[key]) for key, each in other.state_dict().items() if "_val" in key)


class Own(nn.Module):
    """A network of the user's, with a part that is called like that of a student."""

    def __init__(self):
        super().__init__()
        self.backbone = create_model("resnet8", 10)

    def forward(self, image):
        if image.shape[-1] > 64:
            raise ValueError("too large")
        return self.backbone(image)


def test_a_network_of_ones_own_is_named_after_its_class_whatever_its_parts_and_the_training():
    assert name_of(Own()) == name_of(BranchyStudent(Own(), ())) == "Own"
    quantised = FakeQuantized(Own(), "x86", 16)
    assert name_of(quantised) == name_of(BranchyStudent(quantised, ())) == "Own"
    assert name_of(BranchyStudent(create_model("resnet8", 10))) == "resnet8"
    with pytest.raises(ACKDError, match=r"^Own cannot read images of 96 x 96 pixels"):
        probe(Own(), 96)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_are_called_twice_and_norms_of_every_kind(backend):
    torch.manual_seed(0)
    network = Twice().train()
    for _ in range(20):
        network(images())
    network.eval()
    student = FakeQuantized(network, backend, 16).train()
    student(images())
    student.fixed_ranges = True
    assert torch.equal(student(images()), student(images()))  # without dropout
    assert relative(student(images()), network(images())) < 0.1
    assert torch.equal(student.eval().converted()(images()), student(images()))
    assert relative(quantize(network, images(), backend=backend)(images()), network(images())) < 0.1


def test_other_channels_and_mixed_precision():
    network = trained(in_chans=1)
    student = FakeQuantized(network, "x86", 16).train()
    assert image_channels(nn.Sequential(student)) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student(images(channels=1)).dtype == torch.float32
    with pytest.raises(ACKDError, match="bfloat16"):
        student.bfloat16()(images(channels=1))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, image):
        value = self.conv(image).mean((2, 3))
        return self.fc(value if float(value.sum()) > 0 else -value)


def test_networks_without_a_graph_or_without_layers_are_refused():
    with pytest.raises(ACKDError, match="Loop"):
        quantize(Loop(), images())
    with pytest.raises(ACKDError, match="Flatten"):
        quantize(nn.Flatten(), images(), backend="x86")


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, []), (2, []), (3, []), (4, [3]), (8, [6, 7]), (10, [8, 9]), (None, []), (-1, [])]
)
def test_ranges_stay_in_the_last_quarter_of_the_epochs(epochs, expected):
    assert [epoch for epoch in range(10) if ranges_fixed(epoch, epochs) and epoch < (epochs or 10)] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_one_sign_have_zero_at_zero(backend):
    """Kernels ignore another zero: such a file computes something else."""
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    with torch.no_grad():
        network[0].weight.copy_(network[0].weight.abs() + 0.1)
        network[0].weight[1] *= -1
    student = FakeQuantized(network, backend, 16).train()
    for _ in range(2):
        student(images())
    state = student.eval().converted().state_dict()
    points = [each for name, each in state.items() if "zero_point" in name and each.numel() > 1]
    assert points
    assert all(not each.any() for each in points)
