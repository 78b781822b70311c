"""Predictions name file and class, also for images without labels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ackd_lightning.cli import main

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
    assert main(["predict", "runs/ce/a", "--images", "pets/test", "--output", "again.csv"]) == 0
    again = rows("again.csv")
    assert [each["file"] for each in again] == [each["file"] for each in known]
    assert "target" not in again[0]
    assert [each["class_name"] for each in again] == [each["class_name"] for each in known]
    expected = [float(each["probability"]) for each in known]
    assert [float(each["probability"]) for each in again] == pytest.approx(expected, abs=1e-5)


def test_the_ending_decides_between_csv_and_parquet(capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main([*FIT, *FOLDER, "--data.image_size", "16"]) == 0
    assert main(["predict", "runs/ce/a", "--output", "p.parquet"]) == 0
    assert main(["predict", "runs/ce/a"]) == 0
    table = parquet.read_table("p.parquet").to_pydict()
    assert table["file"] == [each["file"] for each in rows()]
    assert list(table) == list(rows()[0])
    assert main(["predict", "runs/ce/a", "--output", "p.txt"]) == 2
    assert "ends in .csv or .parquet" in capsys.readouterr().err


def test_a_test_on_other_data_is_not_kept_and_takes_one_run(capsys):
    assert main([*FIT, *FOLDER, "--data.image_size", "16", "--test"]) == 0
    summary = Path("runs/ce/a/summary.json").read_bytes()
    Path("pets/test/cat/00.png").rename("pets/test/dog/zz.png")
    Path("other.yaml").write_text("data: {init_args: {val_fraction: 0.3}}\n")
    Path("same.yaml").write_text("trainer: {enable_progress_bar: false}\n")
    capsys.readouterr()
    assert main(["test", "runs/ce/a", "--config", "other.yaml"]) == 0
    assert "not kept in runs/ce/a, as it is another test" in capsys.readouterr().out
    assert Path("runs/ce/a/summary.json").read_bytes() == summary
    Path("quick.yaml").write_text("trainer: {fast_dev_run: 1}\n")
    Path("own.yaml").write_text(Path("runs/ce/a/config.yaml").read_text().replace("image_size: 16", "image_size: 24"))
    for changed in (
        ["runs/ce/a", "--trainer.fast_dev_run", "1"],
        ["runs/ce/a", "--config", "quick.yaml"],
        ["runs/ce/a", "--trainer.precision", "bf16-mixed"],
        ["runs/ce/a", "--trainer.limit_test_batches", "1"],
        ["--config", "own.yaml", "--ckpt_path", "runs/ce/a/checkpoints/last.ckpt"],
    ):
        assert main(["test", *changed]) == 0
        assert "not kept in runs/ce/a, as it is another test" in capsys.readouterr().out
        assert Path("runs/ce/a/summary.json").read_bytes() == summary
    assert main(["test", "runs/ce/a", "--config", "same.yaml"]) == 0
    assert "not kept" not in capsys.readouterr().out
    assert main(["test", "runs/ce/a", "runs/ce/b"]) == 2
    assert "one run at a time: runs/ce/a and runs/ce/b" in capsys.readouterr().err


def test_photos_for_a_network_of_grey_images():
    assert (
        main(["fit", "--config", "digits_resnet8", "--weights_dir", "null", *FIT[5:], "--data.max_per_class=13"]) == 0
    )
    assert main(["predict", "runs/digits_resnet8/a", "--output", "own.csv"]) == 0
    assert {each["file"] for each in rows("own.csv")} == {""}
    assert main(["predict", "runs/digits_resnet8/a", "--images", "flat"]) == 0
    assert [each["file"] for each in rows()] == ["im0.png", "im1.png", "im2.png"]


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
