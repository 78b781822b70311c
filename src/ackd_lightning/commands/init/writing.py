"""The two configurations as text."""

from __future__ import annotations

import json

from ackd_lightning.commands.init.choices import Choices


def _data(root: str, c: Choices, places: dict[str, str | None]) -> list[str]:
    lines = ["data:", "  class_path: ackd_lightning.data.ImageFolderDataModule", "  init_args:"]
    values: dict[str, object] = {"root": root, **{key: value for key, value in places.items() if value is not None}}
    values["image_size"] = c.image_size
    if c.channels != 3:
        values["channels"] = c.channels
    if c.pretrained:
        values["mean"] = values["std"] = [0.5, 0.5, 0.5]
    if c.value_range is not None:
        values["value_range"] = list(c.value_range)
    values["batch_size"] = c.batch_size
    if c.val_fraction is not None:
        values["val_fraction"] = c.val_fraction
    if c.num_workers:
        values["num_workers"] = c.num_workers
    held_out = "held out of the training images" if c.val_fraction else "validates on the test images"
    notes = {"val_fraction": f"  # {held_out}", "mean": "  # as the published weights expect"}
    if c.balanced:
        values["sampling"] = "balanced"
        notes["sampling"] = "  # small classes as often as large ones; or: model.recipe.class_weights: auto"
    return lines + [f"    {key}: {_plain(value)}{notes.get(key, '')}" for key, value in values.items()]


def _plain(value: object) -> str:
    """A value as YAML; text in quotes, as a folder may be called 1 or no."""
    return json.dumps(value, ensure_ascii=False)


def _schedule(c: Choices, epochs: int, *, fine_tuned: bool) -> list[str]:
    """Optimizer and schedule below ``model``, where they differ from the recipe."""
    if fine_tuned:
        return ["  optimizer:", "    init_args:", "      lr: 1.0e-3  # a fifth of it before the classifier"]
    if c.small:
        lines = ["  optimizer:", "    init_args:", "      lr: 0.05", "  lr_scheduler:", "    init_args:"]
        return [*lines, f"      milestones: [{epochs // 2}, {epochs * 3 // 4}]"]
    return ["  optimizer:", "    init_args:", "      lr: 5.0e-3"]


def teacher_text(root: str, c: Choices, places: dict[str, str | None]) -> str:
    """Return the teacher's configuration.

    Args:
        root: Folder of the photos, as the user gave it.
        c: Values.
        places: Arguments of the data module that name folders.
    """
    recipe = "finetune" if c.pretrained else "sgd" if c.small else "adamw"
    lines = [f"# teacher: {c.teacher} on {_plain(root)}; written by ackd init"]
    lines += [f"include: [recipes/{recipe}, recipes/teacher]", "trainer:", f"  max_epochs: {c.teacher_epochs}"]
    lines += [*_data(root, c, places), "model:"]
    if c.pretrained:
        lines += ["  student:  # the network that is trained here", f"    network: {c.teacher}"]
        lines += ["    pretrained: true  # downloads timm's weights for ImageNet once; without it nothing is fetched"]
        lines += ["    backbone_lr_scale: 0.2"]
    else:
        lines += [f"  student: {c.teacher}  # the network that is trained here"]
    lines += _schedule(c, c.teacher_epochs, fine_tuned=c.pretrained)
    return "\n".join([*lines, *_layout(c)]) + "\n"


def student_text(root: str, c: Choices, places: dict[str, str | None], *, weights: str) -> str:
    """Return the student's configuration.

    Args:
        root: Folder of the photos, as the user gave it.
        c: Values.
        places: Arguments of the data module that name folders.
        weights: Weight file of the teacher.
    """
    recipe = "sgd" if c.small else "adamw"
    lines = [f"# {c.method}: {c.teacher} teaches {c.student} on {_plain(root)}; written by ackd init"]
    lines += ["# another method: ackd fit --config THIS_FILE --config ackd.yaml; `ackd configs` lists them"]
    lines += [f"include: [recipes/{recipe}, methods/{c.method}]", "trainer:", f"  max_epochs: {c.student_epochs}"]
    lines += [*_data(root, c, places), "model:"]
    lines += ["  teacher:", f"    network: {c.teacher}", f"    weights: {_plain(weights)}"]
    lines += ["  student:", f"    network: {c.student}"]
    if c.pretrained:
        lines += ["    # pretrained: true  # would start from timm's weights; then recipes/finetune above"]
    if c.method == "reviewkd":
        lines += [
            "  method:",
            "    init_args:",
            "      mid_channels: 128",
            f"      warmup_epochs: {c.student_epochs // 5}",
        ]
    if c.method == "kd":
        lines += ["  method:", "    init_args:", "      weight_ce: 1.0", "      weight_kd: 1.0"]
    lines += _schedule(c, c.student_epochs, fine_tuned=False)
    return "\n".join([*lines, *_layout(c)]) + "\n"


def _layout(c: Choices) -> list[str]:
    return [] if c.small else ["  channels_last: true  # faster convolutions, the same results up to rounding"]
