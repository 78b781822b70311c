"""The paper's tables in ``configs/tables`` say what the paper says, and name networks, runs and methods that exist."""

from __future__ import annotations

import importlib
import inspect
from statistics import mean

import lightning.pytorch as L
import pytest
import yaml

from ackd_lightning.commands.reproduce.tables import read_table, table_names
from ackd_lightning.config.files import config_folder, describe_config, load_configs, method_names, packaged_names
from ackd_lightning.models.zoo import list_models

FOLDER = config_folder() / "tables"
NAMES = [f"table{number}" for number in range(1, 8)]
TABLES = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) for name in (*NAMES, "smoke")}
PAIRS = [(table, pair) for table, content in TABLES.items() for pair in content["pairs"]]
MODELS = list_models()
OURS = {"kd_1_1"}
"""Rows that the paper does not have."""
every_table = pytest.mark.parametrize("name", NAMES)
every_pair = pytest.mark.parametrize(("name", "pair"), PAIRS)

# The paper's tables once more, typed by row where the files go by pair. None: no figure there, or not legible.
BY_ROW = {
    "table2": """
        teacher 76.22 74.00 69.57 71.85 78.91
        ce      71.78 69.20 65.17 65.17 73.05
        at      72.94 70.78 66.26 65.55 73.64
        sp      73.18 70.69 61.52 67.67 74.28
        cc      72.22 70.30 65.39 65.16 73.16
        vid     72.52 70.26 65.15 65.49 73.24
        crd     73.57 70.88 66.47 67.32 74.34
        semckd  73.32 70.41 67.70 67.19 73.13
        kd      73.54 70.73 67.94 68.19 74.21
        eskd    73.21 70.69 67.61 67.82 74.61
        takd    73.52 71.42 68.88 68.71 75.29
        ackd    75.29 72.38 69.43 69.48 75.91""",
    "table3": """
        teacher 84.62 87.74
        ce      82.29 83.95
        at      83.84 85.16
        sp      79.75 84.34
        cc      83.89 85.14
        crd     84.11 84.99
        semckd  84.13 85.12
        kd      84.03 85.18
        eskd    83.78 85.44
        takd    84.21 85.37
        ackd    84.42 85.63""",
    "table4": """
        teacher 52.98 None
        ce      51.60 74.37
        at      51.59 76.96
        cc      51.82 75.13
        sp      53.71 76.83
        crd     54.33 77.52
        semckd  54.19 77.48
        kd      54.20 77.45
        eskd    52.58 76.77
        takd    54.95 77.44
        ackd    55.97 78.15""",
    "table5": """
        teacher 26.69 8.58
        ce      30.25 10.93
        at      29.30 10.00
        sp      29.38 10.20
        cc      30.04 10.83
        one     29.45 10.41
        crd     28.83 9.87
        semckd  29.13 None
        kd      29.34 10.12
        eskd    29.12 None
        ackd    28.67 9.57""",
    "table6": """
        kd                        70.73
        collaboration             71.67
        collaboration+attention   72.02
        collaboration+adversarial 71.99
        ackd                      72.38""",
    "table7": """
        D3B1+D3B1 72.02
        D3B1+D2B2 72.38
        D2B2+D2B2 71.64
        D2B2+D1B3 72.16
        D1B3+D1B3 71.40""",
}
# Table 1, typed by row: ESKD, TAKD
PROXIES = """
    acc_teacher         78.91  78.91
    acc_proxy           76.30  76.78
    acc_gap             2.61   2.13
    cka_teacher_proxy   0.7761 0.8234
    cka_proxy_student   0.8016 0.8113
    cka_teacher_student 0.7695 0.7770
    kl_teacher_proxy    0.6627 0.7710
    kl_proxy_student    0.8495 0.8391
    kl_teacher_student  0.9319 0.9166"""


def typed(text: str) -> dict[str, list[float | None]]:
    rows = (line.split() for line in text.strip().splitlines())
    return {name: [None if value == "None" else float(value) for value in values] for name, *values in rows}


def figures(name: str) -> dict[str, list[float | None]]:
    """Figures of a file by row: of all pairs, and for one pair with two metrics of both."""
    papers = [pair["paper"] for pair in TABLES[name]["pairs"].values()]
    columns = {row: [paper[row] for paper in papers] for row in papers[0]}
    if len(TABLES[name]["metrics"]) > 1:
        (columns,) = ({row: paper[row] for row in paper} for paper in papers)
    return columns


def gains(name: str, row: str) -> list[float]:
    """By how much ACKD is above a row, for each pair."""
    rows = figures(name)
    return [ours - theirs for ours, theirs in zip(rows["ackd"], rows[row], strict=True)]


@pytest.mark.parametrize("name", BY_ROW)
def test_figures_equal_a_second_transcription(name):
    assert figures(name) == typed(BY_ROW[name])


