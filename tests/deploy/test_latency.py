from __future__ import annotations

import time

import pytest
import torch

from ackd_lightning.deploy.latency import measure


@pytest.mark.parametrize("batch", [1, 8])
def test_a_pause_is_measured(batch):
    seen = []

    def network(image):
        seen.append((tuple(image.shape), torch.is_grad_enabled()))
        time.sleep(0.002 * len(image))
        return image

    found = measure(network, (3, 4, 5), batch=batch, seconds=0.1)
    assert 0.002 * batch <= found.median < 1  # in seconds, on a machine that does other work
    assert found.throughput == pytest.approx(batch / found.median)
    assert found.spread >= 0
    assert set(seen) == {((batch, 3, 4, 5), False)}
    assert len(seen) > found.passes  # with a warm-up
    assert (found.batch, found.device, found.threads) == (batch, "cpu", torch.get_num_threads())


def test_the_number_of_threads_is_kept():
    before = torch.get_num_threads()
    measure(lambda image: image, (1, 2, 2), seconds=0.01)
    assert torch.get_num_threads() == before
