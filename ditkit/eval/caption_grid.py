"""A sheet of pictures with what was asked for below each: the sample on the left, the real picture on the right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ditkit.output import to_images

SIDE, GAP, LINE, CHARACTERS = 96, 8, 13, 34  # pixels of a picture, between cells, of a line of text; and letters in a line


def caption_grid(captions: Sequence[str], samples: Tensor, real: Tensor, most: int = 24, columns: int = 4, credit: str = "") -> Image.Image:
    """At most ``most`` of the pairs, spread evenly over all of them. samples, real: (N, C, H, W) in [-1, 1].

    ``credit``: whom the licence of the real pictures asks to name; written below the title.
    """
    chosen = np.linspace(0, len(captions) - 1, min(most, len(captions))).astype(int).tolist()
    made, true = (to_images(x[chosen]) for x in (samples, real))
    texts = [textwrap.wrap(captions[i], CHARACTERS) for i in chosen]
    lines = max(len(t) for t in texts)
    width, height = 2 * SIDE + 2 + GAP, SIDE + LINE * lines + 2 * GAP
    head = GAP + LINE * (2 if credit else 1)
    sheet = Image.new("RGB", (columns * width + GAP, -(-len(chosen) // columns) * height + head), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    title = "left: sample, right: real picture of the same caption"
    draw.text((GAP, GAP // 2), f"{title}\n{credit}", fill="black", font=font, spacing=2)
    for k, (left, right, text) in enumerate(zip(made, true, texts)):
        x, y = GAP + k % columns * width, head + k // columns * height
        for place, picture in ((x, left), (x + SIDE + 2, right)):
            sheet.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (place, y))
        draw.text((x, y + SIDE + 2), "\n".join(text), fill="black", font=font, spacing=2)
    return sheet
