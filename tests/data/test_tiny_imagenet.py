from __future__ import annotations

import hashlib
import logging
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ackd_lightning.data import TinyImageNetDataModule
from ackd_lightning.errors import ACKDError

WNIDS = ("n01", "n02", "n03", "n04")


@pytest.fixture
def tiny(tmp_path, write_classes, picture):
    """The official layout with 4 classes, 6 training and 2 validation images of each."""
    root = tmp_path / "tiny-imagenet-200"
    write_classes(root / "train", {f"{wnid}/images": 6 for wnid in WNIDS}, size=64, suffix=".JPEG")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for number in range(8):
        picture(7000 + number, 64).save(root / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{WNIDS[(3 * number) % 4]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    return root


def module(root, **options):
    return TinyImageNetDataModule(root, **{"batch_size": 8, "download": False, "val_fraction": 0.5, **options})


def targets(loader):
    return torch.cat([batch.target for batch in loader]).tolist()


@pytest.mark.parametrize("inner", [True, False], ids=["folder", "root"])
def test_official_layout(tiny, inner):
    data = module(tiny if inner else tiny.parent)
    assert data.num_classes == 4
    data.prepare_data()
    assert targets(data.test_dataloader()) == [(3 * number) % 4 for number in range(8)]
    assert sorted(targets(data.val_dataloader())) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert data.class_names == WNIDS
    assert next(iter(data.train_dataloader())).image.shape == (8, 3, 64, 64)


def test_what_is_passed_over_is_said_once(tiny, caplog):
    (tiny / "train" / "n01" / "n01_boxes.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        module(tiny).prepare_data()
    assert caplog.text.count(".txt (1)") == 1


def test_images_are_resized_and_normalised_as_asked(tiny):
    data = module(tiny, image_size=96, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), batch_size=12)
    assert (data.info.input_size, data.info.mean, data.info.std) == (96, (0.5,) * 3, (0.5,) * 3)
    data.prepare_data()
    usual = module(tiny, image_size=96)
    usual.prepare_data()
    here, there = (next(iter(each.test_dataloader())) for each in (data, usual))
    image, other = (each.on_after_batch_transfer(batch, 0).image for each, batch in ((data, here), (usual, there)))
    assert image.shape == (8, 3, 96, 96)
    scale, shift = (torch.tensor(each).view(3, 1, 1) for each in (usual.std, usual.mean))
    assert torch.allclose(image * 0.5 + 0.5, other * scale + shift, atol=1e-5)


@pytest.mark.parametrize("options", [{"mean": (0.5,) * 3}, {"mean": (0.5,), "std": (0.5,)}, {"std": (1.0,) * 3}])
def test_mean_and_std_go_together_and_fit_the_channels(tiny, options):
    with pytest.raises(ACKDError, match="3"):
        module(tiny, **options)


def drop_training_classes(root: Path):
    for wnid in ("n01", "n03"):
        shutil.rmtree(root / "train" / wnid)


def arrange_val(root: Path):
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (root / "val" / wnid).mkdir(exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / wnid / name)
    (root / "val" / "images").rmdir()
    (root / "val" / "val_annotations.txt").unlink()


@pytest.mark.parametrize("arranged", [False, True], ids=["annotations", "class folders"])
def test_a_subset_of_the_classes(tiny, arranged):
    if arranged:
        arrange_val(tiny)
    drop_training_classes(tiny)
    data = module(tiny, batch_size=4)
    assert data.num_classes == 2
    assert sorted(targets(data.test_dataloader())) == [0, 0, 1, 1]
    assert data.class_names == ("n02", "n04")


def test_class_folders_as_validation(tiny):
    arrange_val(tiny)
    assert sorted(targets(module(tiny).test_dataloader())) == [0, 0, 1, 1, 2, 2, 3, 3]


def no_annotations(root):
    (root / "val" / "val_annotations.txt").unlink()
    return r"val holds 8 images but neither val_annotations\.txt nor class folders"


def flat_without_annotations(root):
    (root / "val" / "val_annotations.txt").unlink()
    for path in (root / "val" / "images").iterdir():
        path.rename(root / "val" / path.name)
    (root / "val" / "images").rmdir()
    return r"val holds 8 images but neither val_annotations\.txt nor class folders"


def subset_without_wnids(root):
    arrange_val(root)
    drop_training_classes(root)
    (root / "wnids.txt").unlink()
    return "classes that the training part lacks .*n01, n03"


def missing_image(root):
    (root / "val" / "images" / "val_3.JPEG").unlink()
    return r"1 images of .* are missing, the first is .*val_3\.JPEG"


def no_validation_of_a_class(root):
    path = root / "val" / "val_annotations.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "n03" not in line))
    return "names no image of 1 training classes, the first is n03"


def bad_line(root):
    path = root / "val" / "val_annotations.txt"
    path.write_text("val_0.JPEG\tn01\nval_1.JPEG n02\n")
    return "line 2 of .* is 'val_1.JPEG n02'"


def no_val(root):
    shutil.rmtree(root / "val")
    return "there is no folder .*val: unpack the official"


def corrupt(root):
    path = root / "train" / "n02" / "images" / "0001.JPEG"
    path.write_bytes(path.read_bytes()[:500])
    return r"could not read the image .*n02/images/0001\.JPEG"


def nothing(root):
    shutil.rmtree(root)
    return "Tiny-ImageNet is not in"


@pytest.mark.parametrize(
    "harm",
    [
        no_annotations,
        flat_without_annotations,
        subset_without_wnids,
        missing_image,
        no_validation_of_a_class,
        bad_line,
        no_val,
        corrupt,
        nothing,
    ],
)
def test_bad_data(tiny, harm):
    sentence = harm(tiny)
    with pytest.raises(ACKDError, match=sentence) as caught:
        module(tiny).prepare_data()
    assert "\n" not in str(caught.value)


def test_download_and_unpack(tiny, tmp_path, monkeypatch):
    path = tmp_path / "mirror.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tiny.rglob("*")):
            archive.write(file, file.relative_to(tiny.parent))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(TinyImageNetDataModule, "archive", replace(TinyImageNetDataModule.archive, md5=md5))
    data = module(tmp_path / "data", download=True, url=path.as_uri())
    assert data.num_classes == 200  # nothing exists yet
    data.prepare_data()
    assert data.num_classes == 4
    assert (tmp_path / "data" / "tiny-imagenet-200" / "wnids.txt").exists()
