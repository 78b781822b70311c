"""The program benchmarks/bench.py: its command line, table and JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import bench
import pytest
from timing.machine import median_and_range

from benchmarks.helpers import SMALL, made_up


def test_medians_leave_disturbed_runs_out():
    summary = bench.summarised([made_up(1), made_up(100, busy=True), made_up(3), made_up(2)])
    assert (summary["runs"], summary["used"], summary["disturbed"]) == (4, 3, 1)
    assert summary["images_per_second"] == {"median": 2, "min": 1, "max": 3}
    assert summary["parts"]["data"] == {"median": 2, "min": 1, "max": 3}
    assert bench.summarised([made_up(5, busy=True)])["images_per_second"] == median_and_range([5])


def test_a_busy_machine_and_an_unknown_load_are_reported():
    text = " ".join(bench._warnings({"runs": [made_up(1), made_up(1, busy=True)]}))
    assert "busy in 1 of 2 runs (other processes used up to 1.50 of 2 cores)" in text
    assert "unknown" in bench._warnings({"runs": [made_up(1, busy=None)]})[0]
    assert bench._warnings({"runs": [made_up(1)]}) == []


def in_this_process(command, **options):
    code = bench.answer(command[-1])
    load = {"seconds": 1.0, "cores": 2, "own_cores": 1.0, "other_cores": 0.0, "busy": False}
    return subprocess.CompletedProcess(command, code, "", ""), load


def check_report(report):
    assert report["config"] == "digits_resnet20_resnet8"
    assert list(report["methods"]) == ["kd"]
    (run,) = report["runs"]
    assert (run["name"], run["run"], run["method"]) == ("kd", 0, "KD")
    assert set(run["load"]) == {"seconds", "cores", "own_cores", "other_cores", "busy"}
    assert report["methods"]["kd"]["images_per_second"]["median"] == run["images_per_second"]
    assert report["busy"] == bool(run["load"]["busy"])


GIVEN = ["--config", "digits_resnet20_resnet8", "--methods", "kd", *SMALL, "--steps", "2", "--warmup", "1"]


def test_the_program_writes_a_table_and_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "watched", in_this_process)
    assert bench.main([*GIVEN, "--runs", "1", "--out", "speed.json"]) == 0
    shown = capsys.readouterr().out
    assert "images/s, Trainer" in shown
    assert "teacher resnet8 has fresh weights" in shown
    check_report(json.loads((tmp_path / "speed.json").read_text()))


@pytest.mark.slow
def test_the_program_measures_in_a_fresh_process():
    command = [sys.executable, bench.__file__, *GIVEN, "--runs", "1", "--out", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    check_report(json.loads(done.stdout))


def test_methods_are_measured_in_turn(monkeypatch, capsys):
    asked = []

    def measured(arguments, *, warmup, steps, trace):
        asked.append(arguments[3] if "--config" in arguments[2:] else "own")
        facts = {"cpu": "a processor", "gpu": None, "threads": 1}
        run = {**made_up(1.0), "method": "KD", "device": "cpu", "precision": "32-true", "memory_kind": "resident"}
        return {**run, "batch_size": 4, "steps": steps, "machine": facts}

    monkeypatch.setattr(bench, "_measured", measured)
    report = bench.bench(["digits_resnet20_resnet8"], methods=["kd", "ackd"], runs=2, out="-")
    assert asked == ["kd", "ackd", "kd", "ackd"]
    assert json.loads(capsys.readouterr().out) == report
    assert list(bench.bench(["digits_resnet20_resnet8"], runs=1)["methods"]) == ["kd"]  # its own name
    assert "1,000.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], "--config"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--config", "digits_resnet20_resnet8", "--methods", "kdd"], "kdd"),
        (["--config", "digits_resnet20_resnet8", "--methods", "kd,kd"], "kd, kd"),
        (["--config", "digits_resnet20_resnet8", "--steps", "0"], "--steps is 0"),
        (["--config", "digits_resnet20_resnet8", "--warmup", "0"], "--warmup is 0"),
        (["--config", "digits_resnet20_resnet8", "--runs", "-1"], "--runs is -1"),
        (["--config", "digits_resnet20_resnet8", "--out", "there.json"], "--out there.json exists"),
    ],
)
def test_wrong_arguments_give_one_sentence_and_code_2(given, named, capsys, tmp_path):
    (tmp_path / "there.json").write_text("{}")
    assert bench.main(given) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_the_message_of_a_wrong_setting_comes_out_of_the_measuring_process(monkeypatch, capsys):
    monkeypatch.setattr(bench, "watched", in_this_process)
    assert bench.main(["--config", "digits_resnet20_resnet8", "--model.optimizer.lr", "-1"]) == 2
    error = capsys.readouterr().err
    assert "-1" in error
    assert error.count("\n") == 1


def test_a_measuring_process_that_dies_is_reported(monkeypatch):
    dead = subprocess.CompletedProcess([], -9, "", "one\nkilled for memory\n")
    monkeypatch.setattr(bench, "watched", lambda command: (dead, {}))
    with pytest.raises(RuntimeError, match="-9: killed for memory"):
        bench.main(["--config", "digits_resnet20_resnet8"])
