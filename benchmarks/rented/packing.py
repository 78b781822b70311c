"""What a bare machine lacks, as archives that are small enough to be sent. Standard library only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = (
    "lightning",
    "pytorch-lightning",
    "lightning-utilities",
    "torchmetrics",
    "jsonargparse",
    "docstring-parser",
    "typeshed-client",
    "timm",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "pytest",
    "iniconfig",
    "pluggy",
)
"""Distributions in pure Python that the package or its tests for GPUs need, and that a machine with torch may lack.

Safetensors, PyYAML, scikit-learn and matplotlib have compiled files; wandb is not needed without ``--wandb``.
"""
COMMIT = "commit.txt"
LIMIT = 60
"""Largest size of an archive in MiB."""
_CODE = ("src", "configs", "benchmarks", "tests", "pyproject.toml")
_SKIPPED = {"__pycache__", ".git", ".pytest_cache", "results"}


def modules_of(distribution: importlib.metadata.Distribution) -> Iterator[tuple[Path, str]]:
    """Yield the files of an installed distribution, with their places below ``site-packages``."""
    for file in distribution.files or ():
        place = Path(distribution.locate_file(file))
        if ".." not in file.parts and "__pycache__" not in file.parts and place.is_file():
            yield place, str(file)


def is_pure(distribution: importlib.metadata.Distribution) -> bool:
    """Return whether a distribution has no compiled files, and so runs on any machine."""
    return not any(str(file).endswith((".so", ".pyd", ".dylib")) for file in distribution.files or ())


def _members(root: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _SKIPPED & set(path.relative_to(root).parts):
            yield path, str(path.relative_to(root))


def _write(path: Path, members: Sequence[tuple[Path, str]]) -> float:
    """Write a compressed archive; return its size in MiB."""
    with tarfile.open(path, "w:xz", preset=2) as archive:
        for source, name in members:
            archive.add(source, name, recursive=False)
    return path.stat().st_size / 2**20


def pack_code(root: Path, out: Path, packages: Sequence[str] = PACKAGES) -> Iterator[str]:
    """Write ``code.tar.xz``: this package's source with tests and programs, and packages of this environment.

    Args:
        root: Folder of the repository.
        out: Folder for the archive.
        packages: Names of distributions in pure Python.

    Yields:
        What was packed, with sizes.

    Raises:
        SystemExit: If a package is not installed or has compiled files.
    """
    members = []
    for each in _CODE:
        place = root / each
        members += [(place, each)] if place.is_file() else list(_members(root, place))
    members = [(path, f"code/{name}") for path, name in members]
    yield f"source: {len(members)} files, {_megabytes(members):.1f} MiB"
    for name in packages:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(f"{name} is not installed here; install it, or leave it out with --packages") from None
        if not is_pure(distribution):
            raise SystemExit(f"{name} has compiled files, which may not run elsewhere; leave it out with --packages")
        files = [(path, f"site/{place}") for path, place in modules_of(distribution)]
        members += files
        yield f"{name} {distribution.version}: {_megabytes(files):.1f} MiB"
    path = out / "code.tar.xz"
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / COMMIT
        note.write_text(commit_of(root), encoding="utf-8")
        size = _write(path, [*members, (note, f"code/{COMMIT}")])
    yield f"{path}: {size:.1f} MiB"


def _megabytes(members: Sequence[tuple[Path, str]]) -> float:
    return sum(path.stat().st_size for path, _ in members) / 2**20


def pack_data(name: str, source: Path, out: Path, *, limit: float = LIMIT) -> Iterator[str]:
    """Write a data set as archives ``NAME-00.tar.xz``, ..., none of them above the limit.

    Args:
        name: Name of the folder on the other side.
        source: Tree of image files, an archive of one, or a folder of archives.
        out: Folder for the archives.
        limit: Largest size of an archive in MiB.

    Yields:
        Archives, with sizes.

    Raises:
        SystemExit: If there is nothing to pack.
    """
    with tempfile.TemporaryDirectory() as folder:
        archives = [source] if source.is_file() else sorted(source.glob("*.tar*"))
        small = all(each.stat().st_size <= limit * 2**20 for each in archives)
        if archives and small:
            for number, each in enumerate(archives):
                path = out / f"{name}-{number:02d}{''.join(each.suffixes)}"
                path.write_bytes(each.read_bytes())
                yield f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {each.name} as it is"
            return
        root = source
        if archives:
            root = Path(folder)
            for each in archives:
                extract(each, root)
        parts: list[list[tuple[Path, str]]] = [[]]
        size = 0.0
        for member in _members(root, root):
            more = (member[0].stat().st_size + 64) / 2**20  # a compressed header
            if parts[-1] and size + more > 0.95 * limit:
                parts.append([])
                size = 0.0
            parts[-1].append(member)
            size += more
        if not parts[0]:
            raise SystemExit(f"{source} has no files; name a tree of image files, an archive, or a folder of archives")
        for number, part in enumerate(parts):
            path = out / f"{name}-{number:02d}.tar.xz"
            yield f"{path}: {_write(path, part):.1f} MiB, {len(part)} files"


def extract(archive: Path, folder: Path) -> None:
    """Unpack an archive; members that point outside the folder are refused.

    Args:
        archive: Archive.
        folder: Folder that is created if it does not exist.
    """
    if not hasattr(tarfile, "data_filter"):
        raise SystemExit(f"{archive}: this Python cannot check archives; use 3.10.12, 3.11.4 or newer")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


def unpack(archives: Sequence[Path], work: Path) -> list[str]:
    """Unpack archives: code and packages into ``work``, data into ``work/data/NAME``.

    Packages that this machine has are removed again, so that its own are used.

    Args:
        archives: Files that `pack_code` and `pack_data` have written.
        work: Folder for everything.

    Returns:
        What was unpacked, and the line for the shell that makes it importable.
    """
    lines = []
    for path in archives:
        if path.name.startswith("code."):
            extract(path, work)
            lines.append(f"{path.name}: {work / 'code'}")
        else:
            folder = work / "data" / path.name.rpartition("-")[0]
            extract(path, folder)
            lines.append(f"{path.name}: {folder}")
    return [*lines, f"export PYTHONPATH={':'.join(map(str, python_path(work)))}"]


def python_path(work: Path) -> list[Path]:
    """Return the folders for ``PYTHONPATH``: the package, and those packages that this machine lacks."""
    site, own = work / "site", work / "lacking"
    found = [work / "code" / "src"] if (work / "code" / "src").is_dir() else []
    if not site.is_dir():
        return found
    own.mkdir(exist_ok=True)
    for each in sorted(site.iterdir()):
        if not _is_here(each.name):
            link = own / each.name
            if not link.exists():
                link.symlink_to(each.resolve())
    return [*found, own]


def _is_here(name: str) -> bool:
    """Return whether this machine has a module, or the distribution of a ``.dist-info`` folder."""
    if not name.endswith(".dist-info"):
        return importlib.util.find_spec(name.removesuffix(".py")) is not None
    try:
        importlib.metadata.distribution(name.partition("-")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def commit_of(root: Path) -> str:
    """Return the commit of a checkout; empty where there is none."""
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
