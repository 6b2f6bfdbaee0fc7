"""Time and memory of scanning and caching an image folder, for two sizes of folder: memory must not follow the number of files.

    python benchmarks/image_folder.py                    # 2,500 and 10,000 JPEGs of 64 x 64 pixels
    python benchmarks/image_folder.py --files 1000 4000 --out figures.json

Each folder is measured in a process of its own. Memory is the resident set, above what it was with everything imported and one small
folder read. Seconds are wall time, and processor time of all threads, which other jobs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
import torch
from PIL import Image

from ditkit.codecs.kl import KL, KLConfig
from ditkit.data.folder import ImageFolder
from ditkit.data.latents import cache_latents


def make(folder: Path, files: int, side: int = 64) -> int:
    """``files`` different JPEGs of noise in 100 class folders; returns the bytes of one."""
    kinds = []
    for seed in range(10):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG", quality=85)
        kinds.append(file.getvalue())
    for i in range(files):
        path = folder / f"{i % 100:02d}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kinds[i % 10] + i.to_bytes(4, "little"))  # bytes behind the end of a JPEG make it another file
    return len(kinds[0]) + 4


class Watch:
    """The largest resident set above a base, sampled every 20 ms."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.base = self.process.memory_info().rss

    def measure(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        peak, done = [self.process.memory_info().rss], threading.Event()

        def look() -> None:
            while not done.wait(0.02):
                peak.append(self.process.memory_info().rss)

        thread = threading.Thread(target=look)
        thread.start()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            result = work()
        finally:
            seconds, processor = time.perf_counter() - wall, time.process_time() - cpu
            done.set()
            thread.join()
        peak.append(self.process.memory_info().rss)
        return result, {
            "seconds": round(seconds, 2),
            "processor_seconds": round(processor, 2),
            "peak_megabytes": round((max(peak) - self.base) / 1e6, 1),
        }


def measure(files: int) -> dict[str, Any]:
    """Scan, scan again, cache latents, cache again, read batches."""
    torch.set_num_threads(1)
    codec = KL(KLConfig(channels=4, dim=8, dim_mult=(1, 1, 1), num_groups=4))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        size = make(root / "pictures", files)
        make(root / "small", 100)
        small = ImageFolder(root / "small", resolution=32, progress=False)
        cache_latents(small, codec, root / "small-latents", progress=False)
        watch = Watch()
        rows: dict[str, Any] = {"files": files, "bytes_of_a_file": size}
        pictures, rows["scan"] = watch.measure(lambda: ImageFolder(root / "pictures", resolution=32))
        _, rows["scan_again"] = watch.measure(lambda: ImageFolder(root / "pictures", resolution=32))
        found, rows["cache"] = watch.measure(lambda: cache_latents(pictures, codec, root / "latents", batch_size=64, shard_bytes=2_000_000))
        _, rows["cache_again"] = watch.measure(
            lambda: cache_latents(pictures, codec, root / "latents", batch_size=64, shard_bytes=2_000_000)
        )
        order = np.random.default_rng(0).permutation(files)
        _, rows["20_batches_of_256"] = watch.measure(
            lambda: [found.augmented(order[np.arange(i, i + 256) % files], seed=0, step=i) for i in range(20)]
        )
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[2_500, 10_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help="measure the first size in this process and print it")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.files[0])))
        return
    rows = []
    for files in args.files:
        child = [sys.executable, __file__, "--one", "--files", str(files)]
        rows.append(json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout))
    result = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__},
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
