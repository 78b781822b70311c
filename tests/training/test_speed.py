"""Fast settings: the same method with other rounding, every network compiled once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch._dynamo.utils import counters

from ackd_lightning import ACKD, CE, KD, create_model
from ackd_lightning.cli import main
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch import execute
from ackd_lightning.training import fit_start, speed
from ackd_lightning.training import steps as training_steps
from ackd_lightning.training.speed import fast_settings, has_bfloat16
from training.helpers import CLASSES, Blobs, TinyNet, build, largest_difference, module, state, teaching, trainer


class Layout(L.Callback):
    """Note whether the student's images and its convolutions have their channels last."""

    def __init__(self) -> None:
        self.seen: set[bool] = set()

    def on_fit_start(self, trainer, pl_module):
        pl_module.student.register_forward_pre_hook(lambda _, inputs: self.seen.add(self._last(inputs[0])))
        pl_module.student.plain().one[0].register_forward_pre_hook(
            lambda layer, _: self.seen.add(self._last(layer.weight))
        )

    @staticmethod
    def _last(tensor):
        return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [True, False])
def test_layout_changes_nothing_but_rounding(channels_last):
    layout, other = Layout(), module(norm=False)
    net = module(norm=False, channels_last=channels_last)
    trainer(max_epochs=1, callbacks=[layout]).fit(net, datamodule=Blobs())
    trainer(max_epochs=1).fit(other, datamodule=Blobs())
    assert layout.seen == {channels_last}
    assert largest_difference(state(net), state(other)) < 1e-5


@pytest.fixture
def compiled(monkeypatch):
    """Return modules in the order in which they are compiled; without the code generation, which takes a minute."""
    found, compile_module = [], nn.Module.compile

    def record(self, *arguments, **options):
        found.append(self)
        compile_module(self, *arguments, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", record)
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_student_teacher_and_discriminators_are_compiled_once(compiled):
    net, other = module(compile=True, norm=False), module(norm=False)
    keys = list(net.state_dict())
    for each in (net, other):
        few = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1}
        trainer(callbacks=[EMAWeightAveraging(decay=0.5)], **few).fit(each, datamodule=Blobs())
    assert [id(each) for each in compiled] == [id(net.student), id(net.teacher), id(net.method.discriminators)]
    assert list(net.state_dict()) == keys
    assert largest_difference(state(net), state(other)) < 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("compile_it", "expected"), [(True, True), (False, False)])
def test_a_compiled_teacher_is_fused_and_keeps_its_weights(compiled, compile_it, expected):
    teacher = create_model("resnet8", CLASSES)
    size = sum(each.numel() for each in teacher.parameters())
    net = build(KD(), teacher=teaching(teacher), compile=compile_it)
    trainer(fast_dev_run=True).fit(net, datamodule=Blobs())
    assert (net.teacher.fused is not None) == expected
    assert sum(each.numel() for each in net.teacher.network.parameters()) == size


def test_a_process_that_trains_many_students_compiles_each_of_them(compiled):
    """Their forward is one code object, of which torch keeps eight graphs."""
    counts = []
    for depth in range(10):
        net = build(CE(), student=TinyNet(4 + depth))
        speed.speed_up(net.student, net.method, (), input_size=32, channels_last=False, compiles=True)
        before = counters["stats"]["unique_graphs"]
        net.student(torch.zeros(2, *net.data.image_shape))
        counts.append(counters["stats"]["unique_graphs"] - before)
    assert all(counts)


def test_without_discriminators_there_are_none_to_compile(compiled):
    net = module(ACKD(adversarial="off"), compile=True)
    trainer(fast_dev_run=True).fit(net, datamodule=Blobs())
    assert len(compiled) == 2
    trainer(fast_dev_run=True).fit(build(KD()), datamodule=Blobs())
    assert len(compiled) == 2  # not asked for


def test_graphs_are_a_mode_of_the_compiler_and_every_batch_begins_a_step(monkeypatch):
    modes, steps = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *, dynamic, mode=None: modes.append(mode))
    monkeypatch.setattr(fit_start, "refuse_graphs", lambda _: None)
    monkeypatch.setattr(training_steps, "begin_step", lambda compiles, device: steps.append((compiles, device.type)))
    net = module(compile="reduce-overhead")
    few = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 2}
    trainer(**few).fit(net, datamodule=Blobs())
    assert modes == ["reduce-overhead"] * 3  # student, teacher, discriminators
    assert steps == [("reduce-overhead", "cpu")] * 5  # training and validation
    assert net.hparams["compile"] == "reduce-overhead"


@pytest.mark.parametrize(
    ("compiles", "device", "marks"), [(speed.GRAPHS, "cuda", 1), (speed.GRAPHS, "cpu", 0), (True, "cuda", 0)]
)
def test_a_step_is_marked_where_there_are_graphs(monkeypatch, compiles, device, marks):
    marked = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    speed.begin_step(compiles, torch.device(device))
    assert len(marked) == marks


