"""Tiny untrained bundles: one that is told classes, one that is told captions."""

import pytest
import torch

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.backbones.mmdit import MMDiT
from ditkit.bundle import BundleConfig, DataCard, EncoderPart, Part, Sampling
from ditkit.conditioning.encoders.bytes import ByteEncoder
from ditkit.pipeline import Pipeline


def save(folder, model, encoder=None, **data):
    config = BundleConfig(
        backbone=Part(name=model.name, config=model.config.to_dict()),
        process=Part(name="flow"),
        encoder=None if encoder is None else EncoderPart(**encoder.card()),
        data=DataCard(name="noise", shape=(3, 8, 8), **data),
        sampling=Sampling(solver="euler", num_inference_steps=4, guidance={"scale": 2.0}),
    )
    Pipeline(model, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    model = DiT.tiny(input_size=(8, 8), out_channels=3, depth=2)
    return save(tmp_path_factory.mktemp("app") / "labelled", model, labels=("ant", "bee", "cat", "dog", "eel"))


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    torch.manual_seed(0)
    encoder = draw_parameters(ByteEncoder(dim=10, depth=1, num_heads=2, max_length=12)).eval()
    sizes = dict(input_size=(8, 8), in_channels=3, out_channels=3, dim=24, depth=1, num_heads=2, mlp_ratio=2.0)
    model = draw_parameters(MMDiT(**sizes, text_dim=10, pooled_dim=10, position_size=4)).eval()
    model.encoder = encoder
    return save(tmp_path_factory.mktemp("app") / "captioned", model, encoder, captions=("a red circle", "a blue heart"))
