"""Students as people have them: weights to start from, frozen parts, learning rates, modes and precisions."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim import SGD, AdamW

from ackd_lightning import (
    ACKD,
    CE,
    ACKDError,
    DataInfo,
    DistillationModule,
    FrozenTeacher,
    StudentConfig,
    create_model,
    load_student,
    save_weights,
)
from ackd_lightning.methods import DCM
from ackd_lightning.models.features import StagePlan
from ackd_lightning.models.freezing import frozen_modules, parts_by_stage
from ackd_lightning.models.heads import HeadedNetwork, SharedClassifiers
from ackd_lightning.models.outputs import logits_of
from ackd_lightning.models.quantization import FakeQuantized
from ackd_lightning.models.start import match_head, refuse_frozen_head
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.models.weights import load_weights, read_metadata
from ackd_lightning.models.zoo import pretrained as published
from ackd_lightning.runs.export import export_student
from ackd_lightning.training.teachers import Teachers
from training.helpers import CLASSES, DATA, SIZE, Blobs, TinyNet, build, state, trainer

NAMES = ("ape", "bee", "cat", "dog")


def fit(module, **options):
    trainer(**{"max_epochs": 1, **options}).fit(module, datamodule=Blobs())
    return module


def student(config, method=None, **options):
    options = {"teacher": None, "data": DATA, **options}
    return build(method or CE(), student=config, **options)


def trained(tmp_path, classes=CLASSES, name="resnet8", **metadata):
    """A weight file of a network with running statistics of its own."""
    torch.manual_seed(5)
    network = create_model(name, classes)
    network(torch.randn(8, 3, SIZE, SIZE))
    return network, save_weights(network, tmp_path / f"{name}_{classes}.safetensors", metadata)


def differing(before, after, start=""):
    return {key for key in before if key.startswith(start) and not torch.equal(before[key], after[key])}


def test_auxiliary_classifiers_of_the_network_itself_are_refused():
    config = StudentConfig("googlenet", options={"aux_logits": True})
    with pytest.raises(ACKDError, match=r"student\.options\.aux_logits is true"):
        student(config)


# ------------------------------------------------------------------------------------------ weights to start from


@pytest.mark.parametrize("classes", [CLASSES, 7])
def test_weights_are_loaded_and_the_head_is_replaced_for_other_classes(tmp_path, capsys, classes):
    source, file = trained(tmp_path, classes)
    module = student(StudentConfig("resnet8", weights=str(file)))
    own, theirs = module.student.plain().state_dict(), source.state_dict()
    fresh = {"fc.weight", "fc.bias"} if classes != CLASSES else set()
    assert {key for key in own if not torch.equal(own[key], theirs[key])} == fresh
    said = [line for line in capsys.readouterr().out.splitlines() if str(file) in line]
    assert len(said) == 1
    assert ("head for 7 classes" in said[0]) == bool(fresh)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_a_file_without_a_head_starts_the_backbone(tmp_path, capsys, prefix):
    source = create_model("resnet8", 9)
    torch.save({f"{prefix}{key}": v for key, v in source.state_dict().items() if "fc" not in key}, tmp_path / "a.pth")
    module = student(StudentConfig("resnet8", weights=str(tmp_path / "a.pth")))
    assert torch.equal(module.student.plain().conv1.weight, source.conv1.weight)
    assert "no head" in capsys.readouterr().out


def test_the_head_of_a_method_is_left_out_and_not_lost_without_a_word(tmp_path, capsys):
    source = HeadedNetwork(create_model("resnet8", CLASSES), SharedClassifiers(64, [(16, 4, 4)], CLASSES))
    metadata = {"model": "resnet8", "method": "ATSC", "head": json.dumps(source.head.description())}
    file = str(save_weights(source, tmp_path / "headed.safetensors", metadata))
    module = student(StudentConfig("resnet8", weights=file))
    assert torch.equal(module.student.plain().conv1.weight, source.backbone.conv1.weight)
    said = f"starts from {file}, whose head of ATSC is left out; that for {CLASSES} classes is fresh"
    assert said in capsys.readouterr().out
    with pytest.raises(ACKDError, match="a head of ATSC in place of its own classifier, which fine-tuning for int8"):
        student(StudentConfig("resnet8", weights=file, quantization="x86"))


def test_frozen_statistics_without_weights_stay():
    class Normalised(TinyNet):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3, affine=False)
            self.idle = nn.ReLU()

        def forward(self, image):
            return super().forward(self.norm(image))

    assert "norm" in parts_by_stage(Normalised())["stem"]
    module = student(StudentConfig(Normalised(), freeze=["norm"]))
    norm = module.student.plain().norm
    module.train()
    module.on_train_epoch_start()
    before = norm.running_mean.clone()
    module.student(torch.randn(8, 3, SIZE, SIZE) + 3)
    assert torch.equal(norm.running_mean, before)
    with pytest.raises(ACKDError, match="no weights and no statistics"):
        student(StudentConfig(Normalised(), freeze=["idle"]))
    *blocks, classifier = TinyNet().children()
    network = nn.Sequential(nn.MaxPool2d(1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
    network.stage_plan = StagePlan(("0", "1", "2"))
    with pytest.raises(ACKDError, match="'stem', which has no weights and no statistics"):
        student(StudentConfig(network, freeze=["stem"]))


def test_one_class_is_refused():
    with pytest.raises(ACKDError, match="1 class and a classifier needs two"):
        student(StudentConfig("resnet8"), data=DataInfo(1, 16))


def test_options_that_a_file_states_build_its_network_again(tmp_path, capsys):
    """GoogLeNet with published weights normalises images inside, and its tensors do not show it."""
    data = DataInfo(CLASSES, 32, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    first = student(StudentConfig("googlenet", options={"aux_logits": False, "transform_input": True}), data=data)
    with torch.no_grad():
        for _ in range(3):
            first.student(torch.randn(8, 3, 32, 32))
    torch.save({"state_dict": first.state_dict(), "ackd_lightning": first.metadata()}, tmp_path / "last.ckpt")
    export_student(tmp_path / "last.ckpt", tmp_path / "student.safetensors")
    for name in ("last.ckpt", "student.safetensors"):
        file = str(tmp_path / name)
        again = student(StudentConfig("googlenet", weights=file), data=data)
        assert again.student.plain().transform_input
        assert again.student.plain().model_options["transform_input"]
        assert f"transform_input True, as {file} states" in capsys.readouterr().out
        other = student(StudentConfig("googlenet", weights=file, options={"transform_input": False}), data=data)
        assert not other.student.plain().transform_input
        teacher = Teachers([TeacherConfig("googlenet", weights=file)], data)
        teacher.load()
        with torch.no_grad():
            image = torch.randn(2, 3, 32, 32)
            torch.testing.assert_close(teacher(image).logits, first.student.plain().eval()(image))


@pytest.mark.parametrize("options", [None, {"transform_input": False}])
def test_files_that_leave_open_whether_their_network_changes_images_are_named(options, tmp_path, capsys):
    file = tmp_path / "net.pth"
    torch.save(create_model("googlenet", CLASSES).state_dict(), file)
    data = DataInfo(CLASSES, 32)
    student(StudentConfig("googlenet", weights=str(file), options=options), data=data)
    Teachers([TeacherConfig("googlenet", weights=str(file), options=options)], data).load()
    said = capsys.readouterr().out
    assert said.count(f"{file} does not state transform_input") == (0 if options else 2)
    grey = DataInfo(CLASSES, 32, channels=1)  # which torchvision's own weights do not read
    torch.save(create_model("googlenet", CLASSES, in_chans=1).state_dict(), file)
    student(StudentConfig("googlenet", weights=str(file), options=options), data=grey)
    assert "transform_input" not in capsys.readouterr().out


def test_files_that_state_another_change_of_images_are_named(tmp_path, capsys):
    notes = {"model": "googlenet", "model_options": '{"transform_input": true}'}
    network = create_model("googlenet", CLASSES, transform_input=True).eval()
    file = save_weights(network, tmp_path / "net.safetensors", notes)
    other = create_model("googlenet", CLASSES).eval()
    load_weights(other, file)
    assert f"{file} states transform_input True and its network is built with False" in capsys.readouterr().out
    without = save_weights(other, tmp_path / "none.safetensors", {"model": "googlenet", "num_classes": str(CLASSES)})
    load_weights(other, without)
    assert "transform_input" not in capsys.readouterr().out  # no options are stated where all are the usual ones
    teacher = FrozenTeacher.from_name("googlenet", CLASSES, weights=str(file))
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.network(image), network(image))
    assert "transform_input" not in capsys.readouterr().out


def test_a_checkpoint_with_the_head_of_a_method_is_no_plain_network(tmp_path):
    source = HeadedNetwork(create_model("resnet8", CLASSES), SharedClassifiers(64, [(16, 4, 4)], CLASSES))
    state = {f"student.backbone.{key}": each for key, each in create_model("resnet8", CLASSES).state_dict().items()}
    about = {"model": "resnet8", "method": "ATSC", "head": source.head.description()}
    torch.save({"state_dict": state, "ackd_lightning": about}, tmp_path / "last.ckpt")
    with pytest.raises(ACKDError, match="head of ATSC in place of its own classifier"):
        load_weights(create_model("resnet8", CLASSES), tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("names", "said"),
    [(NAMES, None), (NAMES[::-1], "reordered"), ((*NAMES[1:], "eel"), "'ape'")],
    ids=["same", "reordered", "others"],
)
def test_a_head_follows_the_class_names(tmp_path, capsys, names, said):
    source, file = trained(tmp_path, class_names=json.dumps(names))
    module = student(StudentConfig("resnet8", weights=str(file)), data=replace(DATA, class_names=NAMES))
    fit(module, limit_train_batches=0, limit_val_batches=1)
    rows = module.student.plain().fc.weight
    if said == "'ape'":
        assert not torch.equal(rows, source.fc.weight)
    else:
        assert torch.equal(rows, torch.stack([source.fc.weight[names.index(name)] for name in NAMES]))
    out = capsys.readouterr().out
    assert said is None or said in out
    before = state(module.student)
    fit(module, limit_train_batches=0, limit_val_batches=1)  # once is enough
    assert not differing(before, state(module.student))


def test_layers_of_a_head_before_its_classifier_are_not_reordered(tmp_path):
    torch.manual_seed(5)
    source = create_model("timm:levit_128s", CLASSES)
    names = NAMES[::-1]
    file = save_weights(source, tmp_path / "levit.safetensors", {"class_names": json.dumps(names)})
    network = create_model("timm:levit_128s", CLASSES)
    load_weights(network, file)
    match_head(network, names, NAMES, "a file", (3, 224, 224))
    images = torch.randn(2, 3, 224, 224)
    order = [names.index(each) for each in NAMES]
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), source.eval()(images)[:, order])


class TwoHeads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.first, self.second = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)
        self.form, self.scale = form, nn.Parameter(torch.rand(CLASSES))

    def forward(self, image):
        feature = self.body(image)
        if self.form == "tuple":
            return self.first(feature), self.second(feature)
        if self.form == "sum":
            return self.first(feature) + 2 * self.second(feature.relu())
        if self.form == "shared":
            return self.second(feature) + self.second(feature.relu())
        return self.first(feature) * self.scale if self.form == "scale" else feature @ self.second.weight.T * self.scale


@pytest.mark.parametrize("form", ["tuple", "sum", "shared"])
def test_all_heads_of_a_network_follow_the_class_names(form):
    torch.manual_seed(0)
    network, image = TwoHeads(form).eval(), torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        before = logits_of(network(image))
        match_head(network, NAMES[::-1], NAMES, "a file", (3, SIZE, SIZE))
        torch.testing.assert_close(logits_of(network(image)), before.flip(1))
    before = state(network)
    match_head(network, NAMES, (*NAMES[1:], "eel"), "a file", (3, SIZE, SIZE))
    heads = {"second"} if form == "shared" else {"first", "second"}
    assert {name.partition(".")[0] for name in differing(before, state(network))} == heads
    network.second.weight.requires_grad_(False)
    with pytest.raises(ACKDError, match="second"):
        refuse_frozen_head(network, "a file")


def test_heads_are_tried_on_images_of_the_datas_channels():
    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.stem, self.fc = nn.Conv2d(8, 8, 3), nn.Conv2d(1, 8, 3), nn.Linear(8, CLASSES)

        def forward(self, image):
            return self.fc(self.last(self.stem(image)).mean(dim=(2, 3)))

    network = Grey()
    before = network.fc.weight.clone()
    match_head(network, NAMES[::-1], NAMES, "a file", (1, SIZE, SIZE))
    assert torch.equal(network.fc.weight, before.flip(0))


@pytest.mark.parametrize("names", [NAMES[::-1], ("eel", *NAMES[1:])], ids=["order", "other"])
@pytest.mark.parametrize("form", ["scale", "no layer"])
def test_a_head_that_is_no_layer_is_not_said_to_follow(form, names):
    torch.manual_seed(0)
    network = TwoHeads(form)
    before = state(network)
    with pytest.raises(ACKDError, match="TwoHeads"):
        match_head(network, names, NAMES, "a file", (3, SIZE, SIZE))
    assert not differing(before, state(network))


@pytest.mark.parametrize("name", ["resnet8", "timm:test_efficientnet"])
@pytest.mark.parametrize("known", [True, False], ids=["all", "some"])
def test_a_head_for_more_classes_is_cut_to_those_of_the_data(tmp_path, capsys, name, known):
    names = ("eel", "dog", "cat", "bee", "fox", "ape") if known else ("eel", "dog", "cat", "bee", "fox", "ant")
    source = create_model(name, len(names))
    file = save_weights(source, tmp_path / "six.safetensors", {"class_names": json.dumps(names)})
    module = student(StudentConfig(name, weights=str(file)), data=replace(DATA, class_names=NAMES))
    own, theirs = ((net.fc if name == "resnet8" else net.classifier) for net in (module.student.plain(), source))
    rows = [names.index(each) if each in names else 0 for each in NAMES]
    assert torch.equal(own.weight, theirs.weight[rows]) == known
    out = capsys.readouterr().out
    assert "6" in out
    assert ("by name" in out) == known
    fit(module, limit_train_batches=0, limit_val_batches=1)  # the rows are not matched again
    assert torch.equal(own.weight, theirs.weight[rows]) == known


def test_a_network_of_ones_own_starts_from_a_file(tmp_path):
    source = TinyNet()
    file = save_weights(source, tmp_path / "a.safetensors")
    module = student(StudentConfig(TinyNet(), weights=str(file)))
    assert not differing(state(source), state(module.student.plain()))


@pytest.mark.parametrize(
    ("name", "part"), [("resnet8", "missing.pth"), ("resnet20", "resnet8_4"), ("wrn_16_2", "resnet8_4")]
)
def test_weights_that_do_not_fit_are_refused_in_one_sentence(tmp_path, name, part):
    _, file = trained(tmp_path)
    path = file if part == "resnet8_4" else tmp_path / part
    with pytest.raises(ACKDError, match=part) as caught:
        student(StudentConfig(name, weights=str(path)))
    assert len(str(caught.value).splitlines()) == 1


def test_other_normalisation_is_said(tmp_path, capsys):
    _, file = trained(tmp_path, mean="[0.1, 0.1, 0.1]", std="[0.3, 0.3, 0.3]")
    student(StudentConfig("resnet8", weights=str(file)), data=replace(DATA, mean=(0.5,) * 3, std=(0.3,) * 3))
    assert "[0.1, 0.1, 0.1]" in capsys.readouterr().out


def test_published_weights_start_a_network_with_other_classes(monkeypatch, capsys):
    torch.manual_seed(3)
    source = create_model("timm:mobilenetv3_small_050", 1000)
    monkeypatch.setattr(published, "pretrained", lambda name, options: (source, {"weights": f"{name}.lamb"}))
    module = student(StudentConfig("timm:mobilenetv3_small_050", pretrained=True), data=DataInfo(CLASSES, 32))
    own, theirs = state(module.student.plain()), state(source)
    assert {key for key in own if own[key].shape != theirs[key].shape} == {"classifier.weight", "classifier.bias"}
    assert torch.equal(own["conv_stem.weight"], theirs["conv_stem.weight"])
    assert module.metadata()["started_from"] == {"published": "timm:mobilenetv3_small_050.lamb"}
    assert "1000 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        {"network": "resnet8", "pretrained": True},
        {"network": "", "pretrained": True},
        {"network": TinyNet(), "pretrained": True},
        {"network": "resnet18", "pretrained": True, "weights": "a.pth"},
        {"network": "resnet8", "freeze": "stem"},
        {"network": "resnet8", "backbone_lr_scale": -1.0},
        {"network": "resnet8", "init_branches": "old"},
        {"network": 3},
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(arguments):
    with pytest.raises(ACKDError) as caught:
        student(StudentConfig(**arguments))
    assert len(str(caught.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        (["stem"], ("student.backbone.stem",)),
        (["stem", "stage1"], ("student.backbone.stem", "student.backbone.one")),
        (["two"], ("student.backbone.two",)),
        (["three.0"], ("student.backbone.three.0",)),
        (
            ["stem", "stage1", "stage2", "stage3"],
            tuple(f"student.backbone.{n}" for n in ("stem", "one", "two", "three")),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [CE, ACKD], ids=["ce", "ackd"])
def test_frozen_parts_do_not_move_statistics_included(freeze, still, method):
    module = build(method(), student=StudentConfig(TinyNet(), freeze=freeze))
    before = state(module)
    fit(module)
    moved = differing(before, state(module), "student.backbone.")
    assert {key for key in before if key.startswith("student.backbone.") and not key.startswith(still)} == moved
    if method is ACKD:  # copies of frozen stages learn
        learners = [name for name, _ in module.named_parameters() if name.startswith("student.branches")]
        assert set(learners) <= differing(before, state(module))


def test_the_name_of_a_stage_is_not_that_of_another_module(capsys):
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            inner = TinyNet()
            self.conv, self.stem, self.stage1, self.stage4 = inner.stem, inner.one, inner.two, inner.three
            self.fc = inner.fc

        def forward(self, image):
            return self.fc(self.stage4(self.stage1(self.stem(self.conv(image)))).mean(dim=(2, 3)))

    network = Renamed()
    student(StudentConfig(network, freeze=["stem", "stage1", "stage4.0"]))
    learns = {name for name, each in network.named_children() if any(p.requires_grad for p in each.parameters())}
    assert learns == {"stage1", "stage4", "fc"}
    assert not network.stage4[0].weight.requires_grad
    assert "conv, stem, stage4.0" in capsys.readouterr().out


def test_a_network_that_was_frozen_by_its_owner_keeps_its_statistics():
    network = TinyNet()
    network.one.requires_grad_(False)
    module = student(network)
    before = state(network)
    fit(module)
    assert not differing(before, state(network), "one")
    assert differing(before, state(network), "two")


def test_frozen_parts_with_averaged_weights_and_after_a_validation():
    module = student(StudentConfig(TinyNet(), freeze=["stem"]))
    before = state(module)
    fit(module, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert not differing(before, state(module), "student.backbone.stem")
    module.eval()
    module.train()
    assert module.student.backbone.stem in list(frozen_modules(module))
    assert not module.student.backbone.stem.training
    assert module.student.backbone.one.training


@pytest.mark.parametrize("name", ["stage4", "stm", "one.9", "fc.weight"])
def test_parts_that_do_not_exist_are_refused(name):
    with pytest.raises(ACKDError, match=name.replace(".", r"\.")):
        student(StudentConfig(TinyNet(), freeze=[name]))


def test_nothing_left_to_train_is_refused():
    with pytest.raises(ACKDError, match="nothing to train"):
        student(StudentConfig(TinyNet(), freeze=["stem", "stage1", "stage2", "stage3", "fc"]))


# --------------------------------------------------------------------------------- learning rates and initial branches


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("init", ["fresh", "backbone"])
def test_the_backbone_learns_at_its_own_rate(decay, init):
    config = StudentConfig(TinyNet(), backbone_lr_scale=0.1, init_branches=init)
    module = build(ACKD(), student=config, recipe={"decay_norm_and_bias": decay})
    optimizer = module.optimizer_factory(module.learner_groups())
    module.scale_learning_rates(optimizer)
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    found = {name: round(rates[id(each)] / 0.05, 3) for name, each in module.student.named_parameters()}
    slow = {name for name in found if name.startswith("backbone.") and not name.startswith("backbone.fc")}
    if init == "backbone":
        slow |= {name for name in found if name.startswith("branches.") and ".fc." not in name}
    assert {name for name, rate in found.items() if rate == 0.1} == slow
    assert {name for name, rate in found.items() if rate == 1.0} == set(found) - slow


def test_branches_can_start_from_the_stages_of_the_backbone():
    torch.manual_seed(1)
    network = TinyNet()
    network(torch.randn(4, 3, SIZE, SIZE))
    module = build(ACKD(), student=StudentConfig(network, init_branches="backbone"))
    last, wider = module.student.branches
    assert not differing(state(network.three), state(last.suffix.network.three))
    assert not differing(state(network.two), state(wider.suffix.network.two))
    assert not torch.equal(last.suffix.network.fc.weight, network.fc.weight)
    peer = build(DCM(), student=StudentConfig(network, init_branches="backbone")).student.branches[2]
    for stage in (peer.network.three, peer.branches[0].suffix.network.three, peer.branches[1].suffix.network.three):
        assert not differing(state(network.three), state(stage))
    fresh = build(ACKD(), student=StudentConfig(TinyNet())).student
    assert differing(state(fresh.backbone.three), state(fresh.branches[0].suffix.network.three))


# -------------------------------------------------------------------------------- resume, checkpoints, exports


def test_a_checkpoint_is_loaded_without_the_weights_and_keeps_what_is_frozen(tmp_path):
    _, file = trained(tmp_path, classes=7)
    config = StudentConfig("resnet8", weights=str(file), freeze=["stem", "layer1"], backbone_lr_scale=0.1)
    run = trainer(max_epochs=1)
    module = student(config)
    run.fit(module, datamodule=Blobs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    file.unlink()
    again = DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert not differing(state(module), state(again))
    assert not any(each.requires_grad for each in again.student.plain().conv1.parameters())
    assert again.student_config.freeze == ("stem", "layer1")
    assert again.metadata()["started_from"]["weights"] == "resnet8_7.safetensors"
    before = state(again)
    further = trainer(max_epochs=2)
    further.fit(again, datamodule=Blobs(), ckpt_path=tmp_path / "a.ckpt")
    moved = differing(before, state(again), "student.backbone.")
    assert moved
    assert not [key for key in moved if key.startswith(("student.backbone.conv1", "student.backbone.layer1"))]
    exported = again.save_student(tmp_path / "student.safetensors")
    stated = read_metadata(exported.path)
    assert json.loads(stated["started_from"])["sha256"]
    assert json.loads(stated["frozen"]) == ["stem", "layer1"]
    assert load_student(exported.path).fc.out_features == CLASSES


# ------------------------------------------------------------------- modes and precisions of networks handed over


def test_training_goes_on_from_a_loaded_student(tmp_path):
    _, file = trained(tmp_path, model="resnet8", num_classes=str(CLASSES), input_size="8")
    module = student(load_student(file))
    before = int(module.student.plain().bn1.num_batches_tracked)
    fit(module)
    assert int(module.student.plain().bn1.num_batches_tracked) == before + 8


@pytest.mark.parametrize(
    "prepare", [lambda m: m.eval(), lambda m: m.student.eval(), lambda m: m.student.backbone.eval()]
)
def test_a_module_that_was_used_for_predictions_trains(prepare):
    module = build(ACKD())
    prepare(module)
    before = state(module)
    fit(module)
    assert {key for key in before if "num_batches" in key and key.startswith("student")} <= differing(
        before, state(module)
    )


def test_parts_in_evaluation_mode_on_purpose_stay():
    network = TinyNet()
    network.one.eval()
    before = state(network)
    fit(student(network))
    assert not {key for key in differing(before, state(network), "one") if "running" in key}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_trained_in_float32(capsys, dtype):
    module = student(TinyNet().to(dtype))
    assert str(dtype) in capsys.readouterr().out
    assert {each.dtype for each in module.parameters()} == {torch.float32}
    fit(module)


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))


def inferred():
    with torch.inference_mode():
        return TinyNet()


@pytest.mark.parametrize(
    "make",
    [
        lambda: TinyNet().requires_grad_(False),
        lambda: FrozenTeacher(TinyNet()),
        lambda: TinyNet().to("meta"),
        lambda: nn.DataParallel(TinyNet()),
        lambda: torch.compile(TinyNet()),
        lazy,
        inferred,
    ],
    ids=["frozen", "FrozenTeacher", "meta", "DataParallel", "compiled", "lazy", "inference_mode"],
)
def test_networks_that_cannot_learn_are_refused_in_one_sentence(make):
    with pytest.raises(ACKDError) as caught:
        student(make())
    assert len(str(caught.value).splitlines()) == 1


def test_optimizers_see_no_frozen_parameter():
    module = student(StudentConfig(TinyNet(), freeze=["stem"]), optimizer=functools.partial(AdamW, lr=1e-3))
    held = {id(each) for group in module.learner_groups() for each in group["params"]}
    assert held == {id(each) for each in module.student.parameters() if each.requires_grad}
    assert isinstance(module.optimizer_factory(module.learner_groups()), AdamW)
    assert SGD(module.learner_groups(), lr=0.1)


def test_a_head_that_nothing_can_make_fresh_is_not_said_to_be():
    pytest.importorskip("torchao", reason="extra quantization")
    network = FakeQuantized(create_model("resnet8", 4), "x86", 32, channels=3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ACKDError, match=r"does not know the class 'eel', and it has no layer that can be made fresh"):
        match_head(network, NAMES, (*NAMES[1:], "eel"), "a file", (3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_lightnings_freeze_and_unfreeze_leave_frozen_parts_frozen():
    module = DistillationModule(StudentConfig("resnet8", freeze=("stem",)), method=CE(), data=DataInfo(4, 32))
    before = [each.requires_grad for each in module.parameters()]
    module.freeze()
    module.freeze()  # as often as one likes
    with pytest.raises(ACKDError, match=r"no parameter of the student learns"):
        trainer().fit(module, datamodule=Blobs())
    module.unfreeze()
    assert [each.requires_grad for each in module.parameters()] == before
    assert False in before
    module.unfreeze()  # without freeze, it is Lightning's
    assert all(each.requires_grad for each in module.parameters())


def test_a_fresh_head_cannot_be_frozen(tmp_path):
    save_weights(create_model("resnet8", 10).state_dict(), tmp_path / "s.safetensors", {"model": "resnet8"})
    config = StudentConfig("resnet8", weights=str(tmp_path / "s.safetensors"), freeze=("fc",))
    with pytest.raises(ACKDError, match=r"student.freeze covers 'fc', whose weights are fresh"):
        DistillationModule(config, method=CE(), data=DataInfo(5, 32))
    DistillationModule(config, method=CE(), data=DataInfo(10, 32))


def test_a_head_is_in_the_order_of_the_data_before_any_trainer(tmp_path):
    names = ("a", "b", "c", "d")
    network = create_model("resnet8", 4)
    save_weights(
        network.state_dict(), tmp_path / "s.safetensors", {"model": "resnet8", "class_names": json.dumps(list(names))}
    )
    config = StudentConfig("resnet8", weights=str(tmp_path / "s.safetensors"))
    module = DistillationModule(config, method=CE(), data=DataInfo(4, 32, class_names=names[::-1])).eval()
    image = torch.randn(3, 3, 32, 32)
    assert torch.allclose(module(image).flip(1), network.eval()(image), atol=1e-6)
