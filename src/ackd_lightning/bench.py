"""``ackd bench``: how fast a configuration trains on this machine, where the time goes, and what it needs.

Every measurement is made in a fresh process of its own, methods in turn (A B A B), while the load that other processes
put on the machine is watched. In that process the run is built as ``ackd fit`` builds it, without checkpoints and
validation, and three times as many steps are timed: through the Trainer, as a bare loop of the same pieces, and as that
loop with a stopwatch around each piece.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ackd_lightning.checks import check_writable
from ackd_lightning.configs import load_configs
from ackd_lightning.data.base import ImageDataModule, Part
from ackd_lightning.data.download import DownloadedDataModule
from ackd_lightning.data.images import Pixels
from ackd_lightning.errors import ACKDError
from ackd_lightning.export import write_json
from ackd_lightning.lightning_cli import ACKDCLI
from ackd_lightning.methods.base import AdversarialMethod
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.models.zoo.complexity import multiply_adds
from ackd_lightning.runs import in_our_words
from ackd_lightning.training.adversarial import frozen
from ackd_lightning.training.callbacks import RunCheckpoint, versions
from ackd_lightning.training.distillation import DistillationModule

PARTS = {
    "data": "data: loader, augmentation",
    "teacher": "teacher forward",
    "student": "student forward",
    "players": "players' steps",
    "terms": "terms of the loss",
    "backward": "backward",
    "optimizer": "optimiser",
    "other": "rest",
}
"""Parts of the step that the stopwatch tells apart, with their names on the screen."""
_SPREAD = (
    "images_per_second",
    "step_seconds",
    "bare_images_per_second",
    "bare_step_seconds",
    "overhead",
    "data_share",
    "memory_bytes",
    "matrix_peak",
    "matrix_share",
)
"""Numbers of which median, least and largest are shown."""
BUSY = 0.05
"""Share of the machine's cores that other processes may use before a run counts as disturbed."""
_UNKNOWN_IMAGES = 10_000
"""Synthetic images in place of data whose number is not known before they are there."""
_LARGEST = 2**30
"""Bytes of synthetic images; from there on they overlap in memory."""
_MATRIX = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices whose product shows what the machine can do."""
_ENVIRONMENT = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "PYTORCH_")


# ---------------------------------------------------------------- load of the machine


def _cpu_seconds() -> tuple[float, int] | None:
    """Seconds that all cores together have worked since the machine started, and their number; None if not told."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, lines[0].split()[1:9])
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), cores


def watched(command: Sequence[str], **options: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run a command to its end and tell what other processes did meanwhile.

    Args:
        command: program and arguments.
        options: for ``subprocess.run``.

    Returns:
        What the command left, and the load: ``other_cores`` is how many of the machine's ``cores`` were busy on
        average with anything but this process and its children, ``busy`` whether that is too much; None if unknown.
    """
    before, started, spent = _cpu_seconds(), time.monotonic(), sum(os.times()[:4])
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    after, seconds, own = _cpu_seconds(), time.monotonic() - started, sum(os.times()[:4]) - spent
    load: dict[str, Any] = {"seconds": seconds, "cores": None, "own_cores": own / seconds}
    if before is None or after is None:
        return done, {**load, "other_cores": None, "busy": None}
    others = max(0.0, after[0] - before[0] - own) / seconds
    return done, {**load, "cores": after[1], "other_cores": others, "busy": others > BUSY * after[1]}


def cpu_model() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a measured time depends on: versions, hardware, threads, and settings in the environment."""
    return {
        "versions": versions(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_ENVIRONMENT)},
    }


# ---------------------------------------------------------------- what stands in for data and teachers


