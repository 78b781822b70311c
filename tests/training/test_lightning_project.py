"""What other parts of Lightning do with a module: its CLI, its tuner, its fine-tuning callback, hooks and loaders."""

from __future__ import annotations

import copy
import functools
import sys

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader

from ackd_lightning import ACKD, CE, KD, ACKDError, ACKDModule, DataInfo, DistillationModule, Recipe
from ackd_lightning.data.loaders import data_of
from ackd_lightning.methods import CRD, DKD, FitNet, Sum
from training.helpers import DATA, SIZE, Blobs, TinyNet, build, module, trainer

STEPS = functools.partial(MultiStepLR, milestones=[1])


class TestAMethodBelongsToOneModule:
    @pytest.mark.parametrize(
        "make",
        [lambda: ACKD(branches=["D3B1", "D2B2"]), lambda: CRD(negatives=8), lambda: Sum([KD(), CRD(negatives=8)])],
    )
    def test_one_that_holds_tensors_is_refused_by_another_and_left_as_it_is(self, make):
        method = make()
        first = build(method)
        before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
        with pytest.raises(ACKDError, match="belongs to another module"):
            build(method)
        after = first.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_one_without_tensors_is_taken_again(self):
        method = DKD()
        assert build(method).method is build(method).method


class Look(L.Callback):
    """State of optimizer and schedule at the first step."""

    seen: tuple[int, int, float] | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen is None:
            (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
            self.seen = len(optimizer.state), config.scheduler.last_epoch, optimizer.param_groups[0]["lr"]


class TestLearningRate:
    def make(self, **arguments):
        return build(KD(), optimizer=functools.partial(SGD, lr=0.05, momentum=0.9), lr_scheduler=STEPS, **arguments)

    @pytest.mark.parametrize("rate", [None, 0.05, 0.5])
    def test_a_resumed_fit_keeps_its_state_with_a_rate_that_was_set(self, tmp_path, rate, recwarn):
        run = trainer(max_epochs=2)
        run.fit(self.make(), datamodule=Blobs())
        run.save_checkpoint(tmp_path / "a.ckpt")
        tensors = len(run.optimizers[0].state)
        net, look = self.make(), Look()
        resumed = trainer(max_epochs=3, callbacks=[look])
        resumed.validate(net, datamodule=Blobs(), verbose=False)  # as Tuner.lr_find: the module knows the trainer
        if rate is not None:
            net.lr = rate
        resumed.fit(net, datamodule=Blobs(), ckpt_path=tmp_path / "a.ckpt")
        assert look.seen is not None
        assert look.seen[:2] == (tensors, 2)
        assert look.seen[2] == pytest.approx(0.005)
        said = [
            str(each.message)
            for each in recwarn
            if "learning rate of its checkpoint, 0.05, and not with 0.5" in str(each)
        ]
        assert len(said) == (rate == 0.5)
        resumed.save_checkpoint(tmp_path / "b.ckpt")  # and the rate that is used stands in the next one
        assert torch.load(tmp_path / "b.ckpt")["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.05
        assert resumed.optimizers[0].defaults["lr"] == 0.05

    def test_a_rate_that_is_set_inside_a_resumed_fit_is_not_used(self, tmp_path):
        class Sets(L.Callback):  # as LearningRateFinder
            def on_fit_start(self, trainer, pl_module):
                pl_module.lr = 0.5

        run = trainer(max_epochs=1)
        run.fit(self.make(), datamodule=Blobs())
        run.save_checkpoint(tmp_path / "a.ckpt")
        net, look = self.make(), Look()
        resumed = trainer(max_epochs=2, callbacks=[Sets(), look])
        with pytest.warns(UserWarning, match="is not used; set it before the fit"):
            resumed.fit(net, datamodule=Blobs(), ckpt_path=tmp_path / "a.ckpt")
        assert look.seen == (len(run.optimizers[0].state), 1, pytest.approx(0.005))

    def test_a_sub_class_may_keep_a_rate_for_its_own_optimizer(self):
        class Own(DistillationModule):
            def __init__(self, *args, lr=0.3, **kwargs):
                super().__init__(*args, **kwargs)
                self.lr = lr

        net = build(KD(), kind=Own, optimizer=lambda groups: SGD(groups, lr=0.2))
        assert net.lr == 0.3
        run = trainer(max_epochs=1)
        run.fit(net, datamodule=Blobs())
        assert run.optimizers[0].defaults["lr"] == 0.2
        assert (
            build(KD(), kind=Own, optimizer=functools.partial(SGD, momentum=0.9)).optimizer_factory.keywords["lr"]
            == 0.3
        )


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.student.backbone.stem, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.student.backbone.stem, optimizer, lr=0.01, train_bn=False)


def test_a_group_that_is_added_in_the_warm_up_is_warmed_up_too():
    run = trainer(max_epochs=4, callbacks=[Thaw()])
    optimizer = functools.partial(SGD, lr=0.04)
    run.fit(build(KD(), optimizer=optimizer, lr_scheduler=None, recipe=Recipe(warmup_epochs=3)), datamodule=Blobs())
    assert [group["lr"] for group in run.optimizers[0].param_groups] == pytest.approx([0.04, 0.01])


class Seeded(Blobs):
    def __init__(self, seed: int = 42) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_data_module_has_a_seed_of_its_own_in_the_log(tmp_path):
    run = trainer(max_epochs=1, logger=CSVLogger(tmp_path))
    run.fit(build(KD()), datamodule=Seeded())
    assert "seed: 42" in (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()
    assert DistillationModule(TinyNet(), data=DATA, seed=3).hparams["seed"] == 3


class TestHooks:
    class Steps(ACKDModule):
        stepped = 0

        def lr_scheduler_step(self, scheduler, metric):
            self.stepped += 1
            super().lr_scheduler_step(scheduler, metric)

    class Clips(ACKDModule):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            raise NotImplementedError

    def test_schedules_are_stepped_through_the_hook(self):
        net = module(kind=self.Steps)
        run = trainer(max_epochs=2)
        run.fit(net, datamodule=Blobs())
        assert net.stepped == 2 * len(run.optimizers)

    def test_hooks_that_nothing_calls_are_named(self):
        with pytest.warns(UserWarning, match="Clips overrides configure_gradient_clipping, which Lightning does not"):
            module(kind=self.Clips)

    def test_a_network_does_not_hide_behind_a_property(self):
        class Own(DistillationModule):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.teacher = TinyNet()

        with pytest.raises(ACKDError, match=r"teacher is a property of Own; .*\(pass it to the constructor\)"):
            build(KD(), kind=Own)


def several_optimizers() -> L.LightningModule:
    return module()


def one_optimizer() -> L.LightningModule:
    return build(KD())


@pytest.mark.filterwarnings("ignore:.*will be overridden by")
@pytest.mark.parametrize("make", [several_optimizers, one_optimizer])
def test_an_optimizer_of_lightnings_cli(make, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        make,
        Blobs,
        run=False,
        seed_everything_default=0,
        save_config_callback=None,
        args=["--optimizer", "Adam", "--optimizer.lr", "0.01"],
        trainer_defaults={"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False},
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert isinstance(cli.trainer.optimizers[0], Adam)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert len(cli.trainer.optimizers) == 1 + len(cli.model.auxiliary)
    assert ("have optimizers of the method" in capsys.readouterr().out) == bool(cli.model.auxiliary)
    copy.deepcopy(cli.model)


@pytest.mark.parametrize("form", [lambda image: image, lambda image: (image,), lambda image: {"pixel_values": image}])
def test_images_alone_are_predicted(form):
    loader = DataLoader(torch.randn(6, 3, SIZE, SIZE), batch_size=4, collate_fn=lambda each: form(torch.stack(each)))
    found = trainer().predict(build(KD()), loader)
    assert [len(each["prediction"]) for each in found] == [4, 2]
    assert all((each["target"] == -1).all() for each in found)
    with pytest.raises(ACKDError, match=r"target|give"):
        trainer().validate(build(KD()), loader, verbose=False)


@pytest.mark.filterwarnings("ignore:.*`LeafSpec`|.*LeafSpec", "ignore:.*SWALR|.*swa")
def test_a_module_is_tested_after_lightnings_average_of_weights():
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    run, net = trainer(max_epochs=3, callbacks=[average]), build(KD())
    run.fit(net, datamodule=Blobs())
    assert run.test(net, datamodule=Blobs(), verbose=False)[0]["test/acc"] >= 0
    copy.deepcopy(net)


def test_loaders_after_a_data_module_are_not_taken_for_it():
    class Named(Blobs):
        class_names = ("a", "b", "c", "d")
        train_targets = torch.tensor([0] * 61 + [1, 2, 3])

    run = trainer(max_epochs=1)
    run.fit(build(CE()), datamodule=Named())
    run.fit_loop.max_epochs = 2
    net, given = build(CE()), Blobs()
    given.trainer = run
    run.fit(net, given.train_dataloader(), given.val_dataloader())
    assert net.data.class_names is None
    assert data_of(run) is None
    with pytest.raises(ACKDError, match="the classes of the training images are unknown"):
        run.fit(build(CE(), recipe=Recipe(class_weights="auto")), given.train_dataloader(), given.val_dataloader())
    run.validate(net, datamodule=(named := Named()), verbose=False)
    assert data_of(run) is named


class Extra(DistillationModule):
    """A module with a layer that its optimizers are not told about."""

    def __init__(self, **arguments):
        super().__init__(TinyNet(), method=CE(), data=DATA, optimizer=functools.partial(SGD, lr=0.1), **arguments)
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("learns", [True, False])
def test_a_layer_without_an_optimizer_is_named(learns, recwarn):
    net = Extra()
    net.extra.requires_grad_(learns)
    trainer(max_epochs=1).fit(net, datamodule=Blobs())
    said = [str(each.message) for each in recwarn if "no optimizer" in str(each.message)]
    assert len(said) == learns
    assert all("extra.weight and 1 more parameters are in no optimizer" in each for each in said)


def test_a_checkpoint_says_what_was_trained_on_and_not_what_was_asked_last():
    run, net, given = trainer(max_epochs=1), build(CE()), Blobs()
    run.fit(net, datamodule=Blobs())
    given.trainer = run
    run.validate(net, given.val_dataloader(), verbose=False)
    assert net.metadata()["data"] == "Blobs"


def test_a_sub_class_may_have_its_own_end_of_a_fit():
    class Ending(DistillationModule):
        ended = False

        def on_train_end(self):
            self.ended = True

    net = Ending(TinyNet(), method=CE(), data=DATA, optimizer=functools.partial(SGD, lr=0.1))
    trainer(max_epochs=1).fit(net, datamodule=Blobs())
    assert net.ended


class Late(CE):
    project = None

    def forward(self, student, teacher, batch):
        if self.project is None:
            self.project = nn.Linear(2, 2)
        return super().forward(student, teacher, batch)


class Lazy(CE):
    def build(self, networks):
        self.project = nn.LazyLinear(2)


class KeepsWeight(CE):
    def build(self, networks):
        self.weight = networks.student_network.backbone.fc.weight


class KeepsStudent(CE):
    def build(self, networks):
        self.network = networks.student_network


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Late, r"Late has created project.weight in a step, where no optimizer has it; create it in `build`"),
        (Lazy, r"project.weight of method Lazy is lazy; create it in `build`"),
        (KeepsWeight, r"KeepsWeight holds the student's parameters in 'weight'"),
        (lambda: Sum([CE(), KeepsStudent()]), r"KeepsStudent holds the student's parameters in 'network'"),
        (KeepsStudent, r"KeepsStudent holds the student's parameters in 'network'; .*self.keep_outside\('network'"),
    ],
)
def test_layers_that_a_method_creates_elsewhere_are_refused(method, words):
    with pytest.raises(ACKDError, match=words):
        trainer(max_epochs=1).fit(build(method()), datamodule=Blobs())


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("make", [FitNet, lambda: ACKD(branches=["D3B1", "D2B2"])])
def test_layers_of_a_method_are_pruned_by_lightnings_callback(make):
    net = build(make())
    trainer(max_epochs=2, callbacks=[ModelPruning("l1_unstructured", amount=0.3)]).fit(net, datamodule=Blobs())
    zero = torch.cat([each.weight.flatten() == 0 for each in net.method.modules() if isinstance(each, nn.Conv2d)])
    assert 0.1 < float(zero.float().mean()) < 0.5


@pytest.mark.parametrize("command", ["validate", "test"])
def test_one_trainer_evaluates_several_loaders_and_then_one(command):
    run, net, loader = trainer(), build(KD()), Blobs().val_dataloader()
    key = "val/acc" if command == "validate" else "test/acc"
    evaluate = getattr(run, command)
    first = evaluate(net, [loader, loader], verbose=False)[0][key]
    assert [evaluate(net, loader, verbose=False)[0][key] for _ in range(2)] == [first, first]
    assert evaluate(net, [loader, loader], verbose=False)[0][key] == first


class WithDefaults(DistillationModule):
    def __init__(
        self,
        width: int = 4,
        data: DataInfo = DataInfo(4, SIZE),  # noqa: B008  # Lightning's command line reads it
        recipe: Recipe = Recipe(warmup_epochs=1),  # noqa: B008
    ) -> None:
        super().__init__(TinyNet(width), method=CE(), data=data, recipe=recipe)


@pytest.mark.filterwarnings("ignore:.*will be overridden by")
def test_data_and_recipe_are_defaults_on_lightnings_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    defaults = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    cli = LightningCLI(
        WithDefaults,
        Blobs,
        seed_everything_default=0,
        args=["fit", "--model.recipe.label_smoothing", "0.1"],
        trainer_defaults={**defaults, "default_root_dir": str(tmp_path)},
    )
    assert cli.model.recipe == Recipe(warmup_epochs=1, label_smoothing=0.1)
    assert (cli.model.data.num_classes, cli.model.data.input_size) == (4, SIZE)


def test_hooks_that_look_at_all_layers_do_not_stop_the_discriminators():
    net, shapes = build(ACKD(branches=["D3B1", "D2B2"])), []
    for each in net.modules():
        each.register_forward_pre_hook(lambda layer, args: shapes.append(args[0]))
    trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(net, datamodule=Blobs())
    assert shapes
