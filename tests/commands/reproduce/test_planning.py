"""Which runs a table needs, in which order, with which settings; none of them is carried out."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ackd_lightning.commands.reproduce.command import _plan
from ackd_lightning.commands.reproduce.estimate import megabytes, train_images
from ackd_lightning.commands.reproduce.jobs import as_arguments, changed, check_unchanged, union
from ackd_lightning.commands.reproduce.planning import Planner
from ackd_lightning.commands.reproduce.tables import choose, read_table, table_names
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.models import known
from ackd_lightning.models.weights import digest, save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.runs.files import _REQUIRED
from ackd_lightning.training import module
from commands.reproduce.helpers import PAIR, SHORT, make_job, own_table, write_run

# `plan` calls what jsonargparse 4.49 deprecates and Lightning calls, too
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*``instantiate_classes`` was deprecated")
RUNS = Path("out/runs")
HERE = {"config": PAIR}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # weights of the repository's folder must not count
    return tmp_path


def plan(table, *, methods=(), pairs=(), seeds=(0,), overrides=()):
    some, rows = choose(table, pairs, methods)
    planner = Planner(table, Path("out"), overrides)
    return planner, _plan(table, some, rows, seeds, planner)


def option(job, name):
    """Value of an option of a run's command line; what stands last counts."""
    return next(
        value for key, value in reversed(list(zip(job.arguments, job.arguments[1:], strict=False))) if key == name
    )


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Table 2, pair P2, two seeds."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    try:
        methods = ["ce", "kd", "eskd", "takd", "ackd"]
        return plan(read_table("table2"), methods=methods, pairs=["resnet110_resnet20"], seeds=(0, 1))[1]
    finally:
        os.chdir(before)


def test_networks_are_not_kept_and_what_estimates_need_of_them_is():
    _, jobs = plan(read_table("table2", "smoke"), methods=["ce", "crd", "pskd", "kd"], overrides=SHORT)
    known = {job.row: job.networks for job in jobs}
    for job in jobs:
        assert not any(isinstance(each, nn.Module) for each in vars(job).values())
    assert (known["kd"].student, known["kd"].teachers) == ("resnet8 ()", (("resnet20", {}),))
    assert (known["ce"].teachers, known["kd"].data.image_shape, known["kd"].data.num_classes) == ((), (3, 16, 16), 10)
    plain = sum(each.numel() for each in create_model("resnet8", 10).parameters())
    assert (known["kd"].trained, known["kd"].kept) == (plain, plain)
    assert known["crd"].trained == plain + 2 * (64 * 128 + 128)
    assert known["crd"].bytes_per_image == 2 * 128 * 4  # two memories
    assert known["pskd"].bytes_per_image >= 10 * 2  # a distribution over the classes
    assert known["kd"].bytes_per_image == 0
    by_row = {job.row: job for job in jobs}
    images = train_images(by_row["crd"].images)
    assert images > 100
    heads, memories = 8 * 2 * (64 * 128 + 128), images * 1024
    assert megabytes(by_row["crd"]) - megabytes(by_row["kd"]) == pytest.approx(
        2 * (heads + memories) / 1e6
    )  # last and best


def test_a_plan_builds_each_run_once_and_without_weights(monkeypatch):
    built, probed = [], []
    build, probe = ACKDCLI.build, module.probe

    def counted(cli, *, weights=True):
        build(cli, weights=weights)
        built.append(all(each.is_meta for each in cli.model.student.parameters()))
        assert not cli.datamodule.train_targets.is_meta

    monkeypatch.setattr(ACKDCLI, "build", counted)
    monkeypatch.setattr(module, "probe", lambda *args, **options: probed.append(args) or probe(*args, **options))
    monkeypatch.setattr(known, "_FOUND", {})
    _, jobs = plan(read_table("table2", "smoke"), methods=["ce", "kd", "at"], seeds=(0, 1, 2), overrides=SHORT)
    assert len(jobs) == 1 + 3 * 3
    assert built == [True] * 4  # a teacher, and a student per row whatever the number of seeds
    assert len(probed) == 2  # one per structure


