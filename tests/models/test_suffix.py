from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import StagePlan, capture
from ackd_lightning.models.finding import plan_for, use_taps
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.suffix import Cuts
from ackd_lightning.models.zoo import create_model
from models.networks import CifarLike, OnlyAt, SkipsAhead, Tuples, ViTLike

# one small member of several families, at small sizes: name, pixels, stages that can be the entry of a branch
FAMILIES = [
    ("shufflenet_v2_x0_5", 32),
    ("squeezenet1_1", 32),
    ("timm:resnet10t", 32),
    ("timm:mobilenetv3_small_050", 32),
    ("timm:test_vit", 160),
    ("timm:test_convnext", 32),
    ("timm:test_efficientnet", 32),
    ("timm:test_nfnet", 32),
    ("timm:pvt_v2_b0", 32),
]


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_a_suffix_computes_the_rest_of_the_network(name, size):
    torch.manual_seed(0)
    network = create_model(name, 5)
    plan = plan_for(network, size)
    assert [Cuts(network, plan, size).difference(entry) for entry in plan.features[1:-1:2]] == [None] * (
        len(plan.features[1:-1:2])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("timm:levit_128s", 224), ("densenet121", 64), ("timm:hrnet_w18_small", 64), ("timm:selecsls42", 64)],
)
def test_a_suffix_computes_the_rest_of_a_larger_network(name, size):
    test_a_suffix_computes_the_rest_of_the_network(name, size)


OWN = {
    "map": (CifarLike, 32),
    "tuple": (Tuples, 32),
    "tokens": (ViTLike, 32),
    "pooled tokens": (lambda: ViTLike(pooled=True), 32),
    "skip": (SkipsAhead, 32),
    "one size": (lambda: OnlyAt(32), 32),
}


@pytest.mark.parametrize(("make", "size"), OWN.values(), ids=OWN)
def test_every_entry_is_exact_for_every_batch_size(make, size):
    torch.manual_seed(0)
    network = make().eval()
    plan = plan_for(network)
    for entry in plan.features[:-1]:
        assert Cuts(network, plan, size).difference(entry) is None
        suffix = Cuts(network, plan, size).suffix(entry).eval()
        for batch in (1, 5):
            logits, _, _, values = capture(network, plan, torch.randn(batch, 3, size, size), 1.0)
            torch.testing.assert_close(suffix(values[entry]), logits)


def test_a_difference_is_measured():
    network = ViTLike()
    plan = StagePlan(("blocks.0.norm", "blocks.0"), "head")
    assert "blocks.0.norm" in Cuts(network, plan, 32).difference("blocks.0.norm")  # data also flow past it
    assert Cuts(network, plan, 32).difference("blocks.0") is None


