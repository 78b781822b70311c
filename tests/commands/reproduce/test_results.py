"""What runs gave, as records and as a table; the runs are folders that the tests write."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch

from ackd_lightning.commands.reproduce.output import draw, read_records, write_records, write_tables
from ackd_lightning.commands.reproduce.proxies import proxy_lines
from ackd_lightning.commands.reproduce.results import Line, lines, note, record
from ackd_lightning.commands.reproduce.tables import Row
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weights import digest, save_weights
from commands.reproduce.helpers import PAIR, make_job, own_table, write_run

VALIDATION = "`best` is the epoch with the highest validation accuracy."
ON_TEST = "`best` is the best epoch on the test set itself and therefore too optimistic; nothing else is selected."


def finished(place, name="kd-seed0", *, seed=0, settings=None, row="kd", kind="student", pair=PAIR, **run):
    folder = place / "runs" / pair / name
    write_run(folder, **run)
    return make_job(folder, seed=seed, row=row, kind=kind, pair=pair, settings=settings or {"model.optimizer.lr": 0.1})


class TestRecord:
    def test_fields(self, tmp_path):
        job = finished(tmp_path, seed=3, last=0.5, best=0.6)
        assert record(job) == {
            "pair": PAIR,
            "row": "kd",
            "kind": "student",
            "seed": 3,
            "run": f"runs/{PAIR}/kd-seed0",
            "config_hash": job.config_hash,
            "commit": "abc+",
            "versions": {"ackd_lightning": "0", "torch": "2"},
            "device": "CPU, 1 threads",
            "precision": "32-true",
            "epochs": 2,
            "seconds": 12.5,
            "skipped_steps": 0,
            "teacher_acc": None,
            "last": {"acc": 0.5, "acc_top5": 0.75},  # of the test set, and of the target learner alone
            "best": {"acc": 0.6, "acc_top5": 0.85},
            "best_on": "validation",
        }

    def test_best_of_a_run_without_validation_data_is_that_of_its_curve(self, tmp_path):
        shown = record(finished(tmp_path, curve=[0.2, 0.6, 0.4]))
        assert (shown["last"]["acc"], shown["best"]["acc"]) == (0.4, pytest.approx(0.6))
        assert shown["best"]["acc_top5"] == pytest.approx(0.85)
        assert shown["best_on"] == "test"

    def test_a_run_with_one_checkpoint_has_no_best(self, tmp_path):
        shown = record(finished(tmp_path, last=0.5))
        assert (shown["last"]["acc"], shown["best"], shown["best_on"]) == (0.5, {}, None)

    def test_without_a_commit(self, tmp_path):
        assert record(finished(tmp_path, versions={"torch": "2"}))["commit"] is None


def planner(weights=None, teacher=Path("nowhere")):
    return SimpleNamespace(
        given_weights=lambda pair: weights, known_teacher=lambda pair: SimpleNamespace(folder=teacher)
    )


def table_of(place, **content):
    pair = {"config": PAIR, "paper": {"teacher": 80, "kd": 50, "ce": 40}}
    return own_table(place, **{"pairs": {PAIR: pair}, "rows": {"ce": {"label": "student alone"}, "kd": {}}, **content})


def content_of(table, records=(), *, extra=(), failed=None, against=None, **given):
    rows = [*table.rows.values(), *extra]
    return lines(table, list(table.pairs.values()), rows, records, planner(**given), failed or {}, against)


def plain(line):
    """Cells without label, interval, and difference from the row of reference."""
    _, paper, ours, _, best, n, difference, _ = line.cells()
    return [paper, ours, best, n, difference]


def cells(content):
    return {(line.metric, line.row): plain(line) for line in content}


class TestLines:
    def test_of_several_seeds(self, tmp_path):
        values, best = [0.40, 0.50, 0.66], [0.5, 0.5, 0.7]
        runs = [
            record(finished(tmp_path, f"kd-seed{seed}", seed=seed, last=last, best=high))
            for seed, (last, high) in enumerate(zip(values, best, strict=True))
        ]
        (_, alone, kd) = content_of(table_of(tmp_path), runs)
        mean, spread = 100 * sum(values) / 3, 100 * statistics.stdev(values)
        assert plain(kd) == ["50.00", f"{mean:.2f} ± {spread:.2f}", "56.67 ± 11.55", "3", "+2.00"]
        assert alone.cells() == ["student alone", "40.00", "not run", "-", "-", "0", "-", "-"]

    def test_differences_pair_the_seeds(self, tmp_path):
        """Over seeds 0 and 1: 2 and 4 points; Student's t of one degree of freedom is 12.706."""
        accuracies = {"kd": (0.50, 0.60, 0.90), "ce": (0.48, 0.56)}
        runs = [
            record(finished(tmp_path, f"{row}-seed{seed}", row=row, seed=seed, last=last))
            for row, values in accuracies.items()
            for seed, last in enumerate(values)
        ]
        (_, alone, kd) = content_of(table_of(tmp_path), runs, against="kd")
        assert alone.over == pytest.approx((-2.0, -4.0))
        assert alone.cells()[3] == f"{52 - 12.706 * 4:.2f} to 100.00"  # of 102.82
        assert alone.cells()[-1] == f"-3.00 ({-3 - 12.706:.2f} to {-3 + 12.706:.2f})"
        assert kd.cells()[-1] == "-"

    def test_of_one_seed_without_figure_or_best(self, tmp_path):
        table = table_of(tmp_path, pairs={PAIR: {"config": PAIR}})
        shown = cells(content_of(table, [record(finished(tmp_path, last=0.5))]))
        assert shown["acc", "kd"] == ["-", "50.00", "-", "1", "-"]

    def test_below_the_paper(self, tmp_path):
        shown = cells(content_of(table_of(tmp_path), [record(finished(tmp_path, curve=[0.48, 0.4567]))]))
        assert shown["acc", "kd"] == ["50.00", "45.67", "48.00", "1", "-4.33"]

    def test_of_two_metrics_and_errors(self, tmp_path):
        pair = {"config": PAIR, "paper": {"kd": [60, 30.5], "ce": [55, None]}}
        table = table_of(tmp_path, metrics=["acc", "acc_top5"], error=True, pairs={PAIR: pair})
        shown = cells(content_of(table, [record(finished(tmp_path, last=0.5, best=0.6))]))
        assert shown["acc", "kd"] == ["40.00", "50.00", "60.00", "1", "+10.00"]
        assert shown["acc_top5", "kd"] == ["69.50", "75.00", "85.00", "1", "+5.50"]
        assert shown["acc", "ce"][0] == "45.00"
        assert shown["acc_top5", "ce"] == ["-", "not run", "-", "0", "-"]

    def test_of_failures(self, tmp_path):
        runs = [record(finished(tmp_path, last=0.5))]
        failed = {(PAIR, "kd"): "one seed", (PAIR, "ce"): "all seeds"}
        shown = cells(content_of(table_of(tmp_path), runs, failed=failed))
        assert shown["acc", "kd"][1:4] == ["50.00", "-", "1"]  # the seed that is there
        assert shown["acc", "ce"][1:4] == ["failed", "-", "0"]

    def test_rows_of_ones_own_come_last(self, tmp_path):
        runs = [record(finished(tmp_path, row="dkd", last=0.5))]
        content = content_of(table_of(tmp_path), runs, extra=[Row("dkd", "dkd", label="dkd")])
        assert [line.row for line in content] == ["teacher", "ce", "kd", "dkd"]
        assert cells(content)["acc", "dkd"] == ["-", "50.00", "-", "1", "-"]

    def test_runs_of_another_pair_do_not_count(self, tmp_path):
        runs = [record(finished(tmp_path, pair="other", last=0.5))]
        assert cells(content_of(table_of(tmp_path), runs))["acc", "kd"][1] == "not run"


