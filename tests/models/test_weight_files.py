"""Weight files of other trainers load, or the error names a command that makes a file that does."""

from __future__ import annotations

import argparse
import pathlib
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.ops.misc import FrozenBatchNorm2d

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.metadata import typed_metadata
from ackd_lightning.models.weights import load_weights
from ackd_lightning.models.zoo import create_model

zip_or_not = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def small(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("resnet8", 5)
    for buffer in model.buffers():
        buffer.add_(seed)
    return model


def same(one: nn.Module, other: nn.Module, *, counters: bool = True) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(first[key], second[key]) for key in first if counters or "num_batches" not in key)


def prefixed(prefix: str, model: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "backbone.",
        "module.model.",
        "student.",
        "module.",
        "net.",
        "encoder_q.",
        "module.student.model.",
        "0.",
    ],
)
@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "plain"])
def test_one_prefix_is_found_by_matching_names(tmp_path, capsys, prefix, wrapped):
    source, target = small(), small(2)
    state = {**prefixed(prefix, source), "criterion.weight": torch.ones(3), "queue_ptr": torch.zeros(1)}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "a.pth")
    load_weights(target, tmp_path / "a.pth")
    assert same(source, target)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (prefix != "module.")
    assert all(repr(prefix) in line and "2 others" in line for line in said)


def test_two_networks_that_fit_are_not_guessed_between(tmp_path):
    torch.save({**prefixed("online.", small()), **prefixed("target.", small(2))}, tmp_path / "a.pth")
    target = small(3)
    with pytest.raises(ACKDError, match="'online\\.', 'target\\.'"):
        load_weights(target, tmp_path / "a.pth")
    assert same(target, small(3))


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "timm:mobilenetv3_small_050", "shufflenetv1", "densenet121"])
def test_files_without_counters_of_batches_load_as_in_torch(tmp_path, name):
    source, target = create_model(name, 5), create_model(name, 5)
    torch.save({key: value for key, value in source.state_dict().items() if "num_batches" not in key}, tmp_path / "a")
    load_weights(target, tmp_path / "a")
    assert same(source, target)


def test_counters_that_a_network_does_not_have_are_left_out_as_in_torch(tmp_path):
    source = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    target = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4))
    load_weights(target, tmp_path / "a.pth")
    assert same(target, source)


@zip_or_not
@pytest.mark.parametrize(
    "beside",
    [
        {"args": argparse.Namespace(lr=0.1, model="resnet8")},
        {"hyper_parameters": {"root": pathlib.Path("x") / "y"}},
        {"config": OrderedDict(lr=1), "history": {"acc": [1.0]}},
        {"args": argparse.Namespace(data=pathlib.PurePosixPath("x")), "arch": "resnet8", "metric": 91.0},
    ],
    ids=["namespace", "path", "dicts", "both"],
)
def test_plain_data_beside_the_weights_is_no_obstacle(tmp_path, zipped, beside):
    source, target = small(), small(2)
    file = tmp_path / "a.pth.tar"
    torch.save({"epoch": 3, "state_dict": source.state_dict(), **beside}, file, _use_new_zipfile_serialization=zipped)
    assert load_weights(target, file)["epoch"] == "3"
    assert same(source, target)


@zip_or_not
@pytest.mark.parametrize(
    ("raw", "averaged", "wrap"),
    [("state_dict", "state_dict_ema", lambda net: net), ("model", "model_ema", AveragedModel)],
    ids=["timm", "torchvision"],
)
def test_averaged_weights_are_read_where_a_trainer_kept_them(tmp_path, capsys, zipped, raw, averaged, wrap):
    source, target = small(), small(2)
    content = {raw: small(3).state_dict(), averaged: wrap(source).state_dict(), "arch": "resnet8"}
    beside = {"args": argparse.Namespace(lr=0.1), "version": 2}
    torch.save({**content, **beside}, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=zipped)
    load_weights(target, tmp_path / "a.pth.tar")
    assert same(source, target)
    said = f"several state dicts: '{averaged}' (an average of the weights) is read, '{raw}' is not\n"
    assert said in capsys.readouterr().out


