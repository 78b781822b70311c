"""Image classifiers of Hugging Face from a folder on disk; nothing is downloaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.extras import require
from ackd_lightning.models.hub import HF
from ackd_lightning.models.outputs import logits_of

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Interpolations as Pillow numbers them."""


def folder_of(name: str) -> Path:
    """Return the folder of a network.

    Args:
        name: Name that begins with ``hf:``.

    Raises:
        ACKDError: If it is no folder with a ``config.json``.
    """
    folder = Path(name.removeprefix(HF)).expanduser()
    if not (folder / "config.json").is_file():
        raise ACKDError(
            f"network {name!r} names no folder with a config.json; give the folder that `save_pretrained` wrote, as "
            "hf:FOLDER"
        )
    return folder


def from_config(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Build an image classifier with fresh weights.

    Args:
        name: ``hf:FOLDER``.
        num_classes: Number K of classes.
        options: Values that replace those of the folder's ``config.json``.

    Raises:
        ACKDError: If transformers is missing, or the folder holds no image classifier.
    """
    transformers = require("transformers", "huggingface", f"network {name!r}")
    folder = folder_of(name)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, num_labels=num_classes, **options
        )
        with _quiet(transformers):
            network: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        raise _refused(name, error) from error
    return _returning_logits(network)


def with_weights(name: str, options: dict[str, Any]) -> nn.Module:
    """Load an image classifier with its weights and its own classes.

    Args:
        name: ``hf:FOLDER``; weights are read from safetensors only.
        options: Values that replace those of the folder's ``config.json``.

    Raises:
        ACKDError: If transformers is missing, or the folder holds no weights of an image classifier.
    """
    transformers = require("transformers", "huggingface", f"network {name!r}")
    try:
        with _quiet(transformers):
            network, report = transformers.AutoModelForImageClassification.from_pretrained(
                folder_of(name),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise _refused(name, error) from error
    if missing := sorted(report["missing_keys"]):
        raise ACKDError(
            f"the weights of {name!r} lack {missing[0]!r} and {len(missing) - 1} others; give the folder of an image "
            "classifier, and not of its backbone"
        )
    return _returning_logits(network)


def _returning_logits(network: nn.Module) -> nn.Module:
    """Let a network return its logits alone, as every other network does, and not an object with them."""
    network.register_forward_hook(_logits_alone)
    return network


def _logits_alone(_: nn.Module, __: Any, output: Any) -> Tensor:
    return logits_of(output)


def described(folder: Path) -> dict[str, Any]:
    """Read the classes of a network and how its images are prepared.

    Args:
        folder: Folder with a ``config.json`` and, perhaps, a ``preprocessor_config.json``.

    Returns:
        ``class_names``, or ``class_labels`` where two classes have the same word, as in ImageNet; ``mean`` and ``std``
        of pixels in 0 to 1, ``input_size`` (height, width) and ``interpolation`` where they are stated.

    Raises:
        ACKDError: If the network reads the channels in another order.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    labels = config.get("id2label") or {str(number): f"LABEL_{number}" for number in range(config.get("num_labels", 2))}
    words = [labels[number] for number in sorted(labels, key=int)]
    result: dict[str, Any] = {"class_names" if len(set(words)) == len(words) else "class_labels": words}
    file = folder / "preprocessor_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if stated.get("do_flip_channel_order"):
        raise ACKDError(
            f"{file} has do_flip_channel_order, so the network reads BGR, and images here are RGB: reverse the input "
            "channels of its first convolution, and set do_flip_channel_order to false"
        )
    result |= _normalisation(stated, config.get("num_channels") or 3)
    size = stated.get("crop_size") if stated.get("do_center_crop") else stated.get("size")
    size = size if size is not None else config.get("image_size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if size is not None:
        result["input_size"] = (size, size) if isinstance(size, int) else tuple(size)
    if stated.get("resample") in _RESAMPLE:
        result["interpolation"] = _RESAMPLE[stated["resample"]]
    return result


def _normalisation(stated: dict[str, Any], channels: int) -> dict[str, Any]:
    """Return ``mean`` and ``std`` of pixels in 0 to 1 that do what the image processor of a folder does; {} if unknown.

    A processor multiplies pixels of 0 to 255 by ``rescale_factor``, subtracts 1 with ``rescale_offset``, normalises,
    and with ``include_top`` (EfficientNet) divides by the standard deviation again.
    """
    mean, std = stated.get("image_mean"), stated.get("image_std")
    if not stated.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    if mean is None or std is None:
        return {}
    rescale = stated.get("do_rescale", True)
    factor = 255 * stated.get("rescale_factor", 1 / 255) if rescale else 255.0
    offset = 1.0 if rescale and stated.get("rescale_offset") else 0.0
    again = stated.get("image_std") if stated.get("include_top") else None
    std = [each * more for each, more in zip(std, again or [1.0] * len(std), strict=True)]
    return {"mean": tuple((each + offset) / factor for each in mean), "std": tuple(each / factor for each in std)}


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the advice and progress bars of transformers."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _refused(name: str, error: Exception) -> ACKDError:
    reason = first_line(error)
    return ACKDError(f"network {name!r} cannot be read ({reason}); give a folder with an image classifier")
