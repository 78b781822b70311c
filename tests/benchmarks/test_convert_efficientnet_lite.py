"""The program benchmarks/convert_efficientnet_lite.py: names, metadata, proof."""

from __future__ import annotations

import json

import convert_efficientnet_lite as program
import pytest
import torch

from ackd_lightning import create_model, load_weights


def written(name: str, path):
    """A file with the names of the package index, and the network whose weights it has."""
    network = create_model(f"timm:{name}", 1000).eval()
    names = dict(program.module_names(network))
    state = {
        f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": each for key, each in network.state_dict().items()
    }
    torch.save(state, path)
    return network, state


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite1"])
def test_every_tensor_finds_its_layer(name, tmp_path):
    network, state = written(name, tmp_path / "lite.pth")
    assert {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_blocks.1._bn0.running_mean"} <= set(state)
    out = tmp_path / "lite.safetensors"
    program.main([str(tmp_path / "lite.pth"), "--network", f"timm:{name}", "--out", str(out)])
    copy = create_model(f"timm:{name}", 1000).eval()
    metadata = load_weights(copy, out)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(copy(image), network(image))
    assert json.loads(metadata["mean"]) == [0.5, 0.5, 0.5]
    assert len(json.loads(metadata["class_names"])) == 1000


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_another_network_is_refused(sizes, tmp_path):
    there, here = (f"tf_efficientnet_lite{size}" for size in sizes)
    written(there, tmp_path / "lite.pth")
    out = tmp_path / "lite.safetensors"
    with pytest.raises(SystemExit, match="_blocks"):
        program.main([str(tmp_path / "lite.pth"), "--network", f"timm:{here}", "--out", str(out)])
    assert not out.exists()


def test_the_proof_counts_images_of_known_classes(tmp_path, capsys):
    from PIL import Image

    written("tf_efficientnet_lite0", tmp_path / "lite.pth")
    folder = tmp_path / "tiny" / "val"
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(folder / "images" / f"val_{number}.JPEG")
    wnids = ("n01443537", "n01443537", "n99999999")
    lines = [f"val_{number}.JPEG\t{wnid}\t0\t0\t1\t1" for number, wnid in enumerate(wnids)]
    (folder / "val_annotations.txt").write_text("\n".join(lines))
    arguments = [str(tmp_path / "lite.pth"), "--out", str(tmp_path / "lite.safetensors"), "--prove", str(folder.parent)]
    program.main(arguments)
    shown = capsys.readouterr().out
    assert "2 images of 1 classes" in shown
    assert "100.00 % among the 1" in shown
