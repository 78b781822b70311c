from __future__ import annotations

from timing.training import PARTS

BATCH, WARMUP, STEPS = 6, 1, 2
SMALL = ["--data.batch_size", str(BATCH), "--data.max_per_class", "4", "--model.teacher.network", "resnet8"]


def arguments(method: str) -> list[str]:
    return ["--config", "digits_resnet20_resnet8", "--config", method, *SMALL]


def made_up(value: float, *, busy: bool | None = False) -> dict:
    """A result of `measure` with one value everywhere."""
    import bench

    result = dict.fromkeys(bench.SUMMARISED, value)
    load = {"busy": busy, "other_cores": 1.5 if busy else 0.0, "cores": 2}
    counts = {"teacher": 3, "student": 1, "in_training": 2}
    return {**result, "parts": dict.fromkeys(PARTS, value), "multiply_adds": counts, "load": load, "notes": []}
