"""Outputs of trained networks for one part of the data, and the images that a report shows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.types import Batch

Runner = Callable[[Tensor], Mapping[str, Tensor]]
"""Function from normalised images ``B x C x H x W`` to logits ``B x K`` by the name of the network."""
STUDENT, TEACHER = "student", "teacher"
_MISTAKES = 12
_EXAMPLES = 5


@dataclass
class Pictures:
    """Images that a report shows, ``n x C x H x W`` normalised, with their positions in the test set.

    Attributes:
        images: The images.
        rows: Position of each image.
    """

    images: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Measured:
    """Outputs of networks for N images of one part of the data.

    Attributes:
        target: ``N`` class indices.
        student: Logits of the student, ``N x K`` float32.
        answers: ``N`` predicted class indices by the name of each network.
        top5: Number of images whose class is among the five most probable ones, by the name of each network.
        divergence: Mean Kullback-Leibler divergence of the student from the teacher, in nats; None without a teacher.
        mistakes: Images that the student got wrong with the highest probability, the worst first.
        examples: The first image of each of the first classes.
        files: Answers of files in other formats, and the positions of the images that they were asked about.
        names: File name of each image; None where images are not files.
    """

    target: Tensor
    student: Tensor
    answers: dict[str, Tensor]
    top5: dict[str, int]
    divergence: float | None
    mistakes: Pictures
    examples: Pictures
    files: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    names: list[str] | None = None

    def right(self, network: str) -> Tensor:
        """Return ``N`` bool, whether a network is right.

        Args:
            network: Name of the network.
        """
        return self.answers[network] == self.target

    def file_right(self, file: str) -> Tensor:
        """Return whether a file is right, for the images that it was asked about.

        Args:
            file: Name of the file.
        """
        rows, answers = self.files[file]
        return answers == self.target[rows]


def batches(data: ImageDataModule, part: str, device: torch.device) -> Iterator[Batch]:
    """Yield the normalised batches of a part in order.

    Args:
        data: Data module that is set up.
        part: ``val`` or ``test``.
        device: Device of the batches.
    """
    for raw in data.val_dataloader() if part == "val" else data.test_dataloader():
        yield data.on_after_batch_transfer(data.transfer_batch_to_device(raw, device, 0), 0)


@torch.no_grad()
def validation_logits(data: ImageDataModule, run: Runner, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the student's logits ``N x K`` for the validation part, and its targets.

    Args:
        data: Data module that is set up.
        run: Networks.
        device: Device of the networks.
    """
    found = [(run(batch.image)[STUDENT].float().cpu(), batch.target.cpu()) for batch in batches(data, "val", device)]
    return torch.cat([logits for logits, _ in found]), torch.cat([target for _, target in found])


@torch.no_grad()
def measure(
    data: ImageDataModule,
    run: Runner,
    device: torch.device,
    *,
    files: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    most: int = 2000,
) -> Measured:
    """Run networks over the test part.

    Args:
        data: Data module that is set up.
        run: Networks, one of which is called ``student``.
        device: Device of the networks.
        files: Functions from normalised images to logits, by the name of the file. They are asked about at most
            ``most`` images, which are spread evenly over the test part.
        most: See ``files``.
    """
    dataset = getattr(data.test_dataloader(), "dataset", None)  # shards have none, and are asked about every image
    stride = 1 if dataset is None else max(1, math.ceil(len(cast(Sized, dataset)) / most))
    logits, target, answers, top5 = [], [], defaultdict(list), Counter[str]()
    asked: dict[str, list[Tensor]] = {name: [] for name in files or {}}
    divergence, start = 0.0, 0
    mistakes, examples = _Worst(), _FirstOfClasses()
    for batch in batches(data, "test", device):
        outputs = {name: each.float() for name, each in run(batch.image).items()}
        student, rows = outputs[STUDENT], torch.arange(start, start + len(batch.target))
        for name, each in outputs.items():
            answers[name].append(each.argmax(dim=1).cpu())
            five = each.topk(min(5, each.shape[1]), dim=1).indices
            top5[name] += int((five == batch.target[:, None]).any(dim=1).sum())
        if TEACHER in outputs:
            ours, theirs = student.log_softmax(dim=1), outputs[TEACHER].log_softmax(dim=1)
            divergence += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
        chosen = rows % stride == 0
        for name, ask in (files or {}).items():
            if chosen.any():
                asked[name].append(ask(batch.image[chosen.to(device)]).argmax(dim=1).cpu())
        logits.append(student.cpu())
        target.append(batch.target.cpu())
        mistakes.add(batch, student, rows)
        examples.add(batch, rows)
        start += len(rows)
    targets, every, ours = torch.cat(target), torch.arange(start), torch.cat(logits)
    if wrong := int((~ours.isfinite()).any(dim=1).sum()):
        raise ACKDError(
            f"the network answers {wrong:,} of {start:,} test images with NaN or infinite logits, so no page is "
            "written; choose an earlier checkpoint with --which best, or train with a lower learning rate"
        )
    return Measured(
        targets,
        ours,
        {name: torch.cat(each) for name, each in answers.items()},
        dict(top5),
        divergence / start if TEACHER in answers else None,
        mistakes.pictures(),
        examples.pictures(),
        {name: (every[every % stride == 0], torch.cat(each)) for name, each in asked.items()},
        data.image_names("test"),
    )


class _Worst:
    """The most confident mistakes so far."""

    def __init__(self) -> None:
        self.found: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, batch: Batch, logits: Tensor, rows: Tensor) -> None:
        probability, answer = logits.softmax(dim=1).max(dim=1)
        wrong = (answer != batch.target).nonzero().flatten()
        here = batch.image[wrong].cpu(), rows[wrong.cpu()], probability[wrong].cpu()
        all_three = here if self.found is None else tuple(map(torch.cat, zip(self.found, here, strict=True)))
        best = all_three[2].topk(min(_MISTAKES, len(all_three[2]))).indices
        self.found = all_three[0][best], all_three[1][best], all_three[2][best]

    def pictures(self) -> Pictures:
        assert self.found is not None
        return Pictures(self.found[0], self.found[1])


class _FirstOfClasses:
    """The first image of each of the first classes."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, int]] = {}

    def add(self, batch: Batch, rows: Tensor) -> None:
        if len(self.found) < _EXAMPLES:
            for place, label in enumerate(batch.target.tolist()):
                if label not in self.found and len(self.found) < _EXAMPLES:
                    self.found[label] = batch.image[place].cpu(), int(rows[place])

    def pictures(self) -> Pictures:
        images, rows = zip(*self.found.values(), strict=True)
        return Pictures(torch.stack(images), torch.tensor(rows))
