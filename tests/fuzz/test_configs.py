"""1,000 configurations that are invalid by construction: bundles, recipes, cards of methods, diffusers folders. Each is refused by the
project's own error, before anything large is made and in less than a second.

A mutator makes a fault that nobody may accept: a key that no schema has, a value of a kind that the place cannot hold, a value out of
its range (``RANGES``), a key that is needed, a text that is no JSON or YAML. Case k is a function of k alone.
"""

import copy
import json
import random

import pytest
import torch
import yaml
from refusal import Kept, Verdict, load, write_ours, write_theirs

from ditkit.core.config import parse_yaml
from ditkit.core.errors import ConfigError
from ditkit.pipeline import Pipeline
from ditkit.testing.training import tiny_recipe
from ditkit.train.build import build
from ditkit.train.recipe import load_recipe

pytestmark = pytest.mark.slow

HUGE = [10**9, 10**18, 10**30]


def nodes(value, path=()):
    """Every object, list and leaf with its path."""
    yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(inner, (*path, key))


def put(data, path, value):
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def at(data, path):
    for key in path:
        data = data[key]
    return data


# ---- faults: each takes plain data, random numbers and what belongs to the schema; returns data with one fault


def unknown_key(data, rng, schema):
    """In any object but those whose keys belong to somebody else (options of a data set)."""
    path = rng.choice([p for p, v in nodes(data) if isinstance(v, dict) and p not in schema["free"]])
    at(data, path)[rng.choice(["k", "_k", "Name", "seed ", "model", "__class__", "0", "ä"]) + str(rng.randrange(99))] = rng.choice(
        [1, "x", None, {}]
    )
    return data


def misspelled_key(data, rng, schema):
    path = rng.choice([p for p, v in nodes(data) if isinstance(v, dict) and v])
    section = at(data, path)
    key = rng.choice([k for k in sorted(section) if k not in schema["notes"]])
    place = rng.randrange(len(key))
    section[key[:place] + rng.choice("xqz") + key[place:]] = section.pop(key)
    return data


def other_kind(data, rng, schema):
    """An object or a nested list where a value stands, a value where an object stands."""
    path, value = rng.choice([(p, v) for p, v in nodes(data) if p and p not in schema["free"] and p[-1] not in schema["notes"]])
    put(data, path, rng.choice([7, "x", [1], True]) if isinstance(value, dict) else rng.choice([{"x": 1}, [[[]]], [{"a": None}]]))
    return data


def text_for_number(data, rng, schema):
    path, value = rng.choice([(p, v) for p, v in nodes(data) if type(v) in (int, float, bool)])
    put(data, path, rng.choice([json.dumps(value), f" {value}", "", "auto!", f"{value}e"]))
    return data


def out_of_range(data, rng, schema):
    path, values = rng.choice(schema["ranges"])
    put(data, path, copy.deepcopy(rng.choice(values)))
    return data


def needed_key(data, rng, schema):
    path = rng.choice(schema["needed"])
    del at(data, path[:-1])[path[-1]]
    return data


def no_object(data, rng, schema):
    return rng.choice([None, [], [data], "x", 7, True])


FAULTS = [unknown_key, misspelled_key, other_kind, text_for_number, out_of_range, needed_key, no_object]


def damaged_text(text, rng):
    """A text that is no JSON (nor an object in YAML)."""
    raw, cut = text.encode(), rng.randrange(1, len(text.rstrip()) - 1)
    return rng.choice(
        [
            raw[:cut],
            b"",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            raw[:cut] + b"\xff\xfe" + raw[cut:],
            raw[:cut] + b"\0" + raw[cut:],
            raw + b"}",
            b"{" + raw,
            b" " * 1_100_000 + raw,
        ]
    )


def cases(good, schema, count, damage=damaged_text, faults=FAULTS):
    """name, bytes of a file that must be refused."""
    text = json.dumps(good)
    for k in range(count):
        rng = random.Random(k)
        if k % (len(faults) + 1) == len(faults):
            yield f"damaged_text {k}", damage(text, rng)
        else:
            fault = faults[k % (len(faults) + 1)]
            bad = fault(copy.deepcopy(good), rng, schema)
            assert bad != good
            yield f"{fault.__name__} {k}: {json.dumps(bad)[:60]}", json.dumps(bad).encode()


def fuzz(path, folder, schema, count, sealed=False, faults=FAULTS):
    load(folder)
    good, file, verdict = json.loads(path.read_text()), Kept(path, sealed), Verdict()
    for name, raw in cases(good, schema, count, faults=faults):
        with file(raw):
            verdict(name, load, folder)
    load(folder)
    verdict.check(count)


def under(path, **values):
    return [((*path, name), bad) for name, bad in values.items()]


