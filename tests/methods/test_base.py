from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACKD, CE, KD, FitInfo, Method, Networks, Sum
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.methods.description import describe, from_description, public_path
from ackd_lightning.testing import Harness, RandomImages


class Positional(Method):
    """A method outside the package, with a positional argument and layers of its own."""

    teacher = "none"

    def __init__(self, width: int, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale
        self.project = nn.Linear(width, 1)


class Opponents(Method):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 1)
        self.discriminators = nn.Linear(3, 1)

    def auxiliary_optimizers(self):
        return {"discriminators": torch.optim.SGD(self.discriminators.parameters(), lr=0.1)}


@pytest.mark.parametrize(
    "method",
    [
        CE(),
        KD(temperature=2.0, weight_ce=1.0),
        ACKD(branches=("D3B1", "D3B1"), attention="off", lambda_adv=0.5),
        ACKD(branches=["D2B2"], adversarial="off"),
        Sum([KD(temperature=2.0), CE()], weights=[1.0, 0.5]),
    ],
    ids=["ce", "kd", "tuple", "list", "sum"],
)
def test_a_method_becomes_plain_data_and_comes_back(method):
    description = describe(method)
    assert json.loads(json.dumps(description)) == description
    again = from_description(json.loads(json.dumps(description)))
    assert type(again) is type(method)
    assert describe(again) == description
    assert again.loss_weights == method.loss_weights
    assert again.branches == method.branches


def test_a_description_holds_what_was_given_and_no_defaults():
    assert describe(KD(temperature=2.0)) == {
        "class_path": "ackd_lightning.methods.KD",
        "init_args": {"temperature": 2.0},
    }
    assert describe(ACKD(branches=("D3B1", "D2B2")))["init_args"] == {"branches": ["D3B1", "D2B2"]}


def test_a_description_names_public_classes_also_inside_a_sum_and_outside_the_package():
    inner = describe(Sum([KD(), CE()]))["init_args"]["methods"]
    assert [each["class_path"] for each in inner] == ["ackd_lightning.methods.KD", "ackd_lightning.methods.CE"]
    assert public_path(Positional) == f"{Positional.__module__}.Positional"


def test_positional_arguments_are_remembered_by_name():
    method = Positional(3)
    assert method.init_args == {"width": 3}
    assert Positional(3, 4.0).init_args == {"width": 3, "scale": 4.0}
    assert not any("init_args" in key for key in method.state_dict())


@pytest.mark.parametrize("path", ["ackd_lightning.methods.KD", "ackd_lightning.methods.kd.KD"])
def test_a_class_path_may_be_the_public_one(path):
    method = from_description({"class_path": path, "init_args": {"temperature": 3.0}})
    assert isinstance(method, KD)
    assert method.temperature == 3.0
    assert isinstance(from_description({"class_path": path}), KD)


@pytest.mark.parametrize("path", ["no.such.Module", "ackd_lightning.methods.Nothing", "", "not a path!"])
def test_a_class_that_cannot_be_imported_is_named(path):
    with pytest.raises(ACKDError, match="cannot be imported") as caught:
        from_description({"class_path": path, "init_args": {}})
    assert repr(path) in str(caught.value)


def test_a_description_without_a_class_is_refused():
    with pytest.raises(ACKDError, match="cannot be imported"):
        from_description({})


@pytest.mark.parametrize(
    "path", ["os.path.join", "torch.nn.Linear", "ackd_lightning.methods.description.describe", "json"]
)
def test_a_class_that_is_not_a_method_is_refused(path):
    with pytest.raises(ACKDError, match=r"sub-class of ackd_lightning.methods.Method"):
        from_description({"class_path": path, "init_args": {}})


def test_own_parameters_are_one_group_without_frozen_ones():
    method = Positional(3)
    (group,) = method.parameter_groups()
    assert group["lr_scale"] == 1.0
    assert [id(each) for each in group["params"]] == [id(each) for each in method.parameters()]
    method.project.requires_grad_(False)
    assert method.parameter_groups() == []
    assert CE().parameter_groups() == []


def test_auxiliary_parameters_are_in_no_group_of_the_student():
    method = Opponents()
    (group,) = method.parameter_groups()
    assert {id(each) for each in group["params"]} == {id(each) for each in method.project.parameters()}
    method.project.requires_grad_(False)
    assert method.parameter_groups() == []


def test_what_a_subclass_forgot_is_named():
    method = Opponents()
    with pytest.raises(NotImplementedError, match=r"Opponents has no method `forward`"):
        method(None, None, None)
    with pytest.raises(NotImplementedError, match=r"Opponents has no method `auxiliary_loss`"):
        method.auxiliary_loss("discriminators", None, None, None)


