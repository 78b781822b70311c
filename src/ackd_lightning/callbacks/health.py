"""Warnings about a run: a teacher near chance, attention that collapses, features that lose their variation."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.metrics.guessing import MeanRecall, mean_recall
from ackd_lightning.validation import Fraction, checked

_MOST_CLASSES = 4000
"""Largest number of classes for which another order is looked for, which needs matrices of its square."""
_LONGEST_ORDER = 200
"""Largest number of classes whose whole order is printed."""

if TYPE_CHECKING:
    from ackd_lightning.callbacks.protocol import TrainingModule


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Return whether the run is a ``fast_dev_run``, which only tries a few batches and writes nothing.

    Args:
        trainer: Trainer of the run.
    """
    return bool(getattr(trainer, "fast_dev_run", False))


class TeacherGate(L.Callback):
    """Measure the accuracy of every teacher on validation data before the first step, and the order of its classes.

    A teacher that is near chance, far below the accuracy that its file states, or much better with its classes in
    another order ends the run if its own ``gate`` is ``stop``, and is warned of if it is ``warn``.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, print, log and judge every teacher."""
        module = cast("TrainingModule", pl_module)
        if is_fast_dev_run(trainer) or not trainer.enable_validation:
            return
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        if trainer.val_dataloaders is None:
            return
        stage = trainer.state.stage
        trainer.state.stage = RunningStage.VALIDATING  # hooks of the data ask for it before they augment
        try:
            for number, (teacher, config) in enumerate(
                zip(module.teachers.frozen, module.teachers.configs, strict=True)
            ):
                if not teacher.features_only and config.gate != "off":  # without classes there is no accuracy
                    self._examine(trainer, module, number, stop=config.gate == "stop")
        finally:
            trainer.state.stage = stage

    @torch.no_grad()
    def _examine(self, trainer: L.Trainer, module: TrainingModule, number: int, *, stop: bool) -> None:
        teacher, several = module.teachers.frozen[number], len(module.teachers.frozen) > 1
        loop, classes = trainer.fit_loop.epoch_loop.val_loop, module.data.num_classes
        assert loop._combined_loader is not None  # there are loaders
        halves: list[list[Tensor]] = [[], []]  # targets and answers
        generator = torch.Generator().manual_seed(0)  # order of the images and order of the classes may agree
        between = True  # whether all scores are between 0 and 1
        limits = (None if each == float("inf") else int(each) for each in loop.max_batches)
        loaders = [
            (place, itertools.islice(loader, most))
            for place, (loader, most) in enumerate(zip(loop._combined_loader.flattened, limits, strict=True))
        ]
        for number_of_loader, raw in ((each, raw) for each, loader in loaders for raw in loader):
            batch = module.as_batch(trainer.strategy.batch_to_device(raw, dataloader_idx=number_of_loader))
            with trainer.precision_plugin.forward_context():
                scores = teacher(batch.image).logits
            between = between and bool(((scores >= 0) & (scores <= 1)).all())
            half = (torch.rand(len(batch.target), generator=generator) < 0.5).to(scores.device)
            pairs = torch.stack([batch.target, scores.argmax(dim=1)])
            for found, chosen in zip(halves, (half, ~half), strict=True):
                found.append(pairs[:, chosen].cpu())
        first, second = (torch.cat(found, dim=1) if found else torch.zeros(2, 0).long() for found in halves)
        if trainer.world_size > 1:  # each process has images of its own
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (first, second, between))
            first, second = (torch.cat([each[half] for each in parts], dim=1) for half in (0, 1))
            between = all(each[2] for each in parts)
        targets, answers = torch.cat([first, second], dim=1)
        split, data = ("test", "test") if module.looks_at_test() else ("val", "validation")
        measured = int((targets == answers).sum()) / max(len(targets), 1)
        recall = mean_recall(targets, answers, classes)
        teacher.metadata["measured_acc"] = f"{measured:.6f}"
        name = f"{number + 1} ({teacher.name})" if several else teacher.name
        if trainer.is_global_zero:
            print(f"teacher {name}: accuracy {measured:.2%} on this run's {data} data", flush=True)
        for logger in trainer.loggers:
            key = f"{split}/teacher{number + 1 if number else ''}_acc"
            logger.log_metrics({key: measured}, step=trainer.global_step)
        if between and classes > 1 and len(targets) and not teacher.gives_probabilities:
            rank_zero_warn(
                f"all outputs of teacher {name} are between 0 and 1, as after a sigmoid or softmax; methods read "
                "logits, so give the network without its last activation"
            )
        order = None
        if classes <= _MOST_CLASSES:
            matrices = [multiclass_confusion_matrix(each[1], each[0], classes) for each in (first, second)]
            order = permutation(*matrices)
        problem = self.judge(measured, recall, teacher.metadata, len(targets))
        if problem is None and order is None:
            if recall.may_be_chance:
                rank_zero_warn(
                    f"teacher {name} has accuracy {measured:.2%}, which guessing may reach on "
                    f"{count_of(len(targets), 'image')}; hold out more images for validation to be sure of it"
                )
            return
        problem = problem or f"has accuracy {measured:.2%}"
        if order is not None:
            groups = None if teacher.selection is None else teacher.selection.groups
            problem += f" and would have {order.accuracy:.2%} with {order.words(module.data.class_names, groups)}"
            short = classes <= _LONGEST_ORDER
            where = (
                f" as teacher.class_map '{json.dumps(order.class_map(groups))}'" if short else " in teacher.class_map"
            )
            remedy = f"are its classes in another order? if so, give it{where}"
        else:
            remedy = "check its weight file, normalisation and class order"
        sentence = f"teacher {name} {problem}; {remedy}"
        if stop:
            option = f"--model.teacher.{f'{number}.' if several else ''}gate warn"
            raise ACKDError(f"{sentence}, or set gate to warn in the teacher's settings ({option})")
        rank_zero_warn(sentence)

    @staticmethod
    def judge(measured: float, recall: MeanRecall, metadata: dict[str, str], seen: int) -> str | None:
        """Describe what is wrong with a teacher's accuracy; None when nothing is.

        Args:
            measured: Accuracy in [0, 1].
            recall: Mean recall of the classes.
            metadata: Metadata of the weight file.
            seen: Number of images. The fewer they are, the further the accuracy may be below the stated one.
        """
        if recall.value < recall.chance + 0.05 * (1.0 - recall.chance):
            mean = f" and a mean recall of the {recall.occurring} classes of {recall.value:.2%}"
            even = math.isclose(recall.value, measured, abs_tol=5e-4)
            return f"has accuracy {measured:.2%}{'' if even else mean}, near chance ({recall.chance:.2%})"
        stated = metadata.get("val_acc") or metadata.get("test_acc")
        tolerance = 0.05 + 3.0 * math.sqrt(0.25 / max(seen, 1))
        if stated and measured < float(stated) - tolerance:
            return f"has accuracy {measured:.2%}, far below the {float(stated):.2%} in its file"
        return None


