from __future__ import annotations

import functools
import timeit

import pytest
import torch

from ackd_lightning.deploy.latency import measure


@pytest.mark.parametrize(("batch", "passes"), [(1, 50), (8, 10)])
def test_a_pause_is_measured(batch, passes, monkeypatch):
    """On a clock that only the network moves, so that other work on the machine changes nothing."""
    seen, now = [], [0.0]
    monkeypatch.setattr(timeit, "Timer", functools.partial(timeit.Timer, timer=lambda: now[0]))

    def network(image):
        seen.append((tuple(image.shape), torch.is_grad_enabled()))
        now[0] += 0.002 * len(image)
        return image

    found = measure(network, (3, 4, 5), batch=batch, seconds=0.1)
    assert found.median == pytest.approx(0.002 * batch)
    assert found.throughput == pytest.approx(500)
    assert found.spread == pytest.approx(0, abs=1e-9)
    assert found.passes == passes
    assert set(seen) == {((batch, 3, 4, 5), False)}
    assert len(seen) > found.passes  # with a warm-up
    assert (found.batch, found.device, found.threads) == (batch, "cpu", torch.get_num_threads())


def test_the_number_of_threads_is_kept():
    before = torch.get_num_threads()
    measure(lambda image: image, (1, 2, 2), seconds=0.01)
    assert torch.get_num_threads() == before
