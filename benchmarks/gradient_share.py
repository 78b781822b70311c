"""Norm of each term's gradient on the shared trunk and on the student's last stage, at the start and end of a run.

    python benchmarks/gradient_share.py runs/CONFIG/NAME

One training batch, gradients of the unweighted terms; the weights of the run are printed beside them.
"""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

import torch
import yaml

from ackd_lightning import ACKDModule
from ackd_lightning.models.freezing import parts_by_stage
from ackd_lightning.runs.files import read_checkpoint


def norm(value: torch.Tensor, parameters: list[torch.nn.Parameter]) -> float:
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return float(sum((g.double().square().sum() for g in gradients if g is not None), torch.zeros(())).sqrt())


def main(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    data = pkgutil.resolve_name(settings["data"]["class_path"])(**settings["data"]["init_args"])
    data.setup()
    arguments = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
    for moment in ("start", "end"):
        torch.manual_seed(0)
        module = ACKDModule(**arguments)
        if moment == "end":
            module.load_state_dict(checkpoint["state_dict"])
        module.load_teacher()
        module.train()
        batch = module.as_batch(data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0))
        student, teacher = module.outputs(batch)
        terms, weights = module.method(student, teacher, batch), module.method.loss_weights
        entries = [branch.entry for branch in module.student.branches]
        backbone = module.student.backbone
        stages = list(parts_by_stage(backbone).values())
        shared = {name for stage in stages[: min(entries)] for name in stage}
        own = {module.student.plan.classifier, *(name for stage in stages[max(entries) :] for name in stage)}
        parts = [
            [p for name, p in backbone.named_parameters() if any(f"{name}.".startswith(f"{each}.") for each in names)]
            for names in (shared, own)
        ]
        print(f"{run}, {moment}: value, weight, gradient norms on the common trunk and the student's last stage")
        for name, value in terms.items():
            trunk, target = (norm(value, part) if value.requires_grad else 0.0 for part in parts)
            print(f"  {name:<10} {float(value.detach()):8.3f} {weights[name]:5.1f} {trunk:9.3f} {target:9.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
