"""The home folder in paths of settings and options."""

from __future__ import annotations

from pathlib import Path


def expand_home(text: str) -> str:
    """Replace the ``~`` of a path by the home folder, which shells do not do within ``--option=~/folder``.

    Args:
        text: Value of a setting, an option with its value, or anything else, which is returned as it is.

    Examples:
        >>> expand_home("~/runs") == str(Path.home() / "runs"), expand_home("--name=~1"), expand_home("a/~/b")
        (True, '--name=~1', 'a/~/b')
    """
    before, start, path = text.partition("~")
    option = before.startswith("--") and before.endswith("=") and before.count("=") == 1
    if not start or (before and not option) or path[:1] not in ("", "/"):
        return text
    return before + str(Path(f"~{path}").expanduser())
