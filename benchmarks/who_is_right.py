"""How often teacher, group and target learner of an ACKD run are right on training images, and on test images.

``python benchmarks/who_is_right.py RUN`` reads the last checkpoint. Images are not augmented and BatchNorm is in
evaluation mode; the group is the one of Eq. 3. A teacher is right on images that it was trained on far more often than
on others, and a student that learns from it sees these answers. ``--out FILE`` adds the shares to a JSON file, in
place of those that it has for a training of the same name and length.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch

from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.runs.files import find_checkpoint, read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of ACKD")
    parser.add_argument("--images", type=int, default=5000, help="images of each part")
    parser.add_argument("--out", type=Path, help="JSON file to add the shares to")
    chosen = parser.parse_args()
    cli = ACKDCLI("fit", ["--config", str(chosen.run / "config.yaml"), "--model.teacher.cache", "null"])
    cli.build()
    data, module = cli.datamodule, cli.model
    module.load_state_dict(read_checkpoint(find_checkpoint(str(chosen.run), "last"))["state_dict"])
    module.eval()
    module.teachers.load()
    data.prepare_data()
    data.setup("fit")
    print("| images | teacher | group | target learner | target and group agree | group and teacher agree |")
    print("|---|---|---|---|---|---|")
    shares: dict[str, dict[str, float]] = {}
    for part in ("train", "test"):
        found: Counter[str] = Counter()
        with torch.inference_mode():
            for raw in data.loader_in_order(part, most=chosen.images):
                image, target = data.on_after_batch_transfer(raw, 0)[:2]
                student = module.student(image)
                answers = {"teacher": module.teachers(image).logits, "group": module.method.ensemble(student)}
                answers = {name: each.argmax(1) for name, each in {**answers, "target": student.logits}.items()}
                found.update({name: int((each == target).sum()) for name, each in answers.items()})
                found["target, group"] += int((answers["target"] == answers["group"]).sum())
                found["group, teacher"] += int((answers["group"] == answers["teacher"]).sum())
                found["images"] += len(target)
        total = found.pop("images")
        names = ("teacher", "group", "target", "target, group", "group, teacher")
        shares[part] = {name: round(100 * found[name] / total, 1) for name in names}
        print(f"| {part} | {' | '.join(map(str, shares[part].values()))} |")
    if chosen.out:
        summary = json.loads((chosen.run / "summary.json").read_text(encoding="utf-8"))
        known = {"run": chosen.run.name, "epochs": summary["epochs"], "commit": summary["versions"]["commit"]}
        kept = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.is_file() else []
        kept = [each for each in kept if (each["run"], each["epochs"]) != (known["run"], known["epochs"])]
        lines = ",\n".join(json.dumps(each) for each in [*kept, {**known, **shares}])
        chosen.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
