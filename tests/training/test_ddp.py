"""Two processes on one machine: the same weights, buffers and accuracies as one process on the same global batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training.helpers import largest_difference

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Return ``fits(name, devices)``: the result of a scenario of ddp_script.py with one or two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("ddp_script.py")
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(devices), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for devices in (2, 1)
    ]
    try:
        for each in started:
            output, _ = each.communicate(timeout=240)
            assert each.returncode == 0, output[-3000:]
    finally:
        for each in started:
            each.kill()

    def read(name, devices):
        return torch.load(folder / f"{name}-{devices}.pt", weights_only=True)

    read.folder = folder
    return read


@pytest.mark.parametrize(
    "name",
    ["default", "diversify", "collaboration", "atsc", "simkd", "aikd", "pskd", "acn", "adamw", "dot", "recipe"],
)
def test_two_processes_equal_one(fits, name):
    one, two = fits(name, 1), fits(name, 2)
    learned = [{key: each for key, each in fit["state"].items() if key.startswith("student.")} for fit in (one, two)]
    assert largest_difference(*learned) < 1e-6
    adam = name in ("aikd", "acn")  # its first steps are as large as the learning rate, however small a gradient is
    assert largest_difference(one["state"], two["state"]) < (1e-4 if adam else 1e-6)
    assert one["steps"] == two["steps"] == 10
    assert two["weights"] == 0.0


def test_discriminators_start_equal(fits):
    """DDP does not broadcast parameters that it ignores: a process with other ones gets those of the first."""
    assert largest_difference(fits("default", 1)["state"], fits("unequal", 2)["state"]) < 1e-6


def test_batchnorm_buffers_are_equal_in_validation(fits):
    assert fits("norm", 2)["buffers"] == 0.0


def test_a_student_that_is_fine_tuned_for_int8_has_the_same_weights_and_ranges_everywhere(fits):
    two = fits("qat", 2)
    assert two["weights"] == two["buffers"] == 0.0
    assert any(key.endswith("max_val") and bool(each.isfinite().all()) for key, each in two["state"].items())


def test_the_gate_measures_a_teacher_on_the_images_of_all_processes(fits):
    one, two = fits("gate", 1), fits("gate", 2)
    assert one["measured"] == two["measured"] != [None]


def test_means_of_images_that_are_shared_unevenly(fits):
    """Lightning would round 27 images of two processes down to 13 for each."""
    one, two = fits("test", 1), fits("test", 2)
    assert one.keys() == two.keys() >= {"test/loss", "test/attention_weight_aux1"}
    assert two == pytest.approx(one, abs=1e-5)


def test_predictions_are_in_the_order_of_the_images(fits):
    one, two = ((fits.folder / f"predictions-{devices}.csv").read_text().splitlines() for devices in (1, 2))
    assert len(one) == 28
    assert [row.split(",")[:4] for row in one] == [row.split(",")[:4] for row in two]


def test_buffer_test_can_fail(fits):
    """Without the broadcast the buffers differ, and the callback finds it."""
    assert fits("never_rearmed", 2)["buffers"] > 1e-4


def test_batchnorm_buffers_are_equal_in_validation_inside_an_accumulation(fits):
    assert fits("val_accumulated", 2)["buffers"] == 0.0


@pytest.mark.parametrize("name", ["skip", "skip_automatic", "skip_accumulated"])
def test_all_processes_skip_what_one_must_skip(fits, name):
    """Without agreement the other process would wait forever."""
    two = fits(name, 2)
    assert two["skipped"] == 2
    assert all(torch.isfinite(each).all() for each in two["state"].values())
    assert two["weights"] == two["buffers"] == 0.0


def test_all_processes_stop_at_a_loss_that_is_not_finite_in_one(fits):
    """Without agreement the other process would end with a message about a lost connection."""
    said = [(fits.folder / f"stop-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert all("the loss is not finite in step 4 (epoch 1)" in each for each in said)
    assert ["in another process" in each for each in said] == [False, True]


def test_metrics_are_exact(fits):
    one, two = fits("default", 1)["metrics"], fits("default", 2)["metrics"]
    for key in ("val/acc", "val/acc_top5", "val/aux1_acc", "val/aux2_acc", "val/ensemble_acc", "val/group_acc"):
        assert one[key] == two[key], key
    for key in ("cka", "feature_std", "disagreement"):
        key = f"val/learners_{key}"
        assert one[key] == pytest.approx(two[key], abs=1e-5), key
    for key in ("train/loss", "train/disc_acc"):
        assert one[key] == pytest.approx(two[key], abs=1e-5), key
