r"""PASM. Liu, Lin, Meng, Lu, Deng, Zhou, Yang: Point Adversarial Self Mining, IEEE Transactions on Cybernetics 2022.

The paper recognises facial expressions; here it is carried over to images of any classes (arXiv:2008.11401). While the
student learns, the teacher makes harder images for it: a point adversarial attack finds the position that matters most
to the teacher's decision, and the region around it is taken away.

\(h^*, w^* = \arg\max_{h,w} \sum_c |\partial m(x) / \partial x_{chw}|,\quad m(x) = z^t_{(1)} - z^t_{(2)}\)

\(L = w_{ce}\,\mathrm{CE}(z^s(x), y) + w_{kd} \mathrm{KL}_\tau(p^t(x) \| p^s(x))
+ w_{ce}' \mathrm{CE}(z^s(\tilde x), y) + w_{kd}' \mathrm{KL}_\tau(p^t(x) \| p^s(\tilde x))\)

with the margin m between the teacher's two largest logits and \(\tilde x\), the image without a square around
\((h^*, w^*)\). Its pixels are 0, the mean colour of normalised images.

The full text was not available to us. The abstract says this much: a point attack on a trained teacher, one informative
position that is adapted to image and teacher, harder images, guidance by the teacher. Ours: the gradient of the margin
as the attack, which does not vanish where the teacher is sure and needs no label; the square and its size; the
prediction for the whole image as guidance for the harder one; KL with \(\tau = 4\); all weights. In the paper the
student then becomes the teacher of the next student; here that is another run with the exported student as teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.methods.running import only_teacher, require_logits
from ackd_lightning.models.freezing import statistics_kept
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import Fraction, NonNegative, Positive


def informative_point(teacher: FrozenTeacher, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's logits and the position to which its decision is most sensitive.

    Both are computed in float32, also under autocast, unless the teacher itself has another type.

    Args:
        teacher: Teacher whose margin between the two largest logits is attacked.
        image: Images ``B x C x H x W``.

    Returns:
        Logits ``B x K`` without gradient, and row and column in pixels, ``B x 2`` int64.
    """
    with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        attacked = image.detach().float().requires_grad_()
        logits = teacher.with_gradient(attacked).logits
        best = logits.float().topk(2, dim=1).values
        (gradient,) = torch.autograd.grad((best[:, 0] - best[:, 1]).sum(), attacked)
    place = gradient.abs().sum(dim=1).flatten(1).argmax(dim=1)
    width = image.shape[3]
    return logits.detach(), torch.stack([place // width, place % width], dim=1)


def without_region(image: Tensor, point: Tensor, share: float) -> Tensor:
    """Return images in which a rectangle around a point is 0.

    Args:
        image: Images ``B x C x H x W``.
        point: Row and column of the middle, ``B x 2`` int64; what lies outside the image is cut off.
        share: Height and width of the rectangle as a share of the image's, from 0 to 1; at least one pixel.

    Returns:
        Images ``B x C x H x W``.

    Examples:
        >>> without_region(torch.ones(1, 1, 3, 4), torch.tensor([[0, 1]]), 0.67)[0, 0]
        tensor([[0., 0., 0., 1.],
                [1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    inside = []
    for middle, size in zip(point.T, image.shape[2:], strict=True):
        extent = max(1, round(share * size))
        first = middle[:, None] - extent // 2
        place = torch.arange(size, device=image.device)
        inside.append((place >= first) & (place < first + extent))
    rows, columns = inside
    return image.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


class PASM(Method):
    """Cross-entropy and KD, also on images without the region that matters most to the teacher.

    Args:
        region: Side of the region that is taken away, as a share of the image's side.
        temperature: Temperature tau of the distillation.
        weight_ce: Weight of the cross-entropy.
        weight_kd: Weight of the distillation.
        weight_ce_mined: Weight of the cross-entropy on the harder images.
        weight_kd_mined: Weight of the distillation on the harder images.

    Raises:
        ACKDError: If a value is not allowed.
    """

    teacher = "own"
    labels = "mixed"

    def __init__(
        self,
        *,
        region: Fraction = 0.25,
        temperature: Positive = 4.0,
        weight_ce: NonNegative = 1.0,
        weight_kd: NonNegative = 1.0,
        weight_ce_mined: NonNegative = 1.0,
        weight_kd_mined: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.region, self.temperature = region, temperature
        self.loss_weights = {
            "ce": weight_ce,
            "kd": weight_kd,
            "ce_mined": weight_ce_mined,
            "kd_mined": weight_kd_mined,
        }
        self.attacked: FrozenTeacher | None
        self.learner: nn.Module | None
        self.keep_outside("attacked", None)
        self.keep_outside("learner", None)

    def build(self, networks: Networks) -> None:
        """Keep the student, which is run on the harder images.

        Args:
            networks: Networks of the training.

        Raises:
            ACKDError: If there are several teachers.
        """
        only_teacher(networks.teachers, "PASM")
        self.keep_outside("learner", networks.student_network)

    def begin_fit(self, fit: FitInfo) -> None:
        """Keep the teacher, which is attacked.

        Args:
            fit: Information about the fit, of which the teacher is read.

        Raises:
            ACKDError: If the features of the teacher alone are used.
        """
        self.keep_outside("attacked", require_logits(only_teacher(fit.teachers, "PASM"), "PASM"))

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Run the teacher, attack it, run the student on the harder images and return the four terms.

        The student's running statistics, which evaluation and export use, remain those of the whole images.

        Args:
            student: Output of the student.
            teacher: Unused.
            batch: Images and targets.
        """
        if self.attacked is None or self.learner is None:
            raise ACKDError("method PASM has no teacher yet; call build and begin_fit before the first step")
        logits, point = informative_point(self.attacked, batch.image)
        with statistics_kept(self.learner):
            mined = self.learner(without_region(batch.image, point, self.region)).logits
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "kd": kd_loss(student.logits, logits, temperature=self.temperature),
            "ce_mined": cross_entropy(mined, batch.labels),
            "kd_mined": kd_loss(mined, logits, temperature=self.temperature),
        }