class ClassOrder(NamedTuple):
    """Order of a teacher's classes that explains its accuracy.

    Attributes:
        places: Position among the teacher's logits for each class of the data.
        accuracy: Accuracy in [0, 1] with that order, on images that it was not found on.
    """

    places: tuple[int, ...]
    accuracy: float

    def class_map(self, groups: Sequence[Sequence[int]] | None) -> list[int | list[int]]:
        """Return the teacher's own class, or several, for each class of the data.

        Args:
            groups: Teacher's own classes of each logit; None where these are its logits.
        """
        if groups is None:
            return [*self.places]
        chosen = [groups[place] for place in self.places]
        return [group[0] if len(group) == 1 else [*group] for group in chosen]

    def words(self, names: Sequence[str] | None, groups: Sequence[Sequence[int]] | None = None) -> str:
        """Return up to three classes that change, in words.

        Args:
            names: Names of the data's classes; None when unknown.
            groups: Teacher's own classes of each logit, None where these are its logits.
        """
        moved = [number for number, place in enumerate(self.places) if place != number]
        own = [each if isinstance(each, list) else [each] for each in self.class_map(groups)]
        shown = [
            f"its class{'es' if len(own[number]) > 1 else ''} {' and '.join(map(str, own[number]))} as "
            f"{repr(names[number]) if names else number}"
            for number in moved[:3]
        ]
        return ", ".join(shown) + (", ..." if len(moved) > 3 else "")


