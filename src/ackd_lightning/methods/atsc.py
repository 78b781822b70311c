r"""ATSC. Jang, Kim, Lim, Lee: Adaptive Teaching with Shared Classifier for Knowledge Distillation, 2024.

The student imitates the teacher's last feature map through a projector P and predicts with the teacher's own
classifier. The pretrained teacher is trained as well, and an anchor keeps it near its first weights (arXiv:2406.08528).
With K teachers, each with a projector and a classifier of its own:

* \(L_{features} = \frac{1}{K} \sum_k \mathrm{mean}\,(P_k(F^s) - F^{t_k})^2\), gradients reach both sides
* \(L_{anchor} = \frac{1}{K} \sum_k \sum_W \|\theta_0^{t_k} - \theta^{t_k}\|^2\), a sum over all entries
* \(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{kd}\,\frac{1}{K} \sum_k \tau^2 \mathrm{KL}(p^{t_k} \| p^s)
  + w_{features} L_{features} + w_{anchor} L_{anchor}\), where \(z^s\) is the student's own classifier's
* prediction, also of the network that is kept: \(\frac{1}{K} \sum_k W^{t_k}\,\mathrm{GAP}(P_k(F^s)) + b^{t_k}\)

The teachers' classifiers learn in a step of their own, from \(\frac{1}{K} \sum_k \mathrm{CE}(z^{t_k}, y)\). With a
fixed teacher in evaluation mode this is SimKD (Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation
with the Reused Teacher Classifier, CVPR 2022).

The abstract states no more than the first two sentences. The equations for one teacher are those of the authors' code;
several teachers are our reading. Differences from that code:

* The classifier's step comes before the student's step of a batch, not after it, which only shifts the sequence.
* The bias of the classifier is only in the optimizer of its own step; the code has it in both and decays it twice.
* The shared classifier after the projector is evaluated and kept; the code evaluates the student's own classifier,
  which is not trained, and keeps neither the projector nor the trained classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kl_divergence
from ackd_lightning.methods.atsc_networks import (
    anchor_distance,
    feature_distance,
    trainable_copy,
)
from ackd_lightning.methods.base import FitInfo, Method, Networks, embedding_of, features_of
from ackd_lightning.models.features import last_map, last_shape, require_stages
from ackd_lightning.models.heads import SharedClassifiers, after_last_map, shared_classifier
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.teacher_base import Teacher
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive, PositiveInt


class ATSC(Method):
    """One or several teachers that adapt to the student and share their classifiers with it.

    The adapting teachers are copies and part of the method: the student's optimizer trains them, and checkpoints
    contain them. The given teachers are not changed.

    Args:
        weight_ce: Weight of the cross-entropy of the student's own classifier, which is not kept; 0 in the code.
        weight_kd: Weight of the distillation from the teachers' logits into that classifier; 0 in the code. Gradients
            also reach the teachers.
        temperature: Temperature tau of that distillation.
        weight_features: Weight of the distance between projected and teacher's features; 1 in the code.
        weight_anchor: Weight w of the anchor; 1 for CIFAR-100 and 10 for ImageNet in the code. SGD is stable while the
            learning rate times 2 w is below 2 (1 + momentum).
        classifier_update: Part of the teachers' classifiers that their own step trains: the ``bias`` (the code), the
            whole ``layer`` (whose weight then has no anchor), or ``none``.
        classifier_lr: Learning rate of that step (SGD, momentum 0.9), decayed together with the student's; 0.05 in the
            code, as that of the student.
        classifier_weight_decay: Weight decay of that step; in the code that of the student, 5e-4 for CIFAR-100 and 1e-4
            for ImageNet.
        anchor_scope: Anchored parameters: ``all``; ``weights`` of two or more dimensions, including the classifier's
            (the code); or ``weights_no_classifier`` (which the names in the code suggest). The default differs from the
            code on purpose: without an anchor on BatchNorm's scales the features of both sides collapsed in all of
            our measurements (docs/results.md). Parameters of the classifiers' own step have no anchor. A part of the
            classifier with neither anchor nor step is not trained.
        teacher_bn: Mode of BatchNorm in the adapting teachers: statistics of the batch (``train``, the code), or fixed
            running statistics (``eval``).
        adapt_teacher: Whether the teachers are trained. If not, they stay in evaluation mode, and the arguments about
            adapting have no effect: SimKD.
        factor: Ratio of the teacher's channels to those of the projectors' inner maps; 2 in the code.
        average: Mean over several teachers that is the prediction: of ``logits`` or ``probabilities``.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> ATSC(weight_anchor=10.0).loss_weights
        {'ce': 0.0, 'kd': 0.0, 'features': 1.0, 'anchor': 10.0}
    """

    teacher = "own"
    labels = "mixed"
    raw_classes = True

    def __init__(
        self,
        *,
        weight_ce: NonNegative = 0.0,
        weight_kd: NonNegative = 0.0,
        temperature: Positive = 4.0,
        weight_features: NonNegative = 1.0,
        weight_anchor: NonNegative = 1.0,
        classifier_update: Literal["bias", "layer", "none"] = "bias",
        classifier_lr: Positive = 0.05,
        classifier_weight_decay: NonNegative = 5e-4,
        anchor_scope: Literal["weights", "weights_no_classifier", "all"] = "all",
        teacher_bn: Literal["train", "eval"] = "train",
        adapt_teacher: bool = True,
        factor: PositiveInt = 2,
        average: Literal["logits", "probabilities"] = "logits",
    ) -> None:
        super().__init__()
        self.adapts = adapt_teacher
        self.temperature = temperature
        self.classifier_lr, self.classifier_weight_decay = classifier_lr, classifier_weight_decay
        self.weight_ce, self.weight_kd = weight_ce, weight_kd
        self.weight_anchor = weight_anchor if self.adapts else 0.0
        self.loss_weights = {
            "ce": weight_ce,
            "kd": weight_kd,
            "features": weight_features,
            "anchor": self.weight_anchor,
        }
        self.classifier_update, self.anchor_scope, self.teacher_bn = classifier_update, anchor_scope, teacher_bn
        self.factor, self.average = factor, average
        self.teachers = nn.ModuleList()  # those that adapt
        self.fixed: tuple[FrozenTeacher, ...]
        self.keep_outside("fixed", ())
        self.adopted = False
        self.has_weights = False  # a second fit, or one after a restored checkpoint, keeps the teachers

    # ---------------------------------------------------------------- networks

    def build(self, networks: Networks) -> None:
        """Copy the teachers when they adapt, and create a projector for each in front of its classifier.

        The student's own classifier and layers between it and the last map, which are not kept, are frozen when no
        term trains them.

        Args:
            networks: The student's last stage is projected; the teachers' classifiers are shared.

        Raises:
            ACKDError: If the stages of a network are unknown, or a teacher's classifier is not a linear layer with a
                bias.
        """
        student, specs = networks.student, networks.teachers
        ours = require_stages(student, "the student", "method ATSC")
        theirs = [require_stages(spec, "the teacher", "method ATSC") for spec in specs]
        self._copy_teachers(networks.student_network, networks.teacher_networks)
        self.head = SharedClassifiers(
            ours[-1][0],
            [last_shape(spec) for spec in specs],
            student.num_classes,
            factor=self.factor,
            average=self.average,
        )
        if self.adapts:
            self.head.classifiers = nn.ModuleList(shared_classifier(each.network, "ATSC") for each in self._adapting())
        else:
            self.head.classifiers.requires_grad_(False)
        if len(specs) == 1:
            self.layers = ((len(ours) - 1, len(theirs[0]) - 1),)

    def _copy_teachers(self, student: nn.Module | None, teachers: Sequence[nn.Module]) -> None:
        for network in teachers:
            shared_classifier(network, "ATSC", fixed=not self.adapts)
        if isinstance(student, BranchyStudent) and student.plan and not (self.weight_ce or self.weight_kd):
            for name in after_last_map(student.plain(), student.plan):
                student.plain().get_submodule(name).requires_grad_(False)
        if not self.adapts:
            return
        self.teachers.extend(Teacher(trainable_copy(network)) for network in teachers)
        for number, teacher in enumerate(self._adapting()):
            anchored = self._anchored(teacher)
            held = {id(parameter) for parameter in (*anchored.values(), *self._updated(teacher))}
            for parameter in shared_classifier(teacher.network, "ATSC").parameters():
                parameter.requires_grad_(id(parameter) in held)
            size = sum(parameter.numel() for parameter in anchored.values())
            self.register_buffer(f"start_{number}", torch.zeros(size), persistent=False)
        self.replicated_buffers = tuple(f"start_{number}" for number in range(len(teachers)))
        self.train(self.training)

    def begin_fit(self, fit: FitInfo) -> None:
        """Take the teachers' normalisation and anchor, and their weights unless a training has changed them.

        Args:
            fit: Information about the fit, of which the teachers are read.
        """
        teachers = fit.teachers
        if self.adapts:
            for number, (own, given) in enumerate(zip(self._adapting(), teachers, strict=True)):
                learnt = copy.deepcopy(own.network.state_dict())
                own.take(given)
                anchored = [given.network.get_parameter(name).detach() for name in self._anchored(own)]
                start = self.get_buffer(f"start_{number}")
                start.copy_(torch.cat([parameter.flatten() for parameter in anchored]))
                if self.has_weights:
                    own.network.load_state_dict(learnt)
        else:
            self.keep_outside("fixed", tuple(teachers))
            for classifier, given in zip(self._head().classifiers, teachers, strict=True):
                classifier.load_state_dict(shared_classifier(given.network, "ATSC", fixed=True).state_dict())
        self.adopted = self.has_weights = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.has_weights = True

    def train(self, mode: bool = True) -> ATSC:
        """Switch the mode of everything but the teachers' BatchNorm with ``teacher_bn="eval"``."""
        super().train(mode)
        if self.teacher_bn == "eval":
            for layer in self.teachers.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        return self

    def _adapting(self) -> list[Teacher]:
        return [each for each in self.teachers if isinstance(each, Teacher)]

    def _head(self) -> SharedClassifiers:
        assert self.head is not None
        return self.head

    def _updated(self, teacher: Teacher) -> list[nn.Parameter]:
        """Return the parameters of a teacher's classifier that its own step trains."""
        if self.classifier_update == "none":
            return []
        classifier = shared_classifier(teacher.network, "ATSC")
        return [
            each for name, each in classifier.named_parameters() if self.classifier_update == "layer" or name == "bias"
        ]

    def _anchored(self, teacher: Teacher) -> dict[str, nn.Parameter]:
        """Return the anchored parameters of a teacher by name."""
        if not self.weight_anchor:
            left_out = shared_classifier(teacher.network, "ATSC").parameters()  # only weight decay would change it
        elif self.anchor_scope == "weights_no_classifier":
            left_out = shared_classifier(teacher.network, "ATSC").parameters()
        else:
            left_out = iter(self._updated(teacher))
        skipped = {id(parameter) for parameter in left_out}
        return {
            name: parameter
            for name, parameter in teacher.network.named_parameters()
            if id(parameter) not in skipped and (parameter.ndim > 1 or self.anchor_scope == "all")
        }

    # ---------------------------------------------------------------- the student's step

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Run the teachers and return the terms ``ce``, ``kd``, ``features`` and ``anchor``, means over the teachers.

        ``ce`` and ``kd`` are 0 and not computed when their weight is 0.

        Gradients of ``features`` reach student, projectors and adapting teachers, those of ``anchor`` these teachers,
        those of ``ce`` and ``kd`` the student with its own classifier, and those of ``kd`` also the adapting teachers.

        Args:
            student: Output of the student.
            teacher: Unused.
            batch: Images and targets.
        """
        self._check_adopted()
        running: Sequence[nn.Module] = self._adapting() if self.adapts else self.fixed
        outputs: list[NetOutput] = [each(batch.image) for each in running]
        projected = self._head().project(features_of(student)[-1])
        distances = [
            feature_distance(ours, last_map(out, cast(Teacher, each).plan))
            for ours, out, each in zip(projected, outputs, running, strict=True)
        ]
        divergences = [
            kl_divergence(student.logits, out.logits, temperature=self.temperature)
            for out in (outputs if self.weight_kd else ())
        ]
        nothing = torch.zeros((), device=student.logits.device)
        anchors = [
            anchor_distance(list(self._anchored(own).values()), self.get_buffer(f"start_{number}"))
            for number, own in enumerate(self._adapting())
        ]
        return {
            "ce": cross_entropy(student.logits, batch.labels) if self.weight_ce else nothing,
            "kd": torch.stack(divergences).mean() if self.weight_kd else nothing,
            "features": torch.stack(distances).mean(),
            "anchor": torch.stack(anchors).mean() if anchors else nothing,
        }

    # ---------------------------------------------------------------- classifiers

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        """Return SGD with momentum 0.9 for the classifiers, as in the authors' code.

        With fixed teachers there is no optimizer.
        """
        parameters = [parameter for teacher in self._adapting() for parameter in self._updated(teacher)]
        if not parameters:
            return {}
        decay = self.classifier_weight_decay
        return {"classifier": torch.optim.SGD(parameters, self.classifier_lr, momentum=0.9, weight_decay=decay)}

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of the teachers, whose gradients reach their classifiers only.

        The teachers run once more for it, as in the authors' code: with ``teacher_bn="train"`` the running statistics
        of their BatchNorm change twice in every step.

        Args:
            name: Name of the optimizer, ``classifier``.
            student: Unused.
            teacher: Unused.
            batch: Images and targets.

        Returns:
            Mean over the teachers, float32, and the values ``teacher_loss``, ``teacher_acc`` and
            ``teacher_feature_std``, the standard deviation of the pooled features over the images of this batch, which
            is near 0 after a collapse.
        """
        self._check_adopted()
        losses, shares, deviations = [], [], []
        for own in self._adapting():
            with torch.no_grad():
                embedding = embedding_of(own(batch.image))
            classifier = shared_classifier(own.network, "ATSC")
            weight = classifier.weight if self.classifier_update == "layer" else classifier.weight.detach()
            logits = F.linear(embedding, weight, classifier.bias)
            losses.append(cross_entropy(logits, batch.labels))
            shares.append((logits.detach().argmax(dim=1) == batch.target).float().mean())
            deviations.append(embedding.float().std(dim=0, correction=0).mean())
        torch.clear_autocast_cache()  # holds weights that were cast without gradient, which older torch would use again
        loss = torch.stack(losses).mean()
        return loss, {
            "teacher_loss": loss.detach(),
            "teacher_acc": torch.stack(shares).mean(),
            "teacher_feature_std": torch.stack(deviations).mean(),
        }

    def _check_adopted(self) -> None:
        if not self.adopted:
            raise ACKDError(
                "method ATSC has no weights of its teachers yet; call begin_fit with the teachers before the first step"
            )
