"""Write the files of a new method: ``make new-method NAME=my_method``."""

from __future__ import annotations

import keyword
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

METHOD = '''"""{title}. AUTHORS: TITLE, YEAR.

TODO: the equation, with the symbols of the paper.
"""

from __future__ import annotations

from torch import Tensor

from ackd_lightning.functional import cross_entropy, kd_loss
from ackd_lightning.methods.base import Method
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


class {cls}(Method):
    """Cross-entropy with the labels plus TODO.

    Args:
        temperature: Temperature tau of the distillation term.
        weight_ce: Weight of the cross-entropy.
        weight_{name}: Weight of the distillation term.
    """

    teacher = "logits"

    def __init__(
        self, *, temperature: Positive = 4.0, weight_ce: NonNegative = 1.0, weight_{name}: NonNegative = 1.0
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.loss_weights = {{"ce": weight_ce, "{name}": weight_{name}}}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``{name}``; arguments as in the base class."""
        assert teacher is not None
        return {{
            "ce": cross_entropy(student.logits, batch.target),
            "{name}": kd_loss(student.logits, teacher.logits, temperature=self.temperature),
        }}
'''

TEST = """from __future__ import annotations

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import {cls}
from ackd_lightning.testing import Harness


def test_the_term_equals_a_slow_reference():
    harness = Harness({cls}(temperature=2.0))
    student, teacher, batch = harness.outputs()
    ours, theirs = ((each.logits / 2.0).softmax(dim=1) for each in (student, teacher))
    expected = torch.stack(
        [4.0 * (t * (t.log() - s.log())).sum() for s, t in zip(ours, theirs, strict=True)]  # TODO: the method's own
    ).mean()
    assert torch.allclose(harness.method(student, teacher, batch)["{name}"], expected, atol=1e-6)


def test_some_steps_lower_the_loss():
    losses = Harness({cls}()).train(steps=20)
    assert losses[-1] < losses[0]


def test_values_out_of_range_are_refused():
    with pytest.raises(ACKDError, match="temperature"):
        {cls}(temperature=0.0)
"""

FRAGMENT = """# {title}: one line that `ackd configs` shows (AUTHORS YEAR)
model:
  method:
    class_path: ackd_lightning.methods.{cls}
"""


def class_name(name: str) -> str:
    return name.upper() if len(name) <= 4 else "".join(part.capitalize() for part in name.split("_"))


def write(name: str, root: Path = ROOT) -> list[Path]:
    """Write the files and add the class to the room's public names.

    Raises:
        SystemExit: If the name cannot be a module or the method exists.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) is None or keyword.iskeyword(name):
        raise SystemExit(f"NAME is {name!r}; use lower-case letters, digits and underscores, such as my_method")
    methods = root / "src" / "ackd_lightning" / "methods"
    cls = class_name(name)
    if cls in {"Method", "Networks", "Sum", "Tensor", "Batch", "Positive", "NetOutput"}:
        raise SystemExit(f"NAME is {name!r}, and the class {cls} has another meaning here; choose another NAME")
    texts = {
        methods / f"{name}.py": METHOD,
        root / "configs" / "methods" / f"{name}.yaml": FRAGMENT,
        root / "tests" / "methods" / f"test_{name}.py": TEST,
    }
    for path in texts:
        if path.exists():
            raise SystemExit(f"{path} exists; choose another NAME")
    for path, text in texts.items():
        path.write_text(text.format(name=name, cls=cls, title=cls), encoding="utf-8")
    public = methods / "__init__.py"
    text = public.read_text(encoding="utf-8")
    text = text.replace(
        "\n__all__ = [\n", f'from ackd_lightning.methods.{name} import {cls}\n\n__all__ = [\n    "{cls}",\n'
    )
    public.write_text(text, encoding="utf-8")
    return [*texts, public]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: make new-method NAME=my_method")
    written = write(sys.argv[1])
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--fix", "--quiet", str(written[-1])], check=False)
    subprocess.run([*ruff, "format", "--quiet", *(str(path) for path in written if path.suffix == ".py")], check=True)
    print("written:", *(str(path.relative_to(ROOT)) for path in written), sep="\n  ")
    print(
        f"""next:
  1. the maths in src/ackd_lightning/methods/{sys.argv[1]}.py, and its slow reference in the test
  2. python tests/contracts/test_loss_curves.py   records the losses of 20 steps
  3. python -m pytest tests/methods tests/contracts -k {sys.argv[1]}
  4. a row in docs/methods.md, a line in CHANGELOG.md"""
    )
