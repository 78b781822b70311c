"""Collapsed attention and features without variation are reported once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ackd_lightning.callbacks.health import HealthMonitor, TeacherGate
from ackd_lightning.errors import ACKDError
from ackd_lightning.metrics.guessing import MeanRecall, mean_recall

ENTROPY, FEATURE_STD = "attention_entropy", "learners_feature_std"


def validate(monitor, *, entropy, feature_std, split="val", learners=2, **trainer):
    """What a validation with these metrics makes the monitor do."""
    metrics = {f"{split}/{ENTROPY}": torch.tensor(entropy), f"{split}/{FEATURE_STD}": torch.tensor(feature_std)}
    known = {"sanity_checking": False, "fast_dev_run": False, "current_epoch": 3, "callback_metrics": metrics}
    module = SimpleNamespace(spec=SimpleNamespace(branches=(None,) * learners), looks_at_test=lambda: split == "test")
    monitor.on_validation_end(SimpleNamespace(**{**known, **trainer}), module)


@pytest.mark.parametrize("split", ["val", "test"])
def test_each_collapse_is_reported_once(split):
    monitor = HealthMonitor()
    with pytest.warns(UserWarning, match=r"entropy 0\.001 of 0\.693 nats in epoch 4"):
        validate(monitor, entropy=0.001, feature_std=1.0, split=split)
    with pytest.warns(UserWarning, match=r"0\.200 in epoch 4, 1\.000 at the start") as caught:
        validate(monitor, entropy=0.001, feature_std=0.2, split=split)
    assert len(caught) == 1
    again = HealthMonitor()
    again.load_state_dict(monitor.state_dict())
    validate(again, entropy=0.001, feature_std=0.2, split=split)  # a warning would be an error here


@pytest.mark.parametrize(
    "values",
    [
        {"entropy": 0.3, "feature_std": 0.5},
        {"entropy": 0.0, "feature_std": 0.5, "learners": 1},
        {"entropy": 0.0, "feature_std": 0.0, "sanity_checking": True},
        {"entropy": 0.0, "feature_std": 0.0, "fast_dev_run": 1},
    ],
    ids=["healthy", "one learner", "sanity check", "fast_dev_run"],
)
def test_nothing_is_reported_without_a_reason(values):
    monitor = HealthMonitor()
    validate(monitor, entropy=0.6, feature_std=1.0)
    validate(monitor, **values)


@pytest.mark.parametrize("name", ["least_entropy", "least_feature_std"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_limits_are_fractions(name, value):
    with pytest.raises(ACKDError, match=name):
        HealthMonitor(**{name: value})


@pytest.mark.parametrize(
    ("measured", "classes", "stated", "words"),
    [
        (0.012, 100, None, "near chance"),
        (0.55, 100, "0.74", "far below"),
        (0.72, 100, "0.74", None),
        (0.51, 2, None, "near chance"),
        (0.60, 100, None, None),
    ],
)
def test_the_teacher_gate_judges_accuracy(measured, classes, stated, words):
    recall = MeanRecall(measured, classes, 1 / classes, 0.0)
    verdict = TeacherGate.judge(measured, recall, {"val_acc": stated} if stated else {}, 10_000)
    assert (verdict is None) == (words is None)
    assert words is None or words in verdict


def test_few_images_widen_the_tolerance_of_the_gate():
    recall = MeanRecall(0.65, 100, 0.01, 0.0)
    assert TeacherGate.judge(0.65, recall, {"val_acc": "0.74"}, 50) is None
    assert "far below" in TeacherGate.judge(0.65, recall, {"val_acc": "0.74"}, 5000)


@pytest.mark.parametrize("images", [9, 900])
def test_a_constant_answer_is_chance_where_one_class_has_most_images(images):
    targets = torch.tensor([0] * (7 * images // 9) + [1] * (2 * images // 9))
    recall = mean_recall(targets, torch.zeros_like(targets), 2)
    verdict = TeacherGate.judge(7 / 9, recall, {}, images)
    assert "accuracy 77.78% and a mean recall of the 2 classes of 50.00%, near chance (50.00%)" in verdict


def test_classes_without_validation_images_are_no_reason_to_stop():
    targets = torch.tensor([3] * 20 + [5] * 20)
    assert TeacherGate.judge(1.0, mean_recall(targets, targets, 10), {}, 40) is None
    constant = mean_recall(targets, torch.full_like(targets, 3), 10)
    assert "near chance" in TeacherGate.judge(0.5, constant, {}, 40)
    assert TeacherGate.judge(1.0, mean_recall(targets[:20], targets[:20], 10), {}, 20) is None
    assert "near chance" in TeacherGate.judge(0.0, mean_recall(targets[:20], targets[20:], 10), {}, 20)
