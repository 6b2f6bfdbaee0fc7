"""Bundles: saved and loaded bit-exact, refused by name where anything does not fit, methods valid where they were made."""

import copy
import json
import random
import re

import pytest
import torch

from ditkit import bundle
from ditkit.backbones.dit import DiT
from ditkit.bundle import BundleConfig, DataCard, MethodCard, Part, Sampling, Validity, find_bundle, open_bundle, write_bundle
from ditkit.core.errors import Conflict, DitkitError, WeightsError
from ditkit.core.files import TensorFile, read_tensors, write_json, write_manifest, write_tensors
from ditkit.core.method import Method
from ditkit.loading import empty_model, load_model, make_method
from ditkit.methods.adaptation.lora import LoRA
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.int8 import Int8 as Int8Method
from ditkit.pipeline import Pipeline

CPU = (torch.float32, torch.device("cpu"))


def make_pipeline(**sampling):
    model = DiT.tiny()
    return Pipeline(
        model,
        BundleConfig(
            backbone=Part(name="dit", config=model.config.to_dict()),
            process=Part(name="gaussian"),
            data=DataCard(name="noise", shape=(3, 8, 12), labels=("a", "b", "c", "d", "e")),
            sampling=Sampling(num_inference_steps=4, **sampling),
        ),
    )


@pytest.fixture
def pipe():
    return make_pipeline()


def x_of(pipe, **options):
    return pipe([1, 3], guidance_scale=2.0, seed=5, progress=False, **options).x


def test_saved_and_loaded_bit_exact(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "b")
    again = Pipeline.from_pretrained(tmp_path / "b", device="cpu")
    old, new = pipe.model.state_dict(), again.model.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], v) for k, v in new.items())
    assert torch.equal(x_of(again), x_of(pipe))
    assert again.config == pipe.config
    again.save_pretrained(tmp_path / "c")
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}


def test_methods_come_back_with_their_states(pipe, tmp_path):
    view = pipe.with_methods(LoRA(rank=2), FORA(interval=2))
    for p in view.model.methods.parameters():
        p.data.normal_(std=0.3)
    view.save_pretrained(tmp_path / "b")
    again = Pipeline.from_pretrained(tmp_path / "b", device="cpu")
    assert [m.label for m in again.model.attached] == [m.label for m in view.model.attached]
    assert torch.equal(x_of(again), x_of(view))
    assert not torch.equal(x_of(view), x_of(pipe))
    assert torch.equal(x_of(pipe), x_of(make_pipeline()))
    card = json.loads((tmp_path / "b" / "methods" / "lora.json").read_text())
    assert card["valid_for"]["backbone"] == pipe.config.backbone.to_dict()


def bundle_with_state(pipe, folder, **changes):
    """A bundle whose LoRA was made for something else."""
    view = pipe.with_methods(LoRA(rank=2))
    view.save_pretrained(folder)
    path = folder / "methods" / "lora.json"
    card = MethodCard.load(path)
    write_json(path, card.model_copy(update={"valid_for": card.valid_for.model_copy(update=changes)}).to_dict())
    write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backbone": Part(name="unit", config={})}, "another backbone: unit, not dit"),
        ({"process": Part(name="gaussian", config={"schedule": "squaredcos_cap_v2"})}, "another process: schedule 'squaredcos_cap_v2'"),
    ],
)
def test_a_state_made_for_another_model_is_refused(pipe, tmp_path, changes, text):
    folder = bundle_with_state(pipe, tmp_path / "b", **changes)
    with pytest.raises(DitkitError, match=text):
        Pipeline.from_pretrained(folder, device="cpu")


def test_a_state_made_for_other_steps_or_solver_is_refused_when_sampling(pipe, tmp_path):
    folder = bundle_with_state(pipe, tmp_path / "b", num_inference_steps=10, solver="ddim")
    loaded = Pipeline.from_pretrained(folder, device="cpu")
    x_of(loaded, num_inference_steps=10)
    with pytest.raises(DitkitError, match="num_inference_steps is 4; allowed: 10, for which the state of lora"):
        x_of(loaded)
    with pytest.raises(DitkitError, match="solver is 'ddpm'; allowed: 'ddim'"):
        x_of(loaded, num_inference_steps=10, solver="ddpm")


