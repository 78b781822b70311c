"""``ackd compare``: one table and one figure over finished runs."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.table import Table

from ackd_lightning import data
from ackd_lightning.commands.paired import interval_text, paired_tests
from ackd_lightning.config.experiment import experiment_settings
from ackd_lightning.config.yaml_files import read_yaml
from ackd_lightning.data.custom import CustomImagesDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.launch.run_settings import started_with
from ackd_lightning.runs.console import show_table
from ackd_lightning.runs.export import peer_name
from ackd_lightning.runs.figures import new_figure, read_metrics, save_figure
from ackd_lightning.runs.files import CURVES, LEARNERS, Which, find_runs, measured_last, read_summary

_FIGURES = (".png", ".pdf", ".svg")
_INTERVAL = "95 % interval"
_WORDS = ("configuration", "method", "student")
_COLUMNS = (*_WORDS, "n", "val last", "val best", "test last", "test best", _INTERVAL, "parameters")
"""Columns of the table; one in which no configuration has a value is left out."""


def mean_and_std(values: Sequence[float], decimals: int = 2) -> str:
    """Mean and sample standard deviation as text.

    Args:
        values: Numbers in the printed unit.
        decimals: Number of decimals.

    Examples:
        >>> mean_and_std([50, 60]), mean_and_std([50]), mean_and_std([])
        ('55.00 ± 7.07', '50.00', '-')
    """
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{decimals}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{decimals}f}"


def group_runs(places: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Group runs that differ only in their seed; the name of a group lists the settings that distinguish it.

    Args:
        places: Run folders, or folders of runs.

    Raises:
        ACKDError: When two runs of a group have the same seed, so that they are not repetitions.
    """
    settings: dict[Path, dict[str, str]] = {}
    configs: dict[str, list[Path]] = defaultdict(list)
    for run in find_runs(places):
        content = read_yaml(run / "config.yaml")
        if not isinstance(content, dict):
            raise ACKDError(f"{run / 'config.yaml'} holds no settings; restore it or remove the folder of the run")
        settings[run] = {key: json.dumps(value) for key, value in experiment_settings(content, places=True).items()}
        configs[read_summary(run)["config"]].append(run)
    groups: dict[str, list[Path]] = defaultdict(list)
    for config, runs in configs.items():
        roots = _data_folders(runs)  # perhaps of one name, in two projects
        if len(set(roots.values())) > 1:
            for run, root in roots.items():
                settings[run]["data.root"] = json.dumps(root)
        for key in sorted({key for run in runs for key in settings[run] if key.startswith("model.teacher")}):
            own = {run: _of_any_seed(settings[run].get(key, "-"), read_summary(run)["seed"]) for run in runs}
            if len({*own.values()}) == 1:  # each run has a teacher that was trained for its seed
                for run in runs:
                    settings[run].pop(key, None)
        differing = _telling([settings[run] for run in runs])
        for run in runs:
            apart = ", ".join(f"{key.rsplit('.', 1)[-1]}={settings[run].get(key, '-')}" for key in differing)
            groups[f"{config} ({apart})" if apart else config].append(run)
        if len(runs) == 1:  # named as in `ackd fit --name`
            groups[f"{config}/{runs[0].name}"] = groups.pop(config)
    for name, runs in groups.items():
        seeds = [read_summary(run)["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise ACKDError(
                f"runs {', '.join(map(str, runs))} of {name} have seeds {seeds}, so some repeat the same experiment; "
                "name one run per seed"
            )
    return groups


def _telling(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the settings that differ, without arguments that some runs lack only because their class is another."""
    keys = sorted({key for run in runs for key in run})
    differing = [key for key in keys if len({run.get(key) for run in runs}) > 1]
    classes = [key for key in differing if key.endswith(".class_path")]

    def follows(key: str) -> bool:
        owners = [each for each in classes if key != each and key.startswith(each.removesuffix("class_path"))]
        lacking = any(key not in run for run in runs)
        return lacking and any(
            len({(run.get(owner), run.get(key)) for run in runs}) == len({run.get(owner) for run in runs})
            for owner in owners
        )

    return [key for key in differing if not follows(key)]


def _of_any_seed(value: str, seed: int) -> str:
    """Path of a network that was trained for a seed, as one that is the same for all seeds."""
    return re.sub(rf"(?<=seed){seed}(?!\d)", "*", value)


def _data_folders(runs: Sequence[Path]) -> dict[Path, str]:
    """Folder of the data of each run, where it is still there and holds images of the user."""
    found = {}
    for run in runs:
        settings = experiment_settings(started_with(run), places=True)
        root, kind = settings.get("data.root"), str(settings.get("data.class_path")).rpartition(".")[2]
        published = hasattr(data, kind) and not issubclass(getattr(data, kind), CustomImagesDataModule)
        if not published and isinstance(root, str) and Path(root).exists():
            found[run] = str(Path(root).resolve())
    return found


def accuracies_on_test(summaries: Sequence[dict[str, Any]], which: str, key: str = "test/acc") -> list[float]:
    """Return the accuracies on the test set that runs have measured, from 0 to 1.

    Args:
        summaries: Content of the runs' ``summary.json``.
        which: ``last`` or ``best`` checkpoint.
        key: Name of the accuracy.
    """
    values = [each.get("test", {}).get(which, {}).get(key) for each in summaries]
    if which == "last":  # a run without validation data measures the test set as it trains
        values = [
            v if v is not None else measured_last(each).get(key) for v, each in zip(values, summaries, strict=True)
        ]
    return [value for value in values if value is not None]


def _on_validation(summaries: Sequence[dict[str, Any]], which: str, key: str) -> list[float]:
    """Validation accuracies of the last weights or of the best ones, from 0 to 1."""
    found = [measured_last(each) if which == "last" else each["best"] for each in summaries]
    return [each[key] for each in found if key in each]


def _cell(accuracies: Sequence[float], runs: int) -> str:
    """Mean and standard deviation in percent, and of how many runs where some have no accuracy."""
    some = f" ({len(accuracies)} of {runs})" if 0 < len(accuracies) < runs else ""
    return f"{mean_and_std([100 * each for each in accuracies])}{some}"


def compare(places: Sequence[str | Path], *, which: Which = "last") -> Table:
    """Build a table with one row per configuration: mean and standard deviation of the accuracies over its runs.

    Args:
        places: Run folders, or folders of runs.
        which: Checkpoint whose test accuracy gets a confidence interval.
    """
    folders = group_runs(places)
    groups = {name: [read_summary(run) for run in runs] for name, runs in folders.items()}
    without_validation = any(each["shown"] == "test" for runs in groups.values() for each in runs)
    rows = []
    for config, runs in groups.items():
        first = runs[0]
        peers = [peer_name(spec, first["student"]) for spec in first.get("learners", [])]
        networks = [(0, first["student"]), *((number, name) for number, name in enumerate(peers, start=1) if name)]
        for learner, name in networks:
            key = f"aux{learner}_acc" if learner else "acc"
            row = (
                "" if learner else config,
                "" if learner else first["method"],
                f"{name} (learner {learner})" if learner else name,
                str(len(runs)),
                *(_cell(_on_validation(runs, each, f"val/{key}"), len(runs)) for each in ("last", "best")),
                *(_cell(accuracies_on_test(runs, each, f"test/{key}"), len(runs)) for each in ("last", "best")),
                "" if learner else interval_text(folders[config], accuracies_on_test(runs, which, "test/acc"), which),
                _size(first, learner),
            )
            rows.append(row)
    table = Table(title="accuracy in %, mean ± standard deviation over runs (n)")
    shown = [number for number in range(len(_COLUMNS)) if {row[number] for row in rows} - {"", "-"}]
    for number in shown:
        table.add_column(_COLUMNS[number], justify="left" if _COLUMNS[number] in _WORDS else "right")
    for row in rows:
        table.add_row(*(row[number] for number in shown))
    notes = []
    if {_COLUMNS.index("val best"), _COLUMNS.index("test best")} & {*shown}:
        notes.append("best = epoch with the best validation accuracy")
    if without_validation:
        notes.append("without validation data no epoch is selected")
    if _COLUMNS.index(_INTERVAL) in shown:
        notes.append(f"interval of test {which}: over the seeds (Student's t), of a single run over the images")
    notes += [
        f"runs of {name} learned from different teacher files" for name in groups if _teachers_differ(groups[name])
    ]
    table.caption = "; ".join(notes)
    return table


def _teachers_differ(runs: Sequence[dict[str, Any]]) -> bool:
    """Whether runs of one setting learned from different files of any of their teachers, as far as these are known."""
    teachers = [[each.get("teacher") or {}, *each.get("other_teachers", [])] for each in runs]
    return any(len({each.get("sha256") for each in same} - {None}) > 1 for same in zip_longest(*teachers, fillvalue={}))


def _size(summary: dict[str, Any], learner: int) -> str:
    """Parameters of the exported student (learner 0), or of a peer."""
    if learner:
        return f"{summary['learner_parameters'][learner - 1]:,}" if "learner_parameters" in summary else ""
    plain = summary.get("plain_parameters", summary["parameters"])
    more = "" if plain == summary["parameters"] else f" (with a head; plain {plain:,})"
    return f"{summary['parameters']:,}{more}"


def curves(run: Path, metric: str = "acc") -> tuple[list[int], list[float], str]:
    """Read the validation accuracy of every epoch from the ``metrics.csv`` of a run.

    Args:
        run: Folder of the run.
        metric: ``acc`` or ``acc_top5``.

    Returns:
        Epochs from 1, accuracies in percent, and their split: ``val``, or ``test`` without validation data.
    """
    stage = read_summary(run)["shown"]
    found = read_metrics(run / "metrics.csv").get(f"{stage}/{metric}", {})
    values = {epoch: 100 * value for epoch, value in found.items() if not math.isnan(value)}
    return list(values), list(values.values()), stage


def draw_curves(places: Sequence[str | Path], target: Path) -> None:
    """Draw accuracy by epoch: one colour per configuration, thin lines for runs and a thick one for their mean.

    Args:
        places: Run folders, or folders of runs.
        target: Image file to write (PNG, PDF or SVG).
    """
    groups = group_runs(places)
    figure, (axes,) = new_figure(8, 5)
    stages: set[str] = set()
    for number, (config, runs) in enumerate(groups.items()):
        color = f"C{number % 10}"
        lines = [curves(run) for run in runs if (run / "metrics.csv").is_file()]
        if not lines:
            print(f"{config}: no metrics.csv, so no curve is drawn")
            continue
        stages |= {stage for _, _, stage in lines}
        for epochs, values, _ in lines if len(lines) > 1 else []:
            axes.plot(epochs, values, color=color, linewidth=0.6, alpha=0.4)
        shared = sorted(set.intersection(*(set(epochs) for epochs, _, _ in lines)))
        by_epoch = [dict(zip(epochs, values, strict=True)) for epochs, values, _ in lines]
        means = [statistics.fmean(each[epoch] for each in by_epoch) for epoch in shared]
        shown = f" {config}" if config.startswith("_") else config  # matplotlib leaves names with _ out of legends
        axes.plot(shared, means, color=color, linewidth=2, label=f"{shown} (n={len(lines)})")
    axes.set_ylabel(f"{' / '.join(sorted(stages))} accuracy in %")
    if stages:
        axes.legend()
    save_figure(figure, target)


def say_classes(groups: Mapping[str, Sequence[Path]]) -> str:
    """Say which configurations have other classes than the first; nothing where all have the same in any order.

    Args:
        groups: Folders of the runs of each configuration.
    """
    known = {
        name: {frozenset(read_summary(run).get("class_names") or ()) for run in runs} for name, runs in groups.items()
    }
    if len({names for found in known.values() for names in found if names}) < 2:
        return ""
    listed = (f"{name} ({' or '.join(str(len(each)) for each in found)} classes)" for name, found in known.items())
    return f"trained on data of other classes, so the accuracies cannot be compared: {', '.join(listed)}"


def say_lengths(groups: Mapping[str, Sequence[Path]]) -> str:
    """Say how long configurations were trained that were not trained equally long; nothing for others.

    Args:
        groups: Folders of the runs of each configuration.
    """
    known = {name: [read_summary(run).get("steps") for run in runs] for name, runs in groups.items()}
    steps = {name: sorted({each for each in found if each}) for name, found in known.items() if any(found)}
    if len({each for found in steps.values() for each in found}) < 2:
        return ""
    each = (f"{name} {' to '.join(f'{number:,}' for number in (s[0], s[-1])[: len(s)])}" for name, s in steps.items())
    return f"trained for different numbers of steps, so a difference in accuracy may come from that: {', '.join(each)}"


def reference_among(groups: Mapping[str, Sequence[Path]], against: str) -> str:
    """Return the name of the configuration that the others are compared with.

    Args:
        groups: Folders of the runs of each configuration.
        against: Its name in the table or what no other one has after ``+`` in its name, or a folder of its runs.

    Raises:
        ACKDError: If there is no such configuration, or the folder holds runs of several.
    """
    if against in groups:
        return against
    ends = [name for name in groups if name.partition("+")[2] == against]
    if len(ends) == 1:
        return ends[0]
    inside = {run.resolve() for run in find_runs([against])} if against and Path(against).is_dir() else set()
    found = [name for name, runs in groups.items() if any(run.resolve() in inside for run in runs)]
    if len(found) != 1:
        which = (
            "holds runs of several of them" if found else "ends several of their names" if ends else "is none of them"
        )
        raise ACKDError(
            f"--against {against}: name one of the compared configurations, {', '.join(groups)}; it {which}"
        )
    return found[0]


def compare_command(places: Sequence[str], *, figure: str, which: Which = "last", against: str | None = None) -> None:
    """Print the table and the paired tests, and draw the curves.

    Args:
        places: Run folders, or folders of runs.
        which: Checkpoint whose test predictions are compared.
        figure: Image file to write (PNG, PDF or SVG).
        against: Configuration that the others are compared with, or a folder of its runs; None: the first of the
            network that most of them have.
    """
    target = Path(figure)
    if target.suffix.lower() not in _FIGURES or target.is_dir():
        raise ACKDError(f"--figure is {figure}; name a file that ends in {', '.join(_FIGURES)}")
    if target.name in (CURVES, LEARNERS) and (target.parent / "config.yaml").is_file():
        raise ACKDError(f"--figure {figure} is a figure of the run in that folder; name another file")
    groups = group_runs(places)
    reference = None if against is None else reference_among(groups, against)
    table, others = compare(places, which=which), say_classes(groups)
    tests = [others] if others else [*filter(None, [say_lengths(groups)]), *paired_tests(groups, which, reference)]
    check_writable(target.parent, "the folder of --figure,")
    for run in find_runs(places):
        if (run / "metrics.csv").is_file():
            curves(run)  # a damaged file is reported before anything is printed
    show_table(table)
    for sentence in tests:
        print(sentence)
    draw_curves(places, Path(figure))
    print(f"curves: {figure}")
