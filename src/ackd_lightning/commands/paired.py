"""Confidence intervals and paired tests of ``ackd compare``, from the predictions that runs keep of the test set."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ackd_lightning.errors import count_of
from ackd_lightning.metrics.intervals import (
    difference_interval,
    mean_interval,
    paired_bootstrap,
    paired_test,
    say_difference,
    say_verdict,
    wilson_interval,
)
from ackd_lightning.runs.answers import Answers, answers_file, read_answers
from ackd_lightning.runs.files import Which, read_summary


def interval_text(runs: Sequence[Path], accuracies: Sequence[float], which: Which) -> str:
    """Return the 95 % interval of a configuration's test accuracy in percent, as text.

    Args:
        runs: Folders of its runs.
        accuracies: Test accuracy of each run, from 0 to 1, as far as it was measured.
        which: Checkpoint that was tested.
    """
    path = answers_file(runs[0], which) if runs else None
    answers = read_answers(path) if path is not None and path.is_file() else None
    found = mean_interval(accuracies, 1 / len(answers) if answers else 0.0)
    if len(accuracies) == 1 and answers is not None:
        found = wilson_interval(int(answers.right.sum()), len(answers))
    return "-" if found is None else f"{max(0.0, 100 * found[0]):.2f} to {min(100.0, 100 * found[1]):.2f}"


def paired_tests(groups: Mapping[str, Sequence[Path]], which: Which, reference: str | None = None) -> list[str]:
    """Compare one configuration with each other one on the same test images.

    Two single runs are compared by McNemar's exact test. Groups of several seeds are compared by a paired bootstrap
    over the images, of the share of runs that are right, and by an interval over the seeds: Student's t of the
    differences of runs with the same seed where both groups have the same seeds, Welch's t otherwise. A difference is
    significant where both intervals say so.

    Args:
        groups: Folders of the runs of each configuration.
        which: Checkpoint that was tested.
        reference: Configuration that the others are compared with; None: the first of the network that most have.

    Returns:
        A sentence for each pair, or why there is none.

    Raises:
        ACKDError: If a file of predictions is damaged.
    """
    if len(groups) < 2:
        return []
    missing = [run for runs in groups.values() for run in runs if not answers_file(run, which).is_file()]
    if missing:
        more = f" and {count_of(len(missing) - 1, 'more run')} have" if len(missing) > 1 else " has"
        option = "" if which == "last" else f" --which {which}"
        command = f"ackd test {shlex.quote(str(missing[0]))}{option}"
        return [f"no paired test: {missing[0]}{more} no predictions of the test set (run `{command}`)"]
    answers = {
        name: {read_summary(run)["seed"]: read_answers(answers_file(run, which)) for run in runs}
        for name, runs in groups.items()
    }
    first = _usual_reference(groups) if reference is None else reference
    return [_sentence(first, answers[first], other, answers[other]) for other in answers if other != first]


def _usual_reference(groups: Mapping[str, Sequence[Path]]) -> str:
    """Return the first configuration of the network that most have, which is not that of a teacher beside students."""
    networks = {name: read_summary(runs[0])["student"] for name, runs in groups.items()}
    most = Counter(networks.values()).most_common(1)[0][0]
    return next(name for name, network in networks.items() if network == most)


def _sentence(first: str, ours: Mapping[int, Answers], second: str, theirs: Mapping[int, Answers]) -> str:
    """Compare two configurations, whose answers are given by the seed of the run."""
    some, *others = (*ours.values(), *theirs.values())
    if {each.images for each in others} != {some.images}:
        return f"no paired test of {first} and {second}: they were tested on different images, or in another order"
    if len(ours) == len(theirs) == 1:
        return paired_test(*(each.right for group in (ours, theirs) for each in group.values())).sentence(first, second)
    shares = [torch.stack([each.right for each in group.values()]).double().mean(dim=0) for group in (ours, theirs)]
    difference, low, high = paired_bootstrap(*shares)
    counts = [len(group) for group in ((ours, theirs) if difference >= 0 else (theirs, ours))]  # as they are named
    seeds = f"{counts[0]} seeds" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} seeds"
    said = (
        f"{say_difference(first, second, difference, low, high)}, mean of {seeds} "
        f"(paired bootstrap over the same {len(some):,} test images)"
    )
    right = [{seed: float(each.right.double().mean()) for seed, each in group.items()} for group in (ours, theirs)]
    paired = ours.keys() == theirs.keys()
    if paired:
        trainings = mean_interval([right[0][seed] - right[1][seed] for seed in ours], 1 / len(some))
    else:
        trainings = difference_interval([*right[0].values()], [*right[1].values()], 1 / len(some))
    if trainings is None:
        return f"{said}; one seed says nothing about other trainings"
    if difference < 0:
        trainings = -trainings[1], -trainings[0]
    around = f"{100 * trainings[0]:.2f} to {100 * trainings[1]:.2f}"
    differs = (low > 0 or high < 0) and (trainings[0] > 0 or trainings[1] < 0)
    test = "Student's t, runs of the same seed in pairs" if paired else "Welch's t"
    return f"{said}; over the seeds the interval is {around} ({test}): {say_verdict(differs)}"
