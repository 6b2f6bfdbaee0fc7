"""How many pictures a second the scenes world draws on one core, and the picture grid of its page.

    python benchmarks/scenes.py                          # the figures, with the CPU's name
    python benchmarks/scenes.py --grid docs/data/scenes.png

A picture is a scene drawn from its index, rendered with masks, boxes and caption. "First" starts with an empty glyph cache; "then" goes on.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from ditkit.data.scenes import SceneConfig, render, sample_scene

KINDS = {
    "1-2 objects (default)": SceneConfig(),
    "3-6 objects, overlapping": SceneConfig(num_objects=(3, 6), sizes=(0.2, 0.28), overlap=0.5),
}


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def rate(config: SceneConfig, size: int, first: int, count: int) -> tuple[float, float]:
    """Pictures a second of wall time, and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for index in range(first, first + count):
        shown = render(sample_scene(0, index, "train", config), size)
        assert shown.caption
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def figures(count: int) -> None:
    print(f"{cpu_name()}, one thread, Python {platform.python_version()}, NumPy {np.__version__}, Pillow {PIL.__version__}")
    print(f"{'pictures':28} {'size':>5} {'first ' + str(count):>12} {'then':>8}   pictures a second (by processor time)")
    for name, config in KINDS.items():
        for size in (32, 64, 128):
            (cold, cold_cpu), (warm, warm_cpu) = rate(config, size, 0, count), rate(config, size, count, count)
            print(f"{name:28} {size:5} {cold:12.0f} {warm:8.0f}   ({cold_cpu:.0f}, {warm_cpu:.0f})")


def strip(size: int, zoom: int, columns: int, rows: int, config: SceneConfig, first: int) -> np.ndarray:
    """A grid of pictures, enlarged, with white gaps."""

    def tile(index: int) -> np.ndarray:
        image = render(sample_scene(0, index, "train", config), size).image
        return np.pad(np.kron(image, np.ones((zoom, zoom, 1), np.uint8)), ((2, 2), (2, 2), (0, 0)), constant_values=255)

    return np.concatenate([np.concatenate([tile(first + r * columns + c) for c in range(columns)], 1) for r in range(rows)])


def truth(size: int, zoom: int, columns: int, config: SceneConfig, first: int) -> np.ndarray:
    """Pictures of overlapping objects above their masks (one colour an object) with their boxes."""
    hues = np.array([[230, 60, 60], [60, 120, 230], [60, 170, 80], [230, 170, 40], [150, 80, 200], [90, 90, 90]], np.uint8)
    rows = []
    for index in range(first, first + columns):
        shown = render(sample_scene(0, index, "train", config), size)
        map_ = np.full((size, size, 3), 245, np.uint8)
        for k, mask in enumerate(shown.masks):
            map_[mask] = hues[k]
        pair = [np.kron(p, np.ones((zoom, zoom, 1), np.uint8)) for p in (shown.image, map_)]
        for k, (x0, y0, x1, y1) in enumerate(shown.boxes * zoom):
            for edge in (np.s_[y0:y1, x0], np.s_[y0:y1, x1 - 1], np.s_[y0, x0:x1], np.s_[y1 - 1, x0:x1]):
                pair[1][edge] = hues[k]
        rows.append(np.concatenate([np.pad(p, ((2, 2), (2, 2), (0, 0)), constant_values=255) for p in pair]))
    return np.concatenate(rows, 1)


def grid(path: str) -> None:
    parts = [strip(64, 1, 14, 4, KINDS["1-2 objects (default)"], 0), truth(64, 1, 14, KINDS["3-6 objects, overlapping"], 20)]
    parts.append(strip(32, 1, 26, 2, KINDS["1-2 objects (default)"], 100))
    width = max(p.shape[1] for p in parts)
    parts = [np.pad(p, ((0, 6), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in parts]
    Image.fromarray(np.concatenate(parts)).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", metavar="PNG", help="write the picture grid instead")
    parser.add_argument("--count", type=int, default=1000, help="pictures a figure")
    options = parser.parse_args()
    if options.grid:
        grid(options.grid)
    else:
        figures(options.count)


if __name__ == "__main__":
    main()
