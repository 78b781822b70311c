"""One measurement of a training run: through the Trainer, as a bare loop, and as that loop with a stopwatch."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch import Tensor, nn

from ackd_lightning.callbacks.checkpoints import RunCheckpoint
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import Execution, in_our_words
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.models.freezing import frozen
from ackd_lightning.models.zoo.complexity import multiply_adds
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.training.speed import keep_freed_memory
from timing.machine import MATRIX, busy_share, machine, matrix_peak, matrix_type, resident_bytes, wait
from timing.synthetic import give_cache, give_weights, usable

PARTS = {
    "data": "data: loader, augmentation",
    "teacher": "teacher forward",
    "student": "student forward",
    "auxiliary": "steps of the auxiliary optimizers",
    "terms": "terms of the loss",
    "backward": "backward",
    "optimizer": "optimizer",
    "other": "rest",
}
"""Parts of a step that the stopwatch separates, with their printed names."""


class BenchRun:
    """A fit that is built as ``ackd fit`` builds it, except for checkpoints, missing data and missing weights.

    Args:
        arguments: Command line of ``ackd fit``.
        folder: Folder for everything that the run writes.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.notes: list[str] = []
        cli = ACKDCLI("fit", arguments)
        L.seed_everything(cli.option("seed_everything"), workers=True)
        cli.build()
        give_weights(cli.model, folder, self.notes)
        cli.datamodule = usable(cli.datamodule, self.notes)
        cli.folder = folder / "runs" / "bench" / "run"
        self.trainer = Execution(cli).make_trainer()
        self.trainer.callbacks[:] = [each for each in self.trainer.callbacks if not isinstance(each, RunCheckpoint)]
        self.model, self.datamodule = cli.model, cli.datamodule
        self.keeps_memory = isinstance(self.trainer.accelerator, CPUAccelerator) and keep_freed_memory()


