from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ackd_lightning import DigitsDataModule
from ackd_lightning.data import Augmentation
from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods import ACKD, ACN, AIKD, ATSC, CE, CRD, DGKD, DKD, KD, Sum
from ackd_lightning.methods.base import Method
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training import Recipe
from ackd_lightning.training.batches import read_batch
from ackd_lightning.training.labels import Labels, accuracy, inverse_frequency
from ackd_lightning.types import Batch, DataInfo
from training.helpers import CLASSES, Blobs, IndexedBlobs, build, teaching, trainer

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 0, 1])
SOFT = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
WEIGHTS = [0.5, 1.0, 2.0, 4.0]


def batch(soft=None):
    return Batch(torch.zeros(6, 3, 8, 8), TARGET, torch.arange(6), soft)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("soft", [None, SOFT], ids=["hard", "mixed"])
def test_the_labels_are_those_of_torch(smoothing, weights, soft):
    labels = Labels(Recipe(label_smoothing=smoothing, class_weights=weights), 4)(batch(soft)).labels
    weight = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(
        LOGITS, TARGET if soft is None else soft, weight=weight, label_smoothing=smoothing, reduction="none"
    )
    assert cross_entropy(LOGITS, labels).item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_nothing_changes_a_batch_without_these_options():
    given = batch()
    assert Labels(Recipe(), 4)(given) is given
    assert given.labels is given.target


def test_automatic_weights_are_inverse_frequencies_with_mean_1():
    targets = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = inverse_frequency(targets, 4)
    assert weights[targets].mean().item() == pytest.approx(1)
    assert (weights / weights[0]).tolist() == pytest.approx([1, 2, 0, 6])


@pytest.mark.parametrize(
    ("recipe", "value"), [({"class_weights": [1.0, 2.0]}, "2"), ({"class_weights": [1.0] * 5}, "5")]
)
def test_a_weight_is_needed_for_each_class(recipe, value):
    with pytest.raises(ACKDError, match=value):
        build(CE(), recipe=Recipe(**recipe))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"class_weights": "balanced"}, "class_weights"),
        ({"class_weights": [1.0, -1.0]}, "class_weights"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"early_stopping": 0}, "early_stopping"),
    ],
)
def test_bad_values_are_refused(wrong, name):
    with pytest.raises(ACKDError, match=name):
        Recipe(**wrong)


def test_automatic_weights_need_the_targets_of_the_data():
    module = build(CE(), recipe=Recipe(class_weights="auto"))
    with pytest.raises(ACKDError, match="train_targets"):
        trainer().fit(module, Blobs())
    trainer(max_epochs=1).fit(module, IndexedBlobs())
    assert module.labelling.weights.tolist() == [1.0] * CLASSES


def test_rare_classes_are_made_up_for_once():
    module = build(CE(), student="resnet8", recipe=Recipe(class_weights="auto"), data=DataInfo(CLASSES, 8))
    module.check_data(DigitsDataModule())
    with pytest.raises(ACKDError, match=r"class_weights is auto and data\.sampling is balanced"):
        module.check_data(DigitsDataModule(sampling="balanced"))


class Hard(Method):
    """A method from outside that knows nothing of soft labels."""

    teacher = "none"

    def __init__(self):
        super().__init__()
        self.loss_weights = {"ce": 1.0}

    def forward(self, student, teacher, batch):
        return {"ce": F.cross_entropy(student.logits, batch.target)}


MIXABLE = {
    "hard": (Hard, "hard"),
    "crd": (CRD, "smoothed"),
    "dkd": (DKD, "smoothed"),
    "acn": (ACN, "smoothed"),
    "pskd": (lambda: AIKD(previous="table"), "smoothed"),
    "sum": (lambda: Sum([KD(), DKD()]), "smoothed"),
    "sum of hard": (lambda: Sum([KD(), Hard()]), "hard"),
    "kd": (KD, "mixed"),
    "ackd": (ACKD, "mixed"),
    "dml": (lambda: ACN(weight_generated=0.0), "mixed"),
    "aikd": (AIKD, "mixed"),
}


@pytest.mark.parametrize(("make", "labels"), MIXABLE.values(), ids=MIXABLE)
def test_labels_that_a_method_cannot_learn_from_are_refused(make, labels):
    data = DigitsDataModule(augmentation=Augmentation(mixup=0.2))
    module = build(make(), student="resnet8", data=DataInfo(CLASSES, 8, (0.5,) * 3, (0.5,) * 3))
    assert module.method.labels == labels
    if labels == "mixed":
        module.check_data(data)
    else:
        with pytest.raises(ACKDError, match=type(module.method).__name__):
            module.check_data(data)
    for recipe in (Recipe(label_smoothing=0.1), Recipe(class_weights=[1.0] * CLASSES)):
        again = {"recipe": recipe, "student": "resnet8", "data": DataInfo(CLASSES, 8, (0.5,) * 3, (0.5,) * 3)}
        if labels == "hard":
            with pytest.raises(ACKDError, match=type(module.method).__name__):
                build(make(), **again)
        else:
            build(make(), **again)


@pytest.mark.parametrize("recipe", [Recipe(label_smoothing=0.1), Recipe(class_weights=[1.0] * CLASSES)])
def test_labels_without_a_cross_entropy_that_reads_them_are_said(recipe, capsys):
    data = DataInfo(CLASSES, 8, (0.5,) * 3, (0.5,) * 3)
    for method, said in (
        *((each, True) for each in (DGKD(), ATSC(adapt_teacher=False), KD(weight_ce=0.0))),
        *((each, False) for each in (DGKD(weight_ce=1.0), ATSC(), KD())),
    ):
        module = build(method, recipe=recipe, student="resnet8", data=data)
        capsys.readouterr()
        module.check_data(DigitsDataModule())
        words = f"has no effect, as no cross-entropy of method {type(method).__name__} has a weight"
        assert (words in capsys.readouterr().out) is said


def test_shares_of_classes_from_other_data_modules():
    image, shares = torch.zeros(2, 3, 8, 8), torch.tensor([[0.2, 0.8], [0.9, 0.1]])
    read = read_batch((image, shares), DataInfo(2, 8))
    assert read.target.tolist() == [1, 0]
    assert read.index.tolist() == [-1, -1]
    assert read.labels is read.soft


def test_shares_for_a_method_that_cannot_use_them_are_refused():
    module = build(DKD())
    with pytest.raises(ACKDError, match="DKD"):
        module.training_step((torch.zeros(2, 3, 8, 8), torch.full((2, CLASSES), 0.25)), 0)


def test_accuracy_is_the_share_of_the_predicted_class():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 0]), None).item() == 0.5
    assert accuracy(logits, torch.tensor([0, 0]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])).item() == pytest.approx(0.55)


def test_the_training_accuracy_does_not_see_smoothing_and_weights():
    def logged(**recipe):
        run = trainer(max_epochs=1)
        run.fit(build(CE(), lr=1e-9, recipe=Recipe(**recipe)), IndexedBlobs())
        return float(run.callback_metrics["train/acc"])

    assert logged() == logged(label_smoothing=0.3, class_weights=[3.0, 1.0, 1.0, 1.0])


def test_balanced_sampling_is_refused_for_a_method_with_a_row_for_each_image():
    data = DigitsDataModule(sampling="balanced", max_per_class=8, batch_size=16)
    teacher = teaching(create_model("resnet8", 10))
    module = build(CRD(negatives=8), student="resnet8", teacher=teacher, data=DataInfo(10, 16))
    with pytest.raises(ACKDError, match="CRD"):
        trainer().fit(module, data)
