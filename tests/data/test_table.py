from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from ackd_lightning.data import TableDataModule
from ackd_lightning.data.table import read_columns
from ackd_lightning.errors import ACKDError

PYARROW = importlib.util.find_spec("pyarrow") is not None


@pytest.fixture
def photos(tmp_path, picture):
    (tmp_path / "photos").mkdir()
    for number in range(24):
        picture(number).save(tmp_path / "photos" / f"{number:02d}.png")
    return tmp_path


def lines(labels, start=0):
    return [(f"photos/{number + start:02d}.png", label) for number, label in enumerate(labels)]


def write(path, rows, header=("path", "label"), delimiter=","):
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(
            pyarrow.table({name: [row[column] for row in rows] for column, name in enumerate(header)}), path
        )
        return
    text = "\n".join(delimiter.join(map(str, row)) for row in (header, *rows))
    path.write_text(text + "\n", encoding="utf-8-sig")


def made(root, **options):
    module = TableDataModule(root, **{"batch_size": 4, "cache": False, "val_fraction": 0.0, **options})
    module.setup()
    return module


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["dog", "cat"], ("cat", "dog")),
        ([1, 0], ("0", "1")),
        ([2, 1], ("1", "2")),
        ([10, 2], ("2", "10")),
    ],
)
def test_a_table_of_paths_and_labels(photos, suffix, labels, names):
    if suffix == ".parquet" and not PYARROW:
        pytest.skip("needs pyarrow")
    delimiter = "\t" if suffix == ".tsv" else ";"
    write(photos / f"train{suffix}", lines(labels * 8), delimiter=delimiter)
    write(photos / f"test{suffix}", lines(labels * 4, start=16), delimiter=delimiter)
    module = made(photos, train=f"train{suffix}", test=f"test{suffix}")
    assert module.class_names == names
    assert module.train_targets.tolist() == [1, 0] * 8
    assert (module.num_train_samples, len(module.test_dataloader().dataset)) == (16, 8)


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Training", "dev", "holdout")])
def test_parts_in_a_column(photos, names):
    split = [names[0]] * 12 + [names[1]] * 6 + [names[2]] * 6
    rows = [(*line, part) for line, part in zip(lines(["a", "b"] * 12), split, strict=True)]
    write(photos / "all.csv", rows, header=("path", "label", "set"))
    module = made(photos, train="all.csv", split_column="set", val_fraction=0.1)
    sizes = [len(loader.dataset) for loader in (module.val_dataloader(), module.test_dataloader())]
    assert (module.num_train_samples, sizes) == (12, [6, 6])


