"""Tables are read from YAML, and whatever is wrong in them is said before anything is trained."""

from __future__ import annotations

import pytest
import yaml

from ackd_lightning.commands.reproduce.planning import needs_teacher
from ackd_lightning.commands.reproduce.results import lines
from ackd_lightning.commands.reproduce.tables import choose, read_table, table_names
from ackd_lightning.config.files import config_folder
from ackd_lightning.errors import ACKDError
from commands.reproduce.helpers import PAIR, own_table, write_table

HERE = {"config": PAIR}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ({"pairs": {"p": {"config": "digits_resnet20_resnet9"}}}, "no packaged .* did you mean 'digits_resnet20_"),
            ({"pairs": {"p": {"assistants": ["resnet14"]}}}, "pair 'p' of own.yaml has no `config`; name"),
            ({"pairs": {"p": "digits_resnet20_resnet8"}}, "pair 'p' of own.yaml has no `config`; name"),
            (
                {"pairs": {"p": {**HERE, "asistants": "a"}}},
                "pair 'p' of own.yaml has no key 'asistants'; did .*'assist",
            ),
            (
                {"pairs": {"p": {**HERE, "assistants": "resnet14"}}},
                "`assistants` of pair 'p' of own.yaml is 'resnet14'",
            ),
            ({"pairs": {"p": {**HERE, "rows": {"kd": 3}}}}, "row 'kd' of pair 'p' of own.yaml"),
            ({"pairs": {"p": {**HERE, "rows": {"dkdd": {}}}}}, "names 'dkdd'; did you mean 'dkd'"),
            ({"pairs": {"p": {**HERE, "rows": {"kd+dkdd": {}}}}}, "names 'dkdd'; did you mean 'dkd'"),
            ({"pairs": {"p": {**HERE, "rows": {"kd": {"modl.method.beta": 2}}}}}, "'modl.method.beta'; did .* 'model'"),
            ({"pairs": {"p": {**HERE, "rows": "nowhere"}}}, "nowhere.yaml does not exist"),
            ({"set": {"trainr.max_epochs": 2}}, "'trainr.max_epochs'; did you mean 'trainer'"),
            ({"pairs": {"p": {**HERE, "assistants": [3]}}}, "`assistants` of pair 'p' of own.yaml is "),
            ({"pairs": {"p": {**HERE, "assistants": ["a", "a"]}}}, "`assistants` of pair 'p' .* twice"),
            ({"pairs": ["p"]}, "own.yaml is not a table; add `pairs` and `rows`"),
            ({"error": "no"}, "`error` of own.yaml is 'no'; write true or false"),
            ({"metric": ["acc"]}, "own.yaml has no key 'metric'; did you mean 'metrics'"),
            ({"metrics": ["top1"]}, "own.yaml has the metric 'top1'; known are acc, acc_top5"),
            ({"rows": {"kdd": {}}}, "row 'kdd' of own.yaml has the method 'kdd', which does not exist; .*'kd'"),
            (
                {"rows": {"r": {"method": "ackdd"}}},
                "row 'r' .* method 'ackdd', which does not exist; did you mean 'ackd",
            ),
            (
                {"rows": {"kd+crdd": {}}},
                "row 'kd.crdd' of own.yaml has the method 'crdd', which does not exist; .*'crd",
            ),
            ({"rows": {"kd": {"sets": {}}}}, "row 'kd' of own.yaml has no key 'sets'; did you mean 'set'"),
            ({"rows": {"kd": {"teacher": "uncle"}}}, "teacher 'uncle'; it must be one of teacher, early_stopped, assi"),
            ({"pairs": {"p": {**HERE, "paper": {"kd": "70.1"}}}}, "pair 'p' .* figure '70.1' for 'kd'; write a number"),
            ({"pairs": {"p": {**HERE, "paper": {"kd": [1, 2]}}}}, r"\[1, 2\] for 'kd'; write .* each of acc$"),
        ],
    )
    def test_of_a_file(self, here, content, sentence):
        write_table(here / "own.yaml", **content)
        with pytest.raises(ACKDError, match=sentence):
            read_table("own.yaml")

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("pairs: [", "own.yaml, line 1"),
            (b"\xff\xfe", "own.yaml"),
            ("", "own.yaml is not a table"),
            ("- pairs", "own.yaml is not a table"),
        ],
    )
    def test_of_what_is_no_table(self, here, text, sentence):
        (here / "own.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ACKDError, match=sentence):
            read_table("own.yaml")

    @pytest.mark.parametrize("name", ["table22", "tables/table2", "own.yaml"])
    def test_of_a_name(self, name):
        with pytest.raises(ACKDError, match=f"{name}"):
            read_table(name)

    def test_of_a_preset(self):
        with pytest.raises(ACKDError, match="smok"):
            read_table("table2", "smok")

    @pytest.mark.parametrize(
        ("pairs", "methods", "sentence"),
        [
            (["resnet110_resnet2"], [], "table2 has no pair 'resnet110_resnet2'; did you mean 'resnet110_resnet20'"),
            ([], ["ce", "takdd"], "--methods names 'takdd'; did you mean 'takd'"),
            ([], [""], "--methods names ''"),
        ],
    )
    def test_of_a_choice(self, pairs, methods, sentence):
        with pytest.raises(ACKDError, match=sentence):
            choose(read_table("table2"), pairs, methods)


def test_packaged_tables_are_those_of_the_paper():
    assert table_names() == [f"table{number}" for number in range(1, 8)]
    assert read_table("table3.yaml") == read_table("table3")


def test_a_file_is_named_after_itself_and_its_first_comment(here):
    table = own_table(here, set={"model.optimizer.lr": 0.1})
    assert (table.name, table.title) == ("own", "An own table")
    assert (table.metrics, table.error, table.proxies) == (("acc",), False, False)
    assert (table.settings, table.teacher_settings, table.student_settings) == ({"model.optimizer.lr": 0.1}, {}, {})


def test_a_configuration_beside_the_table_is_found(here):
    (here / "mine").mkdir()
    (here / "mine" / "net.yaml").write_text("seed_everything: 0")
    write_table(here / "mine" / "own.yaml", pairs={"p": {"config": "net.yaml"}})
    assert read_table("mine/own.yaml").pairs["p"].config.resolve() == here / "mine" / "net.yaml"


def test_rows_of_a_pair_may_be_in_a_file_that_tables_share(here):
    (here / "ours.yaml").write_text("dkd: {model.method.beta: 3.0}\nkd+crd:\n")
    table = own_table(here, pairs={"p": {**HERE, "rows": "ours"}, "q": {**HERE, "rows": "resnet110_resnet20"}})
    assert table.pairs["p"].rows == {"dkd": {"model.method.beta": 3.0}, "kd+crd": {}}
    assert table.pairs["q"].rows == read_table("table7").pairs["resnet110_resnet20"].rows


def test_a_preset_takes_the_place_of_pairs_and_settings():
    plain, smoke = read_table("table4"), read_table("table4", "smoke")
    over = yaml.safe_load((config_folder() / "tables" / "smoke.yaml").read_text())
    assert (smoke.rows, smoke.metrics) == (plain.rows, ("acc", "acc_top5"))
    assert (list(smoke.pairs), smoke.settings) == ([PAIR], over["set"])
    assert smoke.student_settings == over["student_set"]
    assert "data.val_fraction" in plain.settings  # and none of it is left
    assert "data.val_fraction" not in smoke.settings
    assert (smoke.name, smoke.title) == ("table4-smoke", f"{plain.title} (preset smoke, other data)")
    assert smoke.pairs[PAIR].figure("ackd", 0) is None


def test_a_preset_clears_settings_that_it_does_not_have(here):
    write_table(here / "over.yaml")
    (here / "over.yaml").write_text(yaml.safe_dump({"pairs": {"p": HERE}}))
    write_table(
        here / "own.yaml",
        set={"model.optimizer.lr": 1},
        teacher_set={"model.optimizer.lr": 2},
        student_set={"model.optimizer.lr": 3},
    )
    table = read_table("own.yaml", "over.yaml")
    assert table.settings == table.teacher_settings == table.student_settings == {}


class TestChoice:
    def test_nothing_chosen_is_everything(self):
        table = read_table("table3")
        pairs, rows = choose(table, [], [])
        assert (pairs, rows) == (list(table.pairs.values()), list(table.rows.values()))

    def test_order_is_that_of_the_command_and_repetitions_go(self):
        table = read_table("table2")
        pairs, rows = choose(table, ["wrn_28_4_resnet56", "resnet110_resnet20"], ["takd", "ce", "takd"])
        assert [pair.name for pair in pairs] == ["wrn_28_4_resnet56", "resnet110_resnet20"]
        assert rows == [table.rows["takd"], table.rows["ce"]]

    @pytest.mark.parametrize(
        ("table", "method", "row"),
        [
            ("table2", "dkd", ("dkd", "dkd", "teacher")),
            ("table7", "eskd", ("eskd", "kd", "early_stopped")),
            ("table6", "takd", ("takd", "kd", "assistant")),
            ("table2", "kd+crd", ("kd+crd", "kd+crd", "teacher")),
        ],
    )
    def test_a_method_that_the_table_lacks_becomes_a_row(self, table, method, row):
        (chosen,) = choose(read_table(table), [], [method])[1]
        assert (chosen.name, chosen.method, chosen.teacher) == row
        assert (chosen.label, chosen.settings) == (method, {})


def test_a_row_overrides_what_its_schedule_says(here):
    rows = {
        "takd": {},
        "takd2": {"method": "kd", "teacher": "assistant", "label": "TAKD"},
        "eskd": {"method": "ackd", "set": {"model.optimizer.lr": 1}},
        "ce": None,
    }
    table = own_table(here, rows=rows)
    assert {name: (row.method, row.teacher, row.label, row.settings) for name, row in table.rows.items()} == {
        "takd": ("kd", "assistant", "takd", {}),
        "takd2": ("kd", "assistant", "TAKD", {}),
        "eskd": ("ackd", "early_stopped", "eskd", {"model.optimizer.lr": 1}),
        "ce": ("ce", "teacher", "ce", {}),
    }


@pytest.mark.parametrize(
    ("metrics", "paper", "figures"),
    [
        (["acc"], {"kd": 70}, [70.0]),
        (["acc"], {"kd": [70.5]}, [70.5]),
        (["acc"], {"kd": None}, [None]),
        (["acc"], {}, [None]),
        (["acc", "acc_top5"], {"kd": [70, 90.5]}, [70.0, 90.5]),
        (["acc", "acc_top5"], {"kd": [70, None]}, [70.0, None]),
        (["acc", "acc_top5"], {"kd": [None, 90]}, [None, 90.0]),
        (["acc", "acc_top5"], {"kd": 70}, [70.0, None]),  # one figure alone is that of the first metric
    ],
)
def test_figures(here, metrics, paper, figures):
    table = own_table(here, metrics=metrics, pairs={"p": {**HERE, "paper": paper}})
    assert [table.pairs["p"].figure("kd", number) for number in range(len(metrics))] == figures


class _NoWeights:
    def given_weights(self, pair):
        return None

    def known_teacher(self, pair):
        return None


@pytest.mark.parametrize(
    ("name", "row", "shown"),
    [
        ("table5", "ackd", [71.33, 90.43]),
        ("table5", "semckd", [70.87, None]),
        ("table5", "teacher", [73.31, 91.42]),
        ("table4", "ackd", [55.97, 78.15]),
    ],
)
def test_errors_are_shown_as_accuracies(name, row, shown):
    table = read_table(name)
    content = lines(table, list(table.pairs.values()), list(table.rows.values()), [], _NoWeights(), {})
    assert [(line.metric, line.paper) for line in content if line.row == row] == list(
        zip(["acc", "acc_top5"], shown, strict=True)
    )


def test_a_row_may_be_a_sum_of_methods(here):
    table = own_table(here, rows={"kd+crd": {}, "both": {"method": "wttm+rkd"}})
    assert [row.method for row in table.rows.values()] == ["kd+crd", "wttm+rkd"]
    (pair,) = table.pairs.values()
    assert all(needs_teacher(row, pair) for row in table.rows.values())


@pytest.mark.parametrize(
    ("method", "settings", "needed"),
    [
        ("pskd", {}, False),
        ("pskd", {"model.method.weight_det": 1.0}, True),
        ("pskd", {"model.method.init_args.weight_det": 1.0}, True),
        ("kd", {"model.method": "ackd_lightning.methods.CE", "model.optimizer.lr": 0.1}, False),
        ("ce", {"model.method": {"class_path": "ackd_lightning.methods.KD"}}, True),
        ("kd", {"model.method": {"class_path": "ackd_lightning.methods.CE", "init_args": {}}}, False),
        ("kd", {"model.method.misspelled": 1.0}, True),  # the plan of the run names it
    ],
)
def test_the_settings_of_a_row_decide_whether_it_has_a_teacher(here, method, settings, needed):
    for place in ("row", "pair"):
        of_row = settings if place == "row" else {}
        of_pair = {"rows": {"own": settings}} if place == "pair" else {}
        table = own_table(here, pairs={"p": {**HERE, **of_pair}}, rows={"own": {"method": method, "set": of_row}})
        assert needs_teacher(table.rows["own"], table.pairs["p"]) == needed
