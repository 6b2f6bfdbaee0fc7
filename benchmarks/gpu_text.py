"""The GPU suite's result as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditkit.eval.table import megabytes, seconds


def table(data: Mapping[str, Any]) -> str:
    """Head, then each section: what it measured, or how it ended."""
    m = data["machine"]
    lines = [
        f"{data['suite']}, {data['date']}, commit {data['commit'] or 'unknown'}",
        f"{m['gpu'] or m['cpu']}; Python {m['python']}, torch {m['torch']}, CUDA {data['gpu']['cuda']}; {data['model']['name']}",
    ]
    if data["suite"] == "gpu-tiny":
        lines.append("a tiny model on a CPU: shows that the code runs, says nothing about a GPU")
    for name, section in data["sections"].items():
        lines += ["", f"{name}: {section['status']}{', ' + section['error'] if 'error' in section else ''}"]
        lines += SECTIONS.get(name.split()[0], _rows)(section) if section["status"] == "done" else []
    return "\n".join(lines) + "\n"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  " + "  ".join(u.ljust(w) if i == 0 else u.rjust(w) for i, (u, w) in enumerate(zip(line, widths))).rstrip() for line in cells]


def _rows(section: Mapping[str, Any]) -> list[str]:
    """Times per image, with the ratio to the floor measured beside them."""
    cells = [["per image", "median", "quartiles", "speed-up", "/floor", "peak MB", "first call", "rel. error"]]
    for r in section["rows"]:
        t = r["seconds"]
        cells.append(
            [
                r["name"],
                seconds(t["median"]),
                f"{seconds(t['q1'])} - {seconds(t['q3'])}",
                f"{r['speedup']:.2f}x",
                f"{r['ratio_to_floor']:.2f}" if r["ratio_to_floor"] else "",
                megabytes(r["peak_memory_bytes"]) if r["peak_memory_bytes"] else "",
                seconds(t["cold"]),
                f"{r['drift']['relative_l2']:.1e}",
            ]
        )
    return _aligned(cells) + _left_out(section)


def _left_out(section: Mapping[str, Any]) -> list[str]:
    return [f"  not measured: {name}: {why}" for name, why in section["not measured"].items()]


def _train(section: Mapping[str, Any]) -> list[str]:
    cells = [["step", "median", "images/s", "MFU (roof)", "MFU (data sheet)", "peak MB", "first call"]]
    for r in section["steps"]:
        sheet = f"{100 * r['mfu_datasheet']:.1f} %" if r["mfu_datasheet"] is not None else ""
        peak = megabytes(r["peak_memory_bytes"]) if r["peak_memory_bytes"] else ""
        t = r["seconds"]
        cells.append([r["name"], seconds(t["median"]), f"{r['images_per_second']:.0f}", f"{100 * r['mfu_roof']:.1f} %", sheet, peak])
        cells[-1].append(seconds(t["cold"]))
    note = f"  batch {section['batch_size']} in {section['micro_batches']} micro-batches, {section['arithmetic']}, fused AdamW, EMA"
    return [*_aligned(cells), note, *_left_out(section)]


def _parity(section: Mapping[str, Any]) -> list[str]:
    cells = [["relative error", "", "limit", ""]]
    cells += [[c["name"], f"{c['error']:.1e}", f"{c['limit']:.0e}", "" if c["passed"] else "FAILED"] for c in section["checks"]]
    return _aligned(cells) + [f"  not run: {text}" for text in section["not run"]]


def _cold(section: Mapping[str, Any]) -> list[str]:
    parts = {k: v for k, v in section.items() if k.endswith("_seconds") and k != "section_seconds"}
    return ["  " + ", ".join(f"{k.removesuffix('_seconds').replace('_', ' ')} {seconds(v)}" for k, v in parts.items())]


SECTIONS = {"parity": _parity, "train": _train, "cold": _cold}
