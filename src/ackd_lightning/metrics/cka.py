r"""Similarity of learners: linear CKA, disagreement, and the standard deviation of their features.

Kornblith et al.: Similarity of Neural Network Representations Revisited, 2019, Eq. 3 with a linear kernel:
\(\mathrm{CKA}(X, Y) = \|Y_c^T X_c\|_F^2 / (\|X_c^T X_c\|_F \|Y_c^T Y_c\|_F)\) with centred columns.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torchmetrics import Metric


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Compute the linear CKA of two sets of features of the same images.

    Args:
        first: Features of N images, ``N x D1``.
        second: Features of the same images, ``N x D2``.

    Returns:
        Scalar in [0, 1]; 1 for features equal up to rotation, scale and shift.
    """
    first, second = (each.double() - each.double().mean(dim=0) for each in (first, second))
    return cka_of_covariances(second.T @ first, first.T @ first, second.T @ second)


def cka_of_covariances(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Compute the linear CKA from the covariances of two sets of features, all three up to the same factor.

    Args:
        cross: Covariance of the two sets, ``D1 x D2`` or its transpose.
        first: Covariance of the first set, ``D1 x D1``.
        second: Covariance of the second set, ``D2 x D2``.

    Returns:
        Scalar in [0, 1]; 0 if a set does not vary.
    """
    cka: Tensor = cross.square().sum() / (first.norm() * second.norm()).clamp_min(1e-30)
    return cka


class LearnerStatistics(Metric):
    """Exact CKA, disagreement and feature std over a whole data set, from sums over batches and processes.

    Args:
        learners: Number M of learners, at least 1.
        dim: Width D of the learners' embeddings.
    """

    full_state_update = False
    total: Tensor
    sums: Tensor
    products: Tensor
    disagreements: Tensor

    def __init__(self, learners: int, dim: int) -> None:
        super().__init__()
        self.pairs = list(combinations(range(learners), 2))
        blocks = learners + len(self.pairs)
        self.learners = learners
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(learners, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(blocks, dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("disagreements", torch.zeros(max(len(self.pairs), 1), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, embeddings: list[Tensor], logits: list[Tensor]) -> None:
        """Add a batch.

        Args:
            embeddings: Embedding of each learner, M tensors ``B x D``.
            logits: Logits of each learner, M tensors ``B x K``.
        """
        features = [each.double() for each in embeddings]
        choices = [each.argmax(dim=1) for each in logits]
        self.total += features[0].shape[0]
        for number, each in enumerate(features):
            self.sums[number] += each.sum(dim=0)
            self.products[number] += each.T @ each
        for number, (i, j) in enumerate(self.pairs):
            self.products[self.learners + number] += features[i].T @ features[j]
            self.disagreements[number] += (choices[i] != choices[j]).sum()

    def compute(self) -> dict[str, Tensor]:
        """Average over learners, or over pairs of learners.

        Returns:
            ``feature_std``, the standard deviation of an embedding's entries over the images, averaged over entries
            and learners; for two learners or more also ``cka`` and ``disagreement``, the fraction of images for which
            the predicted classes of a pair differ.
        """
        mean = self.sums / self.total

        def centred(block: int, i: int, j: int) -> Tensor:
            return self.products[block] / self.total - torch.outer(mean[i], mean[j])

        own = [centred(number, number, number) for number in range(self.learners)]
        variances = torch.stack([each.diagonal().clamp_min(0.0) for each in own])
        result = {"feature_std": variances.sqrt().mean().float()}
        if self.pairs:
            values = [
                cka_of_covariances(centred(self.learners + number, i, j), own[i], own[j])
                for number, (i, j) in enumerate(self.pairs)
            ]
            result["cka"] = torch.stack(values).mean().float()
            result["disagreement"] = (self.disagreements.mean() / self.total).float()
        return result
