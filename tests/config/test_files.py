from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ackd_lightning.config.files import (
    config_folder,
    describe_config,
    find_config,
    load_configs,
    merge,
    method_names,
    packaged_names,
    read_config,
)
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import read_value

NAME = "digits_resnet20_resnet8.yaml"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_path_wins_over_a_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(NAME) == config_folder() / NAME
    write(tmp_path / NAME, "seed_everything: 3\n")
    assert find_config(NAME).resolve() == tmp_path / NAME
    assert read_config(find_config(NAME)) == {"seed_everything": 3}


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ("digits_resnet20_resnet8", NAME),
        (NAME, NAME),
        ("ackd_literal", "methods/ackd_literal.yaml"),
        ("kd.yaml", "methods/kd.yaml"),
        ("qat.yaml", "recipes/qat.yaml"),
        ("strong", "recipes/strong.yaml"),
    ],
)
def test_runs_methods_and_recipes_are_found_by_name_with_or_without_suffix(value, where):
    assert find_config(value) == config_folder() / where


@pytest.mark.parametrize(
    ("value", "near"),
    [
        ("digits_resnet20_resnet9.yaml", NAME),
        ("ackd_litteral", "ackd_literal.yaml"),
        ("cifar100_resnet11O", "resnet110"),
    ],
)
def test_an_unknown_name_gets_near_matches(value, near):
    with pytest.raises(ACKDError, match="no such file") as caught:
        find_config(value)
    assert near in str(caught.value)
    assert value in str(caught.value)
    assert "did you mean" in str(caught.value)


@pytest.mark.parametrize("folder", ["", "own/"])
def test_a_file_beside_is_a_near_match(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "photos_student.yaml").write_text("")
    with pytest.raises(ACKDError, match=f"did you mean '{folder}photos_student.yaml'"):
        find_config(f"{folder}photo_student")


@pytest.mark.parametrize("value", [".", "/", ".."])
def test_a_folder_is_no_configuration(value):
    with pytest.raises(ACKDError, match="no such file"):
        find_config(value)


def test_a_name_that_is_like_none_points_at_the_list():
    with pytest.raises(ACKDError, match="`ackd configs` lists"):
        find_config("0000/1111/2222")


