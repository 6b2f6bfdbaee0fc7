"""How long the emoji set takes to draw, and the picture grid of its page.

    python benchmarks/emoji_set.py                           # the figures, with the CPU's name
    python benchmarks/emoji_set.py --grid docs/data/emoji.png

Drawn anew each time: the cache folder is not asked. The drawings are OpenMoji's, CC BY-SA 4.0, and so is the grid, which says so itself.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ditkit.data.emoji import Emoji, EmojiConfig, _draw_all, _names, load

COLUMNS, ROWS, SIZE, ZOOM = 16, 5, 32, 2
NAMED = ("red apple", "cat face", "rocket", "woman astronaut", "flag of Japan", "hamburger", "snowman", "violin")


def figures() -> None:
    print(f"{'pictures':>8} {'size':>5} {'seconds':>8} {'of the processor':>17}")
    for skin_tones in (False, True):
        for size in (32, 64):
            wall, cpu = time.perf_counter(), time.process_time()
            pictures = _draw_all(list(_names(skin_tones)), EmojiConfig(size=size, skin_tones=skin_tones))
            print(f"{len(pictures):8} {size:5} {time.perf_counter() - wall:8.1f} {time.process_time() - cpu:17.1f}")


def drawn(data: Emoji, ids: np.ndarray) -> np.ndarray:
    """(B, SIZE, SIZE, 3) of 0 .. 255"""
    return np.rint((data.batch(ids)["x"].permute(0, 2, 3, 1).numpy() + 1) * 127.5).astype(np.uint8)


def grid() -> Image.Image:
    """Pictures of all groups in rows, and some larger ones with their captions below."""
    data = load("test", size=SIZE)
    everything = data.captions(np.arange(len(data)))
    gap = 4
    width = COLUMNS * (SIZE + gap) + gap
    cell = width // (len(NAMED) // 2)
    sheet = Image.new("RGB", (width, ROWS * (SIZE + gap) + gap + 2 * (SIZE * ZOOM + 20)), "white")
    for k, picture in enumerate(drawn(data, np.arange(COLUMNS * ROWS))):
        sheet.paste(Image.fromarray(picture), (gap + k % COLUMNS * (SIZE + gap), gap + k // COLUMNS * (SIZE + gap)))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for k, picture in enumerate(drawn(data, np.array([everything.index(caption) for caption in NAMED]))):
        middle, top = k % (len(NAMED) // 2) * cell + cell // 2, ROWS * (SIZE + gap) + gap + k // (len(NAMED) // 2) * (SIZE * ZOOM + 20)
        large = Image.fromarray(picture).resize((SIZE * ZOOM, SIZE * ZOOM), Image.Resampling.NEAREST)
        sheet.paste(large, (middle - SIZE * ZOOM // 2, top))
        pen.text((middle, top + SIZE * ZOOM + 2), NAMED[k], "black", font, anchor="ma")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", metavar="PATH", help="write the picture grid instead of the figures")
    path = parser.parse_args().grid
    if path is None:
        figures()
        return
    info = PngImagePlugin.PngInfo()
    info.add_text("Copyright", f"{Emoji.credit}, {Emoji.licence}")
    grid().save(path, optimize=True, pnginfo=info)


if __name__ == "__main__":
    main()