class SideDoor(CifarLike):
    """A value leaves the graph before the first stage and comes back in the second."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        feature = self.conv(image)
        factor = 1 + feature.detach().abs().mean()
        for number, block in enumerate(self.blocks):
            feature = block(feature) * (factor if number == 2 else 1)
        return self.head(feature.mean(dim=(2, 3)))


def test_a_branch_point_that_does_not_work_is_refused_with_those_that_do():
    network = SideDoor()
    with pytest.raises(ACKDError, match=r"'D2B2'.*D3B1") as caught:
        BranchyStudent(network, ["D2B2"], input_size=32)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("D3B1, D1B3")
    assert BranchyStudent(network, ["D3B1"], input_size=32).specs == ("D3B1",)


@pytest.mark.parametrize("name", ["alexnet", "timm:vit_tiny_patch16_224"])
def test_a_size_that_a_network_cannot_read_is_refused_with_one_that_it_can(name):
    network = create_model(name, 4)
    with pytest.raises(ACKDError, match="it can read 224 x 224"):
        Cuts(network, StagePlan(("features",)), 32)


def test_a_branch_at_a_module_that_data_flow_past_is_refused():
    network = SkipsAhead()
    use_taps(network, ["blocks.1", "blocks.2", "blocks.5"])
    with pytest.raises(ACKDError, match=r"'D3B1'.*blocks.2.*D2B2"):
        BranchyStudent(network, ["D3B1"], input_size=32)


def test_a_suffix_has_no_parameter_that_the_logits_do_not_need():
    network = ViTLike()
    cuts = Cuts(network, plan_for(network), 32)
    names = {name for name, _ in cuts.suffix("blocks.1").network.named_parameters()}
    assert names == {
        name for name, _ in network.named_parameters() if name.startswith(("blocks.2", "blocks.3", "norm", "head"))
    }
    whole = {name for name, _ in cuts.suffix("patches").network.named_parameters()}
    assert whole == {name for name, _ in network.named_parameters() if not name.startswith("patches")}


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_convnext", "timm:mobilenetv3_small_050", "shufflenetv1"])
def test_every_parameter_of_a_branch_gets_a_gradient(name):
    torch.manual_seed(0)
    size = 160 if "vit" in name else 32
    network = create_model(name, 5)
    count = len(plan_for(network, size).features) - 1
    student = BranchyStudent(network, [f"D{count}B1", f"D1B{count}"])
    output = student(torch.randn(2, 3, size, size))
    sum(branch.logits.square().sum() for branch in output.branches).backward()
    assert [name for name, each in student.branches.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("ran", [False, True])
def test_a_branch_learns_what_its_network_keeps_in_evaluation_mode(ran):
    torch.manual_seed(0)
    options = {"embed_dim": (16, 24, 32), "key_dim": 4, "depth": (1, 1, 1), "num_heads": (2, 2, 2)}
    network = create_model("timm:levit_128s", 5, img_size=64, **options).eval()
    if ran:
        with torch.no_grad():
            network(torch.randn(2, 3, 64, 64))  # LeViT keeps its attention biases
    student = BranchyStudent(network, ["D4B2"], input_size=64)
    assert {name for name, _ in student.branches.named_parameters() if name.endswith("attention_biases")} == {
        f"0.suffix.network.{name}"
        for name, _ in network.named_parameters()
        if name.endswith("attention_biases") and name.startswith(("stages.1", "stages.2"))
    }


def student(make) -> BranchyStudent:
    torch.manual_seed(0)
    return BranchyStudent(make(), input_size=32)


MAKERS = pytest.mark.parametrize("make", [CifarLike, Tuples, ViTLike], ids=["maps", "tuples", "tokens"])


@MAKERS
def test_a_copy_learns_alone(make):
    first, image = student(make).eval(), torch.randn(2, 3, 32, 32)
    second = copy.deepcopy(first)
    before = [branch.logits for branch in first(image).branches]
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.1)
    assert all(torch.equal(one.logits, two) for one, two in zip(first(image).branches, before, strict=True))
    assert all(not torch.equal(one.logits, two) for one, two in zip(second(image).branches, before, strict=True))
    second.load_state_dict(first.state_dict(), strict=True)
    assert all(torch.equal(one.logits, two) for one, two in zip(second(image).branches, before, strict=True))


@MAKERS
def test_branches_train_and_run_in_mixed_precision(make):
    network, image = student(make).train(), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        output = network(image)
        loss = sum(nn.functional.cross_entropy(each.logits, torch.arange(4)) for each in output.branches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = network.eval()(image)
    exact = network(image)
    for one, two in zip(rough.branches, exact.branches, strict=True):
        torch.testing.assert_close(one.logits.float(), two.logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        pytest.param(CifarLike, "eager", marks=pytest.mark.slow),
        (Tuples, "aot_eager"),
        pytest.param(ViTLike, "eager", marks=pytest.mark.slow),
        pytest.param(ViTLike, "aot_eager", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_student_can_be_compiled(make, backend):
    network, image = student(make).eval(), torch.randn(2, 3, 32, 32)
    expected = network(image)
    torch._dynamo.reset()
    found = torch.compile(network, backend=backend)(image)
    torch.testing.assert_close(found.logits, expected.logits)
    for one, two in zip(found.branches, expected.branches, strict=True):
        torch.testing.assert_close(one.logits, two.logits)
        torch.testing.assert_close(one.features[0], two.features[0])


def test_branches_exist_on_the_meta_device():
    with torch.device("meta"):
        network = BranchyStudent(CifarLike(), input_size=32)
        output = network(torch.zeros(2, 3, 32, 32))
    assert [branch.logits.shape for branch in output.branches] == [(2, 10), (2, 10)]
