from __future__ import annotations

import math

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode

from ackd_lightning.methods.ackd_discriminators import Discriminators, adversarial_value, discriminator_accuracy


def maps(count: int, channels: int = 8, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(batch, channels, 2, 3, generator=generator) for _ in range(count)]


def slow_value(logits: torch.Tensor) -> float:
    """Eq. 4 and 5 with loops over discriminators, other learners and positions."""
    M, _, N = logits.shape

    def probability(i: int, j: int, n: int) -> float:
        return 1 / (1 + math.exp(-logits[i, j, n].item()))

    total = 0.0
    for i in range(M):
        for j in range(M):
            if j != i:
                own = sum(math.log(probability(i, i, n)) for n in range(N)) / N
                other = sum(math.log(1 - probability(i, j, n)) for n in range(N)) / N
                total += (own + other) / (M - 1)
    return total / M


@pytest.mark.parametrize("channels", [64, 8, 2, 1])
def test_widths_halve_and_quarter_to_one_logit(channels):
    net = Discriminators(2, channels).nets[0]
    layers = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    half, quarter = max(channels // 2, 1), max(channels // 4, 1)
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == [
        (channels, half),
        (half, quarter),
        (quarter, 1),
    ]
    assert all(layer.kernel_size == (1, 1) for layer in layers)
    assert [type(layer).__name__ for layer in net] == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d"]
    count = channels * half + half + half * quarter + quarter + quarter + 1
    assert sum(each.numel() for each in net.parameters()) == count


def test_one_discriminator_per_learner_with_weights_of_its_own():
    torch.manual_seed(0)
    nets = Discriminators(3, 8).nets
    assert len(nets) == 3
    assert not torch.equal(nets[0][0].weight, nets[1][0].weight)


def test_entry_i_j_is_what_discriminator_i_says_of_learner_j():
    torch.manual_seed(0)
    discriminators, features = Discriminators(3, 8), maps(3)
    logits = discriminators.logits(features)
    assert logits.shape == (3, 3, 2 * 2 * 3)
    assert logits.dtype is torch.float32
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close(logits[i, j], discriminators.nets[i](features[j]).flatten())


def test_pooled_inputs_are_the_mean_over_positions():
    torch.manual_seed(0)
    discriminators, features = Discriminators(2, 8, inputs="pooled"), maps(2)
    logits = discriminators.logits(features)
    assert logits.shape == (2, 2, 2)
    mean = features[1].mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(logits[0, 1], discriminators.nets[0](mean).flatten())


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Discriminators(2, 8).logits(maps(2)).dtype is torch.float32


@pytest.mark.parametrize("count", [2, 3])
def test_the_value_equals_loops_over_equations_4_and_5(count):
    logits = 2 * torch.randn(count, count, 6, generator=torch.Generator().manual_seed(0))
    assert adversarial_value(logits).item() == pytest.approx(slow_value(logits), rel=1e-5)
    assert adversarial_value(logits, flipped=True).item() == pytest.approx(slow_value(-logits), rel=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("flipped", [False, True])
def test_undecided_discriminators_give_minus_two_log_two(count, flipped):
    value = adversarial_value(torch.zeros(count, count, 4), flipped=flipped)
    assert value.item() == pytest.approx(-2 * math.log(2), rel=1e-6)


def test_one_learner_has_no_opponent_and_the_value_is_zero():
    logits = torch.randn(1, 1, 4, requires_grad=True)
    value = adversarial_value(logits)
    assert value.item() == 0.0
    value.backward()
    assert (logits.grad == 0).all()


def test_the_value_is_zero_at_best_and_negative_elsewhere():
    sure = 100 * (2 * torch.eye(3) - 1).unsqueeze(2)
    assert adversarial_value(sure).item() == pytest.approx(0.0, abs=1e-6)
    assert adversarial_value(-sure).item() == pytest.approx(-200.0)
    assert adversarial_value(torch.randn(3, 3, 4)).item() < 0


def test_swapping_learners_with_their_discriminators_changes_nothing():
    torch.manual_seed(0)
    discriminators, features = Discriminators(3, 8), maps(3)
    value = adversarial_value(discriminators.logits(features))
    order = [2, 0, 1]
    discriminators.nets = nn.ModuleList(discriminators.nets[i] for i in order)
    swapped = adversarial_value(discriminators.logits([features[i] for i in order]))
    torch.testing.assert_close(value, swapped)
    unmatched = adversarial_value(discriminators.logits(features))
    assert not torch.isclose(value, unmatched, rtol=1e-6)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_logits_give_finite_values_and_gradients(flipped, dtype):
    logits = torch.tensor([6e4, -6e4], dtype=dtype).repeat(2, 2, 1).requires_grad_()
    value = adversarial_value(logits.float(), flipped=flipped)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


def test_twenty_ascent_steps_teach_discriminators_to_tell_learners_apart():
    torch.manual_seed(0)
    discriminators = Discriminators(2, 32)
    features = [torch.randn(4, 32, 2, 2) + shift for shift in (1.0, -1.0)]
    optimizer = torch.optim.Adam(discriminators.parameters(), lr=0.02)
    values = []
    for _ in range(20):
        value = adversarial_value(discriminators.logits(features))
        values.append(value.item())
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    assert values[-1] > values[0] + 0.1
    assert discriminator_accuracy(discriminators.logits(features)) > 0.9


def test_accuracy_weighs_own_and_other_learners_equally():
    right = (2 * torch.eye(3) - 1).unsqueeze(2).expand(3, 3, 4)
    assert discriminator_accuracy(right).item() == 1.0
    assert discriminator_accuracy(-right).item() == 0.0
    assert discriminator_accuracy(torch.ones(3, 3, 4)).item() == 0.5  # "own" to everything
    logits = right.clone()
    logits[0, 1, :2] = 1.0  # 2 of 24 answers about others are wrong
    assert discriminator_accuracy(logits).item() == pytest.approx(0.5 * (1 + 1 - 2 / 24))


class Products(TorchDispatchMode):
    """Count matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "convolution")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [2, 4])
def test_one_product_a_layer_for_all_discriminators_and_learners(count):
    with Products() as products:
        Discriminators(count, 8)(maps(count))
    assert products.count == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_and_compiled_they_compute_the_same(monkeypatch, dtype):
    """Also where a hidden value is exactly 0, whose gradient is 0."""
    torch.manual_seed(0)
    discriminators = Discriminators(2, 8).to(dtype).requires_grad_(False)
    for net in discriminators.nets:
        net[0].weight[0] = 0.0
        net[0].bias[0] = 0.0
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        features = [each.to(dtype).requires_grad_() for each in maps(2)]
        value, accuracy = discriminators(features)
        value.backward()
        found.append([value, accuracy, *(each.grad for each in features)])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert found[0][2].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("trained", [True, False])
def test_no_boolean_mask_is_kept_for_the_gradient(trained):
    """Torch's compiler writes booleans one by one on a CPU, which took longer than all products."""
    kept = []

    def keep(graph, inputs):
        kept.extend(
            node.meta["val"].dtype for node in graph.graph.find_nodes(op="output")[0].args[0] if node is not None
        )
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    discriminators = Discriminators(2, 8).requires_grad_(trained)
    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    discriminators.compile(dynamic=False, backend=backend)
    value, _ = discriminators([each.requires_grad_() for each in maps(2)])
    value.backward()
    torch._dynamo.reset()
    assert len(kept) > 2
    assert torch.bool not in kept
