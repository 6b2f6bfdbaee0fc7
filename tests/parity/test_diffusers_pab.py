"""PAB against diffusers' hook on its own PixArt: the same outputs along a trajectory, attention and cross-attention at their own ranges."""

import pytest
import torch
from golden import relative
from test_diffusers_pixart import ours_from, theirs

from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.interop.verify import quiet_imports
from ditkit.methods.efficiency.pab import PAB

with quiet_imports():
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

pytestmark = pytest.mark.parity


@torch.no_grad()
def test_trajectory():
    live, steps, now = theirs("alpha"), 20, {}
    ours = with_methods(ours_from(live), PAB(spatial=2, cross=3, window=(0.1, 0.8)))
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100, 800), cross_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: now["t"],
    )  # fmt: skip
    apply_pyramid_attention_broadcast(live, config)
    cfg, g = ours.config, torch.Generator().manual_seed(1)
    text, mask = torch.randn(2, 7, cfg.text_dim, generator=g), torch.ones(2, 7, dtype=torch.bool)
    x = torch.randn(2, cfg.in_channels, *cfg.input_size, generator=g)
    want, got, more = x, x, {"resolution": None, "aspect_ratio": None}
    run = Run(ours, steps)
    prepared = ours.prepare(text=text, mask=mask)
    for i in run.steps():
        now["t"] = round(1000 * (1 - i / steps))
        t = torch.full((2,), now["t"])
        out = live(want, text, timestep=t, added_cond_kwargs=more, encoder_attention_mask=mask.float()).sample
        want = want - out[:, : cfg.in_channels] / steps
        got = got - ours(got, t, prepared, run=run)[:, : cfg.in_channels] / steps
        assert relative(got, want) <= 1e-5, i
    # within 100 < t < 800 lie the steps 5 .. 17, of which 2 | i computes attention and 3 | i cross-attention
    assert run.finish() == {"pab": {"reused_steps": {"attn": 7, "cross": 9, "mlp": 0}, "hits": 16}}
