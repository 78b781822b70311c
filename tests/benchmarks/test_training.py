"""One measurement: its numbers and counts, and the bare loop; never seconds."""

from __future__ import annotations

import collections
import copy
import json
import traceback
from pathlib import Path

import pytest
import torch
from timing.training import PARTS, BareLoop, BenchRun, measure

from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import in_our_words
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.training import DistillationModule
from benchmarks.helpers import BATCH, SMALL, STEPS, WARMUP, arguments


@pytest.fixture
def without_warnings():
    """The context of `measure`: without warnings of Lightning and jsonargparse that do not concern us."""
    with in_our_words():
        yield


def limits(steps: int) -> list[str]:
    """Settings of a fit of a few steps that causes no warning."""
    settings = {"max_steps": steps, "limit_val_batches": 0, "log_every_n_steps": 1}
    return [part for key, value in settings.items() for part in (f"--trainer.{key}", str(value))]


class Forwards:
    """Counts forward passes of whole batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: collections.Counter[str] = collections.Counter()
        for kind, name in ((BranchyStudent, "student"), (FrozenTeacher, "teacher")):
            self._watch(monkeypatch, kind, name)

    def _watch(self, monkeypatch, kind, name):
        inner = kind.forward

        def forward(network, image):
            if image.device.type != "meta" and len(image) == BATCH:  # not a probe of shapes
                self.count[name] += 1
            return inner(network, image)

        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("method", ["kd", "ackd"])
def test_a_measurement_has_every_number_and_one_forward_of_each_network_a_step(method, monkeypatch, tmp_path):
    forwards = Forwards(monkeypatch)
    torch.compile(lambda number: number + 1, backend="eager")(torch.ones(1))  # earlier graphs do not count
    result = measure(arguments(method), warmup=WARMUP, steps=STEPS)
    steps = (WARMUP + STEPS + 1) + (WARMUP + STEPS) + STEPS  # Trainer, bare loop, stopwatch
    assert forwards.count == {"student": steps, "teacher": steps}

    assert result["method"].lower() == method
    assert (result["batch_size"], result["warmup"], result["steps"]) == (BATCH, WARMUP, STEPS)
    assert result["epoch"] == 30  # the middle of 60, after the warm-ups of methods
    assert result["precision"] == "32-true"
    assert set(result["parts"]) == set(PARTS)
    assert all(value >= 0 for value in result["parts"].values())
    used = {name for name, value in result["parts"].items() if value > 0} - {"other"}
    assert used == {"data", "teacher", "student", "terms", "backward", "optimizer"} | (
        {"auxiliary"} if method == "ackd" else set()
    )
    for kind in ("", "bare_"):
        assert result[f"{kind}images_per_second"] == pytest.approx(BATCH / result[f"{kind}step_seconds"])
    assert result["overhead"] == pytest.approx(result["step_seconds"] / result["bare_step_seconds"] - 1)
    assert 0 < result["data_share"] < 1
    assert result["memory_bytes"] >= result["memory_before_bytes"] > 0
    counts = result["multiply_adds"]
    assert counts["teacher"] == counts["student"]  # both are resnet8
    assert (counts["in_training"] > counts["student"]) == (method == "ackd")
    assert result["operations_per_image"] == 2 * counts["teacher"] + 6 * counts["in_training"]
    share = result["operations_per_image"] * result["images_per_second"] / result["matrix_peak"]
    assert result["matrix_share"] == pytest.approx(share)
    assert result["compiled_graphs"] == {"before": 0, "timed": 0, "bare_loop": 0}
    assert result["teacher_from_cache"] is False
    assert any("teacher resnet8 has fresh weights" in note for note in result["notes"])
    assert {"versions", "cpu", "cores", "threads", "gpu", "environment"} == set(result["machine"])
    json.dumps(result)
    assert list(tmp_path.iterdir()) == []  # no run, no checkpoint, no weights are left


@pytest.mark.parametrize("data", ["digits", "missing, with names that are known after the setup"])
def test_a_missing_cache_is_filled_and_the_teacher_is_not_run(monkeypatch, tmp_path, data):
    forwards, options = Forwards(monkeypatch), arguments("kd")
    if data != "digits":
        options = ["--config", "cifar100_resnet110_resnet20", "--config", "kd", *SMALL, "--model.student", "resnet8"]
    result = measure([*options, "--model.teacher.cache", "none"], warmup=WARMUP, steps=STEPS, trace=1)
    assert result["teacher_from_cache"] is True
    assert forwards.count["teacher"] == 0
    assert forwards.count["student"] > 0
    assert result["parts"]["teacher"] == 0
    assert result["busy_share"] is None  # of a GPU
    assert result["operations_per_image"] == 6 * result["multiply_adds"]["in_training"]
    assert any("random numbers from a file" in note for note in result["notes"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["kd", "crd", "ackd"])
def test_the_bare_loop_trains_exactly_as_the_trainer_does(method, tmp_path, without_warnings):
    run = BenchRun([*arguments(method), *limits(3)], tmp_path)
    at_start = {}
    inner = run.model.on_train_start

    def on_train_start():
        at_start.update(copy.deepcopy(run.model.state_dict()))
        return inner()

    run.model.on_train_start = on_train_start
    run.trainer.fit(run.model, datamodule=run.datamodule)
    trained = copy.deepcopy(run.model.state_dict())
    run.model.load_state_dict(at_start)
    run.trainer.fit_loop.epoch_progress.current.processed = 0  # the same images again
    loop = BareLoop(run)
    rewound = copy.deepcopy(run.model.state_dict())
    loop.seconds(2, warmup=1)
    bare = run.model.state_dict()
    names = [name for name, value in bare.items() if value.is_floating_point() and not name.startswith("evaluation")]
    assert any(not torch.equal(rewound[name], bare[name]) for name in names)
    for name in names:
        torch.testing.assert_close(bare[name], trained[name], rtol=1e-4, atol=1e-6, msg=name)


def test_timed_networks_are_put_back(tmp_path, without_warnings):
    run = BenchRun([*arguments("kd"), *limits(1)], tmp_path)
    run.trainer.fit(run.model, datamodule=run.datamodule)
    student, teachers = run.model.student, run.model.teachers.frozen
    BareLoop(run).split(1)
    assert run.model.student is student
    assert run.model.teachers.frozen is teachers


READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")


def test_steps_read_numbers_from_the_device_only_where_it_is_known(monkeypatch):
    """On a CPU the loss is checked before its backward pass, and a batch for its epoch; a GPU skips both.

    Loader, hooks, callbacks and logging included; the steps of all methods are in training/test_counts.py.
    """
    found: collections.Counter[str] = collections.Counter()
    steps: list[int] = []
    inside = [False]

    def watch(name):
        inner = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            if inside[0]:
                places = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
                ours = [each.name for each in places if each.parts[-3:-2] == ("ackd_lightning",)]
                in_bar = any(each.name == "result.py" and "logger_connector" in each.parts for each in places)
                found["progress bar" if in_bar else ours[-1]] += 1
            return inner(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in READS:
        watch(name)
    inner_start = DistillationModule.on_train_batch_start

    def on_train_batch_start(module, batch, batch_idx):
        inside[0] = module.global_step in (2, 3)  # from the start of step 3 to that of step 5
        steps.append(inside[0])
        inner_start(module, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "on_train_batch_start", on_train_batch_start)
    measure(arguments("ackd"), warmup=2, steps=3)
    assert sum(steps) == 2
    assert found.pop("nonfinite.py") == 2 * 2  # the discriminators' loss, and the student's
    assert found.pop("loaders.py") == 2
    assert found.pop("batches.py") == 2 * 2  # smallest and largest target, on a CPU only
    assert found.pop("progress bar", 0) <= 2  # Lightning's, for a value that is logged with prog_bar
    assert not found, found


def test_several_devices_are_refused():
    several = ["--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    with pytest.raises(ACKDError, match="not 2;"):
        measure([*arguments("kd"), *several], warmup=1, steps=1)


def test_a_fit_that_is_too_short_is_refused():
    with pytest.raises(ACKDError, match="1 of 4"):
        measure([*arguments("kd"), "--trainer.fast_dev_run", "1"], warmup=1, steps=2)