class TestTable2:
    def test_runs_and_what_they_need(self, second):
        teacher, early = RUNS / "cifar100_resnet110/seed0", RUNS / "cifar100_resnet110/early-seed0"
        student = "cifar100_resnet110_resnet20"
        assistant = RUNS / f"{student}+kd/assistant-resnet44-seed0"
        rows = {"ce": (), "kd": (teacher,), "eskd": (early,), "takd": (assistant,), "ackd": (teacher,)}
        files = {"eskd": "kd", "takd": "kd"}
        assert [(job.kind, job.row, job.seed, job.folder, job.needs) for job in second] == [
            ("teacher", "", 0, teacher, ()),
            ("early_stopped", "", 0, early, ()),
            ("assistant", "", 0, assistant, (teacher,)),
            *(
                ("student", row, seed, RUNS / f"{student}+{files.get(row, row)}" / f"{row}-seed{seed}", needs)
                for row, needs in rows.items()
                for seed in (0, 1)
            ),
        ]

    def test_networks_and_schedules(self, second):
        networks = [
            ("resnet110", None, 200, [100, 150]),
            ("resnet110", None, 65, [32, 48]),
            ("resnet44", "resnet110", 200, [100, 150]),
            *[("resnet20", "resnet110", 200, [100, 150])] * 6,  # that of ce is named and not used
            *[("resnet20", "resnet44", 200, [100, 150])] * 2,
            *[("resnet20", "resnet110", 200, [100, 150])] * 2,
        ]
        keys = ("model.student.network", "model.teacher.network", "trainer.max_epochs", "model.lr_scheduler.milestones")
        assert [tuple(job.settings.get(key) for key in keys) for job in second] == networks
        assert [job.epochs for job in second] == [epochs for _, _, epochs, _ in networks]

    def test_all_images_are_trained_on(self, second):
        assert {job.settings["data.val_fraction"] for job in second} == {0}

    def test_students_read_what_they_need(self, second):
        for job in second:
            if job.needs:
                assert option(job, "--model.teacher.weights") == str(job.needs[0] / "student.safetensors")
            else:
                assert "--model.teacher.weights" not in job.arguments
            assert option(job, "--seed_everything") == str(job.seed)
            assert option(job, "--weights_dir") == "null"  # nothing outside the folder

    def test_methods(self, second):
        chosen = [job.config["model"]["method"]["class_path"] for job in second]
        names = [path.rpartition(".")[2] for path in chosen]
        assert names == ["CE", "CE", "KD", "CE", "CE", *["KD"] * 6, "ACKD", "ACKD"]

    def test_hash_tells_experiments_and_not_seeds(self, second):
        hashes = {}
        for job in second:
            hashes.setdefault(job.row or job.kind, set()).add(job.config_hash)
        assert all(len(own) == 1 for own in hashes.values())
        assert len(set.union(*hashes.values())) == len(hashes) == 8  # eskd has the settings of kd, and another teacher

    def test_titles_are_unique(self, second):
        assert len({job.title for job in second}) == len(second)


def small(here, **content):
    rows = {"ce": {}, "kd": {}, "eskd": {}, "takd": {}}
    pair = {**HERE, "assistants": ["resnet14"], "early_stop": 20}
    return own_table(here, **{"rows": rows, "pairs": {PAIR: pair}, **content})


def test_given_weights_replace_the_teachers_run(here):
    weights = save_weights(create_model("resnet20", 10), here / "weights/digits_resnet20.safetensors")
    planner, jobs = plan(small(here), methods=["kd", "takd", "eskd"])
    given = weights.relative_to(here)
    assert [(job.kind, job.row) for job in jobs] == [
        ("early_stopped", ""),
        ("assistant", ""),
        ("student", "kd"),
        ("student", "takd"),
        ("student", "eskd"),
    ]
    early, assistant, kd, takd, eskd = jobs
    assert (early.epochs, early.settings["model.lr_scheduler.milestones"]) == (
        20,
        [10, 16],
    )  # of 60 epochs and of 30, 48
    assert (assistant.needs, kd.needs, takd.needs, eskd.needs) == ((), (), (assistant.folder,), (early.folder,))
    assert {option(job, "--model.teacher.weights") for job in (assistant, kd)} == {str(given)}
    pair = small(here).pairs[PAIR]
    assert (planner.given_weights(pair), planner.teacher_file(pair)) == (given, ("resnet20", str(given)))


