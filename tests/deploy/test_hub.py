"""Students go to the hub and come back, against a local server with its HTTP interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from ackd_lightning.commands.push import _report_of
from ackd_lightning.commands.student import read_student
from ackd_lightning.deploy.description import Accuracy, Description
from ackd_lightning.deploy.hub import model_card, write_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.hub import hub_file, parse_repository
from ackd_lightning.runs.export import export_student, weights_mark
from ackd_lightning.runs.files import read_checkpoint
from deploy.hub_server import running
from deploy.samples import NAMES, checkpoint

SECRET = "hf_secret_of_the_test"
PLAIN = {"channels": 3, "crop_pct": 0.875, "interpolation": "bilinear", "background": "white", "pixels": "uint8"}


def call(folder: Path, url: str, code: str, *, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with the hub at a URL, or offline: huggingface_hub reads its address when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {
        **({"HF_HUB_OFFLINE": "1"} if url == "offline" else {"HF_ENDPOINT": url}),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment = {**kept, **own, **({"HF_TOKEN": token} if token else {})}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def ackd(*words: str) -> str:
    return f"import sys; from ackd_lightning.cli import main; sys.exit(main({list(words)!r}))"


@pytest.mark.slow
def test_a_student_goes_to_the_hub_and_comes_back(tmp_path):
    checkpoint(tmp_path / "run/checkpoints/last.ckpt", "timm:test_byobnet", input_size=32, preprocessing=PLAIN)
    (tmp_path / "run/report").mkdir()
    text = "## Results\n![figure](a.png)\nbest run\n\n## About this page\n/home/anna\n"
    (tmp_path / "run/report/report.md").write_text(text)
    mark = weights_mark(read_checkpoint(tmp_path / "run/checkpoints/last.ckpt"))
    (tmp_path / "run/report/report.json").write_text(json.dumps({"weights": mark}))
    push = ackd("push", "run", "anna/student", "--check", "random", "--license", "mit")
    with running() as hub:
        without = call(tmp_path, hub.url, push)
        assert without.returncode == 2
        assert "HF_TOKEN" in without.stderr
        assert hub.requests_seen == []
        done = call(tmp_path, hub.url, push, token=SECRET)
        assert done.returncode == 0, done.stderr
        assert sorted(name for _, name in hub.files) == ["README.md", "config.json", "model.safetensors"]
        card = hub.files["anna/student", "README.md"].decode()
        assert card.startswith("---\nlicense: mit\n")
        assert "best run" in card
        assert "| checked | safetensors file on " in card
        assert "figure" not in card
        assert "/home/anna" not in card
        config = json.loads(hub.files["anna/student", "config.json"])
        assert config["architecture"] == "test_byobnet"
        assert config["label_names"] == NAMES
        assert config["pretrained_cfg"]["mean"] == [0.4] * 3
        code = (
            "import torch, timm, json; from ackd_lightning import load_student\n"
            "student = load_student('hf:anna/student@v2'); image = torch.ones(1, 3, 32, 32)\n"
            "other = timm.create_model('hf-hub:anna/student', pretrained=True).eval()\n"
            "print((student(image) - other(image)).abs().max().item(), other.pretrained_cfg['crop_pct'])\n"
            "from ackd_lightning.models.teacher import FrozenTeacher\n"
            "FrozenTeacher.from_name('timm:test_byobnet', 3, weights='hf:anna/student')\n"
        )
        back = call(tmp_path, hub.url, code)
        assert back.returncode == 0, back.stderr
        assert back.stdout.splitlines()[0].split() == ["0.0", "0.875"]
        for name, word in {"hf:anna/none": "private", "hf:anna/student@v9": "revision"}.items():
            failed = call(tmp_path, hub.url, ackd("inspect", name))
            assert failed.returncode == 2
            assert word in failed.stderr
    offline = call(tmp_path, "offline", ackd("inspect", "hf:anna/student"))  # from the cache
    assert offline.returncode == 0, offline.stderr
    assert "checked" in offline.stdout
    unsent = call(tmp_path, "offline", push, token=SECRET)
    assert unsent.returncode == 2
    assert "cannot be reached" in unsent.stderr
    assert "check its name" not in unsent.stderr
    missing = call(tmp_path, "offline", ackd("inspect", "hf:anna/other"))
    assert missing.returncode == 2
    assert missing.stderr.startswith("ackd: hf:anna/other")
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
    assert all(SECRET.encode() not in content for content in hub.files.values())


@pytest.mark.parametrize(
    ("text", "parts"),
    [("hf:a/b", ("a/b", None)), ("a-1/b.c@v1.0", ("a-1/b.c", "v1.0")), ("hf:a/b@refs/pr/1", ("a/b", "refs/pr/1"))],
)
def test_names(text, parts):
    assert parse_repository(text) == parts


@pytest.mark.parametrize("text", ["hf:a", "hf:", "hf:a/b/c", "hf:../x", "hf:a/..", "hf:a b/c", "hf:a/b@"])
def test_other_names_are_refused_and_nothing_is_fetched(text, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(ACKDError, match="hf:USER/NAME"):
        hub_file(text)


def test_only_named_files_are_sought_on_the_hub(tmp_path, monkeypatch):
    checkpoint(tmp_path / "a.ckpt")
    export_student(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    asked = []

    def download(repository, name, *, revision):
        asked.append((repository, name, revision))
        return str(tmp_path / "a.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    from ackd_lightning import load_student

    hub_file.cache_clear()
    load_student(tmp_path / "a.safetensors")
    assert asked == []
    assert load_student("hf:anna/cats@v1").class_names == tuple(NAMES)
    assert asked == [("anna/cats", "model.safetensors", "v1")]
    hub_file.cache_clear()


def test_the_card_has_what_a_reader_needs(tmp_path):
    description = Description(
        "resnet8", 2, 16, class_names=("cat", "d|g"), accuracy=(Accuracy("test", 0.875, 80),), checked="on 512 images"
    )
    card = model_card(description, "anna/cats", license_name="apache-2.0")
    for value in ("license: apache-2.0", "87.50%", "resnet8", 'load_student("hf:anna/cats")', "512"):
        assert value in card
    assert "hf-hub" not in card
    write_config(description, tmp_path / "config.json", license_name="apache-2.0")
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "resnet8"


def test_what_is_sent_is_safetensors(tmp_path):
    checkpoint(tmp_path / "a.ckpt")
    exported = export_student(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    with safe_open(exported.path, "pt") as file:
        assert file.metadata()["model"] == "resnet8"


@pytest.mark.parametrize("about", [{"weights": "0123456789abcdef"}, {"weights": None}, {}, []], ids=str)
def test_a_report_about_other_weights_is_not_published(tmp_path, about, capsys):
    """It may be of an int8 file, of the best epoch, or of the run before it was trained longer."""
    checkpoint(tmp_path / "checkpoints/last.ckpt")
    (tmp_path / "report").mkdir()
    student = read_student(str(tmp_path), "last")
    assert _report_of(student) is None
    (tmp_path / "report/report.md").write_text("91.84 %")
    (tmp_path / "report/report.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert _report_of(student) is None
    said = "".join(capsys.readouterr())
    assert "is about other weights" in said
    assert "last.ckpt`" in said
    for kind, words in (("settings", "with other settings than the run has"), ("images", "about other images")):
        other = {"weights": weights_mark(student.content), "measured_otherwise": kind}
        (tmp_path / "report/report.json").write_text(json.dumps(other))
        assert _report_of(student) is None
        assert words in "".join(capsys.readouterr())
    (tmp_path / "report/report.json").write_text(json.dumps({"weights": weights_mark(student.content)}))
    assert _report_of(student) == "91.84 %"


@pytest.mark.parametrize(("final", "stated"), [(True, [0.75]), (False, [])], ids=["last weights", "earlier weights"])
def test_a_student_states_what_was_measured_with_its_weights(tmp_path, final, stated):
    checkpoint(tmp_path / "checkpoints/last.ckpt")
    summary = {"config": "a", "seed": 0, "shown": "val", "best": {}, "images": {"val": 100}}
    summary |= {"last": {"val/acc": 0.75, "epoch": 2}, "last_is_final": final}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert [each.value for each in read_student(str(tmp_path), "last").description.accuracy] == stated


def test_names_of_classes_are_no_markup_on_the_card():
    card = model_card(Description("resnet8", 2, 16, class_names=("a|b<b>", "![i](y)")), "anna/cats", license_name="mit")
    assert r"a\|b\<b\>" in card
    assert r"!\[i\](y)" in card


def test_images_that_are_not_normalised_are_so_to_timm(tmp_path):
    pytest.importorskip("timm")
    write_config(Description("timm:test_byobnet", 3, 32), tmp_path / "config.json", license_name="mit")
    stated = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (stated["mean"], stated["std"]) == ([0.0] * 3, [1.0] * 3)


def test_what_timm_states_of_its_own_weights_is_not_said_of_the_students(tmp_path):
    """Those of this network have a licence of their own and other images to test on."""
    timm = pytest.importorskip("timm")
    published = timm.get_pretrained_cfg("convnextv2_atto").to_dict()
    assert published["license"] != "mit"
    assert {"tag", "test_input_size", "test_crop_pct"} <= published.keys()
    write_config(Description("timm:convnextv2_atto", 3, 48), tmp_path / "config.json", license_name="mit")
    stated = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (stated["license"], stated["input_size"], stated["crop_pct"]) == ("mit", [3, 48, 48], 1.0)
    assert not {"tag", "test_input_size", "test_crop_pct", "test_pool_size", "url", "paper_ids"} & stated.keys()
