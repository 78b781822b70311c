"""Teachers as people have them: other classes, sizes, types and outputs, several at once, published weights."""

from __future__ import annotations

import copy
import itertools
import json
import warnings

import pytest
import torch
import torchvision.models
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ackd_lightning import DataInfo, DistillationModule, Recipe, TeacherConfig
from ackd_lightning.callbacks.health import ClassOrder, TeacherGate, permutation
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import AT, ATSC, CESKD, CRD, DGKD, DKD, IAKD, KD, OKD, PASM, RKD, SP, Sum
from ackd_lightning.methods.guides import GuidedMethod
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training.teacher_choice import on_meta
from ackd_lightning.training.teachers import Teachers
from ackd_lightning.types import Batch
from training.helpers import CLASSES, DATA, NORMALISED, SIZE, Blobs, TinyNet, sgd, teaching, trainer

NAMES = ("ant", "bee", "cow", "dog")
NAMED = DataInfo(CLASSES, SIZE, class_names=NAMES)


def wide(classes: int) -> TinyNet:
    torch.manual_seed(classes)
    network = TinyNet(8)
    network.fc = nn.Linear(16, classes)
    return network


def built(teacher, *, method=None, data=NAMED, student=None, **options) -> DistillationModule:
    usual = {"optimizer": sgd(0.001), "lr_scheduler": None}
    return DistillationModule(
        student or TinyNet(), method=method or KD(), teacher=teacher, data=data, **usual, **options
    )


def images(data=DATA) -> torch.Tensor:
    return torch.randn(4, *data.image_shape, generator=torch.Generator().manual_seed(5))


def fitted(module, data=None, **options) -> DistillationModule:
    trainer(max_epochs=1, limit_train_batches=2, **options).fit(module, datamodule=data or Blobs())
    return module