class SyntheticDataModule(ImageDataModule):
    """Random images in the shape, number and batches of other data, which need not be there.

    Args:
        data: whose place is taken; nothing is held out for validation.
    """

    def __init__(self, data: ImageDataModule) -> None:
        super().__init__(
            data.root,
            batch_size=data.batch_size,
            eval_batch_size=data.eval_batch_size,
            val_fraction=0,
            train_fraction=data.train_fraction,
            max_per_class=data.max_per_class,
            num_workers=data.num_workers,
            seed=data.seed,
            cache=False,
        )
        self.num_classes, self.mean, self.std = data.num_classes, data.mean, data.std
        self.input_size, self.augment = data.input_size, data.augment
        self.images = type(data).published_train_images or _UNKNOWN_IMAGES

    def _fetch(self) -> None:
        """Nothing to fetch."""

    def _load(self, part: Part) -> Pixels:
        count = self.images if part == "train" else self.eval_batch_size
        shape = (3, self.input_size, self.input_size)
        size = 3 * self.input_size**2
        apart = max(1, min(size, _LARGEST // count))  # below the size, images share bytes
        pixels = torch.randint(0, 256, (apart * (count - 1) + size,), dtype=torch.uint8)
        images = pixels.as_strided((count, *shape), (apart, self.input_size**2, self.input_size, 1))
        names = tuple(f"class {number}" for number in range(self.num_classes))
        return Pixels(names, images, torch.arange(count) % self.num_classes)


def _usable(data: ImageDataModule, notes: list[str]) -> ImageDataModule:
    """The data when they are there, else random images; nothing is downloaded."""
    if isinstance(data, DownloadedDataModule):
        data.download = False
    try:
        data.setup()
    except (ACKDError, OSError) as error:
        made = SyntheticDataModule(data)
        made.setup()
        side = made.input_size
        notes.append(
            f"{made.num_train_samples:,} random images of {side} x {side} in memory in place of "
            f"{type(data).__name__} ({error})"
        )
        return made
    return data


@torch.no_grad()
def _fresh_network(name: str, num_classes: int, size: int, options: Mapping[str, Any]) -> nn.Module:
    """A network with fresh weights whose BatchNorm knows its inputs, so that its outputs are of usual size."""
    network = create_model(name, num_classes, **options)
    layers = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    before = [each.momentum for each in layers]
    for layer in layers:
        layer.momentum = 1.0
    network.train()(torch.randn(16, 3, size, size))
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
    return network.eval()


def _give_weights(module: DistillationModule, folder: Path, notes: list[str]) -> None:
    """Write fresh weights for every teacher whose file is not there."""
    teachers = module.teachers
    for number, name in enumerate(each for each in teachers.given if isinstance(each, str)):
        file = teachers.files.get(number)
        if file is None or not Path(file).is_file():
            network = _fresh_network(name, module.num_classes, module.input_size, teachers.options)
            teachers.files[number] = str(save_weights(network, folder / f"teacher{number}.safetensors"))
            notes.append(f"teacher {name} has fresh weights ({file or 'no weight file'} is not there)")


# ---------------------------------------------------------------- one measurement, in a process of its own


class BenchRun(ACKDCLI):
    """A fit that is built as ever, but for checkpoints, and not carried out.

    Args:
        arguments: behind ``ackd fit``.
        folder: for all that it writes.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.place, self.notes = folder, list[str]()
        super().__init__("fit", arguments)

    def before_instantiate_classes(self) -> None:
        """Name the folder."""
        self.folder = self.place / "runs" / "bench" / "run"

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Put in what stands in for missing data and teachers, and leave checkpoints out."""
        _give_weights(self.model, self.place, self.notes)
        self.datamodule = _usable(self.datamodule, self.notes)
        trainer: Any = super().instantiate_trainer(**kwargs)
        trainer.callbacks[:] = [each for each in trainer.callbacks if not isinstance(each, RunCheckpoint)]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """A stopwatch for parts of a step; on a GPU it waits for each part's end.

    Args:
        device: that computes.
        running: False for a clock that measures nothing and costs nothing.
    """

    def __init__(self, device: torch.device, *, running: bool) -> None:
        self.device, self.running = device, running
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside to a part.

        Args:
            name: key of ``PARTS``.
        """
        if not self.running:
            yield
            return
        begin = time.perf_counter()
        yield
        _wait(self.device)
        self.seconds[name] += time.perf_counter() - begin


class Timed(nn.Module):
    """A network with a stopwatch around its forward pass; what is inside, compiled or not, stays as it is.

    Args:
        network: to be timed.
        clock: that measures.
        part: of the clock.
    """

    def __init__(self, network: nn.Module, clock: Clock, part: str) -> None:
        super().__init__()
        self.network, self.clock, self.part_name = network, clock, part

    def forward(self, image: Tensor) -> Any:
        """Output of the network."""
        with self.clock.part(self.part_name):
            return self.network(image)


class BareLoop:
    """The steps of a run without Lightning: the same loader, networks, terms, players and optimizers.

    Args:
        run: whose fit has ended, so that everything is set up.
    """

    def __init__(self, run: BenchRun) -> None:
        self.run, self.trainer = run, run.trainer
        self.device = run.trainer.strategy.root_device
        self.module: DistillationModule = run.model.to(self.device)
        self.players: dict[str, list[nn.Parameter]] = {}
        made: Any = self.module.configure_optimizers()
        every = made[0] if isinstance(made, tuple) else [made["optimizer"]]
        self.optimizer: torch.optim.Optimizer = every[0]
        if isinstance(self.module.method, AdversarialMethod):
            self.players = self.module.method.players()
        self.optimizers: dict[str, torch.optim.Optimizer] = dict(zip(self.players, every[1:], strict=True))
        self.raw = self._endless(run.datamodule.train_dataloader())

    @staticmethod
    def _endless(loader: Any) -> Iterator[Any]:
        while True:
            yield from loader

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types

    def step(self, clock: Clock) -> None:
        """One step: batch, forward passes, players' steps, terms, backward, optimizer.

        Args:
            clock: around the parts.
        """
        module, method = self.module, self.module.method
        with clock.part("data"):
            batch = module.as_batch(self.trainer.strategy.batch_to_device(next(self.raw)))
        with self.trainer.precision_plugin.forward_context():
            student, teacher = module.outputs(batch)
            for player, optimizer in self.optimizers.items():
                assert isinstance(method, AdversarialMethod)
                with clock.part("players"):
                    turn = method.player_loss(player, student, teacher, batch)
                    if turn is not None:
                        optimizer.zero_grad()
                        self._backward(turn[0])
                        optimizer.step()
            with frozen(parameter for parameters in self.players.values() for parameter in parameters):
                with clock.part("terms"):
                    loss = module.weighted_loss(method(student, teacher, batch))
                with clock.part("backward"):
                    self.optimizer.zero_grad()
                    self._backward(loss)
            with torch.no_grad(), clock.part("terms"):
                method.observe(student, teacher, batch)
        with clock.part("optimizer"):
            module.on_before_optimizer_step(self.optimizer)
            self.optimizer.step()

    def seconds(self, steps: int, *, warmup: int) -> float:
        """Seconds of one step.

        Args:
            steps: that are measured.
            warmup: steps before them.
        """
        clock = Clock(self.device, running=False)
        for _ in range(warmup):
            self.step(clock)
        _wait(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(clock)
        _wait(self.device)
        return (time.perf_counter() - begin) / steps

    def split(self, steps: int) -> dict[str, float]:
        """Seconds of every part of one step.

        Args:
            steps: that are measured.
        """
        clock = Clock(self.device, running=True)
        student, teachers = self.module.student, self.module.teachers.frozen
        self.module.student = Timed(student, clock, "student")  # type: ignore[assignment]  # for the time being
        self.module.teachers.frozen = tuple(Timed(each, clock, "teacher") for each in teachers)  # type: ignore[misc]
        try:
            _wait(self.device)
            begin = time.perf_counter()
            for _ in range(steps):
                self.step(clock)
            total = time.perf_counter() - begin
        finally:
            self.module.student, self.module.teachers.frozen = student, teachers
        clock.seconds["other"] = max(0.0, total - sum(clock.seconds.values()))
        return {name: value / steps for name, value in clock.seconds.items()}


def matrix_peak(device: torch.device, dtype: torch.dtype, *, side: int, repeats: int = 5) -> float:
    """Operations per second (two for each multiply-add) of a large matrix product, the best of some.

    Args:
        device: that computes.
        dtype: of the matrices.
        side: of the square matrices.
        repeats: how many are timed.
    """
    first = torch.randn(side, side, device=device).to(dtype)
    second = torch.randn(side, side, device=device).to(dtype)
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        begin = time.perf_counter()
        torch.matmul(first, second)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / min(times[1:])


def _matrix_type(precision: str) -> torch.dtype:
    """Number format of the matrix products of a run."""
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return kinds.get(precision.partition("-")[0], torch.float32)


def resident_bytes() -> int | None:
    """Largest memory that this process has had so far, its worker processes' not counted; None on Windows."""
    if sys.platform == "win32":
        return None
    # Linux hands ru_maxrss of the parent on to a new process: only this line is its own
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    loaded = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds, and changes nothing if it is not used
    return int(loaded.counters["stats"]["unique_graphs"]) if loaded else 0


def _through_trainer(run: BenchRun, *, warmup: int, steps: int) -> tuple[float, dict[str, int]]:
    """Seconds of one step inside a fit: from the start of a step to the start of the one that comes ``steps`` later.

    Also the graphs that were compiled before the timed steps and in them.
    """
    trainer, module = run.trainer, run.model
    device, starts, graphs = trainer.strategy.root_device, list[float](), list[int]()
    inner: Callable[[Any, int], None] = module.on_train_batch_start

    def at_start(batch: Any, batch_idx: int) -> None:
        if len(starts) in (warmup, warmup + steps):
            _wait(device)
            graphs.append(_graphs())
        starts.append(time.perf_counter())
        inner(batch, batch_idx)

    module.on_train_batch_start = at_start
    try:
        trainer.fit(module, datamodule=run.datamodule)
    finally:
        del module.on_train_batch_start
    if len(starts) <= warmup + steps:
        raise ACKDError(
            f"the fit ended after {len(starts)} of {warmup + steps + 1} steps; leave out the settings that shorten it"
        )
    seconds = (starts[warmup + steps] - starts[warmup]) / steps
    return seconds, {"before": graphs[0], "timed": graphs[1] - graphs[0]}


def _middle_epoch(run: BenchRun, *, steps: int) -> int:
    """Let the fit begin in the middle of its schedule, where the warm-ups of methods are over."""
    loop = run.trainer.fit_loop
    if loop.max_epochs is None or loop.max_epochs < 1:
        return 0
    epoch = loop.max_epochs // 2
    loop.max_epochs = max(loop.max_epochs, epoch + steps)  # an epoch of few images may have a single step
    for name in ("ready", "started", "processed", "completed"):
        setattr(loop.epoch_progress.current, name, epoch)
    return epoch


def measure(arguments: Sequence[str], *, warmup: int, steps: int) -> dict[str, Any]:
    """Measure one run in this process.

    Args:
        arguments: behind ``ackd fit``.
        warmup: steps before those that are timed.
        steps: that are timed, of each kind.

    Returns:
        Plain data: seconds, images per second, bytes, multiply-adds, and what they were measured on.

    Raises:
        ACKDError: for whatever is wrong with the arguments.
    """
    length = warmup + steps + 1
    limits = {"max_steps": length, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    fixed = [part for key, value in limits.items() for part in (f"--trainer.{key}", str(value))]
    with tempfile.TemporaryDirectory(prefix="ackd-bench-") as folder, in_our_words():
        run = BenchRun(["--trainer.devices", "1", *arguments, *fixed, "--publish", "null"], Path(folder))
        if run.trainer.world_size > 1:
            raise ACKDError("ackd bench measures a single device; leave --trainer.devices and num_nodes out")
        run.model.load_teacher()
        device = run.trainer.strategy.root_device
        epoch = _middle_epoch(run, steps=length)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        memory_before = torch.cuda.memory_allocated(device) if on_gpu else resident_bytes()
        step_seconds, graphs = _through_trainer(run, warmup=warmup, steps=steps)
        memory = torch.cuda.max_memory_allocated(device) if on_gpu else resident_bytes()
        loop = BareLoop(run)
        bare_seconds = loop.seconds(steps, warmup=warmup)
        parts = loop.split(steps)
        graphs["bare_loop"] = _graphs() - sum(graphs.values())
    module, precision, batch_size = loop.module, str(run.trainer.precision), run.datamodule.batch_size
    size = module.input_size
    counts = {
        "teacher": sum(multiply_adds(each.network, each.input_size or size) for each in module.teachers.frozen),
        "student": multiply_adds(module.kept_network(), size),
        "in_training": multiply_adds(module.student, size),
    }
    images_per_second = batch_size / step_seconds
    peak = matrix_peak(device, _matrix_type(precision), side=_MATRIX["cuda" if on_gpu else "cpu"])
    from_cache = module.cache is not None  # then the teacher is not run
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
        "teacher_from_cache": from_cache,
        "multiply_adds": counts,
        "operations_per_image": operations,
        "matrix_peak": peak,
        "matrix_share": operations * images_per_second / peak,
        "machine": machine(),
    }


def _inside(request: str) -> int:
    """What the fresh process does: measure, and write the numbers or the one sentence of an error to a file."""
    asked = json.loads(request)
    try:
        result = measure(asked["arguments"], warmup=asked["warmup"], steps=asked["steps"])
    except ACKDError as error:
        result = {"error": str(error)}
    write_json(result, Path(asked["out"]))
    return 2 if "error" in result else 0


# ---------------------------------------------------------------- all measurements


def _measured(arguments: Sequence[str], *, warmup: int, steps: int) -> dict[str, Any]:
    """Measure one run in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="ackd-bench-") as folder:
        out = Path(folder) / "result.json"
        request = {"arguments": list(arguments), "warmup": warmup, "steps": steps, "out": str(out)}
        code = "import sys; from ackd_lightning.bench import _inside; sys.exit(_inside(sys.argv[1]))"
        done, load = watched([sys.executable, "-c", code, json.dumps(request)])
        if not out.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the measuring process ended with code {done.returncode}: {last}")
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if "error" in result:
        raise ACKDError(result["error"])
    return {**result, "load": load}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of some numbers.

    Args:
        values: at least one.
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarised(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of one method; over the undisturbed ones, where there are any.

    Args:
        runs: as ``measure`` gives them, with ``load``.
    """
    quiet = [each for each in runs if not each["load"]["busy"]] or list(runs)
    known = [name for name in _SPREAD if quiet[0][name] is not None]
    return {
        "runs": len(runs),
        "used": len(quiet),
        "disturbed": sum(bool(each["load"]["busy"]) for each in runs),
        **{name: spread([each[name] for each in quiet]) for name in known},
        "parts": {part: spread([each["parts"][part] for each in quiet]) for part in PARTS},
        "multiply_adds": quiet[0]["multiply_adds"],
    }


def _cell(values: Mapping[str, float], scale: float = 1.0, digits: int = 1) -> str:
    shown = [f"{scale * values[key]:,.{digits}f}" for key in ("median", "min", "max")]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _table(report: Mapping[str, Any]) -> Table:
    first = report["runs"][0]
    where = first["machine"]["gpu"] if first["device"].startswith("cuda") else first["machine"]["cpu"]
    table = Table(
        caption=f"{report['config']}, batch {first['batch_size']}, {first['precision']}, {where}, "
        f"{first['machine']['threads']} threads; median [least, largest] of runs of {first['steps']} steps"
    )
    table.add_column("")
    methods: Mapping[str, Any] = report["methods"]
    for name in methods:
        table.add_column(name, justify="right")

    def row(label: str, cell: Callable[[Any], str]) -> None:
        table.add_row(label, *map(cell, methods.values()))

    row("images/s, Trainer", lambda each: _cell(each["images_per_second"]))
    row("images/s, bare loop", lambda each: _cell(each["bare_images_per_second"]))
    row("step, Trainer, ms", lambda each: _cell(each["step_seconds"], 1e3))
    row("step, bare loop, ms", lambda each: _cell(each["bare_step_seconds"], 1e3))
    row("Trainer above bare loop, %", lambda each: _cell(each["overhead"], 100))
    for part, label in PARTS.items():
        row(f"  {label}, ms", lambda each, part=part: _cell(each["parts"][part], 1e3, 2))  # type: ignore[misc]
    row("data, % of the bare step", lambda each: _cell(each["data_share"], 100))
    kind = first["memory_kind"]
    row(
        f"peak memory, {kind}, MB",
        lambda each: _cell(each["memory_bytes"], 1e-6, 0) if "memory_bytes" in each else "unknown",
    )
    for network, label in (("teacher", "teacher"), ("student", "student"), ("in_training", "student in training")):
        row(f"multiply-adds, {label}, M", lambda each, key=network: f"{each['multiply_adds'][key] / 1e6:,.1f}")  # type: ignore[misc]
    row("matrix product, Gop/s", lambda each: _cell(each["matrix_peak"], 1e-9, 0))
    row("share of it that is used, %", lambda each: _cell(each["matrix_share"], 100))
    return table


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """What has to be said beside the numbers."""
    lines = list(dict.fromkeys(note for each in report["runs"] for note in each["notes"]))
    loads = [each["load"] for each in report["runs"]]
    disturbed = [each for each in loads if each["busy"]]
    if disturbed:
        most = max(each["other_cores"] for each in disturbed)
        lines.append(
            f"WARNING: the machine was busy in {len(disturbed)} of {len(loads)} runs (other processes used up to "
            f"{most:.2f} of {disturbed[0]['cores']} cores): those times mean nothing; repeat them on an idle machine"
        )
    if any(each["busy"] is None for each in loads):
        lines.append("WARNING: this system does not tell what other processes do; see that they do nothing")
    return lines


def bench(
    configs: Sequence[str],
    *,
    methods: Sequence[str] = (),
    steps: int = 20,
    warmup: int = 5,
    runs: int = 5,
    out: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the training speed of methods, methods in turn, and show it.

    Args:
        configs: what stands behind ``--config``.
        methods: fragments, each laid over the configuration; none: the configuration's own method.
        steps: that are timed in every run.
        warmup: steps before them.
        runs: fresh processes for each method.
        out: file for all numbers as JSON; ``-`` for standard output, in place of the table.
        overrides: settings of ``ackd fit``.

    Returns:
        All numbers.

    Raises:
        ACKDError: for whatever is wrong with the arguments.
    """
    if not configs:
        raise ACKDError("ackd bench has no configuration; name one with --config, `ackd configs` lists them")
    for name, number in (("steps", steps), ("warmup", warmup), ("runs", runs)):
        if number < 1:
            raise ACKDError(f"--{name} is {number}; use 1 or more")
    if len(set(methods)) < len(methods):
        raise ACKDError(f"--methods names a method twice ({', '.join(methods)}); name each once")
    for method in methods:
        load_configs([*configs, method])
    config = load_configs(configs)[1]
    to_screen = out == "-"
    file = Path(out) if out is not None and not to_screen else None
    if file is not None and file.exists():
        raise ACKDError(f"--out {file} exists; choose another file")
    if file is not None:
        check_writable(file.parent, "the folder of --out,")
    results: list[dict[str, Any]] = []
    for number in range(runs):
        for method in methods or [""]:
            layers = [*configs, *([method] if method else [])]
            arguments = [part for layer in layers for part in ("--config", layer)] + list(overrides)
            result = _measured(arguments, warmup=warmup, steps=steps)
            name = method or result["method"].lower()
            results.append({"name": name, "run": number, **result})
            load = result["load"]
            print(
                f"[{number + 1}/{runs}] {name}: {result['images_per_second']:,.1f} images/s"
                + (f", DISTURBED by {load['other_cores']:.2f} cores of other load" if load["busy"] else ""),
                file=sys.stderr,
                flush=True,
            )
    names = list(dict.fromkeys(each["name"] for each in results))
    report = {
        "config": config,
        "overrides": list(overrides),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "busy": any(each["load"]["busy"] for each in results),
        "methods": {name: summarised([each for each in results if each["name"] == name]) for name in names},
        "runs": results,
    }
    if to_screen:
        print(json.dumps(report, indent=2))
        return report
    Console(width=None if Console().is_terminal else 140).print(_table(report))
    for line in _warnings(report):
        print(line)
    if file is not None:
        write_json(report, file)
        print(f"all numbers: {file}")
    return report
