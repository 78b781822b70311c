"""From a command line to settings, and from settings to data module and training module."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from ackd_lightning.config.class_paths import check_classes
from ackd_lightning.config.files import (
    config_folder,
    config_parts,
    find_config,
    load_configs,
    read_files,
    walk,
)
from ackd_lightning.config.yaml_files import plain_settings
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import (
    choose_classes,
    option_pairs,
    plain_name,
    refuse_values_alone,
    renew_length,
    split_configs,
    without_none,
)
from ackd_lightning.launch.messages import Given, RefusedError, check_shape, failed_constructor, first_cause, shorten
from ackd_lightning.launch.options import FIT_ONLY, data_parser, interval_of, make_parser, spell_out
from ackd_lightning.launch.preflight import check_numbers, check_teachers, check_values
from ackd_lightning.launch.run_settings import find_files, name_checkpoint, resumed_settings
from ackd_lightning.models.stated import stated_options
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.training.strategies import refuse_sharding

_CLASSES: dict[str, type] = {"data": L.LightningDataModule}
_ARGUMENTS_OF = {"model": DistillationModule, "trainer": L.Trainer}


class ACKDCLI:
    """Settings of one subcommand, and what is built from them.

    The constructor reads and checks settings and calls nothing that they name; ``build`` makes the data module and
    the training module; `Execution` makes the Trainer and runs it.

    Args:
        command: fit, validate, test or predict.
        arguments: Command line after the subcommand, ``--config`` included.
        needs_run: Whether a subcommand other than ``fit`` must be given a run or a configuration.

    Attributes:
        parser: Parser of the subcommand.
        config: Parsed settings, with automatic values replaced.
        config_name: Stems of the configuration files, joined by ``+``; empty without any.
        folder: Folder of the run.
        options: Command line without configurations and RUN.
        prints: Whether ``--print_config`` was given.
        fine_tunes: Whether the configurations contain ``recipes/finetune``.
        datamodule: Data module, after ``build``.
        model: Training module, after ``build``.

    Raises:
        ACKDError: For whatever is wrong with the settings.
    """

    datamodule: L.LightningDataModule
    model: DistillationModule

    def __init__(self, command: str, arguments: Sequence[str], *, needs_run: bool = True) -> None:
        self.command, self.followed = command, ""
        configs, options = split_configs(arguments)
        if command != "fit":
            configs, options = name_checkpoint(configs, options)
            if needs_run and not configs and not {"-h", "--help"} & set(options):
                raise ACKDError(f"`ackd {command}` needs a run; write `ackd {command} RUN`, or name its --config")
        own = command != "fit"  # the settings are those of a run
        if not own and not configs:
            configs = resumed_settings(options)
            own = bool(configs)
        self.prints = any(each.startswith("--print_config") for each in options)
        options = [each for each in options if not each.startswith("--print_config")]
        refuse_values_alone(options)
        options = without_none(options)
        settings, self.config_name = load_configs(configs)
        self.options = options
        stated = {plain_name(name) for name, _ in option_pairs(options)}
        if own and configs:
            place = find_config(config_parts(configs[0])[0])
            others = load_configs(configs[1:])[0] if configs[1:] else {}  # which the user has written for this folder
            if found := find_files(
                settings, place, stated | {name for name, _ in walk(others)}, writes=command == "fit"
            ):
                print(f"from the folder in which the run was started: {', '.join(found)}", flush=True)
        if command != "fit":  # a run's config.yaml has them
            settings = {key: value for key, value in settings.items() if key not in (*FIT_ONLY, "output", "overwrite")}
        elif own:  # the run goes on from its own checkpoint, wherever it started from
            settings = {key: value for key, value in settings.items() if key not in ("ckpt_path", "resume")}
        parts = [part for each in configs for part in config_parts(each)]
        recipe = (config_folder() / "recipes" / "finetune.yaml").resolve()
        self.fine_tunes = any(recipe == file.resolve() for part in parts for file in read_files(part))
        given = Given({each: find_config(each).resolve() for each in parts}, options, settings)
        check_shape(given)
        options = choose_classes(settings, options)
        given.classes.update(_ARGUMENTS_OF, **check_classes(settings, _CLASSES, _ARGUMENTS_OF))
        self.parser = make_parser(command)
        given.names.update(self.parser.names())
        check_teachers(settings, given)
        try:
            self.config: Any = self.parser.parse_args([f"--config={json.dumps(settings)}", *options])
        except RefusedError as error:
            cause = first_cause(error)
            raise ACKDError(
                shorten(cause, given, around=str(error)) if isinstance(cause, RefusedError) else str(cause)
            ) from error
        _replace_enums(self.config)
        chosen = check_classes(vars(self.config), _CLASSES, _ARGUMENTS_OF)
        check_numbers(self.config.as_dict())
        check_values(self.config.as_dict(), {"model": DistillationModule, **chosen}, given)
        refuse_sharding(_strategy_name(self.option("trainer.strategy")))
        if command == "fit" and self.config.model.optimizer is None:
            raise ACKDError("model.optimizer is empty; name one, such as torch.optim.SGD, or leave the setting out")
        if command == "fit" and self.config.model.lr_scheduler is not None:
            before, epochs = (settings.get("trainer") or {}).get("max_epochs"), self.option("trainer.max_epochs")
            self.followed = renew_length(
                self.config.model.lr_scheduler,
                before=before,
                epochs=epochs,
                steps=self.option("trainer.max_steps"),
                options=options,
                interval=interval_of(self.config.model),
            )
        spell_out(self.config, stated)
        self.config.pop("config", None)
        name = self.option("name") or time.strftime("%Y%m%d-%H%M%S")
        self.folder = Path(self.option("runs_dir") or "runs") / (self.config_name or "run") / name

    def option(self, name: str) -> Any:
        """Return the value of a setting; None for one that the subcommand does not have.

        Args:
            name: Dotted name, such as ``trainer.max_epochs``.
        """
        return self.config.get(name)

    def settings(self) -> dict[str, Any]:
        """Return all settings as plain data: the content of ``--print_config`` and of a run's ``config.yaml``."""
        return plain_settings(self.parser, self.config)

    def build(self, *, weights: bool = True) -> None:
        """Build the data module and the training module, and keep what is built for the Trainer.

        Args:
            weights: Whether the networks get memory for their weights; without, they have shapes alone.

        Raises:
            ACKDError: When a constructor refuses its arguments or fails, in its own words.
        """
        failed: list[Exception] = []

        def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
            shapes = not weights and issubclass(cls, DistillationModule)
            try:
                with torch.device("meta") if shapes else contextlib.nullcontext():
                    return cls(*args, **{name: _plain_partial(value) for name, value in kwargs.items()})
            except Exception as error:
                failed.append(error)
                raise

        try:
            self.built = self.parser.instantiate(self._without_start(), instantiators=[(construct, object, True)])
        except Exception as error:
            raise failed_constructor(failed[0] if failed else error) from error
        self.datamodule, self.model = self.built.data, self.built.model

    def build_data(self) -> L.LightningDataModule:
        """Build the data module alone.

        Raises:
            ACKDError: When its constructor refuses its arguments or fails, in its own words.
        """
        settings = self.config.clone()
        for name in [each for each in vars(settings) if each != "data"]:
            settings.pop(name)
        try:
            self.datamodule = data_parser().instantiate(settings).data
        except Exception as error:
            raise failed_constructor(error) from error
        return self.datamodule

    @property
    def images(self) -> ImageDataModule:
        """The data module, for commands that need more than loaders.

        Raises:
            ACKDError: For one that is not of this package.
        """
        if not isinstance(self.datamodule, ImageDataModule):
            raise ACKDError(
                f"data is {type(self.datamodule).__name__}; this command needs a data module of ackd_lightning.data, "
                "such as ImageFolderDataModule, or one derived from it"
            )
        return self.datamodule

    def _without_start(self) -> Any:
        """Return the settings without the weights to start from where a checkpoint is loaded, which has its own.

        Options of the network that came with those weights are in the checkpoint.
        """
        if not (checkpoint := self.option("ckpt_path")):
            return self.config
        settings = self.config.clone()
        student = settings.model.student
        student.weights, student.pretrained = None, False
        if isinstance(student.network, str):
            student.options = stated_options(student.network, checkpoint, student.options) or None
        return settings


def _strategy_name(given: Any) -> str:
    """Return the name or the class path of a strategy in settings."""
    return given if isinstance(given, str) else str(getattr(given, "class_path", "") or "")


def _replace_enums(settings: Any) -> None:
    """Replace text that is an Enum, such as the default of a callback's argument, by plain text, as YAML needs it."""
    items = vars(settings).items() if isinstance(settings, argparse.Namespace) else settings.items()
    for name, value in list(items):
        if isinstance(value, Enum) and isinstance(value, str):
            settings[name] = str(value.value)
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, argparse.Namespace | dict):
                _replace_enums(each)


def _plain_partial(value: Any) -> Any:
    """Replace jsonargparse's partial, which holds its parser, by one of the class itself."""
    if not isinstance(value, functools.partial) or not value.func.__module__.startswith("jsonargparse"):
        return value
    cls = next(each for each in value.args if isinstance(each, type))
    return functools.partial(cls, **value.keywords)
