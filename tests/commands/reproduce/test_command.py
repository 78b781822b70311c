"""``ackd reproduce`` as a user types it: on a few digits, with runs of two epochs in this process."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file

from ackd_lightning.cli import main
from ackd_lightning.commands.processes import devices_for
from ackd_lightning.commands.reproduce import command, planning
from ackd_lightning.commands.reproduce.command import read_seeds
from ackd_lightning.commands.reproduce.running import Runner
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch import execute
from commands.reproduce.helpers import PAIR, SHORT, write_run, write_table

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*``instantiate_classes`` was deprecated"),  # Lightning calls it, too
    pytest.mark.filterwarnings("ignore:.*near chance.*"),  # two epochs make no teacher
]
TINY = ["--data.max_per_class", "4", "--data.batch_size", "16"]
COMMAND = ["reproduce", "table2", "--preset", "smoke", "--seeds", "1", "--out", "out", *SHORT, *TINY]
BOTH = [*COMMAND, "--methods", "takd,ce"]
TEACHER = "out/runs/digits_resnet20/seed0"
ASSISTANT = f"out/runs/{PAIR}+kd/assistant-resnet14-seed0"
TAKD, CE = f"out/runs/{PAIR}+kd/takd-seed0", f"out/runs/{PAIR}+ce/ce-seed0"
RUNS = [TEACHER, ASSISTANT, TAKD, CE]


def in_this_process(runner, arguments, log, device, label):
    """Do what `Runner.process` does, without the seconds that every process needs to start."""
    with log.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        code = main([*arguments, "--trainer.enable_progress_bar", "false"])
    last = (log.read_text().strip().splitlines() or [""])[-1].removeprefix("ackd: ")
    return None if code == 0 else last or f"exit code {code}"


@functools.cache
def planned_once(*arguments):
    """A plan that is kept for the next command of this file, networks included: parsing is what takes time."""
    return execute.plan(arguments)


def make_cheap(patch):
    patch.setattr(Runner, "process", in_this_process)
    patch.setattr(planning, "plan_fit", lambda arguments, weights: planned_once(*arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Teacher, assistant, TAKD and the student alone, and what was printed."""
    folder, shown = tmp_path_factory.mktemp("finished"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.chdir(folder)
        make_cheap(patch)
        assert main(BOTH) == 0, shown.getvalue()
    return folder, shown.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_cheap(monkeypatch)
    return tmp_path


@pytest.fixture
def again(finished, here):
    """A copy of what the first command left."""
    shutil.copytree(finished[0] / "out", here / "out")
    return here


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def records(folder):
    return {f"out/{each['run']}": each for each in json.loads((folder / "out/results.json").read_text())}


def rows(folder):
    with (folder / "out/table2-smoke.csv").open(newline="", encoding="utf-8") as stream:
        return {row["row"]: row for row in csv.DictReader(stream)}


class TestFirst:
    def test_every_run_is_made_once_in_order(self, finished):
        folder, shown = finished
        titles = ["teacher resnet20", "assistant resnet14", f"{PAIR}: takd, seed 0", f"{PAIR}: student alone, seed 0"]
        assert "4 runs, 0 of them finished, files in out\n" in shown
        started = [line for line in shown.splitlines() if line.endswith(": starts")]
        assert started == [f"[{number}/4] {title}: starts" for number, title in enumerate(titles, 1)]
        summaries = folder.glob("out/runs/*/*/summary.json")
        assert sorted(str(path.parent.relative_to(folder)) for path in summaries) == sorted(RUNS)
        assert [path.name for path in folder.iterdir()] == ["out"]  # no weights, no runs beside it

    def test_records(self, finished):
        folder, _ = finished
        made = records(folder)
        assert sorted(made) == sorted(RUNS)
        for run, each in made.items():
            summary = json.loads((folder / run / "summary.json").read_text())
            assert each["last"]["acc"] == summary["test"]["last"]["test/acc"]
            assert each["best"]["acc"] == summary["test"]["best"]["test/acc"]
            assert (each["epochs"], each["seed"], each["best_on"]) == (2, 0, "validation")
            assert each["seconds"] == summary["seconds"] > 0
            assert each["versions"]["torch"] == summary["versions"]["torch"]
            assert each["commit"] == summary["versions"].get("commit")
            assert each["device"] == summary["device"]
        assert len({each["config_hash"] for each in made.values()}) == 4

    def test_students_learn_from_whom_the_row_says(self, finished):
        folder, _ = finished
        summaries = {run: json.loads((folder / run / "summary.json").read_text()) for run in RUNS}
        assert summaries[ASSISTANT]["teacher"]["model"] == "resnet20"
        assert summaries[TAKD]["teacher"]["model"] == "resnet14"
        assert "teacher" not in summaries[CE]
        assert "teacher resnet14: accuracy" in (folder / f"out/logs/{PAIR}+kd-takd-seed0.log").read_text()

    def test_tables(self, finished):
        folder, shown = finished
        made, table = records(folder), rows(folder)
        for label, run in (("teacher", TEACHER), ("student alone", CE), ("takd", TAKD)):
            expected = f"{100 * made[run]['last']['acc']:.2f}"
            row = table[label]
            assert [row[key] for key in ("paper", "ours, last", "n", "minus paper", "values")] == [
                "-",
                expected,
                "1",
                "-",
                expected,
            ]
            # without a run of KD no difference from it
            line = f"| {label} | - | {expected} | - | {100 * made[run]['best']['acc']:.2f} | 1 | - |\n"
            assert line in (folder / "out/table2-smoke.md").read_text()
            assert f" {expected} " in shown
        assert {row["ours, last"] for label, row in table.items() if label in ("kd", "eskd", "ackd")} == {"not run"}
        assert len(table) == 13
        assert matplotlib.image.imread(folder / "out/table2-smoke.png").std() > 0.02


def test_the_same_command_runs_nothing_and_prints_the_table(again, finished, capfd):
    before = files(again / "out/runs") | files(again / "out/logs")
    assert main(BOTH) == 0
    shown = capfd.readouterr().out
    assert "4 runs, 4 of them finished, files in out" in shown
    assert "starts" not in shown
    assert files(again / "out/runs") | files(again / "out/logs") == before
    table = [line for line in finished[1].splitlines() if line.startswith("│")]
    assert [line for line in shown.splitlines() if line.startswith("│")] == table
    assert len(table) == 3
    (absent,) = [line for line in shown.splitlines() if line.startswith("Not run, and not asked for: ")]
    assert "semckd" in absent


def test_rows_of_an_earlier_command_stay_in_the_table(again, capfd):
    (again / TAKD / "summary.json").unlink()  # unfinished, so it is not shown
    assert main([*COMMAND, "--methods", "ce"]) == 0
    assert "1 runs, 1 of them finished" in capfd.readouterr().out
    assert {label: row["n"] for label, row in rows(again).items() if row["n"] != "0"} == {
        "teacher": "1",
        "student alone": "1",
    }
    shutil.copy(again / CE / "summary.json", again / TAKD / "summary.json")
    assert main([*COMMAND, "--methods", "ce"]) == 0
    assert rows(again)["takd"]["ours, last"] == rows(again)["student alone"]["ours, last"]


def test_a_row_that_was_changed_after_its_run_is_said(again, capfd):
    other = again / f"out/runs/{PAIR}+kd/kd-seed0"
    shutil.copytree(again / CE, other)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("methods.CE", "methods.KD"))
    assert main([*COMMAND, "--methods", "ce"]) == 0
    (said,) = [line for line in capfd.readouterr().out.splitlines() if "the table leaves it out" in line]
    assert said.startswith(f"{PAIR}: kd, seed 0, in out/runs/")
    assert rows(again)["kd"]["ours, last"] == "not run"