class Router(FORA):
    """A method whose learned state is for one number of steps."""

    step_bound = True


def test_what_a_method_learned_is_attached_from_its_file(pipe, tmp_path):
    view = pipe.with_methods(LoRA(rank=2))
    for p in view.model.methods.parameters():
        p.data.normal_(std=0.3)
    view.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "b" / "methods" / "lora.json", tmp_path / "b" / "methods" / "lora"):
        assert torch.equal(x_of(pipe.with_methods(FORA(interval=2), path)), x_of(view.with_methods(FORA(interval=2))))
    other = make_pipeline()
    other.config = other.config.model_copy(update={"process": Part(name="gaussian", config={"schedule": "squaredcos_cap_v2"})})
    with pytest.raises(DitkitError, match="made for another process"):
        other.with_methods(path)
    with pytest.raises(DitkitError, match=r"nowhere\.json does not exist"):
        pipe.with_methods(tmp_path / "nowhere")


def test_a_step_bound_state_is_valid_for_its_solver_and_steps_any_other_for_all(pipe):
    for free in (LoRA(rank=2), LoRA(rank=2, window=(0.2, 0.5)), FORA(interval=2)):
        assert Validity.of(pipe.config, free).num_inference_steps is None
    learned = Validity.of(pipe.config, Router(interval=2))
    assert (learned.solver, learned.num_inference_steps) == ("ddim", 4)


