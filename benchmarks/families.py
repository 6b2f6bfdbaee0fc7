"""Each text-to-image family on a CPU against diffusers: same weights, one evaluation of batch 2, rows of a family timed in turn.

    python benchmarks/families.py --repeats 9                  # all, about 16 minutes on two cores; writes JSON and a table
    python benchmarks/families.py --families pixart flux
    python benchmarks/families.py --tiny                       # small networks, captured and not compiled

The networks are a sixth to a tenth of the released depth at width 384: 256 picture tokens, 77 of text. "int8" rows say how far their
output is from the reference; random weights are the hard case.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.backbones.dit import draw_parameters
from ditkit.core import registry
from ditkit.core.backbone import Backbone
from ditkit.core.files import atomic_file, write_json
from ditkit.core.view import compile_view, with_methods
from ditkit.diffusion import noise
from ditkit.eval.bench import Candidate, run_bench
from ditkit.eval.counters import count
from ditkit.eval.roof import products_alone
from ditkit.eval.table import table
from ditkit.interop.families import family
from ditkit.interop.verify import quiet_imports
from ditkit.methods.efficiency.int8 import Int8

BATCH, TEXT = 2, 77
COMMON = dict(input_size=(32, 32), dim=384, depth=6, num_heads=6)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "PixArt": ("pixart", dict(COMMON, position_base=16, text_dim=768, text_length=TEXT)),
    "MM-DiT": ("mmdit", dict(COMMON, text_dim=768, pooled_dim=512, position_size=32)),
    "MM-DiT 3.5": ("mmdit", dict(COMMON, text_dim=768, pooled_dim=512, position_size=32, qk_norm=True, dual_attention=(0, 1, 2))),
    "FLUX": ("flux", dict(COMMON, depth=2, single_depth=6, text_dim=768, pooled_dim=512, rope_widths=(16, 24, 24), guidance=3.5)),
    "Next-DiT": ("lumina", dict(COMMON, num_kv_heads=2, text_dim=768)),
    "Hunyuan-DiT": ("hunyuan", dict(COMMON, text_dim=512, text_length=TEXT, t5_dim=512, t5_length=64, pooled_dim=512)),
}
TINY = dict(dim=48, depth=2, num_heads=2)
TINY_MORE = {"flux": dict(single_depth=1, rope_widths=(8, 8, 8)), "mmdit": dict(dual_attention=()), "lumina": dict(num_kv_heads=1)}


def models(label: str, tiny: bool) -> tuple[Backbone, Any]:
    """Ours and diffusers', with the same random weights."""
    name, values = NETWORKS[label]
    values = {**values, **TINY, **TINY_MORE.get(name, {})} if tiny else values
    torch.manual_seed(0)
    cls, tables = registry.get("backbones", name), family(name)
    ours = draw_parameters(cls(**values)).eval()
    with quiet_imports():
        import diffusers
    theirs = getattr(diffusers, tables.CLASS)(**{k: v for k, v in tables.config_to_diffusers(ours.config).items() if k[0] != "_"})
    theirs.load_state_dict(tables.diffusers_table(ours.config).export(ours.state_dict()), strict=False)
    return ours, theirs.eval()


def rows(label: str, tiny: bool, backend: str) -> list[Candidate]:
    """One evaluation, no gradients."""
    ours, theirs = models(label, tiny)
    tables: Any = family(ours.name)
    x = noise.normal(range(BATCH), 0, "x", (ours.config.in_channels, *ours.config.input_size))
    t = torch.tensor(getattr(tables, "LIVE_TIMES", (1, 250))[:BATCH])
    cond, call = tables.live_inputs(ours.config, BATCH, partial(noise.normal, range(BATCH), 0), length=TEXT)
    arranged = getattr(tables, "live_call", lambda model, x, t, call: model(x, timestep=t, **call).sample)
    with torch.no_grad():
        prepared = ours.prepare(**cond)
    cost = count(lambda: ours(x, t, prepared), ours)
    compiled = torch.compile(theirs, dynamic=False, backend=backend)
    views = {
        "ours, eager": (ours, 1e-5),
        "ours, compiled by step": (compile_view(ours, "step", backend=backend), 1e-5),
        "ours, int8, compiled by step": (compile_view(with_methods(ours, Int8()), "step", backend=backend), None),
    }

    def evaluation(view: Backbone) -> Callable[[], Tensor]:
        given = prepared if not view.methods else view.prepare(**cond)
        return torch.no_grad()(lambda: view(x, t, given))

    found = [Candidate("diffusers, eager", torch.no_grad()(lambda: arranged(theirs, x, t, call)), BATCH, cost)]
    found.append(Candidate("diffusers, compiled", torch.no_grad()(lambda: arranged(compiled, x, t, call)), BATCH, cost, tolerance=1e-5))
    found += [Candidate(name, evaluation(view), BATCH, cost, tolerance=bound) for name, (view, bound) in views.items()]
    products, nothing = products_alone(cost), torch.zeros_like(found[0].call())
    note = "no output: what no compiler can save at these shapes, on this machine, while the others ran"
    return [*found, Candidate("products and attention alone", lambda: (products(), nothing)[1], BATCH, notes=(note,))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted({name for name, _ in NETWORKS.values()}))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/families.py", *(["--families", *args.families] if args.families else [])])
    command += " --tiny" if args.tiny else f" --repeats {args.repeats}"
    backend = "eager" if args.tiny else "inductor"
    results: dict[str, Any] = {}
    texts: list[str] = []
    for label in [label for label, (name, _) in NETWORKS.items() if not args.families or name in args.families]:
        torch._dynamo.reset()
        result = run_bench(
            rows(label, args.tiny, backend), suite=label, repeats=args.repeats, warmups=2, command=command, progress=not args.tiny
        )
        results[label] = result.to_dict()
        texts.append(f"{label}\n{table(result)}")
        path = args.out / f"families_{result.machine.slug}_{result.date}.json"
        write_json(path, results)
        with atomic_file(path.with_suffix(".txt")) as file:
            file.write(("\n\n".join(texts) + "\n").encode())
        sys.stdout.write(f"{texts[-1]}\n{path}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
