from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import matplotlib as mpl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image

from ackd_lightning import ACKDError, DataInfo, DistillationModule
from ackd_lightning.callbacks.examples import ExamplePictures, draw_examples
from ackd_lightning.methods.acn import ACN
from ackd_lightning.types import Examples
from training.helpers import CLASSES, SIZE, Blobs, TinyNet, milestones, sgd, trainer

NAMES = ("red", "$\\gre}en$", "blue", "an animal with a very long name")


def module(**arguments: Any) -> DistillationModule:
    torch.manual_seed(0)
    method = ACN(**{"warmup_epochs": 0, "generator_width": 4, **arguments})
    data = DataInfo(CLASSES, SIZE, mean=(0.25,) * 3, std=(0.5,) * 3)
    return DistillationModule(TinyNet(), method=method, data=data, optimizer=sgd(), lr_scheduler=milestones(9))


def fit(net: DistillationModule, *callbacks: L.Callback, epochs: int = 1, **options: Any) -> L.Trainer:
    data = Blobs(batch_size=16, count=16)
    run = trainer(max_epochs=epochs, callbacks=list(callbacks), **options)
    run.fit(net, datamodule=data)
    return run


def pictures(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def examples(count: int = 5, side: int = 8) -> Examples:
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(count, 3, side, side, generator=generator)
    made = original.clone()
    made[0, :, :4] = 1.0
    target = torch.arange(count) % 4
    answers = torch.randint(4, (2, 2, count), generator=generator)
    return Examples(original, made, {"0 student": answers[0], "1 peer": answers[1]}, target)


# -------------------------------------------------------------------------------------------------------- drawing


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes())).view(image.height, image.width, 3)


@pytest.mark.parametrize("count", [1, 5])
def test_the_picture_has_its_size_and_shows_the_images(tmp_path, count):
    target = tmp_path / "sub" / "picture.png"
    drawn = examples(count)
    flat = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1).expand(count, 3, 8, 8)
    normalised = (flat - 0.25) / 0.5
    draw_examples(
        Examples(normalised, normalised, drawn.predictions, drawn.target), target, mean=(0.25,) * 3, std=(0.5,) * 3
    )
    shown = pixels(target)
    height, width = 0.4 + 3 * 1.7 + 0.2 + 0.125 * 7, 1.0 + count * 1.7
    assert abs(shown.shape[0] - 100 * height) <= 1
    assert abs(shown.shape[1] - 100 * width) <= 1
    side = round(0.95 * 1.7 * 100)
    same = (shown == torch.tensor([255, 0, 127])).all(dim=2) | (shown == torch.tensor([255, 0, 128])).all(dim=2)
    assert same.sum().item() == pytest.approx(2 * count * side * side, rel=0.05)  # original and made: equal here
    grey = ((shown - 127.5).abs() <= 1).all(dim=2)
    assert grey.sum().item() == pytest.approx(count * side * side, rel=0.05)  # so their difference is grey