# ------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    "given",
    [[5, 3, [0, 1], 2], {"ant": 5, "bee": 3, "cow": [0, 1], "dog": 2}, {0: 5, 1: 3, 2: [0, 1], 3: 2}],
    ids=["list", "names", "numbers"],
)
def test_a_class_map_picks_and_pools(given):
    network = wide(6)
    module = fitted(built(teaching(network, class_map=given)))
    found = module.teachers(images()).logits.softmax(dim=1)
    every = network.eval()(images()).softmax(dim=1)
    groups = torch.stack([every[:, 5], every[:, 3], every[:, 0] + every[:, 1], every[:, 2]], dim=1)
    torch.testing.assert_close(found, groups / groups.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_class_map_in_a_file_goes_into_the_checkpoint(tmp_path, suffix):
    file = tmp_path / f"map.{suffix}"
    file.write_text(json.dumps({"0": 1, "1": 0, "2": 2, "3": 3}))
    weights = save_weights(create_model("resnet8", 6), tmp_path / "six.safetensors")
    config = TeacherConfig("resnet8", weights=str(weights), class_map=str(file), gate="off")
    module = built(config, student="resnet8", data=DataInfo(4, 8))
    file.unlink()
    again = DistillationModule(**module.hparams)
    again.load_teacher()
    again.match_classes(None)
    assert again.teachers.frozen[0].selection.groups == ((1,), (0,), (2,), (3,))
    assert again.teachers(images()).logits.shape == (4, 4)


def test_a_file_of_other_classes_needs_no_count(tmp_path):
    network = create_model("wrn_16_2", 6)
    path = tmp_path / "six.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, path)
    module = built(TeacherConfig("wrn_16_2", weights=str(path), class_map=[0, 1, 2, 5]), data=DataInfo(4, 8))
    module.load_teacher()
    module.match_classes(None)
    torch.testing.assert_close(module.teachers(images()).logits, network.eval()(images())[:, [0, 1, 2, 5]])


@pytest.mark.parametrize(("name", "options"), [("resnet8", {"in_chans": 1}), ("resnet18", {"stem": "cifar"})])
def test_a_file_says_how_its_network_is_built(tmp_path, name, options):
    notes = {"model": name, "model_options": json.dumps(options)}
    path = save_weights(create_model(name, 4, **options), tmp_path / "own.safetensors", notes)
    data = DataInfo(4, 32, channels=options.get("in_chans"))
    teachers = Teachers([TeacherConfig(name, weights=str(path))], data)
    teachers.load()
    assert teachers(images(data)).logits.shape == (4, 4)


@pytest.mark.parametrize("names", [("cow", "ant", "dog", "bee"), ("elk", "dog", "cow", "bee", "ant", "fox")])
def test_classes_that_both_name_are_picked_by_name(names):
    network = wide(len(names))
    module = fitted(built(teaching(FrozenTeacher(network, metadata={"class_names": json.dumps(names)}))))
    places = [names.index(name) for name in NAMES]
    torch.testing.assert_close(module.teachers(images()).logits, network.eval()(images())[:, places])


@pytest.mark.parametrize(
    ("classes", "options", "named"),
    [
        (6, {}, r"6 classes .* 4.*class_map"),
        (3, {}, r"3 classes .* 4.*class_map"),
        (6, {"class_map": [0, 1, 2]}, "3 entries"),
        (6, {"class_map": [0, 1, 2, 6]}, "no class 6"),
        (6, {"class_map": {"ant": 0, "bee": 1, "cow": 2, "elk": 3}}, "'elk'"),
        (6, {"class_map": [0, 1, 2, "fox"]}, "'fox'"),
        (6, {"class_map": "nowhere.yaml"}, r"nowhere\.yaml"),
        (6, {"class_map": 7}, "7"),
    ],
)
def test_other_classes_that_nothing_matches_are_refused_before_a_step(classes, options, named):
    with pytest.raises(ACKDError, match=named):
        fitted(built(teaching(wide(classes), **options)))


@pytest.mark.parametrize("method", [PASM(), OKD(), IAKD(), DGKD(), CESKD()], ids=lambda each: type(each).__name__)
def test_methods_that_run_their_teachers_match_classes(method):
    networks = [wide(6), wide(5)] if isinstance(method, GuidedMethod) else [wide(6)]
    module = fitted(built([teaching(each, class_map=[3, 2, 1, 0]) for each in networks], method=method))
    expected = [network.eval()(images())[:, [3, 2, 1, 0]] for network in networks]
    for teacher, logits in zip(module.teachers, expected, strict=True):
        torch.testing.assert_close(teacher(images()).logits, logits)
    if isinstance(method, GuidedMethod):
        torch.testing.assert_close(method.guide_logits(Batch(images(), None, None)), expected)


def test_a_method_that_reads_the_teachers_own_classes_takes_no_class_map():
    with pytest.raises(ACKDError, match="this method"):
        fitted(built(teaching(wide(4), class_map=[1, 0, 2, 3]), method=ATSC()))


@pytest.mark.parametrize("method", [AT(), RKD(), SP(), CRD()], ids=lambda each: type(each).__name__)
def test_features_alone_teach_across_classes(method):
    from training.helpers import IndexedBlobs

    module = fitted(built(teaching(wide(7), class_map="features"), method=method), IndexedBlobs())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("class_map", [None, "features"])
def test_a_part_that_the_user_keeps_in_evaluation_mode_stays_in_it(class_map):
    module = built(teaching(wide(4), class_map=class_map), method=AT())
    norm = next(each for each in module.student.backbone.modules() if isinstance(each, nn.BatchNorm2d))
    norm.eval()
    fitted(module)
    assert not norm.training
    assert norm.running_mean.abs().sum() == 0


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_loaded_module_with_memories_and_an_average_is_trained_on(decay, tmp_path):
    from training.helpers import IndexedBlobs

    teacher = teaching(create_model("resnet14", CLASSES), gate="off")
    module = built(teacher, method=CRD(negatives=4), student="resnet8", recipe=Recipe(ema_decay=decay))
    fitted(module, IndexedBlobs()).trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = fitted(DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", teacher=teacher), IndexedBlobs())
    assert all(parameter.isfinite().all() for parameter in again.parameters())


@pytest.mark.parametrize("method", [KD(), DKD(), Sum([KD(), AT()])], ids=["kd", "dkd", "sum"])
def test_a_method_that_reads_logits_needs_classes(method):
    with pytest.raises(ACKDError, match="class_map"):
        fitted(built(teaching(wide(7), class_map="features"), method=method))


# ------------------------------------------------------------------ several


def test_logits_of_several_teachers_are_averaged():
    first, second = wide(4), wide(6)
    teachers = [
        teaching(first, ensemble_weight=3.0),
        teaching(second, class_map=[2, 3, 4, 5]),
    ]
    module = fitted(built(teachers))
    expected = 0.75 * first.eval()(images()) + 0.25 * second.eval()(images())[:, 2:]
    torch.testing.assert_close(module.teachers(images()).logits, expected)
    assert module.teachers(images()).features is None


@pytest.mark.parametrize(
    ("teachers", "method", "named"),
    [
        ([wide(4), wide(4)], AT(), "AT"),
        ([teaching(wide(4), ensemble_weight=2.0)], KD(), "ensemble_weight is 2"),
        ([teaching(wide(4), ensemble_weight=2.0), wide(4)], ATSC(), "ensemble_weight is 2"),
    ],
)
def test_what_cannot_be_averaged_is_refused(teachers, method, named):
    with pytest.raises(ACKDError, match=named):
        built(teachers, method=method)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), "much"])
