"""Text: what a prompt becomes depends on nothing beside it, and reaches the right picture (cases A15, A19, A20, A21)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ditkit
from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.backbones.mmdit import MMDiT
from ditkit.backbones.pixart import PixArt
from ditkit.bundle import BundleConfig, DataCard, EncoderPart, Part, Sampling
from ditkit.cli import sample
from ditkit.conditioning import Text, encoder_from, network_inputs
from ditkit.conditioning.cache import TextCache
from ditkit.conditioning.encoders.bytes import ByteEncoder
from ditkit.core.backbone import Backbone
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.core.view import projections
from ditkit.eval.pipelines import Setting, compare_pipelines, variants
from ditkit.loading import empty_model
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.specs import parse_spec
from ditkit.output import read_record
from ditkit.pipeline import Pipeline

PROMPTS = ["a red chess knight above a heart", "blue"]


def encoder(**values: Any) -> ByteEncoder:
    torch.manual_seed(1)
    return ByteEncoder(**{"dim": 10, "depth": 1, "num_heads": 2, "max_length": 12, **values})


def backbone(kind: str, **values: Any) -> Backbone:
    """A tiny network that fits the encoder, with every parameter drawn."""
    shape: dict[str, Any] = dict(input_size=(8, 8), in_channels=3, dim=24, depth=1, num_heads=2, mlp_ratio=2.0, text_dim=10)
    torch.manual_seed(0)
    if kind == "mmdit":
        return draw_parameters(MMDiT(**shape, out_channels=3, pooled_dim=10, position_size=4)).eval()
    return draw_parameters(
        PixArt(**{**shape, "out_channels": 6, "text_length": 12, "position_base": 4, "null_caption": False, **values})
    ).eval()


def pipeline(kind: str = "pixart", model: Backbone | None = None, text: ByteEncoder | None = None, **sampling: Any) -> Pipeline:
    model = backbone(kind) if model is None else model
    model.encoder = text or encoder()
    process = Part(name="gaussian", config={"prediction": "v", "variance": "learned"}) if kind == "pixart" else Part(name="flow")
    config = BundleConfig(
        backbone=Part(name=kind, config=model.config.to_dict()),
        process=process,
        encoder=EncoderPart(**model.encoder.card()),
        data=DataCard(name="scenes", shape=(3, 8, 8), captions=("a red circle", "a green square")),
        sampling=Sampling(
            solver="ddim" if kind == "pixart" else "euler", **{"num_inference_steps": 2, "guidance": {"scale": 2.0}, **sampling}
        ),
    )
    return Pipeline(model, config)


@pytest.fixture(scope="module", params=["pixart", "mmdit"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return pipeline(request.param)


def x_of(pipe: Pipeline, prompt: Any, **options: Any) -> torch.Tensor:
    return pipe(prompt=prompt, progress=False, **options).x


# the byte encoder


def test_words_are_runs_of_letters_and_single_signs() -> None:
    """By the rule: é is two bytes of UTF-8; case is folded; a long run goes on in the next token; spaces do not count."""
    text = encoder(word_bytes=4)
    assert text.words("A  café, \n42!") == [b"a", b"caf\xc3", b"\xa9", b",", b"42", b"!"]
    assert encoder(word_bytes=4, fold_case=False).words("A") == [b"A"]
    assert text.words("cafe\u0301") == text.words("caf\u00e9")  # two ways to write the same text
    assert text.words("") == []


def test_states_depend_on_the_prompt_alone() -> None:
    text = encoder()
    both, alone = text.encode(PROMPTS), text.encode(PROMPTS[1:])
    assert both.mask.sum(1).tolist() == [8, 2]  # 7 words or 1, and the end
    assert torch.allclose(both.states[1], alone.states[0], atol=1e-6)
    assert both.pooled is not None
    assert torch.allclose(both.pooled[1], both.states[1, :2].mean(0), atol=1e-6)
    assert not both.states[1, 2:].any()


def test_states_do_not_depend_on_the_padding() -> None:
    short = encoder(max_length=9)
    long = encoder(max_length=30)
    weights = short.state_dict()
    weights["position.weight"] = torch.cat([weights["position.weight"], torch.randn(21, 10)])
    long.load_state_dict(weights)
    a, b = short.encode(PROMPTS), long.encode(PROMPTS)
    assert torch.allclose(a.states, b.states[:, :9], atol=1e-6)


def test_a15_long_prompts_are_refused_or_cut_with_their_end() -> None:
    """A15: captions of 7, 8, 9 and 20 tokens, limit 8."""
    text = encoder(max_length=8)
    prompts = [" ".join("abcdefghijklmnopqrs"[: n - 1]) for n in (7, 8, 9, 20)]
    with pytest.raises(DitkitError, match=r"prompt 'a b c d e f g h' has 9 tokens; allowed: at most 8.*long_prompts"):
        text.tokenize(prompts)
    tokens = text.tokenize(prompts, "truncate")
    assert tokens.truncated == 2
    last = tokens.tokens[torch.arange(4), tokens.mask.sum(1) - 1]
    assert last[:, 0].tolist() == [256] * 4  # the end mark
    explicit = text.encode(["a b c d e f g"]).states[0]
    assert torch.allclose(text.encode(prompts, "truncate").states[3], explicit, atol=1e-6)
    with pytest.raises(DitkitError, match="long_prompts is 'cut'"):
        text.tokenize(["a"], "cut")  # type: ignore[arg-type]


def test_what_is_no_prompt_is_refused() -> None:
    for wrong, words in ((["a", 3], "a prompt is 3"), ([], r"prompts are \[\]"), ("a", "prompts are 'a'"), (["a\ud800"], "surrogate")):
        with pytest.raises(DitkitError, match=words):
            encoder().encode(wrong)  # type: ignore[arg-type]


def test_encoders_are_found_by_name() -> None:
    assert encoder_from("bytes", {"dim": 8}).dim == 8
    with pytest.raises(DitkitError, match="there is no encoder 'byte'.*did you mean"):
        encoder_from("byte")
    with pytest.raises(ConfigError, match="unknown key 'width'"):
        encoder_from("bytes", {"width": 8})


# what reaches the network


@pytest.mark.parametrize("kind", ["pixart", "mmdit"])
def test_a20_padding_changes_nothing_where_it_is_masked(kind: str) -> None:
    """A20: the same 7 tokens padded to 16 and to 64, whatever stands in the padding."""
    model = backbone(kind)
    text = Text(torch.randn(2, 7, 10), torch.ones(2, 7, dtype=torch.bool), torch.randn(2, 10))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([100.0, 700.0])
    outputs = []
    for length in (7, 16, 64):
        padded = text.padded(length)
        padded.states[:, 7:] = torch.randn(2, length - 7, 10)
        outputs.append(model(x, t, **network_inputs(model, padded)))
    assert max((out - outputs[0]).abs().max() for out in outputs) <= 1e-5
    seen = model(x, t, **network_inputs(model, text.padded(16), masked=False))
    assert (seen - outputs[0]).abs().max() > 1e-4


def test_a19_every_tensor_goes_with_its_picture() -> None:
    """A19: 2 prompts of 3 and 1 tokens, 2 images each, in the order p0, p0, p1, p1."""
    text = Text(torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(), torch.tensor([[0.0], [1.0]]))
    wide = text.take([0, 0, 1, 1])
    assert wide.mask.tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert wide.pooled is not None
    assert wide.pooled.flatten().tolist() == [0, 0, 1, 1]


def test_a19_picture_i_of_prompt_p_equals_the_run_of_that_prompt_alone(pipe: Pipeline) -> None:
    out = pipe(prompt=PROMPTS, num_images_per_prompt=2, negative_prompt=["dark", ""], seed=3, progress=False)
    assert out.record["prompts"] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert out.record["negative_prompts"] == ["dark", "dark", "", ""]
    for p, negative in enumerate(("dark", "")):
        alone = x_of(pipe, PROMPTS[p], num_images=2, negative_prompt=negative, seed=3 + 2 * p)
        assert (out.x[2 * p : 2 * p + 2] - alone).abs().max() <= 1e-5
    assert (out.x[1] - x_of(pipe, PROMPTS[1], seed=4)[0]).abs().max() > 1e-3  # another prompt, another picture


def test_precomputed_states_stand_for_prompts(pipe: Pipeline) -> None:
    """A19: they expand in the same order."""
    assert pipe.encoder is not None
    with torch.no_grad():
        text = pipe.encoder.encode(PROMPTS)
    given = x_of(pipe, None, prompt_embeds=text, num_images=4)
    assert (given - x_of(pipe, PROMPTS, num_images=4)).abs().max() <= 1e-5
    away = x_of(pipe, PROMPTS, num_images=4, negative_prompt_embeds=text.take([1]))
    assert (away - x_of(pipe, PROMPTS, num_images=4, negative_prompt="blue")).abs().max() <= 1e-5


def test_a21_a_picture_does_not_depend_on_its_batch() -> None:
    """A21: DDPM, 10 steps, seeds 0 to 3, as 4, 2 + 2 and 1 + 1 + 1 + 1."""
    pipe = pipeline("pixart")
    options = dict(num_images=4, solver="ddpm", num_inference_steps=10)
    whole, pairs, singles = (x_of(pipe, PROMPTS, batch_size=n, **options) for n in (4, 2, 1))
    assert (whole - pairs).abs().max() <= 1e-5
    assert (whole - singles).abs().max() <= 1e-5


def test_guidance_leads_away_from_the_empty_prompt_unless_another_is_given(pipe: Pipeline) -> None:
    plain = x_of(pipe, "blue")
    assert torch.equal(plain, x_of(pipe, "blue", negative_prompt=""))
    assert (plain - x_of(pipe, "blue", negative_prompt="red")).abs().max() > 1e-3
    assert torch.equal(x_of(pipe, "blue", guidance_scale=0.0), x_of(pipe, "red", guidance_scale=0.0))  # 0: unconditional


def test_guidance_is_the_combination_of_the_two_prompts(pipe: Pipeline) -> None:
    """u + s (c - u) with u the negative prompt: at s = 0 it is that prompt's own picture."""
    own = x_of(pipe, "red", guidance_scale=1.0)
    assert (x_of(pipe, "blue", negative_prompt="red", guidance_scale=0.0) - own).abs().max() <= 1e-5