def test_a_row_that_only_an_earlier_command_named_stays(again, capfd):
    other = again / f"out/runs/{PAIR}+pskd/pskd-seed0"
    assert main([*COMMAND, "--methods", "pskd"]) == 0
    assert other.is_dir()
    assert main([*COMMAND, "--methods", "ce"]) == 0
    assert rows(again)["pskd"]["n"] == "1"
    assert rows(again)["student alone"]["n"] == "1"


def test_one_run_fails_and_another_goes_on_to_its_end(again, capfd):
    """TAKD's teacher is a broken file; the run of the student alone was stopped before it was written down."""
    student = again / ASSISTANT / "student.safetensors"
    student.write_bytes(student.read_bytes()[:5000])
    shutil.rmtree(again / TAKD)
    curve = (again / CE / "metrics.csv").read_text()
    weights = load_file(again / CE / "student.safetensors")
    (again / CE / "summary.json").unlink()
    (again / "out/results.json").unlink()
    assert main(BOTH) == 1
    shown = capfd.readouterr()
    (failed,) = [line for line in shown.out.splitlines() if line.startswith("failed: ")]
    assert failed.startswith(f"failed: {PAIR}: takd, seed 0: ")
    assert ASSISTANT in failed  # the broken file
    assert f"[2/2] {PAIR}: student alone, seed 0: resumes\n" in shown.out
    assert "1 of 4 runs failed" in shown.err
    assert failed.removeprefix("failed: ") in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert "Error:" not in shown.err  # a sentence, not a crash
    table = rows(again)
    assert table["takd"]["ours, last"] == "failed"
    assert (table["student alone"]["n"], table["teacher"]["n"]) == ("1", "1")
    assert sorted(records(again)) == sorted([TEACHER, ASSISTANT, CE])
    # the checkpoint was that of the last epoch: nothing is left to train, and the network is the same
    assert (again / CE / "metrics.csv").read_text().startswith(curve)
    same = load_file(again / CE / "student.safetensors")
    assert all(torch.equal(same[key], weights[key]) for key in weights)
    assert json.loads((again / CE / "summary.json").read_text())["epochs"] == 2