class Clock:
    """Stopwatch for the parts of a step; on a GPU it waits for the end of each part.

    Args:
        device: Device that computes.
        running: Whether to measure; a clock that does not run costs nothing.
    """

    def __init__(self, device: torch.device, *, running: bool) -> None:
        self.device, self.running = device, running
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside the context to a part.

        Args:
            name: Key of ``PARTS``.
        """
        if not self.running:
            yield
            return
        begin = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[name] += time.perf_counter() - begin


class Timed(nn.Module):
    """A network with a stopwatch around its forward pass; the network itself, compiled or not, is unchanged.

    Args:
        network: Network to time.
        clock: Stopwatch.
        part: Key of ``PARTS``.
    """

    def __init__(self, network: nn.Module, clock: Clock, part: str) -> None:
        super().__init__()
        self.network, self.clock, self.part_name = network, clock, part

    def forward(self, image: Tensor) -> Any:
        """Output of the network."""
        with self.clock.part(self.part_name):
            return self.network(image)


class BareLoop:
    """The steps of a run without Lightning: the same loader, networks, terms and optimizers.

    Args:
        run: Run whose fit has ended, so that everything is set up.
    """

    def __init__(self, run: BenchRun) -> None:
        self.run, self.trainer = run, run.trainer
        self.device = run.trainer.strategy.root_device
        self.module: DistillationModule = run.model.to(self.device)
        (self.optimizer, *others), _ = self.module.configure_optimizers()
        self.auxiliary: dict[str, torch.optim.Optimizer] = dict(zip(self.module.auxiliary, others, strict=True))
        self.raw = self._endless(run.datamodule.train_dataloader())

    @staticmethod
    def _endless(loader: Any) -> Iterator[Any]:
        while True:
            yield from loader

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch

    def step(self, clock: Clock) -> None:
        """One step: batch, forward passes, auxiliary optimizers, terms, backward, optimizer.

        Args:
            clock: Stopwatch around the parts.
        """
        module, method = self.module, self.module.method
        with clock.part("data"):
            batch = module.as_batch(self.trainer.strategy.batch_to_device(next(self.raw)))
        with self.trainer.precision_plugin.forward_context():
            student, teacher = module.outputs(batch)
            for name, optimizer in self.auxiliary.items():
                with clock.part("auxiliary"):
                    if (result := method.auxiliary_loss(name, student, teacher, batch)) is not None:
                        optimizer.zero_grad()
                        self._backward(result[0])
                        optimizer.step()
            with frozen(each for parameters in module.auxiliary.values() for each in parameters):
                with clock.part("terms"):
                    loss = weighted_loss(method, method(student, teacher, batch))
                with clock.part("backward"):
                    self.optimizer.zero_grad()
                    self._backward(loss)
            with torch.no_grad(), clock.part("terms"):
                method.update(student, teacher, batch)
        with clock.part("optimizer"):
            module.on_before_optimizer_step(self.optimizer)
            self.optimizer.step()

    def seconds(self, steps: int, *, warmup: int) -> float:
        """Mean seconds of one step.

        Args:
            steps: Number of measured steps.
            warmup: Number of steps before them.
        """
        clock = Clock(self.device, running=False)
        for _ in range(warmup):
            self.step(clock)
        wait(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(clock)
        wait(self.device)
        return (time.perf_counter() - begin) / steps

    def split(self, steps: int) -> dict[str, float]:
        """Mean seconds of every part of one step.

        Args:
            steps: Number of measured steps.
        """
        clock = Clock(self.device, running=True)
        student, teachers = self.module.student, self.module.teachers.frozen
        self.module.student = Timed(student, clock, "student")  # type: ignore[assignment]  # until the end of the measurement
        self.module.teachers.frozen = tuple(Timed(each, clock, "teacher") for each in teachers)  # type: ignore[misc]
        try:
            wait(self.device)
            begin = time.perf_counter()
            for _ in range(steps):
                self.step(clock)
            total = time.perf_counter() - begin
        finally:
            self.module.student, self.module.teachers.frozen = student, teachers
        clock.seconds["other"] = max(0.0, total - sum(clock.seconds.values()))
        return {name: value / steps for name, value in clock.seconds.items()}


def _graphs() -> int:
    """Number of graphs that torch.compile has made in this process so far."""
    loaded = sys.modules.get("torch._dynamo.utils")  # not imported here: that takes seconds and compiles nothing
    return int(loaded.counters["stats"]["unique_graphs"]) if loaded else 0


def _traced(trace: torch.profiler.profile) -> float | None:
    """Busy share of the GPU in a trace."""
    events = [each for each in trace.events() or () if each.device_type == torch.autograd.DeviceType.CUDA]
    return busy_share([(each.time_range.start, each.time_range.end) for each in events])


def _through_trainer(
    run: BenchRun, *, warmup: int, steps: int, trace: int
) -> tuple[float, dict[str, int], float | None]:
    """Mean seconds from the start of one step to the start of the next inside a fit.

    Also the number of graphs that were compiled before and during the timed steps, and the busy share of a GPU in
    ``trace`` more steps.
    """
    trainer, module = run.trainer, run.model
    device, starts, graphs = trainer.strategy.root_device, list[float](), [_graphs()]
    kinds = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=kinds)
    inner: Callable[[Any, int], None] = module.on_train_batch_start

    def at_start(batch: Any, batch_idx: int) -> None:
        if len(starts) in (warmup, warmup + steps):
            wait(device)
            graphs.append(_graphs())
        if trace and len(starts) == warmup + steps:
            profiler.start()
        if trace and len(starts) == warmup + steps + trace:
            wait(device)
            profiler.stop()
        starts.append(time.perf_counter())
        inner(batch, batch_idx)

    module.on_train_batch_start = at_start
    try:
        trainer.fit(module, datamodule=run.datamodule)
    finally:
        del module.on_train_batch_start
    if len(starts) <= warmup + steps + trace:
        raise ACKDError(
            f"the fit ended after {len(starts)} of {warmup + steps + trace + 1} steps; leave out the settings that "
            "shorten it"
        )
    seconds = (starts[warmup + steps] - starts[warmup]) / steps
    counts = {"before": graphs[1] - graphs[0], "timed": graphs[2] - graphs[1]}
    return seconds, counts, _traced(profiler) if trace else None


def _middle_epoch(run: BenchRun, *, steps: int) -> int:
    """Start the fit in the middle of its schedule, after the warm-ups of the methods."""
    loop = run.trainer.fit_loop
    if loop.max_epochs is None or loop.max_epochs < 1:
        return 0
    epoch = loop.max_epochs // 2
    loop.max_epochs = max(loop.max_epochs, epoch + steps)  # an epoch of few images may have a single step
    for name in ("ready", "started", "processed", "completed"):
        setattr(loop.epoch_progress.current, name, epoch)
    return epoch


def measure(arguments: Sequence[str], *, warmup: int, steps: int, trace: int = 0) -> dict[str, Any]:
    """Measure one run in this process.

    Args:
        arguments: Command line of ``ackd fit``.
        warmup: Number of steps before the timed ones.
        steps: Number of timed steps of each kind.
        trace: Number of steps after those of the Trainer whose kernels on a GPU are recorded.

    Returns:
        Plain data: seconds, images per second, bytes, multiply-adds, and what they were measured on.

    Raises:
        ACKDError: When a setting is wrong.
    """
    length = warmup + steps + trace + 1
    limits = {"max_steps": length, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    fixed = [part for key, value in limits.items() for part in (f"--trainer.{key}", str(value))]
    with tempfile.TemporaryDirectory(prefix="ackd-bench-") as folder, in_our_words():
        run = BenchRun(["--trainer.devices", "1", *arguments, *fixed, "--weights_dir", "null"], Path(folder))
        if run.trainer.world_size > 1:
            raise ACKDError(
                f"the benchmark measures one device, not {run.trainer.world_size}; leave out devices and num_nodes"
            )
        run.model.load_teacher()
        device = run.trainer.strategy.root_device
        epoch = _middle_epoch(run, steps=length)
        give_cache(
            run.model,
            run.datamodule,
            Path(folder) / "cache",
            run.notes,
            epochs=run.trainer.max_epochs or 1,
            precision=str(run.trainer.precision),
        )
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        memory_before = torch.cuda.memory_allocated(device) if on_gpu else resident_bytes()
        step_seconds, graphs, busy = _through_trainer(run, warmup=warmup, steps=steps, trace=trace)
        memory = torch.cuda.max_memory_allocated(device) if on_gpu else resident_bytes()
        loop, made = BareLoop(run), _graphs()
        bare_seconds = loop.seconds(steps, warmup=warmup)
        parts = loop.split(steps)
        graphs["bare_loop"] = _graphs() - made
    module, precision, batch_size = loop.module, str(run.trainer.precision), run.datamodule.batch_size
    size = module.data.input_size
    counts = {
        "teacher": sum(multiply_adds(each.network, each.input_size or size) for each in module.teachers.frozen),
        "student": multiply_adds(module.kept_network(), size),
        "in_training": multiply_adds(module.student, size),
    }
    images_per_second = batch_size / step_seconds
    peak = matrix_peak(device, matrix_type(precision), side=MATRIX["cuda" if on_gpu else "cpu"])
    from_cache = module.cache is not None  # the teacher is not run then
    operations = 2 * ((0 if from_cache else counts["teacher"]) + 3 * counts["in_training"])
    if graphs["timed"]:
        run.notes.append(
            f"WARNING: networks were compiled again in the timed steps ({graphs['timed']} graphs); raise --warmup"
        )
    return {
        "method": type(module.method).__name__,
        "data": type(run.datamodule).__name__,
        "notes": run.notes,
        "device": str(device),
        "precision": precision,
        "batch_size": batch_size,
        "warmup": warmup,
        "steps": steps,
        "epoch": epoch,
        "images_per_second": images_per_second,
        "step_seconds": step_seconds,
        "bare_images_per_second": batch_size / bare_seconds,
        "bare_step_seconds": bare_seconds,
        "overhead": step_seconds / bare_seconds - 1,
        "parts": parts,
        "data_share": parts["data"] / sum(parts.values()),
        "memory_kind": "allocated on the GPU" if on_gpu else "resident",
        "memory_bytes": memory,
        "memory_before_bytes": memory_before,
        "compiled_graphs": graphs,
        "freed_memory_kept": run.keeps_memory,
        "teacher_from_cache": from_cache,
        "multiply_adds": counts,
        "operations_per_image": operations,
        "matrix_peak": peak,
        "matrix_share": operations * images_per_second / peak,
        "busy_share": busy,
        "machine": machine(),
    }
