r"""Measurements of a proxy teacher between a teacher and its student: Table 1 of the ACKD paper.

A proxy P stands between a teacher T and a student S: the early-stopped teacher of ESKD or the assistant of TAKD.
Computed over a set of images, for the pairs (T, P), (P, S) and (T, S):

* \(\mathrm{AccGap}(T, P) = \mathrm{Acc}(T) - \mathrm{Acc}(P)\)
* CKA, the similarity of representations (Kornblith et al. 2019)
* \(\mathrm{KL}(X \| Y) = \mathrm{E}_x \sum_k p^X_k \log (p^X_k / p^Y_k)\), the difference of class distributions

The paper leaves open which layer CKA reads and with which kernel, the direction of the divergence, its temperature, and
the images. Here it is linear CKA of the pooled embeddings (the input of the classifier) and KL(first || second) in nats
at temperature 1. The caller chooses the images; `ackd reproduce` uses the test set.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.metrics.cka import cka_of_covariances
from ackd_lightning.models.features import require_embedding
from ackd_lightning.types import Batch, NetOutput

ROLES = ("teacher", "proxy", "student")
PAIRS = (("teacher", "proxy"), ("proxy", "student"), ("teacher", "student"))


class _Sums:
    """Sums over batches in float64, from which the measurements are computed; their size is that of one image.

    Embeddings are taken relative to their mean in the first batch, so that a large common offset costs no precision.
    """

    def __init__(self) -> None:
        self.images = 0
        self.widths: list[int] = []
        self.correct = dict.fromkeys(ROLES, 0)
        self.divergence = dict.fromkeys(PAIRS, 0.0)
        self.origin = self.total = self.products = torch.zeros(())

    def add(self, outputs: dict[str, NetOutput], target: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: Output of each role, with logits ``B x K`` and an embedding ``B x D`` whose width D may differ.
            target: Class indices, ``B`` int64.
        """
        embeddings = [require_embedding(outputs[role], f"the {role}", "CKA").double() for role in ROLES]
        features = torch.cat(embeddings, dim=1)
        if not self.images:
            self.widths = [each.shape[1] for each in embeddings]
            self.origin = features.mean(dim=0)
            self.total = torch.zeros_like(self.origin)
            self.products = features.new_zeros(features.shape[1], features.shape[1])
        self.images += len(target)
        features = features - self.origin
        self.total += features.sum(dim=0)
        self.products += features.T @ features
        logs = {role: F.log_softmax(outputs[role].logits.double(), dim=1) for role in ROLES}
        for role in ROLES:
            self.correct[role] += int((outputs[role].logits.argmax(dim=1) == target).sum())
        for first, second in PAIRS:
            each = F.kl_div(logs[second], logs[first], reduction="sum", log_target=True)
            self.divergence[first, second] += each.item()

    def measurements(self) -> dict[str, float]:
        """Average over all images."""
        share = {role: 100 * self.correct[role] / self.images for role in ROLES}
        result = {f"acc_{role}": share[role] for role in ROLES}
        result["acc_gap"] = share["teacher"] - share["proxy"]
        mean = self.total / self.images
        covariance = self.products / self.images - torch.outer(mean, mean)
        rows = [torch.split(block, self.widths, dim=1) for block in torch.split(covariance, self.widths)]
        for first, second in PAIRS:
            i, j = ROLES.index(first), ROLES.index(second)
            result[f"cka_{first}_{second}"] = cka_of_covariances(rows[i][j], rows[i][i], rows[j][j]).item()
        for first, second in PAIRS:
            result[f"kl_{first}_{second}"] = self.divergence[first, second] / self.images
        return result


@torch.no_grad()
def proxy_measurements(
    teacher: nn.Module, proxy: nn.Module, student: nn.Module, batches: Iterable[Batch]
) -> dict[str, float]:
    """Compute accuracies, accuracy gap, linear CKA and KL divergence between teacher, proxy and student (Table 1).

    Each network may have its own normalisation, image size and width of embedding: a
    [`FrozenTeacher`][ackd_lightning.models.teacher.FrozenTeacher] converts the images to its own. Memory does not grow
    with the number of images. No gradient is computed.

    Args:
        teacher: Network in evaluation mode that maps ``B x C x H x W`` to a
            [`NetOutput`][ackd_lightning.types.NetOutput].
        proxy: Proxy of the teacher, as ``teacher``.
        student: Student, as ``teacher``.
        batches: Normalised images to measure on, on the networks' device.

    Returns:
        ``acc_teacher``, ``acc_proxy`` and ``acc_student`` in percent, ``acc_gap`` = teacher - proxy in points;
        ``cka_X_Y`` in [0, 1] and ``kl_X_Y`` = KL(X || Y) in nats for ``X_Y`` of ``teacher_proxy``, ``proxy_student``
        and ``teacher_student``.

    Raises:
        ACKDError: If there are no images, a network is in training mode, its stages are not known, or the numbers of
            classes differ.
    """
    networks = dict(zip(ROLES, (teacher, proxy, student), strict=True))
    for role, network in networks.items():
        if network.training:
            raise ACKDError(f"the {role} is in training mode, which changes its outputs; call its eval() first")
    sums = _Sums()
    for batch in batches:
        outputs: dict[str, NetOutput] = {role: network(batch.image) for role, network in networks.items()}
        classes = {role: output.logits.shape[1] for role, output in outputs.items()}
        if len(set(classes.values())) > 1:
            found = ", ".join(f"the {role} has {count}" for role, count in classes.items())
            raise ACKDError(f"{found} classes; choose networks for the same classes")
        sums.add(outputs, batch.target)
    if not sums.images:
        raise ACKDError("batches is empty, so the proxy cannot be measured; pass the batches of a test set")
    return sums.measurements()