def test_figures_of_proxies_equal_a_second_transcription():
    (pair,) = TABLES["table1"]["pairs"].values()
    eskd, takd = ({key: values[column] for key, values in typed(PROXIES).items()} for column in (0, 1))
    assert pair["paper"] == {"eskd": eskd, "takd": takd}


@pytest.mark.parametrize(
    ("name", "row", "points"),
    [
        ("table2", "ce", 3.62),
        ("table2", "kd", 1.58),
        ("table2", "eskd", 1.71),
        ("table2", "takd", 0.93),
        ("table3", "ce", 1.91),
    ],
)
def test_mean_gains_are_those_of_the_text(name, row, points):
    assert mean(gains(name, row)) == pytest.approx(points, abs=0.005 + 1e-9)


def test_gains_over_the_student_alone_range_as_in_the_text():
    assert min(gains("table2", "ce")) == pytest.approx(2.86)
    assert max(gains("table2", "ce")) == pytest.approx(4.31)


def test_gains_on_tiny_imagenet_and_imagenet_are_those_of_the_text():
    tiny = {row: values[0] for row, values in figures("table4").items()}
    best = max(value for row, value in tiny.items() if row != "ackd")
    assert tiny["ackd"] - best == pytest.approx(1.02)
    error = {row: values[0] for row, values in figures("table5").items()}
    before, after = error["ce"] - error["teacher"], error["ackd"] - error["teacher"]
    assert (before, after) == (pytest.approx(3.56), pytest.approx(1.98))
    assert round(100 * (1 - after / before)) == 44


@pytest.mark.parametrize("name", BY_ROW)
def test_ackd_is_best_in_every_column_as_the_text_says(name):
    own = "D3B1+D2B2" if name == "table7" else "ackd"
    rows = {row: values for row, values in figures(name).items() if row != "teacher"}
    sign = -1 if TABLES[name].get("error") else 1
    for column in range(len(rows[own])):
        best = max((row for row in rows if rows[row][column] is not None), key=lambda row: sign * rows[row][column])
        assert best == own


def test_tables_agree_on_what_they_share():
    second = TABLES["table2"]["pairs"]["resnet110_resnet20"]["paper"]
    sixth, seventh = figures("table6"), figures("table7")
    assert sixth["kd"] == [second["kd"]]
    assert sixth["ackd"] == seventh["D3B1+D2B2"] == [second["ackd"]]
    assert all(value > second["kd"] for (value,) in seventh.values())
    (pair, proxies), *others = TABLES["table1"]["pairs"].items()
    assert not others
    for row in ("eskd", "takd"):
        facts = proxies["paper"][row]
        assert facts["acc_teacher"] == TABLES["table2"]["pairs"][pair]["paper"]["teacher"]
        assert facts["acc_gap"] == pytest.approx(facts["acc_teacher"] - facts["acc_proxy"])
        assert facts["acc_gap"] > 2
        assert facts["cka_teacher_proxy"] > facts["cka_teacher_student"]
        assert facts["kl_teacher_proxy"] < facts["kl_teacher_student"]


@every_table
def test_rows_are_in_the_papers_order_and_every_one_has_a_figure(name):
    rows = [row for row in TABLES[name]["rows"] if row not in OURS]
    for pair in TABLES[name]["pairs"].values():
        assert not OURS & pair["paper"].keys()
        assert [row for row in pair["paper"] if row != "teacher"] == rows
        if not TABLES[name].get("proxies"):
            size = len(TABLES[name]["metrics"])
            assert all(len(values) == size for values in pair["paper"].values() if isinstance(values, list))
            assert size == 1 or all(isinstance(values, list) for values in pair["paper"].values())


@every_table
def test_every_row_has_a_method(name):
    for row in read_table(name).rows.values():
        assert f"{row.method}.yaml" in method_names(), row.name


@every_table
def test_rows_of_eskd_and_takd_are_kd_from_a_proxy(name):
    proxies = {"eskd": ("kd", "early_stopped"), "takd": ("kd", "assistant")}
    for row in read_table(name).rows.values():
        if row.name in proxies:
            assert (row.method, row.teacher) == proxies[row.name]
        else:
            assert row.teacher == "teacher"


def test_rows_of_the_ablation_switch_what_their_names_say():
    def switches(row: str) -> tuple[bool, bool]:
        settings, _ = load_configs([TABLES["table6"]["rows"][row].get("method", row)])
        arguments = settings["model"]["method"].get("init_args", {})
        return arguments.get("attention") != "off", arguments.get("adversarial") != "off"

    assert [switches(row) for row in list(TABLES["table6"]["rows"])[2:]] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]


def test_rows_of_table_7_set_the_learners_they_are_called_by():
    for row, given in TABLES["table7"]["rows"].items():
        assert given == {"method": "ackd", "set": {"model.method.branches": row.split("+")}}


