"""The command line in process, as a user types it."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ackd_lightning import cli, create_model
from ackd_lightning.cli import _predicts_images, main
from ackd_lightning.commands.compare import group_runs
from ackd_lightning.config.files import load_configs, method_names, packaged_names, recipe_names
from ackd_lightning.data.sources import Pixels
from ackd_lightning.errors import NotWrittenError, RunStoppedError
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.messages import failed_constructor
from ackd_lightning.models.weights import load_weights, read_metadata, save_weights
from ackd_lightning.runs.figures import read_metrics
from ackd_lightning.runs.files import copied_from

QUICK = ["--data.max_per_class", "4", "--data.batch_size", "20", "--trainer.max_epochs", "2"]
QUICK += ["--model.lr_scheduler.milestones", "[1]"]
QUICK += ["--trainer.enable_progress_bar", "false"]


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher and an ACKD student on digits, made by the commands of README."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", "--config", "digits_resnet20.yaml", "--name", "t", *QUICK]) == 0
        pair = ["fit", "--config", "digits_resnet20_resnet8.yaml", "--name", "a", "--tensorboard", *QUICK]
        with pytest.warns(UserWarning, match="near chance"):
            code = main([*pair, "--model.teacher.gate", "warn"])
        assert code == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def beside(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


class TestRunFolder:
    def test_what_a_fit_leaves(self, runs):
        run = runs / "runs" / "digits_resnet20_resnet8" / "a"
        names = {path.name for path in run.iterdir()}
        assert {"config.yaml", "metrics.csv", "checkpoints", "summary.json", "student.safetensors"} <= names
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
        assert any("tfevents" in name for name in names)
        rows = read_rows(run / "metrics.csv")
        assert {row["val/acc"] for row in rows} - {""}
        settings = yaml.safe_load((run / "config.yaml").read_text())
        assert settings["model"]["student"]["network"] == "resnet8"
        assert settings["model"]["method"]["init_args"]["branches"] == ["D3B1", "D2B2"]
        assert settings["seed_everything"] == 0

    def test_summary_has_last_and_best_of_every_network(self, runs):
        summary = json.loads((runs / "runs" / "digits_resnet20_resnet8" / "a" / "summary.json").read_text())
        for which in ("last", "best"):
            assert {"val/acc", "val/aux1_acc", "val/aux2_acc", "val/ensemble_acc", "epoch"} <= set(summary[which])
        assert (summary["parameters"], summary["teacher"]["parameters"]) == (78_042, 272_474)
        assert summary["training_parameters"] > summary["parameters"]
        assert summary["best"]["val/acc"] >= summary["last"]["val/acc"]

    def test_teacher_weights_say_where_they_come_from(self, runs):
        path = runs / "weights" / "digits_resnet20.safetensors"
        metadata = read_metadata(path)
        assert metadata["model"] == "resnet20"
        assert metadata["data"] == "DigitsDataModule"
        assert {"val_acc", "seed", "epochs", "versions", "mean", "std", "input_size"} <= set(metadata)
        load_weights(create_model("resnet20", 10), path)

    def test_student_is_the_plain_network(self, runs):
        run = runs / "runs" / "digits_resnet20_resnet8" / "a"
        student = create_model("resnet8", 10)
        load_weights(student, run / "student.safetensors")
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert torch.equal(student.fc.weight, checkpoint["state_dict"]["student.backbone.fc.weight"])

    def test_taken_name_is_refused_and_nothing_lost(self, beside, capsys):
        run = beside / "runs" / "digits_resnet20_resnet8" / "a"
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        assert main(["fit", "--config", "digits_resnet20_resnet8.yaml", "--name", "a", *QUICK]) == 2
        assert "exists; choose another --name" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    def test_published_weights_are_not_replaced(self, beside, capsys):
        before = (beside / "weights" / "digits_resnet20.safetensors").read_bytes()
        assert main(["fit", "--config", "digits_resnet20.yaml", "--name", "again", *QUICK]) == 2
        assert "would replace them" in capsys.readouterr().err
        assert (beside / "weights" / "digits_resnet20.safetensors").read_bytes() == before


class TestAfterwards:
    def test_test_validate_predict(self, beside, capsys):
        run = "runs/digits_resnet20_resnet8/a"
        capsys.readouterr()
        assert main(["test", run, "--trainer.enable_progress_bar", "false"]) == 0
        shown = capsys.readouterr().out
        assert "DataLoader" not in shown
        for word in ("student", "aux1", "group", "95 % interval", "of 539 test images"):
            assert word in shown
        assert main(["test", run, "--which", "best", "--trainer.enable_progress_bar", "false"]) == 0
        tested = json.loads(Path(run, "summary.json").read_text())["test"]
        assert set(tested) == {"last", "best"}
        assert main(["validate", run, "--trainer.enable_progress_bar", "false"]) == 0
        assert main(["predict", run, "--output", "p.csv", "--trainer.enable_progress_bar", "false"]) == 0
        rows = read_rows(Path("p.csv"))
        right = sum(row["target"] == row["prediction"] for row in rows) / len(rows)
        assert len(rows) == 539
        assert right == pytest.approx(tested["last"]["test/acc"], abs=1e-6)

    def test_export_and_compare(self, beside, capsys):
        run = "runs/digits_resnet20_resnet8/a"
        assert main(["export", run, "--out", "s.safetensors"]) == 0
        shown = capsys.readouterr().out
        assert "78,042" in shown
        assert "272,474" in shown
        assert float(read_metadata("s.safetensors")["val_acc"]) > 0
        assert main(["export", run, "--out", "s.safetensors"]) == 2
        assert main(["export", run, "--out", "s.safetensors", "--overwrite", "--which", "best"]) == 0
        load_weights(create_model("resnet8", 10), "s.safetensors")
        assert main(["compare", "runs", "--figure", "c.png"]) == 0
        shown = capsys.readouterr().out
        assert "digits_resnet20_resnet8" in shown
        with Image.open("c.png") as image:
            assert min(image.size) > 300

    def test_explicit_flag_beats_checkpoint(self, beside, capsys):
        """Lightning's own command line lets the hyperparameters of a checkpoint win, without a word."""
        last = "runs/digits_resnet20_resnet8/a/checkpoints/last.ckpt"
        flags = [
            "--model.method.temperature",
            "9",
            "--model.recipe.gradient_clip_val",
            "5",
            "--model.teacher.gate",
            "off",
        ]
        resumed = ["--ckpt_path", last, "--name", "explicit", *QUICK, "--trainer.max_epochs", "3"]
        assert main(["fit", "--config", "digits_resnet20_resnet8.yaml", *resumed, *flags]) == 0
        run = beside / "runs" / "digits_resnet20_resnet8" / "explicit"
        said = capsys.readouterr().out
        assert "of which no checkpoint is here, is not counted" in said
        best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        assert json.loads((run / "summary.json").read_text())["best"]["epoch"] == best["epoch"] + 1 == 3
        kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
        assert kept["method"]["init_args"]["temperature"] == 9.0
        assert kept["recipe"]["gradient_clip_val"] == 5.0

    def test_changed_test_is_not_kept(self, beside, capsys):
        run = Path("runs/digits_resnet20_resnet8/a")
        before = (run / "summary.json").read_text()
        assert (
            main(["test", str(run), "--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false"]) == 0
        )
        assert (run / "summary.json").read_text() == before
        assert "not kept" in capsys.readouterr().out

    def test_checkpoint_alone_is_enough(self, beside):
        last = "runs/digits_resnet20_resnet8/a/checkpoints/last.ckpt"
        assert main(["validate", "--trainer.enable_progress_bar", "false", "--ckpt_path", last]) == 0

    def test_predictions_are_not_replaced(self, beside, capsys):
        Path("mine.csv").write_text("precious")
        assert main(["predict", "runs/digits_resnet20_resnet8/a", "--output", "mine.csv"]) == 2
        assert Path("mine.csv").read_text() == "precious"

    def test_export_refuses_what_is_no_checkpoint(self, here, capsys):
        torch.save({"state_dict": {}}, "foreign.ckpt")
        Path("cut.ckpt").write_bytes(Path("foreign.ckpt").read_bytes()[:100])
        for name, words in (
            ("foreign.ckpt", "not a checkpoint of ackd-lightning"),
            ("cut.ckpt", "cannot be read"),
            ("no", "neither"),
        ):
            assert main(["export", name]) == 2
            assert words in capsys.readouterr().err