BUNDLE = {
    "notes": (),
    "free": [("data", "labels"), ("data", "name"), ("data", "config")],  # a data set checks its options when it is loaded
    "needed": [("backbone",), ("process",), ("data",), ("data", "shape"), ("backbone", "name"), ("methods", 0, "label")],
    "ranges": [
        *under(("backbone", "config"), depth=[0, -1, *HUGE, 1, 3], dim=[0, -4, 18, 17, 32, *HUGE], num_heads=[0, 3, -2, *HUGE]),
        *under(("backbone", "config"), patch_size=[0, 3, 4, 65], num_classes=[0, -1, 2, *HUGE], mlp_ratio=[0.0, -1.0, 8.0, 1e30]),
        *under(("backbone", "config"), in_channels=[0, 5, *HUGE], out_channels=[4, 0, *HUGE], time_freq_shift=[2, -1]),
        *under(("backbone", "config"), input_size=[[], [4], [4, 4, 4], [3, 4], [-2, 4], [0, 0], ["4", 4]]),
        *under(("process", "config"), schedule=["cosine", ""], num_train_steps=[0, 1, -5, *HUGE], variance=["fixed_large", "x"]),
        *under(("data",), shape=[[], [4, 4], [0, 4, 4], [3, 4, 4], [4, -4, 4], [4, 4, 4, 4]], labels=[["a"], ["a"] * 4]),
        *under(("sampling",), solver=["", "DDIM", "euler2"], num_inference_steps=[0, -1, 101]),
        *under(("sampling", "guidance"), channels=[0, -1, "some", 99], rescale=[-0.1, 1.1], interval=[[1.0, 0.0], [0.0, 2.0], [0.5]]),
        *under((), format=[0, 2, 1.5], dtype=["float99", "F32"]),
        *under(("codec",), name=["", "vae2"], config=[{"channels": 3}, {"channels": 0}, {"chanels": 4}]),
        *under(("methods", 0), name=["lor", ""], label=["", "a b", "../x", "other"]),
        *under(
            ("methods", 0, "config"), rank=[0, -1, 3, *HUGE], alpha=[0.0, -1.0], window=[[1.0, 0.0], [0.0]], include=["(", "no such layer"]
        ),
        (("backbone", "name"), ["", "DiT", "unet"]),
        (("process", "name"), ["", "Gaussian", "ddpm"]),
    ],
}


def test_bundles(tmp_path):
    folder = write_ours(tmp_path / "b")
    fuzz(folder / "config.json", folder, BUNDLE, 320, sealed=True)


CARD = {
    "notes": (),
    "free": [],
    "needed": [("method",), ("valid_for",), ("valid_for", "backbone"), ("valid_for", "process"), ("method", "label")],
    "ranges": [
        *under((), format=[0, 2]),
        *under(("method",), name=["fora", "lor"], label=["", "other", "a b"], config=[{}, {"rank": 4}]),
        *under(("valid_for", "backbone"), name=["unet"], config=[{}, {"depth": 3}]),
        *under(("valid_for", "process"), name=["flow"], config=[{}, {"num_train_steps": 99}]),
        *under(("valid_for",), num_inference_steps=[0, -1], solver=[3]),
    ],
}


def test_cards_of_methods(tmp_path):
    folder = write_ours(tmp_path / "b")
    fuzz(folder / "methods" / "lora.json", folder, CARD, 160, sealed=True)


NOTES = ("_class_name", "_diffusers_version")
TRANSFORMER = {
    "notes": NOTES,
    "free": [],
    "needed": [("_class_name",)],
    "ranges": under(
        (),
        _class_name=["", "DiT", "UNet2DModel", None, 7],
        num_attention_heads=[0, -1, 3, *HUGE],
        attention_head_dim=[0, 4, 7, *HUGE],
        num_layers=[0, 1, 3, *HUGE],
        sample_size=[0, -2, 3],
        patch_size=[0, 1, 3, *HUGE],
        in_channels=[0, 3, *HUGE],
        out_channels=[5, *HUGE],
        num_embeds_ada_norm=[0, 2, *HUGE],
        norm_eps=[0.0, -1e-5],
        activation_fn=["gelu", "silu"],
        norm_type=["layer_norm"],
        attention_bias=[False],
        upcast_attention=[True],
        _ditkit=[{"k": 1}, {"time_freq_shift": 2}, 7],
    ),
}
SCHEDULER = {
    "notes": NOTES,
    "free": [],
    "needed": [("_class_name",)],
    "ranges": under(
        (),
        _class_name=["", "EulerDiscreteScheduler", None],
        num_train_timesteps=[0, 1, -1, *HUGE],
        beta_start=[0.0, -1.0, 2.0],
        beta_end=[0.0, 1.5],
        beta_schedule=["cosine", ""],
        prediction_type=["flow"],
        thresholding=[True],
        clip_sample_range=[2.0],
        trained_betas=[[0.1]],
        steps_offset=[-1, 1000],
        rescale_betas_zero_snr=[True],
        timestep_spacing=["x"],
    ),
}
INDEX = {
    "notes": ("_class_name", "_diffusers_version", "transformer", "scheduler"),
    "free": [],
    "needed": [("_class_name",), ("id2label", "0"), ("id2label", "1")],
    "ranges": under((), _class_name=["", "StableDiffusionPipeline", None], id2label=[[], ["a"], {"1": "a"}, {"0": "a", "00": "b"}, "x", 7]),
}


