"""Every trap of manual optimization with several optimizers, one test each."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from ackd_lightning import ACKD, ACKDModule, Recipe
from training.helpers import Blobs, largest_difference, module, state, trainer


def test_global_step_counts_the_student_s_steps_only():
    run = trainer(max_epochs=2)
    run.fit(module(), datamodule=Blobs())
    assert run.global_step == 16


def test_max_steps_and_fast_dev_run_mean_batches():
    run = trainer(max_epochs=-1, max_steps=5)
    run.fit(module(), datamodule=Blobs())
    assert (run.global_step, run.fit_loop.epoch_loop.total_batch_idx + 1) == (5, 5)
    run = trainer(fast_dev_run=3)
    run.fit(module(), datamodule=Blobs())
    assert run.global_step == 3


@pytest.mark.filterwarnings("ignore:.*no pre-optimization state was saved.*")  # in every manual run
def test_checkpoint_every_n_train_steps(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3, filename="{step}")
    trainer(enable_checkpointing=True, callbacks=[saver]).fit(module(), datamodule=Blobs())
    assert sorted(int(path.stem.split("=")[1]) for path in tmp_path.iterdir()) == [3, 6, 9, 12, 15]


def test_ema_averages():
    """With doubled step counts an average every second step would never see an update."""
    net = module()
    before = state(net.student)
    seen: list[int] = []

    class Average(EMAWeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            due = super().should_update(step_idx=step_idx, epoch_idx=epoch_idx)
            seen.extend([step_idx] if due and step_idx is not None else [])
            return due

    average = Average(decay=0.5, update_every_n_steps=2)
    trainer(callbacks=[average]).fit(net, datamodule=Blobs())
    assert len(seen) == 8
    assert largest_difference(before, state(net.student)) > 1e-3


def test_ema_copy_shares_the_teacher():
    net = module()
    average = EMAWeightAveraging(decay=0.9)
    trainer(callbacks=[average], max_steps=2, max_epochs=-1).fit(net, datamodule=Blobs())
    copied = average._average_model.module
    assert copied.teacher.network is net.teacher.network
    assert not [name for name, _ in copied.named_parameters() if "teacher" in name]


def test_both_schedules_step_once_an_epoch(tmp_path):
    logger = CSVLogger(tmp_path)
    net = module(ACKD(discriminator_lr=0.01), decays=[1], lr=0.1)
    run = trainer(max_epochs=2, callbacks=[LearningRateMonitor("epoch")], logger=logger)
    run.fit(net, datamodule=Blobs())
    student, discriminator = run.optimizers
    assert [group["lr"] for group in student.param_groups] == pytest.approx([0.01, 0.001])  # student, attention
    assert discriminator.param_groups[0]["lr"] == pytest.approx(0.001)
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr/student", "lr/attention", "lr/discriminators"} <= set(header)


def test_gradient_clipping_holds_for_both_optimizers():
    norms = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for optimizer in trainer.optimizers:
                grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))

    trainer(max_epochs=1, callbacks=[Watch()]).fit(module(recipe=Recipe(gradient_clip_val=0.01)), datamodule=Blobs())
    assert len(norms) == 16
    assert max(norms) <= 0.01 * 1.001
    assert max(norms) > 0.0099


def test_discriminators_learn_and_the_student_s_loss_leaves_them_alone():
    net = module(ACKD(discriminator_lr=0.1))
    before = state(net.method.discriminators)
    trainer(max_epochs=1).fit(net, datamodule=Blobs())
    assert largest_difference(before, state(net.method.discriminators)) > 1e-4
    assert all(parameter.requires_grad for parameter in net.method.discriminators.parameters())

    gradients = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            gradients["after"] = [p.grad.clone() for p in pl_module.method.discriminators.parameters()]

    class Both(ACKDModule):
        def _auxiliary_step(self, parameters, loss, optimizer):
            super()._auxiliary_step(parameters, loss, optimizer)
            gradients["own"] = [p.grad.clone() for p in self.method.discriminators.parameters()]

    net.__class__ = Both
    trainer(max_epochs=1, limit_train_batches=1, callbacks=[Watch()]).fit(net, datamodule=Blobs())
    assert all(torch.equal(own, after) for own, after in zip(gradients["own"], gradients["after"], strict=True))


def test_one_student_forward_a_step():
    net = module()
    calls = []
    net.student.backbone.stem.register_forward_hook(lambda *_: calls.append(net.training))
    trainer(max_epochs=1, limit_val_batches=0).fit(net, datamodule=Blobs())
    assert calls.count(True) == 8


def test_without_adversary_there_is_one_optimizer():
    net = module(ACKD(adversarial="off"))
    assert net.automatic_optimization
    run = trainer(max_epochs=1)
    run.fit(net, datamodule=Blobs())
    assert (len(run.optimizers), run.global_step) == (1, 8)


def test_manual_optimization_equals_automatic_optimization():
    """Manual optimization by itself changes nothing, bit for bit."""
    first, second = module(ACKD(adversarial="off")), module(ACKD(adversarial="off"))
    second.use_manual_optimization()
    for net in (first, second):
        trainer(max_epochs=3).fit(net, datamodule=Blobs())
    assert largest_difference(state(first), state(second)) == 0.0


def scaled_updates(precision: MixedPrecision | str) -> list[torch.Tensor]:
    net = module(ACKD(discriminator_optimizer="sgd", discriminator_lr=0.1), norm=False)
    options = {"plugins": [precision]} if isinstance(precision, MixedPrecision) else {"precision": precision}
    run = trainer(max_epochs=1, **options)
    run.fit(net, datamodule=Blobs())
    return [p.detach().clone() for p in net.method.discriminators.parameters()]


def test_fp16_gradients_of_the_discriminators_are_unscaled():
    """On the CPU Lightning turns 16-mixed into bfloat16, so the plugin is made by hand. A raw step is off by 65536."""
    plain = scaled_updates("32-true")
    scaled = scaled_updates(MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)))
    assert max(float((a - b).abs().max()) for a, b in zip(plain, scaled, strict=True)) < 0.05
    assert all(torch.isfinite(each).all() for each in scaled)


def test_no_backward_pass_runs_under_autocast():
    """As in automatic optimization: under autocast, operations in float32 would have gradients in half precision."""
    seen = []

    class Watch(ACKD):
        def forward(self, student, teacher, batch):
            assert torch.is_autocast_enabled("cpu")
            terms = super().forward(student, teacher, batch)
            terms["ce"].register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
            return terms

        def auxiliary_loss(self, name, student, teacher, batch):
            loss, values = super().auxiliary_loss(name, student, teacher, batch)
            doubled = loss * 1.0
            doubled.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
            return doubled, values

    trainer(fast_dev_run=True, precision="bf16-mixed").fit(module(Watch()), datamodule=Blobs())
    assert seen == [False, False]


def test_bf16_stays_close():
    plain, half = scaled_updates("32-true"), scaled_updates("bf16-mixed")
    assert max(float((a - b).abs().max()) for a, b in zip(plain, half, strict=True)) < 0.05