class TestTeacher:
    def test_that_was_trained(self, tmp_path):
        job = finished(tmp_path, "seed0", row="", kind="teacher", last=0.75, best=0.77)
        other = finished(tmp_path, "early", row="", kind="early_stopped", last=0.7)
        content = content_of(table_of(tmp_path), [record(job), record(other)], teacher=job.folder)
        assert cells(content)["acc", "teacher"] == ["80.00", "75.00", "77.00", "1", "-5.00"]

    @pytest.mark.parametrize(
        ("metadata", "shown"),
        [({"test_acc": "0.791"}, ["80.00", "79.10", "-", "1", "-0.90"]), ({"val_acc": "0.9"}, None), ({}, None)],
    )
    def test_that_was_given(self, tmp_path, metadata, shown):
        weights = save_weights({"w": torch.zeros(1)}, tmp_path / "t.safetensors", metadata)
        expected = shown or ["80.00", "not run", "-", "0", "-"]
        assert cells(content_of(table_of(tmp_path), weights=weights))["acc", "teacher"] == expected

    def test_that_was_given_and_measured_by_a_run_that_it_taught(self, tmp_path):
        weights = save_weights({"w": torch.zeros(1)}, tmp_path / "t.safetensors", {"val_acc": "0.9"})
        runs = [record(finished(tmp_path, name, row=name, curve=[0.5])) for name in ("eskd", "kd")]
        runs[0]["teacher_acc"], runs[1]["teacher_acc"] = 0.6, 0.77  # eskd learns from another teacher
        table = table_of(tmp_path, rows={"eskd": {}, "kd": {}})
        assert cells(content_of(table, runs, weights=weights))["acc", "teacher"][1] == "77.00"
        assert cells(content_of(table, runs[:1], weights=weights))["acc", "teacher"][1] == "not run"

    def test_that_was_given_in_a_file_without_metadata(self, tmp_path):
        weights = tmp_path / "t.pth"
        weights.write_bytes(b"never read")
        assert cells(content_of(table_of(tmp_path), weights=weights))["acc", "teacher"][1] == "not run"


