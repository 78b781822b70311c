"""Tables lose nothing, however wide the terminal is."""

from __future__ import annotations

import re

import pytest
from rich.table import Table

from ackd_lightning.runs.console import show_table

NAME = "tiny100_resnet20_resnet8+undetached"


def made():
    table = Table(title="accuracy", caption="over the seeds")
    for column in ("configuration", "test last", "95 % interval", "parameters"):
        table.add_column(column)
    table.add_row(NAME, "71.27 ± 0.05", "70.00 to 72.50", "78,042")
    table.add_row("kd [weights]", "70.00", "", "78,042")
    return table


@pytest.mark.parametrize("width", [40, 60, 72, 80, 90, 120, 200])
def test_every_word_is_whole_in_a_terminal_of_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    show_table(made())
    lines = re.sub("\\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in re.split(r"[ │,:]+", line)}
    assert {"71.27", "0.05", "72.50", "[weights]", "seeds"} <= words
    if width > 60:
        assert NAME in " ".join(lines) or width < 80
    assert ("test last 71.27 ± 0.05" in " ".join(lines)) == (width < 72)  # as lines


def test_where_there_is_no_terminal_nothing_is_folded(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    show_table(made())
    assert f"│ {NAME} │ 71.27 ± 0.05 │ 70.00 to 72.50 │ 78,042     │" in capsys.readouterr().out
