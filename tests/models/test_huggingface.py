from __future__ import annotations

import json

import pytest
import torch
from timm.data import ImageNetInfo

from ackd_lightning import DataInfo, DistillationModule, TeacherConfig
from ackd_lightning.cli import main
from ackd_lightning.data.transforms import normalise
from ackd_lightning.deploy.files import open_network
from ackd_lightning.deploy.student import load_student
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import AT
from ackd_lightning.models.features import staged_forward
from ackd_lightning.models.finding import plan_for
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.zoo import create_model
from ackd_lightning.models.zoo.huggingface import described
from ackd_lightning.models.zoo.pretrained import pretrained, published
from ackd_lightning.runs.export import export_student
from deploy.samples import checkpoint

transformers = pytest.importorskip("transformers", reason="networks hf:FOLDER need the extra huggingface")

NAMES = {0: "ant", 1: "bee", 2: "cat"}
SMALL = {
    "vit": lambda: transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    ),
    "resnet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    "convnext": lambda: transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
}


@pytest.fixture(params=SMALL)
def folder(request, tmp_path):
    config = SMALL[request.param]()
    config.id2label, config.label2id = NAMES, {name: number for number, name in NAMES.items()}
    torch.manual_seed(0)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    stated = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**stated, "resample": 3}))
    return tmp_path


def test_a_folder_gives_its_weights_classes_and_preprocessing(folder, capsys):
    network, metadata = pretrained(f"hf:{folder}")
    again = transformers.AutoModelForImageClassification.from_pretrained(folder)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(staged_forward(network.eval(), None, image).logits, again.eval()(image).logits)
    assert metadata["class_names"] == list(NAMES.values())
    assert metadata["mean"] == (0.5, 0.4, 0.3)
    assert metadata["input_size"] == (32, 32)
    assert metadata["interpolation"] == "bicubic"
    assert str(folder) in capsys.readouterr().out


def test_its_stages_are_found_and_its_branches_learn(folder):
    network = create_model(f"hf:{folder}", 5)
    plan = plan_for(network)
    assert len(plan.features) >= 4
    student = BranchyStudent(network, input_size=32)
    output = student(torch.randn(2, 3, 32, 32))
    assert output.logits.shape == (2, 5)
    assert [tuple(branch.logits.shape) for branch in output.branches] == [(2, 5)] * 2
    sum(branch.logits.square().mean() for branch in output.branches).backward()
    assert all(each.grad is not None for each in student.branches.parameters())


def test_a_student_from_a_folder_goes_to_every_kind_of_file(folder, tmp_path, capsys):
    run = tmp_path / "run"
    network = checkpoint(run / "checkpoints/last.ckpt", f"hf:{folder}", input_size=32)
    image = torch.randn(2, 3, 32, 32)
    assert network(image).shape == (2, 3)
    export_student(run / "checkpoints/last.ckpt", run / "student.safetensors")
    pixels = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8)
    wanted = load_student(run / "student.safetensors").predict(pixels).probabilities
    assert open_network(run).predict(pixels).probabilities.allclose(wanted, atol=1e-6)
    assert main(["export", str(run), "--format", "safetensors,pt2", "--check", "random"]) == 0
    for name in ("student-last.safetensors", "student-last.pt2"):
        assert open_network(run / name).predict(pixels).probabilities.allclose(wanted, atol=1e-4)
    capsys.readouterr()
    assert main(["push", str(run), "me/x", "--license", "mit"]) == 2
    assert "whose settings are in a folder of yours" in capsys.readouterr().err


@pytest.mark.parametrize("imagenet", [False, True])
def test_classes_with_the_same_word_are_words_and_no_names(tmp_path, imagenet):
    words = ImageNetInfo("imagenet-1k").label_descriptions() if imagenet else ["crane", "dog", "crane", "cat"]
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=len(words))
    config.id2label = dict(enumerate(words))
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    _, metadata = pretrained(f"hf:{tmp_path}")
    assert metadata["class_labels"] == list(words)
    assert metadata.get("class_names", [None])[0] == ("n01440764" if imagenet else None)
    picked = [134, 1] if imagenet else [2, "dog"]
    module = DistillationModule(
        "resnet8",
        method=AT(),
        teacher=TeacherConfig(f"hf:{tmp_path}", pretrained=True, gate="off", class_map=picked),
        data=DataInfo(2, 32, class_names=("bird", "pet")),
    )
    module.load_teacher()
    module.teachers.match_classes(("bird", "pet"), reorder=True)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(module.teacher(image).logits, module.teacher.network(image)[:, [134 if imagenet else 2, 1]])


def test_a_folder_without_a_network_is_refused(tmp_path):
    for call in (lambda: create_model(f"hf:{tmp_path}", 5), lambda: published(f"hf:{tmp_path / 'missing'}")):
        with pytest.raises(ACKDError, match=r"config\.json"):
            call()


def test_a_backbone_without_a_classifier_is_refused(tmp_path):
    transformers.ViTModel(SMALL["vit"]()).save_pretrained(tmp_path)
    with pytest.raises(ACKDError, match="classifier"):
        pretrained(f"hf:{tmp_path}")


@pytest.mark.parametrize("prepared", [True, False])
def test_a_folder_teaches_a_method_that_reads_features(folder, prepared):
    if not prepared:
        (folder / "preprocessor_config.json").unlink()
    module = DistillationModule(
        "resnet8",
        method=AT(),
        teacher=TeacherConfig(f"hf:{folder}", pretrained=True, gate="off"),
        data=DataInfo(3, 32, class_names=tuple(NAMES.values())),
    )
    module.load_teacher()
    output = module.teacher(torch.zeros(2, 3, 32, 32))
    assert [tuple(each.shape[1:]) for each in output.features] == list(module.teacher_spec.features)
    assert output.logits.shape == (2, 3)


def test_a_folder_without_weights_of_its_own_is_said_how_to_use(folder):
    module = DistillationModule("resnet8", method=AT(), teacher=f"hf:{folder}", data=DataInfo(3, 32))
    with pytest.raises(ACKDError, match=r"teacher\.pretrained to true for the folder"):
        module.load_teacher()


@pytest.mark.parametrize("case", ["plain", "include_top", "offset", "no_normalize", "no_rescale"])
def test_normalisation_is_that_of_the_image_processor(tmp_path, case):
    stated = {
        "plain": {},
        "include_top": {"include_top": True},
        "offset": {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False},
        "no_normalize": {"do_normalize": False, "include_top": False},
        "no_rescale": {"do_rescale": False, "include_top": False},
    }[case]
    processor = transformers.EfficientNetImageProcessor(
        **{"include_top": False, "do_resize": False, "do_center_crop": False, **stated},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.5, 0.6, 0.7],
    )
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "ant", "1": "bee"}}))
    found = described(tmp_path)
    pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    wanted = torch.as_tensor(processor(pixels.numpy(), return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(normalise(pixels[None], found["mean"], found["std"])[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_folder_whose_network_reads_bgr_is_refused(folder):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_flip_channel_order": True}))
    with pytest.raises(ACKDError, match="BGR"):
        pretrained(f"hf:{folder}")
