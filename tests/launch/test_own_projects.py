"""Data modules and callbacks of one's own by their class path, on the command line and in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ackd_lightning import DataInfo
from ackd_lightning.cli import main
from ackd_lightning.deploy.files import open_network
from ackd_lightning.models.weights import digest

RUN = Path("runs/ce/a")
FIT = ["fit", "--config", "ce", "--model.student", "resnet8", "--trainer.max_epochs", "1", "--name", "a"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about few steps


class Net(nn.Module):
    """A network that no name stands for."""

    def __init__(self, width: int = 4, channels: int = 3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, width, 3))
        self.fc = nn.Linear(width, 10)

    def forward(self, image):
        return self.fc(self.body(image).mean(dim=(2, 3)))


class AsDict(Net):
    def forward(self, image):
        return {"logits": super().forward(image), "embedding": image.mean(dim=(2, 3))}


class TwoHeads(Net):
    def forward(self, image):
        logits = super().forward(image)
        return logits, logits + 1


class Square(Net):
    def forward(self, image):
        return super().forward(image)[:, :, None, None]


def loader(size=(16, 16), channels=3):
    images = torch.randn(16, channels, *size, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(16) % 4), batch_size=8)


class Mine(L.LightningDataModule):
    def __init__(self, size: int = 16):
        super().__init__()
        self.info = DataInfo(4, size, class_names=("a", "b", "c", "d"))
        self.size = (size, size)

    def train_dataloader(self):
        return loader(self.size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Wide(Mine):
    """Rectangular grey images, and ``info`` as a property."""

    def __init__(self):
        L.LightningDataModule.__init__(self)
        self.size = (16, 24)

    @property
    def info(self):
        return DataInfo(4, (16, 24), channels=1)

    def train_dataloader(self):
        return loader((16, 24), channels=1)

    val_dataloader = train_dataloader


class Mappings(Mine):
    """Batches that are mappings, as those of transformers."""

    def train_dataloader(self):
        images, targets = loader(self.size).dataset.tensors
        return DataLoader([{"pixel_values": i, "labels": t} for i, t in zip(images, targets, strict=True)], 8)

    val_dataloader = train_dataloader


class ByPosition(Mine):
    """DataLoaders whose batch size has no name, which Lightning cannot predict with."""

    def predict_dataloader(self):
        return DataLoader(self.train_dataloader().dataset, 8)


class WithoutInfo(L.LightningDataModule):
    train_dataloader = val_dataloader = Mine.train_dataloader


class InfoInSetup(Mine):
    def __init__(self):
        super().__init__()
        del self.info

    def setup(self, stage):
        self.info = DataInfo(4, 16)


class InfoAsDict(Mine):
    info = None

    def __init__(self):
        L.LightningDataModule.__init__(self)
        self.info = {"num_classes": 4}


class OnlyVal(L.LightningDataModule):
    info = DataInfo(4, 16)
    size = (16, 16)
    val_dataloader = Mine.train_dataloader


class OnlyTrain(L.LightningDataModule):
    info = DataInfo(4, 16)
    size = (16, 16)
    train_dataloader = Mine.train_dataloader


class WithoutTest(OnlyTrain):
    val_dataloader = Mine.train_dataloader


class Counts(L.Callback):
    def __init__(self, word: str = "moin"):
        self.word = word

    def on_train_epoch_end(self, trainer, pl_module):
        print(f"{self.word}: {trainer.global_step} steps")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])


@pytest.mark.parametrize("name", ["Mine", "Wide", "Mappings"])
def test_a_data_module_of_lightning_trains(name):
    assert main([*FIT, "--data", f"own.{name}"]) == 0
    summary = json.loads((RUN / "summary.json").read_text())
    assert summary["data"] == name
    assert summary["steps"] == 2
    assert "val/acc" in summary["last"]
    assert (RUN / "student.safetensors").is_file()


def test_a_batch_size_without_its_name_is_refused_where_lightning_cannot_read_it(capsys):
    assert main([*FIT, "--data", "own.ByPosition"]) == 0
    assert main(["predict", str(RUN), "--output", "p.csv"]) == 2
    assert "ByPosition gives batch_size to its DataLoader by position" in capsys.readouterr().err


def test_the_same_in_a_file_and_later_commands_on_the_run():
    Path("own.yaml").write_text("include: [methods/ce]\ndata: {class_path: own.Mine, init_args: {size: 20}}\n")
    assert main(["fit", "--config", "own.yaml", *FIT[3:]]) == 0
    run = "runs/own/a"
    for command in ("validate", "test"):
        assert main([command, run]) == 0
    assert main(["predict", run, "--output", "p.csv"]) == 0
    first = Path("p.csv").read_text().splitlines()[1].split(",")
    assert first[4] == "abcd"[int(first[3])]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "own.WithoutInfo"], "WithoutInfo has no attribute `info`"),
        (["--data", "own.InfoInSetup"], "InfoInSetup has no attribute `info`"),
        (["--data", "own.InfoAsDict"], "InfoAsDict has the dict `info`"),
        (["--data", "own.OnlyVal"], "OnlyVal has no train_dataloader"),
        (["--data", "own.OnlyTrain"], "OnlyTrain has no val_dataloader"),
        (["--data", "own.WithoutTest", "--test"], "WithoutTest has no test_dataloader"),
        (["--data", "own.Mine", "--data.sise", "3"], "did you mean 'data.size'"),
        (["--data", "own.Counts"], "own.Counts"),
        (["--data", "own.Mine", "--trainer.callbacks+", "own.Mine"], "own.Mine"),
        (["--data", "own.Mine", "--trainer.callbacks+", "own.Counts", "--trainer.callbacks.words", "x"], "callbacks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_is_one_sentence(options, words, capsys):
    assert main([*FIT, *options]) == 2
    shown = capsys.readouterr().err.strip()
    assert words in shown
    assert len(shown.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_cache_needs_data_of_this_package(capsys):
    options = ["--config", "kd", "--model.student", "resnet8", "--model.teacher.network", "resnet14"]
    assert main(["cache", *options, "--trainer.max_epochs", "1", "--data", "own.Mine"]) == 2
    assert "data is Mine" in capsys.readouterr().err


def test_a_callback_of_ones_own(capsys):
    named = ["--trainer.callbacks+", "own.Counts", "--trainer.callbacks.word", "servus"]
    assert main([*FIT, "--data", "own.Mine", *named]) == 0
    assert "servus: 2 steps" in capsys.readouterr().out


def test_a_network_of_ones_own_goes_from_its_weight_file_to_a_device(capsys):
    """Teacher and student are classes of the user's; the teacher's weights come from a file."""
    teacher = Net(6)
    torch.save(teacher.state_dict(), "teacher.pth")
    networks = {"student": {"network": {"class_path": "own.Net"}}, "teacher": {"weights": "teacher.pth", "gate": "off"}}
    networks["teacher"]["network"] = {"class_path": "own.Net", "init_args": {"width": 6}}
    Path("own.yaml").write_text(yaml.safe_dump({"include": ["data/digits", "methods/kd"], "model": networks}))
    assert main(["fit", "--config", "own.yaml", *FIT[5:], "--data.max_per_class", "8"]) == 0
    stated = torch.load("runs/own/a/checkpoints/last.ckpt")["ackd_lightning"]["teacher_sha256"]
    assert stated == [digest("teacher.pth")]
    capsys.readouterr()
    assert main(["export", "runs/own/a", "--format", "pt2", "--check", "random"]) == 0
    Image.new("RGB", (20, 20), "gray").save("a.png")
    for network, output in (("runs/own/a", "a.csv"), ("runs/own/a/student-last.pt2", "b.csv")):
        assert main(["inspect", network]) == 0
        assert f"network: {Net.__module__}.Net" in capsys.readouterr().out
        assert main(["predict", network, "--images", "a.png", "--output", output]) == 0
    rows = [Path(name).read_text().splitlines()[1].split(",") for name in ("a.csv", "b.csv")]
    assert rows[0][:4] == rows[1][:4]
    capsys.readouterr()
    for command in (["export", "runs/own/a"], ["push", "runs/own/a", "me/x", "--license", "mit"]):
        assert main(command) == 2
        assert f"{Net.__module__}.Net, a network of your own" in capsys.readouterr().err
    Path("runs/own/a/config.yaml").unlink()
    assert main(["export", "runs/own/a", "--format", "pt2", "--overwrite"]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "options"), [("AsDict", ["--config", "qat", "--config", "ce"]), ("TwoHeads", []), ("Square", [])]
)
def test_logits_in_every_form_that_trains_go_to_a_device(form, options, capsys):
    """The checked file and the run answer alike, and the accuracy of the check is that of the images."""
    text = {"include": ["data/digits", "methods/ce"], "model": {"student": {"network": {"class_path": f"own.{form}"}}}}
    text["trainer"] = {"max_epochs": 6}
    text["model"]["optimizer"] = {"class_path": "Adam", "init_args": {"lr": 0.05}}
    Path("own.yaml").write_text(yaml.safe_dump(text))
    if options:
        assert main(["fit", "--config", "own.yaml", "--name", "float"]) == 0
        options = [*options, "--model.student.weights", "runs/own/float/checkpoints/last.ckpt"]
    assert main(["fit", "--config", "own.yaml", "--name", "a", *options]) == 0
    run = next(Path("runs").glob("own*/a"))
    Image.new("RGB", (20, 20), "gray").save("a.png")
    capsys.readouterr()
    assert main(["export", str(run), "--format", "pt2", "--out", "a.pt2", *(["--int8"] if options else [])]) == 0
    accuracy = json.loads((run / "summary.json").read_text())["last"]["val/acc"]
    assert f"{accuracy:.2%}" in capsys.readouterr().out  # of the check's images, which are those of the validation
    for network, output in ((run, "a.csv"), ("a.pt2", "b.csv")):
        assert main(["predict", str(network), "--images", "a.png", "--output", output]) == 0
    rows = [Path(name).read_text().splitlines()[1].split(",") for name in ("a.csv", "b.csv")]
    assert rows[0][1] == rows[1][1]
    assert abs(float(rows[0][2]) - float(rows[1][2])) < (0.05 if options else 1e-4)


def test_weights_of_a_network_of_ones_own_are_read_when_they_are_needed(capsys):
    networks = {"student": "resnet8", "teacher": {"weights": "gone.pth", "network": {"class_path": "own.Net"}}}
    Path("own.yaml").write_text(yaml.safe_dump({"include": ["data/digits", "methods/kd"], "model": networks}))
    assert main(["fit", "--config", "own.yaml", *FIT[5:]]) == 2
    assert "teacher weights gone.pth do not exist" in capsys.readouterr().err
    assert not Path("runs").exists()
    torch.save(Net(5).state_dict(), "gone.pth")
    assert main(["fit", "--config", "own.yaml", *FIT[5:]]) == 2
    assert "gone.pth" in capsys.readouterr().err


def test_what_a_network_of_ones_own_cannot_do_is_said(capsys):
    """No weights beside the run, other channels than the data have, and a function in place of a class."""
    network = {"class_path": "own.Net"}
    settings = {"include": ["data/digits", "methods/ce"], "model": {"student": {"network": network}}}
    Path("own.yaml").write_text(yaml.safe_dump(settings))
    fit = ["fit", "--config", "own.yaml", *FIT[5:], "--data.max_per_class", "4"]
    assert main([*fit, "--weights_dir", "weights"]) == 0
    shown = capsys.readouterr().out
    assert "no weights in weights/own.safetensors" in shown
    assert "for later runs" not in shown
    network["init_args"] = {"channels": 1}
    Path("own.yaml").write_text(yaml.safe_dump(settings))
    assert main([*fit, "--name", "b"]) == 2
    assert "reads 1 channel and the images have 3" in capsys.readouterr().err
    assert main([*fit, "--model.student.network", '{"class_path": "own.loader"}']) == 2
    assert "'own.loader', which is a function" in capsys.readouterr().err


def test_channels_of_own_data_are_stated_by_the_files():
    assert main([*FIT, "--data", "own.Wide"]) == 0
    assert main(["export", str(RUN), "--format", "pt2"]) == 0
    for place in (RUN, RUN / "student.safetensors", RUN / "student-last.pt2"):
        opened = open_network(place)
        assert opened.description.image_shape == (1, 16, 24)
        assert opened.logits(torch.zeros(2, 1, 16, 24)).shape == (2, 4)
