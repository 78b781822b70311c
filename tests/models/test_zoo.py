from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import StagePlan, staged_forward
from ackd_lightning.models.finding import traced
from ackd_lightning.models.stages import stage_names
from ackd_lightning.models.zoo import count_parameters, create_model, list_models, multiply_adds

GOLDEN = Path(__file__).parents[1] / "golden"
NUMBERS = json.loads((GOLDEN / "models.json").read_text())
KEYS = {
    name: rows for name, rows in json.loads((GOLDEN / "state_dict_keys.json").read_text()).items() if name[0] != "_"
}
RENAMED = {
    "MobileNetV2_0.5": "mobilenetv2_x0_5",
    "MobileNetV2_1.4": "mobilenetv2_x1_4",
    "mobile_half": "mobilenetv2_x0_5",
    "ShuffleV1": "shufflenetv1",
}
CIFAR = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *("resnet8x4", "resnet32x4", "wrn_16_2", "wrn_28_2", "wrn_28_4", "wrn_40_1", "wrn_40_2"),
    *("mobilenetv2_x0_5", "mobilenetv2_x1_0", "mobilenetv2_x1_4", "shufflenetv1"),
)
IMAGENET = tuple(NUMBERS["imagenet_style"])


def on_meta(name: str, num_classes: int, **options: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes, **options)


