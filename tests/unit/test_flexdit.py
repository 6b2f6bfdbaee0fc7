"""FlexDiT: its schedule, what a module is at first, who influences whom, what it refuses, how it composes, learns and is saved."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.backbones.dit import DiT
from ditkit.backbones.hunyuan import Hunyuan
from ditkit.backbones.lumina import Lumina
from ditkit.backbones.pixart import PixArt
from ditkit.backbones.pt_dit import PTDiT
from ditkit.core import registry
from ditkit.core.backbone import Backbone, count_graphs
from ditkit.core.errors import ConfigError, Conflict, DitkitError
from ditkit.core.files import read_tensors
from ditkit.core.method import Method
from ditkit.core.run import At, Run
from ditkit.core.seams import Seam
from ditkit.core.streams import Stream, grid_layout
from ditkit.core.view import keep_blocks, with_methods
from ditkit.diffusion.flow import Flow
from ditkit.diffusion.solvers import SOLVERS
from ditkit.methods.efficiency.clear import CLEAR
from ditkit.methods.efficiency.first_block_cache import FirstBlockCache
from ditkit.methods.efficiency.flexdit import FlexDiT, FlexDiTConfig, Merge, side_of, sparse_grid, sparse_stream
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.taylorseer import TaylorSeer
from ditkit.methods.efficiency.tinyfusion import TinyFusion
from ditkit.methods.pruning import BlockOutputs, base_of
from ditkit.methods.specs import parse_spec
from ditkit.nn.positions import sincos_table
from ditkit.testing.contract import compiled_like_eager
from ditkit.testing.trajectory import relative

CROSS = [
    (name, variant)
    for name in sorted(registry.entries("backbones"))
    for variant, model in registry.get("backbones", name).tinies().items()  # type: ignore[attr-defined]
    if not model.skips and all("kv" in inspect.signature(b.forward).parameters for b in model.blocks)
]


def small(**more: Any) -> FlexDiT:
    """On DiT's tiny network of 4 blocks and 4 x 6 tokens."""
    return FlexDiT(**{**dict(pooling=1, modules=1, sparse=1, dense=0, side_noise=2, side_data=2), **more})


def tiny(name: str, variant: str) -> Backbone:
    cls: Any = registry.get("backbones", name)
    model: Backbone = cls.tinies()[variant]
    return model


# ---- the schedule ----


def test_rates_are_the_published_grids() -> None:
    assert [side_of(r, 256) for r in (0.86, 0.75, 0.61, 0.44)] == [6, 8, 10, 12]
    assert [side_of(r, 1024) for r in (0.61, 0.86, 0.90, 0.9375, 0.96)] == [20, 12, 10, 8, 6]
    assert side_of(0.999, 100) == 1
    assert [side_of(0.86, 256, how) for how in ("down", "up")] == [5, 6]
    with pytest.raises(DitkitError, match="rate 1.0"):
        side_of(1.0, 256)


def test_more_tokens_as_the_noise_falls() -> None:
    """r = r_min up to T / 4, then linear to r_max at T: the number of tokens is."""
    config = FlexDiTConfig(side_noise=6, side_data=10)
    sides = [config.side(i / 1000) for i in range(1001)]
    assert sides == sorted(sides, reverse=True)
    assert set(sides) == {6, 7, 8, 9, 10}
    assert sides[0] == sides[250] == 10
    assert sides[1000] == 6
    fine = FlexDiTConfig(side_noise=600, side_data=1000)
    for t in (0.25, 0.5, 0.8, 1.0):
        want = 1000**2 * (4 - 4 * t) / 3 + 600**2 * (4 * t - 1) / 3
        assert fine.side(t) ** 2 == pytest.approx(want, rel=2e-3)
    jumps = [abs(fine.side(i / 5000) - fine.side((i + 1) / 5000)) for i in range(5000)]
    assert max(jumps) <= 1


def test_rounding_is_a_setting() -> None:
    t = 0.6
    down, near, up = (FlexDiTConfig(side_noise=6, side_data=10, rounding=how).side(t) for how in ("down", "nearest", "up"))
    assert down + 1 == up
    assert near in (down, up)
    assert all(FlexDiTConfig(side_noise=8, side_data=8, rounding=how).side(t) == 8 for how in ("down", "nearest", "up"))


