"""Runs in processes of their own; in the place of ``ackd`` stands a script that does as it is told."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ackd_lightning.commands.reproduce.running import Runner
from commands.reproduce.helpers import make_job, write_run

STUB = """#!{python} -IS
import json, os, pathlib, signal, sys, time
command, *rest = sys.argv[3:]  # behind -m ackd_lightning
folder = pathlib.Path(rest[rest.index("--folder") + 1] if command == "fit" else rest[0])
root = folder.parents[1]
facts = {{"command": command, "run": folder.name, "arguments": rest, "begin": time.time(), "pid": os.getpid()}}
facts["device"] = os.environ.get("CUDA_VISIBLE_DEVICES")
facts["inherited"] = [key for key in os.environ if key.startswith("ACKD_RUN")]
with (root / "calls").open("a") as calls:
    calls.write(json.dumps(facts) + "\\n")
summary = {{"config": "c", "seed": 0, "shown": "test", "epochs": 2, "best": {{}}}}
summary["last"] = {{"test/acc": 0.5, "epoch": 2.0}}
what = rest[2] if command == "fit" else "test"
if what == "fail":
    print("a line before")
    sys.exit("ackd: no such luck")
if what == "taken":  # by another process, which finishes it meanwhile
    folder.mkdir(parents=True, exist_ok=True)
    if "-done" in folder.name:
        summary["test"] = {{"last": {{"test/acc": 0.25}}}}
        (folder / "summary.json").write_text(json.dumps(summary))
    sys.exit(f"ackd: run {{folder}} is being trained by another process; wait for it, or choose another --name")
if what == "crash":
    print("epoch 1/2  loss 0.1", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "mute":
    sys.exit(3)
if what == "nothing":
    sys.exit()
if what == "sleep":
    time.sleep(100)
if what == "meet":  # ends only beside another one
    (root / ("here-" + folder.name)).touch()
    until = time.time() + 20
    while len(list(root.glob("here-*"))) < 2:
        if time.time() > until:
            sys.exit("alone")
        time.sleep(0.01)
if what == "test":
    summary = json.loads((folder / "summary.json").read_text())
    summary.setdefault("test", {{}})[rest[rest.index("--which") + 1]] = {{"test/acc": 0.25}}
folder.mkdir(parents=True, exist_ok=True)
(folder / "summary.json").write_text(json.dumps(summary))
with (root / "ends").open("a") as ends:
    ends.write(json.dumps([folder.name, time.time()]) + "\\n")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    stub = tmp_path / "stub"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stub))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def run(place, name, what="work", *, needs=(), **fields):
    return make_job(place / "config" / name, what, needs=needs, **fields)


def calls(place):
    path = place / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def carry_out(place, jobs, devices=(None,)):
    """Failures by name of the run."""
    failed = Runner(place / "logs", devices).run_all(jobs)
    return {folder.name: reason for folder, reason in failed.items()}


def test_everything_is_run_once_and_after_what_it_needs(place):
    teacher = run(place, "teacher")
    assistant = run(place, "assistant", needs=(teacher,))
    jobs = [teacher, assistant, run(place, "takd", needs=(assistant,)), run(place, "kd", needs=(teacher,))]
    assert carry_out(place, jobs, [None, None]) == {}
    made = calls(place)
    assert sorted(call["run"] for call in made) == ["assistant", "kd", "takd", "teacher"]
    begin = {call["run"]: call["begin"] for call in made}
    end = dict(json.loads(line) for line in (place / "ends").read_text().splitlines())
    for job in jobs:
        assert all(end[need.name] <= begin[job.folder.name] for need in job.needs)


def test_arguments_are_those_of_the_plan(place, monkeypatch):
    monkeypatch.setenv("ACKD_RUN_NAME", "of another run")
    job = run(place, "kd")
    carry_out(place, [job])
    (call,) = calls(place)
    assert call["command"] == "fit"
    assert call["arguments"] == [*job.arguments, "--test", "--trainer.enable_progress_bar", "false"]
    assert call["inherited"] == []


def test_an_interrupted_run_goes_on_from_its_checkpoint(place, capfd):
    job = run(place, "kd")
    (job.folder / "checkpoints").mkdir(parents=True)
    (job.folder / "checkpoints/last.ckpt").touch()
    carry_out(place, [job, run(place, "other")])
    first, second = (call["arguments"] for call in calls(place))
    assert first[first.index("--resume") + 1] == str(job.folder)
    assert "--resume" not in second
    shown = capfd.readouterr().out
    assert "[1/2] kd: resumes\n" in shown
    assert "[2/2] other: starts\n" in shown


def test_finished_runs_are_skipped(place, capfd):
    done, tested = run(place, "done"), run(place, "tested")
    write_run(done.folder, curve=[0.5])
    write_run(tested.folder, last=0.5)
    assert carry_out(place, [done, tested, run(place, "kd", needs=(done,))]) == {}
    assert [call["run"] for call in calls(place)] == ["kd"]
    assert "[1/1] kd: test accuracy 50.00%" in capfd.readouterr().out


@pytest.mark.parametrize(("measured", "expected"), [([], ["last", "best"]), (["last"], ["last", "best"])])
def test_a_finished_run_that_is_not_tested_is_tested_alone(place, measured, expected, capfd):
    job = run(place, "kd")
    write_run(job.folder, test={which: {"test/acc": 0.1} for which in measured})
    for name in ("last", "best"):
        (job.folder / "checkpoints").mkdir(exist_ok=True)
        (job.folder / f"checkpoints/{name}.ckpt").touch()
    assert carry_out(place, [job]) == {}
    made = [(call["command"], call["arguments"][:3]) for call in calls(place)]
    assert made == [("test", [str(job.folder), "--which", which]) for which in expected]
    assert "kd: test accuracy 25.00%" in capfd.readouterr().out
    assert carry_out(place, [job]) == {}
    assert len(calls(place)) == len(expected)  # not again