def test_a_weight_is_above_0(weight):
    with pytest.raises(ACKDError, match="ensemble_weight"):
        TeacherConfig("resnet8", ensemble_weight=weight)


# ------------------------------------------------------------------ images


def test_one_teacher_in_two_modules_keeps_what_each_was_told():
    frozen = FrozenTeacher(wide(4), mean=(0.4,) * 3, std=(0.3,) * 3)
    first = built(frozen, data=NORMALISED)
    image = images(NORMALISED)
    before = first.teachers(image).logits
    second = built(frozen, data=DataInfo(CLASSES, SIZE, mean=(0.1,) * 3, std=(0.9,) * 3))
    assert torch.equal(first.teachers(image).logits, before)
    assert not torch.allclose(second.teachers(image).logits, before)
    second.teachers.frozen[0].select_classes([(3,), (2,), (1,), (0,)])
    assert torch.equal(first.teachers(image).logits, before)
    assert second.teacher.network is first.teacher.network is frozen.network


def test_stages_named_by_one_module_stay_out_of_the_other():
    frozen = FrozenTeacher(create_model("resnet8", CLASSES))
    shapes = [each.shape for each in built(frozen, data=NORMALISED).teachers(images(NORMALISED)).features]
    tapped = built(TeacherConfig(frozen, taps=("layer2.0.conv1", "layer3")), data=NORMALISED)
    plain = built(frozen, data=NORMALISED)
    for _ in range(2):
        assert [each.shape for each in plain.teachers(images(NORMALISED)).features] == shapes
        assert len(tapped.teachers(images(NORMALISED)).features) == 3
    assert next(tapped.teacher.network.parameters()) is next(frozen.network.parameters())


