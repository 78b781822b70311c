r"""SRRL. Yang, Martinez, Bulat, Tzimiropoulos: KD via Softmax Regression Representation Learning, ICLR 2021.

A regressor r (1x1 convolution, BatchNorm, ReLU) maps the student's last feature map to the teacher's D channels. With
the embeddings \(z^t\) of the teacher and \(z^s = \mathrm{GAP}(r(F^s))\), and the teacher's classifier (W, b), which is
frozen:

* feature matching, \(L_{features} = \mathrm{mean}\,(z^s - z^t)^2\) over images and dimensions
* softmax regression, \(L_{logits} = \mathrm{mean}\,(W z^s + b - (W z^t + b))^2\) over images and classes

\(L = w_{ce}\,\mathrm{CE} + w_{features} L_{features} + w_{logits} L_{logits}\), where the cross-entropy reads the
student's own classifier, which is kept. Equations, regressor and the weights 1 are those of the authors' code for
ImageNet, which has one weight for both distances. The regressor cannot reach negative values of an embedding, which
teachers without a ReLU before the pooling have (ViTs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import FitInfo, Method, Networks, embedding_of, features_of
from ackd_lightning.methods.pairing import regressor
from ackd_lightning.models.features import pooled, require_embedding, require_stages
from ackd_lightning.models.heads import shared_classifier
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative


class SRRL(Method):
    """Cross-entropy plus an embedding that is the teacher's, and on which the teacher's classifier predicts the same.

    Args:
        weight_ce: Weight of the cross-entropy.
        weight_features: Weight of the distance of embeddings.
        weight_logits: Weight of the distance of the logits of the teacher's classifier.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> SRRL(weight_features=0.0).loss_weights
        {'ce': 1.0, 'features': 0.0, 'logits': 1.0}
    """

    labels = "mixed"
    replicated_buffers = ("weight", "bias")
    weight: Tensor  # K x D
    bias: Tensor  # K

    def __init__(
        self, *, weight_ce: NonNegative = 1.0, weight_features: NonNegative = 1.0, weight_logits: NonNegative = 1.0
    ) -> None:
        super().__init__()
        self.loss_weights = {"ce": weight_ce, "features": weight_features, "logits": weight_logits}
        self.regressor: nn.Module = nn.Identity()
        for name in self.replicated_buffers:
            self.register_buffer(name, torch.zeros(0), persistent=False)
        self.given: FrozenTeacher | None
        self.keep_outside("given", None)

    def build(self, networks: Networks) -> None:
        """Create the regressor, and make room for the teacher's classifier.

        Args:
            networks: Shapes of student and teacher, and the teacher's structure.

        Raises:
            ACKDError: If the student's stages are unknown, or the teacher's classifier is not a linear layer with a
                bias.
        """
        ours = require_stages(networks.student, "the student", "method SRRL")
        dimensions = require_embedding(networks.teacher, "the teacher", "method SRRL")
        self.regressor = regressor(ours[-1][0], dimensions)
        for network in networks.teacher_networks:
            layer = shared_classifier(network, "SRRL", fixed=True)
            self.weight = torch.zeros(layer.out_features, layer.in_features)
            self.bias = torch.zeros(layer.out_features)

    @torch.no_grad()
    def begin_fit(self, fit: FitInfo) -> None:
        """Copy the teacher's classifier.

        Args:
            fit: Information about the fit, of which the teacher is read.
        """
        for teacher in fit.teachers:
            self.keep_outside("given", teacher)
            layer = shared_classifier(teacher.network, "SRRL", fixed=True)
            for name in self.replicated_buffers:
                setattr(self, name, getattr(layer, name).detach().float().clone().to(self.weight.device))

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``features`` and ``logits``; arguments as in the base class.

        Raises:
            ACKDError: If ``begin_fit`` was not called with the teacher.
        """
        assert teacher is not None
        if self.given is None:
            raise ACKDError(
                "method SRRL has no classifier of its teacher yet; call begin_fit with the teacher before the first "
                "step"
            )
        ours = pooled(self.regressor(features_of(student)[-1])).float()
        with torch.autocast(ours.device.type, enabled=False):
            logits = F.linear(ours, self.weight.float(), self.bias.float())
        if self.given.gives_probabilities:
            logits = F.log_softmax(logits, dim=1)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "features": F.mse_loss(ours, embedding_of(teacher).detach().float()),
            "logits": F.mse_loss(self.given.select(logits), teacher.logits.detach().float()),
        }
