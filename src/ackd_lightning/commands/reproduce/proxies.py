"""Table 1: how much of the teacher its proxies retain, measured on finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ackd_lightning.commands.reproduce.jobs import Job
from ackd_lightning.commands.reproduce.planning import Planner
from ackd_lightning.commands.reproduce.results import Line
from ackd_lightning.commands.reproduce.specs import Pair, Row, TableSpec
from ackd_lightning.deploy.report.measuring import batches
from ackd_lightning.metrics.proxies import proxy_measurements
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.weights import digest
from ackd_lightning.runs.files import write_json

_FILE = "proxies.json"


def _network(name: str, weights: str, job: Job, options: dict[str, Any] | None) -> FrozenTeacher:
    data = job.images
    network = FrozenTeacher.from_name(name, job.networks.data.num_classes, weights=weights, options=options)
    network.adapt_to(data.info)
    return network


def measure(job: Job, teacher: tuple[str, str]) -> dict[str, float]:
    """Measure a student, its proxy and the teacher on the test set; the values are stored in the folder of the run.

    Args:
        job: Finished run of a student that learned from a proxy.
        teacher: Model name and weight file of the teacher.
    """
    kept = job.folder / _FILE
    model = job.config["model"]
    proxy = model["teacher"]
    files = (teacher[1], proxy["weights"], str(job.student_file))
    networks = [digest(file) for file in files]
    if kept.is_file():
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content["networks"] == networks:
            values: dict[str, float] = content["values"]
            return values
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = job.images
    data.prepare_data()
    data.setup()
    values = proxy_measurements(
        _network(*teacher, job, proxy["options"]).to(device),
        _network(proxy["network"], proxy["weights"], job, proxy["options"]).to(device),
        _network(model["student"]["network"], str(job.student_file), job, model["student"]["options"]).to(device),
        batches(data, "test", device),
    )
    write_json({"networks": networks, "values": values}, kept)
    return values


def proxy_lines(
    table: TableSpec, pairs: Sequence[Pair], rows: Sequence[Row], jobs: Sequence[Job], planner: Planner
) -> list[Line]:
    """Build a line for every measurement of every proxy.

    Args:
        table: Table with the figures of the paper.
        pairs: Requested pairs.
        rows: Requested rows.
        jobs: Finished runs.
        planner: Planner of the table, which knows the teachers.
    """
    result: list[Line] = []
    for pair in pairs:
        for row in {row.name: row for row in (*table.rows.values(), *rows)}.values():
            students = [job for job in jobs if (job.pair, job.row, job.kind) == (pair.name, row.name, "student")]
            if row.teacher == "guides" or not all(job.settings["learns from"] for job in students):
                continue  # several networks are no proxy, and a student alone has none
            measured = [measure(job, planner.teacher_file(pair)) for job in students]
            for key in _MEASURES:
                paper = (pair.paper.get(row.name) or {}).get(key)
                kind = key.split("_")[0]
                result.append(
                    Line(
                        pair.name,
                        row.name,
                        f"{row.label}: {_MEASURES[key]}",
                        "proxy" if kind == "acc" else kind,
                        paper,
                        tuple(each[key] for each in measured),
                        (),
                        decimals=2 if kind == "acc" else 4,
                    )
                )
    return result


_MEASURES = {
    "acc_teacher": "Acc(T)",
    "acc_proxy": "Acc(P)",
    "acc_student": "Acc(S)",
    "acc_gap": "AccGap(T, P)",
    "cka_teacher_proxy": "CKA(T, P)",
    "cka_proxy_student": "CKA(P, S)",
    "cka_teacher_student": "CKA(T, S)",
    "kl_teacher_proxy": "KL(T, P)",
    "kl_proxy_student": "KL(P, S)",
    "kl_teacher_student": "KL(T, S)",
}
