from __future__ import annotations

import copy
import functools
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ackd_lightning import KD, DataInfo, DistillationModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import clone, examples, skeleton, twin
from ackd_lightning.models.finding import plan_for, probe
from ackd_lightning.models.outputs import as_map, first_tensor, logits_of
from ackd_lightning.models.start import head_names
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.models.tracing import trace
from models.networks import CLASSES, CifarLike, Residual, SkipsAhead, Tuples, TwoBranches, ViTLike


def run(network: nn.Module, size: int = 32):
    copied, image = skeleton(network, size)
    return trace(copied, image)


def spine(network: nn.Module, size: int = 32) -> list[str]:
    return [each.name for each in run(network, size).spine]


# ------------------------------------------------------------------------------------------------------------- maps


MAPS = {
    "B x C x H x W": ((2, 8, 4, 4), 1.0, None, (2, 8, 4, 4)),
    "B x H x W x C": ((2, 4, 4, 8), 1.0, None, (2, 8, 4, 4)),
    "as wide as high as deep": ((2, 4, 4, 4), 1.0, None, (2, 4, 4, 4)),
    "rectangular": ((2, 8, 4, 6), 4 / 6, None, (2, 8, 4, 6)),
    "rectangular, channels last": ((2, 4, 6, 8), 4 / 6, None, (2, 8, 4, 6)),
    "rectangular with an odd side": ((2, 8, 3, 5), 28 / 50, None, (2, 8, 3, 5)),
    "pixels": ((2, 8, 1, 1), 1.0, None, (2, 8, 1, 1)),
    "tokens": ((2, 16, 8), 1.0, None, (2, 8, 4, 4)),
    "class token": ((2, 17, 8), 1.0, None, (2, 8, 4, 4)),
    "class and distillation token": ((2, 18, 8), 1.0, None, (2, 8, 4, 4)),
    "class token and registers": ((2, 21, 8), 1.0, None, (2, 8, 4, 4)),
    "prefix that is known": ((2, 21, 8), 1.0, 5, (2, 8, 4, 4)),
    "tokens of a rectangular image": ((2, 24, 8), 4 / 6, None, (2, 8, 4, 6)),
    "class token and a rectangular image": ((2, 25, 8), 4 / 6, None, (2, 8, 4, 6)),
    "B x D": ((2, 8), 1.0, None, None),
    "columns": ((2, 8, 4, 1), 1.0, None, None),
    "no grid": ((2, 24, 8), 1.0, 0, None),
    "blocks before the class token": ((2, 16, 8), 1.0, 1, (2, 8, 4, 4)),
    "prefix that does not fit": ((2, 17, 8), 1.0, 2, None),
    "video": ((2, 8, 4, 4, 4), 1.0, None, None),
}


@pytest.mark.parametrize(("shape", "ratio", "prefix", "expected"), MAPS.values(), ids=MAPS)
def test_what_a_module_returns_is_read_as_a_map(shape, ratio, prefix, expected):
    found = as_map(torch.zeros(shape), ratio, prefix)
    assert (None if found is None else tuple(found.shape)) == expected