def test_a_file_remakes_exactly_its_picture(pipe: Pipeline, tmp_path: Path) -> None:
    out = pipe(prompt=PROMPTS, negative_prompt="dark", seed=5, progress=False)
    out.save_each(tmp_path)
    record = read_record(next(tmp_path.glob("00001-*.png")))
    assert (record["prompt"], record["negative_prompt"], record["seed"]) == ("blue", "dark", 6)
    again = pipe.remake(record)
    assert torch.equal(again.x, pipe.remake(out.picture_record(1)).x)
    assert (again.x[0] - out.x[1]).abs().max() <= 1e-5


def test_methods_see_prompts_as_any_conditioning(pipe: Pipeline) -> None:
    fast = pipe.with_methods(FORA(interval=2))
    assert fast.encoder is pipe.encoder
    base, reused = (x_of(p, PROMPTS, num_inference_steps=3) for p in (pipe, fast))
    assert (reused - base).abs().max() > 0
    alone = x_of(fast, PROMPTS[1], num_inference_steps=3, seed=1)
    assert (reused[1] - alone[0]).abs().max() <= 1e-5


# what the caller may and may not say


def test_a_benchmark_asks_for_captions_and_compares_the_same_ones() -> None:
    captioned = pipeline("pixart")
    todo = variants({"base": captioned}, [parse_spec("fora:interval=2"), parse_spec("lora")])
    setting = Setting(num_images=3, num_samples=3, num_inference_steps=3, repeats=1, warmups=0)
    result, samples = compare_pipelines(todo, setting, progress=False)
    assert torch.equal(samples["base"].x, samples["lora"].x)
    assert torch.allclose(samples["base"].x[:1], x_of(captioned, "a red circle", num_inference_steps=3, seed=0), atol=1e-5)
    assert {r.name for r in result.rows} >= {"base", "fora:interval=2"}


