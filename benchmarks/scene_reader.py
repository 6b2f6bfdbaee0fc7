"""How well the reader of scenes reads real pictures: accuracy, clean and spoiled, and the glyphs that it reads worst.

    python benchmarks/scene_reader.py                    # the world of the shipped bundle, 32 pixels
    python benchmarks/scene_reader.py --world all --size 64

The first run of a world fits its reader, about a minute of processor time; later runs take it from the cache.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from ditkit.data.scenes import SceneConfig, parse_caption
from ditkit.eval.scene_reader import SYMBOLS, SceneReader
from ditkit.eval.scene_scores import match

WORLDS = {"symbols": SYMBOLS, "all": SceneConfig()}
SPOILED = ({}, {"noise": 0.05}, {"blur": 0.5}, {"noise": 0.05, "blur": 0.5}, {"noise": 0.1, "blur": 0.8})


def accuracies(reader: SceneReader, num: int) -> None:
    """One line for clean pictures and for each kind of spoiled ones."""
    for spoiled in SPOILED:
        scores = reader.accuracy(num, **spoiled)
        kind = ", ".join(f"{name} {sigma}" for name, sigma in spoiled.items()) or "clean"
        print(
            f"{kind:22} object {scores.object:6.1%}  colour {scores.color:6.1%}  relation {scores.relation:6.1%}   "
            f"({scores.num_captions} captions, {scores.num_objects} objects, {scores.num_relations} relations; {scores.num_extra} extra)"
        )


def worst_glyphs(reader: SceneReader, num: int, most: int) -> None:
    """The glyphs with the smallest share of right readings, and what they are mistaken for."""
    shown, wrong = Counter[str](), Counter[tuple[str, str]]()
    x, captions = reader.real(num)
    started = time.process_time()
    readings = reader.read(x)
    print(f"{num} pictures read in {time.process_time() - started:.1f} s of processor")
    for text, reading in zip(captions, readings):
        pairs = parse_caption(text).objects
        for (_, glyph), thing in zip(pairs, match(pairs, reading.found)):
            shown[glyph] += 1
            if thing is None or thing.glyph != glyph:
                wrong[glyph, thing.glyph if thing else "nothing"] += 1
    right = {glyph: 1 - sum(n for (is_, _), n in wrong.items() if is_ == glyph) / count for glyph, count in shown.items()}
    for glyph, share in sorted(right.items(), key=lambda item: item[1])[:most]:
        taken = ", ".join(f"{read} {n}" for (is_, read), n in wrong.most_common() if is_ == glyph)
        print(f"  {glyph:22} {share:6.1%} of {shown[glyph]:3}   {taken}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="symbols")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--num", type=int, default=500, help="pictures for the accuracies; four times as many for the worst glyphs")
    parser.add_argument("--worst", type=int, default=8, help="glyphs to list")
    arguments = parser.parse_args()
    started = time.process_time()
    reader = SceneReader.load(WORLDS[arguments.world], arguments.size)
    print(f"reader of {len(reader.detector.glyphs)} glyphs at {arguments.size} pixels: {time.process_time() - started:.1f} s of processor")
    accuracies(reader, arguments.num)
    worst_glyphs(reader, 4 * arguments.num, arguments.worst)


if __name__ == "__main__":
    main()