def test_parameters_of_an_auxiliary_optimizer_have_its_name():
    method = Opponents()
    assert method.auxiliary_parameters() == {"discriminators": list(method.discriminators.parameters())}


def test_the_loss_is_the_weighted_sum_and_a_term_without_weight_is_refused():
    method, terms = KD(weight_ce=0.5, weight_kd=2.0), {"ce": torch.tensor(3.0), "kd": torch.tensor(1.0)}
    assert weighted_loss(method, terms).item() == 3.5
    with pytest.raises(ACKDError, match=r"'extra' .*method KD"):
        weighted_loss(method, {**terms, "extra": torch.tensor(1.0)})


def test_a_teacher_and_targets_that_are_missing_are_asked_for():
    with pytest.raises(ACKDError, match="`teacher`"):
        _ = Networks(student=None).teacher
    with pytest.raises(ACKDError, match=r"KD.*`train_targets`"):
        FitInfo().required_targets(KD())


def test_what_is_kept_outside_is_no_part_of_the_method():
    method, network = Opponents(), nn.Linear(2, 2)
    method.keep_outside("student", network)
    assert method.student is network
    assert not any(each is network for each in method.modules())


def test_defaults_of_the_base_class_do_nothing(scene):
    method, here = CE(), scene(2)
    method.build(Networks(student=here.spec))
    method.begin_fit(FitInfo())
    method.set_epoch(3)
    method.update(here.student, None, here.batch)
    assert method.state_dict() == {}
    assert method.ensemble(here.student) is None
    assert method.statistics(here.student) == {}
    assert method.auxiliary_parameters() == {}
    assert method.head is None
    assert method.branches == ()


class Wrong(Method):
    """Cross-entropy alone, with one mistake that a first method often has."""

    teacher = "none"

    def __init__(self, *, mistake: str = "") -> None:
        super().__init__()
        self.mistake = mistake
        self.loss_weights = {"ce": 1.0, **({"more": 1.0} if mistake == "weight" else {})}
        if mistake == "teacher":
            self.teacher = "logit"
        if mistake == "buffer":
            self.replicated_buffers = ("memo",)
        if mistake == "scale":
            self.lr_scales = {"nothing": 2.0}

    def forward(self, student, teacher, batch):
        ce = torch.nn.functional.cross_entropy(student.logits, batch.target)
        wrong = {"vector": {"ce": ce[None]}, "number": {"ce": 1.0}, "term": {"ce": ce, "kd": ce}, "tensor": ce}
        return wrong.get(self.mistake, {"ce": ce})


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("teacher", "'logit'"),
        ("buffer", "'memo'"),
        ("scale", "'nothing'"),
        ("weight", "'more'"),
        ("term", "'kd'"),
        ("vector", "'ce'"),
        ("number", "'ce'"),
        ("tensor", "Tensor"),
    ],
)
def test_mistakes_of_a_first_method_are_named(mistake, named):
    with pytest.raises(ACKDError, match=named):
        Harness(Wrong(mistake=mistake)).step()
    assert float(Harness(Wrong()).step()) > 0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: KD(weight_k=1.0), "'weight_kd'"),
        (lambda: KD(2.0), "method KD"),
        (lambda: Sum([KD]), "instances"),
        (lambda: Harness(KD), "instance"),
    ],
)
def test_wrong_calls_of_a_constructor_are_named(make, named):
    with pytest.raises(ACKDError, match=named):
        make()


class Rows(Wrong):
    """Asks for the targets of a fit."""

    def begin_fit(self, fit):
        self.rows = len(fit.required_targets(self))


def test_batches_without_an_index_are_refused_where_it_is_needed():
    data = RandomImages()
    loader = data.train_dataloader

    def without_index():
        images = loader().dataset
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images.tensors[:2]), batch_size=8)

    data.train_dataloader = without_index
    assert len(Harness(Wrong(), data=data).train(steps=2)) == 2
    with pytest.raises(ACKDError, match="Rows"):
        Harness(Rows(), data=data).train(steps=2)


class Narrow(KD):
    """A sub-class that passes arguments on."""

    def __init__(self, *, extra: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class Fixed(KD):
    """A sub-class that sets an argument of its base class."""

    def __init__(self, *, temp: float = 1.0) -> None:
        super().__init__(temperature=temp)


def test_a_sub_class_keeps_the_ranges_of_its_base_class_and_can_be_described():
    with pytest.raises(ACKDError, match=r"temperature is -3"):
        Narrow(temperature=-3.0)
    with pytest.raises(ACKDError, match=r"temperature is -4"):
        Fixed(temp=-4.0)
    method = Narrow(extra=2.0, temperature=3.0)
    assert describe(method)["init_args"] == {"extra": 2.0, "temperature": 3.0}