def test_noise_must_not_need_more_tokens() -> None:
    with pytest.raises(ConfigError, match="side_noise 10 is above side_data 6"):
        FlexDiT(side_noise=10, side_data=6)


def test_the_solver_says_the_times() -> None:
    view = with_methods(DiT.tiny(), method := small(side_data=3))
    run = Run(view, 4)
    assert method.finish(run)["sides"] == {"2": 2, "3": 2}  # at 1, 0.75, 0.5, 0.25
    run.public_times = torch.tensor([1.0, 0.9, 0.8, 0.2])
    assert method.finish(run)["sides"] == {"2": 3, "3": 1}
    solver: Any = SOLVERS["euler"]
    solver(lambda x, t: x, torch.zeros(1, 3, 8, 12), Flow(), run, None, times=[1.0, 0.9, 0.4, 0.2, 0.0])
    assert method.finish(run)["sides"] == {"2": 2, "3": 2}


def test_a_pipeline_runs_at_the_times_of_its_solver() -> None:
    pipe = ditkit.from_pretrained("digits").with_methods(FlexDiT(pooling=1, modules=2, sparse=0, dense=0, side_noise=2, side_data=3))
    out = pipe(class_labels=[3], num_inference_steps=4, guidance_scale=1.5, progress=False)
    assert out.x.isfinite().all()
    assert out.report["methods"]["flexdit"]["sides"] == {"2": 2, "3": 2}


# ---- grids ----


def test_sparse_grids_have_the_proportions_of_the_picture() -> None:
    assert sparse_grid((16, 16), 8) == (8, 8)
    assert sparse_grid((32, 8), 8) == (16, 4)
    assert sparse_grid((5, 16, 16), 6) == (5, 6, 6)  # frames stay
    assert sparse_grid((1, 100), 1) == (1, 10)
    with pytest.raises(DitkitError, match="9 x 9 sparse tokens"):
        sparse_grid((8, 8), 9)


def test_pooling_to_the_whole_grid_is_nothing_and_means_are_means() -> None:
    x = Stream(torch.randn(2, 24, 8), grid_layout((4, 6)))
    assert sparse_stream(x, 5).x.shape[1] == 4 * 6
    assert torch.equal(sparse_stream(x, 5).x, x.x)
    few = sparse_stream(x, 2)
    assert few.layout.grid == (2, 2)
    assert torch.allclose(few.x[:, 0], x.x.unflatten(1, (4, 6))[:, :2, :3].mean((1, 2)), atol=1e-6)
    assert sparse_stream(x, 2).layout is few.layout  # one object, so that masks are kept


def test_what_is_no_whole_grid_is_refused() -> None:
    lumina = Lumina.tiny()
    x, t, cond = lumina.example()
    view = with_methods(lumina, small(pooling=0, sparse=0))
    with pytest.raises(DitkitError, match="padding"):
        view(x, t, **cond, sizes=torch.tensor([[8, 12], [4, 6]]))
    big = with_methods(DiT.tiny(), small(side_noise=7, side_data=7))
    x, t, cond = big.example()
    with pytest.raises(DitkitError, match="sparse tokens"):
        big(x, t, **cond)


# ---- what a module is at first ----


def test_the_merged_map_is_the_dense_one_bit_for_bit() -> None:
    dense = Stream(torch.randn(2, 24, 8), grid_layout((4, 6)))
    assert torch.equal(Merge(8, dense.x)(sparse_stream(dense, 2), dense).x, dense.x)


@torch.no_grad()
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_without_gates_a_module_is_the_identity(side: int) -> None:
    model = DiT.tiny()
    for block in model.blocks:
        torch.nn.init.zeros_(block.parts["img"].ada.weight)  # type: ignore[union-attr, index]
        torch.nn.init.zeros_(block.parts["img"].ada.bias)  # type: ignore[union-attr, index]
    view = with_methods(model, small(side_noise=side, side_data=side))
    x, t, cond = model.example()
    s = model.embed(x, t, model.prepare(**cond))
    assert torch.equal(view(x, t, **cond), model.unembed(model.head(s), x))


