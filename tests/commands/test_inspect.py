from __future__ import annotations

import re

import pytest

from ackd_lightning.cli import main
from ackd_lightning.commands.inspect import read_size
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.zoo import count_parameters, create_model, multiply_adds
from ackd_lightning.runs.export import export_student
from deploy.samples import checkpoint


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of each line of the table by its first word."""
    return {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.startswith("F_")}


def test_stages_branches_and_costs_of_a_network_are_printed(capsys):
    assert main(["inspect", "resnet8", "--size", "32", "--classes", "10"]) == 0
    printed = capsys.readouterr().out
    network = create_model("resnet8", 10)
    assert f"{count_parameters(network):,} parameters, {multiply_adds(network, 32) / 1e6:,.1f} million" in printed
    table = rows(printed)
    assert table["F_2"][1:4] == ["layer2", "32 x 16 x 16", "D3B1"]
    owned = sum(each.numel() for name in ("layer3", "fc") for each in network.get_submodule(name).parameters())
    assert table["F_2"][4] == f"{owned:,}"
    assert table["F_3"][1:] == ["layer3", "64 x 8 x 8"]
    assert "D3B1, D2B2" in printed


def test_the_size_is_the_networks_own_by_default_and_may_be_rectangular(capsys):
    assert main(["inspect", "timm:test_vit"]) == 0
    assert "3 x 160 x 160 images" in capsys.readouterr().out
    assert main(["inspect", "resnet8", "--size", "32x64"]) == 0
    assert rows(capsys.readouterr().out)["F_3"][2] == "64 x 8 x 16"


def test_a_network_takes_options_such_as_another_image_size(capsys):
    assert main(["inspect", "timm:vit_tiny_patch16_224", "--options.img_size", "64"]) == 0
    assert "3 x 64 x 64 images" in capsys.readouterr().out


def test_modules_can_be_named_as_stages(capsys):
    assert main(["inspect", "resnet18", "--size", "64", "--taps", "[layer2, layer4]"]) == 0
    table = rows(capsys.readouterr().out)
    assert [row[1] for row in table.values()] == ["layer1", "layer2", "layer4"]


def test_a_network_that_cannot_be_cut_has_no_table_and_says_what_works(capsys):
    assert main(["inspect", "timm:crossvit_tiny_240"]) == 0
    printed = capsys.readouterr().out
    assert rows(printed) == {}
    assert "no stages were found" in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["resnet9"], "resnet8"),
        (["gone.onnx"], "gone.onnx does not exist"),
        (["resnet8", "--size", "big"], "'big'"),
        (["resnet8", "--size", "0"], "'0'"),
        (["resnet8", "--size", "3x4x5"], "'3x4x5'"),
        (["timm:vit_tiny_patch16_224", "--size", "32"], "224 x 224"),
        (["resnet8", "--taps", "layer9"], "'layer9'"),
        (["resnet8", "--classes", "0"], "num_classes"),
        (["timm:vit_tiny_patch16_224", "--options.img_size"], "--options.img_size needs a value"),
        (["timm:vit_tiny_patch16_224", "--img_size", "64"], "--img_size is unknown"),
        (["resnet8", "--options.width", "[1"], "option 'width' is unknown to 'resnet8'"),
        (["resnet18", "--options.stems", "cifar"], "stems"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, named, capsys):
    assert main(["inspect", *arguments]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert named in sentence


@pytest.mark.parametrize(("text", "size"), [("96", 96), ("64x48", (64, 48)), ("64X48", (64, 48))])
def test_sizes_are_read(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "9x", "-3", "9.5", "1e3"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ACKDError, match="--size"):
        read_size(text)


def test_a_file_and_a_run_are_described(tmp_path, capsys):
    checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    export_student(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "a.safetensors")
    for place in ("run", "run/checkpoints/last.ckpt", "a.safetensors"):
        assert main(["inspect", str(tmp_path / place)]) == 0
        printed = capsys.readouterr().out
        for value in ("resnet8", "cat, dog", "3 x 16 x 16", "mean 0.4", "data: Pets", "77,587 parameters"):
            assert value in printed
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--size", "32"]) == 2
    assert "--size" in capsys.readouterr().err


def test_a_file_of_another_program_is_refused(tmp_path, capsys):
    (tmp_path / "other.onnx").write_bytes(b"something")
    (tmp_path / "other.txt").write_bytes(b"something")
    for name in ("other.onnx", "other.txt"):
        assert main(["inspect", str(tmp_path / name)]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert name in sentence