def test_one_table_is_split_and_its_images_are_those_of_the_files(photos, picture):
    write(photos / "all.csv", lines(["a", "b"] * 12))
    module = made(photos, train="all.csv")
    assert len(module.test_dataloader().dataset) == 4
    assert module.num_train_samples == 20
    write(photos / "test.csv", lines(["b", "a"]))
    batch = next(iter(made(photos, train="all.csv", test="test.csv").test_dataloader()))
    expected = torch.frombuffer(bytearray(picture(1).tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    assert torch.equal(batch.image[1], expected)
    assert batch.target.tolist() == [1, 0]


def test_names_for_numbers(photos):
    write(photos / "all.csv", lines([0, 2] * 12))
    module = made(photos, train="all.csv", class_names=["cat", "dog", "owl"])
    assert module.class_names == ("cat", "dog", "owl")
    assert set(module.train_targets.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("labels", "names", "targets"),
    [
        ([10, 20, 30], ["30", "10", "20"], [1, 2, 0]),  # names in the order of a network
        (["007", "12", "7.0"], ["12", "7"], [1, 0, 1]),
        ([0, 1, 2], ["0", "1", "2"], [0, 1, 2]),
        ([0, 1, 2], ["10", "20", "30"], [0, 1, 2]),
    ],
)
def test_numbers_that_are_names(photos, labels, names, targets):
    write(photos / "all.csv", lines(labels * 8))
    module = made(photos, train="all.csv", test="all.csv", class_names=names)
    assert module.class_names == tuple(names)
    assert module.train_targets.tolist() == targets * 8


@pytest.mark.parametrize("empty", ["", "-1", "nan"])
def test_images_without_a_label(photos, caplog, empty):
    write(photos / "all.csv", lines([0, 1] * 10 + [empty] * 4))
    with caplog.at_level(logging.WARNING):
        module = made(photos, train="all.csv", val_fraction=0.25)
    assert (module.train_targets < 0).sum() == 4
    assert all((batch.target >= 0).all() for batch in module.test_dataloader())
    assert "4 of 24" in caplog.text


def test_a_class_may_be_called_nan_where_it_is_listed(photos):
    write(photos / "all.csv", lines(["nan", "pita", "rye"] * 8))
    module = made(photos, train="all.csv", class_names=["nan", "pita", "rye"])
    assert set(module.train_targets.tolist()) == {0, 1, 2}


GOOD = lines(["a", "b"] * 4)


@pytest.mark.parametrize(
    ("rows", "options", "named"),
    [
        (GOOD, {"train": "no.csv"}, r"no\.csv"),
        (GOOD, {"path_column": "file"}, "'file'.*path_column"),
        (GOOD, {"label_column": "lable"}, "did you mean 'label'.*label_column"),
        (GOOD, {"split_column": "set"}, "'set'.*split_column"),
        ([*GOOD, ("photos/99.png", "a")], {}, r"1 of 9 .*99\.png of line 10"),
        ([*GOOD, ("", "a")], {}, "line 10"),
        ([*GOOD, ("photos/09.png", "a", "more")], {}, "line 10 .*3 fields"),
        (lines([0, 1, "cat", 1]), {}, "'cat' in line 4"),
        (lines(["dog", "cat", 7, "dog"]), {}, "7 in line 4"),
        (lines([0, 1, 0.5, 1]), {}, r"'0\.5' in line 4"),
        (lines([0, 1, -2, 1]), {}, "'-2' in line 4"),
        (lines(["a"] * 4), {}, "1 classes"),
        (lines([0, 5]), {"class_names": ["x", "y"]}, "label 5"),
        (lines([1, 2]), {"class_names": ["x", "y"]}, "run from 1 to 2 .*: subtract 1 from the labels"),
        (lines([0, 1, 2]), {"class_names": ["0", "2", "1"]}, "label 2 .* class named '2' or number 2 .*, '1'"),
        (lines([0, 1, 2]), {"class_names": ["10", "2", "1", "0"]}, "label 2 .* class named '2' or number 2 .*, '1'"),
        (lines([0, 1]), {"class_names": ["x", "x"]}, "class_names has 'x' twice"),
        (lines(["inf", "1"]), {}, "'inf' in line 2|1 in line 3"),
        ([], {}, "lists no images"),
        ([*GOOD, (f"photos/{'x' * 300}.png", "a")], {}, r"1 of 9 .* of line 10"),
        ([*GOOD, ('"' + "x" * 140_000 + '"', "a")], {}, r"line 10 of .*all\.csv cannot be read as CSV \(field larger"),
    ],
)
def test_bad_tables_are_refused_in_one_sentence(photos, rows, options, named):
    write(photos / "all.csv", rows)
    with pytest.raises(ACKDError, match=named) as caught:
        made(photos, **{"train": "all.csv", "batch_size": 2, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is empty"),
        ("path,label,label\nphotos/00.png,a,b\nphotos/01.png,c,d\n", "2 columns 'label'"),
        (",path,label\n7,photos/00.png,a\n8,photos/99.png,b\n", r"99\.png of line 3"),  # the index of pandas
    ],
)
def test_headers_as_people_write_them(photos, text, named):
    (photos / "all.csv").write_text(text)
    with pytest.raises(ACKDError, match=named):
        made(photos, train="all.csv")


def test_spaces_after_a_delimiter_belong_to_no_field(photos):
    rows = [f'photos/{number:02d}.png, "{name}"' for number, name in enumerate(["dog", "a, b"] * 12)]
    (photos / "all.csv").write_text("\n".join(["path, label", *rows]))
    assert made(photos, train="all.csv").class_names == ("a, b", "dog")


@pytest.mark.skipif(not PYARROW, reason="needs pyarrow")
def test_rows_of_parquet_are_counted_from_the_first(photos):
    rows = [(*row, 90 + number) for number, row in enumerate([("photos/99.png", "a"), *GOOD])]
    write(photos / "all.parquet", rows, header=("path", "label", ""))
    with pytest.raises(ACKDError, match=r"99\.png of row 1 of .*all\.parquet"):
        made(photos, train="all.parquet")


def test_numbers_of_any_length_are_classes_of_their_own(photos):
    names = ["900000000000000101", "900000000000000102", "900000000000000999"]
    write(photos / "all.csv", lines(names * 8))
    module = made(photos, train="all.csv")
    assert (module.class_names, module.train_targets.bincount().min()) == (tuple(names), 6)


@pytest.mark.skipif(not PYARROW, reason="needs pyarrow")
def test_true_and_false_are_names_and_large_fractions_are_refused(photos):
    for name, labels in (("bool", [True, False] * 12), ("float", [2.0**60, 2.0, 1.0, 2.0])):
        write(photos / f"{name}.parquet", lines(labels))
    assert made(photos, train="bool.parquet").class_names == ("False", "True")
    with pytest.raises(ACKDError, match=r"without its last digits.*whole numbers or text"):
        made(photos, train="float.parquet")


@pytest.mark.skipif(not PYARROW, reason="needs pyarrow")
@pytest.mark.parametrize("labels", [[b"a", b"b"], [["a"], ["b"]]])
def test_labels_that_are_neither_text_nor_numbers(photos, labels):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"path": ["photos/00.png", "photos/01.png"], "label": labels})
    parquet.write_table(table, photos / "all.parquet")
    with pytest.raises(ACKDError, match="label_column"):
        made(photos, train="all.parquet")


