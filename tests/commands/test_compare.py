"""``ackd compare``: intervals, and paired tests of the same test images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from ackd_lightning.cli import main
from ackd_lightning.commands import compare as command
from ackd_lightning.commands.compare import compare, group_runs, reference_among
from ackd_lightning.commands.paired import interval_text, paired_tests
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.answers import Answers, answers_file, write_answers
from ackd_lightning.runs.files import STARTED


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(name, *, seed=0, right=None, images="same", which="last", config=None, steps=100, student="resnet8"):
    """A finished run of 200 test images, the first ``right`` of which it classifies correctly."""
    run = Path("runs") / (config or name) / f"seed{seed}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed}))
    accuracy = None if right is None else sum(right) / 200 if isinstance(right, list) else right / 200
    summary = {"config": config or name, "seed": seed, "shown": "val", "method": "CE", "student": student}
    summary |= {"parameters": 1, "steps": steps, "last": {"val/acc": 0.5}, "best": {}, "learners": []}
    if right is not None:
        summary["test"] = {which: {"test/acc": accuracy}}
        answers = torch.tensor(right) if isinstance(right, list) else (torch.arange(200) < right).long()
        target = torch.ones(200)
        write_answers(Answers(target, answers, torch.full((200,), 0.5), images, "Data"), answers_file(run, which))
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_two_runs_are_compared_by_mcnemars_test(capsys):
    make_run("kd", right=160)
    make_run("ce", right=150)
    assert main(["compare", "runs/kd", "runs/ce", "--figure", "a.png"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "kd/seed0 is 5.00 points better than ce/seed0" in shown  # by their names, as nothing else tells them apart
    assert "numbers of steps" not in shown
    assert "p = 0.002" in shown  # 2 / 2^10
    assert "73.91 to 84.95" in shown  # Wilson, 160 of 200


def test_several_seeds_are_compared_by_a_bootstrap():
    groups = {
        name: [make_run(name, seed=seed, right=right + seed) for seed in range(2)]
        for name, right in (("kd", 150), ("ce", 150), ("bad", 40))
    }
    equal, different = paired_tests(groups, "last")
    assert "may be chance" in equal
    assert "2 seeds" in equal
    assert different.startswith("kd is 55.00 points better than bad")
    assert "is significant" in different


def test_a_difference_that_the_seeds_do_not_share_is_no_significant_one():
    groups = {
        name: [make_run(name, seed=seed, right=right) for seed, right in enumerate(of_each)]
        for name, of_each in (("kd", (190, 130)), ("ce", (100, 130)), ("one", (100,)))
    }
    seeds, one = paired_tests(groups, "last")
    assert seeds.startswith("kd is 22.50 points better than ce (95 % interval 1")  # of the images alone, far from 0
    assert "over the seeds the interval is -" in seeds
    assert "may be chance" in seeds
    assert one.endswith("one seed says nothing about other trainings")
    assert "mean of 2 and 1 seeds" in one
    (swapped,) = paired_tests({"one": groups["one"], "kd": groups["kd"]}, "last")
    assert swapped.startswith("kd is ")
    assert "mean of 2 and 1 seeds" in swapped
    assert "significant" not in one


@pytest.mark.parametrize(("seeds", "verdict"), [((0, 1, 2), "is significant"), ((3, 4, 5), "may be chance")])
def test_runs_of_the_same_seed_are_compared_in_pairs(seeds, verdict):
    """Both configurations vary by 40 images over the seeds, and differ by 20 in each of them."""
    kd = [make_run("kd", seed=seed, right=120 + 20 * seed) for seed in range(3)]
    ce = [make_run("ce", seed=seed, right=100 + 20 * number) for number, seed in enumerate(seeds)]
    (said,) = paired_tests({"kd": kd, "ce": ce}, "last")
    assert said.startswith("kd is 10.00 points better than ce")
    assert said.endswith(f"the difference {verdict}")
    assert ("over the seeds the interval is 9.64 to 10.36 (Student's t" in said) == (seeds == (0, 1, 2))


def test_a_teacher_beside_its_students_is_not_the_reference():
    groups = {
        name: [make_run(name, right=right, student=student)]
        for name, right, student in (("a_teacher", 190, "resnet20"), ("ce", 150, "resnet8"), ("kd", 160, "resnet8"))
    }
    teacher, kd = paired_tests(groups, "last")
    assert teacher.startswith("a_teacher is 20.00 points better than ce")
    assert kd.startswith("kd is 5.00 points better than ce")


@pytest.mark.parametrize("against", ["ce", "runs/ce", "runs/ce/seed0"])
def test_another_configuration_can_be_the_reference(against, capsys):
    for name, right in (("kd", 160), ("ce", 150), ("ackd", 155)):
        for seed in range(2):
            make_run(name, seed=seed, right=right)
    assert main(["compare", "runs/kd", "runs/ce", "runs/ackd", "--figure", "a.png", "--against", against]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("points better than ce") == 2
    assert "kd is 5.00 points better than ce" in shown
    assert "ackd is 2.50 points better than ce" in shown


def test_a_reference_may_be_named_by_what_follows_the_plus():
    groups = {name: [] for name in ("digits+kd", "digits+ackd", "cifar+ackd", "digits+kd+crd")}
    assert reference_among(groups, "kd+crd") == "digits+kd+crd"
    assert reference_among(groups, "kd") == "digits+kd"
    with pytest.raises(ACKDError, match=r"--against ackd: .* it ends several of their names"):
        reference_among(groups, "ackd")


@pytest.mark.parametrize(("against", "said"), [("nope", "none of them"), ("runs", "several of them")])
def test_a_reference_that_is_no_compared_configuration_is_refused(against, said, capsys):
    for name in ("kd", "ce"):
        make_run(name, right=150)
    assert main(["compare", "runs/kd", "runs/ce", "--figure", "a.png", "--against", against]) == 2
    assert said in capsys.readouterr().err
    assert not Path("a.png").exists()


def test_long_names_of_configurations_are_shown_whole(capsys):
    for end in ("", "_direct"):
        make_run(f"cifar100_wrn_40_2_mobilenetv2_student+ackd{end}", right=150)
    assert main(["compare", "runs", "--figure", "a.png"]) == 0
    column = "".join(line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line)
    assert "mobilenetv2_student+ackd_direct/seed0" in column


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_run_without_predictions_or_with_other_images_is_named(which):
    first, second = make_run("kd", right=9, which=which), make_run("ce", right=8, images="other", which=which)
    none = make_run("none")
    (different,) = paired_tests({"kd": [first], "ce": [second]}, which)
    assert "different images" in different
    (missing,) = paired_tests({"kd": [first], "none": [none]}, which)
    assert f"ackd test {none}" in missing
    assert paired_tests({"kd": [first]}, which) == []


@pytest.mark.parametrize(
    ("accuracies", "expected"), [([0.9, 0.91, 0.92], "88.52 to 93.48"), ([], "-"), ([1.0] * 2, "100.00 to 100.00")]
)
def test_interval_over_seeds(accuracies, expected):
    assert interval_text([Path("none")] * len(accuracies), accuracies, "last") == expected


def test_a_damaged_file_of_predictions_is_named():
    first, second = make_run("kd", right=9), make_run("ce", right=8)
    answers_file(second, "last").write_bytes(b"x")
    with pytest.raises(ACKDError, match=str(answers_file(second, "last"))):
        paired_tests({"kd": [first], "ce": [second]}, "last")


def test_a_shorter_training_is_said(capsys):
    make_run("kd", right=160, steps=2000)
    make_run("ce", right=150)
    assert main(["compare", "runs/kd", "runs/ce", "--figure", "a.png"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "different numbers of steps, so a difference in accuracy may come from that: kd/seed0 2,000, ce/seed0 100"
        in shown
    )


def test_runs_on_other_classes_are_said_in_place_of_all_else(capsys):
    for name, classes, steps in (("three", 3, 100), ("ten", 10, 2000)):
        run = make_run(name, steps=steps)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "class_names": list(map(str, range(classes)))}))
    assert main(["compare", "runs/three", "runs/ten", "--figure", "a.png"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "trained on data of other classes, so the accuracies cannot be compared: three/seed0 (3 classes)" in shown
    assert "numbers of steps" not in shown
    assert "no paired test" not in shown


def test_the_same_classes_in_another_order_are_compared(capsys):
    for name, names, right in (("kd", ["a", "b", "c"], 160), ("ce", ["b", "a", "c"], 150)):
        summary = make_run(name, right=right) / "summary.json"
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "class_names": names}))
    assert main(["compare", "runs/kd", "runs/ce", "--figure", "a.png"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "other classes" not in shown
    assert "kd/seed0 is 5.00 points better than ce/seed0" in shown


def test_columns_that_no_run_has_are_left_out():
    make_run("kd")
    columns = [column.header for column in compare(["runs"]).columns]
    assert columns == ["configuration", "method", "student", "n", "val last", "parameters"]
    assert not compare(["runs"]).caption
    make_run("ce", right=150)
    table = compare(["runs"])
    assert [column.header for column in table.columns][5:] == ["test last", "95 % interval", "parameters"]
    assert list(table.columns[5].cells) == ["75.00", "-"]
    assert str(table.caption).startswith("interval of test last")


def test_a_test_accuracy_of_some_seeds_says_of_how_many():
    for seed, right in enumerate([150, None, 160]):
        make_run("kd", seed=seed, right=right)
    table = compare(["runs"])
    (column,) = [each for each in table.columns if each.header == "test last"]
    assert next(iter(column.cells)).endswith("(2 of 3)")


def test_a_validation_of_older_weights_is_not_that_of_the_last_ones():
    """A run of 3 epochs, with a validation after the second."""
    summary = make_run("kd") / "summary.json"
    content = json.loads(summary.read_text())
    summary.write_text(json.dumps({**content, "measured_at": 66, "best": {"val/acc": 0.5}}))
    assert [column.header for column in compare(["runs"]).columns][4:] == ["val best", "parameters"]
    make_run("kd", seed=1)
    (column,) = [each for each in compare(["runs"]).columns if each.header == "val last"]
    assert list(column.cells) == ["50.00 (1 of 2)"]


def test_arguments_that_come_with_another_class_are_not_in_the_name():
    def data(name, seed, **arguments):
        run = make_run(name, seed=seed, config="kd")
        settings = {"seed_everything": seed, "data": {"class_path": name, "init_args": arguments}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))

    data("Photos", 0, batch_size=64, root="a", split=0.1)
    data("Digits", 1, batch_size=32, size=8)
    assert list(group_runs(["runs"])) == [
        'kd (batch_size=64, class_path="Photos")',
        'kd (batch_size=32, class_path="Digits")',
    ]
    data("Photos", 2, batch_size=64, root="a", split=0.2)  # of one class, and so no consequence of it
    assert "split=0.1" in " ".join(group_runs(["runs"]))


def test_teachers_that_differ_are_said():
    for seed in range(2):
        summary = make_run("kd", seed=seed) / "summary.json"
        content = json.loads(summary.read_text())
        summary.write_text(json.dumps({**content, "teacher": {"sha256": str(seed)}}))
        make_run("ce", seed=seed)
    assert compare(["runs"]).caption == "runs of kd learned from different teacher files"


@pytest.mark.parametrize(("others", "differ"), [("ab", True), ("aa", False), ("a", False)])
def test_assistants_that_differ_are_said(others, differ):
    for seed in range(2):
        summary = make_run("kd", seed=seed) / "summary.json"
        known = [{"sha256": digest} for digest in others[seed : seed + 1]]
        content = {**json.loads(summary.read_text()), "teacher": {"sha256": "same"}, "other_teachers": known}
        summary.write_text(json.dumps(content))
    assert bool(compare(["runs"]).caption) is differ


@pytest.mark.parametrize("several", [False, True])
def test_what_changes_no_result_makes_no_group(several):
    for seed, cache in enumerate((None, "kept")):
        config = make_run("kd", seed=seed) / "config.yaml"
        teacher = {"network": "resnet20", "cache": cache}
        settings = {"model": {"teacher": [teacher, {"network": "resnet8"}] if several else teacher}}
        config.write_text(yaml.safe_dump({"seed_everything": seed, **settings, "data": {"cache": bool(seed)}}))
    assert list(group_runs(["runs"])) == ["kd"]


def test_figures_of_a_run_are_not_replaced(monkeypatch, capsys):
    run = make_run("kd", right=160)
    for name in ("curves.png", "learners.png"):
        (run / name).write_bytes(b"of the run")
    monkeypatch.chdir(run)
    assert main(["compare", "."]) == 0
    assert "kd/seed0" in capsys.readouterr().out
    assert Path("comparison.png").is_file()
    for name in ("curves.png", "learners.png"):
        assert main(["compare", ".", "--figure", name]) == 2
        assert f"--figure {name} is a figure of the run" in capsys.readouterr().err
        assert Path(name).read_bytes() == b"of the run"


def test_a_command_that_is_proposed_can_be_pasted():
    run = Path("runs/with space/seed0")
    make_run("with space")
    assert f"`ackd test '{run}'`" in paired_tests({"a": [run], "b": [make_run("kd", right=160)]}, "last")[0]


@pytest.mark.parametrize(("kind", "count"), [("ImageFolderDataModule", 2), ("my.Data", 2), ("CIFAR100DataModule", 1)])
def test_data_of_one_name_in_two_folders_are_two_configurations(kind, count, tmp_path, monkeypatch):
    runs = []
    for seed, place in enumerate(("a", "b")):
        (tmp_path / place / "photos").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        run = tmp_path / place / make_run("kd", right=150, seed=seed)
        settings = {"class_path": f"ackd_lightning.data.{kind}", "init_args": {"root": "photos"}}
        text = yaml.safe_dump({"seed_everything": seed, "data": settings})
        (run / "config.yaml").write_text(f"{STARTED}{tmp_path / place}\n{text}")
        runs.append(run)
    assert len(group_runs(runs)) == count
    (tmp_path / "b/photos").rmdir()
    (tmp_path / "b/photos").symlink_to(tmp_path / "a/photos")
    assert len(group_runs(runs)) == 1


def test_teachers_that_belong_to_the_seed_make_no_configuration():
    for seed in (1, 12):
        run = make_run("aikd", right=150, seed=seed)
        teacher = {"weights": f"R/ce-seed{seed}/student.safetensors"}
        (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "model": {"teacher": teacher}}))
    assert [len(runs) for runs in group_runs(["runs"]).values()] == [2]


def test_one_teacher_of_all_seeds_makes_no_configuration():
    for seed in (0, 1):
        run = make_run("kd", right=150, seed=seed)
        teacher = {"weights": "R/resnet20/seed0/student.safetensors"}
        (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "model": {"teacher": teacher}}))
    assert [len(runs) for runs in group_runs(["runs"]).values()] == [2]


def test_runs_that_are_links_are_found_once(tmp_path):
    run = make_run("kd", right=150)
    (tmp_path / "chosen").mkdir()
    for name in ("first", "second"):
        (tmp_path / "chosen" / name).symlink_to(run.resolve())
    (tmp_path / "chosen" / "circle").symlink_to(tmp_path / "chosen")
    assert [len(runs) for runs in group_runs(["chosen"]).values()] == [1]


@pytest.mark.parametrize("name", ["kd[high]", "at [/new]", ":smile:", "_quick", "a$5_{$"])
def test_names_are_printed_and_drawn_as_they_are(name, monkeypatch, capsys):
    name, drawn = name.replace("/", "-"), []
    for run in (make_run(name, right=150), make_run("other", right=140)):
        (run / "metrics.csv").write_text("epoch,step,val/acc\n0,1,0.5\n")
    save = command.save_figure
    monkeypatch.setattr(command, "save_figure", lambda figure, path: (drawn.append(figure), save(figure, path)))
    assert main(["compare", "runs", "--figure", "a.png"]) == 0
    assert name in capsys.readouterr().out
    shown = [text.get_text().strip() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert sorted(shown) == sorted([f"{name}/seed0 (n=1)", "other/seed0 (n=1)"])


def test_no_digit_is_lost_where_the_output_is_no_terminal(capsys):
    for seed in range(2):
        make_run("a" * 150, right=100 + 10 * seed, seed=seed)
    assert main(["compare", "runs", "--figure", "a.png"]) == 0
    shown = capsys.readouterr().out
    assert "a" * 150 in shown
    assert "52.50 ± 3.54" in shown
    assert "20.73 to 84.27" in shown


@pytest.mark.parametrize("seeds", [(0, 1), (2, 3)])
def test_equal_numbers_of_right_images_are_no_certainty(seeds):
    kd = [make_run("kd", seed=seed, right=152) for seed in range(2)]
    ce = [make_run("ce", seed=seed, right=150) for seed in seeds]
    (sentence,) = paired_tests({"kd": kd, "ce": ce}, "last")
    assert "1.00 points better" in sentence
    assert sentence.endswith("may be chance")
    assert interval_text(kd, [0.76, 0.76], "last") == "74.70 to 77.30"  # 12.71 * 0.5 / sqrt(12) / sqrt(2)


def test_a_run_keeps_its_own_name_beside_links_to_it(tmp_path):
    run = make_run("kd", right=150)
    for name in ("a", "zz"):
        (tmp_path / "runs" / name).symlink_to(run.resolve())
    assert list(group_runs(["runs"])) == ["kd/seed0"]
