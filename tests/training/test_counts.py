"""What a step must not do: wait for a number from the device, read what an earlier step returned, or compile again."""

from __future__ import annotations

import collections
import contextlib
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ackd_lightning
from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import NonFiniteError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods import ACKD, CE, Method
from ackd_lightning.methods.description import from_description
from ackd_lightning.types import NetOutput
from training.helpers import Blobs, IndexedBlobs, game, trainer

FRAGMENTS = sorted((config_folder() / "methods").glob("*.yaml"))
OURS, TORCH = Path(ackd_lightning.__file__).parent, Path(torch.__file__).parent
READING = {
    "_local_scalar_dense",  # item(), bool(), int(), float(), and reads by torch itself
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
"""Operators whose result, or its size, the host must know before it can continue."""
CROSSING = {"tolist", "cpu", "numpy", "tensor", "from_numpy"}
"""Functions that carry values between host and device; on a CPU no operator shows them."""
KNOWN = {
    # Only on a CPU the loss is checked before its backward pass: a GPU copies it without waiting, and checks it later.
    ("training/nonfinite.py", "_which", "tolist"),
    # Only on a CPU, and in the first batch, targets are compared with the classes.
    ("training/batches.py", "_check_range", "_local_scalar_dense"),
    # Adam counts its steps in a tensor that stays on the host.
    ("torch/optim/adam.py", "_single_tensor_adam", "_local_scalar_dense"),
}
"""Reads that no GPU waits for: file, function, what it calls."""
WATCHED = (1, 2)
"""Batches that are watched: the second and the third. In the first step of a fit a method may check its arguments."""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- nothing waits for the device


class Reads(TorchDispatchMode):
    """Count what makes the host wait, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.operators, self.counting = 0, True

    def note(self, what: str) -> None:
        """Add what was called, at the innermost place in our files or in an optimizer of torch."""
        frame = sys._getframe(1)
        while self.counting:
            path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
            if path.is_relative_to(OURS):
                self.found[path.relative_to(OURS).as_posix(), name, what] += 1
                return
            if path.is_relative_to(TORCH / "optim") and name.startswith(("_single_", "_multi_", "_fused_")):
                self.found[path.relative_to(TORCH.parent).as_posix(), name, what] += 1
                return
            assert frame.f_back is not None
            frame = frame.f_back

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.operators += 1
        if name in READING or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None):
            self.note(name)
        elif name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        ):
            self.note(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


class Crossings(TorchFunctionMode):
    """Count copies between host and device, for which a CPU has no operator."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        moved = name == "to" and any(isinstance(each, (str, torch.device)) for each in (*args[1:], *kwargs.values()))
        made = name == "as_tensor" and not isinstance(args[0], torch.Tensor)
        if name in CROSSING or moved or made:
            self.reads.note(name)
        # With a known number of classes torch reads the labels on a CPU only; a GPU checks them while it computes.
        checked = name == "one_hot" and {*args[1:], *kwargs.values()} - {-1}
        counting, self.reads.counting = self.reads.counting, self.reads.counting and not checked
        try:
            return func(*args, **kwargs)
        finally:
            self.reads.counting = counting


class Watch(L.Callback):
    """Watch some steps, from the hooks at their start to those at their end."""

    def __init__(self) -> None:
        self.reads, self.steps, self.modes = Reads(), 0, contextlib.ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in WATCHED:
            self.steps += 1
            self.modes.enter_context(self.reads)
            self.modes.enter_context(Crossings(self.reads))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.modes.close()

    def on_exception(self, trainer, pl_module, exception):
        self.modes.close()


class Reused(L.Callback):
    """Overwrite outputs and gradients of a step when the next one begins, as CUDA graphs do."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.overwritten = 0

    def on_train_start(self, trainer, pl_module):
        method = pl_module.method
        parts = [method.get_submodule(name) for name in method.compile_modules]
        for network in (pl_module.student, *pl_module.teachers.frozen, *parts):
            network.register_forward_hook(lambda _, __, output: self._keep(output))

    def _keep(self, output):
        if isinstance(output, NetOutput):
            self._keep((output.logits, output.features or (), output.embedding, output.branches))
        elif isinstance(output, tuple):
            for each in output:
                self._keep(each)
        elif isinstance(output, torch.Tensor) and output.is_floating_point():
            self.kept.append(output)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        gradients = [each.grad for each in pl_module.parameters() if each.grad is not None]
        for each in (*self.kept, *gradients):
            each.data.fill_(float("nan"))
        self.overwritten += len(self.kept)
        self.kept.clear()


def reads_of(method: Method, folder: Path, *, epoch: int = 0) -> set[tuple[str, str, str]]:
    """Return what makes the host wait in four steps of a fit of 100 epochs that begins in an epoch."""
    watch, reused = Watch(), Reused()
    run = trainer(
        callbacks=[reused, watch],
        logger=CSVLogger(folder),
        max_epochs=100,
        max_steps=4,
        limit_val_batches=0,
        log_every_n_steps=1000,
    )
    for name in ("ready", "started", "processed", "completed"):
        setattr(run.fit_loop.epoch_progress.current, name, epoch)
    net = game(method, lr=0.01)
    with pytest.warns(UserWarning, match="log_every_n_steps"):
        run.fit(net, datamodule=IndexedBlobs())
    assert watch.steps == len(WATCHED)
    assert reused.overwritten > 0
    assert all(each.isfinite().all() for each in net.state_dict().values())
    assert run.callback_metrics["train/loss"].isfinite()
    assert watch.reads.operators > 100
    return set(watch.reads.found)


@pytest.mark.parametrize("epoch", [0, 50], ids=["first epoch", "middle"])
@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_no_step_waits_for_the_device(path, epoch, tmp_path):
    found = reads_of(from_description(read_config(path)["model"]["method"]), tmp_path, epoch=epoch)
    assert ("training/nonfinite.py", "_which", "tolist") in found  # so the watch works
    assert found - KNOWN == set()


class Keeping(CE):
    """Cross-entropy that reads the logits of the step before."""

    last: torch.Tensor | None = None

    def forward(self, student, teacher, batch):
        loss = cross_entropy(student.logits, batch.target)
        before, self.last = self.last, student.logits.detach()
        return {"ce": loss if before is None else loss + before.mean()}


def test_what_is_kept_of_a_step_is_found(tmp_path):
    with pytest.raises(NonFiniteError):
        reads_of(Keeping(), tmp_path)


class Asking(CE):
    """Cross-entropy that reads something from the device in every step."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, student, teacher, batch):
        self.ask(student.logits.detach(), batch.target)
        return {"ce": cross_entropy(student.logits, batch.target)}


@pytest.mark.filterwarnings("ignore:Attribute 'method' removed from hparams")  # a lambda goes into no checkpoint
@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda logits, target: logits.sum().item(), "_local_scalar_dense"),
        (lambda logits, target: bool(logits.sum() > 0), "_local_scalar_dense"),
        (lambda logits, target: [0, 1][target.clamp(max=1)[0]], "_local_scalar_dense"),
        (lambda logits, target: nn.functional.one_hot(target), "_local_scalar_dense"),
        (lambda logits, target: torch.equal(target, target), "equal"),
        (lambda logits, target: logits[logits > 0], "index with a mask"),
        (lambda logits, target: logits.masked_select(logits > 0), "masked_select"),
        (lambda logits, target: target.unique(), "_unique2"),
        (lambda logits, target: target.repeat_interleave(target), "repeat_interleave"),
        (lambda logits, target: logits.tolist(), "tolist"),
        (lambda logits, target: logits.cpu(), "cpu"),
        (lambda logits, target: logits * torch.tensor([2.0], device=logits.device), "tensor"),
    ],
)
def test_the_watch_finds_what_waits(ask, what, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "OURS", Path(__file__).parent)  # the method is in this file
    found = reads_of(Asking(ask), tmp_path)
    assert what in {called for file, _, called in found if file == Path(__file__).name}


# ---------------------------------------------------------------- networks are compiled once


class Graphs(L.Callback):
    """Count the graphs of torch's compiler: when the second epoch begins, and at the end."""

    def __init__(self) -> None:
        from torch._dynamo.utils import counters  # takes seconds

        self.so_far = counters["stats"]
        self.before, self.counts = self.so_far["unique_graphs"], list[int]()

    def _count(self) -> None:
        self.counts.append(self.so_far["unique_graphs"] - self.before)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self._count()

    def on_fit_end(self, trainer, pl_module):
        self._count()


@pytest.fixture
def compiler(monkeypatch):
    """Torch's compiler without the code generation, which takes a minute and does not change what is compiled."""
    inner = nn.Module.compile

    def without_code(self, *arguments, **options):
        inner(self, *arguments, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", without_code)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks
def test_the_second_epoch_and_its_validation_compile_nothing(compiler):
    graphs = Graphs()
    trainer(callbacks=[graphs], max_epochs=2).fit(game(ACKD(), compile=True), datamodule=Blobs(count=16))
    first, last = graphs.counts
    assert first > 0
    assert last == first