def permutation(first: Tensor, second: Tensor) -> ClassOrder | None:
    """Find out whether a teacher is much better with its classes in another order.

    The best order on one half of the images is judged on the other, so that a teacher that guesses gains nothing.

    Args:
        first: Confusion matrix of one half, ``K x K``: targets in rows, predictions in columns.
        second: Confusion matrix of the other half.

    Returns:
        The order and its accuracy; None where it is the present one, or not clearly better.

    Examples:
        >>> shifted = torch.eye(3, dtype=torch.int64).roll(1, dims=1) * 20
        >>> permutation(shifted, shifted)
        ClassOrder(places=(1, 2, 0), accuracy=1.0)
    """
    from scipy.optimize import linear_sum_assignment  # slow to import; scipy comes with scikit-learn

    correct, present, count = 0.0, 0.0, float(first.sum() + second.sum())
    for known, tried in ((first, second), (second, first)):
        rows, columns = linear_sum_assignment(known.numpy(), maximize=True)
        correct += float(tried.numpy()[rows, columns].sum())
        present += float(tried.diagonal().sum())
    if count == 0 or correct - present < count * (0.05 + 3.0 * math.sqrt(0.25 / count)):
        return None
    _, columns = linear_sum_assignment((first + second).numpy(), maximize=True)
    return ClassOrder(tuple(map(int, columns)), correct / count)


class HealthMonitor(L.Callback):
    """Warn once if attention selects a single learner, and once if the learners' features stop varying over images.

    Args:
        least_entropy: Smallest entropy of the attention weights that is not reported, as a share of the largest
            possible one (the logarithm of the number of auxiliary learners).
        least_feature_std: Smallest standard deviation of the learners' features that is not reported, as a share of
            that of the first validation.
    """

    @checked
    def __init__(self, *, least_entropy: Fraction = 0.05, least_feature_std: Fraction = 0.35) -> None:
        self.least_entropy, self.least_feature_std = least_entropy, least_feature_std
        self.first_feature_std: float | None = None
        self.warned: set[str] = set()

    def _warn(self, key: str, sentence: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            rank_zero_warn(sentence)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare what this validation logged with the limits."""
        if trainer.sanity_checking or is_fast_dev_run(trainer):
            return
        module, values = cast("TrainingModule", pl_module), trainer.callback_metrics
        split, learners = "test" if module.looks_at_test() else "val", len(module.spec.branches)
        entropy = values.get(f"{split}/attention_entropy")
        feature_std = values.get(f"{split}/learners_feature_std")
        epoch = trainer.current_epoch + 1
        if entropy is not None and learners > 1 and float(entropy) < self.least_entropy * math.log(learners):
            self._warn(
                "attention",
                f"attention has collapsed onto one learner (entropy {float(entropy):.3f} of {math.log(learners):.3f} "
                f"nats in epoch {epoch}); lower attention_lr_scale, or set attention to off",
            )
        if feature_std is None:
            return
        if self.first_feature_std is None:
            self.first_feature_std = float(feature_std)
        elif float(feature_std) < self.least_feature_std * self.first_feature_std:
            self._warn(
                "feature_std",
                f"the learners' features vary little over images (standard deviation {float(feature_std):.3f} in epoch "
                f"{epoch}, {self.first_feature_std:.3f} at the start); lower the learning rate or the loss weights",
            )

    def state_dict(self) -> dict[str, object]:
        """Return what a resumed run needs in order not to warn twice."""
        return {"first_feature_std": self.first_feature_std, "warned": sorted(self.warned)}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore the result of `state_dict`."""
        first, warned = state_dict["first_feature_std"], state_dict["warned"]
        self.first_feature_std = first if isinstance(first, float) else None
        self.warned = {str(each) for each in warned} if isinstance(warned, list) else set()
