from __future__ import annotations

import copy
import dataclasses
import json

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import DataInfo

OWN = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
DATA = ((0.45, 0.5, 0.55), (0.3, 0.2, 0.4))


def info(size=16, mean=DATA[0], std=DATA[1]) -> DataInfo:
    return DataInfo(5, size, mean, std)


def normalise(pixels: torch.Tensor, mean, std) -> torch.Tensor:
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", 5).eval()


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
    teacher.adapt_to(info())
    output = teacher(pixels)
    assert torch.equal(output.logits, network.eval()(pixels))
    assert len(output.features) == 4
    assert output.embedding.shape == (2, 64)


def test_images_are_converted_to_its_own_normalisation(network, pixels):
    teacher = FrozenTeacher(network, mean=OWN[0], std=OWN[1])
    teacher.adapt_to(info())
    expected = network(normalise(pixels, *OWN))
    torch.testing.assert_close(teacher(normalise(pixels, *DATA)).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(normalise(pixels, *DATA)), expected, atol=1e-2)


def test_the_same_normalisation_or_none_converts_nothing(network, pixels):
    teacher = FrozenTeacher(network, mean=OWN[0], std=OWN[1])
    teacher.adapt_to(info())
    teacher.adapt_to(info(16, *OWN))
    assert teacher.conversion.scale is None
    assert torch.equal(teacher(pixels).logits, network(pixels))
    teacher.adapt_to(DataInfo(5, 16))
    assert any("unknown" in note for note in teacher.conversion.notes)
    assert torch.equal(teacher(pixels).logits, network(pixels))


def test_the_conversion_is_in_no_state_dict_and_follows_the_teacher(network):
    teacher = FrozenTeacher(network, mean=OWN[0], std=OWN[1])
    teacher.adapt_to(info())
    assert set(teacher.state_dict()) == {f"network.{key}" for key in network.state_dict()}
    assert teacher.double().conversion.scale.dtype is torch.float64


def test_images_are_resized_to_its_own_size(network, pixels):
    teacher = FrozenTeacher(network, input_size=24)
    teacher.adapt_to(DataInfo(5, 16))
    output = teacher(pixels)
    assert output.features[0].shape[-2:] == (24, 24)
    larger = F.interpolate(pixels, size=(24, 24), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(output.logits, network(larger))
    smaller = FrozenTeacher(network, input_size=8)
    smaller.adapt_to(DataInfo(5, 16))
    assert smaller(pixels).features[0].shape[-2:] == (8, 8)


def test_images_of_its_own_size_are_not_touched_and_sizes_can_change(network, pixels):
    teacher = FrozenTeacher(network, input_size=16)
    teacher.adapt_to(DataInfo(5, 32))
    assert teacher.input_size == (16, 16)
    teacher.adapt_to(DataInfo(5, 16))
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
    assert output.features is None
    assert output.embedding is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean": (0.1, 0.2, 0.3)}, "std is None; give both"),
        ({"std": (0.1, 0.2, 0.3)}, "mean is None and std is"),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.1, 0.2)}, "give both, with one number per channel"),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.0, 0.2, 0.1)}, "numbers above 0"),
        ({"input_size": 0}, "input_size is 0"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(network, given, said):
    with pytest.raises(ACKDError, match=said):
        FrozenTeacher(network, **given)


def test_copies_share_the_teacher(network):
    teacher = FrozenTeacher(network)
    holder = nn.ModuleList([teacher, nn.Linear(2, 2)])
    copied = copy.deepcopy(holder)
    assert copied[0] is teacher
    assert copied[1] is not holder[1]


def test_from_name_reads_weights_and_metadata(network, pixels, tmp_path):
    notes = {"mean": json.dumps(OWN[0]), "std": json.dumps(OWN[1]), "input_size": "24", "test_acc": "0.7", "seed": "1"}
    path = save_weights(network, tmp_path / "teacher.safetensors", notes)
    teacher = FrozenTeacher.from_name("resnet8", 5, weights=str(path))
    for key, value in network.state_dict().items():
        assert torch.equal(teacher.network.state_dict()[key], value), key
    assert teacher.metadata.items() >= notes.items()
    assert not teacher.bf16
    assert not any(each.requires_grad or not each.is_leaf for each in teacher.parameters())
    teacher.adapt_to(info())
    own = F.interpolate(normalise(pixels, *OWN), size=(24, 24), mode="bilinear", antialias=True, align_corners=False)
    expected = network.eval()(own)
    torch.testing.assert_close(teacher(normalise(pixels, *DATA)).logits, expected, rtol=1e-4, atol=1e-4)


def test_from_name_without_metadata_converts_nothing(network, pixels, tmp_path):
    path = save_weights(network, tmp_path / "teacher.safetensors")
    teacher = FrozenTeacher.from_name("resnet8", 5, weights=str(path), bf16=True)
    teacher.adapt_to(info())
    assert teacher.bf16
    assert teacher.conversion.scale is None
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


def test_from_name_prefers_the_preprocessing_that_is_passed(network, tmp_path):
    notes = {"mean": json.dumps(OWN[0]), "std": json.dumps(OWN[1]), "input_size": "24"}
    path = save_weights(network, tmp_path / "teacher.safetensors", notes)
    teacher = FrozenTeacher.from_name("resnet8", 5, weights=str(path), mean=DATA[0], std=DATA[1], input_size=16)
    teacher.adapt_to(info())
    assert teacher.conversion.scale is None
    assert teacher.input_size is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", "[]"),
        ("mean", "0.5"),
        ("std", "[0.1, 0.0, 0.1]"),
        ("input_size", "4097"),
        ("input_size", "3.5"),
        ("val_acc", "70.0"),
        ("test_acc", "high"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(network, tmp_path, key, value):
    notes = {"mean": json.dumps(OWN[0]), "std": json.dumps(OWN[1])} | {key: value}
    path = save_weights(network, tmp_path / "teacher.safetensors", notes)
    with pytest.raises(ACKDError, match=f"{key} is .*teacher.safetensors"):
        FrozenTeacher.from_name("resnet8", 5, weights=str(path))


def test_mean_and_std_in_metadata_have_one_length(network, tmp_path):
    for notes in ({"mean": "[0.5]", "std": "[0.5, 0.5]"}, {"mean": "[0.5]"}):
        path = save_weights(network, tmp_path / "teacher.safetensors", notes)
        with pytest.raises(ACKDError, match=r"mean and std.*teacher.safetensors"):
            FrozenTeacher.from_name("resnet8", 5, weights=str(path))


def test_the_network_that_is_passed_stays_as_it_is_and_can_be_trained(network, pixels):
    network.train()
    teacher = FrozenTeacher(network)
    assert all(each.training for each in network.modules())
    assert all(each.requires_grad for each in network.parameters())
    before = teacher(pixels).logits
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    first = network(pixels)
    first.sum().backward()
    optimizer.step()
    assert not torch.allclose(network(pixels), first)
    assert torch.equal(teacher(pixels).logits, before)
    pointers = {each.data_ptr() for each in (*network.parameters(), *network.buffers())}
    assert pointers.isdisjoint(each.data_ptr() for each in (*teacher.parameters(), *teacher.buffers()))


def test_a_network_is_copied_once_or_not_at_all(network, tmp_path, monkeypatch):
    path = save_weights(network, tmp_path / "teacher.safetensors")
    copies = []
    monkeypatch.setattr("ackd_lightning.models.teacher.clone", lambda each: copies.append(each) or each)
    FrozenTeacher.from_name("resnet8", 5, weights=str(path))
    assert copies == []
    FrozenTeacher(network)
    assert copies == [network]
    assert FrozenTeacher(network, copy_network=False).network is network
    assert len(copies) == 1


def test_a_plan_is_checked_once(network, monkeypatch):
    sizes = []
    monkeypatch.setattr("ackd_lightning.models.teacher_base.check_plan", lambda _, __, size, ___: sizes.append(size))
    teacher = FrozenTeacher(network)
    for size in (16, 32):
        teacher.adapt_to(DataInfo(5, size))
    FrozenTeacher(network, input_size=24).adapt_to(DataInfo(5, 16))
    assert sizes == [16, 24]


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))