def test_a_bundle_holds_its_encoder(pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["encoder"]["name"] == "bytes"
    assert config["encoder"]["config"]["max_length"] == 12
    again = ditkit.from_pretrained(tmp_path / "b", device="cpu")
    assert torch.equal(x_of(again, PROMPTS), x_of(pipe, PROMPTS))
    assert sample.main([str(tmp_path / "b"), "--prompt", "a red circle", "blue", "--device", "cpu", "-o", str(tmp_path / "o.png")]) == 0
    assert read_record(tmp_path / "o.png")["prompts"] == ["a red circle", "blue"]
    assert "2 pictures" in capsys.readouterr().out


def test_without_a_prompt_the_examples_are_sampled(pipe: Pipeline) -> None:
    assert pipe(num_images=4, progress=False).record["prompts"] == ["a red circle"] * 2 + ["a green square"] * 2


def test_a_wrong_call_is_one_error(pipe: Pipeline) -> None:
    text = Text(torch.zeros(1, 3, 11), torch.ones(1, 3).bool(), torch.zeros(1, 10))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"class_labels": 3}, "is told captions, and class_labels is given; allowed: prompt"),
        ({"prompt": []}, "is told captions, and none is given"),
        ({"prompt": 3}, "a prompt is 3; allowed: text"),
        ({"prompt": "a " * 20}, "has 21 tokens; allowed: at most 12"),
        ({"prompt": ["a", "b"], "num_images": 3}, "3 images for 2 prompts"),
        ({"prompt": ["a", "b"], "num_images": 2, "num_images_per_prompt": 1}, "both given"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c", "d", "e"]}, "3 negative prompts for 2 prompts"),
        ({"prompt": "a", "prompt_embeds": text}, "prompt and prompt_embeds are both given"),
        ({"prompt_embeds": text}, "states have width 11; allowed: 10"),
        ({"prompt": "a", "long_prompts": "cut"}, "long_prompts is 'cut'"),
    ]
    for call, words in wrong:
        with pytest.raises(DitkitError, match=words):
            pipe(progress=False, **call)
    cut = pipe(prompt="a " * 20, long_prompts="truncate", progress=False)
    assert (cut.record["truncated"], cut.record["long_prompts"]) == (1, "truncate")


