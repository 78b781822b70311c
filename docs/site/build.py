"""Build the documentation site: `make docs` writes build/site/index.html.

The pages of docs/ are copied, a page for every notebook is made from its cells and outputs, a page for every method
and every module of the API is generated from the docstrings,
Zensical renders them, formulas become MathML, and every link and anchor of the result is checked.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert

from ackd_lightning import methods
from ackd_lightning.config.files import find_config, method_names, read_config
from ackd_lightning.methods.base import Method

ROOT = Path(__file__).parents[2]
SOURCES, SITE = ROOT / "build/docs", ROOT / "build/site"
MEASURED = ROOT / "benchmarks/results/cifar10-jpeg-methods.json"
ANCHOR = "cifar-10-as-jpeg-methods-since-2022-and-related-work"
"""Where docs/results.md shows what `MEASURED` holds."""
NOTEBOOKS = ("quickstart", "distil_photos", "look_inside_ackd", "write_a_method", "student_to_device")
"""In the order of the navigation."""
LONG = 40
"""Characters of LaTeX from which a formula in a line scrolls by itself where the page is narrow."""
API = {
    "Training": "training.module training.schedule models.student_config models.teacher_config",
    "Methods": "methods.base methods.sum methods.logits types",
    "Data": "data.base data.folder data.table data.webdataset data.huggingface data.cifar data.cinic10 "
    "data.tiny_imagenet data.imagenet data.digits",
    "Networks": "models.zoo models.features models.branches models.student models.teacher models.weights",
    "Functions": "functional random validation testing errors",
    "Deployment": "deploy.student",
}


def fragments() -> dict[str, list[str]]:
    """Return the names of the packaged fragments by the class of the method that they choose."""
    found: dict[str, list[str]] = {}
    for name in method_names():
        method = read_config(find_config(name))["model"]["method"]["class_path"]
        found.setdefault(method.rpartition(".")[2], []).append(name)
    return found


def measured() -> dict[str, str]:
    """Return what docs/results.md has of a method on CIFAR-10 as JPEG, by the row of its table."""
    runs = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]
    found: dict[str, list[float]] = {}
    for run in runs:
        if run["kind"] == "student":
            found.setdefault(run["row"], []).append(run["acc"])
    rows = {row: f"{mean(values):.2f} ± {stdev(values):.2f}" for row, values in found.items()}
    setting = f"resnet8 on CIFAR-10 as JPEG, {runs[0]['epochs']} epochs, n = {len(found['ce'])}"
    beside = f"student alone {rows['ce']}, KD with weights 1 and 1 {rows['kd_1_1']}"
    return {row: f"{text} % with {setting}; {beside}" for row, text in rows.items()}


def method_pages() -> dict[str, str]:
    """Write one page for every method; return their titles by file."""
    (SOURCES / "method").mkdir()
    pages, names, rows = {}, fragments(), measured()
    for each in methods.__all__:
        kind = getattr(methods, each)
        if not (isinstance(kind, type) and issubclass(kind, Method)) or kind is Method:
            continue
        module = kind.__module__
        lines = [f"# {each}", ""]
        if each in names:
            listed = ", ".join(f"`{name}`" for name in names[each])
            lines += [f"`--config` {listed} · `from ackd_lightning.methods import {each}`", ""]
        lines += [f"::: {module}", "    options:", "      show_root_heading: false", "      show_root_toc_entry: false"]
        lines += [f"      members: [{each}]", ""]
        for row in [name.removesuffix(".yaml") for name in names.get(each, [])]:
            if row in rows:
                lines += [f"Measured, `{row}`: {rows[row]} ([table](../results.md#{ANCHOR}))", ""]
        path = f"method/{each.lower()}.md"
        (SOURCES / path).write_text("\n".join(lines), encoding="utf-8")
        pages[path] = each
    return pages


def api_pages() -> dict[str, str]:
    """Write one page for every group of modules; return their titles by file."""
    (SOURCES / "api").mkdir()
    pages = {}
    for title, modules in API.items():
        lines = [f"# {title}", ""]
        for each in modules.split():
            lines += [f"::: ackd_lightning.{each}", "    options:", "      show_root_full_path: true", ""]
        path = f"api/{title.lower()}.md"
        (SOURCES / path).write_text("\n".join(lines), encoding="utf-8")
        pages[path] = title
    return pages


def cell_lines(cell: dict[str, Any], picture: Path) -> list[str]:
    """Return a notebook's cell as Markdown; what it drew goes to files whose names begin with that of ``picture``."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source, ""]
    lines = ["```python", source, "```", ""]
    for number, output in enumerate(cell["outputs"]):
        data = output.get("data", {})
        if "image/png" in data:
            file = picture.with_name(f"{picture.name}_{number}.png")
            file.write_bytes(base64.b64decode("".join(data["image/png"])))
            lines += [f"![What the lines above draw]({file.name})", ""]
        elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
            lines += ["```text", text, "```", ""]
    return lines