def test_packaged_configurations_are_found_from_another_folder(tmp_path):
    code = (
        "from ackd_lightning.config.files import *;"
        f"print(load_configs(['{NAME[:-5]}', 'kd'])[1]); print(len(packaged_names()), len(method_names()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [f"{NAME[:-5]}+kd", str(len(packaged_names())), str(len(method_names()))]


def test_names_are_those_of_the_files_and_every_one_has_a_description():
    assert NAME in packaged_names()
    assert {"ackd.yaml", "ackd_literal.yaml", "ce.yaml", "kd.yaml"} <= set(method_names())
    assert not set(packaged_names()) & set(method_names())
    for name in (*packaged_names(), *method_names()):
        assert describe_config(name)
        assert not describe_config(name).startswith("#")


@pytest.mark.parametrize(
    "path", sorted(config_folder().rglob("*.yaml")), ids=lambda path: str(path.relative_to(config_folder()))
)
def test_every_packaged_file_reads_with_its_includes(path):
    content = read_config(path)
    assert content
    assert "include" not in content


def test_a_packaged_run_holds_what_its_fragments_say():
    content = read_config(find_config(NAME))
    assert content["model"]["student"] == "resnet8"
    assert content["model"]["method"]["class_path"] == "ackd_lightning.methods.ACKD"
    assert content["model"]["optimizer"]["init_args"] == {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    assert "class_path" in content["data"]


def test_includes_are_laid_in_order_and_the_file_itself_comes_last(tmp_path):
    write(tmp_path / "low.yaml", "a: low\nb: low\nc: low\nd: {x: low, y: low}\n")
    write(tmp_path / "high.yaml", "b: high\nc: high\nd: {y: high}\n")
    top = write(tmp_path / "top.yaml", "include: [low, high]\nc: top\n")
    assert read_config(top) == {"a": "low", "b": "high", "c": "top", "d": {"x": "low", "y": "high"}}


def test_includes_nest_and_are_relative_to_the_file_that_names_them(tmp_path):
    write(tmp_path / "parts/deep/last.yaml", "a: 1\n")
    write(tmp_path / "parts/first.yaml", "include: [deep/last]\nb: 2\n")
    top = write(tmp_path / "top.yaml", "include: [parts/first]\n")
    assert read_config(top) == {"a": 1, "b": 2}


def test_a_fragment_beside_the_file_wins_over_a_packaged_one(tmp_path):
    top = write(tmp_path / "top.yaml", "include: [methods/kd]\n")
    assert read_config(top) == read_config(config_folder() / "methods/kd.yaml")
    write(tmp_path / "methods/kd.yaml", "mine: true\n")
    assert read_config(top) == {"mine": True}


def test_the_same_fragment_twice_is_not_a_cycle(tmp_path):
    write(tmp_path / "base.yaml", "a: 1\n")
    write(tmp_path / "one.yaml", "include: [base]\n")
    write(tmp_path / "two.yaml", "include: [base]\n")
    assert read_config(write(tmp_path / "top.yaml", "include: [one, two]\n")) == {"a": 1}


def test_an_empty_file_is_no_settings(tmp_path):
    assert read_config(write(tmp_path / "empty.yaml", "# nothing\n")) == {}
    assert read_config(write(tmp_path / "none.yaml", "include:\na: 1\n")) == {"a": 1}


@pytest.mark.parametrize("second", ["include: [first]\n", "include: [../configs/first]\n", "include: [second]\n"])
def test_an_include_cycle_is_named(tmp_path, second):
    folder = tmp_path / "configs"
    first = write(folder / "first.yaml", "include: [second]\n")
    write(folder / "second.yaml", second)
    with pytest.raises(ACKDError, match="includes itself"):
        read_config(first)


def test_a_missing_fragment_is_named_with_the_known_ones(tmp_path):
    top = write(tmp_path / "top.yaml", "include: [methods/ackdd]\n")
    with pytest.raises(ACKDError, match=r"'methods/ackdd', which does not exist; did you mean 'methods/ackd'"):
        read_config(top)
    with pytest.raises(ACKDError, match=r"leave .yaml out"):
        read_config(write(tmp_path / "top.yaml", "include: [methods/ackd.yaml]\n"))


@pytest.mark.parametrize("included", ["methods/ackd", "{a: 1}", "3"])
def test_an_include_that_is_not_a_list_is_refused(tmp_path, included):
    with pytest.raises(ACKDError, match="not a list"):
        read_config(write(tmp_path / "top.yaml", f"include: {included}\n"))


def test_on_off_yes_and_no_are_text_as_several_settings_are_off(tmp_path):
    text = "gate: off\nlist: [on, Yes, no, n]\nbool: [true, False]\nno: 1\n"
    expected = {"gate": "off", "list": ["on", "Yes", "no", "n"], "bool": [True, False], "no": 1}
    assert read_config(write(tmp_path / "a.yaml", text)) == expected
    assert read_value("off") == "off"


def test_what_is_not_yaml_is_refused_with_its_line(tmp_path):
    with pytest.raises(ACKDError, match=r"bad.yaml, line 2 is not YAML"):
        read_config(write(tmp_path / "bad.yaml", "a: 1\nb: : 2\n"))


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ACKDError, match=r"weights.yaml is not YAML"):
        read_config(tmp_path / "weights.yaml")


def test_no_code_is_run_by_yaml(tmp_path):
    with pytest.raises(ACKDError, match="is not YAML"):
        read_config(write(tmp_path / "evil.yaml", f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]\n", "list"), ("hello\n", "str"), ("3\n", "int")])
def test_what_is_not_a_mapping_is_refused(tmp_path, text, kind):
    with pytest.raises(ACKDError, match=f"holds a {kind}, not settings"):
        read_config(write(tmp_path / "odd.yaml", text))


def test_merging_joins_mappings_replaces_the_rest_and_changes_neither_side():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}
    over = {"a": {"y": [3]}, "b": {"now": "a mapping"}, "c": None}
    copies = yaml.safe_load(yaml.safe_dump([base, over]))
    merged = merge(base, over)
    assert merged == {"a": {"x": 1, "y": [3]}, "b": {"now": "a mapping"}, "c": None}
    merged["a"]["y"].append(4)
    merged["b"]["now"] = "changed"
    assert [base, over] == copies


def test_another_class_drops_the_old_arguments():
    base = {"class_path": "A", "init_args": {"x": 1}}
    assert merge({"data": base}, {"data": {"class_path": "B"}}) == {"data": {"class_path": "B"}}
    new = {"class_path": "B", "init_args": {"y": 2}}
    assert merge({"data": base}, {"data": new}) == {"data": new}
    same = {"class_path": "A", "init_args": {"y": 2}}
    assert merge({"data": base}, {"data": same})["data"]["init_args"] == {"x": 1, "y": 2}
    assert merge({"data": base}, {"data": {"init_args": {"y": 2}}})["data"]["init_args"] == {"x": 1, "y": 2}


def test_a_recipe_over_another_one_keeps_nothing_of_its_classes():
    merged, name = load_configs([NAME, "recipes/adamw"])
    assert name == "digits_resnet20_resnet8+adamw"
    assert merged["model"]["optimizer"] == {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 1e-3, "weight_decay": 0.05},
    }
    assert merged["model"]["lr_scheduler"] == {
        "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "init_args": {"T_max": 0},  # which becomes the length of the fit
    }
    assert merged["model"]["student"] == "resnet8"


