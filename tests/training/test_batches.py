"""Batches and targets of other people's data modules."""

from __future__ import annotations

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ackd_lightning import CE, KD, DataInfo, DistillationModule, ImageFolderDataModule, TeacherConfig
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACN, CRD, DKD, DPK, IAKD, Sum
from ackd_lightning.training.batches import check_index, read_batch, require_labels
from ackd_lightning.types import Batch

DATA = DataInfo(4, (8, 12))
IMAGE = torch.zeros(3, 3, 8, 12)
TARGET = torch.tensor([2, 0, 3])
HOT = nn.functional.one_hot(TARGET, 4)


@pytest.mark.parametrize(
    "target",
    [
        TARGET,
        TARGET[:, None],
        TARGET.int(),
        TARGET.to(torch.uint8),
        TARGET.short()[:, None],
        TARGET.float(),
        HOT,
        HOT.bool(),
        HOT.float(),
        HOT.half(),
    ],
    ids=lambda target: f"{str(target.dtype)[6:]}-{target.ndim}",
)
def test_targets_with_one_meaning_are_converted(target):
    batch = read_batch((IMAGE, target), DATA)
    assert batch.target.dtype == torch.int64
    assert torch.equal(batch.target, TARGET)
    assert batch.soft is None
    assert batch.index.tolist() == [-1] * 3


def test_shares_of_classes_are_kept():
    shares = torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 0, 1.0], [0.25, 0.25, 0.25, 0.25]]).bfloat16()
    batch = read_batch((IMAGE, shares), DATA)
    torch.testing.assert_close(batch.soft, shares.float())
    assert batch.target.tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (torch.tensor([1, 2, 4]), "from 1 to 4 .*subtract 1"),
        (torch.tensor([0, 2, 7]), "from 0 to 7"),
        (torch.tensor([0, 2, 255]), "from 0 to 255"),
        (torch.tensor([-100, 2, 1]), "from -100 to 2"),
        (torch.tensor([0.5, 1.0, 2.0]), "0.5"),
        (torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]), "1 to 2"),
        (torch.zeros(3, 4), "0 to 0"),
        (torch.tensor([[1.5, -0.5, 0, 0]] * 3), "non-negative"),
        (torch.zeros(3, 5), r"\(3, 5\)"),
        (torch.zeros(2, dtype=torch.int64), r"\(2,\)"),
        (["cat", "dog", "cat"], "list"),
    ],
)
def test_targets_with_another_meaning_are_refused_in_one_sentence(target, named):
    with pytest.raises(ACKDError, match=named) as caught:
        read_batch((IMAGE, target), DATA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "batch",
    [
        {"image": IMAGE, "label": TARGET},
        {"pixel_values": IMAGE, "labels": TARGET, "name": ["a", "b", "c"]},
        {"x": IMAGE, "y": TARGET[:, None]},
        [IMAGE, TARGET],
        Batch(IMAGE, TARGET, torch.full_like(TARGET, -1)),
    ],
)
def test_forms_of_a_batch(batch):
    assert torch.equal(read_batch(batch, DATA).target, TARGET)


@pytest.mark.parametrize(
    ("method", "lines"), [(DPK(), 1), (IAKD(), 1), (ACN(), 1), (Sum([KD(), DPK()]), 1), (ACN(weight_generated=0.0), 0)]
)
def test_random_numbers_without_an_index_are_said_once(method, lines, capsys):
    for index, starts, expected in ((-1, True, lines), (-1, False, 0), (3, True, 0)):
        check_index(method, Batch(IMAGE, TARGET, torch.full((3,), index)), starts=starts)
        assert capsys.readouterr().out.count("no index") == expected


def test_an_index_comes_along():
    for batch in ((IMAGE, TARGET, torch.tensor([5, 6, 7])), {"image": IMAGE, "target": TARGET, "index": [5, 6, 7]}):
        assert read_batch(batch, DATA).index.tolist() == [5, 6, 7]
    for index in (torch.tensor([5, 6, 7], dtype=torch.uint8), np.array([5, 6, 7], dtype=np.uint32)):
        found = read_batch((IMAGE, TARGET, index), DATA).index
        assert found.dtype == torch.int64
        assert found.tolist() == [5, 6, 7]


def test_entries_without_content_hide_no_others():
    batch = read_batch({"image": IMAGE, "target": None, "label": TARGET, "index": None, "idx": [5, 6, 7]}, DATA)
    assert batch.index.tolist() == [5, 6, 7]
    assert torch.equal(batch.target, TARGET)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"image": IMAGE, "mask": TARGET}, "'target'"),
        ({"picture": IMAGE, "label": TARGET}, "'image'"),
        ((IMAGE,), "tuple of 1"),
        (IMAGE, "Tensor"),
        ((np.zeros((3, 3, 8, 12)), TARGET), "ndarray"),
        ((IMAGE.to(torch.uint8), TARGET), "uint8"),
        ((IMAGE[0], TARGET), r"\(3, 8, 12\)"),
        ((IMAGE.permute(0, 2, 3, 1), TARGET), "channels before"),
        ((IMAGE.transpose(2, 3), TARGET), "12 x 8"),
        ((IMAGE[:, :1], TARGET), "1 channels"),
        ((IMAGE, TARGET, ["a.jpg", "b.jpg", "c.jpg"]), "third entry of a batch holds str and no positions"),
        ((IMAGE, TARGET, torch.rand(3)), "third entry of a batch holds Tensor"),
        ((IMAGE, TARGET, torch.tensor([5, 6])), r"holds Tensor of torch.int64 with the shape \(2,\) and no positions"),
        ((IMAGE, TARGET, torch.ones(3, dtype=torch.bool)), "holds Tensor of torch.bool"),
        ((IMAGE, TARGET, [5]), "holds 1 number and no positions"),
        ((IMAGE, TARGET, [5, "b", 6]), "holds str and no positions"),
        ((IMAGE, TARGET, [True, False, True]), "holds bool and no positions"),
        (
            {"image": IMAGE, "label": TARGET, "idx": ["a", "b", "c"]},
            "entry 'idx' of a batch holds str and no positions",
        ),
    ],
)
def test_batches_of_another_form_are_refused_in_one_sentence(batch, named):
    with pytest.raises(ACKDError, match=named):
        read_batch(batch, DATA)