@pytest.mark.skipif(not PYARROW, reason="needs pyarrow")
@pytest.mark.parametrize(("paths", "kind"), [([b"photos/00.png", b"photos/01.png"], "bytes"), ([0, 1], "int")])
def test_paths_that_are_no_text(photos, paths, kind):
    write(photos / "all.parquet", [(path, label) for path, label in zip(paths, "ab", strict=True)])
    with pytest.raises(ACKDError, match=f"column 'path' holds {kind} in row 1 .*, and paths are text: set path_col"):
        made(photos, train="all.parquet")


def test_a_class_without_training_images_is_said(photos, caplog):
    write(photos / "all.csv", lines([0, 2] * 12))
    module = made(photos, train="all.csv", class_names=["a", "b", "c"])
    assert module.num_classes == 3
    assert f"no training image of {photos / 'all.csv'} has the class b" in caplog.messages


@pytest.mark.parametrize("label", ["c", ""])
def test_labels_of_the_test_table_are_classes_of_the_training_table(photos, label):
    write(photos / "train.csv", GOOD)
    write(photos / "test.csv", lines(["a", label]))
    with pytest.raises(ACKDError, match=r"line 3 of .*test\.csv"):
        made(photos, train="train.csv", test="test.csv")


def test_files_that_are_no_tables(photos):
    (photos / "x.csv").write_bytes(b"\xff\xfe\x00p")
    with pytest.raises(ACKDError, match=r"x\.csv is not in UTF-8"):
        made(photos, train="x.csv")
    if PYARROW:
        (photos / "x.parquet").write_bytes(b"PAR1 cut off")
        with pytest.raises(ACKDError, match=r"x\.parquet cannot be read"):
            made(photos, train="x.parquet")


def test_a_class_is_one_however_unicode_composes_its_name(photos):
    forms = ["\u00e9pic\u00e9a", "e\u0301pice\u0301a", "oak"]
    write(photos / "train.csv", lines(forms * 6))
    write(photos / "test.csv", lines(forms[1:], start=18))
    for given in (None, ["oak", forms[1]]):
        data = made(photos, train="train.csv", test="test.csv", class_names=given)
        assert set(data.class_names) == {forms[0], "oak"}
        assert data.num_classes == 2