@pytest.mark.parametrize("skipped", [0, 1, 2, 5])
def test_tokens_become_the_positions_of_a_map_in_reading_order(skipped):
    grid = torch.arange(24.0).view(1, 1, 4, 6).expand(2, 3, 4, 6)
    tokens = torch.cat([torch.full((2, skipped, 3), -1.0), grid.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(as_map(tokens, 4 / 6, skipped), grid)
    assert torch.equal(as_map(grid.permute(0, 2, 3, 1), 4 / 6), grid)


@pytest.mark.parametrize("output", [None, "text", 3, (), torch.zeros(2, 3, 4, 4, dtype=torch.int64)], ids=str)
def test_what_is_no_map_is_none(output):
    assert as_map(output, 1.0) is None


def test_the_first_map_of_nested_outputs_is_taken():
    logits, feature = torch.zeros(2, 5), torch.zeros(2, 8, 4, 4)
    for output in ((logits, feature), {"a": logits, "b": [feature]}, [[], (feature, logits)]):
        assert first_tensor(output) is feature
    assert first_tensor(SimpleNamespace(to_tuple=lambda: (logits, feature))) is feature
    assert first_tensor((logits, 3)) is logits


# ----------------------------------------------------------------------------------------------------------- logits

ONE, TWO = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
FORMS = {
    "tensor": (ONE, ONE),
    "B x K x 1 x 1": (ONE[..., None, None], ONE),
    "dict": ({"logits": ONE, "features": TWO[0]}, ONE),
    "dict of one": ({"out": ONE}, ONE),
    "object": (SimpleNamespace(logits=ONE, hidden_states=()), ONE),
    "tuple of equal shapes": ((ONE, TWO), torch.full((1, 3), 2.0)),
    "tuple of other shapes": ((ONE, TWO[:, :2]), ONE),
    "list": ([ONE], ONE),
    "tuple with a map": ((ONE, torch.zeros(1, 3, 2, 2)), ONE),
    "tuple with features": ((ONE, [TWO, TWO]), ONE),
    "tuple with None": ((ONE, None), ONE),
}


@pytest.mark.parametrize(("output", "expected"), FORMS.values(), ids=FORMS)
def test_logits_are_found(output, expected):
    assert torch.equal(logits_of(output), expected)


NOT_LOGITS = {
    "map": (torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\)"),
    "vector": (torch.zeros(3), r"\(3,\)"),
    "dict": ({"first": ONE, "second": TWO}, "first, second"),
    "none": (None, "NoneType"),
    "empty": ((), "tuple"),
    "text": ("logits", "str"),
    "nested": (((ONE,),), "tuple"),
}


@pytest.mark.parametrize(("output", "named"), NOT_LOGITS.values(), ids=NOT_LOGITS)
def test_what_has_no_logits_is_refused_in_one_sentence(output, named):
    with pytest.raises(ACKDError, match=named) as caught:
        logits_of(output, "the teacher")
    assert "the teacher" in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ spine


def test_data_pass_a_residual_block_and_not_its_inside():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), Residual(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert spine(network) == ["0", "1", "2", "3"]


def test_data_pass_no_module_that_a_skip_goes_around():
    found = [each for each in spine(SkipsAhead()) if each.count(".") == 1]
    assert found == ["blocks.0", "blocks.1", "blocks.4", "blocks.5"]
    assert spine(TwoBranches()) == []


def test_class_token_and_positions_do_not_hide_the_blocks():
    found = run(ViTLike())
    names = [each.name for each in found.spine]
    assert names == ["patches", *(f"blocks.{number}" for number in range(4)), "blocks", "norm", "head"]
    assert found.calls["blocks.3"].shape == found.calls["patches"].shape == (8, 4, 4)
    assert found.classifier == "head"
    assert not found.pooled


def test_a_tuple_is_passed_as_a_whole():
    names = spine(Tuples())
    assert [each for each in names if "." not in each] == ["stem", "one", "two", "three", "fc"]
    assert "one.body" not in names
    assert "one.side" not in names


@pytest.mark.parametrize(("add", "pooled"), [("mean", True), ("flatten", False), ("max", False), ("relu", False)])
def test_pooling_is_told_from_everything_else(add, pooled):
    between = {
        "mean": [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        "flatten": [nn.Flatten()],
        "max": [nn.AdaptiveMaxPool2d(1), nn.Flatten()],
        "relu": [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    }[add]
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *between, nn.LazyLinear(CLASSES))
    network(torch.zeros(1, 3, 8, 8))
    assert ("0" in run(network, 8).pooled) is pooled


def test_modules_that_are_called_twice_are_left_out():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, 1, 1), nn.Linear(3, CLASSES)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(self.conv(image)).mean(dim=(2, 3)))

    assert set(run(Twice()).calls) == {"fc"}


# ----------------------------------------------------------------------------------------------------------- copies


def test_tracing_leaves_the_network_alone():
    network = CifarLike().train()
    network.blocks[0].eval()
    network.values = torch.ones(3)
    seen = []
    network.conv.register_forward_hook(lambda *_: seen.append("called"))
    before, modes = copy.deepcopy(network.state_dict()), [each.training for each in network.modules()]
    state = torch.get_rng_state()
    for copied, image in examples(network, 16):
        assert len(trace(copied, image).spine) > 6
        assert not copied.training
        assert copied.values.device == image.device
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(each.grad is None for each in network.parameters())
    assert len(network.conv._forward_hooks) == 1
    assert seen == []


def test_only_the_meta_device_is_tried_for_a_network_without_weights():
    with torch.device("meta"):
        network = CifarLike()
    assert [image.device.type for _, image in examples(network, 16)] == ["meta"]
    assert [image.device.type for _, image in examples(CifarLike(), 16)] == ["meta", "cpu"]


def test_a_copy_has_hooks_of_torch_and_no_others():
    network = nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)))
    network[0].register_forward_pre_hook(lambda *_: None)
    copied = twin(network)
    assert len(network[0]._forward_pre_hooks) == 2
    assert len(copied[0]._forward_pre_hooks) == 1


