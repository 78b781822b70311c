"""Random settings and damaged files: success or one sentence, never another exception, a hang or a flood of memory."""

from __future__ import annotations

import contextlib
import io
import resource
import signal
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ackd_lightning import create_model
from ackd_lightning.cli import main
from ackd_lightning.config.files import load_configs
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import Execution
from ackd_lightning.models.weights import load_weights, save_weights

LAST = "runs/digits_resnet20/t/checkpoints/last.ckpt"
SECONDS = 120  # for one example, on a machine that does other things as well
ROOM = 4 * 2**30  # bytes that one example may ask for
FEW = {"deadline": None, "derandomize": True, "database": None}
FEW["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

NAMES = [
    *("model.optimizer", "model.optimizer.lr", "model.optimizer.momentum", "model.optimizer.weight_decay"),
    *("model.lr_scheduler", "model.lr_scheduler.milestones", "model.lr_scheduler.gamma", "model.lr_scheduler.T_max"),
    *("model.recipe", "model.recipe.warmup_epochs", "model.recipe.interval", "model.recipe.gradient_clip_val"),
    *("model.seed", "model.student", "model.student.options", "model.teacher", "model.teacher.gate"),
    *("model.method", "model.method.temperature", "model.method.branches", "model.method.attention"),
    *("model.method.attention_hidden", "model.method.lambda_adv", "model.method.adversarial"),
    *("data.batch_size", "data.eval_batch_size", "data.val_fraction", "data.train_fraction", "data.max_per_class"),
    *("data.num_workers", "data.seed", "trainer.max_epochs", "trainer.max_steps", "trainer.devices"),
    *("trainer.accelerator", "trainer.strategy", "trainer.precision", "trainer.limit_train_batches"),
    *("trainer.val_check_interval", "trainer.accumulate_grad_batches", "trainer.check_val_every_n_epoch"),
    *("trainer.deterministic", "trainer.max_time", "trainer.profiler", "seed_everything", "name", "runs_dir"),
]
WORDS = ["", "auto", "null", "true", "nan", ".nan", ".inf", "-.inf", "1e400", "[]", "{}", "[[1]]", "[-1, 2]", "{a: 1}"]
WORDS += [
    "resnet8",
    "[D3B1, D2B2]",
    "off",
    "CE",
    "AdamW",
    "CosineAnnealingLR",
    "ackd_lightning.methods.KD",
    "1_000",
    "0x10",
    "2020-13-01",
    "&a [*a]",
]
VALUES = st.one_of(
    st.sampled_from(WORDS),
    st.integers(-(10**12), 10**12).map(str),
    st.integers(-3, 3).map(str),
    st.floats().map(str),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
)


class HangError(BaseException):
    """No `except Exception` catches this."""


@contextlib.contextmanager
def guarded():
    """A limit of time and of memory."""

    def ring(*_: object) -> None:
        raise HangError(f"no answer in {SECONDS} s")

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(arguments: list[str]) -> str:
    """Message of a command whose exit code is 0 or 2."""
    shown = io.StringIO()
    with guarded(), contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    said = shown.getvalue().strip()
    assert code in (0, 2), said
    assert code == 0 or (said.startswith("ackd: ") and len(said.splitlines()) <= 3), said
    assert "Traceback" not in said
    return said


def damaged(content: bytes):
    """A file with some bytes replaced, put in or taken out, mostly at its beginning and its end."""
    places = st.one_of(st.integers(0, 300), st.integers(0, len(content)), st.integers(len(content) - 300, len(content)))
    change = st.tuples(places, st.integers(0, 8), st.binary(max_size=8))

    def damage(changes: list[tuple[int, int, bytes]]) -> bytes:
        result = content
        for place, taken, put in changes:
            result = result[: max(place, 0)] + put + result[max(place, 0) + taken :]
        return result

    cut = st.integers(0, len(content)).map(lambda end: content[:end])
    return st.one_of(st.lists(change, min_size=1, max_size=4).map(damage), cut, st.binary(max_size=200))


@pytest.fixture
def unstarted(here, monkeypatch):
    """Everything up to the first step; no step."""
    monkeypatch.setattr(Execution, "execute", lambda self: None)
    return here


@settings(max_examples=15, **FEW)
@given(changes=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=3))
def test_values_of_settings(changes, unstarted):
    options = [part for name, value in changes for part in (f"--{name}", value)]
    answer(["fit", "--config", "digits_resnet20_resnet8.yaml", "--model.student", "resnet8", *options])
    assert not any(unstarted.rglob("*.ckpt"))


TEXT = yaml.safe_dump(load_configs(["digits_resnet20_resnet8.yaml"])[0], sort_keys=False).encode()


@settings(max_examples=30, **FEW)
@given(content=damaged(TEXT))
def test_bytes_of_a_configuration(content, unstarted):
    Path("mine.yaml").write_bytes(content)
    answer(["fit", "--config", "mine.yaml"])


def test_bytes_of_weights(here):
    path = here / "weights.safetensors"
    good = save_weights(create_model("resnet8", 10), path, {"mean": "[0.5]"}).read_bytes()
    model = create_model("resnet8", 10)

    @settings(max_examples=50, **FEW)
    @given(content=damaged(good))
    def load(content):
        path.write_bytes(content)
        with guarded(), contextlib.suppress(ACKDError):
            load_weights(model, path)

    load()


@pytest.mark.parametrize("command", ["export", "test"])
def test_bytes_of_a_checkpoint(command, copied, monkeypatch):
    monkeypatch.setattr(Execution, "execute", lambda self: None)
    good = Path(LAST).read_bytes()
    out = ["--out", "s.safetensors", "--overwrite"] if command == "export" else []

    @settings(max_examples=30 if command == "export" else 10, **FEW)
    @given(content=damaged(good))
    def load(content):
        Path(LAST).write_bytes(content)
        answer([command, LAST, *out])

    load()