@every_pair
def test_a_pair_is_that_of_its_configuration(name, pair):
    given = TABLES[name]["pairs"][pair]
    settings, run = load_configs([given["config"]])
    assert f"{given['config']}.yaml" in packaged_names()
    model = settings["model"]
    teacher = model["teacher"]["network"]
    data = run.removesuffix(f"_{teacher}_{model['student']}")
    assert pair == (run if name == "smoke" else f"{teacher}_{model['student']}")
    assert model["teacher"]["weights"] == f"weights/{data}_{teacher}.safetensors"
    assert f"{data}_{teacher}.yaml" in packaged_names()


@every_pair
def test_a_pair_has_the_proxies_that_its_rows_need(name, pair):
    given = TABLES[name]["pairs"][pair]
    # the pair of a preset takes the place of any table's
    kinds = {row.teacher for table in (NAMES if name == "smoke" else [name]) for row in read_table(table).rows.values()}
    assert ("assistants" in given) == ("assistant" in kinds)
    assert ("early_stop" in given) == ("early_stopped" in kinds)
    settings, _ = load_configs([given["config"]])
    if "assistants" in given:
        model = settings["model"]
        assert set(given["assistants"]) <= set(MODELS) - {model["teacher"]["network"], model["student"]}
    if "early_stop" in given:
        assert 0 < given["early_stop"] < settings["trainer"]["max_epochs"]


def test_early_stops_are_the_papers():
    stops = {
        (name, pair["early_stop"]) for name in NAMES for pair in TABLES[name]["pairs"].values() if "early_stop" in pair
    }
    assert stops == {("table1", 65), ("table2", 65), ("table3", 65), ("table4", 35), ("table5", 35)}


def test_assistants_that_the_paper_names():
    pairs = TABLES["table2"]["pairs"]
    assert pairs["resnet110_resnet20"]["assistants"] == ["resnet44"]
    assert pairs["wrn_28_4_resnet56"]["assistants"] == ["wrn_28_2"]
    for name in ("table1", "table3"):
        for pair, given in TABLES[name]["pairs"].items():
            assert given["assistants"] == pairs[pair]["assistants"]


@every_pair
def test_settings_are_arguments_of_what_they_set(name, pair):
    content = TABLES[name]
    settings, _ = load_configs([content["pairs"][pair]["config"]])

    def parameters(path: str) -> set[str]:
        module, _, attribute = path.rpartition(".")
        return set(inspect.signature(getattr(importlib.import_module(module), attribute)).parameters)

    known = {
        "trainer": set(inspect.signature(L.Trainer).parameters),
        "data": parameters(settings["data"]["class_path"]),
        "model": parameters("ackd_lightning.DistillationModule"),
        "model.student": parameters("ackd_lightning.StudentConfig"),
        "model.teacher": parameters("ackd_lightning.TeacherConfig"),
        "model.optimizer": parameters(settings["model"]["optimizer"]["class_path"]),
        "model.lr_scheduler": parameters(settings["model"]["lr_scheduler"]["class_path"]),
    }
    dotted = [("ackd", content.get(part) or {}) for part in ("set", "teacher_set", "student_set")]
    if name != "smoke":
        table = read_table(name)
        dotted += [(row.method, row.settings) for row in table.rows.values()]
        dotted += list(table.pairs[pair].rows.items())
    for method, given in dotted:
        fragment, _ = load_configs([method])
        arguments = parameters(fragment["model"]["method"]["class_path"])
        for key in given:
            place, _, argument = key.rpartition(".")
            assert argument in (arguments if place == "model.method" else known[place]), key


@every_pair
def test_the_papers_protocol_holds_no_training_image_out(name, pair, tmp_path):
    if name == "smoke":
        assert not any("val_fraction" in key for part in TABLES[name].values() for key in part)
        return
    assert TABLES[name]["set"] == {"data.val_fraction": 0}
    data = load_configs([TABLES[name]["pairs"][pair]["config"]])[0]["data"]
    module, _, attribute = data["class_path"].rpartition(".")
    arguments = {**data.get("init_args", {}), "root": str(tmp_path), "val_fraction": 0}
    assert getattr(importlib.import_module(module), attribute)(**arguments).val_is_test


def test_the_command_finds_every_table():
    assert table_names() == NAMES
    for name in (*NAMES, "smoke"):
        assert describe_config(str(FOLDER / f"{name}.yaml"))


@every_table
@pytest.mark.parametrize("preset", [None, "smoke"])
def test_the_command_reads_every_table(name, preset):
    table = read_table(name, preset)
    assert list(table.rows) == list(TABLES[name]["rows"])
    assert list(table.pairs) == list(TABLES[preset or name]["pairs"])
    assert table.settings == TABLES[preset or name]["set"]
    assert table.title.startswith(describe_config(str(FOLDER / f"{name}.yaml")))
