"""Position codes against independent formulas and diffusers' functions, and what rotary positions must satisfy."""

from __future__ import annotations

import math

import pytest
import torch

from ditkit.core.errors import DitkitError
from ditkit.core.streams import concatenate, grid_layout
from ditkit.interop.verify import quiet_imports
from ditkit.nn.positions import (
    Axis,
    Rope,
    apply_rope,
    coordinates,
    cropped,
    fitted,
    frequencies,
    frequency_aware,
    sincos_table,
    stretched,
    time_aware,
)

with quiet_imports():
    from diffusers.models import embeddings as theirs
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

S, C = 0.841471, 0.540302  # sin 1, cos 1


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a.double(), torch.as_tensor(b).double(), rtol=0, atol=tolerance)


# ---- sine and cosine ---------------------------------------------------------------------------------------------------------


def test_two_axes_are_dits() -> None:
    """The numbers of the sheet: D = 8, 2 x 2, the column first."""
    rows = [(0, 0, 1, 1, 0, 0, 1, 1), (S, 0.01, C, 0.99995, 0, 0, 1, 1), (0, 0, 1, 1, S, 0.01, C, 0.99995)]
    near(sincos_table(8, (2, 2))[0, :3], rows)


def test_three_axes_are_dit_3ds() -> None:
    """D = 12, 2 x 2 x 2, x-major: token 1 is z = 1 in the last four, token 2 y = 1, token 4 x = 1 in the first four."""
    table = sincos_table(12, (2, 2, 2), order=(0, 1, 2))[0]
    zero, one = [0, 0, 1, 1], [S, 0.01, C, 0.99995]
    for token, row in {0: zero * 3, 1: zero * 2 + one, 2: zero + one + zero, 4: one + zero * 2}.items():
        near(table[token], row)


@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (5, 9)])
@pytest.mark.parametrize(("base", "scale"), [(16, 1.0), (32, 2.0), (16, 0.5)])
def test_stretched_is_pixarts(grid, base, scale) -> None:
    want = theirs.get_2d_sincos_pos_embed(24, grid, interpolation_scale=scale, base_size=base)
    near(sincos_table(24, stretched(grid, base, scale))[0], want, 2e-5)  # positions are fp32 there


def test_stretched_to_its_own_size_is_plain_and_tables_of_two_sizes_agree() -> None:
    assert torch.equal(sincos_table(24, stretched((8, 8), 8)), sincos_table(24, (8, 8)))
    wide, narrow = (sincos_table(24, stretched((n, n), n, n / 8))[0].view(n, n, 24) for n in (16, 8))
    near(wide[::2, ::2], narrow)


def test_cropped_is_sd3s_stored_table() -> None:
    patches = theirs.PatchEmbed(height=64, width=64, patch_size=2, in_channels=4, embed_dim=24, pos_embed_max_size=24)
    near(sincos_table(24, cropped((10, 14), 24, 32))[0], patches.cropped_pos_embed(20, 28)[0], 2e-5)
    near(
        sincos_table(24, cropped((10, 14), 24, 32))[0].view(10, 14, 24),
        sincos_table(24, cropped((12, 16), 24, 32))[0].view(12, 16, 24)[1:-1, 1:-1],
    )
    with pytest.raises(DitkitError, match="24 tokens a side"):
        cropped((10, 25), 24, 32)


def test_video_code_of_cogvideox() -> None:
    """A quarter for time, then the column, then the row, whose coordinates are divided by 1.875."""
    grid = (3, Axis(4, 0, 1 / 1.875), Axis(6, 0, 1 / 1.875))
    want = theirs.get_3d_sincos_pos_embed(32, (6, 4), 3, 1.875)
    near(sincos_table(32, grid, order=(0, 2, 1), widths=(8, 12, 12))[0], want.flatten(0, 1), 2e-5)


def test_rows_are_unique_and_tables_shared() -> None:
    table = sincos_table(24, (32, 32, 32))[0]
    assert len(torch.unique(table, dim=0)) == 32**3
    assert sincos_table(24, (32, 32, 32)) is sincos_table(24, (32, 32, 32))


@pytest.mark.parametrize(("dim", "grid", "widths"), [(10, (2, 2), ()), (16, (2, 2, 2), ()), (8, (2, 2), (3, 5)), (8, (2, 2), (4, 2))])
def test_widths_that_do_not_fit_are_named(dim, grid, widths) -> None:
    with pytest.raises(DitkitError, match=f"dim is {dim}"):
        sincos_table(dim, grid, widths=widths)


# ---- rotary ------------------------------------------------------------------------------------------------------------------


