"""Options by their last part, with a typo, and as sweeps write them: every proposal is a spelling that works."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path

import lightning.pytorch as L
import pytest
import yaml

from ackd_lightning.cli import main
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.names import nearest

GOLDEN = Path(__file__).parents[1] / "golden" / "options.txt"
KD = ("--config", "digits_resnet20_resnet8", "--config", "kd")
CE = ("--config", "digits_resnet8", "--config", "ce")
SETTINGS = sorted(
    option.removeprefix("ackd fit --")
    for option in GOLDEN.read_text(encoding="utf-8").splitlines()
    if option.startswith("ackd fit --") and "." in option
)
SUM = """
include: [digits_resnet20_resnet8]
model:
  method:
    class_path: ackd_lightning.methods.Sum
    init_args:
      methods:
        - class_path: ackd_lightning.methods.KD
        - class_path: ackd_lightning.methods.CRD
          init_args: {negatives: 20}
"""


@functools.cache
def refusal(*options, base=KD):
    """What is said against an option; empty for one that is accepted."""
    try:
        ACKDCLI("fit", [*base, *options])
    except ACKDError as error:
        return str(error)
    return ""


def proposals(message):
    hint = message.partition(" here; ")[2]
    return re.findall(r"'([\w.]+)'", hint)


def exists(name, *options):
    return "there is no setting" not in refusal(*options, f"--{name}=@")


@pytest.mark.parametrize("setting", [each for each in SETTINGS if each != "model.on_nonfinite"])
def test_the_last_part_of_a_setting_is_answered_with_its_path(setting):
    found = proposals(refusal(f"--{setting.rpartition('.')[2]}=1"))
    assert setting in found
    assert all(map(exists, found))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_typo_is_answered_with_the_setting(setting):
    parent, _, last = setting.rpartition(".")
    for typo in (last[:-1], last[0] + last[2:], last.replace("_", ""), last.upper()):
        if len(typo) > 2 and typo != last:
            assert setting in nearest(f"{parent}.{typo}", SETTINGS)


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("lr", "model.optimizer.lr"),
        ("model.lr", "model.optimizer.lr"),
        ("learning_rate", "model.optimizer.lr"),
        ("weight_decay", "model.optimizer.weight_decay"),
        ("nesterov", "model.optimizer.nesterov"),
        ("milestones", "model.lr_scheduler.milestones"),
        ("epochs", "trainer.max_epochs"),
        ("max_epochs", "trainer.max_epochs"),
        ("devices", "trainer.devices"),
        ("seed", "seed_everything"),
        ("temperature", "model.method.temperature"),
        ("method.temprature", "model.method.temperature"),
        ("mixup", "data.augmentation.mixup"),
        ("data.batch-size", "data.batch_size"),
        ("trainer.lr", "model.optimizer.lr"),
        ("model.recipe.ema", "model.recipe.ema_decay"),
    ],
)
def test_short_names(option, path):
    found = proposals(refusal(f"--{option}=1"))
    assert path in found
    assert all(map(exists, found))


@pytest.mark.parametrize(
    ("option", "path", "owner"),
    [
        ("temperature", "model.method.temperature", "KD"),
        ("model.method.embedding_size", "model.method.embedding_size", "CRD"),
        ("root", "data.root", "CIFAR100DataModule"),
        ("data.image_size", "data.image_size", "ImageFolderDataModule"),
        ("betas", "model.optimizer.betas", "AdamW"),
        ("step_size", "model.lr_scheduler.step_size", "StepLR"),
    ],
)
def test_a_setting_of_another_class_is_said_with_the_class(option, path, owner):
    said = refusal(f"--{option}=1", base=CE)
    assert f"{path} belongs to" in said
    assert owner in said
    place = path.rpartition(".")[0]
    module = {"data": "ackd_lightning.data.", "model.method": "ackd_lightning.methods."}.get(place, "")
    assert exists(path, f"--{place}={module}{owner}")


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("--model.optimizer.lr=1e-3", "model.optimizer.init_args.lr", 0.001),
        ("--model.optimizer.lr=5E-05", "model.optimizer.init_args.lr", 5e-5),
        ("--model.optimizer.nesterov=True", "model.optimizer.init_args.nesterov", True),
        ("--model.channels_last=True", "model.channels_last", True),
        ("--model.compile=False", "model.compile", False),
        ("--model.teacher.bf16=true", "model.teacher.bf16", True),
        ("--tensorboard=True", "tensorboard", True),
        ("--test=False", "test", False),
        ("--data.max_per_class=None", "data.init_args.max_per_class", None),
        ("--model.student.weights=None", "model.student.weights", None),
        ("--model.recipe.early_stopping=None", "model.recipe.early_stopping", None),
        ("--model.lr_scheduler=None", "model.lr_scheduler", None),
        ("--model.lr_scheduler.milestones=[3, 4]", "model.lr_scheduler.init_args.milestones", [3, 4]),
        ("--model.student.taps=['a', 'b']", "model.student.taps", ("a", "b")),
        ("--data.augmentation={'mixup': 0.2}", "data.init_args.augmentation.mixup", 0.2),
        ("--model.student=resnet14", "model.student.network", "resnet14"),
        ("--seed_everything=3", "seed_everything", 3),
        ("--wandb=False", "wandb", None),
        ("--wandb=off", "wandb", None),
        ("--wandb=true", "wandb", "ackd-lightning"),
        ("--wandb=None", "wandb", None),
        ("--wandb=mine", "wandb", "mine"),
    ],
)
def test_values_as_sweeps_write_them(option, name, value):
    assert ACKDCLI("fit", [*KD, option, "--trainer.max_epochs=2"]).option(name) == value


@pytest.mark.parametrize(
    ("option", "number", "value"),
    [
        ("--model.method.methods.0.temperature=3e0", 0, 3.0),
        ("--model.method.methods.1.temperature=0.2", 1, 0.2),
        ("--model.method.init_args.methods.1.init_args.temperature=0.3", 1, 0.3),
    ],
)
def test_a_method_of_a_sum_by_its_number(option, number, value, tmp_path):
    (tmp_path / "sum.yaml").write_text(SUM)
    settings = ACKDCLI("fit", ["--config", str(tmp_path / "sum.yaml"), option])
    methods = settings.option("model.method.init_args.methods")
    assert methods[number].init_args.temperature == value
    assert methods[1].init_args.negatives == 20


TWO = """include: [data/digits, recipes/digits, methods/kd]
model:
  student: resnet8
  teacher:
    - {network: resnet20, weights: a.safetensors}
    - {network: resnet8, weights: b.safetensors}