class TestNote:
    def test_says_which_teachers_were_not_trained_here(self, tmp_path):
        assert "not trained here" not in note(table_of(tmp_path), [])
        text = note(table_of(tmp_path), [], given=[Path("weights/t.safetensors")])
        assert "Teachers that were not trained here: weights/t.safetensors." in text
        stated = save_weights({"w": torch.ones(1)}, tmp_path / "t.safetensors", {"val_acc": "0.387100"})
        text = note(table_of(tmp_path), [], given=[stated])
        assert f"Teachers that were not trained here: {stated} (38.71 % on its validation images)." in text

    def test_names_what_a_number_depends_on(self, tmp_path):
        runs = [
            record(finished(tmp_path, "a", last=0.5, best=0.6)),
            record(finished(tmp_path, "b", last=0.5, best=0.6, device="H200", epochs=3, versions={"torch": "3"})),
            record(finished(tmp_path, "t", kind="teacher", last=0.5, device="of the teacher")),
        ]
        text = note(table_of(tmp_path), runs)
        assert VALIDATION in text
        assert "Epochs: 2, 3. Device: CPU, 1 threads; H200, 32-true." in text
        assert "Versions: ackd_lightning 0, torch 2; torch 3. Commit: abc+, unknown." in text
        assert "sample standard deviation over n seeds" in text

    def test_warns_of_a_best_on_the_test_set(self, tmp_path):
        text = note(table_of(tmp_path), [record(finished(tmp_path, curve=[0.5]))])
        assert ON_TEST in text
        assert VALIDATION not in text

    def test_explains_errors(self, tmp_path):
        assert "The paper reports errors; the table shows 100 minus the error." in note(
            table_of(tmp_path, error=True), []
        )
        assert "errors" not in note(table_of(tmp_path), [])


