r"""Similarity of learners: linear CKA, disagreement, and the standard deviation of their features.

Kornblith et al.: Similarity of Neural Network Representations Revisited, 2019, Eq. 3 with a linear kernel:
\(\mathrm{CKA}(X, Y) = \|Y_c^T X_c\|_F^2 / (\|X_c^T X_c\|_F \|Y_c^T Y_c\|_F)\) with centred columns.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, cast

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


WIDEST = 3072
"""Largest width D of embeddings whose CKA is measured: it needs matrices of D x D for each learner and each pair."""


class LearnerStatistics(Metric):
    """Exact CKA, disagreement and feature std over a whole data set, from sums over batches and processes.

    Args:
        learners: Number M of learners, at least 1.
        dim: Width D of the learners' embeddings; CKA is left out above `WIDEST`.

    Attributes:
        names: Names of what `compute` returns.
    """

    full_state_update = False
    total: Tensor
    sums: Tensor
    squares: Tensor
    products: Tensor
    disagreements: Tensor

    def __init__(self, learners: int, dim: int) -> None:
        super().__init__()
        self.pairs = list(combinations(range(learners), 2))
        self.learners, self._has_cka = learners, bool(self.pairs) and dim <= WIDEST
        self.names = ("feature_std", *(["disagreement"] if self.pairs else []), *(["cka"] if self._has_cka else []))
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(learners, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(learners, dim, dtype=torch.float64), dist_reduce_fx="sum")
        if self._has_cka:
            blocks = torch.zeros(learners + len(self.pairs), dim, dim, dtype=torch.float64)
            self.add_state("products", blocks, dist_reduce_fx="sum")
        self.add_state("disagreements", torch.zeros(max(len(self.pairs), 1), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Sum in float32 on a device that has no float64, such as the GPU of a Mac."""
        try:
            fn(torch.zeros((), dtype=self.total.dtype, device=self.total.device))
        except TypeError:
            for name, default in self._defaults.items():
                self._defaults[name] = cast(Tensor, default).float()
                setattr(self, name, getattr(self, name).float())
        return super()._apply(fn, *args, **kwargs)

    def update(self, embeddings: list[Tensor], logits: list[Tensor]) -> None:
        """Add a batch.

        Args:
            embeddings: Embedding of each learner, M tensors ``B x D``.
            logits: Logits of each learner, M tensors ``B x K``.
        """
        features = [each.to(self.total.dtype) for each in embeddings]
        choices = [each.argmax(dim=1) for each in logits]
        # never in place: states that were reset in inference mode allow no change outside it
        self.total = self.total + features[0].shape[0]
        self.sums = self.sums + torch.stack([each.sum(dim=0) for each in features])
        self.squares = self.squares + torch.stack([each.square().sum(dim=0) for each in features])
        if self._has_cka:
            products = [each.T @ each for each in features] + [features[i].T @ features[j] for i, j in self.pairs]
            self.products = self.products + torch.stack(products)
        if self.pairs:
            self.disagreements = self.disagreements + torch.stack(
                [(choices[i] != choices[j]).sum() for i, j in self.pairs]
            )

    def compute(self) -> dict[str, Tensor]:
        """Average over learners, or over pairs of learners.

        Returns:
            ``feature_std``, the standard deviation of an embedding's entries over the images, averaged over entries
            and learners; for two learners or more also ``cka``, unless they are too wide, and ``disagreement``, the
            fraction of images for which the predicted classes of a pair differ.
        """
        mean = self.sums / self.total

        def centred(block: int, i: int, j: int) -> Tensor:
            return self.products[block] / self.total - torch.outer(mean[i], mean[j])

        variances = (self.squares / self.total - mean.square()).clamp_min(0.0)
        result = {"feature_std": variances.sqrt().mean().float()}
        if self._has_cka:
            own = [centred(number, number, number) for number in range(self.learners)]
            values = [
                cka_of_covariances(centred(self.learners + number, i, j), own[i], own[j])
                for number, (i, j) in enumerate(self.pairs)
            ]
            result["cka"] = torch.stack(values).mean().float()
        if self.pairs:
            result["disagreement"] = (self.disagreements.mean() / self.total).float()
        return result