@pytest.mark.parametrize("network", [TinyNet(8).half(), TinyNet(8).to(torch.bfloat16), TinyNet(8).double()])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_teacher_in_any_type_teaches(network, precision):
    before = copy.deepcopy(network.state_dict())
    module = fitted(built(teaching(network)), precision=precision)
    assert all(each.isfinite().all() for each in module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    fitted(built(teaching(network), method=AT()), precision=precision)


def test_a_teacher_for_colours_reads_grey_data():
    data = DataInfo(CLASSES, SIZE, (0.5,), (0.5,), channels=1)
    network = TinyNet(8).eval()
    teachers = Teachers([TeacherConfig(network)], data)
    image = images(data)
    torch.testing.assert_close(teachers(image).logits, network(image.expand(-1, 3, -1, -1)))
    assert "repeated 3 times" in teachers.announce()[0]
    assert teachers.announce() == []


def test_what_is_done_is_said_once(capsys):
    module = built(teaching(create_model("resnet8", 4)))
    for _ in range(2):
        fitted(module)
    lines = [line for line in capsys.readouterr().out.splitlines() if "unknown" in line]
    assert len(lines) == 1
    assert "resnet8" in lines[0]


@pytest.mark.parametrize(
    "name", [pytest.param("timm:vit_tiny_patch16_224", marks=pytest.mark.slow), "timm:mixer_s32_224"]
)
def test_a_teacher_with_a_fixed_size_gets_it(name, capsys):
    network = create_model(name, 4)
    module = built(teaching(network), student="resnet8", data=DataInfo(4, 32, (0.4,) * 3, (0.2,) * 3))
    module.match_classes(None)
    assert module.teacher.input_size == (224, 224)
    assert module.teachers(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 4)
    said = capsys.readouterr().out
    assert "224 x 224" in said
    assert name in said
    with pytest.raises(ACKDError, match=f"{name}.*such as 224 x 224"):
        built(teaching(network, input_size=64), student="resnet8", data=DataInfo(4, 32))


# ------------------------------------------------------------------ constructors and outputs


@pytest.mark.parametrize("name", ["regnet_y_400mf", "swin_t", "maxvit_t", "timm:regnety_002", "timm:convnext_atto"])
def test_constructors_that_read_their_tensors_have_a_structure(name):
    network = on_meta(name, 7, None)
    assert all(each.is_meta for each in network.parameters())


@pytest.mark.parametrize("last", [nn.Softmax(dim=1), nn.LogSoftmax(dim=1)])
def test_a_softmax_at_the_end_changes_nothing(last, capsys):
    plain = wide(4)
    module = fitted(built(teaching(nn.Sequential(plain, last))))
    expected = plain.eval()(images()).log_softmax(dim=1)
    torch.testing.assert_close(module.teachers(images()).logits, expected, rtol=1e-4, atol=1e-4)
    assert ("probabilities" in capsys.readouterr().out) == isinstance(last, nn.Softmax)


def test_logits_are_not_taken_for_probabilities():
    for network in (wide(4), nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4), nn.Sigmoid())):
        assert not built(teaching(network)).teacher.gives_probabilities


# ------------------------------------------------------------------ gate


class Oracle(nn.Module):
    """Network that reads the class from the colour, and gives the logits in some order."""

    def __init__(self, order, last=None) -> None:
        super().__init__()
        self.order, self.last, self.scale = order, last or nn.Identity(), nn.Parameter(torch.tensor(3.0))

    def forward(self, image):
        colour = image.mean(dim=(2, 3))
        scores = self.scale * torch.cat([colour, 0.5 - colour.sum(dim=1, keepdim=True)], dim=1)
        return self.last(scores[:, self.order])


class ManyBlobs(Blobs):
    def val_dataloader(self):
        return DataLoader(self._data(1, 200), batch_size=40)


@pytest.mark.parametrize("order", [[1, 2, 3, 0], [1, 0, 2, 3], [3, 2, 1, 0], [2, 1, 0, 3]])
def test_the_gate_asks_for_another_order(order):
    module = built(teaching(Oracle(order), gate="stop"))
    moved = next(place for place, number in enumerate(order) if place != number)
    with pytest.raises(ACKDError, match=r"another order.*class_map") as caught:
        fitted(module, ManyBlobs())
    assert repr(NAMES[moved]) in str(caught.value)
    assert f"teacher.class_map '{[order.index(place) for place in range(4)]}'" in str(caught.value)
    with pytest.warns(UserWarning, match="another order"):
        fitted(built(teaching(Oracle(order), gate="warn")), ManyBlobs())


