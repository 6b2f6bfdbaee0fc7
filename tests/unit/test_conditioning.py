"""DiT's other ways to condition (2212.09748, section 3.2), and rotary positions: what each must and must not do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.bundle import BundleConfig, DataCard, Part, write_bundle
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.seams import Seam
from ditkit.core.streams import Layout, Stream, Streams
from ditkit.interop import dit as names
from ditkit.interop.convert import convert
from ditkit.interop.lora import layouts
from ditkit.nn.adaln import AdaLNBlock, AdaLNPart
from ditkit.nn.plain import PlainBlock
from ditkit.nn.positions import Rope
from ditkit.testing.trajectory import relative

OTHERS = ("adaln", "cross_attention", "in_context")
SMALL = dict(input_size=(8, 8), in_channels=2, out_channels=2, dim=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture(scope="module")
def tinies() -> dict[str, DiT]:
    return DiT.tinies()  # type: ignore[return-value]


@torch.no_grad()
def test_blocks_know_no_order_but_that_of_the_position_code(tinies: dict[str, DiT]) -> None:
    """Tokens that change places together with their codes come out in their new places."""
    model = tinies[""]
    x, t, cond = model.example()
    img = model.embed(x, t, model.prepare(**cond))["img"]
    order = torch.randperm(img.x.shape[1], generator=torch.Generator().manual_seed(0))
    outputs = []
    for tokens in (img.x, img.x[:, order]):
        s: Streams = {"img": img._replace(x=tokens)}
        for block in model.blocks:
            s = block(s, Seam())
        outputs.append(s["img"].x)
    assert relative(outputs[1], outputs[0][:, order]) < 1e-6
    assert relative(outputs[1], outputs[0]) > 0.1


@pytest.mark.parametrize("values", [{"conditioning": name} for name in OTHERS] + [{"positions": "rope"}], ids=str)
def test_a_few_steps_of_training_lower_the_loss(values: dict[str, str]) -> None:
    """One picture for each class, of one value: what the classes' tokens or modulation must tell apart."""
    torch.manual_seed(0)
    model = DiT(**{**SMALL, **values}, embedding_init="unit")
    y = torch.arange(3)
    target = (y - 1.0).view(3, 1, 1, 1).expand(3, 2, 8, 8)
    x, t = torch.randn(3, 2, 8, 8), torch.full((3,), 500.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(model(x, t, y=y), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(2 / 3)  # the output starts at zero
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("conditioning", OTHERS)
def test_time_and_label_both_act(tinies: dict[str, DiT], conditioning: str) -> None:
    model = tinies[conditioning]
    x, t, cond = model.example()
    with torch.no_grad():
        base = model(x, t, **cond)
        assert relative(model(x, t + 200, **cond), base) > 1e-4
        assert relative(model(x, t, y=(cond["y"] + 1) % 5), base) > 1e-4


def test_only_adaln_zero_starts_as_the_identity() -> None:
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
    for conditioning in ("adaln_zero", *OTHERS):
        torch.manual_seed(0)
        model = DiT(**SMALL, conditioning=conditioning)
        s = model.embed(x, t, model.prepare(y=y))
        after = model.blocks[0](s, Seam())["img"].x
        assert torch.equal(after, s["img"].x) == (conditioning == "adaln_zero")
        assert torch.equal(model(x, t, y=y), torch.zeros(2, 2, 8, 8))


def test_adaln_is_adaln_zero_with_gates_of_one() -> None:
    torch.manual_seed(0)
    gated, free = (AdaLNBlock({"img": AdaLNPart(16, 2, gated=g)}) for g in (True, False))
    draw_parameters(gated)
    state = gated.state_dict()
    for end in ("weight", "bias"):
        m = state[f"parts.img.ada.{end}"].chunk(6)
        gates = [torch.full_like(u, float(end == "bias")) for u in (m[2], m[5])]  # 0 c + 1
        state[f"parts.img.ada.{end}"] = torch.cat([m[0], m[1], gates[0], m[3], m[4], gates[1]])
        free.state_dict()[f"parts.img.ada.{end}"].copy_(torch.cat([m[0], m[1], m[3], m[4]]))
    gated.load_state_dict(state)
    free.load_state_dict({**state, **{k: v for k, v in free.state_dict().items() if ".ada." in k}})
    s = {"img": stream(6, c=torch.randn(2, 1, 16))}
    with torch.no_grad():
        torch.testing.assert_close(gated(s, Seam())["img"].x, free(s, Seam())["img"].x)


def stream(tokens: int, dim: int = 16, **fields: Tensor | tuple[Tensor, Tensor]) -> Stream:
    return Stream(torch.randn(2, tokens, dim), Layout(torch.zeros(1, tokens, 2), tokens), **fields)  # type: ignore[arg-type]


def test_in_context_tokens_are_one_sequence_with_the_image() -> None:
    """Two streams of one plain block are the same block over the joined tokens."""
    torch.manual_seed(0)
    block = draw_parameters(PlainBlock(16, 2, names=("img", "cond")))
    img, cond = stream(6), stream(2)
    whole = Stream(torch.cat([img.x, cond.x], 1), Layout(torch.zeros(1, 8, 2), 8))
    with torch.no_grad():
        apart = block({"img": img, "cond": cond}, Seam())
        joined = block({"img": whole}, Seam())["img"].x
    torch.testing.assert_close(torch.cat([apart["img"].x, apart["cond"].x], 1), joined)


def test_cross_attention_asks_and_leaves_the_context_alone() -> None:
    """Against torch's own multi-head attention; the keys' order plays no part."""
    torch.manual_seed(0)
    block = draw_parameters(PlainBlock(16, 2, context="cond"))
    s = {"img": stream(6), "cond": stream(2)}
    seen: dict[str, Tensor] = {}

    class Watch(Seam):
        def residual(self, name: str, f: object, h: dict[str, Tensor], gate: dict[str, Tensor], s: Streams) -> Streams:
            after = super().residual(name, f, h, gate, s)  # type: ignore[arg-type]
            seen.update({f"{name} in": h["img"], f"{name} change": after["img"].x - s["img"].x})
            return after

    with torch.no_grad():
        out = block(s, Watch())
        assert out["cond"] is s["cond"]
        c = block.cross
        want, _ = F.multi_head_attention_forward(
            *(u.transpose(0, 1) for u in (seen["cross in"], s["cond"].x, s["cond"].x)),
            16,
            2,
            torch.cat([c.q.weight, c.kv.weight]),
            torch.cat([c.q.bias, c.kv.bias]),
            None,
            None,
            False,
            0.0,
            c.proj.weight,
            c.proj.bias,
            need_weights=False,
        )
        torch.testing.assert_close(seen["cross change"], want.transpose(0, 1), atol=1e-6, rtol=1e-5)
        flipped = block({**s, "cond": s["cond"]._replace(x=s["cond"].x.flip(1))}, Seam())
    torch.testing.assert_close(flipped["img"].x, out["img"].x)


@pytest.mark.parametrize("kind", ["adaln", "plain"])
def test_rotary_logits_depend_on_differences_of_places_only(kind: str) -> None:
    """A shift of all coordinates changes no attention, hence nothing; another order of them does."""
    torch.manual_seed(0)
    rope, places = Rope((4, 4)), torch.randint(0, 9, (1, 6, 2)).float()
    block = draw_parameters(AdaLNBlock({"img": AdaLNPart(16, 2)}) if kind == "adaln" else PlainBlock(16, 2))
    img = stream(6, c=torch.randn(2, 1, 16))

    def at(coords: Tensor | None) -> Tensor:
        with torch.no_grad():
            return block({"img": img._replace(rope=None if coords is None else rope.at(coords))}, Seam())["img"].x

    torch.testing.assert_close(at(places), at(places + torch.tensor([37.0, 5.0])), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(at(places), at(places.flip(1)), atol=1e-3)
    assert torch.equal(at(None), at(torch.zeros_like(places)))


def test_keys_from_elsewhere_bear_their_own_places() -> None:
    torch.manual_seed(0)
    block, rope = draw_parameters(AdaLNBlock({"img": AdaLNPart(16, 2)})), Rope((4, 4))
    places = torch.randint(0, 9, (1, 6, 2)).float()
    img = stream(6, c=torch.randn(2, 1, 16), rope=rope.at(places))
    moved = img._replace(rope=rope.at(places + 11))
    with torch.no_grad():
        plain, same, other = (
            block({"img": img}, Seam()),
            block({"img": img}, Seam(), {"img": img}),
            block({"img": img}, Seam(), {"img": moved}),
        )
    assert torch.equal(plain["img"].x, same["img"].x)
    assert not torch.allclose(plain["img"].x, other["img"].x, atol=1e-3)


def test_a_rotary_model_knows_where_its_tokens_are(tinies: dict[str, DiT]) -> None:
    """Without positions, permuted patches give permuted outputs; with either code they do not."""
    x, t, cond = tinies[""].example()
    moved = x.unflatten(-1, (-1, 2)).flip(-2).flatten(-2)  # columns of patches
    for name in ("", "rope"):
        with torch.no_grad():
            a, b = tinies[name](x, t, **cond), tinies[name](moved, t, **cond)
        assert not torch.allclose(a.unflatten(-1, (-1, 2)).flip(-2).flatten(-2), b, atol=1e-3)


@pytest.mark.parametrize("conditioning", ["cross_attention", "in_context"])
def test_a_time_for_each_token_needs_modulation(tinies: dict[str, DiT], conditioning: str) -> None:
    x, _, cond = tinies[conditioning].example()
    with pytest.raises(DitkitError, match=r"time is \(2, 24\)"):
        tinies[conditioning](x, torch.rand(2, 24), **cond)


def test_heads_that_two_rotary_axes_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="heads of width 6"):
        DiT(**{**SMALL, "dim": 24, "num_heads": 4}, positions="rope")


@pytest.mark.parametrize("values", [{"conditioning": name} for name in OTHERS] + [{"positions": "rope"}], ids=str)
def test_no_other_layout_has_them(values: dict[str, str], tmp_path) -> None:
    torch.manual_seed(0)
    model = DiT(**{**SMALL, **values})
    for function in (names.official_table, names.diffusers_table, names.config_to_diffusers, names.constructor_of):
        with pytest.raises(DitkitError, match=next(iter(values.values()))):
            function(model.config)
    assert set(layouts(model)) == {"ditkit"}  # of LoRA files too
    config = BundleConfig(
        backbone=Part(name="dit", config=model.config.to_dict()), process=Part(name="flow"), data=DataCard(name="x", shape=(2, 8, 8))
    )
    write_bundle(tmp_path / "b", config, model.state_dict())
    for to, out in (("diffusers", "d"), ("official", "o.safetensors")):
        with pytest.raises(DitkitError, match="--to ditkit"):
            convert(tmp_path / "b", tmp_path / out, to)  # type: ignore[arg-type]
