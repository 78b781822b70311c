"""Networks for images that are not RGB, from probing to the exported file."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer
from torch import nn

from ackd_lightning import CE, KD, DataInfo, DistillationModule, TeacherConfig, create_model, load_student
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import P2P
from ackd_lightning.runs.export import network_of
from ackd_lightning.runs.files import read_checkpoint

NAMES = ["resnet8", "wrn_16_2", "mobilenetv2_x0_5", "shufflenetv1", "resnet18", "squeezenet1_1", "timm:resnet10t"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_networks_by_name_read_any_number_of_channels(name, channels):
    network = create_model(name, 5, in_chans=channels).eval()
    assert network(torch.randn(2, channels, 64, 64)).shape == (2, 5)
    assert network.model_options == {"in_chans": channels}
    with torch.device("meta"):
        create_model(name, 5, in_chans=channels)


def test_three_channels_are_the_network_itself():
    torch.manual_seed(0)
    plain = create_model("resnet8", 5)
    torch.manual_seed(0)
    same = create_model("resnet8", 5, in_chans=3)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("value", [0, 17, "1", True])
def test_wrong_numbers_of_channels(value):
    with pytest.raises(ACKDError, match="in_chans"):
        create_model("resnet18", 5, in_chans=value)


def own(channels):
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def step(module, *shape):
    loss = module.method(*module.outputs(batch := module.as_batch((torch.randn(4, *shape), torch.arange(4)))), batch)
    sum(loss.values()).backward()
    return module


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("data", [DataInfo(5), None])
def test_an_own_network_says_how_many_channels_the_data_have(channels, data):
    step(DistillationModule(own(channels), method=CE(), data=data), channels, 32, 32)
    teacher = TeacherConfig(network=own(channels), gate="off")
    module = step(DistillationModule(own(channels), method=KD(), teacher=teacher, data=data), channels, 32, 32)
    assert module.data.image_shape == (channels, 32, 32)


@pytest.mark.parametrize(
    "data",
    [
        DataInfo(5, (24, 40), channels=1),
        DataInfo(5, 32, mean=(0.5,) * 6, std=(0.2,) * 6),
        DataInfo(5, (40, 24), mean=(0.5,) * 2, std=(0.2,) * 2, class_names=tuple("abcde")),
    ],
)
@pytest.mark.parametrize("name", ["resnet8", "timm:resnet10t"])
def test_a_named_student_follows_the_data_into_its_file(tmp_path, name, data):
    module = step(DistillationModule(name, method=CE(), data=data), *data.image_shape)
    exported = module.save_student(tmp_path / "student.safetensors")
    assert exported.largest_difference <= 1e-5
    network = load_student(tmp_path / "student.safetensors")
    image = torch.randn(2, *data.image_shape)
    torch.testing.assert_close(network(image), module.eval()(image))


@pytest.mark.parametrize(("learner", "name"), [(1, "resnet14"), (2, "resnet8")])
def test_peers_of_a_named_student_follow_the_data_into_their_files(tmp_path, learner, name):
    data = DataInfo(5, (24, 40), channels=1)
    module = step(
        DistillationModule("resnet8", method=P2P(students=["resnet14", "peer"], online_teacher="resnet8"), data=data),
        *data.image_shape,
    )
    trainer = Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    network, stated = network_of(read_checkpoint(tmp_path / "a.ckpt"), tmp_path / "a.ckpt", learner=learner)
    image = torch.randn(2, *data.image_shape)
    assert stated["model"] == name
    torch.testing.assert_close(network(image), module.eval().student(image).branches[learner - 1].logits)


def test_channels_that_do_not_fit_are_named():
    module = DistillationModule(own(4), data=DataInfo(5))
    with pytest.raises(ACKDError, match=r"3 channels .* have 4"):
        module.as_batch((torch.randn(4, 3, 32, 32), torch.arange(4)))
