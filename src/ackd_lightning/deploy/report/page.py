"""The page of a report: Markdown with figures beside it, and one HTML file with the figures inside."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt

from ackd_lightning.deploy.latency import PTE_THREADS
from ackd_lightning.deploy.report.elements import FIGURES, escaped, figure, interval_text, percent, size_text, table
from ackd_lightning.metrics.intervals import TOP5_CLASSES

HEAD = "# Report: "
"""Beginning of the Markdown."""
_SHOWN_CLASSES = 30
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #2b2f36; background: #fff;
  max-width: 860px; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid #e2e5e9; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid #e9ebee; text-align: left; vertical-align: top; }
th { font-weight: 600; background: #f6f7f9; } td[style*="right"], th[style*="right"] { white-space: nowrap; }
img { max-width: 100%; height: auto; margin: .6rem 0; }
code { background: #f3f4f6; padding: .1rem .3rem; border-radius: 3px; font-size: .9em; }
.wide { overflow-x: auto; }
"""


def markdown(content: Mapping[str, Any], figures: Sequence[str]) -> str:
    """Write the page as Markdown.

    Args:
        content: Content of ``report.json``.
        figures: Stems of the figures that were drawn.
    """
    sections = [
        _head(content),
        _accuracy(content),
        _agreement(content),
        _classes(content, figures),
        _calibration(content, figures),
        _mistakes(content, figures),
        _cost(content),
        _training(content),
        _learners(content, figures),
        _about(content),
    ]
    return "\n\n".join(part for section in sections for part in section) + "\n"


def _head(content: Mapping[str, Any]) -> list[str]:
    student = content["accuracy"]["student"]
    facts = content["network"]
    cost = content["cost"][0] if content["cost"] else {}
    own = _one_image_ms(cost)
    in_torch = " in torch" if cost.get("parameters") is not None else ""
    times = [f"**{own:.2f} ms**{in_torch}"] if own is not None else []
    files = ((_one_image_ms(each), each["name"]) for each in content["cost"][1:] if each["asked"] is not None)
    if in_torch and (exported := min(((time, name) for time, name in files if time is not None), default=None)):
        times.append(f"**{exported[0]:.2f} ms** as {escaped(exported[1])}")
    adds = cost.get("multiply_adds")
    numbers = [
        f"**{percent(student['acc'])} %** of {content['images']:,} test images are classified correctly (95 % interval "
        f"{interval_text(student['interval'])})."
    ]
    if cost.get("parameters") is not None:
        size = f"It has **{cost['parameters']:,} parameters**"
        size += f", needs **{adds / 1e6:,.1f} million multiply-adds** for an image" if adds is not None else ""
        size += f" and takes {' and '.join(times)} on this machine" if times else ""
        numbers.append(f"{size}.")
    elif times:
        numbers.append(f"It takes {' and '.join(times)} on this machine.")
    taught = f", taught by {escaped(facts['teacher'])}" if facts.get("teacher") else ""
    method = f", trained with {escaped(facts['method'])}" if facts.get("method") else ""
    of = f" on {escaped(facts['data'])}" if facts.get("data") else ""
    lead = f"{escaped(facts['model'])}{method}{taught}{of}."
    return [f"{HEAD}{escaped(facts['model'])}", lead, " ".join(numbers)]


def _one_image_ms(cost: Mapping[str, Any]) -> float | None:
    return next((float(each["median_ms"]) for each in cost.get("latency", []) if each["batch"] == 1), None)


def _label(name: str, content: Mapping[str, Any]) -> str:
    labels: Mapping[str, str] = content["labels"]
    return escaped(labels.get(name, name))


def _accuracy(content: Mapping[str, Any]) -> list[str]:
    top5 = content["network"]["num_classes"] >= TOP5_CLASSES
    columns = ["network", "top-1 in %", "95 % interval", *(["top-5 in %"] if top5 else [])]
    rows = [
        [
            _label(name, content),
            percent(each["acc"]),
            interval_text(each["interval"]),
            *([percent(each["acc_top5"])] if top5 else []),
        ]
        for name, each in content["accuracy"].items()
    ]
    note = (
        f"On {content['images']:,} test images. The intervals are Wilson's: they cover the choice of the images, not "
    )
    return ["## Accuracy", table(columns, rows), note + "that of the seed of the training."]