def test_the_difference_is_scaled_to_black_and_white(tmp_path):
    side = round(0.95 * 1.7 * 100)
    base = torch.full((1, 3, 8, 8), 0.5)
    made = base.clone()
    made[:, :, :4] += 0.01
    made[:, :, 4:] -= 0.01
    answers = torch.zeros(2, 1, dtype=torch.int64)
    path = tmp_path / "picture.png"
    draw_examples(Examples(base, made, {"one": answers}, answers[0]), path, mean=(0.0,) * 3, std=(1.0,) * 3)
    lower = pixels(path)[340 + 40 : 340 + 40 + side, 110 : 100 + side - 10]
    white, black = ((lower == value).all(dim=2).sum().item() for value in (255, 0))
    assert white > 0.4 * side * (side - 20)
    assert black > 0.4 * side * (side - 20)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_other_channels_and_unknown_normalisation_are_drawn(tmp_path, channels):
    image = 40 * torch.randn(2, channels, 6, 9) - 10
    answers = torch.zeros(2, 2, dtype=torch.int64)
    draw_examples(Examples(image, image, {"one": answers}, answers[0]), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").is_file()


def test_drawing_leaves_matplotlib_alone(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    before, backend = dict(mpl.rcParams), mpl.get_backend()
    draw_examples(examples(), tmp_path / "picture.png", title="a title", names=NAMES)
    assert plt.get_fignums() == []
    assert mpl.get_backend() == backend
    assert dict(mpl.rcParams) == before


# ------------------------------------------------------------------------------------------------------- callback


def test_pictures_come_every_few_epochs_and_after_the_last(tmp_path):
    net = module()
    net.configure_callbacks = lambda: []
    fit(net, ExamplePictures(every_n_epochs=2, count=3), epochs=5, logger=CSVLogger(tmp_path, name="", version="run"))
    assert pictures(tmp_path) == [f"run/examples/epoch-00{epoch}.png" for epoch in (2, 4, 5)]
    with Image.open(tmp_path / "run/examples/epoch-005.png") as image:
        assert image.width == 100 + 3 * 170


def test_the_module_brings_the_callback(tmp_path):
    fit(module(), logger=CSVLogger(tmp_path, name="", version="run"), epochs=1)
    assert pictures(tmp_path) == ["run/examples/epoch-001.png"]


def test_without_a_run_folder_nothing_is_drawn(tmp_path, monkeypatch):
    """As in a script with ``logger=False``: no picture in the folder that it was started from."""
    monkeypatch.chdir(tmp_path)
    fit(module(), epochs=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:method ACN generates no images")
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"warmup_epochs": 3}, {}),
        ({"weight_generated": 0.0}, {}),
        ({}, {"fast_dev_run": True}),
        ({}, {"limit_val_batches": 0}),
    ],
    ids=["warm-up", "dml", "fast_dev_run", "no validation"],
)
def test_nothing_is_drawn_while_nothing_is_made(tmp_path, arguments, options):
    fit(module(**arguments), ExamplePictures(every_n_epochs=1), epochs=2, default_root_dir=tmp_path, **options)
    assert pictures(tmp_path) == []


def test_nothing_is_drawn_in_the_sanity_check_or_outside_of_a_fit(tmp_path):
    net, callback = module(), ExamplePictures(every_n_epochs=1)
    asked = []
    net.method.examples = asked.append
    run = trainer(
        max_epochs=1, callbacks=[callback], num_sanity_val_steps=2, limit_train_batches=0, default_root_dir=tmp_path
    )
    run.fit(net, datamodule=Blobs(batch_size=16, count=16))
    run.validate(net, datamodule=Blobs(batch_size=16, count=16), verbose=False)
    assert asked == []
    assert pictures(tmp_path) == []


def test_only_the_first_process_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda _: False))
    fit(module(), ExamplePictures(every_n_epochs=1), default_root_dir=tmp_path)
    assert pictures(tmp_path) == []


def test_training_is_the_same_with_and_without_pictures(tmp_path):
    states, drawn = [], []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            drawn.append(torch.get_rng_state())

    for often in (1, 2):
        net = module()
        net.configure_callbacks = lambda: []
        data = Blobs(batch_size=16, count=32)
        options = {"default_root_dir": tmp_path / str(often), "limit_val_batches": 1}
        run = trainer(max_epochs=3, callbacks=[ExamplePictures(every_n_epochs=often, count=2), Watch()], **options)
        run.fit(net, datamodule=data)
        states.append(copy.deepcopy(net.state_dict()))
    assert len(pictures(tmp_path / "1")) == 3
    assert len(pictures(tmp_path / "2")) == 2
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert all(torch.equal(first, second) for first, second in zip(drawn[:3], drawn[3:], strict=True))


def test_weights_and_biases_gets_the_picture(tmp_path, monkeypatch):
    sent = []
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    monkeypatch.setattr(WandbLogger, "log_image", lambda _, **given: sent.append(given))
    for name in ("log_metrics", "log_hyperparams", "finalize"):
        monkeypatch.setattr(WandbLogger, name, lambda *_, **__: None)
    monkeypatch.setattr(WandbLogger, "experiment", None)
    net = module()
    net.configure_callbacks = lambda: []
    fit(net, ExamplePictures(), logger=[CSVLogger(tmp_path, name="", version="run"), logger])
    path = tmp_path / "run" / "examples" / "epoch-001.png"
    assert path.is_file()
    assert sent == [{"key": "examples", "images": [str(path)], "step": 1}]


@pytest.mark.parametrize("name", ["every_n_epochs", "count"])
def test_bad_arguments_are_refused(name):
    with pytest.raises(ACKDError, match=f"{name} is 0"):
        ExamplePictures(**{name: 0})