def test_resumed_run_keeps_its_curves_and_equals_an_uninterrupted_one(beside, figures):
    common = ["fit", "--config", "digits_resnet20_resnet8.yaml", "--model.teacher.gate", "off", *QUICK]
    assert main([*common, "--name", "whole", "--trainer.max_epochs", "3"]) == 0
    assert main([*common, "--name", "parts"]) == 0
    folder = beside / "runs" / "digits_resnet20_resnet8"
    last = folder / "parts" / "checkpoints" / "last.ckpt"
    assert main([*common, "--name", "parts", "--trainer.max_epochs", "3", "--ckpt_path", str(last)]) == 0
    metrics = read_metrics(folder / "parts" / "metrics.csv")
    assert list(metrics["val/acc"]) == [1, 2, 3]
    assert metrics == read_metrics(folder / "whole" / "metrics.csv")
    for name in ("curves.png", "learners.png"):  # a deterministic drawing of all three epochs
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    whole, parts = (load_state(folder / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    best = [json.loads((folder / name / "summary.json").read_text())["best"] for name in ("whole", "parts")]
    assert best[0] == best[1]


def test_last_is_the_last_epoch_whatever_the_validation(beside):
    common = ["fit", "--config", "digits_resnet20.yaml", *QUICK, "--weights_dir", "null", "--name", "odd"]
    assert main([*common, "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"]) == 0
    metadata = read_metadata(beside / "runs" / "digits_resnet20" / "odd" / "student.safetensors")
    assert metadata["epochs"] == "3"
    assert "val_acc" not in metadata  # that of epoch 2 belongs to other weights


def test_a_fork_does_not_replace_published_weights(beside, capsys):
    before = (beside / "weights" / "digits_resnet20.safetensors").read_bytes()
    last = "runs/digits_resnet20/t/checkpoints/last.ckpt"
    assert main(["fit", "--config", "digits_resnet20.yaml", "--name", "fork", "--ckpt_path", last, *QUICK]) == 2
    assert "would replace them" in capsys.readouterr().err
    assert (beside / "weights" / "digits_resnet20.safetensors").read_bytes() == before


def test_a_copy_of_a_run_does_not_replace_the_weights_of_the_original(beside, capsys):
    before = (beside / "weights" / "digits_resnet20.safetensors").read_bytes()
    folder = beside / "runs" / "digits_resnet20"
    shutil.copytree(folder / "t", folder / "copy")
    longer = ["fit", "--resume", "runs/digits_resnet20/copy", "--trainer.max_epochs", "4"]
    assert main(longer) == 2
    assert "would replace them" in capsys.readouterr().err
    assert (beside / "weights" / "digits_resnet20.safetensors").read_bytes() == before
    assert main([*longer, "--weights_dir", "other"]) == 0
    assert copied_from(folder / "copy") is None  # a run of its own now


def test_compare_keeps_different_experiments_apart(beside, capsys):
    common = ["fit", "--config", "digits_resnet20.yaml", *QUICK, "--weights_dir", "null", "--runs_dir", "apart"]
    for name, seed, rate in (("a", "0", "0.05"), ("b", "1", "0.05"), ("c", "0", "0.01")):
        assert main([*common, "--name", name, "--seed_everything", seed, "--model.optimizer.lr", rate]) == 0
    groups = group_runs(["apart"])
    assert {name: len(runs) for name, runs in groups.items()} == {
        "digits_resnet20 (lr=0.05)": 2,
        "digits_resnet20 (lr=0.01)": 1,
    }
    assert main([*common, "--name", "d", "--seed_everything", "0", "--model.optimizer.lr", "0.05"]) == 0
    assert main(["compare", "apart"]) == 2
    assert "seeds [0, 1, 0]" in capsys.readouterr().err


def test_failed_start_leaves_the_name_free(here, capsys):
    common = ["fit", "--config", "digits_resnet20_resnet8.yaml", "--name", "again", *QUICK]
    save_weights(create_model("resnet20", 10), "weights/digits_resnet20.safetensors")
    assert main(common) == 2
    assert "near chance" in capsys.readouterr().err
    assert main([*common, "--ckpt_path", "gone.ckpt"]) == 2
    assert main([*common, "--model.teacher.gate", "off"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_give_their_exit_codes(here, number, code):
    command = [sys.executable, "-m", "ackd_lightning", "fit"]
    command += [
        "--config",
        "digits_resnet20.yaml",
        "--weights_dir",
        "null",
        "--name",
        "s",
        "--trainer.max_epochs",
        "500",
    ]
    command += ["--data.max_per_class", "4", "--data.batch_size", "20"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts a test run in the background makes its children deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                process.send_signal(number)
                break
        _, shown = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == code
    assert "checkpoints/last.ckpt" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_a_terminal_that_closes_stops_a_fit_which_keeps_its_steps(here):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "ackd_lightning", "fit", "--config", "digits_resnet20.yaml", "--weights_dir"]
    command += ["null", "--name", "s", "--trainer.max_epochs", "500", "--data.max_per_class", "4"]
    process = subprocess.Popen(
        command,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(end)
    try:
        shown = b""
        while b"epoch 3/" not in shown:
            shown += os.read(terminal, 4096)
        os.close(terminal)
        assert process.wait(timeout=90) == 128 + signal.SIGHUP
    finally:
        process.kill()
    (run,) = Path("runs/digits_resnet20").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] >= 2


@pytest.mark.parametrize(("rank", "said"), [(None, 1), ("0", 1), ("1", 0)])
def test_the_first_process_says_that_a_run_was_stopped(rank, said, monkeypatch, capsys):
    def stopped(arguments):
        raise RunStoppedError(signal.SIGTERM, "received")

    monkeypatch.setattr(cli, "_run", stopped)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert main(["fit"]) == 143
    assert capsys.readouterr().err.count("SIGTERM received") == said


@pytest.mark.slow
def test_two_processes_by_flags(beside):
    command = [sys.executable, "-m", "ackd_lightning", "fit", "--config"]
    command += ["digits_resnet20_resnet8.yaml", *QUICK, "--model.teacher.gate", "off", "--runs_dir", "two"]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (beside / "two" / "digits_resnet20_resnet8").iterdir()  # one folder, not one for each process
    assert (run / "student.safetensors").is_file()
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


def load_state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_methods_swap_and_flags_win(beside):
    swapped = ["--config", "digits_resnet20_resnet8.yaml", "--config", "kd.yaml", "--model.optimizer.lr", "0.011"]
    options = ["--model.method.temperature", "2", "--model.teacher.gate", "off", "--name", "k", *QUICK]
    assert main(["fit", *swapped, *options]) == 0
    run = beside / "runs" / "digits_resnet20_resnet8+kd" / "k"
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert model["method"]["class_path"] == "ackd_lightning.methods.KD"
    assert (model["optimizer"]["init_args"]["lr"], model["method"]["init_args"]["temperature"]) == (0.011, 2.0)
    assert model["student"]["network"] == "resnet8"


def test_paper_protocol_selects_nothing_on_the_test_set(beside, capsys):
    options = ["--data.val_fraction", "0", "--weights_dir", "null", "--name", "p", *QUICK]
    assert main(["fit", "--config", "digits_resnet20.yaml", *options]) == 0
    run = beside / "runs" / "digits_resnet20" / "p"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["shown"] == "test"
    assert summary["best"] == {}
    assert "not selected" in capsys.readouterr().out


def wandb_history(folder: Path) -> tuple[list[dict[str, object]], dict[str, object]]:
    """History rows and config of an offline run, from its record log (LevelDB format, 32 KiB blocks)."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    data, place, parts = path.read_bytes(), 7, b""
    rows, config = [], {}
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        body = data[place + 7 : place + 7 + length]
        place += 7 + length
        if (kind == 0 and length == 0) or place > len(data):
            break
        parts = body if kind in (1, 2) else parts + body
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(parts)
            except DecodeError:  # W&B has not written the whole of it yet; the caller reads again
                break
            which = record.WhichOneof("record_type")
            if which == "history":
                items = record.history.item
                rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
            updates = record.run.config.update if which == "run" else record.config.update if which == "config" else []
            config.update({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in updates})
    return rows, config


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside wandb
@pytest.mark.filterwarnings("ignore:.*protobuf.*")
def test_wandb_offline_without_a_key(beside, monkeypatch):
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asked a question"))
    options = ["--wandb", "my-project", "--weights_dir", "null", "--name", "w", *QUICK]
    try:
        assert main(["fit", "--config", "digits_resnet20.yaml", *options]) == 0
    finally:
        wandb.finish()
    run = beside / "runs" / "digits_resnet20" / "w"
    logged: set[str] = set()
    deadline = time.monotonic() + 30  # W&B's own process writes the file
    while "val/acc" not in logged and time.monotonic() < deadline:
        rows, config = wandb_history(run)
        logged = {key for row in rows for key in row}
        time.sleep(0.2)
    in_csv = {key for row in read_rows(run / "metrics.csv") for key, value in row.items() if value}
    assert {"train/loss", "val/acc"} <= logged
    assert in_csv - {"step", "epoch"} <= logged
    assert config["cli"]["model"]["student"]["network"] == "resnet20"


def synthetic(self, part):
    """Eight images of the right shape for a data set that is not on this machine."""
    generator = torch.Generator().manual_seed(0)
    size = self.input_size
    images = torch.randint(0, 256, (8, 3, size, size), generator=generator, dtype=torch.uint8)
    names = self.class_names or tuple(f"class{number}" for number in range(type(self).num_classes))
    return Pixels(names, images, torch.arange(8) % len(names))


@pytest.fixture
def one_step(monkeypatch):
    """A function that runs one training step on synthetic data, with teachers of random weights."""

    def run(*configs: str, extra: tuple[str, ...] = ()) -> int:
        settings = load_configs(configs)[0]
        data = resolve_name(settings["data"]["class_path"])
        monkeypatch.setattr(data, "_load", synthetic)
        monkeypatch.setattr(data, "_fetch", lambda self: None)
        student, teacher = settings["model"].get("student"), settings["model"].get("teacher")
        teachers = teacher if isinstance(teacher, list) else [teacher or {}]
        for each in (student if isinstance(student, dict) else {}, *teachers):
            if "weights" in each and not Path(each["weights"]).is_file():
                save_weights(
                    create_model(each["network"], data.num_classes, **each.get("options", {})), each["weights"]
                )
        arguments = [part for name in configs for part in ("--config", name)]
        quick = ["--trainer.fast_dev_run", "1", "--data.batch_size", "4", "--data.num_workers", "0"]
        quick += ["--data.val_fraction", "0", "--trainer.enable_progress_bar", "false"]
        return main(["fit", *arguments, *quick, *extra])

    return run


SMALL = [name for name in packaged_names() if name.startswith("digits")]


@pytest.mark.parametrize("name", [name for name in packaged_names() if name not in SMALL])
def test_every_packaged_configuration_is_read(name):
    settings = ACKDCLI("fit", ["--config", name]).settings()
    assert settings["model"]["method"]["class_path"].startswith("ackd_lightning.methods.")
    assert settings["trainer"]["max_epochs"] in (20, 60, 100, 200)


@pytest.mark.filterwarnings("ignore:the validation loss is")  # random networks, one step at the paper's rate
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SMALL else pytest.mark.slow) for name in packaged_names()]
)
def test_every_packaged_configuration_runs(name, here, one_step):
    assert one_step(name) == 0
    assert not Path("runs").exists()


GUIDED = ("ceskd.yaml", "dgkd.yaml")


@pytest.mark.filterwarnings("ignore:the validation loss is")  # random networks, one step at the paper's rate
@pytest.mark.parametrize("method", [name for name in method_names() if name not in GUIDED])
def test_every_method_runs_on_a_pair(method, here, one_step):
    assert one_step("digits_resnet20_resnet8.yaml", method) == 0


@pytest.mark.filterwarnings("ignore:the validation loss is")  # random networks, one step at the paper's rate
@pytest.mark.parametrize("method", GUIDED)
def test_a_method_with_several_teachers_runs_on_them(method, here, one_step):
    guides = [{"network": name, "weights": f"{name}.safetensors"} for name in ("resnet20", "resnet14")]
    Path("guides.yaml").write_text(yaml.safe_dump({"model": {"teacher": guides}}))
    assert one_step("digits_resnet20_resnet8.yaml", method) == 2  # one teacher
    assert one_step("digits_resnet20_resnet8.yaml", method, "guides.yaml") == 0


@pytest.mark.parametrize("recipe", ["adamw", "strong", "strong_sgd", "finetune", "patient"])
def test_every_recipe_runs_on_a_pair(recipe, here, one_step):
    assert one_step("digits_resnet20_resnet8.yaml", f"recipes/{recipe}") == 0


def test_image_folder_of_ones_own(here):
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            (here / "mine" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(here / "mine" / part / name / f"{number}.png")
    data = ["--data", "ackd_lightning.data.ImageFolderDataModule", "--data.root", "mine", "--data.batch_size", "4"]
    model = ["--config", "ce.yaml", "--model.student", "resnet8", "--trainer.max_epochs", "1", "--name", "x"]
    assert main(["fit", *model, *data, "--trainer.enable_progress_bar", "false"]) == 0
    assert read_metadata(here / "runs" / "ce" / "x" / "student.safetensors")["num_classes"] == "2"


BAD = [
    (["fti"], "did you mean 'fit'?"),
    (["fit", "--config", "cifar100_resnet110_resnet2.yaml"], "did you mean 'cifar100_resnet110_resnet20.yaml'"),
    (["fit", "--config"], "--config needs a value"),
    (["fit", "--model.studnt", "3"], "did you mean 'model.student"),
    (
        ["fit", "--model.method.temperatur", "3"],
        "did you mean 'model.method.temperature'",
    ),
    (["fit", "--trainer.max_epoch", "3"], "did you mean 'trainer.max_epochs'"),
    (["fit", "--bogus", "3"], "no setting 'bogus'"),
    (["inspect", "resnet8", "extra"], "ackd: extra is unknown to `ackd inspect`"),
    (["inspect", "--classes", "x"], "ackd: argument --classes"),
    (["fit", "--model.optimizer.lr", "abc"], "setting model.optimizer.lr is 'abc'; it must be a number"),
    (["fit", "--model.optimizer.lr", "-1"], "model.optimizer.lr is -1"),
    (["fit", "--model.student", "resnet21"], "did you mean"),
    (
        ["fit", "--model.student.network", "{class_path: torchvision.models.ResNet, init_args: {bogus: 3}}"],
        "init_args: {bogus: 3}} does not fit its class: write class_path and init_args into a configuration file",
    ),
    (["fit", "--model.method.branches", "[D4B1,D3B1]"], "use one of D3B1, D2B2, D1B3"),
    (["fit", "--model.method.branches", "[D3B1]"], "add a second branch"),
    (["fit", "--model.method.adversarial", "foo"], "'fool', 'diversify', 'off'"),
    (["fit", "--model.method", "Foo"], "setting model.method names the class 'Foo'"),
    (["fit", "--model.num_classes", "3"], "taken from the data"),
    (["fit", "--data.val_fraction", "1"], "val_fraction is 1"),
    (["fit", "--data.batch_size", "0"], "batch_size is 0"),
    (["fit", "--trainer.precision", "12"], "precision is '12'"),
    (["fit", "--model.teacher.gate", "never"], "'stop', 'warn', 'off'"),
    (["fit", "--trainer.gradient_clip_val", "1"], "--model.recipe.gradient_clip_val"),
    (
        ["fit"],
        "weights/digits_resnet20.safetensors do not exist; train it with `ackd fit --config digits_resnet20.yaml`",
    ),
    (["fit", "--data.num_classes", "5"], "num_classes"),
    (["fit", "--config", "digits_resnet20_resnet8", "--config", "gone.yaml"], "no such file"),
    (["test", "--config", "digits_resnet20_resnet8.yaml"], "needs a run; write `ackd test RUN`"),
    (["export"], "the following arguments are required: run"),
    (["export", "a", "--which", "first"], "choose from"),
    (["test", "nowhere"], "neither a run folder nor a checkpoint"),
    (["export", "nowhere"], "neither a run folder nor a checkpoint"),
    (["compare", "nowhere"], "nowhere"),
    (["demo", "--seeds", "0"], "use 1 or more"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(each) for each, _ in BAD])
def test_bad_input_is_one_sentence(arguments, words, here, capsys):
    complete = arguments if arguments[0] != "fit" or "--config" in arguments else None
    if complete is None:
        complete = ["fit", "--config", "digits_resnet20_resnet8.yaml", *arguments[1:]]
    assert main(complete) == 2
    shown = capsys.readouterr().err.strip()
    assert words in shown
    assert len(shown.splitlines()) <= 3
    assert "Traceback" not in shown
    assert list(here.iterdir()) == []


def test_class_path_that_is_not_there(here, capsys):
    Path("mine.yaml").write_text("include: [digits_resnet20]\nmodel: {method: {class_path: nobody.Here}}\n")
    assert main(["fit", "--config", "mine.yaml"]) == 2
    assert "class_path 'nobody.Here' cannot be imported" in capsys.readouterr().err


def test_method_of_ones_own_beside_the_configuration(here, one_step, monkeypatch):
    Path("own_method.py").write_text("from ackd_lightning import CE\nclass Louder(CE):\n    pass\n")
    own = {"include": ["digits_resnet20"], "model": {"method": {"class_path": "own_method.Louder"}}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert one_step("own.yaml", extra=("--weights_dir", "null")) == 0


def test_refit_from_a_runs_own_settings(beside):
    again = ["fit", "--config", "runs/digits_resnet20_resnet8/a/config.yaml", "--name", "b"]
    assert main([*again, "--model.teacher.gate", "off", "--trainer.enable_progress_bar", "false"]) == 0
    assert (beside / "runs" / "digits_resnet20_resnet8" / "b" / "student.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "images"),
    [
        (["model.onnx"], True),
        (["--output", "p.csv", "model.onnx"], True),
        (["RUN", "--images", "a.png"], True),
        (["RUN", "--model.teacher.weights", "w.safetensors"], False),
        (["--data.root", "photos", "RUN"], False),
    ],
)
def test_an_exported_file_is_found_among_the_options(arguments, images):
    assert _predicts_images("predict", arguments) is images


def test_a_folder_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["configs"]) == 2
    assert "current folder no longer exists" in capsys.readouterr().err


def test_debug_shows_where(here, monkeypatch):
    monkeypatch.setenv("ACKD_DEBUG", "1")
    with pytest.raises(ValueError, match="no such file"):
        main(["fit", "--config", "nothing_of_that_name.yaml"])


def test_configs_lists_everything(capsys):
    assert main(["configs"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*packaged_names(), *method_names(), *recipe_names()))


def test_configs_lists_what_contains_the_text(capsys):
    assert main(["configs", "simkd"]) == 0
    shown = capsys.readouterr().out
    assert "simkd.yaml" in shown
    assert "ackd.yaml" not in shown
    assert "runs" not in shown


def test_a_reader_that_has_seen_enough_is_not_a_failure():
    command = [sys.executable, "-m", "ackd_lightning", "configs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # before anything is written
    _, shown = process.communicate(timeout=60)
    assert (process.returncode, shown) == (0, "")


def test_help_does_not_import_torch():
    code = "import sys; from ackd_lightning.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("False")
    assert "ackd fit --config" in shown


def test_published_pairs_are_there():
    pairs = {"wrn_40_2_wrn_40_1", "resnet110_resnet20", "mobilenetv2_x1_4_mobilenetv2_x0_5"}
    pairs |= {"shufflenetv1_mobilenetv2_x0_5", "wrn_28_4_resnet56"}
    expected = {f"cifar100_{pair}.yaml" for pair in pairs}
    expected |= {"cinic10_resnet110_resnet20.yaml", "cinic10_wrn_28_4_resnet56.yaml"}
    expected |= {"tinyimagenet_resnet50_resnet18.yaml", "imagenet_resnet34_resnet18.yaml"}
    assert expected <= set(packaged_names())


def test_the_home_folder_in_an_option(tmp_path, monkeypatch, capsys):
    """Shells leave the ~ of --option=~/folder alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        main(["fit", "--config", "digits_resnet8.yaml", "--runs_dir=~/x", "--weights_dir", "~/w", "--print_config"])
        == 0
    )
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["runs_dir"], settings["weights_dir"]) == (str(tmp_path / "x"), str(tmp_path / "w"))


def test_a_file_that_could_not_be_written_is_a_failure_and_no_mistake(monkeypatch, capsys):
    def full(arguments):
        raise NotWrittenError("the disk is full")

    monkeypatch.setattr("ackd_lightning.cli._run", full)
    assert main(["fit"]) == 1
    assert capsys.readouterr().err == "ackd: the disk is full\n"


@pytest.mark.parametrize(
    ("arguments", "then"),
    [(["report", "runs/a"], ""), (["fit", "--resume=auto"], ""), (["fit", "--config", "ce"], " with --resume auto")],
    ids=["report", "resumed", "fit"],
)
def test_a_full_disk_is_said_without_a_name(arguments, then, monkeypatch, capsys):
    def full(arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ackd_lightning.cli._run", full)
    assert main(arguments) == 1
    said = "ackd: a file could not be written ([Errno 28] No space left on device); free disk space and run the same "
    assert capsys.readouterr().err == f"{said}command again{then}\n"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_file_that_may_not_be_read_is_named_with_a_remedy(code, monkeypatch, capsys):
    def refused(*_):
        raise OSError(code, "Permission denied", "a/b")

    said = "a/b may not be read or written (Permission denied): change its permissions or choose another place\n"
    monkeypatch.setattr("ackd_lightning.launch.execute.run", refused)
    assert main(["fit"]) == 1
    assert capsys.readouterr().err == f"ackd: {said}"
    error = failed_constructor(PermissionError(errno.EACCES, "Permission denied", "a/b"))
    assert f"{error}\n" == said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("[/gloo/transport/tcp/pair.cc:545] Read error [::1]:6: Connection reset by peer. GLHF!", "another process of"),
        ("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error", "another process of"),
        ("parameters that were not used in producing the loss", "the loss of a step did not depend on all trainable"),
        ("shapes do not match", "RuntimeError: shapes do not match (ACKD_DEBUG=1 shows where)"),
    ],
)
def test_a_process_that_lost_another_one_says_so(monkeypatch, words, sentence, capsys):
    def fails(*_):
        raise RuntimeError(words)

    monkeypatch.setattr("ackd_lightning.launch.execute.run", fails)
    assert main(["fit"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ackd: {sentence}")
