"""``metrics.csv`` goes on after whatever an interruption left of it."""

from __future__ import annotations

import pytest

from ackd_lightning.callbacks.metrics_csv import CurvesFile
from ackd_lightning.runs.figures import read_metrics


def test_a_full_disk_leaves_the_rows_of_before_when_columns_are_added(tmp_path, monkeypatch):
    logger, path = CurvesFile(tmp_path, name="", version=""), tmp_path / "metrics.csv"
    logger.log_metrics({"epoch": 0, "train/loss": 1.0}, step=0)
    logger.save()
    before = path.read_text()
    logger.log_metrics({"epoch": 1, "val/acc": 0.5}, step=1)
    with monkeypatch.context() as patch:
        patch.setattr("ackd_lightning.writing.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            logger.save()
    assert path.read_text() == before
    again = CurvesFile(tmp_path, name="", version="")
    again.log_metrics({"epoch": 1, "val/acc": 0.5}, step=1)
    again.save()
    assert read_metrics(path)["val/acc"] == {2: 0.5}
    assert "1.0" in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.csv"]


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("cut", [0, 1, 3, 8])
def test_a_line_that_was_cut_is_written_anew(tmp_path, cut):
    path = tmp_path / "metrics.csv"

    def log(epoch):
        logger = CurvesFile(tmp_path, name="", version="")
        logger.log_metrics({"epoch": epoch, "val/acc": 0.5 + epoch / 10}, step=epoch)
        logger.save()

    log(0)
    log(1)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    log(2)
    found = read_metrics(path)["val/acc"]
    assert found[1] == 0.5
    assert found[3] == 0.7
    assert (2 in found) == (cut == 0)