def unbuilt() -> nn.Module:
    with torch.device("meta"):
        return create_model("resnet8", 5)


def eight_bits() -> nn.Module:
    return create_model("resnet8", 5).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("make", [lazy, unbuilt, eight_bits])
def test_networks_that_cannot_be_run_are_refused(make):
    with pytest.raises(ACKDError, match="teacher"):
        FrozenTeacher(make())


def test_a_configuration_holds_what_was_given_and_defaults():
    config = TeacherConfig("resnet8", mean=[0.5], std=[1], input_size=32)
    assert (config.network, config.mean, config.std, config.input_size) == ("resnet8", (0.5,), (1,), 32)
    assert (config.weights, config.options, config.cache) == (None, None, None)
    assert (config.bf16, config.gate) == (False, "stop")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gate = "off"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"network": 3}, "network is 3"),
        ({"weights": 3}, "weights is 3"),
        ({"options": "stem"}, "options is 'stem'"),
        ({"mean": [0.5]}, r"mean is \(0.5,\) and std is None"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "std is"),
        ({"mean": [0.5], "std": [0.0]}, r"std is \[0.0\]"),
        ({"mean": [float("nan")], "std": [1.0]}, "mean is"),
        ({"input_size": 0}, "input_size is 0"),
        ({"input_size": 4097}, "input_size is 4097"),
        ({"bf16": 1}, "bf16 is 1"),
        ({"gate": "stopp"}, "gate is 'stopp'.*did you mean 'stop'"),
        ({"cache": 3}, "cache is 3"),
        ({"network": nn.Identity(), "options": {"stem": "cifar"}}, "options is {'stem': 'cifar'}"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changed, named):
    with pytest.raises(ACKDError, match=named):
        TeacherConfig(**{"network": "resnet8"} | changed)


def test_the_command_line_shows_what_a_configuration_holds():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--teacher", type=str | TeacherConfig | None)
    given = ["--teacher.network=resnet8", "--teacher.mean=[0.5]", "--teacher.std=[1.0]", "--teacher.gate=warn"]
    parsed = parser.parse_args(given).teacher.as_dict()
    assert TeacherConfig(**parsed) == TeacherConfig("resnet8", mean=(0.5,), std=(1.0,), gate="warn")
    helped = jsonargparse.ArgumentParser()
    helped.add_class_arguments(TeacherConfig, "teacher")
    shown = " ".join(helped.format_help().split())
    for field in ("Weight file; for a network", "Standard deviation of each channel", "is near chance", "ackd cache"):
        assert field in shown


def test_a_teacher_that_reads_blocks_of_pixels_reads_images_of_3_channels():
    teacher = FrozenTeacher(create_model("timm:tresnet_m", 4), input_size=64)
    with torch.no_grad():
        assert teacher(torch.randn(2, 3, 64, 64)).logits.shape == (2, 4)