def test_every_configuration_lies_over_the_recipe_of_the_paper(tmp_path):
    recipe = read_config(config_folder() / "recipes/sgd.yaml")
    assert load_configs([])[0] == recipe
    own = write(tmp_path / "own.yaml", "model: {optimizer: {init_args: {lr: 0.3}}}\n")
    optimizer = load_configs([str(own)])[0]["model"]["optimizer"]
    assert optimizer["init_args"] == {**recipe["model"]["optimizer"]["init_args"], "lr": 0.3}


def test_a_method_swaps_the_method_of_a_run_and_keeps_the_rest():
    run, _ = load_configs([NAME])
    swapped, name = load_configs([NAME, "kd"])
    assert name == "digits_resnet20_resnet8+kd"
    assert swapped["model"].pop("method") == {"class_path": "ackd_lightning.methods.KD"}
    run["model"].pop("method")
    assert swapped["model"] == run["model"]
    assert {key: value for key, value in swapped.items() if key != "model"} == {
        key: value for key, value in run.items() if key != "model"
    }


@pytest.mark.parametrize(
    ("first", "then"), [("kd_ls", "kd"), ("ackd_teach_all", "ackd"), ("simkd", "atsc"), ("kd_ls", "kd_ea")]
)
def test_a_method_keeps_no_argument_of_one_of_its_class(first, then):
    alone = load_configs([NAME, then])[0]["model"]["method"]
    assert load_configs([NAME, first, then])[0]["model"]["method"] == alone
    assert load_configs([NAME, first])[0]["model"]["method"] != alone


def test_arguments_without_a_class_are_laid_over_those_of_the_method(tmp_path):
    own = write(tmp_path / "own.yaml", "model: {method: {init_args: {temperature: 7.0}}}\n")
    whole = load_configs([NAME, "kd_ls"])[0]["model"]["method"]
    assert load_configs([NAME, "kd_ls", str(own)])[0]["model"]["method"] == {
        **whole,
        "init_args": {**whole["init_args"], "temperature": 7.0},
    }


def test_sgd_over_adamw_is_the_recipe_of_the_paper():
    recipe = load_configs([])[0]["model"]
    over = load_configs([NAME, "recipes/adamw", "recipes/sgd"])[0]["model"]
    assert {key: over[key] for key in recipe} == recipe