class TestFiles:
    @pytest.fixture
    def content(self, tmp_path):
        runs = [record(finished(tmp_path, f"kd{seed}", seed=seed, last=0.5 + seed / 100)) for seed in (0, 1)]
        return content_of(table_of(tmp_path), runs, failed={(PAIR, "ce"): "why"})

    def test_markdown(self, tmp_path, content):
        markdown, _, _ = write_tables(table_of(tmp_path), content, tmp_path, "What to know.")
        assert markdown.read_text(encoding="utf-8") == (
            f"# An own table\n\n## {PAIR}, top-1 accuracy in %\n\n"
            "| row | paper | ours, last | 95 % interval | ours, best | n | minus paper |\n"
            "|---|---|---|---|---|---|---|\n"
            "| teacher | 80.00 | not run | - | - | 0 | - |\n"
            "| student alone | 40.00 | failed | - | - | 0 | - |\n"
            "| kd | 50.00 | 50.50 ± 0.71 | 44.15 to 56.85 | - | 2 | +0.50 |\n"
            "\nWhat to know.\n"
        )

    def test_a_label_with_a_bar_stays_one_cell(self, tmp_path):
        table = table_of(tmp_path, rows={"ce": {"label": "mine|x"}})
        markdown, _, _ = write_tables(table, content_of(table), tmp_path, "")
        assert "| mine\\|x | " in markdown.read_text(encoding="utf-8")

    def test_csv(self, tmp_path, content):
        _, plain, _ = write_tables(table_of(tmp_path), content, tmp_path, "")
        with plain.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert [row["row"] for row in rows] == ["teacher", "student alone", "kd"]
        assert rows[2] == {
            "pair": PAIR,
            "metric": "acc",
            "row": "kd",
            "paper": "50.00",
            "ours, last": "50.50 ± 0.71",
            "95 % interval": "44.15 to 56.85",
            "ours, best": "-",
            "n": "2",
            "minus paper": "+0.50",
            "values": "50.00 51.00",
        }

    def test_a_section_for_every_pair_and_metric(self, tmp_path):
        pairs = {name: {"config": PAIR} for name in ("one", "two")}
        table = table_of(tmp_path, pairs=pairs, metrics=["acc", "acc_top5"])
        markdown, _, figure = write_tables(table, content_of(table), tmp_path, "")
        headings = [line for line in markdown.read_text().splitlines() if line.startswith("## ")]
        assert headings == [
            f"## {pair}, {metric} accuracy in %" for metric in ("top-1", "top-5") for pair in ("one", "two")
        ]
        single = write_tables(table_of(tmp_path), content_of(table_of(tmp_path)), tmp_path, "")[2]
        assert figure == single  # of the same name, so it was replaced
        assert [path.name for path in (markdown, figure)] == ["own.md", "own.png"]

    def test_figure_shows_every_value(self, tmp_path, content):
        def picture(lines):
            draw(lines, tmp_path / "f.png")
            return matplotlib.image.imread(tmp_path / "f.png")

        full, empty = picture(content), picture([Line(PAIR, "kd", "kd", "acc", None, (), ())])
        assert full.std() > 0.02
        assert empty.shape[0] < full.shape[0]  # grows with its rows
        blue = np.array([0x1F, 0x77, 0xB4]) / 255
        assert np.array_equal(picture([*content, Line(PAIR, "at", "at", "acc", None, (), ())]), full)  # was not run
        long = picture([Line(PAIR, "kd", "a label of many words " * 8, "acc", None, (50.0,), ())])
        assert np.all(long[:, :3, :3] == 1)  # it is wrapped, not cut off at the left
        painted = [np.abs(image[..., :3] - blue).max(axis=2).min() < 0.05 for image in (full, empty)]
        assert painted == [True, False]  # ours are drawn where there are some


