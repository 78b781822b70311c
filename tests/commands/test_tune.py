"""`ackd tune`: values, a search that goes on, and what it refuses. Trials run in this process."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from ackd_lightning.cli import main
from ackd_lightning.commands.processes import Processes
from ackd_lightning.commands.reproduce.jobs import as_arguments
from ackd_lightning.commands.tune import command
from ackd_lightning.commands.tune.command import _experiment, _plan
from ackd_lightning.commands.tune.command import _Search as Search
from ackd_lightning.commands.tune.space import fragment, grid, read_values
from ackd_lightning.config.files import load_configs
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import option_pairs
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.runs.claim import claim

TUNE = ["tune", "--config", "digits_resnet8.yaml", "--data.max_per_class", "4", "--data.batch_size", "20"]
TUNE += ["--epochs", "1", "--trials", "2"]
LR = ["--set", "model.optimizer.lr=log:0.01:0.3"]
calls: list[list[str]] = []


def in_this_process(runner, arguments, log, device, label):
    calls.append(arguments)
    with log.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        code = main([*arguments, "--trainer.enable_progress_bar", "false"])
    return None if code == 0 else log.read_text().splitlines()[-1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Processes, "process", in_this_process)
    calls.clear()


def tried() -> list[dict[str, float]]:
    return [{name: value for name, value in option_pairs(each[1:]) if value is not None} for each in calls]


def test_a_search_writes_runs_and_the_best_settings_and_goes_on(capsys):
    assert main([*TUNE, *LR]) == 0
    shown = capsys.readouterr().out
    rates = [float(each["--model.optimizer.lr"]) for each in tried()]
    assert len(rates) == 2
    assert all(0.01 <= rate <= 0.3 for rate in rates)
    summaries = [json.loads(path.read_text()) for path in sorted(Path("tune/runs").rglob("summary.json"))]
    best = max(range(2), key=lambda number: (summaries[number]["last"]["val/acc"], -number))
    assert "test" not in summaries[0]
    assert yaml.safe_load(Path("tune/best.yaml").read_text())["model"]["optimizer"]["init_args"]["lr"] == rates[best]
    assert f"--model.optimizer.lr {rates[best]}" in shown.splitlines()[-1].replace("=", " ")
    assert load_configs(["digits_resnet8", "tune/best.yaml"])[0]["model"]["optimizer"]["init_args"]["lr"] == rates[best]
    assert main([*TUNE, *LR, "--trials", "3"]) == 0
    assert len(set(rates) | {float(each["--model.optimizer.lr"]) for each in tried()}) == 3
    assert len(calls) == 3
    assert main([*TUNE, "--set", "model.optimizer.lr=0.1,0.2"]) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "space", "shortened"),
    [
        (["--config", "kd.yaml"], "weight_kd", ""),
        (["--config", "dkd.yaml"], "weight_dkd", ", method.warmup_epochs 2"),
        (["--config", "dkd.yaml"], "warmup_epochs", ""),
        (["--config", "one.yaml"], "weight_one", ", method.ramp_epochs 8"),
        (["--config", "dkd.yaml", "--model.recipe.warmup_epochs", "10"], "weight_dkd", None),
    ],
)
def test_short_trials_shorten_every_warm_up(settings, space, shortened, capsys):
    Path("whole.yaml").write_text("include: [digits_resnet20_resnet8]\ntrainer: {max_epochs: 200}\n")
    _plan(["--config", "whole.yaml", *settings], dict([read_values(f"model.method.{space}=1,2")]), None, 20)
    expected = ", recipe.warmup_epochs 1, method.warmup_epochs 2" if shortened is None else shortened
    milestones = "lr_scheduler.milestones [3, 5]"
    assert f"from 200 to 20 epochs with the schedule: {milestones}{expected}\n" in capsys.readouterr().out


def test_short_trials_shorten_the_warm_ups_in_a_sum(capsys):
    Path("whole.yaml").write_text("include: [digits_resnet20_resnet8]\ntrainer: {max_epochs: 200}\n")
    settings = ["--config", "whole.yaml", "--config", "kd+dkd"]
    arguments, *_ = _plan(settings, dict([read_values("model.optimizer.lr=0.1,0.2")]), None, 20)
    assert "[3, 5], method.methods.1.warmup_epochs 2\n" in capsys.readouterr().out
    assert ACKDCLI("fit", arguments).settings()["model"]["method"]["init_args"]["methods"][1]["init_args"] == {
        **ACKDCLI("fit", settings).settings()["model"]["method"]["init_args"]["methods"][1]["init_args"],
        "warmup_epochs": 2,
    }


def test_a_setting_inside_a_sum_is_searched_in_short_trials(capsys):
    Path("whole.yaml").write_text("include: [digits_resnet20_resnet8]\ntrainer: {max_epochs: 200}\n")
    settings, name = ["--config", "whole.yaml", "--config", "kd+dkd"], "model.method.methods.0.temperature"
    space = dict([read_values(f"{name}=2,8")])
    arguments, *_ = _plan(settings, space, None, 20)
    for value in space[name].choices:
        methods = ACKDCLI("fit", [*arguments, f"--{name}", str(value)]).settings()["model"]["method"]["init_args"]
        assert methods["methods"][0]["init_args"]["temperature"] == value
        assert methods["methods"][1]["init_args"]["warmup_epochs"] == 2
    chosen = ACKDCLI("fit", [*settings, f"--{name}", "8"]).settings()
    Path("best.yaml").write_text(yaml.safe_dump(fragment(chosen, [name])))
    again = ACKDCLI("fit", [*settings, "--config", "best.yaml"]).settings()
    assert again["model"]["method"] == chosen["model"]["method"]
    whole = json.dumps(chosen["model"]["method"]["init_args"]["methods"])
    with pytest.raises(ACKDError, match=r"write the value into the list"):
        ACKDCLI("fit", [*settings, f"--{name}", "8", "--model.method.methods", whole])


def test_the_class_of_the_schedule_is_searched_in_short_trials():
    Path("whole.yaml").write_text("include: [digits_resnet8]\ntrainer: {max_epochs: 200}\n")
    for order in ("MultiStepLR,CosineAnnealingLR", "CosineAnnealingLR,MultiStepLR"):
        space = dict([read_values(f"model.lr_scheduler={order}")])
        arguments, _, own = _plan(["--config", "whole.yaml"], space, None, 20)
        for value in space["model.lr_scheduler"].choices:
            trial = ACKDCLI("fit", [*arguments, *as_arguments(own.beside({"model.lr_scheduler": value}))])
            scheduler = trial.settings()["model"]["lr_scheduler"]
            assert scheduler["class_path"].endswith(value)
            if value == "MultiStepLR":
                assert max(scheduler["init_args"]["milestones"]) < 20
            else:
                assert scheduler["init_args"]["T_max"] == 20


def test_a_search_in_the_current_folder_locks_no_other(monkeypatch):
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert main([*TUNE, *LR, "--trials", "1", "--out", "."]) == 0
    assert [each.name for each in Path("..").iterdir()] == ["here"]


def test_a_search_is_of_one_teacher_and_one_folder():
    settings = {"data": {"class_path": "a.B", "init_args": {"root": "one", "cache": True}}, "model": {}}
    moved = {"data": {"class_path": "a.B", "init_args": {"root": "two", "cache": False}}, "model": {}}
    one, other = _experiment(settings), _experiment(moved)
    assert {name for name in one if one[name] != other[name]} == {"data.root"}
    Path("w.safetensors").write_bytes(b"1")
    taught = {"model": {"teacher": {"weights": "w.safetensors"}}}
    before = _experiment(taught)
    Path("w.safetensors").write_bytes(b"2")
    assert _experiment(taught) != before


def test_a_search_has_one_seed_and_one_start_of_the_student():
    Path("w.safetensors").write_bytes(b"1")
    settings = {"seed_everything": 0, "model": {"student": {"weights": "w.safetensors"}}}
    before = _experiment(settings)
    assert _experiment({**settings, "seed_everything": 5}) != before
    Path("w.safetensors").write_bytes(b"2")
    assert _experiment(settings) != before


def test_a_search_is_of_the_same_teachers_where_there_are_several():
    for name in ("one", "two"):
        Path(f"{name}.safetensors").write_bytes(name.encode())
    taught = {
        "model": {"teacher": [{"network": "resnet8", "weights": f"{each}.safetensors"} for each in ("one", "two")]}
    }
    before = _experiment(taught)
    assert _experiment(taught) == before
    Path("two.safetensors").write_bytes(b"2")
    assert _experiment(taught) != before


def test_a_trial_without_validation_of_its_last_weights_has_no_accuracy(capsys):
    assert main([*TUNE, *LR, "--epochs", "3", "--trainer.check_val_every_n_epoch", "2"]) == 1
    shown = capsys.readouterr()
    assert "trial 0 failed and none has succeeded: its last epoch had no validation" in shown.err
    assert "val acc" not in shown.out


def test_a_folder_in_use_is_named_by_its_option(capsys):
    with claim(Path(), "tune"):
        assert main([*TUNE, *LR]) == 2
    assert "tune is being written by another process; wait for it, or choose another --out" in capsys.readouterr().err


def test_an_interrupted_trial_is_tried_again(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "process", lambda *given: (calls.append(given[1]), interrupted()))
        assert main([*TUNE, *LR, "--trials", "1"]) == 130
    assert main([*TUNE, *LR, "--trials", "1"]) == 0
    first, second = (each["--model.optimizer.lr"] for each in tried())
    assert first == second


def test_a_search_goes_on_after_a_process_that_was_killed_while_it_wrote(capsys):
    assert main([*TUNE, *LR, "--trials", "1"]) == 0
    log, lock = Path("tune/study.log"), Path("tune/study.log.lock")
    log.write_bytes(log.read_bytes()[:-30])  # the accuracy of the trial: it was not written to the end
    lock.symlink_to("tune/study.log")  # as Optuna makes it
    assert main([*TUNE, *LR, "--trials", "1"]) == 0
    first, second = (each["--model.optimizer.lr"] for each in tried())
    assert first == second
    assert not lock.is_symlink()
    assert main([*TUNE, *LR, "--trials", "2"]) == 0
    assert len(calls) == 3


def test_a_grid_is_tried_whole_and_a_failure_ends_the_search(monkeypatch, capsys):
    monkeypatch.setattr(Processes, "process", lambda *given: calls.append(given[1]) or "no such luck")
    assert main([*TUNE, "--set", "model.optimizer.lr=0.1,0.2"]) == 1
    assert "no such luck" in capsys.readouterr().err
    assert len(calls) == 1


def test_a_failed_trial_of_a_grid_is_tried_again(monkeypatch):
    run, rates = Processes.process, ["--set", "model.optimizer.lr=0.1,0.2"]
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "process", lambda *given: run(*given) if "0.1" in given[1] else "no such luck")
        main([*TUNE, *rates])
    assert main([*TUNE, *rates]) == 0
    assert sorted(each["--model.optimizer.lr"] for each in tried()) == ["0.1", "0.2"]
    assert main([*TUNE, *rates]) == 0  # nothing is left
    assert len(tried()) == 2


def test_each_combination_is_tried_after_a_search_that_was_shorter(monkeypatch):
    monkeypatch.setattr(Search, "_fit", lambda search, processes, number, given: calls.append(given))
    monkeypatch.setattr(Search, "_tell", lambda search, trial, done: search.study.tell(trial, 0.5) and 0)
    monkeypatch.setattr(command, "_report", lambda search, settings: None)
    grid = ["--set", "model.optimizer.lr=0.1,0.2", "--set", "model.optimizer.momentum=0.8,0.9"]
    main([*TUNE, *grid, "--trials", "3", "--seed", "1"])
    assert len(calls) == 3
    main([*TUNE, *grid, "--trials", "4", "--seed", "1"])
    assert len({tuple(each.values()) for each in calls}) == 4
    done = len(calls)
    main([*TUNE, *grid, "--trials", "4", "--seed", "1"])
    assert len(calls) == done


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*LR, "--data.val_fraction", "0"], "val_fraction"),
        ([*LR, "--trainer.limit_val_batches", "0"], "limit_val_batches"),
        ([*LR, "--test"], "test set"),
        ([*LR, "--trainer.fast_dev_run", "1"], "trainer.fast_dev_run writes no accuracy"),
        ([*LR, "--model.optimizer.lr", "0.1"], "leave one of them out"),
        (["--set", "model.optimizer.rate=0.1,0.2"], "model.optimizer.rate"),
        (["--set", "model.optimizer.lr"], "NAME=0.1,0.5"),
        ([*LR, *LR], "twice"),
        ([*LR, "--trials", "0"], "--trials is 0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(options, words, capsys):
    assert main([*TUNE, *options]) == 2
    assert words in capsys.readouterr().err
    assert calls == []
    assert not Path("tune").exists()


def test_a_missing_library_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main([*TUNE, *LR]) == 2
    assert "ackd-lightning[tune]" in capsys.readouterr().err


def test_values():
    name, values = read_values("model.optimizer.lr=log:1e-3:0.1")
    assert (name, values.low, values.high, values.log) == ("model.optimizer.lr", 1e-3, 0.1, True)
    assert read_values("a=1:8")[1].high == 8
    assert read_values("a=resnet8,[1, 2],1e-3,true,null")[1].choices == ("resnet8", [1, 2], 1e-3, True, None)
    assert read_values("model.method.attention=pooled,off")[1].choices == ("pooled", "off")
    for wrong in ("a", "a=", "=1,2", "a=log:0:1", "a=2:1", "a=log:1,2", "a=x:y", "a=[1"):
        with pytest.raises(ACKDError):
            read_values(wrong)


def test_grid_and_fragment():
    space = dict(map(read_values, ["a=1,2", "b=x,y"]))
    assert grid(space, 4)[1] == {"a": "1", "b": '"y"'}
    assert grid(space, 3) == grid({"a": read_values("a=1:2")[1]}, 9) == []
    settings = {"data": {"class_path": "D", "init_args": {"batch_size": 8}}, "model": {"student": {"network": "n"}}}
    assert fragment(settings, ["data.batch_size", "model.student.network"]) == {
        "data": {"init_args": {"batch_size": 8}},
        "model": {"student": {"network": "n"}},
    }
