"""A fit that is stopped by a signal and resumed ends with the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from ackd_lightning.callbacks.stopping import StopEarly, StopSafely, WholeStepTimer
from ackd_lightning.errors import RunStoppedError
from ackd_lightning.methods import CE
from ackd_lightning.runs.figures import read_metrics
from training.helpers import Blobs, build, largest_difference, trainer
from training.resume_script import Signal, fit

STEPS = 15
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # of the run that is resumed
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),  # on one core
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Result of an uninterrupted fit of a method."""
    known = {}

    def result(method):
        if method not in known:
            known[method] = fit(tmp_path_factory.mktemp(method), method)
        return known[method]

    return result


def assert_same_end(again, whole):
    assert largest_difference(again["state"], whole["state"]) == 0.0
    assert again["steps"] == whole["steps"] == STEPS
    for key in ("best", "early", "waited", "lr"):
        assert again[key] == whole[key], key


@pytest.mark.parametrize(
    ("method", "step", "number", "workers"),
    [
        # manual optimization, with discriminators: inside the first epoch, later, and in the last step of an epoch,
        # which is ended first
        ("ackd", 2, signal.SIGTERM, 0),
        pytest.param("ackd", 7, signal.SIGINT, 0, marks=pytest.mark.slow),
        ("ackd", 9, signal.SIGTERM, 0),
        # automatic optimization, with memories that are updated after each step
        ("crd", 8, signal.SIGUSR1, 0),
        # a teacher that is replaced after each epoch: in the third one it is that of the second
        ("aikd", 11, signal.SIGTERM, 0),
        # mixed and repeated images, an average of the weights and early stopping, in the middle of an epoch
        ("recipe", 7, signal.SIGTERM, 0),
        pytest.param("recipe", 6, signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param("ackd", 7, signal.SIGUSR1, 2, marks=pytest.mark.slow),
        pytest.param("one", 6, signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param("atsc", 7, signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param("aikd_table", 7, signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param("acn", 7, signal.SIGTERM, 0, marks=pytest.mark.slow),
    ],
)
def test_a_fit_that_is_stopped_and_resumed_ends_like_an_uninterrupted_one(
    tmp_path, whole, method, step, number, workers
):
    stopped = fit(tmp_path, method, stop=Signal(step, number), workers=workers)
    assert stopped["code"] == 128 + number
    assert stopped["steps"] == step + 1
    again = fit(tmp_path, method, resume=tmp_path / "checkpoints" / "last.ckpt", workers=workers)
    assert again["code"] == 0
    assert_same_end(again, whole(method))


def test_a_signal_during_validation_waits_for_its_end(tmp_path, whole):
    stopped = fit(tmp_path, "ackd", stop=Signal(5, signal.SIGTERM, validating=True))
    assert (stopped["code"], stopped["steps"]) == (143, 5)
    again = fit(tmp_path, "ackd", resume=tmp_path / "checkpoints" / "last.ckpt")
    assert_same_end(again, whole("ackd"))


class AskWhileValidating(L.Callback):
    """A signal in the validation of the first epoch."""

    def __init__(self, stop):
        self.stop = stop

    def on_validation_start(self, trainer, pl_module):
        self.stop.received = signal.SIGTERM


def test_an_epoch_whose_validation_got_a_signal_has_its_means(tmp_path):
    """They are on record as those of an uninterrupted fit."""
    rows = []
    for name, asks in (("whole", False), ("stopped", True)):
        stop = StopSafely(tmp_path / f"{name}.ckpt", advice="")
        logger = CSVLogger(tmp_path, name="", version=name)
        run = trainer(
            max_epochs=1,
            enable_checkpointing=True,
            logger=logger,
            callbacks=[stop, *([AskWhileValidating(stop)] if asks else [])],
        )
        with pytest.raises(RunStoppedError) if asks else contextlib.nullcontext():
            run.fit(build(CE(), seed=0), datamodule=Blobs())
        rows.append(read_metrics(tmp_path / name / "metrics.csv"))
    assert rows[0] == rows[1]
    assert "train/loss" in rows[0]


def test_a_fit_is_resumed_from_the_end_of_an_epoch(tmp_path, whole):
    fit(tmp_path, "ackd", max_epochs=2)
    assert_same_end(fit(tmp_path, "ackd", resume=tmp_path / "checkpoints" / "last.ckpt"), whole("ackd"))


@pytest.mark.parametrize("method", ["ackd", "recipe"])
def test_a_fit_that_ended_inside_an_epoch_goes_on_with_the_rest_of_it(tmp_path, whole, method):
    ended = fit(tmp_path, method, max_steps=7)
    assert (ended["code"], ended["steps"]) == (0, 7)
    again = fit(tmp_path, method, resume=tmp_path / "checkpoints" / "last.ckpt")
    assert largest_difference(again["state"], whole(method)["state"]) == 0.0
    assert (again["steps"], again["lr"]) == (STEPS, whole(method)["lr"])


def test_an_epoch_that_a_limit_of_batches_ended_is_over(tmp_path):
    uninterrupted = fit(tmp_path / "whole", "ackd", limit_train_batches=2)
    fit(tmp_path, "ackd", max_epochs=2, limit_train_batches=2)
    again = fit(tmp_path, "ackd", resume=tmp_path / "checkpoints" / "last.ckpt", limit_train_batches=2)
    assert largest_difference(again["state"], uninterrupted["state"]) == 0.0
    assert (again["steps"], again["lr"]) == (6, uninterrupted["lr"]) == (uninterrupted["steps"], again["lr"])


def test_an_early_stop_inside_the_first_epoch_is_told_and_kept(tmp_path, capsys):
    def run(path=None):
        callbacks = [StopEarly(1), ModelCheckpoint(tmp_path)]
        fitting = trainer(max_epochs=3, val_check_interval=1, callbacks=callbacks, enable_checkpointing=True)
        fitting.fit(build(CE(), lr=1e-9), Blobs(), ckpt_path=path)
        return fitting.global_step, capsys.readouterr().out

    steps, said = run()
    assert (steps, "stopped early after epoch 1" in said) == (2, True)
    assert run(next(tmp_path.glob("*.ckpt"))) == (steps, said)


def test_signal_handlers_are_restored(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    fit(tmp_path, "ackd", stop=Signal(1, signal.SIGTERM))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_a_fit_unless_nohup_was_asked_for(tmp_path, ignored):
    callback = StopSafely(tmp_path / "last.ckpt", advice="go on")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        callback.on_train_start(SimpleNamespace(is_global_zero=True), None)
        handler = signal.getsignal(signal.SIGHUP)
        callback.on_train_end(None, None)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert handler == (signal.SIG_IGN if ignored else callback._remember)


def test_the_first_ctrl_c_is_answered_and_the_second_one_quits(tmp_path, capfd):
    callback = StopSafely(tmp_path / "last.ckpt", advice="go on")
    callback._remember(signal.SIGINT, None)
    assert "Ctrl-C" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        callback._remember(signal.SIGINT, None)


def test_a_process_stops_when_only_another_one_got_the_signal(tmp_path):
    saved = []
    strategy = SimpleNamespace(
        root_device="cpu", reduce=lambda own, reduce_op: torch.tensor(max(int(own), signal.SIGTERM))
    )
    place = {"current_epoch": 0, "global_step": 7, "is_last_batch": False, "val_check_batch": 4}
    place |= {"check_val_every_n_epoch": 1}
    trainer = SimpleNamespace(
        world_size=2, strategy=strategy, save_checkpoint=saved.append, accumulate_grad_batches=1, **place
    )
    callback = StopSafely(tmp_path / "last.ckpt", advice="go on")
    with pytest.raises(RunStoppedError) as caught:
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert caught.value.code == 128 + signal.SIGTERM
    assert saved == [tmp_path / "last.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ackd", "recipe"])
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_two_processes_stop_together_and_are_resumed(tmp_path, method):
    """Only one of them gets the signal."""
    script = Path(__file__).parents[1] / "training" / "resume_script.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), "7", method],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert (result["stopped"]["code"], result["stopped"]["steps"]) == (143, 8)
    assert_same_end(result["again"], result["whole"])


def test_a_loader_that_inherits_the_handler_says_nothing(tmp_path, capfd):
    """Ctrl-C reaches every process of a terminal; only the one that trains answers."""
    stop = StopSafely(tmp_path / "last.ckpt", advice="")
    stop.process = -1
    stop._remember(signal.SIGINT, None)
    stop._remember(signal.SIGINT, None)  # which would end the process that trains at once
    assert (stop.received, capfd.readouterr().err) == (0, "")


def test_a_run_that_would_have_ended_early_trains_nothing_more(tmp_path, capsys):
    """It was interrupted between the validation that ended it and its last files."""

    def fit(patience, place=None):
        saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
        run = trainer(max_epochs=9, enable_checkpointing=True, callbacks=[StopEarly(patience), saver])
        run.fit(build(CE(), lr=0.0), datamodule=Blobs(), ckpt_path=place, weights_only=True)
        return run.global_step

    steps = fit(2)
    assert steps == 3 * 8
    assert fit(2, tmp_path / "last.ckpt") == steps
    assert "stopped early after epoch 3" in capsys.readouterr().out
    assert fit(20, tmp_path / "last.ckpt") == 9 * 8  # of a run that is given more patience
    assert "stopped early" not in capsys.readouterr().out


class Validations(L.Callback):
    """Steps in which validation runs, and a signal in one step."""

    def __init__(self, step=None):
        self.step, self.found = step, []

    def on_train_batch_start(self, run, module, batch, index):
        if run.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_start(self, run, module):
        if not run.sanity_checking:
            self.found.append(run.global_step)


def fit_with(tmp_path, *, step=None, resume=None, **options):
    validations = Validations(step)
    safely = StopSafely(tmp_path / "last.ckpt", advice="go on")
    run = trainer(max_epochs=3, callbacks=[validations, safely], enable_checkpointing=True, **options)
    with pytest.raises(RunStoppedError) if step else contextlib.nullcontext():
        run.fit(build(CE()), datamodule=Blobs(), ckpt_path=resume)
    return validations.found, run.global_step


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", [4, 7, 8])
def test_a_validation_that_is_counted_across_epochs_is_not_lost(tmp_path, step):
    options = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    whole, steps = fit_with(tmp_path, **options)
    assert steps > 8
    first, _ = fit_with(tmp_path, step=step, **options)
    then, _ = fit_with(tmp_path, resume=tmp_path / "last.ckpt", **options)
    assert [*first, *then] == whole


def test_a_fit_that_validates_by_time_stops_after_its_step(tmp_path):
    assert fit_with(tmp_path, step=2, val_check_interval="00:01:00:00")[1] == 2


def test_the_time_of_a_fit_ends_after_an_accumulation(tmp_path):
    class Slow(L.Callback):
        def on_train_batch_start(self, run, module, batch, index):
            if run.fit_loop.epoch_loop.total_batch_idx == 1:
                run.callbacks[0]._duration = 0.0  # the time is up within the first step

    timer = WholeStepTimer({"hours": 1})
    run = trainer(max_epochs=3, callbacks=[timer, Slow()], accumulate_grad_batches=4)
    run.fit(build(CE()), datamodule=Blobs())
    assert run.global_step == 1
    assert run.fit_loop.epoch_loop.batch_progress.total.completed == 4
