from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACKD, AT, CE, KD
from training.helpers import Blobs, TinyNet, build, teaching, trainer


class Returns(TinyNet):
    """A network that returns its logits in a form of its own."""

    def __init__(self, form) -> None:
        super().__init__()
        self.form = form

    def forward(self, image: Tensor):
        return self.form(super().forward(image))


class Looks(TinyNet):
    """Forward looks at values, and reads a tensor that the constructor made."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.tensor([0.1, 0.0, -0.1]).view(3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        assert torch.isfinite(image).all()
        logits = super().forward(image + self.shift.to(image))
        return logits.clamp(-10, 10) if logits.detach().abs().max() > 1e4 else logits


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = TinyNet()
        network.two[0] = nn.utils.weight_norm(network.two[0])
    network(torch.zeros(2, 3, 8, 8))
    return network


OWN = {
    "tuple": lambda: Returns(lambda logits: (logits, logits)),
    "list with a map": lambda: Returns(lambda logits: [logits, logits[:, :, None, None]]),
    "dict": lambda: Returns(lambda logits: {"logits": logits, "extra": None}),
    "object": lambda: Returns(lambda logits: SimpleNamespace(logits=logits)),
    "B x K x 1 x 1": lambda: Returns(lambda logits: logits[..., None, None]),
    "values": Looks,
    "old weight_norm": weight_normed,
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("method", [AT, ACKD])
def test_networks_as_people_write_them_teach_and_learn(make, role, method):
    torch.manual_seed(0)
    given = {"student": make()} if role == "student" else {"teacher": teaching(make())}
    module = build(method(), lr=1e-4, **given)
    run = trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=1)
    run.fit(module, datamodule=Blobs())
    assert math.isfinite(run.callback_metrics["train/loss"])
    assert 0 <= run.callback_metrics["val/acc"] <= 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_a_network_compiled_by_torchscript_teaches_by_its_logits(kind):
    network = TinyNet(8).eval()
    compiled = torch.jit.script(network) if kind == "script" else torch.jit.trace(network, torch.zeros(1, 3, 8, 8))
    module = build(KD(), teacher=teaching(compiled))
    run = trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=1)
    run.fit(module, datamodule=Blobs())
    assert math.isfinite(run.callback_metrics["train/loss"])
    with pytest.raises(ACKDError, match="AT"):
        build(AT(), teacher=teaching(compiled))


WITHOUT = {
    "map": lambda logits: logits[..., None, None].expand(-1, -1, 2, 2),
    "nothing": lambda logits: None,
    "names": lambda logits: {"first": logits, "second": logits},
}


@pytest.mark.parametrize("form", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_networks_without_logits_are_refused_when_the_module_is_built(form, role):
    given = {"student": Returns(form)} if role == "student" else {"teacher": teaching(Returns(form))}
    with pytest.raises(ACKDError, match="Returns") as caught:
        build(KD(), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (lambda logits: logits.softmax(1), "softmax"),
        (lambda logits: (logits.sigmoid(),), "sigmoid"),
        (lambda logits: {"logits": logits.softmax(1)}, "softmax"),
        (lambda logits: logits.detach(), "no gradient"),
        (lambda logits: logits > 0, "torch.bool"),
        (lambda logits: logits.argsort(1), "torch.int64"),
    ],
    ids=["softmax", "sigmoid", "dict", "detached", "bool", "ranks"],
)
def test_outputs_from_which_a_student_cannot_learn_are_refused(form, named):
    with pytest.raises(ACKDError, match=named):
        build(KD(), student=Returns(form))


class Prepares(nn.Module):
    """Images are prepared, or features computed, without gradient."""

    def __init__(self, learned: nn.Module, prepared: nn.Module) -> None:
        super().__init__()
        self.learned, self.prepared = learned, prepared

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            image = self.prepared(image)
        return self.learned(image)


FLAT = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("learned", "prepared"), [(TinyNet, nn.AvgPool2d(2)), (lambda: nn.Linear(3, 4), FLAT)], ids=["images", "features"]
)
def test_a_student_learns_from_what_it_prepares_without_gradient(learned, prepared):
    network = Prepares(learned(), prepared)
    before = [each.clone() for each in network.parameters()]
    trainer(max_epochs=1).fit(build(CE(), student=network, teacher=None), datamodule=Blobs())
    assert not all(torch.equal(one, two) for one, two in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (Prepares(nn.Identity(), nn.Sequential(FLAT, nn.Linear(3, 4))), "no gradient"),
        (Prepares(nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)), FLAT), "softmax"),
    ],
    ids=["all", "softmax"],
)
def test_a_student_that_prepares_too_much_is_refused(network, named):
    with pytest.raises(ACKDError, match=named):
        build(CE(), student=network, teacher=None)
