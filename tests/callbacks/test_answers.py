"""Predictions for test images are kept by a test and by a fit that validates on the test set."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ackd_lightning.callbacks.answers import TestAnswers
from ackd_lightning.cli import main
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.answers import Answers, answers_file, hash_of_images, read_answers, write_answers
from ackd_lightning.runs.files import read_summary

FIT = ["fit", "--config", "digits_resnet8", "--weights_dir", "null", "--trainer.max_epochs", "1", "--name", "a"]
SMALL = ["--data.max_per_class", "20", "--trainer.limit_train_batches", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_on_the_test_set_and_a_test_keep_the_same_answers():
    assert main([*FIT, *SMALL, "--data.val_fraction", "0"]) == 0
    run = Path("runs/digits_resnet8/a")
    answers = read_answers(answers_file(run, "last"))
    accuracy = read_summary(run)["last"]["test/acc"]
    assert float(answers.right.float().mean()) == pytest.approx(accuracy, abs=1e-6)
    answers_file(run, "last").unlink()
    assert main(["test", str(run), "--trainer.limit_test_batches", "1"]) == 0  # altered, so not kept
    assert not answers_file(run, "last").exists()
    assert main(["test", str(run)]) == 0
    again = read_answers(answers_file(run, "last"))
    assert torch.equal(answers.prediction, again.prediction)
    assert (answers.images, answers.data) == (again.images, again.data)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_with_a_validation_part_keeps_answers_only_of_its_test():
    assert main([*FIT, *SMALL]) == 0
    assert not Path("runs/digits_resnet8/a/predictions").exists()
    assert main([*FIT[:-1], "b", *SMALL, "--test"]) == 0
    run = Path("runs/digits_resnet8/b")
    for which in ("last", "best"):
        accuracy = read_summary(run)["test"][which]["test/acc"]
        assert float(read_answers(answers_file(run, which)).right.float().mean()) == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_run_that_may_not_be_written_is_tested_all_the_same(code, monkeypatch, capsys):
    assert main([*FIT, *SMALL]) == 0
    summary = Path("runs/digits_resnet8/a/summary.json")
    before = summary.read_bytes()

    def refused(answers, path):
        raise OSError(code, "not allowed", str(path))

    monkeypatch.setattr("ackd_lightning.callbacks.answers.write_answers", refused)
    capsys.readouterr()
    assert main(["test", "runs/digits_resnet8/a", "--trainer.accelerator", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"accuracy .* test images", printed)
    assert re.search(r"not kept: .*test-last\.safetensors may not be read or written \(not allowed\)", printed)
    assert summary.read_bytes() == before


def outputs(index):
    index = torch.tensor(index)
    return {"index": index, "target": index % 3, "prediction": index % 2, "probability": index / 16}


def collected(batches, *, others=None, rank=0):
    trainer = SimpleNamespace(world_size=1 if others is None else 2, is_global_zero=rank == 0)
    callback = TestAnswers()
    callback.on_test_epoch_start(trainer, None)
    for number, each in enumerate(batches):
        callback.on_test_batch_end(trainer, None, outputs(each), None, number)
    callback.on_test_epoch_end(trainer, None)
    return callback.answers


def test_two_processes_give_what_one_gives(monkeypatch):
    def gather(own, parts):
        if parts is not None:
            parts[:] = [own, outputs([1, 3])]

    monkeypatch.setattr(dist, "gather_object", gather)
    one, two = collected([[0, 1, 2], [3, 4]]), collected([[0, 2], [4]], others=True)
    assert torch.equal(one.prediction, two.prediction)
    assert torch.equal(one.target, torch.tensor([0, 1, 2, 0, 1]))
    assert one.images == two.images
    assert collected([[0, 2]], others=True, rank=1) is None


def test_images_without_a_position_keep_the_order_of_the_loader():
    assert collected([[-1, -1]]).prediction.tolist() == [-1 % 2] * 2
    assert collected([]) is None


def test_the_hash_follows_names_and_classes_and_not_their_numbers():
    first = hash_of_images(torch.tensor([0, 1]), ["cat", "dog"], ["a", "b"])
    assert first == hash_of_images(torch.tensor([1, 0]), ["dog", "cat"], ["a", "b"])
    others = [([0, 0], ["a", "b"]), ([0, 1], ["a", "c"]), ([0, 1], None)]
    assert first not in [hash_of_images(torch.tensor(target), ["cat", "dog"], names) for target, names in others]


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_file_is_refused(damage):
    path = Path("a.safetensors")
    write_answers(Answers(torch.zeros(9), torch.zeros(9), torch.zeros(9), "x", "Data"), path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-4], "other": content.replace(b"target", b"tarxet")}[damage])
    with pytest.raises(ACKDError, match=r"a\.safetensors"):
        read_answers(path)