class Dicts(L.LightningDataModule):
    """A data module of somebody else: dictionaries, B x 1 targets of int32, rectangular images."""

    def __init__(self, target=None, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        self.target = torch.arange(16, dtype=torch.int32)[:, None] % 4 if target is None else target

    def loader(self):
        images = torch.randn(16, 3, 8, 12, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        rows = [{"image": image, "label": target} for image, target in zip(images, self.target, strict=True)]
        return DataLoader(rows, batch_size=8)

    train_dataloader = val_dataloader = loader


def small(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


def fit(module, data):
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer.callback_metrics


@pytest.mark.parametrize(
    ("method", "dtype"), [(CE, torch.float32), (KD, torch.float32), (KD, torch.float64), (CE, torch.bfloat16)]
)
def test_a_lightning_project_of_somebody_else_trains(method, dtype):
    teacher = TeacherConfig(network=small(), gate="off") if method is KD else None
    metrics = fit(DistillationModule(small(), method=method(), teacher=teacher, data=DATA), Dicts(dtype=dtype))
    assert metrics["train/loss"].isfinite()
    assert 0 <= metrics["val/acc"] <= 1


def test_training_images_without_a_label_need_train_targets():
    target = torch.arange(16) % 4
    target[3] = -1
    with pytest.raises(ACKDError, match="give it `train_targets`"):
        fit(DistillationModule(small(), data=DATA), Dicts(target))


def test_validation_images_without_a_label_are_refused():
    module = DistillationModule(small(), data=DATA)
    with pytest.raises(ACKDError, match="no label"):
        module.validation_step((IMAGE, torch.tensor([0, -1, 2])), 0)


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    generator = np.random.default_rng(0)
    for place, count in (("train/a", 8), ("train/b", 8), ("test/a", 4), ("test/b", 4), ("more", 16)):
        (tmp_path / place).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / place / f"{number}.png")
    return tmp_path


def unlabelled(photos, **options):
    return ImageFolderDataModule(
        photos, image_size=16, batch_size=8, unlabelled=str(photos / "more"), val_fraction=0.0, seed=0, **options
    )


def test_images_without_labels_teach_by_the_teacher_alone(photos):
    data = unlabelled(photos)
    teacher = DistillationModule("resnet8", data=data.info).student.plain()
    config = TeacherConfig(network=teacher, gate="off")
    module = DistillationModule("resnet8", method=KD(), teacher=config, data=data.info, seed=0)
    metrics = fit(module, data)
    assert metrics["train/loss"].isfinite()
    assert "train/acc" not in metrics  # of half of the images it would be a lie
    image = torch.randn(4, 3, 16, 16)
    module.eval()
    output = module.student(image)
    labelled = module.labelling(Batch(image, torch.tensor([0, -1, 1, -1]), torch.arange(4)))
    ce = module.method(output, output, labelled)["ce"]
    expected = nn.functional.cross_entropy(output.logits[::2], torch.tensor([0, 1])) / 2
    torch.testing.assert_close(ce, expected)


def test_methods_that_need_every_label_refuse_images_without(photos):
    data = unlabelled(photos)
    teacher = DistillationModule("resnet8", data=data.info).student.plain()
    for method in (DKD(), CRD(), CE()):
        own = teacher if method.teacher != "none" else None
        with pytest.raises(ACKDError, match=f"16 of 32 .*{type(method).__name__}"):
            fit(DistillationModule("resnet8", method=method, teacher=own, data=data.info), unlabelled(photos))


def test_plain_training_without_any_label_is_refused(photos):
    import shutil

    shutil.rmtree(photos / "train")
    (photos / "more").rename(photos / "train")
    data = ImageFolderDataModule(photos, image_size=16, batch_size=8, val_fraction=0.0)
    with pytest.raises(ACKDError, match=r"16 of 16 .*learns from labels alone"):
        fit(DistillationModule("resnet8", method=CE(), data=data.info), data)


@pytest.mark.parametrize("augmentation", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_mixing_needs_the_class_of_every_image(photos, augmentation):
    data = unlabelled(photos, augmentation=augmentation)
    teacher = DistillationModule("resnet8", data=data.info).student.plain()
    with pytest.raises(ACKDError, match="mixes images"):
        fit(DistillationModule("resnet8", method=KD(), teacher=teacher, data=data.info), data)


def test_targets_on_a_device_are_read_in_the_first_batch_only():
    """A device of which no number can be read stands for one that is waited for."""
    image = IMAGE.to("meta")
    batch = read_batch((image, torch.zeros(3, device="meta")), DATA)
    require_labels(batch, check=False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        require_labels(batch, check=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        read_batch((image, torch.zeros(3, device="meta")), DATA, check=True)
    without = Batch(IMAGE, torch.tensor([1, -1, 2]), torch.arange(3))
    with pytest.raises(ACKDError, match="has no label"):
        require_labels(without, check=False)
