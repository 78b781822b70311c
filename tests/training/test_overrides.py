"""Sub-classes of the training modules with hooks of their own, and modules inside other modules."""

from __future__ import annotations

import functools

import lightning.pytorch as L
import pytest
import torch

from ackd_lightning import ACKDModule, DistillationModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACKD, CE, DKD, KD
from training.helpers import Blobs, build, trainer


class Memories(DistillationModule):
    def on_after_backward(self):
        self.seen = True


class Epochs(ACKDModule):
    def on_train_batch_start(self, batch, batch_idx):
        return None


class Gate(DistillationModule):
    def configure_callbacks(self):
        return []


class Teachers:
    """A mixin, whose hook stands before the module's."""

    def setup(self, stage):
        self.stage = stage


class Mixed(Teachers, DistillationModule):
    pass


class Elsewhere(DistillationModule):
    def on_train_batch_start(self, batch, batch_idx):
        super().train()  # and not the hook


@pytest.mark.parametrize("kind", [Memories, Epochs, Gate, Mixed, Elsewhere])
def test_hooks_that_leave_out_what_the_module_does_are_refused(kind):
    with pytest.raises(ACKDError, match=r"super\(\)"):
        build(CE() if kind is not Epochs else None, kind=kind, **({"teacher": None} if kind is not Epochs else {}))


def logged(hook):
    @functools.wraps(hook)
    def wrapper(self, *arguments):
        self.calls.append(hook.__name__)
        return hook(self, *arguments)

    return wrapper


class Careful(DistillationModule):
    calls: list[str] = []  # noqa: RUF012

    @logged
    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)

    def on_after_backward(self):
        DistillationModule.on_after_backward(self)

    def on_train_epoch_start(self):  # the module does nothing there
        self.calls.append("on_train_epoch_start")

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def test_hooks_that_call_those_of_the_module_are_run():
    module = build(DKD(), kind=Careful)
    trainer(max_epochs=1, limit_train_batches=1).fit(module, datamodule=Blobs())
    assert module.calls == ["on_train_epoch_start", "on_train_batch_start"]


class Around(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = build(CE(), teacher=None)

    def training_step(self, batch, batch_idx):
        return self.inner.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return self.inner.configure_optimizers()


class Uses(Around):
    """The module as a network alone, with a loss of one's own."""

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.inner(batch[0]), batch[1])


def test_a_module_inside_another_is_refused_where_its_hooks_are_needed():
    loader = Blobs().val_dataloader()
    with pytest.raises(ACKDError, match="DistillationModule is inside Around"):
        trainer(max_epochs=1).fit(Around(), loader)
    fitted = trainer(max_epochs=1)
    fitted.fit(Uses(), loader)
    assert fitted.global_step == len(loader)


def test_a_step_of_ones_own_is_refused_where_the_method_steps_its_optimizers():
    class Plain(ACKDModule):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum()

    class Passing(ACKDModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    with pytest.raises(ACKDError, match=r"Plain\.training_step returns a loss that nothing reads"):
        build(ACKD(), kind=Plain)
    build(ACKD(), kind=Passing)
    build(KD(), kind=Plain)  # automatic optimization reads it
