from __future__ import annotations

import math

import pytest
import torch

from ackd_lightning.metrics.calibration import BINS, fit_temperature, measure_calibration, reliability


def sampled(scale: float, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a calibrated classifier, multiplied by a factor, and classes drawn from its probabilities."""
    logits = torch.randn(count, 5, generator=torch.Generator().manual_seed(0)) * 2
    target = torch.multinomial(logits.softmax(dim=1), 1, generator=torch.Generator().manual_seed(1)).flatten()
    return logits * scale, target


def test_calibration_error_is_that_of_a_loop():
    logits, target = sampled(3.0, 500)
    confidence, prediction = logits.softmax(dim=1).max(dim=1)
    error = 0.0
    for number in range(BINS):
        inside = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        if inside.any():
            right = (prediction == target)[inside].float().mean()
            error += float(inside.float().mean() * (right - confidence[inside].mean()).abs())
    found = measure_calibration(logits, target)
    assert found.ece == pytest.approx(error, abs=1e-5)
    bins = reliability(logits, target)
    gaps = (bins.accuracy - bins.confidence).abs().nan_to_num() * bins.count / 500
    assert float(gaps.sum()) == pytest.approx(error, abs=1e-5)
    assert found.nll == pytest.approx(float(-logits.log_softmax(dim=1)[range(500), target].mean()), abs=1e-5)


def test_confidences_of_exactly_1_share_the_last_bin():
    logits = torch.tensor([[20.0, 0.0]] * 50 + [[0.95, 0.05]] * 50)
    logits[50:] = logits[50:].log()
    target = torch.tensor([0] * 45 + [1] * 5 + [0] * 50)
    assert measure_calibration(logits, target).ece == pytest.approx(0.025, abs=1e-6)  # 0.95 right, 0.975 sure


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_temperature_undoes_a_factor(scale):
    logits, target = sampled(scale)
    temperature = fit_temperature(logits, target)
    assert temperature == pytest.approx(scale, rel=0.08)
    before, after = measure_calibration(logits, target), measure_calibration(logits, target, temperature=temperature)
    assert after.nll <= before.nll + 1e-9
    assert after.ece < 0.03


@pytest.mark.parametrize(("logits", "low", "high"), [([[9.0, 0.0]], 0, 0.5), ([[0.0, 9.0]], 50, 101)])
def test_temperature_of_a_network_that_is_always_right_or_wrong_is_bounded(logits, low, high):
    assert low < fit_temperature(torch.tensor(logits), torch.tensor([0])) < high


def test_certain_and_uncertain_predictions_have_a_bin():
    bins = reliability(torch.tensor([[90.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    assert bins.count.tolist().index(1) == 7
    assert bins.count[-1] == 1
    assert bins.accuracy[-1] == 1


def test_probabilities_that_are_no_numbers_have_no_perfect_calibration():
    logits = torch.randn(50, 4)
    logits[::5] = float("nan")
    assert math.isnan(measure_calibration(logits, torch.zeros(50).long()).ece)