def test_every_assistant_learns_from_the_one_before_it_and_a_student_from_the_last_or_from_all(here):
    pair = {**HERE, "assistants": ["resnet14", "resnet8"]}
    table = small(here, pairs={PAIR: pair}, rows={"takd": {}, "dgkd": {}, "ceskd": {}})
    teacher, first, second, takd, dgkd, ceskd = plan(table)[1]
    runs = (teacher, first, second)
    assert [job.kind for job in runs] == ["teacher", "assistant", "assistant"]
    names, files = ("resnet20", "resnet14", "resnet8"), [str(job.student_file) for job in runs]
    assert (first.needs, second.needs) == ((teacher.folder,), (first.folder,))
    assert option(second, "--model.student") == "resnet8"
    assert option(second, "--model.teacher.network") == "resnet14"
    assert (takd.needs, option(takd, "--model.teacher.network")) == ((second.folder,), "resnet8")
    for job in (dgkd, ceskd):
        assert job.needs == tuple(each.folder for each in runs)
        assert job.sources == tuple(each.student_file for each in runs)
        given = yaml.safe_load(option(job, "--model.teacher"))
        assert [(each["network"], each["weights"]) for each in given] == list(zip(names, files, strict=True))
        assert [each["network"] for each in job.settings["model.teacher"]] == list(names)
        assert not any("weights" in each for each in job.settings["model.teacher"])
        assert [name for name, _ in job.networks.teachers] == list(names)
    assert dgkd.config_hash != ceskd.config_hash


def test_settings_of_the_teacher_reach_every_one_of_several_and_no_run_without(here):
    pair = {**HERE, "assistants": ["resnet14"]}
    table = small(here, pairs={PAIR: pair}, rows={"dgkd": {}}, student_set={"model.teacher.interpolation": "bicubic"})
    teacher, assistant, dgkd = plan(table, overrides=["--model.teacher.bf16", "true", "--data.batch_size=8"])[1]
    assert teacher.settings.get("model.teacher.bf16") is None
    assert assistant.settings["model.teacher.bf16"] is True
    teachers = dgkd.settings["model.teacher"]
    assert [each["network"] for each in teachers] == ["resnet20", "resnet14"]
    assert all((each["bf16"], each["interpolation"]) == (True, "bicubic") for each in teachers)
    assert {job.settings["data.batch_size"] for job in (teacher, assistant, dgkd)} == {8}


def test_a_very_short_early_stop_keeps_an_epoch_before_each_milestone(here):
    planner = Planner(
        small(here), Path("out"), ["--trainer.max_epochs", "4", "--model.lr_scheduler.milestones", "[1, 2]"]
    )
    early = planner.teacher(planner.table.pairs[PAIR], early=True)
    assert (early.epochs, early.settings["model.lr_scheduler.milestones"]) == (1, [1, 1])


def test_milestones_of_a_shorter_teacher_are_not_rounded_twice(here):
    pair = {**HERE, "early_stop": 42}  # of 60; 90 * (70 / 100) is 62.99999999999999
    settings = ["--trainer.max_epochs", "100", "--model.lr_scheduler.milestones", "[50, 90]"]
    planner = Planner(small(here, pairs={PAIR: pair}), Path("out"), settings)
    early = planner.teacher(planner.table.pairs[PAIR], early=True)
    assert (early.epochs, early.settings["model.lr_scheduler.milestones"]) == (70, [35, 63])


def test_without_weights_the_teachers_run_gives_them(here):
    planner, (teacher, _) = plan(small(here), methods=["kd"])
    pair = small(here).pairs[PAIR]
    assert planner.given_weights(pair) is None
    assert planner.teacher_file(pair) == ("resnet20", str(teacher.folder / "student.safetensors"))