def turn(q: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Independent: complex multiplication of the pairs 2j, 2j + 1."""
    z = torch.view_as_complex(q.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def heads(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, n, d, generator=torch.Generator().manual_seed(seed))


def test_interleaved_is_complex_multiplication() -> None:
    rope, q = Rope((4, 6, 6)), heads(2 * 3 * 4, 16)
    coords = coordinates((2, 3, 4))[0]
    angles = torch.cat([coords[:, a, None] * 10_000.0 ** (-torch.arange(0, w, 2).double() / w) for a, w in enumerate((4, 6, 6))], -1)
    near(rope.apply(q, rope.table((2, 3, 4))), turn(q, angles), 1e-6)


def permutation(kind: str) -> list[int]:
    """Where the channels of an interleaved head of 4 + 8 stand in the other pairings."""
    pairs = {"halves": [(j, j + 6) for j in range(6)], "halves by axis": [(0, 2), (1, 3), *((4 + j, 8 + j) for j in range(4))]}[kind]
    return [c for pair in pairs for c in pair]


@pytest.mark.parametrize("kind", ["halves", "halves by axis"])
def test_pairings_are_permutations_of_each_other(kind) -> None:
    """The same pairs are turned by the same angles, wherever they stand."""
    q, plain, other, where = heads(6, 12), Rope((4, 8)), Rope((4, 8), kind), permutation(kind)
    moved = torch.empty_like(q)
    moved[..., where] = q
    near(other.apply(moved, other.table((2, 3)))[..., where], plain.apply(q, plain.table((2, 3))), 1e-6)


ROPES = [
    Rope((4, 6, 6)),
    Rope((4, 4, 4), "halves by axis"),
    Rope((6, 4, 2), "halves", ntk=3.0),
    Rope((4, 4, 4), mix="alternating"),
    Rope((4, 6, 6), "halves by axis", order=(2, 0, 1), linear=2.0),
]


@pytest.mark.parametrize("rope", ROPES)
def test_products_depend_on_differences_only_and_lengths_stay(rope) -> None:
    d = sum(rope.widths)
    q, k = heads(24, d), heads(24, d, 1)
    layout = grid_layout((2, 3, 4))
    dots = []
    for shift in (0.0, 17.0):
        table = rope.at(layout.coords + shift)
        dots.append(rope.apply(q, table) @ rope.apply(k, table).transpose(-1, -2))
    near(dots[0], dots[1], 2e-5)
    near(rope.apply(q, rope.table((2, 3, 4))).norm(dim=-1), q.norm(dim=-1))
    assert not torch.allclose(dots[0], q @ k.transpose(-1, -2), atol=1e-2)


@pytest.mark.parametrize(("linear", "ntk"), [(1.0, 1.0), (2.0, 1.0), (1.0, 10.0)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_one_axis_is_diffusers(linear, ntk, interleaved) -> None:
    want = theirs.get_1d_rotary_pos_embed(
        16, 50, use_real=True, linear_factor=linear, ntk_factor=ntk, repeat_interleave_real=interleaved, freqs_dtype=torch.float64
    )
    got = Rope((16,), "interleaved" if interleaved else "halves", linear=linear, ntk=ntk).table((50,))
    q = heads(50, 16)
    for a, b in zip(got, want):
        near(a[0], b, 1e-6)
    near(
        apply_rope(q, got, "interleaved" if interleaved else "halves"),
        theirs.apply_rotary_emb(q, want, use_real_unbind_dim=-1 if interleaved else -2),
        1e-6,
    )


def test_flux() -> None:
    """Text at 0, pictures at (0, row, column), a reference picture at (1, row, column)."""
    picture = torch.cat([torch.zeros(12, 1), coordinates((3, 4))[0].float()], 1)
    ids = torch.cat([torch.zeros(5, 3), picture, picture + torch.tensor([1.0, 0, 0])])
    for a, b in zip(Rope((16, 56, 56)).at(ids[None]), FluxPosEmbed(10_000, [16, 56, 56])(ids)):
        near(a[0], b, 1e-6)


@pytest.mark.parametrize("size", [(30, 45), (32, 32), (20, 40), (60, 30)])
def test_cogvideox(size) -> None:
    crop = get_resize_crop_region_for_grid(size, 45, 30)
    want = theirs.get_3d_rotary_pos_embed(64, crop, size, 3)
    got = Rope((16, 24, 24)).table((3, *fitted(size, (30, 45))))
    for a, b in zip(got, want):
        near(a[0], b, 2e-5)  # positions are fp32 there
    plain = theirs.get_3d_rotary_pos_embed(64, None, size, 3, grid_type="slice", max_size=(60, 60))
    near(Rope((16, 24, 24)).table((3, *size))[0][0], plain[0], 1e-5)


def test_hunyuan() -> None:
    """The column first; 1024 pixels are positions 0, 0.5, ... on a base of 32."""
    start, stop = get_resize_crop_region_for_grid((64, 64), 32, 32)
    want = theirs.get_2d_rotary_pos_embed(88, (start, stop), (64, 64), output_type="pt")
    axes = fitted((64, 64), (32, 32))
    assert axes == (Axis(64, 0, 0.5), Axis(64, 0, 0.5))
    for a, b in zip(Rope((44, 44), order=(1, 0)).table(axes), want):
        near(a[0], b, 2e-5)


def test_lumina() -> None:
    want = theirs.get_2d_rotary_pos_embed_lumina(16, 5, 7, ntk_factor=4.0)
    cos, sin = Rope((8, 8), mix="alternating", ntk=4.0).table((5, 7))
    near(torch.complex(cos, sin)[0, :, ::2].real, want.flatten(0, 1).real, 1e-5)
    near(torch.complex(cos, sin)[0, :, ::2].imag, want.flatten(0, 1).imag, 1e-5)


def test_ntk_leaves_the_first_frequency_and_divides_the_last() -> None:
    plain, ntk = frequencies(16), frequencies(16, ntk=4.0)
    assert ntk[0] == plain[0] == 1
    assert float(plain[-1] / ntk[-1]) == pytest.approx(4.0 ** (14 / 16))
    assert torch.equal(frequencies(16, linear=4.0), plain / 4)


def test_frequency_aware_interpolates_the_trained_period_exactly() -> None:
    """The index at which b^(2k / d) = L / 2 pi gets 1 / s; below it, all get exactly interpolation."""
    width, s, length = 64, 4.0, 2 * math.pi * 100  # b^(2k/d) = 100 at k = 16
    got, plain = frequency_aware(width, s, length), frequencies(width)
    near(got[16:], plain[16:] / s, 1e-12)
    assert (got[1:16] > plain[1:16] / s).all()
    assert got[0] == 1


def test_time_aware_goes_from_interpolation_to_ntk() -> None:
    near(time_aware(16, 4.0, 0.0), frequencies(16, ntk=4.0), 1e-12)
    near(time_aware(16, 4.0, 1.0)[1:], frequencies(16, linear=4.0)[1:], 1e-12)
    between = time_aware(16, 4.0, 0.5)
    assert ((between <= frequencies(16, ntk=4.0)) & (between >= frequencies(16, linear=4.0))).all()
    rope = Rope((16, 16))
    near(rope.at(coordinates((2, 2)), [time_aware(16, 4.0, 0.0)] * 2)[0], Rope((16, 16), ntk=4.0).table((2, 2))[0], 1e-6)


def test_tables_are_cached_by_everything_that_they_depend_on() -> None:
    """A published cache forgot the scale: two axes of equal length shared one table."""
    rope = Rope((4, 4))
    assert rope.table((3, 3)) is Rope((4, 4)).table((3, 3))
    scaled = rope.table((Axis(3, 0, 0.5), 3))[0]
    assert not torch.equal(scaled[0, :, :4], rope.table((3, 3))[0][0, :, :4])
    assert torch.equal(scaled[0, :, 4:], rope.table((3, 3))[0][0, :, 4:])


def test_dtype_is_kept_and_angles_are_fp32() -> None:
    q = heads(300, 16)
    rope = Rope((16,))
    low = rope.apply(q.bfloat16(), rope.table((300,)))
    assert low.dtype == torch.bfloat16
    near(low, rope.apply(q.bfloat16().float(), rope.table((300,))), 3e-2)
    assert rope.apply(q, None) is q


def test_streams_without_positions_are_not_turned() -> None:
    """Concatenated with text that has no positions, the picture's table is filled with the identity."""
    from ditkit.core.streams import Layout, Stream

    rope = Rope((4, 4))
    img = Stream(torch.zeros(1, 4, 3), grid_layout((2, 2)), rope=rope.table((2, 2)))
    text = Stream(torch.zeros(1, 2, 3), Layout(torch.zeros(1, 2, 2), 2))
    q = heads(6, 8)[:1]
    got = rope.apply(q, concatenate(text, img).rope)
    assert torch.equal(got[:, :, :2], q[:, :, :2])
    near(got[:, :, 2:], rope.apply(q[:, :, 2:], img.rope), 1e-7)


@pytest.mark.parametrize("values", [{"widths": (3, 4)}, {"widths": (4, 6), "mix": "alternating"}, {"widths": (4, 4), "order": (0, 2)}])
def test_mistakes_are_named(values) -> None:
    with pytest.raises(DitkitError):
        Rope(**values)
    with pytest.raises(DitkitError, match="3 position axes"):
        Rope((4, 4)).at(torch.zeros(1, 2, 3))
