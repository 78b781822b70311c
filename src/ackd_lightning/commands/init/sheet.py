"""A sheet of sample images: one row for each class."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from ackd_lightning.commands.init.survey import Survey
from ackd_lightning.data.decoding import load_image
from ackd_lightning.data.pixels import ImageFormat, convert, fit
from ackd_lightning.writing import whole_file

ROWS, COLUMNS = 20, 8
_SIDE, _TEXT, _GAP = 96, 170, 4


def write_sheet(seen: Survey, path: Path) -> int:
    """Write a grid of training images as PNG, spread evenly over the files of each class.

    Args:
        seen: What the folder holds.
        path: File to write.

    Returns:
        Number of classes that are shown.
    """
    names = seen.class_names[:ROWS]
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (_TEXT + COLUMNS * step, len(names) * step + _GAP), "white")
    font = ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 13)
    draw = ImageDraw.Draw(sheet)
    form = ImageFormat((_SIDE, _SIDE), value_range=seen.value_range)
    for row, name in enumerate(names):
        text = name if len(name) <= 20 else f"{name[:19]}…"
        draw.text(
            (6, row * step + step // 2), f"{text}\n{len(seen.readable[row]):,}", fill="black", font=font, anchor="lm"
        )
        files = seen.readable[row]
        chosen = [files[number * len(files) // COLUMNS] for number in range(COLUMNS)]
        for column, file in enumerate(dict.fromkeys(chosen)):
            sheet.paste(_thumbnail(file, form), (_TEXT + column * step, _GAP + row * step))
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")
    return len(names)


def _thumbnail(file: Path, form: ImageFormat) -> Image.Image:
    image = fit(convert(load_image(file), form, str(file)), form.size)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = (image[:1] if len(image) != 3 else image).mul(255).round().to(torch.uint8)
    return ImageOps.autocontrast(to_pil_image(pixels).convert("RGB"))
