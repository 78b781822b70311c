from __future__ import annotations

import pytest
import torch

from ackd_lightning.models.finding import require_plan
from ackd_lightning.models.single_stage import SingleStage
from ackd_lightning.models.suffix import Cuts
from ackd_lightning.models.zoo import create_model


def stages_of(network: torch.nn.Module) -> list[SingleStage]:
    cuts = Cuts(network, require_plan(network, "the network", "a test"))
    return [SingleStage(cuts, number) for number in (1, 2, 3)]


@pytest.mark.parametrize("name", ["resnet14", "wrn_16_2", "mobilenetv2_x0_5"])
def test_stages_one_after_another_are_the_network_and_share_its_weights(name):
    network = create_model(name, 5).eval()
    stages = stages_of(network)
    network.to(memory_format=torch.channels_last)  # after the stages were made, as when a fit starts
    plan, image = require_plan(network, "the network", "a test"), torch.randn(2, 3, 32, 32)
    values: dict[str, torch.Tensor] = {}
    for each in plan.features:
        hook = lambda module, args, value, each=each: values.update({each: value})  # noqa: E731
        network.get_submodule(each).register_forward_hook(hook)
    network(image)
    for number, stage in enumerate(stages, start=1):
        torch.testing.assert_close(stage(values[plan.features[number - 1]]), values[plan.features[number]])
    own = {each.data_ptr() for each in network.parameters()}
    held = [each for stage in stages for each in stage.part.parameters() if not each.is_meta]
    assert {each.data_ptr() for each in held} <= own
    assert sum(each.numel() for each in held) < sum(each.numel() for each in network.parameters())
    assert any(each.is_meta for each in stages[0].part.parameters())


def test_weights_of_another_type_are_copied():
    network = create_model("resnet8", 5).half().eval()
    (stage, *_) = stages_of(network)
    found = stage(torch.randn(2, 16, 8, 8, requires_grad=True))
    assert found.dtype == torch.float32
    assert {each.dtype for each in network.parameters()} == {torch.float16}
    assert not any(each.requires_grad for each in stage.part.parameters())
    found.sum().backward()