@pytest.mark.parametrize(
    ("epochs", "milestones", "early"),
    [("60", "[30, 48]", (20, [10, 16])), ("8", "[4, 6]", (3, [1, 2])), ("1", "[]", (1, []))],
)
def test_overrides_shorten_the_early_stopped_teacher_in_proportion(here, epochs, milestones, early):
    table = small(here)
    planner = Planner(
        table, Path("out"), ["--trainer.max_epochs", epochs, "--model.lr_scheduler.milestones", milestones]
    )
    job = planner.teacher(table.pairs[PAIR], early=True)
    assert (job.epochs, job.settings["model.lr_scheduler.milestones"]) == early


def test_overrides_reach_every_run(here):
    _, jobs = plan(small(here), methods=["ce", "eskd", "takd"], overrides=["--model.optimizer.lr=0.011", *SHORT])
    assert [job.kind for job in jobs] == ["teacher", "early_stopped", "assistant", "student", "student", "student"]
    assert {job.settings["model.optimizer.lr"] for job in jobs} == {0.011}
    assert [job.epochs for job in jobs] == [2, 1, 2, 2, 2, 2]


def test_settings_of_a_table_reach_whom_they_are_for(here):
    table = small(
        here,
        set={"model.optimizer.lr": 0.02, "trainer.max_epochs": 9},
        teacher_set={"model.optimizer.weight_decay": 0.003},
        student_set={"data.max_per_class": 7},
        rows={"kd": {"set": {"model.method.temperature": 2.5}}, "takd": {"set": {"trainer.max_epochs": 5}}},
    )
    _, (teacher, assistant, kd, takd) = plan(table)

    def chosen(job):
        keys = (
            "model.optimizer.lr",
            "model.optimizer.weight_decay",
            "data.max_per_class",
            "model.method.temperature",
            "trainer.max_epochs",
        )
        return [job.settings.get(key) for key in keys]

    plain = plan(small(here), methods=["kd"])[1][1].settings
    decay, temperature = plain["model.optimizer.weight_decay"], plain["model.method.temperature"]
    assert temperature != 2.5
    assert decay != 0.003
    assert chosen(teacher) == [0.02, 0.003, None, None, 9]
    assert chosen(assistant) == [0.02, decay, 7, temperature, 9]
    assert chosen(kd) == [0.02, decay, 7, 2.5, 9]
    assert chosen(takd) == [0.02, decay, 7, temperature, 5]


def test_a_pair_has_settings_of_its_own_for_a_row(here):
    pair = {**HERE, "rows": {"kd": {"model.method.temperature": 3.5}, "dkd": {"model.method.beta": 2.0}}}
    table = own_table(here, pairs={"p": pair}, rows={"kd": {"set": {"model.method.temperature": 2.5}}})
    _, jobs = plan(table, methods=["kd", "dkd"], overrides=SHORT)
    found = {job.row: job.settings for job in jobs}
    assert found["kd"]["model.method.temperature"] == 3.5
    assert found["dkd"]["model.method.beta"] == 2.0  # not a row of the table


def test_the_rows_that_compare_maps_read_them_where_the_benchmark_does():
    _, jobs = plan(read_table("table2"), methods=["at", "kd"], pairs=["wrn_40_2_wrn_40_1"])
    found = {job.row: job.settings for job in jobs}
    assert found["at"]["model.teacher.taps"] == found["at"]["model.student.taps"]
    assert list(found["at"]["model.student.taps"]) == ["conv1", "block1", "block2", "block3"]
    assert found["kd"].get("model.student.taps") is None