def test_the_gate_asks_for_another_class_map_in_the_teachers_own_classes():
    given = {NAMES[0]: 3, NAMES[1]: 1, NAMES[2]: 2, NAMES[3]: 0}  # of Oracle([2, 1, 0, 3]), whose class 2 is the first
    module = built(teaching(Oracle([2, 1, 0, 3]), gate="stop", class_map=given))
    with pytest.raises(ACKDError, match="another order") as caught:
        fitted(module, ManyBlobs())
    assert "teacher.class_map '[2, 1, 0, 3]'" in str(caught.value)
    assert f"its class 2 as {NAMES[0]!r}, its class 0 as {NAMES[2]!r}, its class 3 as {NAMES[3]!r}" in str(caught.value)
    assert ClassOrder((1, 0, 2), 1.0).class_map([(4, 5), (3,), (0,)]) == [3, [4, 5], 0]
    assert ClassOrder((1, 0, 2), 1.0).words(None, [(4, 5), (3,), (0,)]) == "its class 3 as 0, its classes 4 and 5 as 1"


def test_the_gate_is_content_with_the_right_order_and_names_no_order_for_noise():
    fitted(built(teaching(Oracle([0, 1, 2, 3]), gate="stop")), ManyBlobs())
    with pytest.raises(ACKDError, match="near chance") as caught:
        fitted(built(teaching(Oracle([0, 0, 0, 0]), gate="stop")), ManyBlobs())
    assert "another order" not in str(caught.value)


def test_what_is_read_of_a_file_with_several_state_dicts_is_said_once(tmp_path, capsys):
    state = create_model("resnet8", 6).state_dict()
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "a.pth")
    config = TeacherConfig(network="resnet8", weights=str(tmp_path / "a.pth"), class_map=[0, 1, 2, 3], gate="off")
    DistillationModule("resnet8", teacher=config, data=DataInfo(4), method=KD()).load_teacher()
    assert capsys.readouterr().out.count("holds several state dicts") == 1


class FewBlobs(ManyBlobs):
    def val_dataloader(self):
        return DataLoader(self._data(1, 4), batch_size=4)


def test_the_gate_says_that_few_images_do_not_tell_a_teacher_from_a_guess():
    module = built(teaching(Oracle([0, 1, 3, 2]), gate="stop"))
    with pytest.warns(UserWarning, match=r"Oracle has accuracy 50\.00%, which guessing may reach on 4 images"):
        fitted(module, FewBlobs())
    fitted(built(teaching(Oracle([0, 1, 2, 3]), gate="stop")), FewBlobs())  # no warning


@pytest.mark.parametrize("gates", [("stop", "warn"), ("stop", "off"), ("warn", "stop")])
def test_every_teacher_has_a_gate_of_its_own(gates, capsys):
    right, wrong = Oracle([0, 1, 2, 3]), Oracle([0, 0, 0, 0])
    module = built([teaching(each, gate=gate) for each, gate in zip((right, wrong), gates, strict=True)])
    if gates[1] == "stop":
        with pytest.raises(ACKDError, match=r"teacher 2 \(Oracle\) .*\(--model\.teacher\.1\.gate warn\)"):
            fitted(module, ManyBlobs())
    elif gates[1] == "warn":
        with pytest.warns(UserWarning, match=r"teacher 2 \(Oracle\) has accuracy .*near chance"):
            fitted(module, ManyBlobs())
    else:
        fitted(module, ManyBlobs())
    said = capsys.readouterr().out
    assert "teacher 1 (Oracle): accuracy" in said
    assert ("teacher 2 (Oracle): accuracy" in said) == (gates[1] != "off")


@pytest.mark.parametrize("classes", [3, 20, 100])
def test_a_guess_is_not_explained_by_an_order(classes):
    generator = torch.Generator().manual_seed(classes)
    halves = [torch.randint(0, 4, (classes, classes), generator=generator) for _ in range(2)]
    assert permutation(*halves) is None
    few = [torch.zeros(classes, classes, dtype=torch.int64) for _ in range(2)]
    assert permutation(*few) is None


def test_the_gate_warns_of_a_sigmoid():
    module = built(teaching(Oracle([0, 1, 2, 3], nn.Sigmoid()), gate="stop"))
    with pytest.warns(UserWarning, match="between 0 and 1"):
        fitted(module, ManyBlobs())


