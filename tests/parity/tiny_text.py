"""Whole diffusers pipelines of a few thousand weights, text encoders and tokenizers included: SD3, FLUX and Hunyuan-DiT."""

import json

import tokenizers
import torch
import transformers

from ditkit.backbones.dit import draw_parameters
from ditkit.interop.verify import quiet_imports

with quiet_imports():
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
        HunyuanDiT2DModel,
        HunyuanDiTPipeline,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from diffusers.utils import logging as diffusers_logging

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
WORDS = ["<pad>", "</s>", "<s>", "a", "red", "blue", "heart", "circle", "on"]


def tokenizer(start, length, pad="<pad>", words=WORDS):
    """Words to numbers; an end mark after each prompt, before it a start mark of CLIP and BERT."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="on"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [(mark, words.index(mark)) for mark in ("</s>", "<s>")]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>" if start else "$A </s>", special_tokens=marks)
    special = dict(pad_token=pad, eos_token="</s>", bos_token="<s>", unk_token="on")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **special)


def clip(width, projection=None):
    """A CLIP's text model, its pooled vector projected where ``projection`` says to what width."""
    size = dict(vocab_size=9, hidden_size=width, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    config = transformers.CLIPTextConfig(
        **size, max_position_embeddings=77, projection_dim=projection or 3, pad_token_id=0, eos_token_id=1, bos_token_id=2
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config).eval()


def t5(width):
    """A T5 encoder."""
    config = transformers.T5Config(vocab_size=9, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return transformers.T5EncoderModel(config).eval()


def bert(width):
    """A BERT."""
    size = dict(vocab_size=9, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return transformers.BertModel(transformers.BertConfig(**size, max_position_embeddings=77)).eval()


def vae(blocks=1):
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        shift_factor=0.1 if blocks == 1 else None,
        scaling_factor=1.5,
    ).eval()


def sd3(with_t5=True):
    """Latents of 8 x 8; both CLIPs tokenise alike, but for what they pad with, as released."""
    model = SD3Transformer2DModel(
        num_layers=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        pos_embed_max_size=6,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=draw_parameters(model).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip(6, 5),
        tokenizer=tokenizer(True, 77, pad="</s>"),
        text_encoder_2=clip(8, 7),
        tokenizer_2=tokenizer(True, 77),
        text_encoder_3=t5(20) if with_t5 else None,
        tokenizer_3=tokenizer(False, 512) if with_t5 else None,
    )


def flux(guidance=True):
    """Latents of 8 x 8, though nothing in the folder says so; ``guidance``: dev, not schnell."""
    model = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        in_channels=16,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 4),
        guidance_embeds=guidance,
    )
    return FluxPipeline(
        transformer=draw_parameters(model).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance, shift=3.0 if guidance else 1.0),
        vae=vae(),
        text_encoder=clip(12),
        tokenizer=tokenizer(True, 77),
        text_encoder_2=t5(20),
        tokenizer_2=tokenizer(False, 512),
    )


def hunyuan(sizes=True):
    """Latents of 8 x 8, pictures of 64 x 64; ``sizes``: version 1.1, which is told them."""
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=12,
        text_len=77,
        text_len_t5=256,
        use_style_cond_and_image_meta_size=sizes,
    )
    betas = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.03)
    return HunyuanDiTPipeline(
        transformer=draw_parameters(model).eval(),
        scheduler=DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False),
        vae=vae(4),
        text_encoder=bert(24),
        tokenizer=tokenizer(True, 77),
        text_encoder_2=t5(16),
        tokenizer_2=tokenizer(False, 256),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def made(build, **options):
    """A pipeline with weights that are always the same."""
    torch.manual_seed(0)
    pipe = build(**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(live, folder):
    """``folder``, in which the pipeline is."""
    live.save_pretrained(folder)
    if type(live).__name__ == "FluxPipeline":  # nothing in its folder says the trained size
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_ditkit": {"input_size": [8, 8]}}))
    return folder
