"""Imports go one way, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ackd_lightning"
# a room imports itself and rooms of a lower rank only
RANK = {
    "_version": 0,
    "errors": 0,
    "plain": 0,
    "random": 0,
    "writing": 0,
    "types": 1,
    "validation": 1,
    "extras": 1,
    "functional": 1,
    "config": 1,
    "models": 2,
    "methods": 3,
    "metrics": 4,
    "data": 4,
    "runs": 5,
    "callbacks": 6,
    "training": 7,
    "testing": 8,
    "deploy": 8,
    "launch": 9,
    "commands": 10,
    "cli": 11,
    "__main__": 12,
}
DATA_MAY_USE = {"data", "types", "errors", "extras", "plain", "random", "validation", "writing"}
LIGHTNING_IN = {"data", "training", "callbacks", "launch", "testing"}
METRICS_IN = {"metrics", "training", "callbacks"}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> list[str]:
    """Return every imported module, those inside functions and under TYPE_CHECKING too."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the package in full"
            if node.module == "ackd_lightning":
                names += [f"ackd_lightning.{alias.name}" for alias in node.names]
            else:
                names.append(str(node.module))
    return names


def is_broken(part: str, module: str) -> bool:
    top, _, rest = module.partition(".")
    if top == "ackd_lightning":
        other = rest.partition(".")[0]
        if part == "data":
            return other not in DATA_MAY_USE
        return other != part and RANK[other] >= RANK[part]
    if top in ("lightning", "pytorch_lightning", "lightning_fabric"):
        return part not in LIGHTNING_IN
    return top == "torchmetrics" and part not in METRICS_IN


def broken_rules(part: str, modules: list[str]) -> list[str]:
    return [f"{part} imports {module}" for module in modules if is_broken(part, module)]


def test_every_part_of_the_package_has_a_rank():
    assert {part_of(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert broken_rules(part_of(path), imported(tree)) == []


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("types", "from ackd_lightning.functional import kd_loss"),
        ("functional", "def late():\n    import ackd_lightning.models.features"),
        ("models", "from ackd_lightning.methods import KD"),
        ("models", "from ackd_lightning import methods"),
        ("methods", "from lightning import LightningModule"),
        ("methods", "import torchmetrics"),
        ("training", "from ackd_lightning.cli import main"),
        ("models", "from ackd_lightning.data.base import ImageDataModule"),
        ("data", "from ackd_lightning.functional import kd_loss"),
        ("metrics", "import lightning.pytorch as L"),
    ],
)
def test_the_rules_notice_a_wrong_import(part, code):
    assert len(broken_rules(part, imported(ast.parse(code)))) == 1


def module_of(path: Path) -> str:
    return ".".join(("ackd_lightning", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imported_files(tree: ast.AST, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, imports under TYPE_CHECKING counted."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("ackd_lightning"):
            deeper = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= deeper or ({str(node.module)} & modules)
    return found


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports; empty without one."""
    left = dict(graph)
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys() - {name}]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]
    return []


def test_no_files_import_each_other_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    graph = {
        name: imported_files(ast.parse(path.read_text(encoding="utf-8")), set(modules)) - {name}
        for name, path in modules.items()
    }
    assert circle_in(graph) == []
    name, other = "ackd_lightning.training.module", "ackd_lightning.types"
    assert {name, other} <= set(circle_in({**graph, other: {name}}))


@pytest.mark.parametrize("module", ["ackd_lightning", "ackd_lightning.cli", "ackd_lightning.config.files"])
def test_the_command_line_starts_without_torch(module):
    code = (
        f"import sys, {module}; print([name for name in ('torch', 'lightning', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_all_importable_and_unknown_ones_are_refused():
    import ackd_lightning

    for name in ackd_lightning.__all__:
        assert getattr(ackd_lightning, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ackd_lightning.nothing
