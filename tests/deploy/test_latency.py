from __future__ import annotations

import functools
import timeit
from pathlib import Path

import pytest
import torch

from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.files import ExportedNetwork
from ackd_lightning.deploy.latency import measure
from ackd_lightning.deploy.report.subject import _of_graph


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


@pytest.mark.parametrize(("reads", "dtype"), [("uint8", torch.uint8), ("float32", torch.float32)])
def test_a_file_is_timed_on_the_images_that_it_reads(reads, dtype):
    """Without the conversion that lets all files be compared on the same normalised images."""
    seen = []

    def run(image):
        seen.append(image.dtype)
        return image.float().mean(dim=(2, 3))

    network = ExportedNetwork(Path("a.onnx"), Description("resnet8", 3, 8, reads=reads), run, kind="onnx")
    assert len(_of_graph(network, [torch.device("cpu")])) == 2
    assert {*seen} == {dtype}