class Hooked(CifarLike):
    """A classifier on a map that a hook keeps: a method of the network, with an argument or without, or a function."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []
        kinds = {
            "method": self.keep,
            "partial": functools.partial(self.keep_at, 0),
            "function": lambda *args: self.keep(*args),
        }
        self.blocks[5].register_forward_hook(kinds[form])

    def keep(self, module: nn.Module, args: object, value: torch.Tensor) -> None:
        self.kept = [value]

    def keep_at(self, place: int, *args) -> None:
        self.keep(*args)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        super().forward(image)
        return self.head(self.kept.pop().mean(dim=(2, 3)))


@pytest.mark.parametrize("form", ["method", "partial"])
def test_a_copy_has_the_hooks_that_are_methods_of_its_network(form):
    network, image = Hooked(form).eval(), torch.randn(2, 3, 16, 16)
    network.blocks[5].register_forward_hook(lambda *_: None)
    copied = twin(network)
    assert len(copied.blocks[5]._forward_hooks) == 1
    assert torch.equal(copied(image), network(image))
    assert network.kept == []
    assert probe(network, 16).features is not None


def test_a_network_that_needs_other_hooks_is_refused_with_the_reason():
    network = Hooked("function")
    with pytest.raises(ACKDError, match="hooks"):
        probe(network, 16)
    with pytest.raises(ACKDError, match="hooks"):
        DistillationModule("resnet8", method=KD(), teacher=TeacherConfig(network, gate="off"), data=DataInfo(10, 16))
    assert network.kept == []


def test_a_copy_has_its_own_computed_tensors_in_containers_too():
    network = CifarLike()
    network.cache = {"sizes": [4, 8], "biases": [network.head.weight.sum(dim=0)]}
    copied = clone(network)
    assert torch.equal(copied.cache["biases"][0], network.cache["biases"][0])
    assert copied.cache["biases"][0] is not network.cache["biases"][0]
    ghost, _ = skeleton(network, 16)
    assert ghost.cache["biases"][0].is_meta
    assert not network.cache["biases"][0].is_meta


def test_a_network_that_cannot_be_copied_is_refused_by_name():
    network = CifarLike()
    network.blocks[0].lock = threading.Lock()
    with pytest.raises(ACKDError, match="CifarLike"):
        clone(network)


def test_warnings_of_a_network_are_left_to_its_own_calls():
    class Warns(CifarLike):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            warnings.warn("look here", UserWarning, stacklevel=1)
            return super().forward(image)

    network = Warns()
    assert "conv" in spine(network)
    with pytest.warns(UserWarning, match="look here"):
        network(torch.zeros(1, 3, 32, 32))


class ScoresOfTokens(nn.Module):
    """Scores of each token, whose mean is added to those of the class token as in VOLO."""

    def __init__(self, *, both: bool, classes: int = CLASSES):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(8, classes) if both else None
        self.aux_head = nn.Linear(8, classes)

    def get_classifier(self):
        return self.head

    def forward(self, image):
        tokens = self.blocks(self.embed(image).flatten(2).transpose(1, 2))
        scores = self.aux_head(tokens)
        return scores.mean(1) if self.head is None else self.head(tokens.mean(1)) + 0.5 * scores.max(1).values


@pytest.mark.parametrize("classes", [CLASSES, 64])  # 64 tokens, too
def test_a_layer_with_scores_of_tokens_is_no_classifier_but_a_head(classes):
    alone, both = (ScoresOfTokens(both=each, classes=classes) for each in (False, True))
    assert run(alone).classifier is None
    assert run(both).classifier == "head"
    assert [plan_for(each).features[-1] for each in (alone, both)] == ["blocks", "blocks"]
    assert head_names(alone) == ("aux_head",)
    assert head_names(both) == ("head", "aux_head")
    for network in (alone, both):
        teacher = TeacherConfig(network=copy.deepcopy(network), gate="off")
        DistillationModule(network, method=KD(), teacher=teacher, data=DataInfo(classes, 32))