@pytest.mark.parametrize(
    ("name", "schema", "count"),
    [("transformer/config.json", TRANSFORMER, 160), ("scheduler/scheduler_config.json", SCHEDULER, 80)],
)
def test_diffusers_folders(tmp_path, name, schema, count):
    folder = write_theirs(tmp_path / "d")
    fuzz(folder / name, folder, schema, count)


def test_the_index_of_a_diffusers_pipeline(tmp_path):
    folder = write_theirs(tmp_path / "d")
    faults = [unknown_key, misspelled_key, out_of_range, needed_key, no_object]  # it holds no number, and labels may be anything
    fuzz(folder / "model_index.json", folder, INDEX, 60, faults=faults)


# ---- recipes


RECIPE = {
    "notes": (),
    "free": [("claim",), ("data", "name")],
    "needed": [("backbone",), ("backbone", "name"), ("objective", "name"), ("methods", 0, "name")],
    "ranges": [
        *under(
            ("backbone", "config"), dim=[0, 15, -16, 18], depth=[0, 201, *HUGE], num_heads=[0, 3], patch_size=[0, 3, 5], in_channels=[0]
        ),
        *under(("trainer",), steps=[0, -1], batch_size=[0, -8], accumulation=[0, 3], learning_rate=[0.0, -1.0], betas=[[0.9], [1.0, 0.9]]),
        *under(
            ("trainer",), optimizer=["sgd", ""], ema_decay=[1.0, -0.1], seed=[-1, 2**63], keep=[1, 0], dtype=["fp8"], compile=["on", "all"]
        ),
        *under(("trainer",), grad_clip=[-1.0], warmup_steps=[-1], schedule=["linear"], log_every=[0], replicas=[0], save_every=[0]),
        *under(("objective",), name=["", "difusion"], config=[{"label_dropout": 2.0}, {"label_dropout": -0.1}, {"dropout": 0.1}]),
        *under(("process",), name=["", "flo"], config=[{"k": 1}, {"network_time": "x"}]),
        *under(("sampling",), num_inference_steps=[0, -1]),
        *under(("data",), name=["", "digit", "/no/such/folder"], config=[{"k": 1}]),
        *under(
            (), trainable=[["no.such.*"], [""]], base=["runs/x"], methods=[[{"name": "lor"}], [{"name": "lora", "config": {"rank": 0}}]]
        ),
    ],
}


def plain_recipe():
    values = tiny_recipe({"methods": ({"name": "lora", "config": {"rank": 2}},)}).to_dict()
    del values["base"]
    return values


def open_recipe(path):
    parts = build(load_recipe(path), torch.device("cpu"))
    Pipeline(parts.model, parts.card)  # for previews; it checks how to sample


def aliases_of_aliases(depth):
    """A short text for 10^depth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth)]
    return "\n".join(lines)


def no_yaml(text, rng):
    return rng.choice(
        [
            text.encode()[: rng.randrange(1, len(text) - 1)],
            b"a: [1, 2",
            b"a: b: c",
            b"\t- x",
            b"!!python/object/apply:os.system ['true']",
            b"!!python/name:os.system",
            b"{" * 600,
            text.encode() + b"\xff",
            text.encode() + b"\0",
            b"trainer: {steps: 1, steps: 2}",
            b"<<: 7",
            b"? [a]\n: 1",
            b"trainer: &a {steps: *a}",
            b"x: &a [*a]",
            f"{aliases_of_aliases(12)}\ntrainer: {{steps: *a11}}".encode(),
            f"{aliases_of_aliases(9)}\n".encode(),
            b"trainer: {steps: 2001-99-99}",
            b"- 1\n- 2",
        ]
    )


def test_recipes(tmp_path):
    path, good, verdict = tmp_path / "r.yaml", plain_recipe(), Verdict()
    path.write_text(yaml.safe_dump(good))
    open_recipe(path)
    for name, raw in cases(good, RECIPE, 240, no_yaml):
        path.write_bytes(raw)
        verdict(name, open_recipe, path)
    verdict.check(240)


def test_a_value_on_the_command_line_is_bounded_too():
    with pytest.raises(ConfigError, match="more than"):
        parse_yaml(f"[&a [{', '.join('1' * 400)}]" + ", *a" * 400 + "]", "--set")