def test_a_gate_skips_a_teacher_of_features(capsys):
    module = fitted(built(teaching(wide(7), class_map="features", gate="stop"), method=AT()))
    assert any(isinstance(each, TeacherGate) for each in module.trainer.callbacks)
    assert "accuracy" not in capsys.readouterr().out
    assert "measured_acc" not in module.teacher.metadata


@pytest.mark.parametrize("method", [CRD(negatives=4, weight_kd=1.0), Sum([AT(), KD()]), Sum([RKD(), SP(), DKD()])])
def test_a_method_that_reads_logits_of_a_teacher_of_features_is_refused_before_the_first_step(method):
    from training.helpers import IndexedBlobs

    module = built(teaching(wide(7), class_map="features", gate="off"), method=method)
    with pytest.raises(ACKDError, match="class_map"):
        fitted(module, IndexedBlobs())
    assert module.trainer.fit_loop.epoch_progress.current.started == 0


# ------------------------------------------------------------------ published weights


@pytest.fixture
def published_file(tmp_path, monkeypatch):
    """Weights in the cache of torchvision, without a network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    torch.manual_seed(0)
    network = create_model("squeezenet1_1", 1000)
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    return network.eval()


def test_published_weights_teach_with_their_own_preprocessing(published_file, capsys):
    data = DataInfo(2, 32, (0.5,) * 3, (0.5,) * 3, class_names=("pets", "tench"))
    config = TeacherConfig("squeezenet1_1", pretrained=True, class_map={"tench": 0, "pets": [281, "n02085620"]})
    module = built(config, student="resnet8", data=data)
    assert capsys.readouterr().out == ""
    module.load_teacher()
    assert "squeezenet1_1" in capsys.readouterr().out.splitlines()[0]
    module.match_classes(None)
    said = capsys.readouterr().out
    assert "3 of its 1000 classes" in said
    assert "224 x 224" in said
    assert module.teacher.input_size == (224, 224)
    image = torch.rand(2, 3, 32, 32)
    assert module.teachers((image - 0.5) / 0.5).logits.shape == (2, 2)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    large = nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True, align_corners=False)
    own = published_file((large - mean) / std)
    tench = own[:, 0]
    pets = own[:, [281, 151]].logsumexp(dim=1)
    torch.testing.assert_close(
        module.teachers((image - 0.5) / 0.5).logits, torch.stack([pets, tench], dim=1), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("names", [("n01440764", "n01443537"), ("goldfish", "Tench")])
def test_classes_of_imagenet_are_found_by_name_and_word(published_file, names):
    data = DataInfo(2, 64, (0.5,) * 3, (0.5,) * 3, class_names=names)
    module = built(TeacherConfig("squeezenet1_1", pretrained=True), student="resnet8", data=data)
    module.load_teacher()
    module.match_classes(None)
    expected = ((0,), (1,)) if names[0].startswith("n") else ((1,), (0,))
    assert module.teacher.selection.groups == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"network": "resnet8", "pretrained": True}, "'resnet8'"),
        ({"network": "resnet18", "pretrained": True, "weights": "a.safetensors"}, "a.safetensors"),
        ({"network": TinyNet(), "pretrained": True}, "pretrained is True"),
        ({"network": None, "pretrained": True}, "network is None"),
        ({"network": "", "pretrained": True}, "pretrained is True .* no network"),
        ({"pretrained": True}, "pretrained is True .* no network"),
        ({"weights": "a.safetensors"}, r"'a\.safetensors' .* no network"),
        ({}, "no network"),
        ({"network": "resnet18", "pretrained": "yes"}, "pretrained is 'yes'"),
    ],
)
def test_published_weights_need_a_network_that_has_them(options, named):
    with pytest.raises(ACKDError, match=named):
        built(TeacherConfig(**options), student="resnet8", data=DataInfo(4, 32))


def test_the_key_of_a_cache_has_all_that_changes_the_logits():
    network = wide(6)

    def key(*configs, data=NORMALISED):
        module = built(list(configs) if len(configs) > 1 else configs[0], data=data)
        module.match_classes(None)
        return json.dumps(module.teachers.key())

    def config(**options):
        return teaching(network, **{"class_map": [0, 1, 2, 3], **options})

    several = [
        key(config()),
        key(config(class_map=[0, 1, 2, 4])),
        key(config(class_map=[0, 1, 2, [3, 4]])),
        key(config(mean=(0.4,) * 3, std=(0.5,) * 3)),
        key(config(input_size=16)),
        key(config(input_size=16, interpolation="nearest")),
        key(config(bf16=True)),
        key(teaching(wide(7), class_map=[0, 1, 2, 3])),
        key(config(), teaching(wide(4))),
        key(config(ensemble_weight=2.0), teaching(wide(4))),
    ]
    assert len(set(several)) == len(several)
    assert key(config()) == several[0]


class FixedBatch(nn.Module):
    """Reads one number of images at a time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.network = count, TinyNet()

    def forward(self, image):
        return self.network(image.reshape(self.count, 3, SIZE, SIZE))


