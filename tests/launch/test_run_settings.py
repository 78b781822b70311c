"""Relative paths in a run's settings are found from any folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ackd_lightning.cli import main
from ackd_lightning.launch.run_settings import find_files
from ackd_lightning.runs.files import STARTED


@pytest.mark.parametrize("runs_dir", ["runs", "out/of/here", "./runs", "../elsewhere"])
def test_paths_are_seen_from_where_the_run_was_started(tmp_path, monkeypatch, runs_dir):
    start, other = tmp_path / "start", tmp_path / "other"
    run = start / runs_dir / "config" / "a"
    for folder in (run, start / "pets", other):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text(f"{STARTED}{start}\n")
    monkeypatch.chdir(other)
    settings = {"runs_dir": runs_dir, "data": {"init_args": {"root": "pets", "test_dir": "pets", "batch_size": 3}}}
    assert len(find_files(settings, run / "config.yaml", (), writes=False)) == 1
    assert settings["data"]["init_args"]["root"] == str(start / "pets")
    assert settings["data"]["init_args"]["test_dir"] == "pets"  # a folder in the root


def test_data_of_the_run_come_before_others_of_that_name_here(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "config" / "a"
    for folder in (run, tmp_path / "pets", tmp_path / "other" / "pets"):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text(f"{STARTED}{tmp_path}\n")
    settings = {"data": {"init_args": {"root": "pets"}}, "model": {"teacher": [{"weights": "w"}, {"weights": "pets"}]}}
    monkeypatch.chdir(tmp_path)
    assert find_files(settings, run / "config.yaml", (), writes=False) == []
    monkeypatch.chdir(tmp_path / "other")
    found = find_files(settings, run / "config.yaml", (), writes=False)
    assert found == [f"data.root is {tmp_path / 'pets'}", f"model.teacher.1.weights is {tmp_path / 'pets'}"]
    settings["data"]["init_args"]["root"] = "pets"
    assert find_files(settings, run / "config.yaml", ["data.root", "model.teacher.1.weights"], writes=False) == []


def test_a_class_map_and_a_folder_with_a_network_are_files_of_the_run(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "config" / "a"
    for folder in (run, tmp_path / "vit", tmp_path / "other"):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text(f"{STARTED}{tmp_path}\n")
    (tmp_path / "map.yaml").write_text("[0, 1]")
    (tmp_path / "features").touch()
    monkeypatch.chdir(tmp_path / "other")
    teachers = [{"network": "hf:vit", "class_map": "map.yaml"}, {"network": "vit", "class_map": "features"}]
    settings = {"model": {"teacher": teachers, "student": {"network": "hf:none"}}}
    assert len(find_files(settings, run / "config.yaml", (), writes=False)) == 2
    assert teachers == [
        {"network": f"hf:{tmp_path / 'vit'}", "class_map": str(tmp_path / "map.yaml")},
        {"network": "vit", "class_map": "features"},
    ]
    assert settings["model"]["student"] == {"network": "hf:none"}


@pytest.mark.parametrize("option", ["--wandb", "--fast", "--test"])
def test_a_run_after_an_option_of_fit_alone_is_found(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    for folder in (Path("runs/a/one"), Path("runs/a/one/checkpoints")):
        folder.mkdir(parents=True)
    (Path("runs/a/one/checkpoints") / "last.ckpt").touch()
    Path("runs/a/one/config.yaml").write_text("")
    assert main(["test", option, "runs/a/one"]) == 2
    assert f"there is no setting {option[2:]!r} here" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["cats", "/pets", "", None, 3])
def test_what_is_not_there_or_is_no_path_stays(tmp_path, monkeypatch, value):
    run = tmp_path / "runs" / "config" / "a"
    for folder in (run, tmp_path / "pets", tmp_path / "other" / "cats"):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text(f"{STARTED}{tmp_path}\n")
    monkeypatch.chdir(tmp_path / "other")
    settings = {"data": {"init_args": {"root": value}}}
    assert find_files(settings, run / "config.yaml", (), writes=False) == []
    assert settings["data"]["init_args"]["root"] == value


def test_a_run_is_tested_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for label in ("cat", "dog"):
            folder = Path("pets") / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8))
                image.save(folder / f"{number}.png")
    data = {"class_path": "ackd_lightning.data.ImageFolderDataModule"}
    data["init_args"] = {"root": "pets", "image_size": 16, "batch_size": 4}
    content = {"include": ["recipes/cifar", "methods/ce"], "data": data, "model": {"student": "resnet8"}}
    Path("pets.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", "pets.yaml", "--name", "a", "--trainer.max_epochs", "1"]) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main(["test", str(tmp_path / "runs" / "pets" / "a")]) == 0
    assert str(tmp_path / "pets") in capsys.readouterr().out
    shutil.copytree(tmp_path / "pets", "pets")  # other photos of that name do not become those of the run
    assert main(["fit", "--resume", str(tmp_path / "runs" / "pets" / "a"), "--trainer.max_epochs", "2"]) == 0
    settings = yaml.safe_load((tmp_path / "runs" / "pets" / "a" / "config.yaml").read_text())
    assert settings["data"]["init_args"]["root"] == str(tmp_path / "pets")
    shutil.rmtree("pets")
    run, summary = tmp_path / "runs" / "pets" / "a", tmp_path / "runs" / "pets" / "a" / "summary.json"
    Path("new.yaml").write_text("data: {init_args: {root: pets}}\n")
    shutil.copytree(tmp_path / "pets", "pets")
    before = summary.read_bytes()
    capsys.readouterr()
    assert main(["test", str(run), "--config", "new.yaml"]) == 0  # those of this folder
    assert "not kept" in capsys.readouterr().out
    assert summary.read_bytes() == before
    shutil.rmtree("pets")
    for same in (["--data.root", "../pets"], ["--data.num_workers", "1"], ["--data.eval_batch_size", "2"]):
        assert main(["test", str(run), *same]) == 0
        assert "not kept" not in capsys.readouterr().out
    (tmp_path / "pets").rename(tmp_path / "moved")
    for command in ("test", "report"):
        assert main([command, str(tmp_path / "runs" / "pets" / "a")]) == 2
        assert "--data.root" in capsys.readouterr().err


def test_a_linked_folder_of_runs_belongs_to_where_the_link_is(tmp_path, monkeypatch):
    start, disk = tmp_path / "start", tmp_path / "disk"
    run = disk / "runs" / "config" / "a"
    for folder in (start / "pets", disk / "pets", run):
        folder.mkdir(parents=True)
    (start / "runs").symlink_to(disk / "runs")
    (run / "config.yaml").write_text(f"{STARTED}{start}\n")
    settings = {"data": {"init_args": {"root": "pets"}}, "weights_dir": "weights"}
    monkeypatch.chdir(start)
    assert find_files(settings, Path("runs/config/a/config.yaml"), (), writes=True) == []
    monkeypatch.chdir(disk)
    found = find_files(settings, run / "config.yaml", (), writes=True)
    assert found == [f"data.root is {start / 'pets'}", f"weights_dir is {start / 'weights'}"]


@pytest.mark.filterwarnings("ignore")  # of Lightning, about few steps
def test_data_that_have_moved_are_those_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for number in range(60):
        file = Path("pets") / ("cat", "dog", "owl")[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(file)
    data = ["--data", "ackd_lightning.data.ImageFolderDataModule", "--data.root", "pets", "--data.batch_size", "8"]
    fit = ["fit", "--config", "ce", "--model.student", "resnet8", "--trainer.max_epochs", "1", "--name", "a"]
    assert main([*fit, *data, "--data.image_size", "16"]) == 0
    run, moved = Path("runs/ce/a"), ["--data.root", "store/animals"]
    shutil.copytree("pets", "copy")
    capsys.readouterr()
    assert main(["test", str(run), "--data.root", "copy"]) == 0
    assert "not kept" in capsys.readouterr().out  # the earlier folder is still there
    Path("store").mkdir()
    Path("pets").rename("store/animals")
    assert main(["report", str(run), "--no-latency", *moved]) == 0
    assert json.loads((run / "report/report.json").read_text())["measured_otherwise"] == ""
    assert main(["test", str(run), *moved]) == 0
    said = capsys.readouterr().out
    assert "the data were in pets and are in store/animals now: all images have the names they had" in said
    assert "not kept" not in said
    assert "test" in json.loads((run / "summary.json").read_text())
    next(Path("store/animals/cat").iterdir()).unlink()
    assert main(["test", str(run), *moved]) == 0
    assert "not kept" in capsys.readouterr().out
