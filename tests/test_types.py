from __future__ import annotations

import dataclasses

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.types import Batch, DataInfo, NetOutput, NetSpec


def test_a_batch_unpacks_in_order_and_its_index_is_a_tensor():
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([1, 0]), torch.tensor([7, 8]))
    image, target, index, soft = batch
    assert soft is None
    assert image is batch.image
    assert target is batch.target
    assert index is batch.index
    assert batch.index.tolist() == [7, 8]  # not tuple.index


def test_outputs_have_no_branches_unless_given():
    output = NetOutput(torch.zeros(2, 5), (), torch.zeros(2, 0))
    assert output.branches == ()
    assert NetOutput(torch.zeros(2, 5), (), torch.zeros(2, 0), (output,)).branches[0] is output


def test_outputs_and_specs_cannot_be_changed():
    output = NetOutput(torch.zeros(2, 5), (), torch.zeros(2, 0))
    spec = NetSpec(num_classes=5, features=((4, 2, 2),), embedding=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.logits = torch.ones(2, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.num_classes = 6


def test_specs_compare_by_value():
    spec = NetSpec(num_classes=5, features=((4, 2, 2),), embedding=4)
    assert spec == NetSpec(5, ((4, 2, 2),), 4)
    assert spec != NetSpec(5, ((4, 2, 2),), 4, branches=(spec,))


@pytest.mark.parametrize(
    ("info", "shape"),
    [
        (DataInfo(10), (3, 32, 32)),
        (DataInfo(10, (48, 64)), (3, 48, 64)),
        (DataInfo(10, 28, mean=(0.5,), std=(0.2,)), (1, 28, 28)),
        (DataInfo(10, (20, 30), channels=13), (13, 20, 30)),
        (DataInfo(2, [24, 24], mean=[0.5] * 4, std=[0.2] * 4, class_names=["a", "b"]), (4, 24, 24)),
    ],
)
def test_the_shape_of_an_image_follows_from_size_and_normalisation(info, shape):
    assert info.image_shape == shape
    assert hash(info) == hash(DataInfo(**dataclasses.asdict(info)))


def test_equal_sides_are_one_number():
    assert DataInfo(10, (24, 24)) == DataInfo(10, 24)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": -3}, "num_classes is -3"),
        ({"num_classes": 2.0}, "num_classes is 2.0"),
        ({"num_classes": True}, "num_classes is True"),
        ({"input_size": 0}, "input_size is 0"),
        ({"input_size": (32, -1)}, "input_size is"),
        ({"input_size": (3, 32, 32)}, "input_size is"),
        ({"channels": 0}, "channels is 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean is"),
        ({"mean": ()}, "mean is"),
        ({"std": (0.2, 0.0, 0.2)}, "std is"),
        ({"std": (0.2, -0.1, 0.2)}, "std is"),
        ({"std": (float("inf"),)}, "std is"),
        ({"mean": (0.5,), "std": (0.2, 0.2, 0.2)}, "std is"),
        ({"mean": (0.5,), "channels": 3}, "mean is"),
        ({"mean": (0.5,) * 3}, "std is None"),
        ({"std": (0.5,) * 3}, "mean is None"),
        (
            {"mean": (124.0,), "std": (58.0,)},
            r"mean is \(124.0,\) in DataInfo .*; divide mean and std by 255 \(0.4863\)",
        ),
        ({"mean": (0.5,), "std": (58.0,)}, r"std is \(58.0,\) in DataInfo .*; divide it by 255 \(0.2275\)"),
        ({"class_names": ("a", "b")}, "2 names"),
    ],
    ids=str,
)
def test_values_of_data_info_are_checked(values, words):
    with pytest.raises(ACKDError, match=words):
        DataInfo(**{"num_classes": 10, **values})
