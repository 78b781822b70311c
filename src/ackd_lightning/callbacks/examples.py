"""Draw the images that a method generates: a grid in a PNG file every few epochs, and in Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure

from ackd_lightning.callbacks.health import is_fast_dev_run
from ackd_lightning.callbacks.length import epochs_of_fit
from ackd_lightning.data.loaders import data_of
from ackd_lightning.runs.figures import short, visible, write_figure
from ackd_lightning.types import Batch, Examples
from ackd_lightning.validation import PositiveInt, checked
from ackd_lightning.writing import whole_file

if TYPE_CHECKING:
    from ackd_lightning.callbacks.protocol import TrainingModule

_CELL = 1.7  # side of an image and its margin in inches
_LINE = 0.125  # height of a line of text in inches
_DPI = 100
_MAX_NAME = 18  # characters of a class name


def draw_examples(
    examples: Examples,
    path: Path,
    *,
    title: str = "",
    names: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Draw a column for each image: original, generated image, their difference, and the predictions for both.

    A network's prediction is written once if it is the same for both images, and with an arrow if it differs. The
    difference is scaled so that the largest change in the picture is black or white; its label shows the factor.

    Args:
        examples: Images of a method.
        path: PNG file to write. Missing folders are made.
        title: Text above the grid.
        names: Name of each class; if empty, class indices are shown.
        mean: Mean of each channel that the images were normalised with; None when unknown.
        std: Standard deviation of each channel, as ``mean``.
    """
    count = len(examples.target)
    both = torch.from_numpy(visible(torch.cat([examples.original, examples.made]), mean, std))
    original, made = both[:count], both[count:]
    change = made - original
    largest = float(change.abs().max())
    scale = 0.5 / largest if largest > 0 else 1.0
    rows = (
        ("image", original),
        ("generated", made),
        (f"difference\n(x {scale:.2g})", (0.5 + scale * change).clamp(0, 1)),
    )

    def named(number: int) -> str:
        return short(names[number] if number < len(names) else str(number), _MAX_NAME)

    lines = 1 + 3 * len(examples.predictions)
    margin, above, below = 1.0, 0.4, 0.2 + _LINE * lines  # inches around the grid
    width, height = margin + count * _CELL, above + len(rows) * _CELL + below
    figure = Figure(figsize=(width, height), dpi=_DPI)
    figure.text(0.5, 1 - above / 2 / height, title, fontsize=10, ha="center", va="center")
    for row, (label, images) in enumerate(rows):
        bottom = height - above - (row + 1) * _CELL
        figure.text(margin / 2 / width, (bottom + _CELL / 2) / height, label, fontsize=9, ha="center", va="center")
        for column in range(count):
            place = ((margin + column * _CELL) / width, bottom / height, 0.95 * _CELL / width, 0.95 * _CELL / height)
            axes = figure.add_axes(place)
            axes.set_axis_off()
            axes.imshow(images[column].numpy(), interpolation="nearest", vmin=0, vmax=1)
    for column in range(count):
        answers = [f"label: {named(int(examples.target[column]))}"]
        for network, (before, after) in examples.predictions.items():
            first, second = named(int(before[column])), named(int(after[column]))
            answers += ["", f"{network}:", first if first == second else f"{first} → {second}"]
        centre = (margin + (column + 0.475) * _CELL) / width
        figure.text(centre, (below - 0.05) / height, "\n".join(answers), fontsize=7, ha="center", va="top")
    with whole_file(path) as partial:
        write_figure(figure, partial)


class ExamplePictures(L.Callback):
    """Draw what a method generates from the first validation images, every few epochs and after the last one.

    The pictures are ``examples/epoch-NNN.png`` in the folder of the run, with epochs counted from 1, and ``examples``
    in Weights & Biases. The first process draws. Nothing is drawn under ``fast_dev_run``, in the sanity check, or
    while the method generates nothing. Random numbers, and the networks' modes and statistics, are left unchanged.

    Args:
        every_n_epochs: Number of epochs between two pictures.
        count: Largest number of images in a picture.

    Raises:
        ACKDError: If a number is below 1.
    """

    @checked
    def __init__(self, *, every_n_epochs: PositiveInt = 5, count: PositiveInt = 8) -> None:
        super().__init__()
        self.every_n_epochs, self.count = every_n_epochs, count
        self.folder: Path | None = None
        self.drawn = 0  # number of finished epochs when the last picture was drawn
        self._batch: Batch | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder of the run, in every process, as ``log_dir`` is a collective call."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "examples"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs in order to draw at the same epochs as an uninterrupted one."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.drawn = int(state_dict["drawn"])

    def _is_due(self, trainer: L.Trainer) -> bool:
        if self.folder is None or not trainer.is_global_zero or trainer.sanity_checking or is_fast_dev_run(trainer):
            return False
        done = trainer.current_epoch + 1
        fits = trainer.state.fn == TrainerFn.FITTING
        # every n-th epoch, or the next one with validation
        return fits and (
            done // self.every_n_epochs > self.drawn // self.every_n_epochs or done == epochs_of_fit(trainer)
        )

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images."""
        if batch_idx == 0 and dataloader_idx == 0 and self._is_due(trainer):
            first = cast("TrainingModule", pl_module).as_batch(batch)
            self._batch = Batch(*(each[: self.count].clone() for each in first[:3]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the picture."""
        batch, self._batch = self._batch, None
        if batch is None or self.folder is None:
            return
        module = cast("TrainingModule", pl_module)
        examples = cast("Any", module.method).examples(batch)
        epoch = trainer.current_epoch + 1
        self.drawn = epoch
        if examples is None:
            return
        path = self.folder / f"epoch-{epoch:03d}.png"
        names = getattr(data_of(trainer), "class_names", None) or ()
        method = type(module.method).__name__
        title = f"epoch {epoch}: validation images, what {method} generates from them, and the predictions for both"
        draw_examples(examples, path, title=title, names=names, mean=module.data.mean, std=module.data.std)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key="examples", images=[str(path)], step=trainer.global_step)
