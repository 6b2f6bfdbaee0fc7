"""LoRA files of PEFT, diffusers and kohya: cases A09, A10, A11, round trips, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditkit.backbones.dit import DiT
from ditkit.core import registry
from ditkit.core.errors import ConfigError, DitkitError, WeightsError
from ditkit.core.files import TensorFile, read_tensors, write_tensors
from ditkit.core.view import with_methods
from ditkit.interop.lora import load_lora, save_lora
from ditkit.interop.lora_factors import Factors, join_rows, pick_rows
from ditkit.interop.lora_files import METADATA, read_pairs
from ditkit.interop.tables import SWAP
from ditkit.methods.adaptation.lora import LoRA
from ditkit.testing.trajectory import sample

DIM, DEPTH = 32, 4  # of DiT.tiny


@pytest.fixture
def dit() -> DiT:
    return DiT.tiny()


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(module: str, fan_in: int, out: int, rank: int, names: tuple[str, str] = ("lora_A", "lora_B"), seed: int = 0) -> dict[str, Tensor]:
    """The two tensors of one module."""
    return {f"{module}.{names[0]}.weight": drawn((rank, fan_in), seed), f"{module}.{names[1]}.weight": drawn((out, rank), seed + 1)}


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: Any = None, name: str = "lora.safetensors") -> Path:
    write_tensors(folder / name, tensors, metadata)
    return folder / name


def change(tensors: Mapping[str, Tensor], module: str, alpha: float | None = None) -> Tensor:
    """(alpha / r) B A of one module of a file, in float64."""
    a = next(u for k, u in tensors.items() if k.startswith(f"{module}.") and ("lora_A" in k or "down" in k)).double()
    b = next(u for k, u in tensors.items() if k.startswith(f"{module}.") and ("lora_B" in k or "up" in k)).double()
    return (1.0 if alpha is None else alpha / len(a)) * b @ a


def close(got: Tensor, want: Tensor) -> bool:
    return float((got.detach().double() - want).abs().max()) <= 1e-6 * max(1.0, float(want.abs().max()))


# A09, A10: rows of W are rows of B


def test_a09_swapping_the_halves_of_the_last_modulation_swaps_b_only() -> None:
    """Hidden 8: A (4, 8), B (16, 4). Round trip bit-exact; swap(B A) = swap(B) A; A swapped too would be another matrix."""
    f = Factors(drawn((4, 8)), drawn((16, 4), 1), 4.0)
    rows = SWAP.export(torch.arange(16)[:, None], 1)[0].flatten()
    theirs = pick_rows(f, rows)
    assert torch.equal(theirs.a, f.a)
    assert torch.equal(theirs.delta(), torch.cat([f.delta()[8:], f.delta()[:8]]))
    back = join_rows([(theirs, rows)], 16)
    assert torch.equal(back.a, f.a)
    assert torch.equal(back.b, f.b)
    assert back.alpha == 4.0
    wrong = theirs.b @ torch.cat([f.a[:, 4:], f.a[:, :4]], 1)
    assert float((wrong - theirs.delta()).abs().max()) > 1


@pytest.mark.parametrize("rank", range(1, 9))
def test_a10_a_fused_pair_comes_apart_with_a_whole(rank: int) -> None:
    """Hidden 8, A (r, 8), B (24, r), alpha 2: the stacked parts are (alpha / r) B A, for ranks that 3 divides too."""
    f = Factors(drawn((rank, 8)), drawn((24, rank), 1), 2.0)
    parts = [pick_rows(f, torch.arange(start, start + 8)) for start in (0, 8, 16)]
    assert all(torch.equal(p.a, f.a) and p.alpha == 2.0 for p in parts)
    want = 2.0 / rank * f.b.double() @ f.a.double()
    assert close(torch.cat([p.delta() for p in parts]), want)
    joined = join_rows([(p, torch.arange(8 * i, 8 * i + 8)) for i, p in enumerate(parts)], 24)
    assert torch.equal(joined.a, f.a), "one A for all three stays one"
    assert torch.equal(joined.b, f.b)


@pytest.mark.parametrize("rank", [1, 3, 6, 8])
def test_a10_on_a_model(dit: DiT, tmp_path: Path, rank: int) -> None:
    tensors = pair("blocks.2.attn.qkv", DIM, 3 * DIM, rank)
    file = write(tmp_path, {**tensors, "blocks.2.attn.qkv.alpha": torch.tensor(2.0)})
    lora = load_lora(file, dit).lora
    theirs = read_tensors(save_lora(tmp_path / "out", lora, dit))
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        module = f"transformer.transformer_blocks.2.attn1.{name}"
        assert torch.equal(theirs[f"{module}.lora_A.weight"], tensors["blocks.2.attn.qkv.lora_A.weight"])
        want = change(tensors, "blocks.2.attn.qkv", 2.0)[k * DIM : (k + 1) * DIM]
        assert close(change(theirs, module, 2.0), want)


def test_separate_q_k_v_are_joined_exactly_and_come_apart_again(dit: DiT, tmp_path: Path) -> None:
    """Ranks add up, B is block-diagonal; a projection that is not adapted stays so."""
    base = "transformer.transformer_blocks.0.attn1."
    tensors = {**pair(base + "to_q", DIM, DIM, 2, seed=1), **pair(base + "to_v", DIM, DIM, 5, seed=3)}
    lora = load_lora(write(tmp_path, tensors), dit).lora
    assert {n: (t.rank, t.scale) for n, t in lora.targets.items()} == {"blocks.0.img.qkv": (7, 1.0)}
    got = lora.delta("blocks.0.img.qkv")
    assert close(got, torch.cat([change(tensors, base + "to_q"), torch.zeros(DIM, DIM).double(), change(tensors, base + "to_v")]))
    again = read_tensors(save_lora(tmp_path / "out", lora, dit))
    assert set(again) == set(tensors)
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)


def test_separate_pairs_of_different_scales_are_joined_exactly(dit: DiT, tmp_path: Path) -> None:
    base, alphas = "transformer_blocks.0.attn1.", {"to_q": 8.0, "to_k": 1.0, "to_v": 3.0}
    tensors = {k: u for i, n in enumerate(alphas) for k, u in pair(base + n, DIM, DIM, 3, seed=i).items()}
    stored = {f"{base}{n}.alpha": torch.tensor(a) for n, a in alphas.items()}
    loaded = load_lora(write(tmp_path, {**tensors, **stored}), dit)
    assert close(loaded.lora.delta("blocks.0.img.qkv"), torch.cat([change(tensors, base + n, a) for n, a in alphas.items()]))
    assert {m.name.split(".")[-1]: (m.rank, m.alpha, m.scale) for m in loaded.report.modules} == {
        n: (3, a, a / 3) for n, a in alphas.items()
    }


# A11: scales


A11 = ("blocks.0.attn.proj", 4), ("blocks.1.attn.proj", 16)


@pytest.mark.parametrize("order", [A11, A11[::-1]], ids=["4 first", "16 first"])
@pytest.mark.parametrize(
    ("metadata", "scales"),
    [
        (None, (1.0, 1.0)),
        ({METADATA: json.dumps({"transformer.lora_alpha": 8})}, (2.0, 0.5)),
        ({METADATA: json.dumps({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"blocks.1.attn.proj": 4}})}, (2.0, 0.25)),
        ({METADATA: json.dumps({"lora_alpha": 8, "use_rslora": True})}, (4.0, 2.0)),
        ({"ss_network_alpha": "2"}, (0.5, 0.125)),
    ],
)
def test_a11_without_alpha_the_scale_is_one_whatever_comes_first(dit: DiT, tmp_path: Path, order: Any, metadata: Any, scales: Any) -> None:
    tensors = {k: u for module, rank in order for k, u in pair(module, DIM, DIM, rank, seed=rank).items()}
    loaded = load_lora(write(tmp_path, tensors, metadata), dit)
    assert tuple(loaded.lora.targets[f"blocks.{i}.img.proj"].scale for i in (0, 1)) == scales
    assert tuple(m.scale for m in loaded.report.modules) == scales
    assert all(f"scale {s:g}" in str(loaded.report) for s in scales)
    for (module, rank), scale in zip(A11, scales):
        assert close(loaded.lora.delta(f"blocks.{module[7]}.img.proj"), change(tensors, module, scale * rank))


def test_a11_an_alpha_of_the_module_wins_over_the_file_s(dit: DiT, tmp_path: Path) -> None:
    tensors = pair("lora_unet_blocks_0_attn_proj", DIM, DIM, 4, ("lora_down", "lora_up"))
    file = write(tmp_path, {**tensors, "lora_unet_blocks_0_attn_proj.alpha": torch.tensor(1.0)}, {"ss_network_alpha": "8"})
    assert load_lora(file, dit).lora.targets["blocks.0.img.proj"].scale == 0.25


# Formats and names


NAMES = {
    "ada": ("adaLN_modulation.1", "norm1.linear"),
    "proj": ("attn.proj", "attn1.to_out.0"),
    "fc1": ("mlp.fc1", "ff.net.0.proj"),
    "fc2": ("mlp.fc2", "ff.net.2"),
}
SIZES = {"ada": (DIM, 6 * DIM), "proj": (DIM, DIM), "fc1": (DIM, 4 * DIM), "fc2": (4 * DIM, DIM)}


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize(
    ("format", "wrapper"),
    [
        ("peft", "base_model.model."),
        ("diffusers", "transformer."),
        ("diffusers", "diffusion_model."),
        ("diffusers", ""),
        ("kohya", "lora_unet_"),
    ],
)
def test_every_format_is_read_with_the_names_of_every_layout(dit: DiT, tmp_path: Path, format: str, wrapper: str, layout: str) -> None:
    tensors, modules = {}, {}
    for i in range(DEPTH):
        for k, (short, theirs) in enumerate(NAMES.items()):
            name = f"blocks.{i}.{theirs[0]}" if layout == "official" else f"transformer_blocks.{i}.{theirs[1]}"
            module = wrapper + (name.replace(".", "_") if format == "kohya" else name)
            modules[f"blocks.{i}.img.{short}"] = module
            tensors.update(
                pair(module, *SIZES[short], 3, ("lora_down", "lora_up") if format == "kohya" else ("lora_A", "lora_B"), i * 9 + k)
            )
    loaded = load_lora(write(tmp_path, tensors), dit)
    assert (loaded.report.format, loaded.report.applied, loaded.report.pairs) == (format, 16, 16)
    assert "16 of 16 pairs applied" in str(loaded.report)
    assert loaded.lora.config.include == ("img.ada", "img.proj", "img.fc1", "img.fc2")
    assert set(loaded.lora.targets) == set(modules)
    for target, module in modules.items():
        assert close(loaded.lora.delta(target), change(tensors, module))
    for told in loaded.report.modules:
        assert told.max_delta == pytest.approx(
            float(change(tensors, next(m for m in tensors if told.name in m).rsplit(".", 2)[0]).abs().max())
        )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.sets(
        st.sampled_from([f"blocks.{i}.img.{n}" for i in range(DEPTH) for n in ("ada", "qkv", "proj", "fc1", "fc2")]), min_size=1
    ),
    format=st.sampled_from(["peft", "diffusers"]),
    layout=st.sampled_from(["ditkit", "official", "diffusers"]),
    data=st.data(),
)
def test_what_is_written_reads_back_the_same(tmp_path: Path, chosen: set[str], format: Any, layout: Any, data: Any) -> None:
    dit = DiT.tiny()
    ranks = {n: data.draw(st.integers(1, 6)) for n in sorted(chosen)}
    alphas = {n: data.draw(st.sampled_from([0.5, 1.0, 4.0, 7.0])) for n in sorted(chosen)}
    lora = LoRA(include=tuple(sorted(chosen)), ranks=ranks, alphas=alphas)
    lora.build(dit)
    with torch.no_grad():
        for k, p in enumerate(lora.parameters()):
            p.copy_(drawn(tuple(p.shape), k))
    again = load_lora(save_lora(tmp_path, lora, dit, format, layout), dit).lora
    assert again.targets == lora.targets
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), lora.state_dict().values()))


def test_a_backbone_without_name_tables_keeps_its_own_names(tmp_path: Path) -> None:
    """Two streams, from another package: its module paths are the names."""
    model = registry.get("backbones", "two_streams").tiny()  # type: ignore[attr-defined]
    lora = LoRA(rank=2, include="qkv")
    lora.build(model)
    again = load_lora(save_lora(tmp_path, lora, model, "peft", "ditkit"), model).lora
    assert again.targets == lora.targets
    assert {n.split(".")[2] for n in again.targets} == {"img", "text"}
    with pytest.raises(DitkitError, match=r"layout 'diffusers'.*ditkit"):
        save_lora(tmp_path, lora, model)


def test_loaded_it_is_a_method_with_strength_and_label(dit: DiT, tmp_path: Path) -> None:
    file = write(tmp_path, {k: 0.1 * u for k, u in pair("blocks.0.attn.qkv", DIM, 3 * DIM, 4).items()})
    half = load_lora(file, dit, strength=0.5, label="style").lora
    assert sample(with_methods(dit, half)).isfinite().all()
    assert half.label == "style"
    assert half.config.strength == 0.5
    with pytest.raises(DitkitError, match="strength"):
        save_lora(tmp_path, half, dit)


# What is refused


GOOD = pair("blocks.0.attn.proj", DIM, DIM, 4)
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "half a pair": ({"blocks.1.attn.proj.lora_A.weight": torch.ones(4, DIM)}, r"blocks\.1\.attn\.proj has A only"),
    "alpha alone": ({"blocks.1.attn.proj.alpha": torch.ones(())}, r"blocks\.1\.attn\.proj has alpha only"),
    "unknown key": ({"blocks.1.attn.proj.weight": torch.ones(DIM, DIM)}, r"blocks\.1\.attn\.proj\.weight' belongs to no LoRA pair"),
    "DoRA": ({"blocks.0.attn.proj.lora_magnitude_vector": torch.ones(DIM)}, "DoRA"),
    "LoHa": ({"lora_unet_blocks_0_attn_proj.hada_w1_a": torch.ones(DIM, 4)}, "LoHa"),
    "bias": ({"blocks.0.attn.proj.lora_B.bias": torch.ones(DIM)}, "changed biases"),
    "another depth": (pair("blocks.4.attn.proj", DIM, DIM, 4), r"1 of 2 modules.*blocks\.4\.attn\.proj.*4 blocks"),
    "outside the blocks": (pair("final_layer.adaLN_modulation.1", DIM, 2 * DIM, 4), r"final_layer\.adaLN_modulation\.1.*skip"),
    "another width": (pair("blocks.1.attn.proj", 2 * DIM, 2 * DIM, 4), r"blocks\.1\.attn\.proj takes 64 and gives 64.*32 and 32"),
    "A and B of two ranks": (
        {"blocks.1.mlp.fc1.lora_A.weight": torch.ones(4, DIM), "blocks.1.mlp.fc1.lora_B.weight": torch.ones(4 * DIM, 3)},
        r"fc1\.lora_A\.weight' is \(4, 32\)",
    ),
    "a convolution": (
        {"blocks.1.mlp.fc1.lora_A.weight": torch.ones(4, DIM, 1, 1), "blocks.1.mlp.fc1.lora_B.weight": torch.ones(4 * DIM, 4, 1, 1)},
        r"\(4, 32, 1, 1\)",
    ),
    "integers": ({k: u.long() for k, u in pair("blocks.1.attn.proj", DIM, DIM, 4).items()}, "torch.int64"),
    "alpha zero": ({"blocks.0.attn.proj.alpha": torch.zeros(())}, "alpha of blocks.0.attn.proj is 0"),
    "one weight twice": (pair("transformer_blocks.0.attn1.to_out.0", DIM, DIM, 4), r"to_out\.0.*both change blocks\.0\.img\.proj"),
    "one pair twice": (pair("transformer.blocks.0.attn.proj", DIM, DIM, 4), "are the same thing"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_place_is_refused_by_name(dit: DiT, tmp_path: Path, case: str) -> None:
    more, words = BAD[case]
    load_lora(write(tmp_path, GOOD), dit)
    with pytest.raises(WeightsError, match=words):
        load_lora(write(tmp_path, {**GOOD, **more}), dit)


def test_a_value_that_is_not_finite_is_refused_by_name(dit: DiT, tmp_path: Path) -> None:
    """Written by other programs, of course: ours refuses to."""
    from safetensors.torch import save_file

    bad = {k: u.clone() for k, u in GOOD.items()}
    bad["blocks.0.attn.proj.lora_B.weight"][3, 2] = float("nan")
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=r"lora_B\.weight' is not finite"):
        load_lora(tmp_path / "bad.safetensors", dit)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", r"FLUX\.1.*not for dit.*blocks\.0\.adaLN_modulation\.1"),
        ("transformer.single_transformer_blocks.0.attn.to_q", r"FLUX\.1"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "a U-Net"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "a text encoder"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "a text encoder"),
        ("transformer.layers.0.attention.to_q", "another model"),
    ],
)
def test_a_lora_of_another_family_is_refused_with_its_name(dit: DiT, tmp_path: Path, module: str, words: str) -> None:
    names = ("lora_down", "lora_up") if module.startswith("lora_") else ("lora_A", "lora_B")
    with pytest.raises(WeightsError, match=words):
        load_lora(write(tmp_path, pair(module, DIM, DIM, 4, names)), dit)


def test_what_is_named_may_be_left_out(dit: DiT, tmp_path: Path) -> None:
    file = write(tmp_path, {**GOOD, **pair("final_layer.linear", DIM, 24, 4)})
    loaded = load_lora(file, dit, skip=["final_layer.*"])
    assert (loaded.report.applied, loaded.report.pairs, loaded.report.skipped) == (1, 2, ("final_layer.linear",))
    assert "1 of 2 pairs applied, left out: final_layer.linear" in str(loaded.report)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(peft_type="LOHA"), "LOHA"),
        (dict(use_dora=True), "use_dora = True"),
        (dict(bias="all"), "bias = 'all'"),
        (dict(modules_to_save=["final"]), "modules_to_save"),
        (dict(init_lora_weights="pissa"), "pissa"),
        (dict(r=5), "rank 4, its configuration says 5"),
        (dict(rank_pattern={"proj": 3}), "rank 4, its configuration says 3"),
        (dict(alpha_pattern={"(a+)+b": 3}), "too involved"),
        (dict(alpha_pattern={"((": 3}), "cannot be read"),
        (dict(lora_alpha="much"), "cannot be read"),
        (dict(something_new=True), "something_new"),
    ],
)
def test_a_configuration_that_is_no_plain_lora_is_refused(dit: DiT, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    write(tmp_path, {f"base_model.model.{k}": u for k, u in GOOD.items()}, name="adapter_model.safetensors")
    plain = dict(peft_type="LORA", r=4, lora_alpha=8, bias="none", use_dora=False, task_type=None)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(plain))
    assert load_lora(tmp_path, dit).lora.targets["blocks.0.img.proj"].scale == 2.0
    config.write_text(json.dumps({**plain, **values}))
    with pytest.raises(DitkitError, match=words):
        load_lora(tmp_path, dit)


def test_files_that_are_none_are_refused(dit: DiT, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no LoRA file.*adapter_model\.safetensors"):
        load_lora(tmp_path, dit)
    with pytest.raises(WeightsError, match="does not exist"):
        load_lora(tmp_path / "none.safetensors", dit)
    (tmp_path / "adapter.bin").write_bytes(b"pickle")
    with pytest.raises(WeightsError, match=r"no \.safetensors file"):
        load_lora(tmp_path / "adapter.bin", dit)
    with pytest.raises(ConfigError, match=METADATA):
        load_lora(write(tmp_path, GOOD, {METADATA: "{"}), dit)
    with pytest.raises(DitkitError, match=r"layout 'kohya'.*official"):
        save_lora(tmp_path, LoRA(), dit, layout="kohya")  # type: ignore[arg-type]


def test_the_written_file_says_what_it_is(dit: DiT, tmp_path: Path) -> None:
    lora = LoRA(rank=4, alpha=8.0, include="proj")
    file = save_lora(tmp_path, lora, dit)
    with TensorFile(file) as opened:
        stored = json.loads(opened.metadata[METADATA])
    assert (stored["transformer.r"], stored["transformer.lora_alpha"]) == (4, 8)
    assert read_pairs(file).format == "diffusers"
