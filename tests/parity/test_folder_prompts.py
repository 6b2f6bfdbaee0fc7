"""A diffusers folder with its text encoder: from a prompt to pixels, as the pipeline that saved it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative

import ditkit
from ditkit.backbones.dit import draw_parameters
from ditkit.core.errors import DitkitError
from ditkit.diffusion import noise
from ditkit.interop.verify import quiet_imports

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

with quiet_imports():
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        LuminaNextDiT2DModel,
        LuminaPipeline,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )
    from diffusers.utils import logging as diffusers_logging

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:__array__ implementation")]  # diffusers with numpy 2

WORDS = ["<pad>", "</s>", "<s>", "a", "red", "blue", "heart", "circle", "on"]
SIZES: dict[str, Any] = dict(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=2)


def tokenizer() -> Any:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = dict(pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="right", **marks)


def vae() -> Any:
    return draw_parameters(AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4))


def pixart(cls: Any) -> Any:
    shape = dict(num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2, caption_channels=16, sample_size=8)
    network = draw_parameters(PixArtTransformer2DModel(**shape))
    encoder = transformers.T5EncoderModel(transformers.T5Config(**SIZES, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    return cls(tokenizer(), encoder.eval(), vae(), network, DPMSolverMultistepScheduler())


def lumina() -> Any:
    shape = dict(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=16, cross_attention_dim=16)
    network = draw_parameters(LuminaNextDiT2DModel(**shape))
    for layer in network.layers:  # the released network has one copy of queries
        layer.attn2.to_q.load_state_dict(layer.attn1.to_q.state_dict())
        layer.attn2.norm_q.load_state_dict(layer.attn1.norm_q.state_dict())
    gemma = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24)
    encoder = transformers.GemmaModel(transformers.GemmaConfig(**SIZES, **gemma))
    return LuminaPipeline(network, FlowMatchEulerDiscreteScheduler(shift=2.0), vae(), encoder.eval(), tokenizer())


FAMILIES = {
    "pixart-alpha": (lambda: pixart(PixArtAlphaPipeline), {"clean_caption": False, "use_resolution_binning": False}, {}),
    "pixart-sigma": (lambda: pixart(PixArtSigmaPipeline), {"clean_caption": False, "use_resolution_binning": False}, {}),
    "lumina": (lumina, {"clean_caption": False}, {"solver": "euler", "solver_options": {"spacing": "twice"}}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_becomes_the_pipelines_picture(name: str, tmp_path: Path) -> None:
    make, told, options = FAMILIES[name]
    torch.manual_seed(0)
    theirs = make()
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "f")
    pipe = ditkit.from_pretrained(tmp_path / "f", device="cpu")
    assert pipe.encoder is not None
    assert pipe.encoder.config.max_length == {"pixart-alpha": 120, "pixart-sigma": 300, "lumina": 256}[name]
    start = noise.normal([7], 0, "start", (4, 8, 8))
    size = dict(height=8 * theirs.vae_scale_factor, width=8 * theirs.vae_scale_factor)
    for words in ({"prompt": " A red Heart "}, {"prompt": "blue circle", "negative_prompt": "a heart on a circle"}):
        want = theirs(**words, **told, **size, num_inference_steps=4, guidance_scale=3.0, latents=start, output_type="pt").images
        got = pipe(**words, guidance_scale=3.0, num_inference_steps=4, seed=7, progress=False, **options)
        assert ((want > 0) & (want < 1)).float().mean() > 0.5, "most pixels are no clipped ones"
        assert relative(got.x, 2 * want - 1) <= 1e-5
    with pytest.raises(DitkitError, match="tokens"):
        pipe(prompt="heart " * 400, progress=False)
