"""``metrics.csv`` goes on after whatever an interruption left of it."""

from __future__ import annotations

import pytest

from ackd_lightning.callbacks.metrics_csv import CurvesFile
from ackd_lightning.runs.figures import read_metrics


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
