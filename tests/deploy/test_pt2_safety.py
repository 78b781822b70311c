"""A pt2 file runs nothing that it holds: torch would unpickle objects and evaluate expressions."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile

import pytest
import torch

from ackd_lightning.deploy.files import open_network
from ackd_lightning.deploy.formats import pt2
from ackd_lightning.deploy.formats.pt2_safety import check_archive
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.zoo import create_model


class Touch:
    """Object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "a.pt2"
    pt2.write(create_model("resnet8", 3).eval(), torch.randn(2, 3, 16, 16), path, {"model": "resnet8"})
    return path


def changed(file, target, change):
    """Copy an archive; ``change`` gets name and content of a member and returns its new content."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_an_own_file_is_opened_and_names_no_folder(file):
    assert pt2.open_file(file).run(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    assert b"site-packages" not in zipfile.ZipFile(file).read("archive/models/model.json")


def test_a_pickle_in_the_example_is_not_run(file, tmp_path):
    stream = io.BytesIO()
    torch.save((Touch(tmp_path / "made"),), stream)
    evil = changed(file, tmp_path / "e.pt2", lambda n, c: stream.getvalue() if n.endswith("model.pt") else c)
    with pytest.raises(ACKDError, match="example"):
        open_network(evil)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path_name", ["weight_0", "opaque_obj_0", "custom_obj_0", "../x"])
def test_a_pickled_weight_is_not_run(file, tmp_path, path_name):
    def change(name, content):
        if not name.endswith("model_constants_config.json"):
            return pickle.dumps(Touch(tmp_path / "made")) if name.endswith("weight_0") else content
        entry = {"path_name": path_name, "is_param": False, "use_pickle": True, "tensor_meta": None}
        return json.dumps({"config": {"x": entry}}).encode()

    with pytest.raises(ACKDError, match="object"):
        open_network(changed(file, tmp_path / "e.pt2", change))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"torch.ops.aten.relu.default", b"torch.hub.load"),
        (b"torch.ops.aten.relu.default", b"torch.ops.aten.__class__"),
        (b"torch.ops.aten.relu.default", b"math.__loader__.load_module"),
        (b"Symbol('s", b"open('s"),
        (b"positive=True, integer=True)", b"positive=True).__class__"),
        (b'"guards_code": []', b'"guards_code": ["print(1)"]'),
    ],
)
def test_code_in_the_graph_is_not_run(file, tmp_path, before, after):
    def change(name, content):
        if not name.endswith("model.json"):
            return content
        assert before in content
        return content.replace(before, after)

    with pytest.raises(ACKDError, match="could run code"):
        open_network(changed(file, tmp_path / "e.pt2", change))


def test_other_members_are_refused(file, tmp_path):
    evil = changed(file, tmp_path / "e.pt2", lambda _, content: content)
    with zipfile.ZipFile(evil, "a") as archive:
        archive.writestr("archive/data/aotinductor/model/x.so", b"\x7fELF")
    with pytest.raises(ACKDError, match=r"x\.so"):
        open_network(evil)


def test_a_damaged_weight_is_found_by_its_checksum(file, tmp_path):
    content = bytearray(file.read_bytes())
    weight = zipfile.ZipFile(file).read("archive/data/weights/weight_0")
    content[content.index(weight)] ^= 1
    (tmp_path / "damaged.pt2").write_bytes(content)
    with pytest.raises(ACKDError, match="checksum"):
        open_network(tmp_path / "damaged.pt2")


def test_operators_of_int8_are_registered_or_their_library_is_named(file, tmp_path, monkeypatch):
    before, after = b"torch.ops.aten.relu.default", b"torch.ops.quantized_decomposed.relu.default"
    int8 = changed(file, tmp_path / "int8.pt2", lambda _, content: content.replace(before, after))
    assert check_archive(int8) == {"aten", "quantized_decomposed"}
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(ACKDError, match="quantization"):
        open_network(int8)
