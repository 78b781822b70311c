"""Classes of a teacher and those of the data: picked, pooled, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.class_map import ClassSelection, TeacherClasses, read_class_map, resolve_class_map

THEIRS = TeacherClasses(5, ["n1", "n2", "n3", "n4", "n5"], ["cat, house cat", "lynx", "crane", "crane", "grey fox"])
NAMES = ("bird", "feline", "fox")


def resolve(given, names=NAMES, theirs=THEIRS, num_classes=3):
    return resolve_class_map(given, theirs=theirs, num_classes=num_classes, names=names, owner="the teacher")


@pytest.mark.parametrize(
    "given",
    [
        {"bird": [2, 3], "feline": [0, 1], "fox": 4},
        {"fox": "n5", "bird": ["n3", "n4"], "feline": ["n1", "n2"]},
        {"fox": "Grey_Fox", "bird": ["n3", 3], "feline": ["house cat", "LYNX"]},
        {0: [2, 3], 1: [0, 1], 2: 4},
        {"0": [2, 3], "1": [0, 1], "2": 4},
        [[2, 3], [0, 1], 4],
        [["n3", "n4"], ["cat", "lynx"], ["n5"]],
    ],
)
def test_names_numbers_and_words_mean_the_same(given):
    assert resolve(given) == ((2, 3), (0, 1), (4,))


def test_names_that_look_like_numbers_are_names():
    assert resolve({"7": 0, "0": 1}, names=("7", "0"), num_classes=2) == ((0,), (1,))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([0, 1], "2 entries .* 3"),
        ([0, 1, 5], "no class 5.*0 to 4"),
        ([0, 1, -1], "no class -1"),
        ([0, 1, True], "no class True"),
        ([0, 1, "crane"], r"several classes .*2, 3"),
        ([0, 1, "grey fix"], "did you mean 'grey fox'"),
        ([0, [1, 0], 2], "uses its class 0"),
        ([0, [], 2], "nothing for class 'feline'"),
        ([0, None, 2], "nothing for class 'feline'"),
        ({"bird": 0, "feline": 1}, "no entry for 'fox'"),
        ({"bird": 0, "feline": 1, "foxx": 2}, "'foxx'.*did you mean 'fox'"),
        ({"bird": 0, "feline": 1, 3: 2}, "entry 3"),
        ({"bird": 0, 0: 1, "fox": 2}, "two entries for class 0"),
        ({"bird": 0, None: 1, "fox": 2}, "entry None.*'null' and 'true' in quotes"),
    ],
)
def test_a_map_that_does_not_fit_is_one_sentence(given, named):
    with pytest.raises(ACKDError, match=named) as caught:
        resolve(given)
    assert "\n" not in str(caught.value)


def test_a_number_that_may_be_a_name_is_refused():
    """YAML reads 002 as 2, which is the class with the number 2 and not the one of that name."""
    numbered = TeacherClasses(4, ["001", "002", "003", "004"])
    assert resolve(["002", "003", "001"], theirs=numbered) == ((1,), (2,), (0,))
    with pytest.raises(ACKDError, match=r"2 may be the class named '002' .* one named '003': write the name in quotes"):
        resolve([2, 3, 1], theirs=numbered)
    with pytest.raises(ACKDError, match=r"4 may be the class named '004' of the teacher: write"):
        resolve(["001", 4, "002"], theirs=numbered)
    assert resolve([2, 1, 0], theirs=TeacherClasses(4, ["0", "1", "2", "3"])) == ((2,), (1,), (0,))


def test_names_that_differ_only_in_case_are_found_as_they_are_written():
    alike = TeacherClasses(2, ["Polish", "POLISH"], ["polish, gloss", "Pole"])
    assert [alike.find(each) for each in ("Polish", "POLISH", "polish", "gloss")] == [0, 1, None, 0]
    with pytest.raises(
        ACKDError, match=r"'polish' is the name of several classes of the teacher \(0, 1\): use a number"
    ):
        resolve(["polish", "Polish"], names=("a", "b"), num_classes=2, theirs=alike)


def test_a_name_needs_names():
    with pytest.raises(ACKDError, match=r"'cat'.*0 to 4"):
        resolve([0, 1, "cat"], theirs=TeacherClasses(5))
    with pytest.raises(ACKDError, match=r"'bird'.*0 to 2"):
        resolve({"bird": 0, "feline": 1, "fox": 2}, names=None)


@pytest.mark.parametrize("name", ["map.yaml", "map.yml", "map.json", "map.JSON"])
def test_a_file_holds_the_same(tmp_path, name):
    given = {"bird": [2, 3], "feline": ["n1"], "fox": 4}
    text = json.dumps(given) if name.lower().endswith("json") else "bird: [2, 3]\nfeline: [n1]\nfox: 4\n"
    (tmp_path / name).write_text(text)
    assert read_class_map(str(tmp_path / name)) == given
    assert read_class_map("features") == "features"


@pytest.mark.parametrize("content", ["", "3", "text", "[", "{}", "[]", "bird: [", "\x00"])
def test_a_file_without_a_map_is_named(tmp_path, content):
    (tmp_path / "map.yaml").write_text(content)
    with pytest.raises(ACKDError, match=r"map\.yaml"):
        read_class_map(str(tmp_path / "map.yaml"))


@pytest.mark.parametrize("given", ["missing.yaml", ".", 3, {}, [], 1.5])
def test_what_is_no_map_is_refused(given):
    with pytest.raises(ACKDError, match="class_map"):
        read_class_map(given)


def test_picked_logits_are_the_conditional_distribution():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 4
    probabilities = logits.softmax(dim=1)
    found = ClassSelection([(4,), (0,)])(logits)
    expected = probabilities[:, [4, 0]] / probabilities[:, [4, 0]].sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.softmax(dim=1), expected)
    assert torch.equal(found, logits[:, [4, 0]])


def test_pooled_probabilities_add_up():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 4
    probabilities = logits.softmax(dim=1)
    found = ClassSelection([(0, 1, 3), (2,), (4,)])(logits).softmax(dim=1)
    pooled = torch.stack([probabilities[:, [0, 1, 3]].sum(dim=1), probabilities[:, 2], probabilities[:, 4]], dim=1)
    torch.testing.assert_close(found, pooled)