def notebook_pages() -> dict[str, str]:
    """Write one page for every notebook, with its outputs; return their titles by file."""
    folder = SOURCES / "notebook"
    folder.mkdir()
    if unlisted := {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} ^ set(NOTEBOOKS):
        raise ValueError(f"NOTEBOOKS and the folder notebooks/ differ in {', '.join(sorted(unlisted))}")
    pages = {}
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        lines = [line for n, cell in enumerate(cells) for line in cell_lines(cell, folder / f"{name}_{n}")]
        title = lines[0].partition("\n")[0].removeprefix("# ")
        text = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", "\n".join(lines)).replace("](../docs/", "](../")
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        pages[f"notebook/{name}.md"] = title
    return pages


def as_page(text: str, titles: dict[str, str]) -> str:
    """Replace links to files that are not pages by their text, and file names as the text of links by titles."""
    text = re.sub(r"\]\((?:\.\./)?notebooks/(\w+)\.ipynb\)", r"](notebook/\1.md)", text)
    outside = r"(?:\.\./)*(?:src/|benchmarks/|configs/|tests/|[A-Z]+\b)"
    text = re.sub(rf"\[([^\]]+)\]\({outside}[^)]*\)", r"\1", text)
    return re.sub(r"\[(?:docs/)?([\w-]+\.md)\](?=\(\1)", lambda found: f"[{titles.get(found[1], found[1])}]", text)


def copy_pages() -> None:
    """Copy docs/ without this folder, and configuration with the generated pages in its navigation."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCES, ignore=shutil.ignore_patterns("site"))
    shutil.copy(ROOT / "docs/site/style.css", SOURCES)
    start = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    (SOURCES / "index.md").write_text(start, encoding="utf-8")
    pages = {page: page.read_text(encoding="utf-8") for page in SOURCES.glob("*.md")}
    titles = {page.name: text.partition("\n")[0].removeprefix("# ") for page, text in pages.items()}
    for page, text in pages.items():
        page.write_text(as_page(text, titles), encoding="utf-8")


def write_configuration(**generated: dict[str, str]) -> Path:
    """Write the configuration with the generated pages in the places that the navigation names."""
    text = (ROOT / "docs/site/site.yml").read_text(encoding="utf-8")
    for name, pages in generated.items():
        entries = "".join(f"\n          - {title}: {path}" for path, title in pages.items())
        text = text.replace(f" {name.upper()}", entries)
    path = ROOT / "build/site.yml"
    path.write_text(text, encoding="utf-8")
    return path


def formula(match: re.Match[str]) -> str:
    """Return the MathML of one formula."""
    if match[1] == "div":
        return f'<div class="formula">{convert(html.unescape(match[2]), display="block")}</div>'
    inline = convert(html.unescape(match[2]), display="inline")
    return f'<span class="long">{inline}</span>' if len(match[2]) > LONG else inline


def with_formulas(text: str) -> str:
    """Replace the formulas that the renderer leaves as LaTeX by MathML, which browsers show without a script.

    A formula that is a paragraph of its own, as in docstrings, is set like one between double dollars.
    """
    inline = r'<span class="arithmatex">([^<]*)</span>'
    text = re.sub(rf"<p>\s*{inline}\s*</p>", r'<div class="arithmatex">\1</div>', text)
    pattern = r'<(div|span) class="arithmatex">\s*\\[\[(](.*?)\\[\])]\s*</\1>'
    return re.sub(pattern, formula, text, flags=re.DOTALL)


class _Page(HTMLParser):
    """Anchors, links and pictures of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what the tag names or refers to."""
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.anchors.add(value)
            if key in ("href", "src") and value and tag in ("a", "img"):
                self.links.append(value)


def broken_links() -> list[str]:
    """Return every link to a page, file or anchor that is not there."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in SITE.rglob("*.html")}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{path.relative_to(SITE)}: {link} does not exist")
            elif (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {"__top"}
            ):
                found.append(f"{path.relative_to(SITE)}: {link} has no such anchor")
    return sorted(set(found))


def main() -> int:
    """Build the site and return the exit code."""
    copy_pages()
    configuration = write_configuration(
        notebook_pages=notebook_pages(), method_pages=method_pages(), api_pages=api_pages()
    )
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(configuration)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    if built.returncode:
        print(built.stdout[-4000:], built.stderr[-2000:], sep="\n")
        return built.returncode
    for path in SITE.rglob("*.html"):
        path.write_text(with_formulas(path.read_text(encoding="utf-8")), encoding="utf-8")
    left = [str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "arithmatex" in path.read_text("utf-8")]
    problems = broken_links() + [f"{each}: a formula was not converted" for each in left]
    pages = f"{len(list(SITE.rglob('*.html')))} pages in {SITE / 'index.html'}"
    serve = f"{Path(sys.executable).name} -m http.server --directory {SITE.relative_to(ROOT)}"
    print("\n".join(problems) or f"{pages}\nthe search needs a server: {serve}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
