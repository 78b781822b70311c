"""``student: resnet20`` is short for ``student: {network: resnet20}``, in files and on the command line."""

from __future__ import annotations

import pytest
import yaml

from ackd_lightning.config.files import merge
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.lightning import ACKDCLI

BASE = ["--config", "digits_resnet20.yaml"]


def student(*arguments):
    return ACKDCLI("fit", [*BASE, *arguments]).settings()["model"]["student"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"network": "resnet20"}),
        (["--model.student", "resnet8"], {"network": "resnet8"}),
        (["--model.student=resnet8"], {"network": "resnet8"}),
        (["--model.student", "{network: resnet8, freeze: [stem]}"], {"network": "resnet8", "freeze": ["stem"]}),
        (["--model.student.network", "resnet8"], {"network": "resnet8"}),
        (["--model.student.weights", "a.safetensors"], {"network": "resnet20", "weights": "a.safetensors"}),
        (["--model.student.freeze", "[stem, stage1]"], {"network": "resnet20", "freeze": ["stem", "stage1"]}),
        (
            ["--model.student.freeze", "[stem]", "--model.student", "resnet8"],
            {"network": "resnet8", "freeze": ["stem"]},
        ),
        (["--model.student.backbone_lr_scale", "0.1"], {"network": "resnet20", "backbone_lr_scale": 0.1}),
        (["--model.student.options.stem", "cifar"], {"network": "resnet20", "options": {"stem": "cifar"}}),
        (["--model.student.taps", "[layer1, layer2]"], {"network": "resnet20", "taps": ["layer1", "layer2"]}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_over_a_config_with_the_short_form(arguments, expected):
    found = student(*arguments)
    assert {key: found[key] for key in expected} == expected
    assert {found[key] for key in ("weights", "pretrained") if key not in expected} <= {None, False}


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        ("resnet20", "resnet8", "resnet8"),
        ("resnet20", {"freeze": ["stem"]}, {"network": "resnet20", "freeze": ["stem"]}),
        ({"network": "a", "weights": "f"}, "resnet8", "resnet8"),
        ({"network": "a", "weights": "f"}, {"network": "b"}, {"network": "b", "weights": "f"}),
        ({"class_path": "my.Net"}, {"freeze": ["one"]}, {"network": {"class_path": "my.Net"}, "freeze": ["one"]}),
        ({"network": "a"}, {"class_path": "my.Net"}, {"class_path": "my.Net"}),
    ],
)
def test_files_are_laid_over_each_other(base, over, expected):
    assert merge({"model": {"student": base}}, {"model": {"student": over}})["model"]["student"] == expected


def test_a_network_of_ones_own_keeps_its_arguments(tmp_path, monkeypatch):
    path = tmp_path / "own.yaml"
    model = {"student": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 2}}}
    path.write_text(yaml.safe_dump({"model": model}))
    network = student("--config", str(path), "--model.student.freeze", "[one]")["network"]
    assert network["class_path"] == "torch.nn.Linear"
    assert (network["init_args"]["in_features"], network["init_args"]["out_features"]) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.student.frese", "[stem]"], "freeze"),
        (["--model.student.init_branches", "old"], "backbone"),
        (["--model.student.freeze", "3"], "freeze"),
        (["--model.student.pretrained", "perhaps"], "pretrained"),
        (["--model.student.backbone_lr_scale", "0"], "backbone_lr_scale"),
        (["--model.student.pretrained", "true", "--model.student.weights", "a.pth"], "weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_refused_with_their_place(arguments, named):
    with pytest.raises(ACKDError, match=named) as caught:
        ACKDCLI("fit", [*BASE, *arguments]).build()
    assert len(str(caught.value).splitlines()) == 1
