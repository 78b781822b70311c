"""Networks by name: those of the CIFAR benchmarks, any of torchvision or timm, and folders of Hugging Face."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.models.hub import HF
from ackd_lightning.models.zoo.channels import channels_option, read_channels
from ackd_lightning.models.zoo.complexity import count_parameters, multiply_adds
from ackd_lightning.models.zoo.huggingface import from_config
from ackd_lightning.models.zoo.mobilenetv2 import CifarMobileNetV2
from ackd_lightning.models.zoo.resnet_cifar import CifarResNet
from ackd_lightning.models.zoo.shufflenetv1 import CifarShuffleNetV1
from ackd_lightning.models.zoo.wide_resnet import WideResNet
from ackd_lightning.plain import as_plain, is_plain

__all__ = ["count_parameters", "create_model", "list_models", "multiply_adds"]

_CIFAR: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(CifarResNet, depth=8),
    "resnet14": partial(CifarResNet, depth=14),
    "resnet20": partial(CifarResNet, depth=20),
    "resnet32": partial(CifarResNet, depth=32),
    "resnet44": partial(CifarResNet, depth=44),
    "resnet56": partial(CifarResNet, depth=56),
    "resnet110": partial(CifarResNet, depth=110),
    "resnet8x4": partial(CifarResNet, depth=8, widths=(32, 64, 128, 256)),
    "resnet32x4": partial(CifarResNet, depth=32, widths=(32, 64, 128, 256)),
    "wrn_16_2": partial(WideResNet, depth=16, widen=2),
    "wrn_28_2": partial(WideResNet, depth=28, widen=2),
    "wrn_28_4": partial(WideResNet, depth=28, widen=4),
    "wrn_40_1": partial(WideResNet, depth=40, widen=1),
    "wrn_40_2": partial(WideResNet, depth=40, widen=2),
    "mobilenetv2_x0_5": partial(CifarMobileNetV2, width=0.5),
    "mobilenetv2_x1_0": partial(CifarMobileNetV2, width=1.0),
    "mobilenetv2_x1_4": partial(CifarMobileNetV2, width=1.4),
    "shufflenetv1": CifarShuffleNetV1,
}

TIMM = "timm:"
_STEMS = ("imagenet", "cifar")
# options with which torchvision or timm would download weights; here they come from local files only
_FETCHING = frozenset({"weights", "weights_backbone", "pretrained", "pretrained_cfg", "checkpoint_path"})
# by default these two return several outputs in training, and warn if init_weights is missing
_TORCHVISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Build a network with fresh weights that maps images (B, C, H, W) to logits (B, K).

    >>> from ackd_lightning.models.zoo import count_parameters, create_model
    >>> count_parameters(create_model("resnet20", 100))
    278324

    Args:
        name: CIFAR network of :func:`list_models` (``resnet20``, ``wrn_40_2``, …), classification network of
            torchvision (``resnet18``), ``timm:NAME``, or ``hf:FOLDER`` for an image classifier of Hugging Face's
            transformers on disk. No name stands for two networks.
        num_classes: Number K of classes.
        **options: Options of the network. All have ``in_chans``, the number of channels of the images. ResNets of
            torchvision have ``stem``: ``imagenet`` (the default, 7x7 with stride 2 and max-pooling) or ``cifar`` (3x3
            with stride 1, no pooling). All other options are passed to the constructor of torchvision or timm.

    Raises:
        ACKDError: If the name or an option is unknown, an option would download weights, or there is no class.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ACKDError(f"num_classes of {name!r} is {num_classes!r}; it must be a whole number, at least 1")
    for option in options:
        if option in _FETCHING:
            raise ACKDError(
                f"option {option!r} of {name!r} would download weights; leave it out, and ask for published weights "
                "with `pretrained: true` or load a file with load_weights"
            )
    channels, rest = channels_option(options, name)
    if name in _CIFAR:
        if rest:
            raise ACKDError(
                f"option {next(iter(rest))!r} is unknown to {name!r}, which has in_chans alone; leave it out"
            )
        return named(read_channels(_CIFAR[name](num_classes), channels), name, options)
    if name.startswith(TIMM):
        return named(_from_timm(name, num_classes, options), name, options)
    if name.startswith(HF):
        given = {**rest, "num_channels": channels} if "in_chans" in options else rest
        return named(from_config(name, num_classes, given), name, options)
    if name in torchvision_names():
        return named(read_channels(_from_torchvision(name, num_classes, rest), channels), name, options)
    if name.lstrip().startswith("{"):  # what the command line could not read as a class and its arguments is text
        raise ACKDError(
            f"network {name} does not fit its class: write class_path and init_args into a configuration file, where "
            "what is wrong with them is named"
        )
    package, dot, _ = name.partition(".")
    if dot and package.isidentifier() and package not in ("timm", "torchvision") and _exists(package):
        raise ACKDError(
            f"no network is named {name!r}; give the name of a class in model.student.network.class_path or "
            "model.teacher.network.class_path, and its arguments in init_args"
        )
    raise ACKDError(
        f"no network is named {name!r}; {_similar(name)} (or a torchvision classification network, or timm:NAME)"
    )


def _exists(package: str) -> bool:
    """Whether a module could be imported; ``__main__`` has no spec."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _similar(name: str) -> str:
    """Hint at the names of any library that are near an unknown one."""
    import timm  # slow to import, and needed here for the message alone

    bare = re.sub(r"^(timm|torchvision|hf-hub|tv)[:/_.]", "", name.strip(), flags=re.IGNORECASE).rpartition("/")[2]
    known = list_models()
    for wanted in (bare, bare.lower(), bare.lower().replace("-", "_")):
        if wanted in known:
            return f"did you mean {wanted!r}?"
        if timm.is_model(wanted):
            return f"did you mean {TIMM + wanted!r}?"
    wanted = bare.lower()
    near = difflib.get_close_matches(wanted, [*known, *timm.list_models()], cutoff=0.6)
    if not near:
        return near_matches(wanted, _CIFAR)  # all would be too many
    names = dict.fromkeys(each if each in known else TIMM + each for each in near)  # timm has a resnet18, too
    return f"did you mean {' or '.join(map(repr, names))}?"