@pytest.mark.parametrize(
    ("device", "processes", "batches", "word"),
    [
        ("cpu", 1, 1, "cpu"),
        ("cuda", 2, 1, "processes"),
        ("cuda", 1, 4, "accumulate_grad_batches"),
        ("cuda", 1, 1, None),
    ],
)
def test_graphs_are_refused_where_they_cannot_run(monkeypatch, device, processes, batches, word):
    monkeypatch.setattr(torch.version, "hip", None)
    strategy = SimpleNamespace(root_device=torch.device(device))
    run = SimpleNamespace(strategy=strategy, world_size=processes, accumulate_grad_batches=batches)
    if word is None:
        speed.refuse_graphs(run)
        return
    with pytest.raises(ACKDError, match=word) as error:
        speed.refuse_graphs(run)
    assert "reduce-overhead" in str(error.value)


def test_a_fit_on_a_cpu_refuses_graphs_before_it_compiles(compiled):
    with pytest.raises(ACKDError, match="reduce-overhead"):
        trainer(max_epochs=1).fit(build(KD(), compile="reduce-overhead"), datamodule=Blobs())
    assert compiled == []


@pytest.mark.filterwarnings("ignore:--fast")
@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("compiler", [True, False])
def test_settings_are_what_the_machine_has(monkeypatch, bfloat16, compiler):
    monkeypatch.setattr(speed, "has_bfloat16", lambda _: bfloat16)
    monkeypatch.setattr(speed.shutil, "which", lambda _: "/usr/bin/g++" if compiler else None)
    assert fast_settings("cpu") == {
        "model.channels_last": True,
        **({"trainer.precision": "bf16-mixed"} if bfloat16 else {}),
        **({"model.compile": True} if compiler else {}),
    }


def test_what_a_machine_lacks_is_reported(monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(speed.shutil, "which", lambda _: None)
    with pytest.warns(UserWarning, match="--fast") as caught:
        fast_settings("cpu")
    messages = [str(each.message) for each in caught]
    assert any("bfloat16" in each for each in messages)
    assert any("C++ compiler" in each for each in messages)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512_bf16 sse", True),
        ("flags : fpu amx_bf16", True),
        ("flags : fpu avx2 bf16x", False),
        ("", False),
    ],
)
def test_the_flags_of_the_processor_are_read(monkeypatch, tmp_path, flags, expected):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr("ackd_lightning.runs.versions._CPUINFO", info)
    assert has_bfloat16("cpu") is expected
    info.unlink()
    assert has_bfloat16("cpu") is False


def test_the_flag_stands_for_settings_and_given_ones_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "has_bfloat16", lambda _: True)
    monkeypatch.setattr(speed.shutil, "which", lambda _: "/usr/bin/g++")
    words = ["--config", "digits_resnet20.yaml", "--name", "x"]
    settings = execute.plan([*words, "--fast"]).settings()
    assert settings["trainer"]["precision"] == "bf16-mixed"
    assert (settings["model"]["channels_last"], settings["model"]["compile"]) == (True, True)
    assert settings["fast"] is False  # kept at the places that it stands for
    assert (
        execute.plan([*words, "--fast", "--trainer.precision", "32-true"]).settings()["trainer"]["precision"]
        == "32-true"
    )
    slow = execute.plan(words).settings()
    assert slow["trainer"]["precision"] is None
    assert slow["model"]["compile"] is False


FAULTS = """
import resource, runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]  # without the rest of the package: seconds

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
assert keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the C library glibc, on Linux")
def test_no_page_of_freed_memory_is_fetched_again():
    hidden = ("MALLOC_", "GLIBC_TUNABLES")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, speed.__file__], env=clean, capture_output=True, text=True, check=True
    )
    usual, kept = map(int, done.stdout.split())
    assert kept < 0.05 * usual


@pytest.mark.parametrize(("command", "times"), [("fit", 1), ("validate", 0)])
def test_a_fit_on_a_cpu_keeps_freed_memory(monkeypatch, tmp_path, command, times):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(execute, "keep_freed_memory", lambda: asked.append(1) or True)
    words = ["--config", "digits_resnet8.yaml", "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    main([command, *words, *(["--ckpt_path", "none.ckpt"] if command == "validate" else [])])
    assert len(asked) == times


@pytest.mark.parametrize("own", [("MALLOC_TOP_PAD_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.top_pad=0")])
def test_the_allocator_settings_of_the_environment_stay(monkeypatch, own):
    monkeypatch.setenv(*own)
    assert not speed.keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the C library glibc, on Linux")
def test_other_settings_of_the_allocator_are_no_reason(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *_: 1))
    assert speed.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(speed.platform, "libc_ver", lambda: ("", ""))
    assert not speed.keep_freed_memory()
