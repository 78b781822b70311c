"""``summary.json`` and the table on the screen name classes and learners."""

from __future__ import annotations

import json
import math

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from torch import nn

from ackd_lightning import KD
from ackd_lightning.callbacks.accuracy_table import accuracy_table
from ackd_lightning.callbacks.summary import RunSummary
from training.helpers import Blobs, build, module, teaching, trainer

NAMES = ("red", "green", "blue", "black")


def rows(summary):
    """Cells of the table, row by row."""
    table = accuracy_table(summary)
    Console(file=None, quiet=True).print(table)
    return list(zip(*(column._cells for column in table.columns), strict=True))


@pytest.mark.parametrize("names", [None, (), NAMES])
def test_class_names_are_kept_when_the_data_know_them(tmp_path, names):
    data = Blobs()
    if names is not None:
        data.class_names = names
    callback = RunSummary(tmp_path, config="c")
    trainer(max_epochs=1, callbacks=[callback], limit_train_batches=1).fit(module(), datamodule=data)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["class_names"] == (list(NAMES) if names else None)
    assert (summary["epochs"], summary["steps"], summary["shown"]) == (1, 1, "val")
    assert len(summary["learners"]) == len(summary["learner_parameters"]) == 2
    assert callback.up_to_date
    assert rows(summary)[1][1] == f"{100 * summary['last']['val/acc']:.2f}"


class ReadsValues(nn.Module):
    """Grey images, and a branch on the values of the pixels, which no meta device has."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, image):
        feature = self.conv(image if image.mean() < 99 else image / 2).relu()
        return self.fc(feature.mean(dim=(2, 3)))


@pytest.mark.filterwarnings("ignore:teacher .* has accuracy")
def test_teachers_with_other_channels_and_branches_on_values_are_counted(tmp_path):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    teachers = [teaching(each, gate="warn") for each in (ReadsValues(), flat)]
    callback = RunSummary(tmp_path, config="c")
    student = build(KD(), teacher=teachers)
    trainer(max_epochs=1, callbacks=[callback], limit_train_batches=1).fit(student, datamodule=Blobs())
    summary = json.loads((tmp_path / "summary.json").read_text())
    counted = [each["multiply_adds"] for each in (summary["teacher"], *summary["other_teachers"])]
    assert counted == [8 * 9 * 36 + 8 * 4, 3 * 64 * 4]
    assert [each["acc"] is None for each in (summary["teacher"], *summary["other_teachers"])] == [False, False]


def test_nothing_is_written_under_fast_dev_run(tmp_path, capsys):
    callback = RunSummary(tmp_path / "run", config="c")
    trainer(fast_dev_run=1, callbacks=[callback]).fit(module(), datamodule=Blobs())
    callback.show()
    assert not (tmp_path / "run").exists()
    assert str(tmp_path) not in capsys.readouterr().out


def test_the_first_auxiliary_learner_is_number_1():
    values = {"val/acc": 0.5, "val/aux1_acc": 0.25, "val/aux2_acc": 0.75, "val/ensemble_acc": 1.0, "val/loss": 2.0}
    summary = {
        "config": "c",
        "seed": 0,
        "shown": "val",
        "student": "resnet20",
        "parameters": 1000,
        "learners": ["resnet8", "D2B1"],
        "learner_parameters": [10, 20],
        "epochs": 2,
        "steps": 20,
        "measured_at": 20,
        "last": {**values, "val/aux3_acc": math.nan, "epoch": 2.0},
        "best": {},
        "teacher": {"model": "resnet110", "acc": None, "parameters": 7},
    }
    assert rows(summary) == [
        ("teacher resnet110", "-", "", "7"),
        ("student resnet20", "50.00", "not selected", "1,000"),
        ("aux1 (resnet8)", "25.00", "not selected", "10"),
        ("aux2 (D2B1)", "75.00", "not selected", ""),
        ("aux3", "nan", "not selected", ""),
        ("ensemble", "100.00", "not selected", ""),
    ]


def test_a_data_module_with_an_attribute_of_the_same_name_does_not_stop_a_fit(tmp_path, capsys):
    data = Blobs()
    data.preprocessing = {"train": str.lower}  # not plain data
    callback, trained = RunSummary(tmp_path, config="c"), module()
    trainer(fast_dev_run=1, callbacks=[callback]).fit(trained, datamodule=data)
    assert callback.export_options == ""
    assert trained.metadata()["preprocessing"] is None


def test_a_student_that_cannot_be_exported_for_want_of_a_checkpoint_is_said(tmp_path):
    """The checkpoints went to another folder than that of the run."""
    callbacks = [RunSummary(tmp_path / "run", config="c"), ModelCheckpoint(tmp_path / "elsewhere")]
    options = {"max_epochs": 1, "limit_train_batches": 1, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="the student was not exported, as there is no .*last.ckpt"):
        trainer(callbacks=callbacks, **options).fit(build(KD(), student="resnet8"), datamodule=Blobs())