def test_images_in_two_parts_are_said(photos, caplog):
    write(photos / "train.csv", GOOD)
    write(photos / "test.csv", GOOD[:3])
    with caplog.at_level(logging.WARNING):
        made(photos, train="train.csv", test="test.csv")
    assert "3 images" in caplog.text


def test_a_changed_label_is_seen_through_the_cache(photos):
    options = {"train": "all.csv", "cache": True}
    write(photos / "all.csv", lines(["a", "b"] * 12))
    first = made(photos, **options).train_targets
    write(photos / "all.csv", lines(["b", "a"] * 12))
    assert not torch.equal(made(photos, **options).train_targets, first)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([("photos/03.png", "b")], "1 image listed again, such as photos/03.png in line 10 of "),
        ([("photos/03.png", "a")], "1 image listed with two labels, such as photos/03.png: 'b' in line 5 of "),
        ([("photos/20.png", "B")], "the test part has no images of 1 of the training part's classes: B"),
    ],
)
def test_what_is_odd_about_a_table_is_said(photos, more, said, caplog):
    write(photos / "train.csv", [*lines(["a", "b"] * 4), *more])
    write(photos / "test.csv", lines(["a", "b"], start=12))
    made(photos, train="train.csv", test="test.csv")
    assert sum(said in line for line in caplog.messages) == 1


def test_paths_of_another_system_are_named(photos):
    write(photos / "train.csv", [(path.replace("/", "\\"), label) for path, label in lines(["a", "b"] * 4)])
    with pytest.raises(ACKDError, match=r"write them with / in place of \\"):
        made(photos, train="train.csv")


def test_zeros_before_a_number_that_are_lost_are_said(photos, caplog):
    write(photos / "all.csv", lines(["001", "002", "2"] * 8))
    assert made(photos, train="all.csv").class_names == ("1", "2")
    assert "the label '001' in line 2 of" in caplog.text
    assert "is read as 1: list such labels in class_names to keep them" in caplog.text
    caplog.clear()
    assert made(photos, train="all.csv", class_names=["001", "002"]).class_names == ("001", "002")
    assert "is read as" not in caplog.text


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_that_are_not_asked_for_are_not_read(tmp_path, ending):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / f"a.{ending}"
    if ending == "csv":
        table.write_text("path,label,more\na.png,0,x\nb.png,1,y\n")
    else:
        import pyarrow

        parquet.write_table(pyarrow.table({"path": ["a.png", "b.png"], "label": [0, 1], "more": [[1.0], [2.0]]}), table)
    seen = []

    def choose(names):
        seen.extend(filter(None, names))
        return ["label", "path"]

    content = read_columns(table, choose)
    assert seen == ["path", "label", "more"]
    assert set(content) - {""} == {"label", "path"}
    assert content["path"] == ["a.png", "b.png"]


def test_two_spellings_of_a_path_are_one_image(photos, caplog):
    write(photos / "train.csv", lines(["a", "b"] * 8))
    write(photos / "test.csv", [(str(photos / path), label) for path, label in lines(["a", "b"] * 4)])
    with caplog.at_level(logging.WARNING):
        made(photos, train="train.csv", test="test.csv")
    assert "8 images" in caplog.text


def test_an_image_that_is_listed_again_is_not_trained_on_and_tested(photos):
    rows = lines(["a", "b"] * 12)
    write(photos / "all.csv", [*rows, *((f"./{path}", label) for path, label in rows)])
    module = made(photos, train="all.csv", val_fraction=0.3)
    names = {}
    for part in ("train", "val", "test"):
        source, positions = module._part(part)
        names[part] = {source.names[each] for each in positions.tolist()}
    assert names["test"]
    assert names["val"]
    assert not names["train"] & names["test"]
    assert not names["train"] & names["val"]


def test_a_validation_part_that_is_not_read_is_said(photos, caplog):
    write(photos / "train.csv", lines(["a", "b"] * 4))
    write(photos / "val.csv", lines(["a", "b"] * 4, start=8))
    write(photos / "test.csv", lines(["a", "b"] * 4, start=16))
    with caplog.at_level(logging.WARNING):
        made(photos, train="train.csv", val="val.csv", test="test.csv", val_fraction=0.0)
    assert "the validation part of the data is not read" in caplog.text