def _agreement(content: Mapping[str, Any]) -> list[str]:
    found = content["agreement"]
    if found is None:
        return []
    rows = [
        ["student right", f"{found['both_right']:,}", f"{found['only_student']:,}"],
        ["student wrong", f"{found['only_teacher']:,}", f"{found['both_wrong']:,}"],
    ]
    sentence = str(found["sentence"])
    return [
        "## Agreement with the teacher",
        f"Student and teacher give the same answer for **{percent(found['same_answer'])} %** of the images. The "
        f"Kullback-Leibler divergence of the student from the teacher is {found['kl']:.4f} nats.",
        table(["", "teacher right", "teacher wrong"], rows),
        f"{sentence[0].upper()}{sentence[1:]}.",
    ]


def _classes(content: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    classes = sorted(content["classes"], key=lambda each: each["acc"])
    few = len(classes) <= _SHOWN_CLASSES
    rows = [
        [
            escaped(each["class"]),
            f"{each['images']:,}",
            percent(each["acc"], 1),
            f"{100 * each['interval'][0]:.1f} to {100 * each['interval'][1]:.1f}",
            percent(each["precision"], 1),
        ]
        for each in (classes if few else classes[:_SHOWN_CLASSES])
    ]
    title = "All classes, the weakest first:" if few else f"The {len(rows)} weakest of {len(classes):,} classes:"
    parts = ["## Classes", figure("per_class", "accuracy of each class")]
    parts += [title, table(["class", "images", "accuracy in %", "95 % interval", "precision in %"], rows)]
    if "confusion" in figures:
        parts += ["### Confusion matrix", figure("confusion", "confusion matrix")]
    pairs = [
        [escaped(each["class"]), escaped(each["taken_for"]), f"{each['images']:,}", percent(each["share"], 1)]
        for each in content["confused"]
    ]
    if pairs:
        parts += ["Most frequent mistakes:", table(["class", "taken for", "images", "% of the class"], pairs, text=2)]
    return parts


def _calibration(content: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    found = content["calibration"]
    rows = [["as trained", "1", f"{found['nll']:.4f}", percent(found["ece"])]]
    if "scaled" in found:
        after = found["scaled"]
        rows.append(["scaled", f"{found['temperature']:.3f}", f"{after['nll']:.4f}", percent(after["ece"])])
        confident = "too confident" if found["temperature"] > 1 else "not confident enough"
        note = (
            f"The temperature was fitted on {found['validation_images']:,} validation images, on which the network is "
            f"{confident}; everything else was measured on the test set. "
        )
        if after["nll"] < found["nll"]:
            note += f"Divide the logits by {found['temperature']:.3f} to get better probabilities."
        else:
            note += "On the test set it does not help: keep the logits as they are."
    else:
        note = f"No temperature was fitted: {content['no_temperature']}."
    columns = ["probabilities", "temperature", "negative log-likelihood", "expected calibration error in %"]
    return ["## Calibration", table(columns, rows), note, figure("reliability", "reliability diagram")]


def _mistakes(content: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    if "mistakes" not in figures:
        return ["## Mistakes", "The network makes none on the test set."]
    text = "Images that the network got wrong with the highest probability: the true class, and below it what the "
    return ["## Most confident mistakes", f"{text}network says.", figure("mistakes", "most confident mistakes")]


def _cost(content: Mapping[str, Any]) -> list[str]:
    if not content["cost"]:
        return []
    columns = ["network", "parameters", "million multiply-adds", "size"]
    size_rows = [
        [
            escaped(each["name"]),
            "-" if each["parameters"] is None else f"{each['parameters']:,}",
            "-" if each["multiply_adds"] is None else f"{each['multiply_adds'] / 1e6:,.2f}",
            size_text(each["bytes"]),
        ]
        for each in content["cost"]
    ]
    parts = ["## Size and speed", table(columns, size_rows)]
    parts.append("The size is that of the file; that of a network without a file is the size of its weights.")
    files = [each for each in content["cost"] if each["asked"]]
    if files:
        rows = [
            [escaped(each["name"]), percent(each["right"] / each["asked"]), interval_text(each["interval"])]
            for each in files
        ]
        asked = files[0]["asked"]
        which = "all" if asked == content["images"] else f"{asked:,} evenly spread"
        parts += [
            f"Accuracy of each file on {which} test images:",
            table(["file", "top-1 in %", "95 % interval"], rows),
        ]
    speed = [
        [
            escaped(each["name"]),
            one["device"],
            str(one["batch"]),
            f"{one['median_ms']:.3g}",
            f"{one['spread_ms']:.2g}",
            f"{one['images_per_second']:,.0f}",
        ]
        for each in content["cost"]
        for one in each["latency"]
    ]
    if speed:
        threads = next(one["threads"] for each in content["cost"] for one in each["latency"])
        columns = ["network", "device", "batch", "median in ms", "spread in ms", "images per second"]
        parts += [
            table(columns, speed, text=2),
            f"Measured on {escaped(content['machine'])} with {threads} {'thread' if threads == 1 else 'threads'}, "
            "after passes that are not counted. The spread is the interquartile range.",
            *([PTE_THREADS] if ".pte" in str(speed) else []),
        ]
    parts += [f"{escaped(each['name'])}: {escaped(each['note'])}." for each in content["cost"] if each["note"]]
    return parts


def _training(content: Mapping[str, Any]) -> list[str]:
    run = content["training"]
    if not run:
        return []
    seconds = run["seconds"]
    time = f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"
    rows = [
        ["time", time],
        ["epochs and steps", f"{run['epochs']:,} and {run['steps']:,}"],
        ["parameters in training", f"{run['training_parameters']:,}"],
        ["device", escaped(run["device"])],
        ["precision", escaped(run["precision"])],
        ["seed", str(run["seed"])],
    ]
    if run.get("skipped_steps"):
        rows.append(["skipped steps", f"{run['skipped_steps']:,}"])
    return ["## Training cost", table(["", ""], rows, text=2)]


def _learners(content: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    if not content["learners"] and "gradcam" not in figures and not content["no_gradcam"]:
        return []
    parts = ["## Learners" if content["learners"] else "## What the networks look at"]
    if content["learners"]:
        rows = [
            [
                _label(each["name"], content),
                percent(content["accuracy"][each["name"]]["acc"]),
                percent(each["same_answer"]),
                "-" if each["parameters"] is None else f"{each['parameters']:,}",
            ]
            for each in content["learners"]
        ]
        parts += [
            "Networks that were trained beside the student, and are not part of its file:",
            table(["learner", "top-1 in %", "same answer as the student in %", "own parameters"], rows),
        ]
    if "gradcam" in figures:
        parts += [
            "Grad-CAM for the true class, at the last feature map that a network's logits depend on: red positions "
            "speak for that class most. Below each image is the predicted class, in red if it is wrong.",
            figure("gradcam", "Grad-CAM of the networks on the same images"),
        ]
    parts += [f"No Grad-CAM: {escaped(content['no_gradcam'])}."] if content["no_gradcam"] else []
    return parts


def _about(content: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    rows = [["made by", f"`{content['command']}`"], ["on", content["date"]], ["versions", escaped(versions)]]
    rows += [[escaped(name), escaped(text)] for name, text in content["about"].items()]
    notes = [f"- {escaped(each)}" for each in content["notes"]]
    return ["## About this page", table(["", ""], rows, text=2), *(["\n".join(notes)] if notes else [])]


def page(text: str, figures: Mapping[str, bytes]) -> str:
    """Return the page as HTML that needs no other file.

    Args:
        text: Markdown of the page.
        figures: PNG files by their stem.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, content in figures.items():
        data = base64.b64encode(content).decode("ascii")
        body = body.replace(f'src="{FIGURES}/{name}.png"', f'src="data:image/png;base64,{data}"')
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<thead>\s*<tr>\s*(<th[^>]*></th>\s*)+</tr>\s*</thead>", "", body)  # of tables without a header
    title = html.escape(text.partition("\n")[0].lstrip("# ").replace("\\", ""))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