def test_runs_that_fail_for_one_reason_are_named_together():
    failed = {"kd, seed 0": "no cache (output in a.log)", "ce": "diverged", "kd, seed 1": "no cache (output in b.log)"}
    assert command._together(failed) == "kd, seed 0, kd, seed 1: no cache (output in a.log); ce: diverged"


def test_other_settings_are_refused_and_nothing_is_touched(again, capfd):
    before = files(again)
    assert main([*BOTH, "--model.optimizer.lr", "0.3"]) == 2
    shown = capfd.readouterr().err
    assert (
        f"run {TEACHER} was made with model.optimizer.lr = 0.05 and would now have 0.3; choose another --out" in shown
    )
    assert files(again) == before


class TestDryRun:
    @pytest.fixture(autouse=True)
    def _no_timing(self, monkeypatch):
        """Timing networks is tested in test_estimate.py."""
        monkeypatch.setattr(command.Stopwatch, "seconds", lambda watch, make, name, size, train: 0.01)

    def test_of_nothing_that_is_there(self, here, capfd):
        assert main([*BOTH, "--dry-run"]) == 0
        shown = capfd.readouterr().out
        table = [line.split("│") for line in shown.splitlines() if line.startswith("│")]
        listed = [[cell.strip() for cell in line[1:-1]] for line in table]
        assert [line[0] for line in listed] == [
            "teacher resnet20",
            "assistant resnet14",
            f"{PAIR}: takd, seed 0",
            f"{PAIR}: student alone, seed 0",
        ]
        assert all((line[1], line[2]) == ("to do", "2") for line in listed)
        assert all(line[3].endswith(" s") and int(line[4]) > 0 for line in listed)
        assert [line[5] for line in listed] == [run.removeprefix("out/runs/") for run in RUNS]
        assert "4 runs to do, about " in shown
        assert " MB of checkpoints" in shown
        assert list(here.iterdir()) == []

    def test_of_what_is_there(self, again, capfd):
        (again / CE / "summary.json").unlink()
        shutil.rmtree(again / TAKD)
        before = files(again)
        assert main([*BOTH, "--dry-run"]) == 0
        shown = capfd.readouterr().out
        states = [line.split("│")[2].strip() for line in shown.splitlines() if line.startswith("│")]
        assert states == ["finished", "finished", "to do", "to continue"]
        assert "2 runs to do" in shown
        assert files(again) == before

    def test_estimated_size_is_that_of_the_files(self, again, capfd):
        assert main([*BOTH, "--dry-run"]) == 0
        for line in capfd.readouterr().out.splitlines():
            if line.startswith(("│ teacher", "│ assistant")):
                *_, size, name, _ = (cell.strip() for cell in line.split("│"))
                real = sum(path.stat().st_size for path in (again / "out/runs" / name).rglob("*") if path.is_file())
                assert int(size) == pytest.approx(real / 1e6, rel=0.25)

    def test_of_all_tables(self, here, monkeypatch, capfd):
        pairs = {PAIR: {"config": PAIR}}
        for name, methods in (("table8", ["ce", "kd"]), ("table9", ["kd", "dkd"])):
            write_table(here / f"{name}.yaml", pairs=pairs, rows={method: {} for method in methods})
        monkeypatch.setattr(command, "table_names", lambda: ["table8.yaml", "table9.yaml"])
        assert main(["reproduce", "all", "--seeds", "3,7", *SHORT, "--dry-run"]) == 0
        shown = capfd.readouterr().out
        assert "table8, table9: 7 runs" in shown  # the teacher, and three methods with two seeds
        names = [line.split("│")[6].strip().split("/")[1] for line in shown.splitlines() if line.startswith("│")]
        assert names == ["seed0", "ce-seed3", "ce-seed7", "kd-seed3", "kd-seed7", "dkd-seed3", "dkd-seed7"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["table2", "--preset", "smoke", "--trainer.max_epoch", "2"], "trainer.max_epoch"),
        (["table2", "--preset", "smoke", "--model.lr_scheduler.milestones", "[x]"], "milestones"),
        (["table2", "--preset", "smoke", "--pair", "resnet110_resnet20"], "resnet110_resnet20"),
        (["table2", "--methods", "ce,takdd"], "takdd"),
        (["table0"], "table0"),
        (["table2", "--seeds", "0"], "--seeds is 0"),
        (["table2", "--workers", "0"], "--workers is 0"),
        (
            ["table2", "--seed_everything", "4"],
            "is set by `ackd reproduce` for every run; use --seeds",
        ),
        (["table2", "--runs_dir=x"], "--runs_dir is set by `ackd reproduce` for every run; use --out"),
        (["table2", "--name", "x"], "--name is set by `ackd reproduce` for every run; leave it out"),
        (["table2", "--model.teacher.weights", "x"], "put the file where the pair's configuration names it"),
        (["table2", "--preset", "smok"], "--preset"),
        (["table2", "--method", "ce"], "has no option --method; did you mean --methods?"),
        (["table2", "--seed", "3"], "has no option --seed; did you mean --seeds?"),
        (["table2", "--preset", "smoke", "table3"], "table3"),
    ],
)
def test_mistakes_end_before_anything_is_written(here, capfd, arguments, named):
    assert main(["reproduce", *arguments, "--out", "out"]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("ackd: ")
    assert named in shown.err
    assert (shown.out, list(here.iterdir())) == ("", [])


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("1", (0,)), ("3", (0, 1, 2)), ("0,5", (0, 5)), ("5, 0,5", (5, 0)), ("7,7", (7,)), ("7,", (7,)), (" 2 ", (0, 1))],
)
def test_seeds(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", ",", "1,,", "1,x", "0-3", "²"])
def test_seeds_that_are_none(text):
    with pytest.raises(ACKDError, match="--seeds is"):
        read_seeds(text)


@pytest.mark.parametrize(
    ("gpus", "visible", "workers", "devices"),
    [
        (0, None, None, [None]),
        (0, None, 3, [None] * 3),
        (1, None, None, [None]),
        (1, None, 2, ["0", "0"]),
        (2, None, None, ["0", "1"]),
        (2, None, 1, [None]),  # one run on both
        (2, None, 3, ["0", "1", "0"]),
        (2, "4,6", None, ["4", "6"]),  # those that were left to this process
        (2, "GPU-a,GPU-b", 3, ["GPU-a", "GPU-b", "GPU-a"]),
    ],
)
def test_devices(monkeypatch, gpus, visible, workers, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices_for(workers) == devices


def processes(text):
    """Processes with this text on their command line."""
    listed = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if text in line]


def test_an_interrupted_command_writes_no_table(here, monkeypatch, capfd):
    def interrupted(runner, jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run_all", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    assert main([*COMMAND, "--methods", "ce"]) == 130
    assert "interrupted; the same command continues" in capfd.readouterr().out
    assert list(here.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_every_run_is_a_process(tmp_path):
    command = [sys.executable, "-m", "ackd_lightning", *COMMAND, "--methods", "ce"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"[1/1] {PAIR}: student alone, seed 0: starts\n" in done.stdout
    assert rows(tmp_path)["student alone"]["n"] == "1"


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path, monkeypatch):
    here = tmp_path
    monkeypatch.chdir(here)
    out = f"{here.name}-interrupted"
    start = [sys.executable, "-m", "ackd_lightning", *COMMAND, "--methods", "ce", "--trainer.max_epochs", "1000"]
    process = subprocess.Popen(
        [*start, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that starts a test run in the background makes its children deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint = here / out / CE.removeprefix("out/") / "checkpoints/last.ckpt"
    try:
        until = time.monotonic() + 200
        while not checkpoint.is_file() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        alive = processes(out)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert len(alive) == 2, (alive, shown)  # the command and its run
    assert process.returncode == 130
    assert "interrupted; the same command continues" in shown
    assert "Traceback" not in shown
    assert processes(out) == []
    assert checkpoint.is_file()
    assert not (checkpoint.parents[1] / "summary.json").exists()
    assert [path for path in here.rglob("*") if path.name == "results.json"] == []
    assert [path.name for path in (here / out / "logs").iterdir()] == [f"{PAIR}+ce-ce-seed0.log"]


def test_a_row_whose_runs_are_teachers_of_another_row_counts_each_once(tmp_path, monkeypatch, capsys):
    def run_all(self, jobs):
        for number, job in enumerate(jobs):
            write_run(job.folder, last=0.8 + 0.1 * (number % 2), seed=job.seed)
        return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Runner, "run_all", run_all)
    table = write_table(tmp_path / "own.yaml", rows={"ce": {}, "aikd": {}})
    assert main(["reproduce", str(table), "--methods", "aikd", "--seeds", "2", "--out", "out", *SHORT, *TINY]) == 0
    (file,) = (tmp_path / "out").glob("*.csv")
    counts = [row["n"] for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))]
    assert set(counts) - {"0"} == {"2"}
    assert counts.count("2") >= 2


@pytest.mark.parametrize("arguments", [["--trainer.max_epochs", "60", "{}"], ["{}", "--trainer.max_epochs", "60"]])
def test_a_setting_before_the_table_does_not_take_its_place(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "own.yaml")
    given = [each.format("own.yaml") for each in arguments]
    assert main(["reproduce", *given, "--dry-run", "--out", "out", *TINY]) == 0


def test_a_method_file_without_a_method_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.yaml").write_text("# nothing\nseed_everything: 1\n")
    write_table(tmp_path / "own.yaml", rows={"mine": {"method": "none.yaml"}})
    assert main(["reproduce", "own.yaml", "--dry-run", "--out", "out", *TINY]) == 2
    assert "row mine has the method" in capsys.readouterr().err


def test_a_method_may_lie_in_the_working_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    (tmp_path / "method_of_mine.py").write_text("from ackd_lightning import KD\n\n\nclass Mine(KD):\n    pass\n")
    (tmp_path / "mine.yaml").write_text("# mine\nmodel:\n  method: method_of_mine.Mine\n")
    write_table(tmp_path / "own.yaml", rows={"mine": {"method": "mine.yaml"}})
    assert main(["reproduce", "own.yaml", "--dry-run", "--out", "out", *SHORT, *TINY]) == 0
    assert "mine" in capsys.readouterr().out
