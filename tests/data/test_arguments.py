from __future__ import annotations

import copy
import inspect
import pickle
from argparse import ArgumentError
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from ackd_lightning.data import (
    CIFAR100DataModule,
    CINIC10DataModule,
    DigitsDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    ImageNetDataModule,
    TinyImageNetDataModule,
)
from ackd_lightning.errors import ACKDError

COMMON = {
    "batch_size": 128,
    "eval_batch_size": 256,
    "val_fraction": 0.1,
    "train_fraction": 1.0,
    "max_per_class": None,
    "augmentation": None,
    "sampling": "shuffle",
    "num_workers": 0,
    "mean": None,
    "std": None,
    "seed": None,
}
STORED = {**COMMON, "root": "data", "cache": True}
DOWNLOADED = {**STORED, "download": True, "url": None}
CUSTOM = {
    **STORED,
    "image_size": 32,
    "channels": 3,
    "value_range": None,
    "background": "white",
}
DEFAULTS = {
    DigitsDataModule: COMMON,
    ImageNetDataModule: STORED,
    CIFAR100DataModule: DOWNLOADED,
    TinyImageNetDataModule: {**DOWNLOADED, "image_size": 64},
    CINIC10DataModule: {**DOWNLOADED, "val_fraction": 1.0},
    ImageFolderDataModule: {
        **CUSTOM,
        **dict.fromkeys(("train_dir", "val_dir", "test_dir", "unlabelled")),
        "class_order": "text",
    },
}
EVERY = pytest.mark.parametrize("cls", DEFAULTS, ids=lambda cls: cls.__name__)


def parsed(cls, **arguments):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=ImageDataModule)
    given = [f"--data.{name}={value}" for name, value in arguments.items()]
    return parser.parse_args([f"--data={cls.__name__}", *given]).data.init_args.as_dict()


@EVERY
def test_the_command_line_takes_every_argument_with_its_default(cls, folder):
    root = {"root": str(folder)} if "root" in DEFAULTS[cls] else {}
    assert parsed(cls, **root) == {**DEFAULTS[cls], **root}
    given = {**root, "batch_size": 3, "max_per_class": 5, "val_fraction": 0.5, "seed": 7}
    found = parsed(cls, **given)
    assert found == {**DEFAULTS[cls], **given}
    made = cls(**found)
    assert (made.batch_size, made.max_per_class, made.val_fraction, made.seed) == (3, 5, 0.5, 7)


@EVERY
def test_the_signature_shows_every_argument(cls):
    parameters = inspect.signature(cls).parameters
    shown = {name: each.default for name, each in parameters.items()}
    assert shown == {**DEFAULTS[cls], **({"root": inspect.Parameter.empty} if cls is ImageFolderDataModule else {})}
    assert all(each.kind is each.KEYWORD_ONLY for name, each in parameters.items() if name != "root")


@EVERY
def test_hyperparameters_are_the_arguments_as_plain_data(cls, folder):
    root = {"root": Path(folder)} if "root" in DEFAULTS[cls] else {}
    made = cls(**root, batch_size=9)
    expected = {**DEFAULTS[cls], "batch_size": 9, **({"root": str(folder)} if root else {})}
    assert made.hparams == made.hparams_initial == expected
    assert cls(**made.hparams).hparams == expected


@EVERY
def test_an_unknown_argument_is_refused_with_the_near_ones(cls):
    with pytest.raises(ACKDError, match=f"{cls.__name__} .*'batch_sise'.*'batch_size'") as caught:
        cls(batch_sise=3)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="batch_sise"):
        parsed(cls, batch_sise=3)


def test_digits_have_no_root():
    with pytest.raises(ACKDError, match=r"DigitsDataModule .*'root'"):
        DigitsDataModule(root="data")
    with pytest.raises(ArgumentError, match="root"):
        parsed(DigitsDataModule, root="x")


def test_too_many_positional_arguments_are_refused():
    with pytest.raises(ACKDError, match=r"CIFAR100DataModule .*too many"):
        CIFAR100DataModule("data", 64)


def test_copies_keep_the_hyperparameters(folder):
    made = ImageFolderDataModule(folder, batch_size=9)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.hparams == made.hparams
        assert other.batch_size == 9


class Own(DigitsDataModule):
    """A data module of a user: changes a default, adds an argument, and holds an object."""

    def __init__(self, shift: object = None, *, batch_size: int = 16, levels: tuple[int, ...] = (1, 2), **options):
        super().__init__(batch_size=batch_size, **options)
        self.shift, self.levels = shift, levels


def test_a_subclass_passes_the_other_arguments_on():
    made = Own(object(), levels=(3,), seed=4)
    assert (made.batch_size, made.seed) == (16, 4)
    assert made.hparams == {**COMMON, "batch_size": 16, "levels": (3,), "seed": 4}
    with pytest.raises(ACKDError, match="num_workers is -1"):
        Own(num_workers=-1)
    with pytest.raises(ACKDError, match=r"Own .*'level'.*'levels'"):
        Own(level=3)


def test_numbers_of_numpy_are_plain_in_a_checkpoint(tmp_path):
    given = {"mean": (np.float64(0.5),) * 3, "std": (0.25,) * 3}
    data = DigitsDataModule(val_fraction=np.float64(0.25), **given)
    torch.save(dict(data.hparams), tmp_path / "data.pt")
    again = torch.load(tmp_path / "data.pt", weights_only=True)
    assert again == {**DEFAULTS[DigitsDataModule], "val_fraction": 0.25, **given}
