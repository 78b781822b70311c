from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model

OWN = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
DATA = ((0.45, 0.5, 0.55), (0.3, 0.2, 0.4))


def normalise(pixels: torch.Tensor, mean, std) -> torch.Tensor:
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", 5)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_it_stays_in_evaluation_mode(network):
    teacher = FrozenTeacher(network.train())
    for asked in (teacher, nn.Sequential(teacher)):
        asked.train()
        assert not any(each.training for each in teacher.modules())
    assert teacher.train() is teacher


def test_it_stays_frozen(network, pixels):
    teacher = FrozenTeacher(network)
    assert teacher.requires_grad_(True) is teacher
    assert not any(each.requires_grad for each in teacher.parameters())
    image = pixels.requires_grad_()
    output = teacher(image)
    for tensor in (output.logits, output.embedding, *output.features):
        assert not tensor.requires_grad


def test_a_forward_pass_in_training_changes_no_weight_and_no_statistic(network, pixels):
    teacher = FrozenTeacher(network)
    before = copy.deepcopy(network.state_dict())
    teacher.train()
    teacher(pixels)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_without_statistics_it_sees_the_image_as_it_is(network, pixels):
    teacher = FrozenTeacher(network)
    teacher.adapt_to(*DATA, 16)
    output = teacher(pixels)
    assert torch.equal(output.logits, network.eval()(pixels))
    assert len(output.features) == 4
    assert output.embedding.shape == (2, 64)


def test_images_are_converted_to_its_own_normalisation(network, pixels):
    teacher = FrozenTeacher(network, mean=OWN[0], std=OWN[1])
    teacher.adapt_to(*DATA, 16)
    expected = network(normalise(pixels, *OWN))
    torch.testing.assert_close(teacher(normalise(pixels, *DATA)).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(normalise(pixels, *DATA)), expected, atol=1e-2)


def test_the_same_normalisation_or_none_converts_nothing(network, pixels):
    teacher = FrozenTeacher(network, mean=OWN[0], std=OWN[1])
    teacher.adapt_to(*DATA, 16)
    teacher.adapt_to(list(OWN[0]), list(OWN[1]), 16)  # told anew
    assert teacher.scale is None
    assert torch.equal(teacher(pixels).logits, network(pixels))
    with pytest.warns(UserWarning, match="that of the data is unknown"):
        teacher.adapt_to(None, None, 16)
    assert torch.equal(teacher(pixels).logits, network(pixels))


def test_the_conversion_is_in_no_state_dict_and_follows_the_teacher(network):
    teacher = FrozenTeacher(network, mean=OWN[0], std=OWN[1])
    teacher.adapt_to(*DATA, 16)
    assert set(teacher.state_dict()) == {f"network.{key}" for key in network.state_dict()}
    assert teacher.double().scale.dtype is torch.float64


def test_images_are_resized_to_its_own_size(network, pixels):
    teacher = FrozenTeacher(network, input_size=24)
    teacher.adapt_to(None, None, 16)
    output = teacher(pixels)
    assert output.features[0].shape[-2:] == (24, 24)
    larger = F.interpolate(pixels, size=(24, 24), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(output.logits, network(larger))
    smaller = FrozenTeacher(network, input_size=8)
    smaller.adapt_to(None, None, 16)
    assert smaller(pixels).features[0].shape[-2:] == (8, 8)


def test_images_of_its_own_size_are_not_touched_and_sizes_can_be_told_anew(network, pixels):
    teacher = FrozenTeacher(network, input_size=16)
    teacher.adapt_to(None, None, 32)
    assert teacher.input_size == 16
    teacher.adapt_to(None, None, 16)
    assert teacher.input_size is None
    assert torch.equal(teacher(pixels).logits, network(pixels))


def test_bfloat16_gives_float32_logits_near_those_of_float32(network, pixels):
    exact = FrozenTeacher(network)(pixels).logits
    rough = FrozenTeacher(network, bf16=True)(pixels).logits
    assert rough.dtype is torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    assert all(each.dtype is torch.float32 for each in network.parameters())


def test_a_network_without_stages_teaches_with_logits_alone(pixels):
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    output = FrozenTeacher(network)(pixels)
    assert torch.equal(output.logits, network(pixels))
    assert output.features == ()


def test_copies_share_the_teacher(network):
    teacher = FrozenTeacher(network)
    holder = nn.ModuleList([teacher, nn.Linear(2, 2)])
    copied = copy.deepcopy(holder)
    assert copied[0] is teacher
    assert copied[1] is not holder[1]


def test_from_name_reads_weights_and_what_the_file_says(network, pixels, tmp_path):
    notes = {"mean": json.dumps(OWN[0]), "std": json.dumps(OWN[1]), "input_size": "24", "test_acc": "0.7", "seed": "1"}
    path = save_weights(network, tmp_path / "teacher.safetensors", notes)
    teacher = FrozenTeacher.from_name("resnet8", 5, weights=str(path))
    for key, value in network.state_dict().items():
        assert torch.equal(teacher.network.state_dict()[key], value), key
    assert teacher.metadata == notes
    assert not teacher.bf16
    assert not any(each.requires_grad or not each.is_leaf for each in teacher.parameters())
    teacher.adapt_to(*DATA, 16)
    own = F.interpolate(normalise(pixels, *OWN), size=(24, 24), mode="bilinear", antialias=True, align_corners=False)
    expected = network.eval()(own)
    torch.testing.assert_close(teacher(normalise(pixels, *DATA)).logits, expected, rtol=1e-4, atol=1e-4)


def test_from_name_without_metadata_converts_nothing(network, pixels, tmp_path):
    path = save_weights(network, tmp_path / "teacher.safetensors")
    teacher = FrozenTeacher.from_name("resnet8", 5, weights=str(path), bf16=True)
    teacher.adapt_to(*DATA, 16)
    assert teacher.bf16
    assert teacher.scale is None
    assert teacher.input_size is None


def test_from_name_passes_options_to_the_network(tmp_path):
    path = save_weights(create_model("resnet18", 5, stem="cifar"), tmp_path / "teacher.safetensors")
    teacher = FrozenTeacher.from_name("resnet18", 5, weights=str(path), options={"stem": "cifar"})
    assert teacher.network.conv1.kernel_size == (3, 3)


def test_from_name_refuses_a_missing_or_foreign_file(network, tmp_path):
    with pytest.raises(ACKDError, match=r"missing.safetensors"):
        FrozenTeacher.from_name("resnet8", 5, weights=str(tmp_path / "missing.safetensors"))
    path = save_weights(network, tmp_path / "teacher.safetensors")
    with pytest.raises(ACKDError):
        FrozenTeacher.from_name("resnet8", 6, weights=str(path))