def run_plan(model: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return F_0 .. F_K and the embedding, and the logits."""
    assert isinstance(model.stage_plan, StagePlan)
    output = staged_forward(model, model.stage_plan, images)
    assert output.features is not None
    assert output.embedding is not None
    return [*output.features, output.embedding], output.logits


def test_list_models_has_each_network_once():
    names = list_models()
    assert names[: len(CIFAR)] == list(CIFAR)
    assert set(IMAGENET) | {"shufflenet_v2_x1_0", "mobilenet_v2"} <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if "fcn" in name or "rcnn" in name or "quantized" in name]


@pytest.mark.parametrize("golden", NUMBERS["cifar"])
def test_parameters_and_multiply_adds_equal_the_golden(golden):
    numbers = NUMBERS["cifar"][golden]
    for num_classes in (100, 10):
        model = on_meta(RENAMED.get(golden, golden), num_classes)
        assert count_parameters(model) == numbers[f"params_{num_classes}_classes"]["RepDistiller"]
        if num_classes == 100:
            assert multiply_adds(model, 32) == numbers["macs_1x3x32x32"]["macs_conv_linear"]
            assert len(model.state_dict()) == numbers["state_dict_entries"]
            assert sum(buffer.numel() for buffer in model.buffers()) == numbers["buffers"]


@pytest.mark.parametrize(("name", "blocks"), [("resnet8x4", 1), ("resnet32x4", 5)])
def test_four_times_wider_resnets_have_the_parameters_of_their_formula(name, blocks):
    expected = 27 * 32 + 2 * 32  # stem and its BatchNorm
    for inputs, outputs in ((32, 64), (64, 128), (128, 256)):
        convolutions = 9 * inputs * outputs + (2 * blocks - 1) * 9 * outputs * outputs + inputs * outputs
        expected += convolutions + (2 * blocks + 1) * 2 * outputs
    assert count_parameters(on_meta(name, 100)) == expected + 257 * 100


@pytest.mark.parametrize("name", IMAGENET)
def test_torchvision_networks_equal_the_golden(name):
    numbers = NUMBERS["imagenet_style"][name]
    model = on_meta(name, 200)
    assert count_parameters(model) == numbers["torchvision_params_200_classes"]
    assert multiply_adds(model, 64) == numbers["macs_1x3x64x64_200cls"]["macs_conv_linear"]
    small = on_meta(name, 200, stem="cifar")
    assert count_parameters(small) == numbers["mdistiller_cifar_stem_params_200"]
    assert multiply_adds(small, 64) == numbers["mdistiller_cifar_stem_macs_64"]["macs_conv_linear"]
    same = on_meta(name, 200, stem="imagenet")
    assert [(key, value.shape) for key, value in same.state_dict().items()] == [
        (key, value.shape) for key, value in model.state_dict().items()
    ]


def test_cifar_stem_keeps_the_resolution_and_its_weights_are_initialised():
    torch.manual_seed(0)
    model = create_model("resnet18", 10, stem="cifar")
    features = model.maxpool(model.relu(model.bn1(model.conv1(torch.randn(2, 3, 32, 32)))))
    assert features.shape == (2, 64, 32, 32)
    assert model.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.1)


@pytest.mark.parametrize("golden", KEYS)
def test_keys_shapes_and_order_equal_the_public_checkpoints(golden):
    model = create_model(RENAMED.get(golden, golden), 100)
    state = model.state_dict()
    assert [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()] == KEYS[
        golden
    ]
    public = {key: torch.ones(shape, dtype=getattr(torch, dtype)) for key, shape, dtype in KEYS[golden]}
    model.load_state_dict(public, strict=True)
    assert all(bool((value == 1).all()) for value in model.state_dict().values())


def forward_golden(golden: str) -> Path:
    """Return the file of a forward golden; the larger one is not shipped."""
    shipped = GOLDEN / f"forward_{golden}.npz"
    if shipped.is_file():
        return shipped
    shared = os.environ.get("ACKD_SHARED")
    file = Path(shared or "ACKD_SHARED") / "golden" / shipped.name
    if shared is None or not file.is_file():
        pytest.skip(f"{file} is missing: set ACKD_SHARED to the folder that holds golden/{shipped.name}")
    return file


@pytest.mark.parametrize("golden", ["resnet20", "mobile_half"])
def test_logits_and_features_equal_the_golden(golden):
    with np.load(forward_golden(golden)) as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    model = create_model(RENAMED.get(golden, golden), 100)
    weights = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}
    model.load_state_dict(weights, strict=True)
    model.eval()
    with torch.no_grad():
        logits = model(arrays["x"])
        *features, embedding = run_plan(model, arrays["x"])[0]
        exact = model.double()(arrays["x"].double())
    torch.testing.assert_close(logits, arrays["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(exact, arrays["logits64"].double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(embedding, arrays["pooled"], atol=1e-4, rtol=0)
    # MobileNetV2's last stage ends after conv2 here, and before it in the golden
    for index, feature in enumerate(features[:4]):
        torch.testing.assert_close(feature[:, :2, :2, :2], arrays[f"feat{index}_slice"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CIFAR)
def test_other_image_sizes_give_logits(name):
    model = on_meta(name, 7)
    images = torch.empty(2, 3, 64, 64, device="meta")
    assert model(images).shape == (2, 7)
    assert run_plan(model, images)[1].shape == (2, 7)


@pytest.mark.parametrize("name", CIFAR)
def test_the_plan_names_the_map_that_is_pooled_and_the_layer_that_reads_it(name):
    torch.manual_seed(0)
    model = create_model(name, 7).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features, logits = run_plan(model, images)
        torch.testing.assert_close(features[-1], features[-2].mean(dim=(2, 3)))
        torch.testing.assert_close(model.get_submodule(model.stage_plan.classifier)(features[-1]), logits)
        assert torch.equal(logits, model(images))


@pytest.mark.parametrize("name", ["resnet8", "resnet32x4", "wrn_16_2", "shufflenetv1", "mobilenetv2_x0_5"])
def test_the_plan_is_what_would_be_found_without_it(name):
    model = on_meta(name, 7)
    copied, _, record = traced(model, 32)
    found = stage_names(copied, record, (32, 32))
    if name == "mobilenetv2_x0_5":  # the paper's four stages; blocks at half of the resolution belong to a stem else
        assert found == ("blocks.1", "blocks.2", "blocks.4", "conv2")
        assert set(found) < set(model.stage_plan.features)
    else:
        assert found == model.stage_plan.features
        assert record.classifier == model.stage_plan.classifier
    assert found[-1] in record.pooled
    assert model.stage_plan.pooled


@pytest.mark.parametrize("golden", NUMBERS["cifar"])
def test_stage_outputs_have_the_shapes_of_the_golden(golden):
    expected = NUMBERS["cifar"][golden]["feature_shapes_RepDistiller_is_feat"]
    model = on_meta(RENAMED.get(golden, golden), 100)
    features, logits = run_plan(model, torch.empty(2, 3, 32, 32, device="meta"))
    shapes = [list(feature.shape) for feature in features]
    if golden.startswith("MobileNetV2"):
        # the golden has an extra feature after stage 1 (12 or 33 channels) and reads the last stage before conv2
        assert shapes[:4] == [expected[f"f{index}"] for index in range(4)]
        assert shapes[4] == [2, expected["f5"][1], *expected["f4"][2:]]
        assert shapes[5] == expected["f5"]
    else:
        assert shapes == list(expected.values())
    assert list(logits.shape) == [2, 100]


@pytest.mark.parametrize("name", CIFAR)
def test_initial_weights_follow_the_published_rule(name):
    torch.manual_seed(0)
    model = create_model(name, 100)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            area = math.prod(module.kernel_size)
            expected = math.sqrt(2 / (area * module.out_channels))
            if name == "shufflenetv1":  # torch's default: uniform within 1 / sqrt(fan_in)
                expected = 1 / math.sqrt(3 * area * module.in_channels / module.groups)
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
    head = model.get_submodule(model.stage_plan.classifier)
    linear = head[0] if isinstance(head, nn.Sequential) else head
    assert bool(linear.bias.any()) is (name.startswith(("resnet", "shufflenet")))
    expected = 0.01 if name.startswith("mobilenet") else 1 / math.sqrt(3 * linear.in_features)
    assert linear.weight.std().item() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "mobilenetv2_x0_5", "shufflenetv1"])
def test_every_parameter_receives_a_gradient(name):
    torch.manual_seed(0)
    model = create_model(name, 5)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()]


def test_shuffle_interleaves_the_groups():
    from ackd_lightning.models.zoo.shufflenetv1 import ShuffleChannels

    channels = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert ShuffleChannels(3)(channels).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(ShuffleChannels(1)(channels), channels)


def test_shuffle_unit_appends_its_pooled_input_to_its_own_channels():
    from ackd_lightning.models.zoo.shufflenetv1 import ShuffleUnit

    torch.manual_seed(0)
    unit, features = ShuffleUnit(24, 240, stride=2).eval(), torch.randn(2, 24, 8, 8)
    pooled = nn.functional.avg_pool2d(features, 3, stride=2, padding=1).relu()
    assert unit(features).shape == (2, 240, 4, 4)
    assert torch.equal(unit(features)[:, 216:], pooled)
    plain, features = ShuffleUnit(240, 240, stride=1).eval(), torch.randn(2, 240, 4, 4)
    nn.init.zeros_(plain.bn3.weight)
    assert torch.equal(plain(features), features.relu())


@pytest.mark.parametrize("outputs", [16, 32])
def test_wide_shortcut_reads_the_activated_input_only_where_channels_change(outputs):
    from ackd_lightning.models.zoo.wide_resnet import PreActivationBlock

    torch.manual_seed(0)
    block, features = PreActivationBlock(16, outputs).eval(), torch.randn(2, 16, 4, 4)
    nn.init.constant_(block.bn1.bias, 0.5)
    nn.init.zeros_(block.conv2.weight)
    expected = features if outputs == 16 else block.convShortcut(block.bn1(features).relu())
    assert torch.equal(block(features), expected)
    assert bool((features < 0).any())


def test_multiply_adds_leaves_the_model_as_it_is():
    model = create_model("resnet8", 10)
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    calls: list[str] = []
    model.layer2.register_forward_hook(lambda *_: calls.append("forward"))
    model.layer2.register_forward_pre_hook(lambda *_: calls.append("pre"))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    macs = multiply_adds(model, 32)
    assert (
        macs
        == 16 * 27 * 1024
        + 2 * 16 * 144 * 1024
        + (16 + 32) * 9 * 32 * 256
        + 16 * 32 * 256
        + (32 + 64) * 9 * 64 * 64
        + (32 * 64 * 64)
        + 640
    )
    assert [module.training for module in model.modules()] == modes
    assert calls == []
    assert [value.requires_grad for value in (model.fc.weight, model.fc.bias)] == [False, True]
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) and after[key].device.type == "cpu" for key in before)


def test_multiply_adds_takes_other_channels_and_dtypes():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 3)).to(torch.bfloat16)
    assert multiply_adds(model, 8, channels=1) == 9 * 4 * 64 + 4 * 64 * 3
    assert count_parameters(model.requires_grad_(False)) == 40 + 771


def test_timm_networks_take_classes_and_options():
    model = create_model("timm:resnet10t", 7, stem_width=16)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert count_parameters(model) != count_parameters(on_meta("timm:resnet10t", 7))


def test_timm_is_imported_only_when_asked_for():
    code = (
        "import sys; from ackd_lightning.models import zoo; zoo.create_model('resnet8', 2);"
        "early = 'timm' in sys.modules; zoo.create_model('timm:resnet10t', 2); print(early, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_side_outputs_give_logits_alone_in_training(name):
    model = on_meta(name, 4)
    assert model.train()(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet21", "'resnet20'"),
        ("MobileNetV2", "'mobilenet_v2'"),
        ("ShuffleNetV1", "'shufflenetv1'"),
        ("resnet18x", "'resnet18'"),
        ("something else", "known are mobilenetv2_x0_5"),
        ("fcn_resnet50", "'fcn_resnet50'"),
        ("timm:resnet10tt", "'resnet10t'"),
        ("timm:zzzzqqq", "timm.list_models()"),
        ("timm:", "named ''"),
        ("vit_tiny_patch16_224", "'timm:vit_tiny_patch16_224'"),
        ("timm/resnet10t", "'timm:resnet10t'"),
        ("lcnet-050", "'timm:lcnet_050'"),
        ("mobilenetv3_small_05", "'timm:mobilenetv3_small_050'"),
        ("resnet10t.c3_in1k", "'timm:resnet10t.c3_in1k'"),
        ("torchvision:ResNet18", "'resnet18'"),
        ("json.Network", "model.student.network.class_path"),
        ("__main__.Network", "model.student.network.class_path"),
        ("timm.models.resnet18", "'resnet18'"),
        ("timm:resnet18.a9_in1k", "'resnet18.a1_in1k'"),
    ],
)
def test_unknown_name_is_answered_with_near_ones(name, said):
    with pytest.raises(ACKDError) as caught:
        create_model(name, 10)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet20", {"stem": "cifar"}, "'stem' is unknown to 'resnet20'"),
        ("resnet18", {"stem": "tiny"}, "'stem' of 'resnet18' is 'tiny'; choose 'imagenet' or 'cifar'"),
        ("vgg11", {"stem": "cifar"}, "'stem' does not apply to 'vgg11'"),
        ("resnet18", {"colour": 1}, "'colour' is unknown to 'resnet18'"),
        ("timm:resnet10t", {"colour": 1}, "'colour' is unknown to 'timm:resnet10t'"),
        ("resnet18", {"weights": "DEFAULT"}, "'weights' of 'resnet18' would download weights"),
        ("timm:resnet10t", {"pretrained": True}, "'pretrained' of 'timm:resnet10t' would download weights"),
    ],
)
def test_bad_option_is_named(name, options, said):
    with pytest.raises(ACKDError, match=r"leave it out|choose") as caught:
        on_meta(name, 10, **options)
    assert said in str(caught.value)


def test_a_type_error_of_another_kind_is_not_hidden():
    with pytest.raises(TypeError, match="unsupported operand"):
        on_meta("resnet50", 10, width_per_group="two")


@pytest.mark.parametrize("num_classes", [0, -3, True, 2.0, "10", None])
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "timm:resnet10t"])
def test_number_of_classes_must_be_a_positive_whole_number(name, num_classes):
    with pytest.raises(ACKDError, match=r"num_classes of .* is "):
        create_model(name, num_classes)