def test_a_model_of_labels_refuses_prompts() -> None:
    model = DiT.tiny()
    config = BundleConfig(
        backbone=Part(name="dit", config=model.config.to_dict()),
        process=Part(name="gaussian", config={"prediction": "v"}),
        data=DataCard(name="noise", shape=(3, 8, 12)),
    )
    with pytest.raises(DitkitError, match="dit is told class labels, and prompt is given; allowed: class_labels"):
        Pipeline(model, config)(prompt="a", progress=False)


def test_a_model_without_an_encoder_takes_states_alone() -> None:
    model = backbone("pixart", null_caption=True)
    config = pipeline("pixart").config.model_copy(update={"encoder": None})
    model.encoder = None
    pipe = Pipeline(model, config)
    with pytest.raises(DitkitError, match="names no text encoder; next: .*text_encoder.*prompt_embeds"):
        pipe(prompt="a", progress=False)
    text = Text(torch.randn(1, 5, 10), torch.ones(1, 5).bool())
    assert pipe(prompt_embeds=text, progress=False).x.shape == (1, 3, 8, 8)  # guided by the network's own null caption
    with pytest.raises(DitkitError, match="was made from prompt_embeds"):
        pipe.remake(pipe(prompt_embeds=text, progress=False).picture_record(0))


# the encoder as a part of the model


def test_an_encoder_is_neither_quantised_nor_lost() -> None:
    model = pipeline("pixart").model
    assert not [path for path, _, _ in projections(model) if path.startswith("encoder")]
    built = empty_model(Part(name="pixart", config=model.config.to_dict()), "", EncoderPart(**model.encoder.card()))
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


# the cache


def test_the_cache_asks_for_new_prompts_only_and_never_hits_for_another_encoder(tmp_path: Path) -> None:
    text = encoder().eval()
    cache = TextCache(text, tmp_path, batch_size=2)
    assert cache.add([*PROMPTS, PROMPTS[0], ""], progress=False) == 3
    found = TextCache(text, tmp_path)
    again = found.encode([PROMPTS[1], PROMPTS[0]])
    assert found.encoded == 0
    want = text.encode([PROMPTS[1], PROMPTS[0]])
    assert torch.equal(again.mask, want.mask)
    assert torch.allclose(again.states, want.states, atol=1e-6)
    assert again.pooled is not None
    assert torch.allclose(again.pooled, want.pooled, atol=1e-6)  # type: ignore[arg-type]
    found.encode(["new"])
    assert found.encoded == 1
    with torch.no_grad():
        text.norm.weight.mul_(2)
    assert PROMPTS[0] not in TextCache(text, tmp_path)
    assert PROMPTS[0] not in TextCache(encoder(max_length=13), tmp_path)


def test_words_start_far_apart_and_what_they_share_is_the_smaller_part() -> None:
    """Else captions become one and the same while the network does not listen yet: padding bytes must not be a code of their own."""
    text = encoder(dim=64, num_heads=4, depth=2)
    words = ["red", "heart", "a", "umbrella", "on", "blue", "yellow", "knight", "above", "background"]
    tokens = text.tokenize(words)
    states = text(tokens.tokens, tokens.mask).states[:, 0]
    shared = states.mean(0)
    assert shared.square().sum() < 0.5 * states.square().sum(1).mean()
    assert text.byte.weight[257].abs().max() == 0
