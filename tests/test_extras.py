"""Optional libraries: every absence is one sentence with the command that mends it."""

from __future__ import annotations

import sys

import pytest

from ackd_lightning import create_model
from ackd_lightning.cli import main
from ackd_lightning.data import HuggingFaceDataModule, TableDataModule, WebDatasetDataModule
from ackd_lightning.data.decoding import Encoded, load_image, register_heif
from ackd_lightning.errors import ACKDError
from ackd_lightning.extras import require


def a_table(folder):
    (folder / "train.parquet").write_bytes(b"PAR1")
    return TableDataModule(folder, train="train.parquet", image_size=8)


def a_tiff(folder):
    return load_image(Encoded("a.tiff", b"what Pillow does not recognise"))


def a_transformer(folder):
    (folder / "config.json").write_text("{}")
    return create_model(f"hf:{folder}", 2)


@pytest.mark.parametrize(
    ("library", "extra", "use"),
    [
        ("pyarrow", "parquet", a_table),
        ("tifffile", "tiff", a_tiff),
        ("datasets", "datasets", HuggingFaceDataModule),
        (
            "webdataset",
            "shards",
            lambda folder: WebDatasetDataModule(folder, train="a.tar", test="b.tar", num_classes=2, image_size=8),
        ),
        ("transformers", "huggingface", a_transformer),
    ],
)
def test_a_missing_library_is_one_sentence(monkeypatch, tmp_path, library, extra, use):
    monkeypatch.setitem(sys.modules, library, None)
    if library == "pyarrow":
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ACKDError, match=rf"{library}.*ackd-lightning\[{extra}\]") as caught:
        use(tmp_path)
    assert str(tmp_path) in str(caught.value) or "a.tiff" in str(caught.value)


def test_photos_of_phones_need_their_library(monkeypatch):
    register_heif.cache_clear()
    monkeypatch.setattr("ackd_lightning.data.decoding.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ACKDError, match=r"a\.heic.*ackd-lightning\[heic\]"):
        load_image(Encoded("a.heic", b"not an image"))
    register_heif.cache_clear()


def test_a_library_that_is_installed_is_returned_and_its_own_faults_are_not_hidden(monkeypatch, tmp_path):
    assert require("json", "anything", "this").dumps(1) == "1"
    (tmp_path / "halfway.py").write_text("import a_library_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        require("halfway", "anything", "this")


def test_a_run_that_logs_to_tensorboard_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["fit", "--config", "digits_resnet8.yaml", "--tensorboard", "--name", "a"]) == 2
    assert "pip install 'ackd-lightning[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