@pytest.mark.parametrize(
    ("pair", "methods", "overrides", "sentence"),
    [
        ({"assistants": ["resnet14"]}, ["eskd"], [], "`early_stop`"),
        ({"early_stop": 20}, ["takd"], [], "`assistants`"),
        ({"assistants": ["resnet15"]}, ["takd"], [], "resnet15"),
        ({}, ["kd"], ["--trainer.max_epoch", "3"], "trainer.max_epoch"),
        ({}, ["kd"], ["--model.lr_scheduler.milestones", "[x]"], "milestones"),
        ({}, ["kd"], ["--data.batch_size", "0"], "batch_size"),
        (
            {"early_stop": 20},
            ["eskd"],
            ["--trainer.max_epochs", "null", "--trainer.max_steps", "10"],
            r"trainer\.max_epochs is null, and ESKD",
        ),
    ],
)
def test_mistakes_are_found_before_training(here, pair, methods, overrides, sentence):
    with pytest.raises(ACKDError, match=sentence):
        plan(small(here, pairs={PAIR: {**HERE, **pair}}), methods=methods, overrides=overrides)
    assert [path.name for path in here.iterdir()] == ["own.yaml"]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"teacher": {"network": "resnet20"}, "student": "resnet8"}, r"own_pair.yaml has no model\.teacher\.weights"),
        ({"student": "resnet8"}, r"own_pair.yaml has no model\.teacher\.network"),
        ({"teacher": {"network": "resnet20"}}, r"own_pair.yaml has no model\.student"),
        (
            {"teacher": {"network": "resnet20", "weights": "weights/gone.safetensors"}, "student": "resnet8"},
            "--config gone",
        ),
    ],
)
def test_a_configuration_that_is_no_pair_is_refused(here, model, sentence):
    content = {"include": ["data/digits", "recipes/digits", "methods/kd"], "model": model}
    (here / "own_pair.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ACKDError, match=sentence):
        plan(small(here, pairs={"p": {"config": "own_pair.yaml"}}), methods=["kd"])


class TestPairsOfOneTeacher:
    """Two pairs that differ in the student share the teacher of ``digits_resnet20``."""

    def table(self, here, *, early_stop=20, student="resnet14"):
        content = yaml.safe_load("include: [data/digits, recipes/digits, methods/kd]")
        teacher = {"network": "resnet20", "weights": "weights/digits_resnet20.safetensors"}
        content["model"] = {"teacher": teacher, "student": student}
        (here / "other.yaml").write_text(yaml.safe_dump(content))
        pairs = {PAIR: {**HERE, "early_stop": 20}, "other": {"config": "other.yaml", "early_stop": early_stop}}
        return small(here, pairs=pairs)

    def test_it_is_trained_once(self, here):
        _, jobs = plan(self.table(here), methods=["kd", "eskd"])
        teacher, early = RUNS / "digits_resnet20/seed0", RUNS / "digits_resnet20/early-seed0"
        assert [(job.folder, job.needs) for job in jobs] == [
            (teacher, ()),
            (early, ()),
            (RUNS / f"{PAIR}+kd/kd-seed0", (teacher,)),
            (RUNS / "other+kd/kd-seed0", (teacher,)),
            (RUNS / f"{PAIR}+kd/eskd-seed0", (early,)),
            (RUNS / "other+kd/eskd-seed0", (early,)),
        ]

    def test_two_ways_of_stopping_it_early_are_refused(self, here):
        with pytest.raises(ACKDError, match="out/runs/digits_resnet20/early-seed0"):
            plan(self.table(here, early_stop=30), methods=["eskd"])

    def test_two_pairs_of_one_configuration_are_refused(self, here):
        table = small(here, pairs={"one": HERE, "two": HERE})
        with pytest.raises(ACKDError, match=f"out/runs/{PAIR}"):
            plan(table, methods=["ce"])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A student alone; its folder is relative, so that every test finds it empty."""
    return plan(small(tmp_path_factory.mktemp("plan")), methods=["ce"], overrides=SHORT)[1][-1]


class TestRunsThatAreThere:
    def write(self, job, *, finished=True, **changes):
        settings = copy.deepcopy(job.config)
        for key, value in changes.items():
            place = settings
            *path, last = key.split("__")
            for part in path:
                place = place[part]
            place[last] = value
        (job.folder / "checkpoints").mkdir(parents=True)
        (job.folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (job.folder / "checkpoints/last.ckpt").touch()
        if finished:
            (job.folder / "summary.json").write_text("{}")

    def test_states(self, job):
        assert (job.state(), job.finished, job.checkpoint) == ("to do", False, None)
        self.write(job, finished=False)
        assert (job.state(), job.finished, job.checkpoint) == (
            "to continue",
            False,
            job.folder / "checkpoints/last.ckpt",
        )
        (job.folder / "summary.json").write_text("{}")
        assert (job.state(), job.finished, job.checkpoint) == ("finished", True, None)

    @pytest.mark.parametrize("finished", [True, False])
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"model__optimizer__init_args__lr": 0.5}, "model.optimizer.lr = 0.5 and would now have 0.05"),
            ({"trainer__max_epochs": 60}, "trainer.max_epochs = 60 and would now have 2"),
            ({"data__init_args__max_per_class": 3}, "data.max_per_class = 3 and would now have null"),
            (
                {"model__student__network": "resnet14"},
                'model.student.network = "resnet14" and would now have "resnet8"',
            ),
            (
                {"model__lr_scheduler": None},
                'model.lr_scheduler = null and would now have "torch.optim.lr_scheduler.MultiStepLR"',
            ),
        ],
    )
    def test_another_setting_is_refused_by_name(self, job, changes, sentence, finished):
        self.write(job, finished=finished, **changes)
        assert changed(job) is not None
        expected = f"run {job.folder} was made with {sentence}; choose another --out, or remove that run"
        with pytest.raises(ACKDError) as caught:
            check_unchanged(job)
        assert str(caught.value) == expected

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"seed_everything": 7, "name": "x", "runs_dir": "elsewhere", "weights_dir": "weights", "wandb": "project"},
            {"trainer__enable_progress_bar": True, "trainer__log_every_n_steps": 3, "test": True},
            {"data__init_args__root": "/elsewhere", "model__teacher__weights": "/elsewhere/t.safetensors"},
            {"model__of_another_version": 1},
        ],
    )
    def test_what_makes_no_other_experiment_is_not(self, job, changes):
        self.write(job, **changes)
        check_unchanged(job)
        assert changed(job) is None

    def test_settings_without_a_checkpoint_do_not_count(self, job):
        self.write(job, finished=False, model__optimizer__init_args__lr=0.5)
        (job.folder / "checkpoints/last.ckpt").unlink()  # ended in its first epoch: starts again
        assert changed(job) is None

    def test_the_whole_plan_is_refused(self, here, job):
        self.write(job, model__optimizer__init_args__lr=0.5)
        with pytest.raises(ACKDError, match=r"model\.optimizer\.lr = 0\.5"):
            plan(small(here), methods=["kd", "ce"], overrides=SHORT)


def test_tables_agree_on_the_runs_that_they_share():
    """With ``all``, runs of one folder are one run: what makes their settings must be the same in every table."""
    seen = {}
    for table in map(read_table, table_names()):
        for pair in table.pairs.values():
            early = {"early_stop": pair.early_stop} if pair.early_stop else {}
            proxies = early | ({"assistants": pair.assistants} if pair.assistants else {})
            rows = {name: (row.method, row.teacher, row.settings) for name, row in table.rows.items()}
            settings = (table.settings, table.teacher_settings, table.student_settings)
            for key, value in {"settings": settings, **proxies, **rows}.items():
                assert seen.setdefault((pair.config.name, key), value) == value, (table.name, pair.name, key)
            assert seen.setdefault(pair.name, pair.rows) == pair.rows, (table.name, pair.name)  # on any data set
    assert len([key for key in seen if key[0] == "cifar100_resnet110_resnet20.yaml"]) > 15  # tables 2, 6 and 7


@pytest.mark.slow  # plans 15 runs
def test_all_tables_plan_the_runs_that_they_share_alike():
    shared, jobs = {"resnet110_resnet20", "wrn_28_4_resnet56"}, []
    for name in ("table1", "table2", "table6", "table7"):  # those of CIFAR-100
        table = read_table(name)
        jobs += plan(table, methods=["dkd", "at"], pairs=sorted(shared & table.pairs.keys()))[1]
    assert len(union(jobs)) == 6 < len(jobs)


@pytest.mark.parametrize("other", [{"model.method.beta": 2.0}, {"model.method.beta": 8.0, "model.student.taps": ["a"]}])
def test_one_run_with_different_settings_in_two_tables_is_refused(tmp_path, other):
    first = make_job(tmp_path / "run", settings={"model.method.beta": 8.0})
    same = make_job(tmp_path / "run", settings={"model.method.beta": 8.0})
    assert union([first, same]) == {first.folder: first}
    with pytest.raises(ACKDError):
        union([first, make_job(tmp_path / "run", settings=other)])


def test_values_reach_the_command_line_as_yaml_reads_them():
    settings = {"a": None, "b": True, "c": [1, "x"], "d": 1e-4, "e": "resnet8", "f": {"g": 1}}
    arguments = as_arguments(settings)
    assert arguments[::2] == ["--a", "--b", "--c", "--d", "--e", "--f"]
    assert [yaml.safe_load(text) for text in arguments[1::2]] == list(settings.values())


def test_a_run_that_learnt_from_another_file_is_refused(tmp_path):
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(b"one")
    job = make_job(tmp_path / "kd", sources=(weights,))
    write_run(job.folder, teacher={"sha256": digest(weights)})
    (job.folder / "config.yaml").write_text("{}")
    assert changed(job) is None
    weights.write_bytes(b"two")
    assert changed(job) is not None
    with pytest.raises(ACKDError, match=r"was made with a teacher = .* and would now have .*teacher.safetensors"):
        check_unchanged(job)
    weights.unlink()
    with pytest.raises(ACKDError, match=r"teacher.safetensors, which does not exist; choose another --out"):
        check_unchanged(job)


def test_an_unfinished_run_that_learns_from_another_file_is_refused(tmp_path):
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(b"one")
    job = make_job(tmp_path / "kd", sources=(weights,))
    (job.folder / "checkpoints").mkdir(parents=True)
    (job.folder / "config.yaml").write_text("{}")
    known = {**dict.fromkeys(_REQUIRED), "num_classes": 10, "input_size": 16, "teacher_sha256": [digest(weights)]}
    content = {"ackd_lightning": known, "state_dict": {}, "hyper_parameters": {}}
    torch.save(content, job.folder / "checkpoints" / "last.ckpt")
    assert job.state() == "to continue"
    assert changed(job) is None
    weights.write_bytes(b"two")
    with pytest.raises(ACKDError, match=r"was made with a teacher = .* and would now have .*teacher.safetensors"):
        check_unchanged(job)


def test_a_run_on_other_data_is_refused_and_data_that_were_moved_are_not(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    job = make_job(tmp_path / "kd", config={"data": {"init_args": {"root": str(tmp_path / "second")}}})
    write_run(job.folder)
    (job.folder / "config.yaml").write_text(f"data: {{init_args: {{root: {tmp_path / 'first'}}}}}")
    with pytest.raises(ACKDError, match=r"was made with data.root = .*first and would now have .*second"):
        check_unchanged(job)
    (tmp_path / "first").rmdir()
    assert changed(job) is None


def test_damaged_settings_of_a_run_are_named(tmp_path):
    job = make_job(tmp_path / "kd")
    write_run(job.folder)
    (job.folder / "config.yaml").write_text("a: [")
    with pytest.raises(ACKDError, match=r"kd.config.yaml.* is not YAML"):
        check_unchanged(job)


def test_no_teacher_is_trained_for_rows_without_one(here):
    _, jobs = plan(small(here), methods=["ce"], overrides=SHORT)
    assert {job.kind for job in jobs} == {"student"}


def test_a_student_that_learns_from_itself_gets_the_run_of_its_seed_alone(here):
    _, jobs = plan(small(here, rows={"ce": {}, "aikd": {}}), methods=["aikd"], seeds=(0, 3))
    assert [(job.kind, job.row, job.seed) for job in jobs] == [
        ("student", "ce", 0),
        ("student", "aikd", 0),
        ("student", "ce", 3),
        ("student", "aikd", 3),
    ]
    for alone, taught in (jobs[:2], jobs[2:]):
        assert taught.needs == (alone.folder,)
        assert taught.sources == (alone.student_file,)
        assert taught.settings["model.teacher.network"] == alone.settings["model.student.network"] == "resnet8"


def test_the_row_of_the_student_alone_is_shared(here):
    _, jobs = plan(small(here, rows={"ce": {}, "aikd": {}, "pskd": {}}), methods=["ce", "aikd", "pskd"], seeds=(0,))
    assert [(job.row, len(job.needs)) for job in jobs] == [("ce", 0), ("aikd", 1), ("pskd", 0)]
