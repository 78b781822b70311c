"""Published weights: where they come from, what comes with them, and what is refused. No network is used."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision.models
from safetensors.torch import save_file

from ackd_lightning import CE, DataInfo, DistillationModule, StudentConfig
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.zoo import create_model
from ackd_lightning.models.zoo.pretrained import pretrained, published


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty folder of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())  # every server answers
    return folder


def place(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Put weights into the cache, as a download leaves them."""
    torch.manual_seed(3)
    state = create_model(name, 1000).state_dict()
    torch.save(state, folder / torchvision.models.get_model_weights(name).DEFAULT.url.rpartition("/")[2])
    return state


def from_hub(monkeypatch, name: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Let timm find a file at the Hugging Face Hub, without a network."""
    torch.manual_seed(4)
    state = create_model(name, 1000).state_dict()
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: str(file))
    return state


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_torchvision_reads_the_file_in_its_cache(hub, capsys, name):
    state = place(hub, name)
    network, metadata = pretrained(name)
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert metadata["mean"] == (0.485, 0.456, 0.406)
    assert metadata["std"] == (0.229, 0.224, 0.225)
    assert metadata["input_size"] == (224, 224)
    assert metadata["interpolation"] == "bilinear"
    assert len(metadata["class_names"]) == len(set(metadata["class_names"])) == 1000
    assert (metadata["class_names"][0], metadata["class_labels"][0]) == ("n01440764", "tench")
    assert network.model_name == name
    first = capsys.readouterr().out.splitlines()[0]
    assert name in first
    assert str(hub) in first
    assert "https://download.pytorch.org/models/" in first


def test_a_student_keeps_the_normalisation_inside_published_inception_networks(hub):
    published_state = torchvision.models.googlenet(aux_logits=True, init_weights=False).state_dict()
    torch.save(published_state, hub / torchvision.models.get_model_weights("googlenet").DEFAULT.url.rpartition("/")[2])
    data = DataInfo(1000, 96, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    module = DistillationModule(StudentConfig("googlenet", pretrained=True), method=CE(), data=data)
    network = module.student.plain().eval()
    images = torch.randn(2, 3, 96, 96)
    wanted = pretrained("googlenet")[0].eval()
    assert wanted.transform_input
    again = create_model(network.model_name, 1000, **network.model_options).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        for each in (network, again):
            torch.testing.assert_close(each(images), wanted(images))


def test_a_fetch_is_announced_before_it_happens(monkeypatch, capsys):
    seen = []

    def fetch(url, *_, **__):
        seen.append((url, capsys.readouterr().out))
        return create_model("squeezenet1_1", 1000).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    pretrained("squeezenet1_1")
    ((url, printed),) = seen
    assert url in printed.splitlines()[0]


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:resnet10t.c3_in1k"])
def test_timm_reads_what_its_own_download_returns(monkeypatch, tmp_path, capsys, name):
    state = from_hub(monkeypatch, name, tmp_path)
    network, metadata = pretrained(name)
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert metadata["weights"] == "resnet10t.c3_in1k"
    assert metadata["input_size"] == (176, 176)
    assert metadata["class_names"][1] == "n01443537"
    assert "https://huggingface.co/timm/resnet10t.c3_in1k" in capsys.readouterr().out.splitlines()[0]


def test_the_normalisation_is_the_networks_own():
    metadata = published("timm:vit_tiny_patch16_224").metadata
    assert metadata["mean"] == metadata["std"] == (0.5, 0.5, 0.5)
    assert metadata["interpolation"] == "bicubic"
    assert published("timm:vit_tiny_patch16_224.augreg_in21k").num_classes == 21843


def test_options_reach_the_network(monkeypatch, tmp_path):
    from_hub(monkeypatch, "timm:resnet10t", tmp_path)
    network, _ = pretrained("timm:resnet10t", {"drop_rate": 0.25})
    assert network.drop_rate == 0.25
    assert network.model_options == {"drop_rate": 0.25}


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("resnet20", {}, "'resnet20'"),
        ("wrn_40_2", {}, "'wrn_40_2'"),
        (None, {}, "None"),
        ("", {}, "''"),
        ("timm:resnet8x4", {}, "resnet8x4"),
        ("resnet181", {}, "did you mean"),
        ("timm:resnet18.zzz", {}, "resnet18"),
        ("timm:vgg11.tv_in1kk", {}, "vgg11"),
        ("resnet18", {"stem": "cifar"}, "stem"),
        ("timm:resnet18", {"num_classes": 10}, "num_classes"),
    ],
)
def test_what_has_no_published_weights_is_refused(name, options, named):
    with pytest.raises(ACKDError, match=named):
        pretrained(name, options)


def test_a_network_of_timm_without_weights_is_refused():
    bare = next(name for name in timm.list_models() if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(ACKDError, match=bare):
        pretrained(f"timm:{bare}")


def test_an_unknown_option_is_named(hub):
    place(hub, "squeezenet1_1")
    with pytest.raises(ACKDError, match="'colour'"):
        pretrained("squeezenet1_1", {"colour": 3})


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("invalid hash value"), ConnectionError("reset")])
def test_a_fetch_that_fails_names_the_address(monkeypatch, error):
    def fetch(*_, **__):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(ACKDError, match=r"squeezenet1_1.*https://download\.pytorch\.org"):
        pretrained("squeezenet1_1")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    with pytest.raises(ACKDError, match=r"resnet10t.*https://huggingface\.co"):
        pretrained("timm:resnet10t")


class Planted:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [b"<html>", pickle.dumps(Planted()), b""])
def test_a_file_in_the_cache_that_holds_no_weights_is_named(hub, capsys, content):
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    (hub / url.rpartition("/")[2]).write_bytes(content)
    with pytest.raises(ACKDError, match=r"squeezenet1_1.*remove"):
        pretrained("squeezenet1_1")
    assert "executed" not in capsys.readouterr().out


def test_code_in_a_torch_file_is_not_run(hub, capsys):
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    torch.save({"features.0.weight": Planted()}, hub / url.rpartition("/")[2])
    with pytest.raises(ACKDError, match="squeezenet1_1"):
        pretrained("squeezenet1_1")
    assert "executed" not in capsys.readouterr().out


def test_every_name_of_torchvision_has_its_preprocessing():
    for name in torchvision.models.list_models(module=torchvision.models):
        found = published(name)
        assert found.num_classes == 1000
        assert len(found.metadata["mean"]) == 3


def test_every_published_name_of_timm_has_its_preprocessing():
    for name in timm.list_pretrained():
        found = published(f"timm:{name}")
        assert found.source.startswith("http"), name
        if "class_names" in found.metadata:
            assert len(found.metadata["class_names"]) == found.num_classes, name


def test_a_server_that_does_not_answer_is_asked_once(monkeypatch):
    def away(*_, **__):
        raise URLError("no route")

    def fetch(*_, **__):
        raise AssertionError("the library would repeat this for a minute")

    monkeypatch.setattr("urllib.request.urlopen", away)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    with pytest.raises(ACKDError, match=r"https://huggingface\.co.*no route"):
        pretrained("timm:resnet10t")