"""


def test_an_option_of_one_of_two_teachers_has_its_number(tmp_path):
    (tmp_path / "two.yaml").write_text(TWO)
    base = ("--config", str(tmp_path / "two.yaml"))
    settings = ACKDCLI("fit", [*base, "--model.teacher.1.gate=warn"])
    assert [each.gate for each in settings.option("model.teacher")] == ["stop", "warn"]
    assert "--model.teacher.0.gate" in refusal("--model.teacher.gate=warn", base=base)
    listed = ["--config", "digits_resnet20_resnet8", "--model.teacher"]
    settings = ACKDCLI("fit", [*listed, "[{network: resnet20}, {network: resnet8}]", "--model.teacher.1.gate", "off"])
    assert [(each.network, each.gate) for each in settings.option("model.teacher")] == [
        ("resnet20", "stop"),
        ("resnet8", "off"),
    ]


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("ensemble_weight", "heavy", "a number"),
        ("ensemble_weight", ".nan", "a finite number"),
        ("ensemble_weight", "0", "above 0"),
        ("gate", "of", "'off'"),
        ("input_size", "wide", "a whole number"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_wrong_value_of_one_of_two_teachers_is_named_with_its_number(tmp_path, option, value, kind, in_file):
    text = TWO.replace("b.safetensors}", f"b.safetensors, {option}: {value}}}") if in_file else TWO
    (tmp_path / "two.yaml").write_text(text)
    given = () if in_file else (f"--model.teacher.1.{option}", value)
    sentence = refusal(*given, base=("--config", str(tmp_path / "two.yaml")))
    place = f"model.teacher.1.{option} in {tmp_path / 'two.yaml'}" if in_file else f"--model.teacher.1.{option}"
    assert sentence.startswith(f"{option} is ")
    assert kind in sentence
    assert sentence.endswith(f"({place})")


def test_an_unknown_setting_of_one_of_two_teachers_is_named_with_its_number(tmp_path):
    (tmp_path / "two.yaml").write_text(TWO)
    base = ("--config", str(tmp_path / "two.yaml"))
    found = refusal("--model.teacher.1.wieghts", "x", base=base)
    assert found == (
        "there is no setting 'model.teacher.1.wieghts' here; did you mean 'weights'? (--model.teacher.1.wieghts)"
    )
    (tmp_path / "two.yaml").write_text(TWO.replace("b.safetensors", "b.safetensors, inputsize: 9"))
    assert f"(model.teacher.1.inputsize in {tmp_path / 'two.yaml'})" in refusal(base=base)


def test_a_teacher_without_a_value_is_refused_as_any_option():
    assert refusal("--model.teacher") == refusal("--model.teacher", "--name", "x") == "--model.teacher needs a value"


def test_a_name_that_is_refused_is_not_proposed():
    sentence = refusal("--model.teacher.1.gate=off", "--model.teacher=[resnet20, resnet8]")
    assert "did you mean 'model.teacher.1.gate'" not in sentence


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--temperature=3", "'model.method.methods.0.temperature'"),
        ("--model.method.temperature=3", "'model.method.methods.1.temperature'"),
        ("--model.method.methods.2.temperature=3", "0 to 1"),
        ("--model.method.methods.1.negative=3", "'model.method.methods.1.negatives'"),
    ],
)
def test_what_is_not_there_in_a_sum(option, words, tmp_path):
    (tmp_path / "sum.yaml").write_text(SUM)
    assert words in refusal(option, base=("--config", str(tmp_path / "sum.yaml")))


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("--data.batch_size=64.5", "data.batch_size is '64.5'; it must be a whole number"),
        ("--trainer.max_epochs=many", "trainer.max_epochs is 'many'; it must be a whole number"),
        ("--model.optimizer.lr=fast", "model.optimizer.lr is 'fast'; it must be a number"),
        ("--model.channels_last=perhaps", "model.channels_last is 'perhaps'; it must be true or false"),
    ],
)
def test_a_value_of_another_kind_is_said_with_the_path(option, kind):
    assert kind in refusal(option)


@pytest.mark.parametrize("name", ["limit_val_batches", "overfit_batches", "val_check_interval", "limit_train_batches"])
@pytest.mark.parametrize(("given", "read"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5)])
def test_a_whole_number_of_batches_is_not_a_share(name, given, read, monkeypatch):
    """Whatever order ``typing`` has stored Lightning's union in: 1 is one batch, 1.0 is all of them."""
    monkeypatch.setitem(inspect.unwrap(L.Trainer.__init__).__annotations__, name, float | int | None)
    found = ACKDCLI("fit", [*CE, f"--trainer.{name}", given]).option(f"trainer.{name}")
    assert repr(found) == repr(read)


@pytest.mark.parametrize("recipe", ["strong", "patient"])
def test_a_recipe_is_laid_over_data_that_the_command_line_names(recipe, capsys):
    options = ["--data", "DigitsDataModule", "--data.batch_size", "8", "--model.student", "resnet8"]
    assert main(["fit", "--config", f"recipes/{recipe}.yaml", "--config", "ce.yaml", *options, "--print_config"]) == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"].endswith(".DigitsDataModule")
    assert data["init_args"]["batch_size"] == 8
    assert data["init_args"]["augmentation"]["mixup"] > 0