@pytest.mark.parametrize("count", [1, 2, 4, 16])
@pytest.mark.parametrize("exported", [False, True], ids=["own", "torch.export"])
def test_a_teacher_of_a_fixed_number_of_images_is_refused(count, exported):
    teacher = FixedBatch(count).eval()
    if exported:
        teacher = torch.export.export(teacher, (torch.randn(count, 3, SIZE, SIZE),)).module()
    with pytest.raises(ACKDError, match=f"runs on {count}\\b"):
        built(teacher)


def test_an_exported_teacher_of_any_number_of_images_works():
    network, dim = TinyNet().eval(), torch.export.Dim("batch")
    graph = torch.export.export(network, (torch.randn(2, 3, SIZE, SIZE),), dynamic_shapes=({0: dim},)).module()
    fitted(built(teaching(graph, gate="off")))


def test_a_compiled_teacher_is_refused_with_the_network_in_it():
    with pytest.raises(ACKDError, match=r"the teacher is wrapped in OptimizedModule; pass .* teacher\._orig_mod"):
        built(TeacherConfig(network=torch.compile(TinyNet(8)), gate="off"))


# ------------------------------------------------------------------ what the gate reads


class Endless(IterableDataset):
    def __iter__(self):
        yield from itertools.cycle(zip(images(), torch.arange(4), strict=True))


@pytest.mark.parametrize(("form", "images"), [("list", 32), ("dict", 32), ("endless", 16)])
def test_the_gate_reads_what_validation_reads(form, images, monkeypatch):
    judged = []
    monkeypatch.setattr(TeacherGate, "judge", staticmethod(lambda *known: judged.append(known[3])))
    module = built(TeacherConfig(network=TinyNet(8), gate="warn"))
    usual = Blobs()
    run = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=0)
    loader = usual.val_dataloader()
    loaders = {"list": [loader, loader], "dict": {"a": loader, "b": loader}, "endless": DataLoader(Endless(), 16)}
    train = DataLoader(usual._data(0, 16), batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, train, loaders[form])
    assert "measured_acc" in module.teachers.frozen[0].metadata
    assert judged == [images]  # one batch of 16 from each loader


class WithExtraState(TinyNet):
    def get_extra_state(self):
        return {"steps": 3, "scale": torch.ones(2)}

    def set_extra_state(self, state):
        pass


@pytest.mark.filterwarnings("ignore")  # of torch, about its own quantisation
@pytest.mark.parametrize("kind", ["quantised", "extra", "sparse"])
def test_a_teacher_whose_state_holds_more_than_tensors_teaches(kind):
    network = WithExtraState(8) if kind == "extra" else TinyNet(8)
    if kind == "quantised":
        network = torch.ao.quantization.quantize_dynamic(network.eval(), {nn.Linear}, dtype=torch.qint8)
    if kind == "sparse":
        network.register_buffer("mask", torch.eye(3).to_sparse())
    module = fitted(built(teaching(network)))
    assert module.metadata()["teacher_facts"][0]["weights_sha256"]