class TestRecords:
    def test_those_of_other_runs_stay(self, tmp_path):
        path = tmp_path / "results.json"
        a, b, c = (str(finished(tmp_path, name).folder) for name in "abc")
        row = {"pair": "p", "row": "kd"}
        first = [{"run": a, "seed": 0, **row}, {"run": b, "seed": 0, **row}]
        write_records(first, path)
        assert json.loads(path.read_text()) == first
        changed = [{"run": b, "seed": 1, **row}, {"run": c, **row}, {"run": b, "seed": 0, "pair": "q", "row": "kd"}]
        write_records(changed, path)  # of another pair with the same run, too
        assert json.loads(path.read_text()) == [first[0], *changed]
        (Path(a) / "summary.json").unlink()  # removed by hand: then it is no result any more
        write_records([], path)
        assert [each["run"] for each in json.loads(path.read_text())] == [b, c, b]

    @pytest.mark.parametrize("content", ['[{"run": ', "3", "[3]", '[{"run": "a"}]'])
    def test_a_damaged_file_is_named(self, tmp_path, content):
        path = tmp_path / "results.json"
        path.write_text(content)
        with pytest.raises(ACKDError, match=r"results\.json is damaged"):
            read_records(path)

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "results.json"
        write_records([], path)
        before = path.read_bytes()

        def full(self, text, **options):
            with self.open("w") as stream:
                stream.write(text[:5])
            raise OSError("no space left")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            write_records([{"run": "b", "pair": "p", "row": "kd"}], path)
        assert path.read_bytes() == before


def test_proxies_are_measured_for_students_that_have_one(tmp_path):
    paper = {"eskd": {"acc_proxy": 76.3, "cka_teacher_proxy": 0.7761}}
    table = own_table(
        tmp_path, proxies=True, pairs={PAIR: {"config": PAIR, "paper": paper}}, rows={"eskd": {}, "takd": {}, "ce": {}}
    )
    keys = ["acc_teacher", "acc_proxy", "acc_student", "acc_gap"]
    keys += [f"{kind}_{two}" for kind in ("cka", "kl") for two in ("teacher_proxy", "proxy_student", "teacher_student")]
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(b"teacher")
    jobs = []
    for seed in (0, 1):
        job = finished(tmp_path, f"eskd{seed}", row="eskd", seed=seed, settings={"learns from": "early_stopped"})
        kept = {key: number + seed / 10 for number, key in enumerate(keys)}
        model = {"teacher": {"network": "resnet14", "weights": str(weights), "options": None}}
        job = replace(job, config={"model": model})
        job.student_file.write_bytes(b"student")
        files = [digest(each) for each in (weights, weights, job.student_file)]
        (job.folder / "proxies.json").write_text(json.dumps({"networks": files, "values": kept}))
        jobs.append(job)
    jobs.append(finished(tmp_path, "ce0", row="ce", settings={"learns from": ""}))
    given = SimpleNamespace(teacher_file=lambda pair: ("resnet20", str(weights)))
    content = proxy_lines(table, list(table.pairs.values()), list(table.rows.values()), jobs, given)
    assert [line.row for line in content] == ["eskd"] * 10 + ["takd"] * 10  # none for a student alone
    shown = {(line.row, line.label): plain(line) for line in content}
    assert shown["eskd", "eskd: Acc(P)"] == ["76.30", "1.05 ± 0.07", "-", "2", "-75.25"]
    assert shown["eskd", "eskd: CKA(T, P)"] == ["0.7761", "4.0500 ± 0.0707", "-", "2", "+3.2739"]
    assert shown["eskd", "eskd: Acc(S)"][0] == "-"
    assert shown["takd", "takd: KL(T, S)"] == ["-", "not run", "-", "0", "-"]
    assert {line.metric for line in content} == {"proxy", "cka", "kl"}
