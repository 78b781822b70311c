"""`ackd init`: what it says about photos, what it chooses, and that its files run as they are written."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ackd_lightning.cli import main
from ackd_lightning.commands.init.choices import choose
from ackd_lightning.commands.init.duration import durations
from ackd_lightning.commands.init.survey import survey
from ackd_lightning.config.files import load_configs
from ackd_lightning.data import ImageFolderDataModule

QUICK = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
QUICK += ["--trainer.enable_progress_bar", "false", "--model.lr_scheduler.milestones", "[1]", "--name", "a"]


def photos(folder: Path, counts: dict[str, int], *, size: int = 28, grey: bool = False) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for each in range(count):
            pixels = np.random.default_rng(1000 * number + each).integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            (image.convert("L") if grey else image).save(folder / name / f"{each}.png")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_files_run_as_they_are_written(here, capsys, caplog):
    photos(Path("my pets"), {"cat": 40, "dog": 10, "no": 10}, grey=True)
    assert main(["init", "my pets"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"ackd fit --config my_pets_teacher.yaml  # about \d+(\.\d)? (s|min|h)\n", shown)
    assert caplog.text.count("has no test part") == 1
    with Image.open("my_pets_samples.png") as sheet:
        assert sheet.size[0] > sheet.size[1]
    assert main(["fit", "--config", "my_pets_teacher.yaml", *QUICK]) == 0
    assert main(["fit", "--config", "my_pets_student.yaml", *QUICK, "--model.teacher.gate", "off"]) == 0
    settings = yaml.safe_load(Path("runs/my_pets_student/a/config.yaml").read_text())
    assert settings["data"]["init_args"]["sampling"] == "balanced"
    assert settings["data"]["init_args"]["channels"] == 1
    assert settings["model"]["teacher"]["weights"] == "weights/my_pets_teacher.safetensors"
    method = settings["model"]["method"]
    assert method["class_path"].endswith(".KD")
    assert (method["init_args"]["weight_ce"], method["init_args"]["weight_kd"]) == (1.0, 1.0)
    other = load_configs(["my_pets_student.yaml", "ackd.yaml"])[0]["model"]["method"]
    assert "weight_kd" not in other.get("init_args", {})


def test_classes_inside_the_class_folders_are_said(here):
    for folder, names in (("animals", ("cat", "dog")), ("plants", ("ivy", "rose"))):
        photos(Path("nest") / folder, dict.fromkeys(names, 8))
    assert survey("nest").deeper == ["animals/cat", "animals/dog", "plants/ivy", "plants/rose"]
    assert survey("nest/animals").deeper == []
    photos(Path("by_camera") / "a", {"first": 8})
    photos(Path("by_camera") / "b", {"first": 8})
    assert survey("by_camera").deeper == []


def test_files_are_replaced_only_when_asked(here, capsys):
    photos(Path("pets"), {"cat": 12, "dog": 12})
    Path("pets_student.yaml").write_text("mine")
    assert main(["init", "pets"]) == 2
    assert "pets_student.yaml" in capsys.readouterr().err
    assert Path("pets_student.yaml").read_text() == "mine"
    assert main(["init", "pets", "--out", "other"]) == 0
    assert main(["init", "pets", "--overwrite"]) == 0
    assert Path("pets_student.yaml").read_text() != "mine"


def test_broken_files_and_duplicates_are_named(here, capsys):
    root = Path("pets")
    photos(root / "train", {"cat": 12, "dog": 12})
    photos(root / "test", {"cat": 2, "dog": 2})  # equal to training images
    content = (root / "train/cat/5.png").read_bytes()
    (root / "train/cat/5.png").write_bytes(content[: len(content) // 2])
    (root / "train/dog/twin.png").write_bytes((root / "train/cat/3.png").read_bytes())
    assert main(["init", "pets"]) == 0
    assert Path("pets_broken.txt").read_text() == "pets/train/cat/5.png\n"
    for name in ("teacher.yaml", "student.yaml", "samples.png"):
        Path(f"pets_{name}").unlink()
    assert main(["init", "pets"]) == 2  # the list may be somebody's
    assert "pets_broken.txt exists" in capsys.readouterr().err
    assert main(["init", "pets", "--overwrite"]) == 0
    seen = survey("pets")
    assert len(seen.shared) == 4
    assert [(one.name, other.name) for one, other in seen.contradicting] == [("3.png", "twin.png")]
    assert seen.counts == [11, 13]


@pytest.mark.parametrize(
    ("size", "pretrained", "device", "expected"),
    [
        (28, True, "cpu", (32, "resnet56", "kd", False)),
        (64, True, "cpu", (96, "timm:tf_efficientnet_lite0", "reviewkd", True)),
        (64, False, "cpu", (96, "resnet18", "kd", False)),
        (300, True, "cpu", (128, "timm:tf_efficientnet_lite0", "reviewkd", True)),
        (300, True, "cuda", (224, "timm:tf_efficientnet_lite0", "reviewkd", True)),
    ],
)
def test_values_follow_the_photos_and_the_machine(here, size, pretrained, device, expected):
    chosen = choose(
        survey(str(photos(here / "pets", {"cat": 3, "dog": 3}, size=size))), pretrained=pretrained, device=device
    )
    assert (chosen.image_size, chosen.teacher, chosen.method, chosen.pretrained) == expected
    assert chosen.batch_size == 8
    assert chosen.student_epochs == 200


def test_only_the_teacher_fetches_weights_and_only_when_allowed(here):
    photos(Path("pets"), {"cat": 3, "dog": 3}, size=64)
    for options, expected in (([], True), (["--no-pretrained", "--overwrite"], False)):
        assert main(["init", "pets", *options]) == 0
        teacher, student = (load_configs([f"pets_{which}.yaml"])[0]["model"] for which in ("teacher", "student"))
        assert (
            bool(teacher["student"].get("pretrained")) is expected
            if isinstance(teacher["student"], dict)
            else not expected
        )
        assert "pretrained" not in {**student["student"], **student["teacher"]}
    assert load_configs(["pets_student.yaml"])[0]["data"]["init_args"]["val_fraction"] == 0  # of 2 images a class


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_a_line_break_in_the_name_of_the_folder_stays_in_its_quotes(here):
    photos(Path("my\npets"), {"cat": 3, "dog": 3})
    assert main(["init", "my\npets"]) == 0
    for which in ("teacher", "student"):
        assert load_configs([f"my_pets_{which}.yaml"])[0]["data"]["init_args"]["root"] == "my\npets"


def test_a_folder_of_one_class_is_refused_with_the_command(here, capsys):
    photos(Path("pets/all"), {"cat": 2, "dog": 2})
    assert main(["init", "pets"]) == 2
    assert "ackd init pets/all" in capsys.readouterr().err
    assert not list(Path().glob("*.yaml"))


def test_the_command_for_a_folder_inside_can_be_pasted(here, capsys):
    photos(Path("my pets/in here"), {"cat": 2, "dog": 2})
    assert main(["init", "my pets"]) == 2
    assert capsys.readouterr().err.endswith("run ackd init 'my pets/in here'\n")


@pytest.mark.skipif(sys.platform != "linux", reason="no such names there")
def test_a_broken_file_whose_name_is_not_utf_8_is_listed(here, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")  # as that of the command
    monkeypatch.setattr(sys, "stdout", out)
    photos(Path("pets"), {"cat": 12, "dog": 12})
    Path(os.fsdecode(b"pets/cat/\xe9.png")).write_bytes(b"x")
    assert main(["init", "pets"]) == 0
    assert Path("pets_broken.txt").read_bytes() == b"pets/cat/\xe9.png\n"
    out.flush()
    assert "next:\n  ackd fit" in out.buffer.getvalue().decode()


@pytest.mark.skipif(sys.platform != "linux", reason="no such names there")
def test_a_folder_whose_name_is_not_utf_8_is_refused_before_anything_is_written(here, capsys):
    photos(Path(os.fsdecode(b"pets\xe9")), {"cat": 12, "dog": 12})
    assert main(["init", os.fsdecode(b"pets\xe9")]) == 2
    assert "the folder b'pets\\xe9' has a name that is not UTF-8" in capsys.readouterr().err
    assert len(list(Path().iterdir())) == 1


@pytest.mark.parametrize("channels", [2, 5])
def test_images_of_other_channels_need_a_configuration(here, channels, capsys):
    for name in ("a", "b"):
        Path("scans", name).mkdir(parents=True)
        for number in range(12):
            np.save(Path("scans", name, f"{number}.npy"), np.full((20, 20, channels), number, dtype=np.uint8))
    Path("scans/a/0.npy").write_bytes(b"x")
    assert main(["init", "scans"]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"scans/a/\d+\.npy has {channels} channels and ackd init is for grey and colour", error)
    assert "write a configuration with data.channels, data.mean and data.std" in error
    assert "remove" not in error
    assert list(Path().iterdir()) == [Path("scans")]


def test_a_class_of_broken_files_is_named(here, capsys):
    photos(Path("pets"), {"cat": 12, "dog": 12})
    for file in Path("pets/cat").iterdir():
        file.write_bytes(b"x")
    assert main(["init", "pets"]) == 2
    assert re.search(r"class cat can be read \(.*\); replace the files, or remove", capsys.readouterr().err)


def test_files_are_named_after_the_folder_as_it_was_given(here):
    (here / "trees").symlink_to(photos(here / "kept", {"ash": 6, "oak": 6}))
    assert main(["init", "trees"]) == 0
    assert (here / "trees_teacher.yaml").is_file()


def test_the_steps_are_those_of_the_fit(here, capsys):
    """One count of held-out images for the data and for what is said about them."""
    photos(Path("pets"), {"cat": 34, "dog": 37, "fox": 34})
    chosen = choose(survey("pets"), pretrained=False, device="cpu")
    assert main(["init", "pets"]) == 0
    quick = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--name", "a"]
    quick += ["--trainer.limit_val_batches", "0", "--model.lr_scheduler.milestones", "[1]"]
    assert main(["fit", "--config", "pets_teacher.yaml", *quick]) == 0
    summary = json.loads(Path("runs/pets_teacher/a/summary.json").read_text())
    assert summary["steps"] == chosen.steps
    data = ImageFolderDataModule("pets", image_size=32, val_fraction=chosen.val_fraction)
    data.setup("fit")
    assert len(data.train_targets) == chosen.trained


def test_a_mistyped_folder_has_a_near_match(here, capsys):
    photos(Path("pets"), {"cat": 12, "dog": 12})
    assert main(["init", "pet"]) == 2
    assert "there is no folder pet; did you mean 'pets'?" in capsys.readouterr().err
    assert main(["init", "elsewhere/photos"]) == 2
    assert "there is no folder elsewhere/photos; name one of class folders" in capsys.readouterr().err


def test_what_was_said_of_a_folder_is_not_said_again_and_nothing_is_written_into_it(here, capsys, caplog):
    for part in ("train", "val", "other"):
        photos(Path("pets") / part, {"1": 12, "2": 12, "10": 12}, size=64)
    before = sorted(Path("pets").rglob("*"))
    assert main(["init", "pets", "--no-pretrained"]) == 0
    assert "# about " in capsys.readouterr().out
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert len(lines) == len(set(lines))
    assert sorted(Path("pets").rglob("*")) == before


def test_a_duration_that_cannot_be_measured_does_not_end_the_command(here, capsys, monkeypatch):
    photos(Path("pets"), {"cat": 12, "dog": 12})

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("ackd_lightning.commands.init.command.durations", full)
    assert main(["init", "pets"]) == 0
    shown = capsys.readouterr().out
    assert "how long the fits take is not known: CUDA out of memory.\nnext:\n  ackd fit" in shown
    assert "about" not in shown.partition("not known")[2]


def test_a_folder_that_is_too_small_for_a_test_part_is_refused_before_anything_is_written(here, capsys):
    photos(Path("pets"), {"cat": 2, "dog": 2}, size=64)
    assert main(["init", "pets"]) == 2
    assert "too few images of each class to take a fifth" in capsys.readouterr().err
    assert list(Path().iterdir()) == [Path("pets")]


def test_validation_of_every_epoch_counts(here, monkeypatch):
    monkeypatch.setattr("ackd_lightning.commands.stopwatch.Stopwatch.seconds", lambda *_, **__: 1e-2)
    monkeypatch.setattr("ackd_lightning.commands.init.duration._read_seconds", lambda *_: 0.0)
    photos(Path("few/train"), {"cat": 12, "dog": 12}, size=64)
    photos(Path("few/val"), {"cat": 2, "dog": 2}, size=64)
    photos(Path("few/test"), {"cat": 2, "dog": 2}, size=64)
    few = survey("few")
    for number in range(50):
        shutil.copy("few/val/cat/0.png", f"few/val/cat/more{number}.png")
    many = survey("few")
    chosen = choose(few, pretrained=False, device="cpu")
    assert durations(many, chosen)[0] - durations(few, chosen)[0] == pytest.approx(0.5 * chosen.teacher_epochs)