def named(network: nn.Module, name: str, options: dict[str, Any]) -> nn.Module:
    """Store how a network was built, so that an exported file can describe it.

    With options that a file cannot hold, such as a function, the network counts as one of the user's own.

    Args:
        network: Network.
        name: Name for `create_model`.
        options: Options that were given with it.
    """
    if is_plain(plain := as_plain(dict(options))):
        network.__dict__.update(model_name=name, model_options=plain)
    return network


def list_models() -> list[str]:
    """List the names for :func:`create_model`: CIFAR networks, then torchvision's; those of timm are not listed."""
    return [*_CIFAR, *torchvision_names()]


def torchvision_names() -> list[str]:
    """Return the sorted names of torchvision's classification networks."""
    import torchvision.models  # slow to import, and not needed for CIFAR networks

    return sorted(torchvision.models.list_models(module=torchvision.models))


def _from_torchvision(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Build a classification network of torchvision, with the stem that is named in ``options``."""
    import torchvision.models

    rest = dict(options)
    stem = rest.pop("stem", "imagenet")
    if "stem" in options and not name.startswith(("resnet", "resnext", "wide_resnet")):
        raise ACKDError(f"option 'stem' does not apply to {name!r}, only to torchvision's ResNets; leave it out")
    if stem not in _STEMS:
        raise ACKDError(f"option 'stem' of {name!r} is {stem!r}; choose {' or '.join(repr(known) for known in _STEMS)}")
    build = partial(torchvision.models.get_model, name, weights=None, num_classes=num_classes)
    model = construct(build, name, {**_TORCHVISION_DEFAULTS.get(name, {}), **rest})
    if stem == "cifar":
        conv = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = conv
        model.maxpool = nn.Identity()
    return model


def _from_timm(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Build the network of timm whose name follows ``timm:``."""
    import timm

    bare = timm_name(name)
    return construct(partial(timm.create_model, bare, pretrained=False, num_classes=num_classes), name, options)


def timm_name(name: str) -> str:
    """Return timm's own name of a network, which may end in a tag of published weights.

    Args:
        name: Name that begins with ``timm:``.

    Raises:
        ACKDError: If timm has no such network or tag.
    """
    import timm

    bare = name.removeprefix(TIMM)
    if not timm.is_model(bare):
        known = timm.list_models()
        near = difflib.get_close_matches(bare, known, cutoff=0.6)
        hint = near_matches(bare, known) if near else "timm.list_models() lists them all"
        raise ACKDError(f"timm has no network named {bare!r}; {hint}")
    architecture, _, tag = bare.partition(".")
    if tag and not timm.is_model_pretrained(bare):
        tags = timm.list_pretrained(f"{architecture}.*")
        hint = near_matches(bare, tags) if tags else f"use {architecture!r}"
        raise ACKDError(f"timm has no weights {tag!r} of {architecture!r}; {hint}")
    return bare


def construct(constructor: Callable[..., Any], name: str, options: dict[str, Any]) -> nn.Module:
    """Call a constructor; an unknown option becomes an error in one sentence.

    Args:
        constructor: Function of keyword arguments that returns the network.
        name: Name of the network in the message.
        options: Arguments of the constructor.

    Raises:
        ACKDError: If an option is unknown to the network.
    """
    try:
        model: nn.Module = constructor(**options)
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused and refused[1] in options:
            raise ACKDError(
                f"option {refused[1]!r} is unknown to {name!r}; correct its name or leave it out"
            ) from error
        raise
    return model
