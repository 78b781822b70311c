"""What a run says it did is what it did."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ackd_lightning.cli import main
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import in_our_words
from ackd_lightning.launch.preflight import check_checkpoint
from ackd_lightning.launch.words import as_given
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model

QUICK = ["--weights_dir", "null", "--trainer.max_epochs", "1", "--data.max_per_class", "6", "--data.batch_size", "20"]
QUICK += ["--name", "a"]
RUN = Path("runs/digits_resnet8/a")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about few steps


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(*options, config="digits_resnet8"):
    return main(["fit", "--config", config, *QUICK, *options])


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.logger", "false"],
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "elsewhere"],
        ["--trainer.limit_val_batches", "0"],
        ["--trainer.limit_train_batches", "1"],
        ["--trainer.max_steps", "1"],
    ],
    ids=" ".join,
)
def test_every_file_that_is_named_is_there(options, capsys):
    assert fit(*options) == 0
    said = capsys.readouterr()
    named = re.search(rf"^{RUN}: (.*)$", said.out, re.MULTILINE)[1].split(", ")
    assert all((RUN / name).exists() for name in named)
    assert ("metrics.csv" in named) == (RUN / "metrics.csv").exists()
    assert "could not find the monitored key" not in said.err
    assert "1 epochs" not in said.out


@pytest.mark.parametrize("options", [["1"], ["2", "--test"], ["1", "--trainer.logger", "false"]], ids=" ".join)
def test_nothing_is_said_to_be_written_under_fast_dev_run(options, capsys):
    assert fit("--trainer.fast_dev_run", *options) == 0
    said = capsys.readouterr().out
    assert "runs" not in said
    assert "nothing is written" in said
    assert ("nothing is tested" in said) == ("--test" in options)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("limit", "said"), [("1", "limit_val_batches 1)"), ("0.5", "limit_val_batches 0.5)"), ("1.0", None), ("0", "no")]
)
def test_the_table_says_which_data_were_measured(limit, said, capsys):
    assert fit("--trainer.limit_val_batches", limit, "--data.eval_batch_size", "20") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("no validation" in shown) == (limit == "0")
    if said != "no":
        assert ("part of the" in shown) == (said is not None)
        assert said is None or said in shown


def test_fine_tuning_of_a_student_without_weights_is_said(capsys):
    Path("mine.yaml").write_text("include: [recipes/finetune]")
    save_weights(create_model("resnet8", 10), Path("w.safetensors"))
    for config, options, said in [
        ("finetune", [], 1),
        ("mine.yaml", [], 1),
        ("mine.yaml", ["--model.student.weights=w.safetensors"], 0),
    ]:
        assert fit("--config", config, *options, "--trainer.fast_dev_run", "1") == 0
        assert capsys.readouterr().out.count("model.student.weights") == said


def test_a_test_of_some_batches_says_so(capsys):
    assert fit("--test", "--trainer.limit_test_batches", "1") == 0
    assert "limit_test_batches 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.enable_checkpointing", "false"], "trainer.enable_checkpointing is false"),
        (["--trainer.callbacks+=LearningRateFinder", "--config", "acn"], "method ACN"),
        (
            [
                "--trainer.callbacks+=StochasticWeightAveraging",
                "--trainer.callbacks.swa_lrs",
                "0.01",
                "--config",
                "acn",
            ],
            "method ACN has further ones; use --model.recipe.ema_decay",
        ),
        (["--trainer.callbacks+=EarlyStopping"], "trainer.callbacks.monitor missing"),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/accuracy"], "'val/acc'"),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "val_loss"], "'val/loss'"),
        (["--trainer.callbacks+=BackboneFinetuning"], "BackboneFinetuning"),
        (["--trainer.callbacks+=EarlyStoping", "--trainer.callbacks.monitor", "val/acc"], "'EarlyStopping'"),
        (["--trainer.callbacks+=lightning.pytorch.callbacks.DeviceStatMonitor"], "'DeviceStatsMonitor'"),
        (["--trainer.logger", "TensorBoardLoger"], "'TensorBoardLogger'"),
        (["--model.optimizer.lr", "fast"], "must be a number ("),
        (["--model.lr_scheduler", "OneCycleLR"], "model.lr_scheduler.max_lr missing"),
        (["--data", "ackd_lightning.data.ImageFolderDataModule"], "data.root missing"),
        (["--trainer.logger", "NeptuneLogger"], "TensorBoardLogger"),
        (["--trainer.logger", "AimLogger"], "CSVLogger"),
        (["--trainer.callbacks+=Timer", "--trainer.callbacks.duration", "soon"], "soon"),
        (["--config", "simkd"], "ATSC (simkd)"),
        (["--config", "pskd", "--data.sampling", "balanced"], "AIKD (pskd)"),
        (["--config", "atsc"], "method ATSC needs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_names_what_was_given(options, words, capsys):
    assert fit(*options) == 2
    shown = capsys.readouterr().err.strip()
    assert words in shown
    assert "Union" not in shown
    assert len(shown.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.optimizer.lr=0.1"], "--model.optimizer.lr"),
        (["mine.yaml"], "--config mine.yaml"),
        (["kd"], "'kd'"),
        (["--name= "], "' '"),
        (["--name=a\nb"], r"'a\nb'"),
        (["--model.student", "resnet_8"], "'resnet8' or 'resnet18'"),
    ],
    ids=lambda value: repr(value[0]) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused(options, words, capsys):
    assert fit(*options) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in shown
    assert shown.count("'resnet18'") < 2
    assert not list(Path().rglob("summary.json"))


@pytest.mark.parametrize("options", [["--trainer.callbacks.init_val", "512"], ["--data.batch_size=2"]])
def test_a_batch_that_a_finder_made_larger_than_the_data_trains(options):
    assert fit("--trainer.callbacks+=BatchSizeFinder", *options) == 0
    assert list(Path().rglob("summary.json"))


@pytest.mark.parametrize(("names", "said"), [(("cat", "dog", "owl"), "'owl'"), (("cat",), "'dog'"), (None, "3")])
def test_data_with_another_number_of_classes_than_the_checkpoint(names, said):
    data = SimpleNamespace(num_classes=len(names or "123"), class_names=names)
    content = {"ackd_lightning": {"num_classes": 2, "class_names": ["cat", "dog"]}}
    with pytest.raises(ACKDError, match=said):
        check_checkpoint(Path("a.ckpt"), SimpleNamespace(data=data), content)


def test_a_file_of_ones_own_names_the_method_too():
    Path("my.yaml").write_text("include: [digits_resnet8, methods/simkd]\n")
    with pytest.raises(ACKDError, match=r"ATSC \(simkd\)"), in_our_words(["--config", "my.yaml"]):
        raise ACKDError("method ATSC needs a teacher")


@pytest.mark.parametrize("missing", ["DeviceStatsMonitor", "OnExceptionCheckpoint"])
def test_what_a_callback_refuses_before_the_first_step_is_a_mistake_of_the_input(missing, capsys, monkeypatch):
    import lightning.pytorch.callbacks as known

    def refuse(*_, **__):
        raise ModuleNotFoundError("`psutil` is not installed")

    monkeypatch.setattr(getattr(known, missing), "setup", refuse)
    options = ["--trainer.callbacks.dirpath", "x"] if missing.startswith("On") else []
    assert fit(f"--trainer.callbacks+={missing}", *options) == 2
    assert "psutil" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("duration", ["00:00:01:00", "{'minutes': 1}"])
def test_a_timer_with_a_duration(duration):
    assert fit("--trainer.callbacks+=Timer", f"--trainer.callbacks.duration={duration}") == 0
    callbacks = yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["callbacks"]
    assert callbacks[0]["init_args"]["interval"] == "step"


@pytest.mark.parametrize(
    "setting",
    [
        "model.recipe.warmup_epochs=-1",
        "model.recipe.ema_decay=2",
        "data.batch_size=-3",
        "data.augmentation.mixup=-1",
        "model.student.backbone_lr_scale=0",
        "model.method.weight_ce=-1",
        "model.optimizer.lr=nan",
        "model.optimizer.lr=.inf",
        "model.optimizer.weight_decay=-inf",
        "model.recipe.label_smoothing=NaN",
        "trainer.gradient_clip_val=nan",
        "trainer.limit_train_batches=.nan",
        "data.val_fraction=inf",
    ],
)
def test_print_config_refuses_what_a_fit_refuses(setting, capsys):
    assert fit(f"--{setting}", "--print_config") == 2
    said = capsys.readouterr()
    assert setting.partition("=")[0] in said.err
    assert said.out == ""


@pytest.mark.parametrize("written", ["on_class_mismatch=ignore", "on_class_mismatch='ignore'"])
def test_the_remedy_for_other_classes_is_an_option_of_the_command_line(written):
    message = as_given(ACKDError(f"other classes; use data of the same classes, or pass {written}"), ["test", "run"])
    assert message.endswith("or pass --model.on_class_mismatch ignore")


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecations_within_libraries_are_not_shown_and_those_of_a_users_code_are(category):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with in_our_words():
            for module in ("torch._meta_registrations", "lightning.pytorch.trainer", "my_method"):
                warnings.warn_explicit(f"{module} is deprecated", category, f"{module}.py", 1, module=module)
    assert [str(each.message) for each in seen] == ["my_method is deprecated"]