def test_what_a_failed_run_teaches_is_not_run_and_the_others_are(place, capfd):
    teacher = run(place, "teacher", "fail")
    assistant = run(place, "assistant", needs=(teacher,))
    takd = run(place, "takd", needs=(assistant,))
    failed = carry_out(place, [teacher, assistant, run(place, "ce"), takd, run(place, "kd", needs=(teacher,))])
    assert failed == {
        "teacher": f"no such luck (output in {place}/logs/config-teacher.log)",
        "assistant": f"not run, because {teacher.folder} failed",
        "kd": f"not run, because {teacher.folder} failed",
        "takd": f"not run, because {assistant.folder} failed",
    }
    assert [call["run"] for call in calls(place)] == ["teacher", "ce"]
    shown = capfd.readouterr().out
    assert all(f"{reason}\n" in shown for reason in failed.values())
    assert (place / "logs/config-teacher.log").read_text() == "a line before\nackd: no such luck\n"


def test_lines_of_runs_beside_each_other_are_written_whole(place, monkeypatch):
    """The parts of two lines would mix."""
    written = []

    class Stream(io.StringIO):
        def write(self, text):
            written.append(text)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    carry_out(place, [run(place, "bad", "fail"), run(place, "ce")])
    assert len(written) > 3
    assert all(text.endswith("\n") for text in written if text)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fail", "no such luck"),
        ("crash", "killed by SIGKILL"),
        ("mute", "exit code 3"),
        ("nothing", "ended without a su"),
    ],
)
def test_reasons(place, what, reason):
    failed = carry_out(place, [run(place, "bad", what), run(place, "good")])
    assert list(failed) == ["bad"]
    assert failed["bad"].startswith(reason)
    assert failed["bad"].endswith(f"(output in {place}/logs/config-bad.log)")
    assert [call["run"] for call in calls(place)] == ["bad", "good"]


def test_runs_of_another_process_are_no_failures_once_they_are_finished(place):
    jobs = [run(place, "taken", "taken"), run(place, "taken-done", "taken")]
    failed = carry_out(place, jobs)
    sentence = f"{jobs[0].folder} is being trained by another process; run the same command again when it has ended"
    assert failed == {"taken": sentence}


def test_an_error_of_our_own_is_the_failure_of_one_run(place):
    (place / "logs/config-bad.log").mkdir(parents=True)  # cannot be opened
    failed = carry_out(place, [run(place, "bad"), run(place, "good")])
    assert list(failed) == ["bad"]
    assert failed["bad"].startswith("IsADirectoryError")
    assert [call["run"] for call in calls(place)] == ["good"]


def test_two_devices_are_used_at_a_time(place):
    jobs = [run(place, "a", "meet"), run(place, "b", "meet"), run(place, "c"), run(place, "d")]
    assert carry_out(place, jobs, ["2", "GPU-7"]) == {}  # a and b wait for each other
    made = calls(place)
    assert {call["device"] for call in made[:2]} == {"2", "GPU-7"}
    assert {call["device"] for call in made} == {"2", "GPU-7"}
    end = dict(json.loads(line) for line in (place / "ends").read_text().splitlines())
    for device in ("2", "GPU-7"):
        own = sorted((call["begin"], end[call["run"]]) for call in made if call["device"] == device)
        assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(own))


@pytest.mark.parametrize("visible", [None, "5"])
def test_one_at_a_time_sees_the_machine_as_it_is(place, monkeypatch, visible):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert carry_out(place, [run(place, "a"), run(place, "b")]) == {}
    first, second = calls(place)
    assert first["device"] == second["device"] == visible
    assert dict(json.loads(line) for line in (place / "ends").read_text().splitlines())["a"] <= second["begin"]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_ctrl_c_ends_the_runs_and_starts_no_other(place):
    jobs = [run(place, "a", "sleep"), run(place, "b", "sleep"), run(place, "c")]
    seen = []

    def interrupt():
        until = time.monotonic() + 30
        while len(calls(place)) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        seen.extend(call["pid"] for call in calls(place) if not gone(call["pid"]))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background is deaf to it
    watcher = threading.Thread(target=interrupt)
    begin = time.monotonic()
    try:
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            carry_out(place, jobs, [None, None])
    finally:
        watcher.join()
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 2
    assert all(map(gone, seen))
    assert [call["run"] for call in calls(place) if call["run"] == "c"] == []
    assert time.monotonic() - begin < 60  # and not 100


def test_nothing_starts_once_it_is_stopping(place):
    runner = Runner(place / "logs", [None])
    runner.stopping = True
    (reason,) = runner.run_all([run(place, "a")]).values()
    assert reason.startswith("interrupted")
    assert calls(place) == []


def test_progress_is_shown_now_and_then(place, monkeypatch, capfd):
    lines = ["KD: student", "epoch 1/3  loss 2", "epoch 2/3  loss 1", "warning: epoch 9", "done"]
    runner, log = Runner(place / "logs", [None]), place / "log"
    clock = iter([0.0, 20.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr("ackd_lightning.commands.processes.time.monotonic", lambda: next(clock))
    with log.open("w") as stream:
        last = runner.relay(iter(f"{line}\n" for line in lines), stream, "[1/1] kd")
    assert (last, log.read_text().splitlines()) == ("done", lines)
    assert capfd.readouterr().out == "[1/1] kd: epoch 1/3  loss 2\n"  # the next one is too soon


def test_logs_folder_is_made(place):
    carry_out(place, [run(place, "a")])
    assert [path.name for path in Path(place / "logs").iterdir()] == ["config-a.log"]