class Options:
    """A class that no loader of plain data knows."""


class Meter(Options):
    """Another one."""


def test_notes_of_another_trainer_are_not_taken_for_those_of_this_package(tmp_path, capsys):
    beside = {"val_acc": 93.4, "test_acc": 0.5, "head": "linear", "mean": 0.5, "epoch": 3}
    torch.save({"state_dict": small().state_dict(), **beside}, tmp_path / "a.pth")
    metadata = load_weights(create_model("resnet8", 5), tmp_path / "a.pth")
    assert typed_metadata(metadata, "a.pth") == {"test_acc": 0.5}
    assert "head" not in metadata
    assert metadata["epoch"] == "3"
    said = capsys.readouterr().out
    assert "its val_acc, 93.4, is not in the form of this package" in said
    assert "its mean, 0.5," in said


def scripted(file, source, zipped):
    torch.jit.script(source).save(file)


CASES = {
    "whole network": lambda file, source, zipped: torch.save(source, file, _use_new_zipfile_serialization=zipped),
    "state_dict beside an object": lambda file, source, zipped: torch.save(
        {"args": Options(), "state_dict": source.state_dict()}, file, _use_new_zipfile_serialization=zipped
    ),
    "object before and model after": lambda file, source, zipped: torch.save(
        {"epoch": 1, "meter": Meter(), "model": source.state_dict(), "x": OrderedDict()},
        file,
        _use_new_zipfile_serialization=zipped,
    ),
    "counts beside it": lambda file, source, zipped: torch.save(
        {"history": defaultdict(list, {"acc": [1.0]}), "state_dict": source.state_dict()},
        file,
        _use_new_zipfile_serialization=zipped,
    ),
    "network under model": lambda file, source, zipped: torch.save(
        {"epoch": 1, "model": source}, file, _use_new_zipfile_serialization=zipped
    ),
    "state dict with an object in it": lambda file, source, zipped: torch.save(
        {**source.state_dict(), "meta": Options()}, file, _use_new_zipfile_serialization=zipped
    ),
    "an entry of its own beside an object": lambda file, source, zipped: torch.save(
        {"args": Options(), "ema_model": source.state_dict()}, file, _use_new_zipfile_serialization=zipped
    ),
    "plain dict in an entry of its own": lambda file, source, zipped: torch.save(
        {"optimizer": {"state": {}}, "encoder_q": dict(source.state_dict()), "meter": Meter()},
        file,
        _use_new_zipfile_serialization=zipped,
    ),
    "arrays": lambda file, source, zipped: torch.save(
        {key: value.numpy() for key, value in source.state_dict().items()}, file, _use_new_zipfile_serialization=zipped
    ),
    "TorchScript": scripted,
}


@pytest.mark.parametrize("entry", ["ema_model", "student_ema", "encoder"])
def test_an_entry_of_any_name_is_read_where_it_is_the_only_state_dict(tmp_path, capsys, entry):
    source, target = small(), small(2)
    torch.save({"epoch": 3, entry: source.state_dict(), "optimizer": {"state": {}}}, tmp_path / "a.pth")
    load_weights(target, tmp_path / "a.pth")
    assert same(source, target)
    assert repr(entry) in capsys.readouterr().out
    torch.save({entry: source.state_dict(), "other": target.state_dict()}, tmp_path / "b.pth")
    with pytest.raises(ACKDError, match=entry):
        load_weights(target, tmp_path / "b.pth")


@zip_or_not
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_named_command_makes_a_file_that_loads(tmp_path, kind, zipped):
    source, target = small(), small(2)
    file, new = tmp_path / "a.pth", tmp_path / "new.pth"
    CASES[kind](file, source, zipped)
    with pytest.raises(ACKDError) as caught:
        load_weights(target, file)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    exec(message.split("`")[1], {"torch": torch, "OLD": file, "NEW": new})
    load_weights(target, new)
    assert same(source, target)
