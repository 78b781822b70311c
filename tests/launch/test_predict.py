"""Predictions name file and class, also for images without labels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ackd_lightning.cli import main
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import choose_unlabelled

FIT = ["fit", "--config", "ce", "--model.student", "resnet8", "--trainer.max_epochs", "1", "--name", "a"]
FOLDER = ["--data", "ackd_lightning.data.ImageFolderDataModule", "--data.root", "pets", "--data.batch_size", "8"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about few steps


def draw(path, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (side, side + 9, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 12), ("test", 3)):
        for name in ("cat", "dog", "owl"):
            for number in range(count):
                draw(Path("pets") / part / name / f"{number:02d}.png")
    for number in range(3):
        draw(Path("flat") / f"im{number}.png")
    (Path("flat") / "notes.txt").write_text("x")


def rows(path="predictions.csv"):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


@pytest.mark.parametrize("size", ["16", "72"], ids=["in memory", "files"])
def test_file_and_class_of_every_image_with_and_without_labels(size):
    assert main([*FIT, *FOLDER, "--data.image_size", size]) == 0
    assert main(["predict", "runs/ce/a"]) == 0
    known = rows()
    assert [each["file"] for each in known[:4]] == ["cat/00.png", "cat/01.png", "cat/02.png", "dog/00.png"]
    assert all(each["class_name"] == ("cat", "dog", "owl")[int(each["prediction"])] for each in known)
    assert main(["predict", "runs/ce/a", "--data.root", "flat", "--output", "flat.csv"]) == 0
    flat = rows("flat.csv")
    assert [each["file"] for each in flat] == ["im0.png", "im1.png", "im2.png"]
    assert {each["target"] for each in flat} == {"-1"}
    assert {each["class_name"] for each in flat} <= {"cat", "dog", "owl"}
    assert sorted(each.name for each in Path("flat").iterdir()) == ["im0.png", "im1.png", "im2.png", "notes.txt"]
    # the same images in class folders are predicted alike
    for name in ("cat", "dog", "owl"):
        (Path("again") / name).mkdir(parents=True)
    for number, name in enumerate(("cat", "dog", "owl")):
        Path(f"flat/im{number}.png").rename(f"again/{name}/im{number}.png")
    command = ["predict", "runs/ce/a", "--data.root", ".", "--data.train_dir", "pets/train", "--data.test_dir", "again"]
    assert main([*command, "--output", "again.csv"]) == 0
    assert [each["probability"] for each in rows("again.csv")] == [each["probability"] for each in flat]


def test_photos_for_a_network_of_grey_images():
    assert (
        main(["fit", "--config", "digits_resnet8", "--weights_dir", "null", *FIT[5:], "--data.max_per_class=13"]) == 0
    )
    assert main(["predict", "runs/digits_resnet8/a", "--output", "own.csv"]) == 0
    assert {each["file"] for each in rows("own.csv")} == {""}
    assert main(["predict", "runs/digits_resnet8/a", "--data.root=flat"]) == 0
    assert [each["file"] for each in rows()] == ["im0.png", "im1.png", "im2.png"]


@pytest.mark.parametrize("root", ["pets", "pets/train", "nowhere", "."])
def test_another_folder_is_left_to_the_data_module(root):
    options = ["--data.root", root, "--ckpt_path", "x.ckpt"]
    settings = {"data": {"class_path": "ackd_lightning.data.ImageFolderDataModule"}}
    assert choose_unlabelled(settings, options) == options
    assert settings["data"]["class_path"].endswith("ImageFolderDataModule")


def test_a_flat_folder_needs_a_checkpoint_that_can_be_read():
    Path("x.ckpt").write_bytes(b"x")
    with pytest.raises(ACKDError, match=r"x\.ckpt"):
        choose_unlabelled({}, ["--data.root", "flat", "--ckpt_path", "x.ckpt"])


@pytest.mark.parametrize("root", ["pets/train", "pets"])
def test_a_single_class_folder_is_refused(root, capsys):
    for name in ("dog", "owl"):
        for image in Path("pets").rglob(f"{name}/*.png"):
            image.unlink()
        for folder in list(Path("pets").rglob(name)):
            folder.rmdir()
    assert main([*FIT, "--data", FOLDER[1], "--data.root", root]) == 2
    assert "single class folder, cat" in capsys.readouterr().err


def test_two_fits_with_one_name_keep_the_first(capsys):
    options = [*FIT, *FOLDER, "--data.image_size", "16"]
    assert main(options) == 0
    before = Path("runs/ce/a/summary.json").read_bytes()
    assert main(options) == 2
    assert "runs/ce/a" in capsys.readouterr().err
    assert Path("runs/ce/a/summary.json").read_bytes() == before
