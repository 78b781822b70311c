"""``ackd predict --images``: any images, with a run or a file; what cannot be read is listed."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ackd_lightning.cli import main
from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.images import Notes, list_images, read_batches
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.runs.tables import write_table

NAMES = tuple(f"digit {number}" for number in range(10))


def description(channels=3, **options):
    numbers = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    return Description("resnet8", 10, 16, class_names=NAMES, channels=channels, **numbers, **options)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights(create_model("resnet8", 10).state_dict(), Path("net.safetensors"), description().metadata())


def draw(path, side=20, mode="RGB"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(
        0, 255, (side, side + 3, len(Image.new(mode, (1, 1)).getbands()))
    )
    Image.fromarray(pixels.squeeze().astype(np.uint8), mode).save(path)


def rows(path="predictions.csv"):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def predict(*arguments):
    return main(["predict", "net.safetensors", "--device", "cpu", *arguments])


def test_a_folder_with_sub_folders_other_files_and_broken_images(capsys):
    draw("new/a/1.png")
    draw("new/b/2.jpg")
    draw("new/0.png")
    Path("new/broken.png").write_bytes(Path("new/0.png").read_bytes()[:60])
    Path("new/empty.jpg").touch()
    Path("new/notes.txt").write_text("x")
    assert predict("--images", "new", "--strict") == 1
    found = rows()
    assert [each["file"] for each in found] == ["0.png", "a/1.png", "b/2.jpg"]
    assert list(found[0]) == ["index", "file", "prediction", "class_name", "probability"]
    assert all(each["class_name"] == NAMES[int(each["prediction"])] for each in found)
    assert all(0.1 <= float(each["probability"]) <= 1 for each in found)
    shown = capsys.readouterr()
    assert "skipped broken.png" in shown.err
    assert "skipped empty.jpg" in shown.err
    assert "3 images, 2 skipped" in shown.out
    assert predict("--images", "new", "--output", "again.csv") == 0


@pytest.mark.parametrize("crop", [None, 1.0])
def test_an_unknown_size_before_the_crop_is_said(crop, capsys):
    draw("new/1.png")
    stated = description(crop_pct=crop).metadata()
    save_weights(create_model("resnet8", 10).state_dict(), Path("net.safetensors"), stated)
    assert predict("--images", "new") == 0
    assert ("does not state how images were resized" in capsys.readouterr().out) == (crop is None)


def test_top_classes_are_those_of_the_network_and_parquet_has_the_same_columns():
    draw("one.png")
    assert predict("--images", "one.png", "--top", "3") == 0
    assert predict("--images", "one.png", "--top", "3", "--output", "a.parquet") == 0
    from pyarrow import parquet

    (row,) = rows()
    (same,) = parquet.read_table("a.parquet").to_pylist()
    assert list(row) == list(same)
    network = create_model("resnet8", 10).eval()
    from ackd_lightning.models.weights import load_weights

    load_weights(network, "net.safetensors")
    expected = network(Preprocessing(description()).batch(["one.png"])).softmax(dim=1)[0].topk(3)
    suffixes = ("", "_2", "_3")
    assert [int(row[f"prediction{each}"]) for each in suffixes] == expected.indices.tolist()
    assert [same[f"probability{each}"] for each in suffixes] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert [row[f"class_name{each}"] for each in suffixes] == [NAMES[each] for each in expected.indices.tolist()]


@pytest.mark.parametrize("header", ["path", "id,file", "image;label"])
def test_a_table_lists_images_beside_it(header, capsys):
    draw("data/x/1.png")
    draw("data/2.png")
    separator = ";" if ";" in header else ","
    place = [each in ("path", "file", "image") for each in header.split(separator)]
    lines = [separator.join(name if own else "7" for own in place) for name in ("x/1.png", "gone.png", "2.png")]
    Path("data/list.csv").write_text("\n".join([header, *lines]))
    assert predict("--images", "data/list.csv") == 0
    assert [(each["file"], each["index"]) for each in rows()] == [("x/1.png", "0"), ("2.png", "2")]
    assert "skipped gone.png" in capsys.readouterr().err


def test_several_places_keep_their_names_apart():
    draw("a/1.png")
    draw("b/1.png")
    assert [each.name for each in list_images(["a", "b", "a/1.png"])] == ["a/1.png", "b/1.png", "a/1.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_order_or_pixels(workers):
    for number in range(7):
        draw(f"many/{number}.png", side=16 + number)
    Path("many/3.png").write_bytes(b"x")
    notes, preprocessing = Notes(), Preprocessing(description())
    images = list_images(["many"])
    found = list(read_batches(images, preprocessing, notes, batch_size=3, workers=workers))
    assert torch.cat([each for each, _, _ in found]).tolist() == [0, 1, 2, 4, 5, 6]
    assert [count for _, _, count in found] == [3, 3, 1]
    expected = torch.stack([preprocessing.pixels(each.path) for each in images if each.name != "3.png"])
    assert torch.equal(torch.cat([pixels for _, pixels, _ in found]), expected)
    assert [name for name, _ in notes.unreadable] == ["3.png"]


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGBA", 3), ("RGB", 1), ("LA", 1)])
def test_conversion_of_channels_is_said(mode, channels):
    draw("a.png", mode=mode)
    notes, preprocessing = Notes(), Preprocessing(description(channels))
    ((_, pixels, _),) = read_batches(list_images(["a.png"]), preprocessing, notes, batch_size=4)
    assert pixels.shape == (1, channels, 16, 16)
    (line,) = notes.lines(channels)
    assert f"1 image with {len(mode)} channel" in line


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 4), ("L", 2)])
def test_channels_that_cannot_be_converted_are_refused(mode, channels):
    draw("a.png", mode=mode)
    notes, preprocessing = Notes(), Preprocessing(description(channels))
    ((rows_, _, _),) = read_batches(list_images(["a.png"]), preprocessing, notes, batch_size=4)
    assert len(rows_) == 0
    assert f"has {len(mode)} channels and the network reads {channels}" in notes.unreadable[0][1]


def test_palettes_are_colours_and_dark_images_are_named():
    Image.new("P", (20, 20)).save("palette.png")
    Image.fromarray(np.full((20, 20), 900, dtype=np.uint16)).save("dark.png")
    notes = Notes()
    list(read_batches(list_images(["palette.png", "dark.png"]), Preprocessing(description()), notes, batch_size=2))
    assert notes.converted == {1: 1}
    assert notes.dark == 1
    assert len(notes.lines(3)) == 2


WRONG = [
    (["--images", "nowhere"], "nowhere"),
    (["--images", "empty"], "empty"),
    (["--images", "text.csv"], "text.csv"),
    (["--images", "blank.csv"], "blank.csv"),
    (["--images", "notes.txt"], "notes.txt"),
    (["--images", "a.png", "--output", "a.json"], "a.json"),
    (["--images", "a.png", "--output", "notes.txt"], "notes.txt"),
    (["--images", "a.png", "--output", "taken.csv"], "taken.csv"),
    (["--images", "a.png", "--top", "11"], "11"),
    (["--images", "a.png", "--top", "0"], "0"),
    (["--images", "a.png", "--batch-size", "0"], "0"),
    (["--images", "a.png", "--workers", "-1"], "-1"),
    (["--images"], "--images"),
    ([], "--images"),
    (["--image", "a.png"], "--image"),
]


@pytest.mark.parametrize("option", [["--top", "3"], ["--strict"], ["--workers=2"], ["--device", "cpu"]])
def test_an_option_for_images_needs_images(option, capsys):
    assert main(["predict", "runs/a", *option]) == 2
    assert "required: --images" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "value"), WRONG, ids=[" ".join(each) for each, _ in WRONG])
def test_a_mistake_is_one_sentence(arguments, value, capsys):
    draw("a.png")
    Path("empty").mkdir()
    Path("notes.txt").write_text("x")
    Path("taken.csv").write_text("x")
    Path("text.csv").write_text("first,second\n1,2\n")
    Path("blank.csv").write_text("path,label\na.png,1\n ,2\n")
    before = sorted(each.name for each in Path().iterdir())
    assert predict(*arguments) == 2
    error = capsys.readouterr().err
    assert value in error
    assert error.startswith("ackd: ")
    assert error.count("\n") == 1
    assert sorted(each.name for each in Path().iterdir()) == before


@pytest.mark.parametrize("name", ["foreign.safetensors", "foreign.onnx", "model.h5", "gone.onnx"])
def test_a_file_of_another_program_is_refused(name, capsys):
    draw("a.png")
    if "safetensors" in name:
        save_weights({"weight": torch.zeros(2)}, Path(name), {"format": "pt"})
    elif "gone" not in name:
        Path(name).write_bytes(b"not a network")
    assert main(["predict", name, "--images", "a.png"]) == 2
    assert name in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_there(monkeypatch, capsys):
    draw("a.png")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ackd_lightning.writing.os.fsync", full)
    assert predict("--images", "a.png") == 2
    assert "No space left" in capsys.readouterr().err
    assert not [each for each in Path().iterdir() if "predictions" in each.name]


def test_a_missing_library_is_named_before_anything_is_read(monkeypatch):
    draw("a.png")

    def missing(module, extra, needed_by):
        raise ACKDError(f"{needed_by} needs {module}; run: pip install 'ackd-lightning[{extra}]'")

    monkeypatch.setattr("ackd_lightning.runs.tables.require", missing)
    assert predict("--images", "a.png", "--output", "a.parquet") == 2


@pytest.mark.filterwarnings("ignore")
def test_a_run_predicts_as_its_exported_file_does(capsys):
    fit = ["fit", "--config", "digits_resnet8", "--weights_dir", "null", "--trainer.max_epochs", "1", "--name", "a"]
    assert main([*fit, "--data.max_per_class", "20", "--trainer.limit_train_batches", "2"]) == 0
    draw("new/a.png")
    run = Path("runs/digits_resnet8/a")
    for network, output in ((run, "run.csv"), (run / "student.safetensors", "file.csv")):
        assert main(["predict", str(network), "--images", "new", "--output", output]) == 0
    assert rows("run.csv") == rows("file.csv")
    shutil.rmtree("new")
    assert main(["predict", str(run)]) == 0  # the test part, by Lightning
    assert [each for each in rows()[0] if each != "target"] == list(rows("run.csv")[0])
    before = rows()
    assert main(["predict", str(run)]) == 2
    assert "predictions.csv exists; choose another file or pass --overwrite" in capsys.readouterr().err
    Path("predictions.csv").write_text("of another network")
    for options in (["--overwrite"], ["--overwrite", "--output", "predictions.csv"], ["--overwrite", "true"]):
        assert main(["predict", str(run), *options]) == 0
    assert main(["predict", "--overwrite", str(run), "--which", "last"]) == 0
    assert rows() == before


def test_a_few_predictions_are_printed_and_a_file_is_replaced_only_when_asked(capsys):
    draw(Path("photos/a.png"))
    assert predict("--images", "photos", "--top", "2") == 0
    shown = capsys.readouterr().out
    (row,) = rows()
    assert f"a.png: {row['class_name']} {float(row['probability']):.1%}, {row['class_name_2']} " in shown
    before = Path("predictions.csv").read_bytes()
    draw(Path("photos/b.png"))
    assert predict("--images", "photos") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert predict("--images", "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err  # what is read comes first
    assert Path("predictions.csv").read_bytes() == before
    assert predict("--images", "photos", "--overwrite") == 0
    assert len(rows()) == 2
    for number in range(9):
        draw(Path(f"photos/more{number}.png"))
    capsys.readouterr()
    assert predict("--images", "photos", "--overwrite") == 0
    assert "a.png" not in capsys.readouterr().out  # those are in the file


def test_photos_of_another_depth_are_skipped_where_the_range_of_values_is_given():
    preprocessing = Preprocessing(description(1, value_range=(0.0, 4095.0), pixels="float32"))
    Image.fromarray(np.full((20, 20), 200, np.uint8)).save("eight.png")
    Image.fromarray(np.full((20, 20), 2000, np.uint16)).save("sixteen.png")
    notes = Notes()
    batches = list(read_batches(list_images(["eight.png", "sixteen.png"]), preprocessing, notes, batch_size=2))
    assert [rows.tolist() for rows, _, _ in batches] == [[1]]
    assert notes.unreadable == [("eight.png", "has 8 bits and the network reads more than 8 bits")]


def test_a_reason_names_no_setting_of_the_training():
    np.save("a.npy", np.full((20, 20, 3), 300.0))
    notes = Notes()
    list(read_batches(list_images(["a.npy"]), Preprocessing(description()), notes, batch_size=1))
    ((_, reason),) = notes.unreadable
    assert reason == "has float64 pixels from 300 to 300, whose full range is unknown"


def test_a_name_that_is_not_utf8_does_not_lose_the_table():
    name = b"f\xe9.png".decode("utf-8", "surrogateescape")
    for path in (Path("a.csv"), Path("a.parquet")):
        write_table({"file": [name], "prediction": [3]}, path)
    from pyarrow import parquet

    assert parquet.read_table("a.parquet").to_pylist() == [{"file": "f\N{REPLACEMENT CHARACTER}.png", "prediction": 3}]
    assert b"f\xe9.png,3" in Path("a.csv").read_bytes()


def test_a_graph_that_runs_on_the_cpu_is_not_said_to_run_on_a_gpu(monkeypatch, capsys):
    draw("a.png")
    monkeypatch.setattr(
        "ackd_lightning.commands.predict.open_any",
        lambda *_, **__: SimpleNamespace(network=None, path="a.onnx", kind="onnx"),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["predict", "a.onnx", "--images", "a.png", "--device", "cuda"]) == 2
    assert "--device is cuda and a.onnx is a graph" in capsys.readouterr().err
