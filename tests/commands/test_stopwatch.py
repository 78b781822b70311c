"""Timing of networks for the estimates of a plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ackd_lightning.commands.stopwatch import Stopwatch, rough
from ackd_lightning.types import NetOutput


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 2)
        self.passes: list[tuple[bool, bool]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.passes.append((self.training, torch.is_grad_enabled()))
        return self.layer(image.flatten(1))


class Branched(Network):
    def forward(self, image: torch.Tensor) -> NetOutput:
        logits = super().forward(image)
        return NetOutput(logits, None, logits, (NetOutput(self.layer(image.flatten(1)), None, logits),))


@pytest.mark.parametrize("kind", [Network, Branched])
@pytest.mark.parametrize("train", [True, False])
def test_a_network_is_timed_once_with_backward_only_in_training(kind, train):
    watch, network = Stopwatch(), kind()
    watch.device = torch.device("cpu")
    seconds = watch.seconds(lambda: network, "name", (3, 4, 4), train=train)
    assert 0 < seconds < 1
    assert set(network.passes) == {(train, train)}
    assert (network.layer.weight.grad is not None) == train
    assert watch.seconds(lambda: pytest.fail("built again"), "name", (3, 4, 4), train=train) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (600, "10 min"), (7200, "2.0 h"), (200_000, "2.3 days")]
)
def test_rough_durations(seconds, text):
    assert rough(seconds) == text
