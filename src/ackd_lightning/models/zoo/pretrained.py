"""Published weights of torchvision and timm, fetched by their own download when a configuration asks for them."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.models.hub import HF
from ackd_lightning.models.weight_files import tell
from ackd_lightning.models.zoo import TIMM, construct, create_model, named, timm_name, torchvision_names
from ackd_lightning.models.zoo.huggingface import described, folder_of, with_weights

_HUB_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Published:
    """Weights that torchvision or timm publish for a network.

    Attributes:
        name: Name of the network for ``create_model``.
        source: Address of the weights.
        num_classes: Number K of classes of the published network.
        metadata: Preprocessing and classes of the weights: ``mean`` and ``std`` of pixels in 0 to 1, ``input_size``
            (height, width), ``interpolation``, ``weights`` (the library's own name), and, where they are known,
            ``class_names`` and ``class_labels`` (the same classes in words, which need not be unique).
        cached: File in the library's cache; None for weights that would have to be fetched.
        load: Function of the network's options that returns it with these weights.
    """

    name: str
    source: str
    num_classes: int
    metadata: Mapping[str, Any]
    cached: Path | None
    load: Callable[[dict[str, Any]], nn.Module]


def published(name: str) -> Published:
    """Look up the weights that are published for a network, without fetching anything.

    Args:
        name: Name of a classification network of torchvision (``resnet18``) or ``timm:NAME``. A tag of timm
            (``timm:resnet18.a1_in1k``) selects one of several weights; the library's default is used without one.

    Raises:
        ACKDError: If no weights are published for that name.

    Examples:
        >>> published("resnet18").metadata["weights"]
        'ResNet18_Weights.IMAGENET1K_V1'
    """
    if not isinstance(name, str) or not name:
        raise ACKDError(
            f"pretrained is true and the network is {name!r}; name a network of torchvision or timm (timm:NAME)"
        )
    if name.startswith(TIMM):
        return _timm(name)
    if name.startswith(HF):
        return _folder(name)
    if name in torchvision_names():
        return _torchvision(name)
    create_model(name, 2)  # an unknown name has its own message
    raise ACKDError(
        f"no weights are published for {name!r}, only for networks of torchvision and timm (timm:NAME); leave "
        "pretrained out and name a weight file"
    )


def pretrained(name: str, options: dict[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network with its published weights and its own classes.

    One line says what is fetched from where, or that it comes from the local cache. The download is the library's own,
    with its checksum; files are read without running code in them.

    Args:
        name: Network, as for `published`.
        options: Further options of the network; none by default.

    Returns:
        Network, and its metadata as in `Published`.

    Raises:
        ACKDError: If no weights are published, an option does not go with them, or they cannot be fetched or read.
    """
    found = published(name)
    given = dict(options or {})
    for option in given:
        if option in ("stem", "num_classes", "weights", "pretrained", "pretrained_cfg", "checkpoint_path"):
            raise ACKDError(f"option {option!r} of {name!r} contradicts its published weights; leave it out")
    local = found.cached is not None and str(found.cached) != found.source
    place = f"from the local cache, {found.cached} ({found.source})" if local else f"from {found.source}"
    tell(f"weights of {name} ({found.metadata['weights']}): {place}")
    try:
        if found.cached is None and found.source.startswith("http"):
            _ask(found.source)
        with _weights_only():
            network = found.load(given)
    except ACKDError:
        raise
    except Exception as error:  # every library of a download has its own
        reason = first_line(error)
        where = f"read from {found.cached}" if found.cached else f"fetched from {found.source}"
        remedy = (
            "remove the file, and it is fetched again"
            if found.cached
            else "connect this machine, or name a weight file"
        )
        raise ACKDError(f"the weights of {name!r} cannot be {where} ({reason}); {remedy}") from error
    return named(network, name, given), dict(found.metadata)


def _ask(address: str) -> None:
    """Ask a server whether it is there, since the libraries repeat a download for a minute when it is not."""
    with contextlib.suppress(urllib.error.HTTPError):  # an answer
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10).close()


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch.load refuse everything but tensors, whatever its caller asks for."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _in_hub_folder(url: str) -> Path | None:
    """Return the file of an address in the folder of torch.hub, which torchvision and timm use, if it is there."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return file if file.is_file() else None


def _torchvision(name: str) -> Published:
    from torchvision.models import get_model, get_model_weights

    entry = get_model_weights(name).DEFAULT
    view = entry.transforms()
    words = list(entry.meta["categories"])
    metadata = {
        "weights": str(entry),
        "mean": tuple(view.mean),
        "std": tuple(view.std),
        "input_size": _height_and_width(view.crop_size),
        "interpolation": view.interpolation.value,
        **_imagenet_classes(len(words)),
        "class_labels": words,
    }
    fixed = {"aux_logits": False} if name == "inception_v3" else {}  # googlenet drops its own

    def load(options: dict[str, Any]) -> nn.Module:
        return construct(partial(get_model, name, weights=entry, progress=_progress()), name, {**fixed, **options})

    return Published(name, entry.url, len(words), metadata, _in_hub_folder(entry.url), load)


def _folder(name: str) -> Published:
    folder = folder_of(name)
    metadata = {"weights": folder.name, **described(folder)}
    words = metadata.get("class_names") or metadata["class_labels"]
    known = _imagenet_classes(len(words))
    if known.get("class_labels") == words:  # of which two are "crane", so that words are no names
        metadata |= known
    return Published(name, str(folder), len(words), metadata, folder, partial(with_weights, name))


def _timm(name: str) -> Published:
    import timm

    bare = timm_name(name)
    config = timm.get_pretrained_cfg(bare)
    if config is None or not config.has_weights:
        raise ACKDError(f"timm publishes no weights for {bare!r}; leave pretrained out and name a weight file")
    tagged = f"{bare.partition('.')[0]}.{config.tag}" if config.tag else bare
    if config.hf_hub_id:
        from huggingface_hub import constants, try_to_load_from_cache

        source = f"{constants.ENDPOINT}/{config.hf_hub_id}"
        files = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
        paths = (try_to_load_from_cache(config.hf_hub_id, each) for each in files)
        cached = next((Path(each) for each in paths if isinstance(each, str)), None)
    else:
        source = config.url if isinstance(config.url, str) else str(config.url and config.url[0])
        cached = _in_hub_folder(source)
    metadata = {
        "weights": tagged,
        "mean": tuple(config.mean),
        "std": tuple(config.std),
        "input_size": _height_and_width(config.input_size[1:]),
        "interpolation": config.interpolation,
        **_imagenet_classes(config.num_classes),
    }
    if config.label_names:
        metadata["class_names"] = list(config.label_names)
        metadata.pop("class_labels", None)

    def load(options: dict[str, Any]) -> nn.Module:
        timm.models.set_pretrained_check_hash(True)
        timm.models.set_pretrained_download_progress(_progress())
        return construct(partial(timm.create_model, bare, pretrained=True), name, options)

    return Published(name, source, config.num_classes, metadata, cached, load)


def _progress() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _height_and_width(size: Any) -> tuple[int, int]:
    values = [size] if isinstance(size, int) else list(size)
    return values[0], values[-1]


@functools.cache
def _imagenet_classes(num_classes: int) -> dict[str, Any]:
    """Names (WordNet's) and words of the classes of ImageNet and its subsets, which are told apart by their number."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return {}
    known = ImageNetInfo(subset)
    names: list[str] = known.label_names()  # type: ignore[no-untyped-call]  # timm has no types here
    return {"class_names": list(names), "class_labels": list(known.label_descriptions())}