def test_gradients_reach_what_merges_and_sparse_blocks_at_the_first_step() -> None:
    model = DiT.tiny()
    view = with_methods(model, method := small())
    x, t, cond = model.example()
    view(x, t, **cond).square().mean().backward()
    merge: Any = method.merges[0]
    assert merge.sparse.weight.grad.abs().max() > 0
    assert merge.dense.weight.grad.abs().max() > 0
    for i in (1, 2):  # they act through keys and values of the recovery block alone
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.blocks[i].parameters())
    grad: Any = model.blocks[0].parts["img"].qkv.weight.grad  # type: ignore[union-attr, index]
    assert not grad[: 2 * model.config.dim].any()  # nobody reads queries and keys of a poolingformer block
    assert grad[2 * model.config.dim :].abs().sum(1).min() > 0


def test_every_token_is_heard_everywhere() -> None:
    model = DiT.tiny()
    view = with_methods(model, small(pooling=0))
    x, t, cond = model.example(1)
    x.requires_grad_()
    view(x, t, **cond)[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()


def test_how_many_tokens_each_block_has() -> None:
    class Watch(BlockOutputs):
        name = "watch"  # inside flexdit

    view = with_methods(DiT.tiny(depth=6), small(modules=1, sparse=2), Watch())
    run = Run(view)
    x, t, cond = view.example()
    with torch.no_grad():
        view(x, t, run=run, **cond)
    assert [run.memory["watch"][i][1].shape[1] for i in range(6)] == [24, 4, 4, 4, 24, 24]


@torch.no_grad()
def test_further_generation_and_recovery_blocks_ask_what_the_first_ones_asked() -> None:
    """By hand: a second generation block has the first one's output and the same dense tokens, a second recovery block the first's."""
    model = DiT.tiny(depth=4)
    method = FlexDiT(pooling=0, modules=1, generation=2, sparse=0, recovery=2, dense=0, side_noise=2, side_data=2)
    view = with_methods(model, method)
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    x, t, cond = model.example()
    s = model.embed(x, t, model.prepare(**cond))
    dense = s["img"]
    seam = Seam()

    def block(i: int, q: Stream, kv: Stream) -> Stream:
        return model.blocks[i]({"img": q}, seam, kv={"img": kv})["img"]

    few = block(1, block(0, sparse_stream(dense, 2), dense), dense)
    y = block(2, method.merges[0](few, dense), few)
    y = block(3, method.merges[1](few, y), few)
    assert relative(view(x, t, **cond), model.unembed(model.head({"img": y}), x)) < 1e-6


def test_position_codes_again() -> None:
    method = FlexDiT(positions=True)
    x = Stream(torch.randn(1, 24, 32), grid_layout((4, 6)))
    assert torch.allclose(method.coded(x).x - x.x, sincos_table(32, (4, 6)), atol=1e-5)
    assert FlexDiT().coded(x) is x


# ---- on every backbone ----


class Uniform(Method):
    """Attention of the picture with queries of zero: all keys that are seen count alike."""

    name = "uniform"

    def plan(self, at: At) -> Any:
        return () if at.block == 0 else None

    def attend(self, nxt: Any, a: Any, site: Any) -> dict[str, Tensor]:
        both = "img" in a.q and "img" in a.k
        return nxt(a._replace(q={n: torch.zeros_like(u) for n, u in a.q.items()}) if both else a)


class Again(Method):
    """Every block takes keys and values of the picture from a copy of its own stream."""

    name = "again"

    def block(self, nxt: Any, s: Any, at: At, **kw: Any) -> Any:
        return nxt(s, kv={"img": s["img"]._replace(x=s["img"].x.clone())}, **kw)


@torch.no_grad()
@pytest.mark.parametrize("which", CROSS, ids=lambda w: ":".join(w))
def test_a_poolingformer_block_is_uniform_attention(which: tuple[str, str]) -> None:
    model = tiny(*which)
    if getattr(model.config, "kv_blocks", ()) or "grid" not in model.traits:
        pytest.skip("keys are compressed, or no grid")
    x, t, cond = model.example()
    want = with_methods(model, Uniform())(x, t, **cond)
    assert relative(want, model(x, t, **cond)) > 1e-4
    assert relative(with_methods(model, FlexDiT(pooling=1, modules=0))(x, t, **cond), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("which", CROSS, ids=lambda w: ":".join(w))
def test_keys_of_the_same_tokens_change_nothing(which: tuple[str, str]) -> None:
    model = tiny(*which)
    x, t, cond = model.example()
    assert relative(with_methods(model, Again())(x, t, **cond), model(x, t, **cond)) < 1e-5


# ---- refusals ----


def test_what_cannot_meet_is_refused_with_the_reason() -> None:
    dit = DiT.tiny()
    with pytest.raises(Conflict, match="26 blocks, dit has 4"):
        with_methods(dit, FlexDiT())
    with pytest.raises(Conflict, match="long skips"):
        with_methods(Hunyuan.tiny(), small(pooling=0, sparse=0))
    with pytest.raises(Conflict, match="takes no keys and values from other tokens"):
        with_methods(PTDiT.tiny(), small(pooling=0, sparse=0))
    with pytest.raises(Conflict, match="compresses its keys"):
        with_methods(PixArt.tiny(), FlexDiT(pooling=1, modules=0))
    with pytest.raises(Conflict, match="both decide depth"):
        with_methods(dit, small(), TinyFusion())
    with pytest.raises(Conflict, match="both decide tokens"):
        with_methods(dit, small(), FirstBlockCache())
    with pytest.raises(Conflict, match=r"both decide kv\.img"):
        with_methods(dit, small(), CLEAR(down=2))
    with pytest.raises(Conflict, match="static tokens, which flexdit takes away"):
        with_methods(dit, small(side_data=3), TaylorSeer())
    with pytest.raises(Conflict, match="flexdit is attached"):
        keep_blocks(with_methods(dit, small()), [0, 1])
    with pytest.raises(Conflict, match="prune first"):
        base_of(with_methods(dit, small()))
    with_methods(dit, method := small())
    with pytest.raises(Conflict, match="made for tokens of width 32"):
        with_methods(DiT.tiny(dim=16, num_heads=2), method)


# ---- with others ----


@torch.no_grad()
def test_a_cache_computes_where_the_number_of_tokens_changes() -> None:
    view = with_methods(DiT.tiny(), small(side_data=3), FORA(interval=100))
    run = Run(view, 6)  # sides 2 2 2 3 3 3
    modes: list[list[Any]] = []
    for _ in run.steps():
        run.first = run.step == 0
        modes.append([dict((m.label, at.mode) for m, at in row.layers)["fora"] for row in run.plan()])
    assert [len(m[1]) for m in modes] == [2, 0, 0, 2, 0, 2]  # a generation block; FORA's last step is full
    assert [len(m[3]) for m in modes] == [2, 0, 0, 0, 0, 2]  # a recovery block has all tokens at all steps


@pytest.mark.timeout(180)
def test_graphs_follow_from_the_schedule() -> None:
    """One of the pooling block, and one of each of three roles for each number of tokens."""
    assert count_graphs(with_methods(DiT.tiny(), small(side_data=3)), 6) == 1 + 3 * 2
    fixed = with_methods(DiT.tiny(), small())
    assert count_graphs(fixed, 6) == 1 + 3
    compiled_like_eager(fixed, "block")


def test_a_line_of_the_command() -> None:
    (method,) = parse_spec("flexdit:pooling=1,modules=2,sparse=0,side_noise=2,side_data=3").build()
    assert isinstance(method, FlexDiT)
    assert len(method.places) == 1 + 2 * 3


def test_what_is_saved_is_small_and_returns(tmp_path: Path) -> None:
    method = FlexDiT(pooling=1, modules=2, sparse=0, dense=0, side_noise=2, side_data=3)
    pipe = ditkit.from_pretrained("digits").with_methods(method)
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    pipe.save_pretrained(tmp_path / "flex")
    state = read_tensors(tmp_path / "flex" / "methods" / "flexdit.safetensors")
    assert sum(u.numel() for u in state.values()) == 2 * 2 * (128**2 + 128)
    again = ditkit.from_pretrained(tmp_path / "flex")
    x, t, cond = pipe.eager.example()
    with torch.no_grad():
        assert torch.equal(again.eager(x, t, **cond), pipe.eager(x, t, **cond))