DAMAGES = {
    "a missing tensor": (lambda w: w.pop("final.proj.bias"), r"missing 'final\.proj\.bias'"),
    "an extra tensor": (lambda w: w.update({"final.proj.bia": torch.ones(1)}), r"unknown 'final\.proj\.bia'"),
    "another shape": (lambda w: w.update({"final.proj.bias": torch.ones(2)}), r"'final\.proj\.bias' is \(2,\)"),
    "integers": (lambda w: w.update({"final.proj.bias": torch.ones(24, dtype=torch.int32)}), r"'final\.proj\.bias' is torch\.int32"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_weights_that_do_not_fit_are_named(pipe, tmp_path, name):
    pipe.save_pretrained(tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    weights = read_tensors(path)
    DAMAGES[name][0](weights)
    write_tensors(path, weights)
    write_manifest(tmp_path / "b")
    with pytest.raises(WeightsError, match=DAMAGES[name][1]):
        Pipeline.from_pretrained(tmp_path / "b", device="cpu")


def test_a_number_that_is_not_finite_is_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    with TensorFile(path) as file:
        entry, data = file.entries["blocks.2.parts.img.qkv.bias"], file._data
    content = bytearray(path.read_bytes())
    content[data + entry.start : data + entry.start + 4] = b"\0\0\x80\x7f"  # infinity
    path.write_bytes(content)
    write_manifest(tmp_path / "b")
    with pytest.raises(WeightsError, match=r"'blocks\.2\.parts\.img\.qkv\.bias' is not finite at element 0"):
        Pipeline.from_pretrained(tmp_path / "b", device="cpu")


def test_a_method_state_that_does_not_fit_is_named(pipe, tmp_path):
    pipe.with_methods(LoRA(rank=2)).save_pretrained(tmp_path / "b")
    path = tmp_path / "b" / "methods" / "lora.safetensors"
    state = read_tensors(path)
    name = sorted(state)[0]
    del state[name]
    write_tensors(path, state)
    write_manifest(tmp_path / "b")
    with pytest.raises(WeightsError, match=f"missing '{re.escape(name)}'"):
        Pipeline.from_pretrained(tmp_path / "b", device="cpu")


def nodes(value, path=()):
    """Every object and leaf of a configuration, with its path."""
    yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(inner, (*path, key))


def spoil(config, path, kind, rng):
    """A copy with one fault at ``path``, or None where this kind is no fault there."""
    bad = copy.deepcopy(config)
    *above, last = path or (None,)
    parent = bad
    for key in above:
        parent = parent[key]
    here = parent[last] if path else bad
    if kind == "unknown key" and isinstance(here, dict):
        here[f"k{rng.randrange(1000)}"] = rng.choice([1, "x", None])
    elif kind == "object" and path and not isinstance(here, dict):
        parent[last] = {"x": rng.randrange(1000)}
    elif kind == "nothing" and path and last != "labels":
        parent[last] = rng.choice([[[]], [None, {}], float(f"-{rng.randrange(1, 99)}e300")])
    elif kind == "missing" and path in [("backbone",), ("process",), ("data",), ("backbone", "name"), ("data", "shape")]:
        del parent[last]
    else:
        return None
    return bad


def test_a_thousand_wrong_configurations_are_refused(pipe, tmp_path):
    """Each by the project's own error, before any weight is read."""
    pipe.with_methods(FORA(interval=2)).save_pretrained(tmp_path / "b")
    path = tmp_path / "b" / "config.json"
    good, rng, text = json.loads(path.read_text()), random.Random(0), path.read_text()
    places = [p for p, _ in nodes(good) if p != ("data", "config")]  # options of a data set, which checks them when it is loaded
    cases = [json.dumps(bad) for _ in range(7) for p in places for k in KINDS if (bad := spoil(good, p, k, rng)) is not None]
    cases += [text[: rng.randrange(len(text) - 2)] for _ in range(300)]
    cases += [text.replace('"format": 1', f'"format": {value}') for value in ("2", '"1"', '1, "format": 1', "NaN")]
    assert len(cases) >= 1000
    with path.open("r+b", buffering=0) as file:
        for case in cases:
            file.seek(0)
            file.write(case.encode())
            file.truncate()
            with pytest.raises(DitkitError):
                check(path, case)


KINDS = ("unknown key", "object", "nothing", "missing")


EMPTY = {}


def check(path, case):
    """Everything that opening a bundle checks of its configuration."""
    config = BundleConfig.load(path)
    key = str(config.backbone)
    if key not in EMPTY:
        EMPTY[key] = empty_model(config.backbone)
    Pipeline(EMPTY[key], config)
    for part in config.methods:
        if make_method(part).label != part.label:
            raise DitkitError("label")
    raise AssertionError(f"accepted: {case}")


def test_shipped_bundles_are_found_by_name(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "SHIPPED", tmp_path / "shipped")
    pipe.save_pretrained(tmp_path / "shipped" / "digits")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(x_of(Pipeline.from_pretrained("digits", device="cpu")), x_of(pipe))
    with pytest.raises(DitkitError, match="'digit'.*did you mean 'digits'"):
        find_bundle("digit")
    with pytest.raises(DitkitError, match="no folder facebook/DiT.*hf download"):
        find_bundle("facebook/DiT")
    (tmp_path / "digits").mkdir()
    assert find_bundle("digits") == find_bundle("./digits")  # a folder of that name wins


def test_a_pickled_file_is_refused_with_the_command_that_converts_it(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(DitkitError, match=r"model\.pt is a file.*ditkit convert"):
        Pipeline.from_pretrained(tmp_path / "model.pt")


def test_what_else_is_in_the_folder_stays(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "checkpoints").mkdir()
    (tmp_path / "b" / "checkpoints" / "x").write_text("kept")
    write_bundle(tmp_path / "b", pipe.config, pipe.model.state_dict())
    assert (tmp_path / "b" / "checkpoints" / "x").read_text() == "kept"
    assert open_bundle(tmp_path / "b").config == pipe.config


class Bytes(Method):
    """Keeps each projection of the blocks as int8: a stand-in for quantisation."""

    name, stage, owns = "bytes", "numbers", frozenset({"weights"})

    def replace(self, path, module):
        return Int8(module) if path.startswith("blocks.") else None


class Int8(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Most bytes of tensor storage alive at once, and those alive now."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                ref = torch.multiprocessing.reductions.StorageWeakRef(value.untyped_storage())
                self.alive[ref] = value.untyped_storage().nbytes()
        self.most = max(self.most, self.now())
        return out

    def now(self):
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        return sum(self.alive.values())


def test_loading_with_a_method_that_drops_weights_needs_little_more_than_the_result(tmp_path):
    model = DiT(input_size=(8, 8), dim=96, depth=12, num_heads=4, num_classes=5)
    config = BundleConfig(
        backbone=Part(name="dit", config=model.config.to_dict()), process=Part(name="gaussian"), data=DataCard(name="x", shape=(4, 8, 8))
    )
    write_bundle(tmp_path / "b", config, model.state_dict())
    base = sum(p.nbytes for p in model.parameters())
    with Peak() as peak:
        view, _ = load_model(open_bundle(tmp_path / "b"), *CPU, extra=[Bytes()])
    result = sum(t.nbytes for t in {id(t): t for t in [*view.parameters(), *view.buffers()]}.values())
    assert result < 0.4 * base
    assert peak.most <= 1.2 * result
    attached = Pipeline(model.eval(), config).with_methods(Bytes())
    assert torch.equal(x_of(Pipeline(view, config), num_inference_steps=2), x_of(attached, num_inference_steps=2))


def test_a_quantised_model_is_saved_with_its_base_or_small(pipe, tmp_path):
    """Both read back bit-equal; the small one holds 8-bit projections, and also follows from a model whose base was never there."""
    view = pipe.with_methods(Int8Method(kernel="dequantise"), FORA(interval=2), LoRA(rank=2))
    for p in view.model.methods.parameters():
        p.data.normal_(std=0.3)
    want = x_of(view)
    view.save_pretrained(tmp_path / "whole")
    view.save_pretrained(tmp_path / "small", keep_base=False)
    whole = Pipeline.from_pretrained(tmp_path / "whole", device="cpu")
    whole.save_pretrained(tmp_path / "small again")
    for name in ("whole", "small", "small again"):
        assert torch.equal(x_of(Pipeline.from_pretrained(tmp_path / name, device="cpu")), want)
    sizes = {name: sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors")) for name in ("whole", "small", "small again")}
    assert sizes["small"] == sizes["small again"] < 0.8 * sizes["whole"]
    assert "blocks.0.parts.img.qkv.weight" not in read_tensors(tmp_path / "small" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop("replaced.blocks.1.parts.img.qkv.scale"), "missing 'scale'"),
        (lambda w: w.update({"replaced.blocks.9.parts.img.qkv.scale": torch.ones(1)}), "belongs to no projection"),
        (lambda w: w.update({"replaced.final.proj.scale": torch.ones(24)}), "which int8 leaves alone"),
        (lambda w: w.update({"replaced.blocks.1.parts.img.qkv.weight": torch.ones(96, 32)}), "is torch.float32; allowed: torch.int8"),
        (lambda w: w.update({"other": torch.ones(1)}), "unknown 'other'"),
    ],
)
def test_a_small_bundle_that_does_not_fit_is_refused(pipe, tmp_path, change, text):
    pipe.with_methods(Int8Method(kernel="dequantise")).save_pretrained(tmp_path / "b", keep_base=False)
    path = tmp_path / "b" / "methods" / "int8.safetensors"
    state = read_tensors(path)
    change(state)
    write_tensors(path, state)
    model = tmp_path / "b" / "model.safetensors"
    if any(name.startswith("replaced.final.proj") for name in state):
        weights = read_tensors(model)
        del weights["final.proj.weight"], weights["final.proj.bias"]
        write_tensors(model, weights)
    write_manifest(tmp_path / "b")
    with pytest.raises(WeightsError, match=text):
        Pipeline.from_pretrained(tmp_path / "b", device="cpu")


def test_loading_with_a_method_that_matches_nothing_is_refused(pipe, tmp_path):
    class Nothing(Bytes):
        def replace(self, path, module):
            return None

    pipe.save_pretrained(tmp_path / "b")
    with pytest.raises(Conflict, match="matches no projection"):
        Pipeline.from_pretrained(tmp_path / "b", device="cpu", methods=[Nothing()])
