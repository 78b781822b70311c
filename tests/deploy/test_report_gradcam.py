"""Grad-CAM: where the map is taken."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import timm
import torch

from ackd_lightning.deploy.report.gradcam import Source, heat_maps
from ackd_lightning.models.finding import plan_for
from ackd_lightning.models.zoo import create_model


def overlays(network, size=32):
    """Overlays on a black image: where the map is 0 they are the colour of 0, blue alone."""
    network.eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    source = Source.of("student", network, network, plan_for(network), network)
    return heat_maps(source, images, torch.tensor([0, 1]), np.zeros((2, size, size, 3), np.float32))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_transformer_has_a_map_whatever_its_classifier_reads(pool):
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=4,
        global_pool=pool,
    )  # fmt: skip
    found, answers = overlays(network)
    assert found.shape == (2, 32, 32, 3)
    assert answers.shape == (2,)
    assert found[..., 0].max() > 0.5  # red somewhere
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_teacher_that_reads_images_of_another_shape_has_a_map():
    network = create_model("resnet8", 4).eval()
    resized = functools.partial(torch.nn.functional.interpolate, size=(32, 32))
    source = Source.of("teacher", network, network, plan_for(network), lambda images: network(resized(images)))
    images = torch.randn(2, 3, 32, 56, generator=torch.Generator().manual_seed(0))
    found, _ = heat_maps(source, images, torch.tensor([0, 1]), np.zeros((2, 32, 56, 3), np.float32))
    assert found.shape == (2, 32, 56, 3)


def test_a_convolutional_network_is_read_at_its_last_stage():
    torch.manual_seed(0)
    network = create_model("resnet8", 4)
    source = Source.of("student", network, network, plan_for(network), network)
    assert source.layers[0] is network.get_submodule(plan_for(network).features[-1])
    assert overlays(network)[0][..., 0].max() > 0.5
