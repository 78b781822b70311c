"""What is printed about the progress of a fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ackd_lightning import CE
from ackd_lightning.callbacks.progress import EpochLine, RunBar, clock
from training.helpers import Blobs, build, trainer


class Bar(RunBar):
    """Keeps what stands beside the bar."""

    def on_train_batch_end(self, trainer, pl_module, *rest):
        super().on_train_batch_end(trainer, pl_module, *rest)
        self.__dict__.setdefault("seen", []).append(self.get_metrics(trainer, pl_module))


def test_the_line_of_an_epoch_has_the_best_one(capsys):
    best = SimpleNamespace(best={"val/acc": 0.5, "epoch": 1.0})
    trainer(max_epochs=2, limit_train_batches=2, callbacks=[EpochLine(best)]).fit(build(CE()), datamodule=Blobs())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 2/2")]
    assert "best 50.00% (epoch 1)" in lines[0]
    assert "0:00:00 left" in lines[0]


@pytest.mark.parametrize(("width", "best", "columns"), [(120, " (best 50.00%)", 5), (80, "", 3)])
def test_the_bar_shows_the_accuracies_and_the_time_left_for_the_run(monkeypatch, width, best, columns):
    """On a narrow terminal, what the lines of the epochs say as well is left out, so that the bar has one line."""
    monkeypatch.setattr("ackd_lightning.callbacks.progress.get_console", lambda: SimpleNamespace(width=width))
    bar = Bar(SimpleNamespace(best={"val/acc": 0.5, "epoch": 1.0}))
    fitting = trainer(max_epochs=2, limit_train_batches=2, callbacks=[bar], enable_progress_bar=True)
    fitting.fit(build(CE()), datamodule=Blobs())
    assert len(bar.seen) == 4
    assert all(set(each) >= {"loss", "left"} and "v_num" not in each for each in bar.seen)
    assert bar.seen[-1]["val/acc"].partition("%")[2] == best
    assert len(bar.configure_columns(fitting)) == columns
    assert bar._get_train_description(1).strip() == "epoch 2/2"
    assert bar._left(fitting) is None  # after the fit


def test_the_clock_of_a_resumed_run_starts_at_its_first_batch():
    """The batches of the checkpoint took no time of this run."""
    bar = RunBar(SimpleNamespace(best={}))
    bar._trainer = None
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    fit = {"max_epochs": 10, "max_steps": -1, "training": True, "callbacks": [], "progress_bar_metrics": {}}
    resumed = SimpleNamespace(num_training_batches=10, fit_loop=loop, current_epoch=4, **fit)
    assert bar._left(resumed) is None
    progress.current.ready = 6  # five of the checkpoint, and the one that starts
    bar.on_train_batch_start(resumed, build(CE()), None, 5)
    assert bar.started is not None
    assert bar.started[1] == 4.5


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (36_000, "10:00:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