def test_a_class_may_be_written_as_text_in_a_file(tmp_path):
    text = "model: {optimizer: SGD, lr_scheduler: CosineAnnealingLR, method: ackd_lightning.methods.KD}\n"
    own = write(tmp_path / "own.yaml", text)
    args = write(tmp_path / "args.yaml", "model: {optimizer: {init_args: {lr: 0.3}}}\n")
    lower = load_configs([NAME])[0]["model"]["optimizer"]
    model = load_configs([NAME, str(own)])[0]["model"]
    assert model["optimizer"] == lower
    assert model["lr_scheduler"] == {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR"}
    assert model["method"] == {"class_path": "ackd_lightning.methods.KD"}
    over = load_configs([NAME, str(own), str(args)])[0]["model"]["optimizer"]
    assert over == {**lower, "init_args": {**lower["init_args"], "lr": 0.3}}


def test_an_empty_configuration_is_refused():
    with pytest.raises(ACKDError, match="--config is empty"):
        load_configs([NAME, ""])


@pytest.mark.parametrize("text", ["w #1/a.safetensors", "#x", "a#b", "'w #1'", "# only"])
def test_a_number_sign_in_a_value_begins_no_comment(text):
    assert read_value(text) == text.strip("'")


def test_later_files_win_and_the_run_is_named_by_all(tmp_path):
    first = write(tmp_path / "one.yaml", "a: 1\nb: 1\n")
    second = write(tmp_path / "two.yml", "b: 2\n")
    for files, numbers, expected in (([first, second], (1, 2), "one+two"), ([second, first], (1, 1), "two+one")):
        settings, name = load_configs([str(each) for each in files])
        assert ((settings["a"], settings["b"]), name) == (numbers, expected)
    assert load_configs([])[1] == ""


# ---------------------------------------------------------------- sums of methods


@pytest.mark.parametrize(
    ("value", "names"), [("kd+crd", ["KD", "CRD"]), ("simkd.yaml+wttm+rld", ["ATSC", "TTM", "RLD"])]
)
def test_methods_joined_by_plus_become_a_sum(value, names):
    settings, name = load_configs([NAME, value])
    method = settings["model"]["method"]
    assert method["class_path"] == "ackd_lightning.methods.Sum"
    assert [each["class_path"].rpartition(".")[2] for each in method["init_args"]["methods"]] == names
    assert name == "+".join([Path(NAME).stem, *(part.removesuffix(".yaml") for part in value.split("+"))])


def test_a_sum_keeps_arguments_and_other_settings_of_its_fragments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.yaml", "seed_everything: 3\nmodel: {method: ackd_lightning.methods.SP}\n")
    settings, _ = load_configs([NAME, "wttm+own.yaml"])
    first, second = settings["model"]["method"]["init_args"]["methods"]
    assert first["init_args"]["weighted"] is True
    assert second == {"class_path": "ackd_lightning.methods.SP"}
    assert settings["seed_everything"] == 3


def test_a_later_configuration_is_laid_over_a_sum():
    settings, _ = load_configs([NAME, "kd+crd", "dkd"])
    assert settings["model"]["method"]["class_path"] == "ackd_lightning.methods.DKD"


@pytest.mark.parametrize(
    ("value", "named"), [("kd+recipes", "recipes"), ("kd+crdd", "crd.yaml"), ("kd+", "''"), ("+", "''")]
)
def test_what_is_no_sum_of_methods_is_refused(value, named):
    with pytest.raises(ACKDError, match=named):
        load_configs([NAME, value])


def test_a_fragment_without_a_method_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.yaml", "seed_everything: 3\n")
    with pytest.raises(ACKDError, match=r"own\.yaml"):
        load_configs([NAME, "kd+own.yaml"])


def test_a_file_whose_name_has_a_plus_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a+b.yaml", "seed_everything: 5\n")
    assert load_configs(["a+b.yaml"])[0]["seed_everything"] == 5
    write(tmp_path / "runs/c+d/config.yaml", "seed_everything: 6\n")
    assert load_configs(["runs/c+d/config.yaml"])[0]["seed_everything"] == 6


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    path = write(tmp_path / "a.yaml", "model:\n  student: resnet8\ntrainer: {}\nmodel:\n  method: KD\n")
    with pytest.raises(ACKDError, match=r"a\.yaml, line 4 is not YAML \('model' stands there twice"):
        read_config(path)
    path = write(tmp_path / "b.yaml", "x: &x {c: 1, d: 2}\ny: {<<: *x, c: 3}\nz: {<<: *x}\n")
    assert read_config(path)["y"] == {"c": 3, "d": 2}


@pytest.mark.parametrize(
    ("text", "name", "nested"),
    [
        ("model.method.temperature: 2", "model.method.temperature", "model: {method: {temperature: ...}}"),
        ("model: {optimizer.lr: 1}", "model.optimizer.lr", "model: {optimizer: {lr: ...}}"),
    ],
)
def test_a_setting_with_dots_is_answered_with_how_it_is_written(tmp_path, text, name, nested):
    with pytest.raises(ACKDError) as caught:
        read_config(write(tmp_path / "a.yaml", text))
    assert f"the setting {name!r} with dots" in str(caught.value)
    assert nested in str(caught.value)


def test_a_section_without_settings_changes_nothing(tmp_path):
    path = write(tmp_path / "a.yaml", "trainer:\nmodel:\ndata:\n")
    assert load_configs([NAME, str(path)])[0] == load_configs([NAME])[0]


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.yaml", "runs_dir: ~/x\ndata: {init_args: {root: ~/pets, extra: [~/a, a~, ~b]}}\n")
    settings = read_config(path)
    assert settings["runs_dir"] == str(tmp_path / "x")
    assert settings["data"]["init_args"] == {"root": str(tmp_path / "pets"), "extra": [str(tmp_path / "a"), "a~", "~b"]}


@pytest.mark.parametrize(("value", "temperature"), [("kd", 9.0), ("./kd", 9.0), ("kd.yaml", 9.0)])
def test_a_file_of_the_current_folder_wins_also_without_its_suffix(tmp_path, monkeypatch, value, temperature):
    monkeypatch.chdir(tmp_path)
    method = {"class_path": "ackd_lightning.KD", "init_args": {"temperature": temperature}}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump({"model": {"method": method}}))
    assert load_configs([value])[0]["model"]["method"]["init_args"] == {"temperature": temperature}


def test_an_explicit_path_is_no_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ACKDError, match="there is no such file"):
        find_config("./kd")


def test_a_class_of_another_package_with_the_same_name_is_another_class():
    first = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
    own = {"class_path": "my_project.SGD", "init_args": {"lr": 0.2}}
    assert merge(first, own) == own
    short = {"class_path": "SGD", "init_args": {"lr": 0.2}}
    assert merge(first, short)["init_args"] == {"lr": 0.2, "momentum": 0.9}
