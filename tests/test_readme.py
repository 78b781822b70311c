"""The commands, links, files and examples of README and of the other pages work."""

from __future__ import annotations

import importlib
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from ackd_lightning import DistillationModule, load_student
from ackd_lightning.cli import main, make_image_parser, make_parser
from ackd_lightning.commands.inspect import read_options
from ackd_lightning.config.files import config_folder, find_config, load_configs
from ackd_lightning.data.decoding import read_image
from ackd_lightning.data.pixels import ImageFormat, fit, to_tensor
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import KD
from ackd_lightning.methods.description import from_description
from ackd_lightning.testing import Harness

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADD_A_METHOD = (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"])
RUN_COMMANDS = ("validate", "test", "predict")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def named_blocks(text: str) -> dict[str, str]:
    """Blocks whose first line is a comment with a file name."""
    found = [block for language in ("yaml", "python") for block in blocks(text, language)]
    names = [re.match(r"# (\S+\.(?:yaml|py))\n", block) for block in found]
    return {name[1]: block for name, block in zip(names, found, strict=True) if name}


def marked_block(text: str, marker: str) -> str:
    """The python block after a marker comment."""
    found = re.findall(rf"<!-- {marker} -->\n```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == 1, marker
    return found[0]


METHODS = dict(re.findall(r"<!-- run: method (\w+) -->\n```python\n# (\w+)\.py\n", ADD_A_METHOD))


def commands(text: str) -> list[list[str]]:
    """Arguments of every `ackd ...` in a page: lines of bash blocks, and inline code with at least a subcommand."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:PYTHONPATH=\. )?ackd [a-z][^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if "ackd" in words[:2] and "..." not in words:
            found.append(words[words.index("ackd") + 1 :])
    return found


SHOWN = {name: block for page in PAGES for name, block in named_blocks(page.read_text(encoding="utf-8")).items()}
# files that `ackd init photos` writes
SHOWN |= {f"photos_{each}.yaml": SHOWN[f"pets_{each}.yaml"] for each in ("teacher", "student")}
COMMANDS = {" ".join(words): words for page in PAGES for words in commands(page.read_text(encoding="utf-8"))}
FITS = {line: words for line, words in COMMANDS.items() if words[0] == "fit" and len(words) > 2 and "help" not in line}
ON_RUNS = {line: words for line, words in COMMANDS.items() if words[0] in RUN_COMMANDS and len(words) > 1}
IMAGES = {line: words for line, words in ON_RUNS.items() if "--images" in words}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the pages show."""
    for name, content in SHOWN.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # the pages name its configurations
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def parse(words: list[str], capsys) -> str:
    """Let the real parser read a command line; it prints the settings and runs nothing."""
    try:
        code = main([*words, *([] if "--print_config" in words else ["--print_config"])])
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def test_readme_has_commands():
    assert len(FITS) >= 8
    assert len(ON_RUNS) >= 3
    assert {words[0] for words in commands(README)} >= {"doctor", "init", "fit", "report", "export", "reproduce"}
    assert {words[0] for words in COMMANDS.values()} >= {"test", "predict", "compare", "configs", "push", "inspect"}


@pytest.mark.parametrize("line", FITS)
def test_settings_of_fit_are_understood(line, folder, capsys):
    run = Path(FITS[line][-1])
    if FITS[line][-2] == "--resume" and "--config" not in FITS[line]:  # the run has its settings
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(parse(["fit", "--config", f"{run.parent.name}.yaml"], capsys))
    assert "class_path: ackd_lightning" in parse(FITS[line], capsys)


@pytest.mark.parametrize("line", IMAGES)
def test_predictions_of_images_are_understood(line):
    chosen = make_image_parser().parse_args(IMAGES[line][1:])
    assert chosen.run
    assert chosen.images


@pytest.mark.parametrize("line", [line for line in ON_RUNS if line not in IMAGES])
def test_settings_of_commands_on_runs_are_understood(line, folder, capsys):
    words = ON_RUNS[line]
    run = Path(words[1])
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("last", "best"):
        (run / "checkpoints" / f"{name}.ckpt").touch()
    settings, _ = load_configs(["digits_resnet20_resnet8"])
    (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert "ckpt" in parse(words, capsys)


@pytest.mark.parametrize("line", [line for line, words in COMMANDS.items() if words[0] not in ("fit", *RUN_COMMANDS)])
def test_other_commands_are_understood(line, folder, capsys):
    words = COMMANDS[line]
    names = ("init", "export", "compare", "report", "reproduce", "inspect")
    needed = {**{name: ["RUN"] for name in names}, "tune": ["--set", "model.optimizer.lr=0.1,0.2"]}
    bare = needed.get(words[0], []) if len(words) == 1 else []  # the name alone, in a sentence
    chosen, settings = make_parser().parse_known_args([*words, *bare])
    assert chosen.command == words[0]
    if words[0] == "inspect":
        assert len(read_options(settings)) == sum(word.startswith("--options.") for word in words)
        return
    assert not settings or words[0] in ("cache", "report", "reproduce", "tune")  # takes those of fit
    if settings and words[0] != "report":
        pair = ["--config", "digits_resnet20_resnet8.yaml"] if words[0] == "reproduce" else []
        assert "class_path: ackd_lightning" in parse(["fit", *pair, *settings], capsys)


def test_every_command_exists():
    known = {"fit", *RUN_COMMANDS, "configs", "export", "push", "report", "compare", "demo", "reproduce", "cache"}
    known |= {"inspect", "doctor", "init", "completion", "tune"}
    assert {words[0] for words in COMMANDS.values()} <= known


def test_configurations_shown_can_be_read(folder):
    shown = [name for name in SHOWN if name.endswith(".yaml")]
    assert len(shown) >= 3
    for name in shown:
        settings, _ = load_configs([name])
        assert settings


def test_the_page_on_methods_shows_three():
    assert set(METHODS) == {"LogitMSE", "Remembered", "Mutual"}


@pytest.mark.parametrize("steps", [3, 12])
def test_the_harness_makes_as_many_steps_as_it_is_told(steps):
    harness = Harness(KD())
    assert len(harness.train(steps)) == harness.module.trainer.global_step == steps


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_shown_work(name, folder):
    method = from_description({"class_path": f"{METHODS[name]}.{name}"})
    losses = Harness(method).train(12)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_a_run_of_the_method_with_a_memory_can_be_tested_and_loaded(folder):
    fragment = "model: {method: {class_path: remembered.Remembered}}\n"
    (folder / "remembered.yaml").write_text(fragment, encoding="utf-8")
    settings = ["--trainer.max_epochs", "1", "--data.max_per_class", "4", "--data.batch_size", "20", "--name", "one"]
    assert main(["fit", "--config", "digits_resnet8.yaml", "--config", "remembered.yaml", *settings]) == 0
    run = Path("runs/digits_resnet8+remembered/one")
    assert main(["test", str(run)]) == 0
    module = DistillationModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert module.method.memory.shape == (40, 10)


@pytest.mark.parametrize("name", METHODS)
def test_arguments_of_the_methods_shown_are_checked(name, folder):
    with pytest.raises(ACKDError, match="weight_ce"):
        from_description({"class_path": f"{METHODS[name]}.{name}", "init_args": {"weight_ce": -1.0}})


@pytest.mark.parametrize("number", range(len(blocks(ADD_A_METHOD, "python"))))
def test_every_example_of_the_page_on_methods_runs(number, folder):
    exec(compile(blocks(ADD_A_METHOD, "python")[number], "add_a_method.md", "exec"), {"__name__": "example"})


def test_the_lightning_example_runs(folder):
    page = (ROOT / "docs/lightning.md").read_text(encoding="utf-8")
    exec(compile(marked_block(page, "script"), "lightning.md", "exec"), {"__name__": "example"})
    assert len(load_student("student.safetensors").state_dict()) > 0


def test_the_cost_shown_for_acn_is_printed(capsys):
    page = (ROOT / "docs/acn.md").read_text(encoding="utf-8")
    exec(compile(blocks(page, "python")[0], "acn.md", "exec"), {"__name__": "example"})
    printed = re.findall(r"^(\d+) million", capsys.readouterr().out, flags=re.MULTILINE)
    shown = re.search(r"prints (\d+) .*?, (\d+) .*?, (\d+) .*? and (\d+) ", page)
    assert printed == list(shown.groups())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:src|tests|docs|configs|notebooks|benchmarks)/[\w./-]*)`", text):
        assert "NAME" in name or "TIME" in name or (ROOT / name).exists(), name  # placeholders


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_configurations_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"--config[ =]([\w./-]+)", text):
        assert name in SHOWN or find_config(name).is_file(), name
    for name in re.findall(r"`((?:ackd|kd|ce)[a-z_]*\.yaml)`", text):
        assert (config_folder() / "methods" / name).is_file(), name


def test_the_page_on_recipes_says_what_each_method_learns_from():
    page = (ROOT / "docs/recipes.md").read_text()
    stated = {}
    for kind, start in (("mixed", "| mixed images"), ("smoothed", "| smoothing and class weights only")):
        (line,) = (each for each in page.splitlines() if each.startswith(start))
        stated |= dict.fromkeys(re.findall(r"`(\w+)`", line), kind)
    found = {}
    for path in (config_folder() / "methods").glob("*.yaml"):
        if not path.stem.startswith("ackd_"):  # "and its variants"
            method = load_configs([path.stem])[0]["model"]["method"]
            module, _, name = method["class_path"].rpartition(".")
            found[path.stem] = getattr(importlib.import_module(module), name)(**method.get("init_args", {})).labels
    assert stated == found


def test_makefile_has_the_commands_of_readme():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8"))) <= targets


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(150, 97), (97, 150), (64, 64), (30, 200)])
def test_the_program_on_the_device_prepares_photos_as_evaluation_does(tmp_path, monkeypatch, capsys, size, channels):
    page = (ROOT / "docs/distil.md").read_text(encoding="utf-8")
    program = named_blocks(page)["on_device.py"]
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    about = {"input_size": "32", "crop_pct": "0.875", "class_names": '["cat", "dog"]'}
    given = []

    class Session:
        def __init__(self, path):
            self.custom_metadata_map = about

        def get_modelmeta(self):
            return self

        def get_inputs(self):
            return [SimpleNamespace(name="image", shape=["batch", channels, 32, 32])]

        def run(self, outputs, inputs):
            given.append(inputs["image"])
            return [np.array([[0.0, 1.0]])]

    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    monkeypatch.setattr(sys, "argv", ["on_device.py", "student.onnx", str(tmp_path / "photo.png")])
    exec(compile(program, "on_device.py", "exec"), {"__name__": "__main__"})
    form = ImageFormat((32, 32), channels)
    expected = to_tensor(fit(read_image(tmp_path / "photo.png", form), form.size, border=1 / 0.875), form)
    assert given[0].dtype == np.uint8
    np.testing.assert_array_equal(given[0][0], expected.numpy())
    assert capsys.readouterr().out == "dog\n"
