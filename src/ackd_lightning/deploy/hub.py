"""Send a student to the Hugging Face Hub: weights, model card and, for networks of timm, its ``config.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.report.elements import escaped
from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.models.heads import with_head
from ackd_lightning.models.hub import WEIGHTS
from ackd_lightning.models.zoo import TIMM, count_parameters, create_model, multiply_adds

CARD, CONFIG = "README.md", "config.json"


def for_timm(description: Description) -> bool:
    """Whether timm can load the network by ``hf-hub:``.

    Args:
        description: The network.
    """
    return description.model.startswith(TIMM) and description.head is None


_ARCHITECTURE = ("architecture", "first_conv", "classifier", "fixed_input_size")
"""What timm states of a network whatever its weights are; all else is of the weights that timm publishes."""


def write_config(description: Description, path: Path, *, license_name: str) -> None:
    """Write ``config.json``: that of timm for its networks, else the description.

    Args:
        description: The network.
        path: File to write.
        license_name: Licence of the weights, by the hub's name.
    """
    if not for_timm(description):
        path.write_text(json.dumps(description.metadata(), indent=1), encoding="utf-8")
        return
    from timm.models._hub import save_config_for_hf

    with torch.device("meta"):
        network: Any = create_model(description.model, description.num_classes, **description.options)
    config = {
        "input_size": list(description.image_shape),
        "interpolation": description.interpolation,
        "crop_pct": description.crop_pct or 1.0,
        "crop_mode": "center",
        "mean": list(description.mean or [0.0] * description.channels),  # of images that are not normalised
        "std": list(description.std or [1.0] * description.channels),
        "license": license_name,
    }
    own = network.pretrained_cfg
    network.pretrained_cfg = {key: own[key] for key in _ARCHITECTURE if key in own} | config
    names = {"label_names": list(description.class_names)} if description.class_names else {}
    arguments = {"model_args": dict(description.options)} if description.options else {}
    save_config_for_hf(network, str(path), {**names, **arguments})


def model_card(description: Description, repository: str, *, license_name: str, report: str | None = None) -> str:
    """Return a model card in Markdown.

    Args:
        description: The network.
        repository: ``USER/NAME``.
        license_name: Licence of the weights, by the hub's name.
        report: Report of the run in Markdown; pictures, and where it was made, are left out. None without one.
    """
    library = "timm" if for_timm(description) else "ackd-lightning"
    head = ["---", f"license: {license_name}", f"library_name: {library}", "pipeline_tag: image-classification"]
    head += ["tags:", "- image-classification", "- knowledge-distillation", "---", ""]
    with torch.device("meta"):
        network = create_model(description.model, description.num_classes, **description.options)
        network = with_head(network, description.head)
    cost = multiply_adds(network, description.input_size, description.channels)
    rows = [
        ("parameters", f"{count_parameters(network):,}"),
        ("multiply-adds", f"{cost / 1e6:,.1f} million"),
        *(tuple(line.split(": ", 1)) for line in description.lines()),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {escaped(value)} |" for name, value in rows)]
    use = ["```python", "from ackd_lightning import load_student", ""]
    use += [
        f'student = load_student("hf:{repository}")',
        'names, probabilities = student.predict(["image.jpg"])',
        "```",
    ]
    if for_timm(description):
        use += ["", "or, without ackd-lightning,", "", "```python", "import timm", ""]
        use += [f'network = timm.create_model("hf-hub:{repository}", pretrained=True)', "```"]
    text = "\n".join([*head, f"# {repository.rpartition('/')[2]}", "", *table, "", "## How to load", "", *use, ""])
    if report:
        report = report.partition("\n## About this page\n")[0]  # commands and folders of this machine
        text += "\n" + "\n".join(line for line in report.splitlines() if "![" not in line and "<img" not in line) + "\n"
    return text


def require_token(repository: str) -> None:
    """Refuse to write to the hub without a token.

    Args:
        repository: ``USER/NAME``.

    Raises:
        ACKDError: If there is none.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise ACKDError(
            f"there is no token to write {repository} with; set HF_TOKEN to one with write access, or run "
            "`hf auth login`"
        )


def push(files: Sequence[Path], repository: str, *, private: bool, message: str) -> str:
    """Send files to a repository in one commit; the repository is made if it does not exist.

    The token is that of huggingface_hub (``HF_TOKEN``, or ``hf auth login``); it is written nowhere.

    Args:
        files: Weights, card and configuration.
        repository: ``USER/NAME``.
        private: Whether a new repository is private.
        message: Message of the commit.

    Returns:
        Address of the repository.

    Raises:
        ACKDError: If there is no token, or the hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    require_token(repository)
    assert {each.name for each in files} <= {WEIGHTS, CARD, CONFIG}
    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True, private=private or None)
        operations = [CommitOperationAdd(path_in_repo=each.name, path_or_fileobj=str(each)) for each in files]
        api.create_commit(repository, operations, commit_message=message)
    except Exception as error:  # of the network or the hub, in any way
        reason = first_line(error)
        kinds = " ".join(each.__name__ for each in type(error).__mro__)  # of the library of this huggingface_hub
        remedy = "check its name, and that the token has write access to it"
        if re.search("Connect|Timeout|Offline", kinds):
            remedy = f"{api.endpoint} cannot be reached: check the network, a proxy, or HF_HUB_OFFLINE"
        raise ACKDError(f"{repository} was not written ({reason}); {remedy}") from error
    return str(url)
