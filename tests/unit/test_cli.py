"""The command line: light, one clear error and exit code 2 for a mistake, pictures that carry what remakes them."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from ditkit.backbones.dit import DiT
from ditkit.bundle import BundleConfig, DataCard, Part, Sampling, write_bundle
from ditkit.cli.main import VERBS, main
from ditkit.core import registry
from ditkit.core.files import TensorFile, write_manifest
from ditkit.output import read_record
from ditkit.pipeline import Pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = DiT.tiny()
    config = BundleConfig(
        backbone=Part(name="dit", config=model.config.to_dict()),
        process=Part(name="gaussian", config={"prediction": "v"}),
        data=DataCard(name="noise", shape=(3, 8, 12)),
        sampling=Sampling(num_inference_steps=3),
    )
    path = tmp_path_factory.mktemp("cli") / "bundle"
    write_bundle(path, config, model.state_dict())
    return path


def run(capsys, *argv):
    """Exit code, stdout, stderr."""
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def exits(*argv):
    """Exit code of a call that tyro ends."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return stop.value.code


def test_list_and_help_need_no_torch():
    program = """
import sys, io, contextlib
from ditkit.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["list"]) == 0
    for verb in ("list", "sample", "convert", "verify"):
        try:
            main([verb, "--help"])
        except SystemExit as stop:
            assert stop.code == 0, verb
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_list_says_what_is_registered(capsys):
    code, out, _ = run(capsys, "list", "backbones")
    assert code == 0
    for name, entry in registry.entries("backbones").items():
        assert name in out
        assert entry.module in out
    assert "methods" not in out.splitlines()[0]
    _, out, _ = run(capsys, "list")
    assert all(f"{kind} (" in out for kind in ("backbones", "methods", "recipes", "bundles"))
    assert exits("list", "nothing") == 2


def test_sample_writes_a_grid_and_single_files(folder, capsys, tmp_path):
    grid, each = tmp_path / "out" / "grid.png", tmp_path / "each"
    code, out, err = run(
        capsys, "sample", folder, "--class-labels", 3, 1, "--num-images", 4, "--num-inference-steps", 2,
        "--guidance-scale", 2, "--seed", 5, "-o", grid, "--each", each,
    )  # fmt: skip
    assert code == 0, err
    assert "4 pictures, 2 steps of ddim, guidance scale 2, seeds 5 to 8" in out
    with Image.open(grid) as image:
        assert image.size == ((2 * 12 + 1) * 5, (2 * 8 + 1) * 5)  # small pictures are enlarged
    files = sorted(each.iterdir())
    assert len(files) == 4
    assert [read_record(f)["seed"] for f in files] == [5, 6, 7, 8]
    assert [read_record(f)["class_label"] for f in files] == [3, 3, 1, 1]
    again = Pipeline.from_pretrained(folder).remake(files[3])
    again.save(tmp_path / "again.png", zoom=5)
    with Image.open(files[3]) as a, Image.open(tmp_path / "again.png") as b:
        assert a.tobytes() == b.tobytes()
    code, out, _ = run(capsys, "sample", folder, "--remake", files[0], "-o", tmp_path / "one.png")
    assert code == 0
    with Image.open(files[0]) as a, Image.open(tmp_path / "one.png") as b:
        assert a.tobytes() == b.tobytes()


def test_sample_attaches_methods_and_hands_them_their_pictures(folder, capsys, tmp_path):
    options = ("--class-labels", 3, "--num-inference-steps", 4, "--batch-size", 1, "--each")
    control = tmp_path / "control.png"
    Image.new("RGB", (12, 8), "red").save(control)
    code, out, err = run(capsys, "sample", folder, *options, tmp_path / "plain", "-o", tmp_path / "o.png")
    assert code == 0, err
    flags = ("--methods", "fora:interval=2+controlnet:blocks=1", "--inputs", f"control={control}")
    code, out, err = run(capsys, "sample", folder, *options, tmp_path / "both", *flags, "-o", tmp_path / "o.png")
    assert code == 0, err
    assert "fora" in out
    assert "controlnet" in out
    record = read_record(next((tmp_path / "both").iterdir()))
    assert list(record["inputs"]) == ["control"]
    made = run(capsys, "sample", folder, "--remake", next((tmp_path / "both").iterdir()), *flags, "-o", tmp_path / "again.png")
    assert made[0] == 0, made[2]
    code, _, err = run(capsys, "sample", folder, "--remake", next((tmp_path / "both").iterdir()), "-o", tmp_path / "no.png")
    assert code == 2
    assert "was made with" in err


def test_scale_zero_says_what_it_is(folder, capsys, tmp_path):
    """A02."""
    for flags, text in [
        (("--guidance-scale", 0), "unconditional (scale 0)"),
        (("--guidance", "none"), "conditional, not guided (scale 1)"),
        (("--guidance", "first-three", "--guidance-scale", 3), "guidance scale 3 on the first 3 channels"),
    ]:
        code, out, _ = run(capsys, "sample", folder, "--class-labels", 1, *flags, "-o", tmp_path / "o.png")
        assert code == 0
        assert text in out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--class-labels", 9), "class label is 9; allowed: whole numbers from 0 to 4"),
        (("--class-labels", 1, 2, "--num-images", 5), "5 images for 2 class labels"),
        (("--num-inference-steps", 0), "num_inference_steps is 0"),
        (("--height", 9), "height is 9; allowed: multiples of 2; next: use 8 or 10"),
        (("--solver", "dim"), "did you mean 'ddim'"),
        (("--device", "toaster"), "device is 'toaster'"),
        (("--zoom", -1), "zoom is -1"),
        (("--methods", "fora:interval=0"), "interval"),
        (("--methods", "fura"), "did you mean 'fora'"),
        (("--methods", "compile", "--compile", "block"), "allowed: one of them"),
        (("--inputs", "edges.png"), "NAME=FILE"),
        (("--inputs", "control=edges.png"), "no method takes the input 'control'"),
    ],
)
def test_a_mistake_is_one_line_and_no_file(folder, capsys, tmp_path, flags, text):
    code, out, err = run(capsys, "sample", folder, *flags, "-o", tmp_path / "o.png")
    assert code == 2
    assert text in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_make_no_picture(folder, capsys, tmp_path):
    """A06: one weight = inf; a non-zero exit, the tensor named, no file."""
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in folder.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    path = bad / "model.safetensors"
    with TensorFile(path) as file:
        start = file._data + file.entries["final.proj.weight"].start
    content = bytearray(path.read_bytes())
    content[start : start + 4] = b"\0\0\x80\x7f"
    path.write_bytes(content)
    code, _, err = run(capsys, "sample", bad, "-o", tmp_path / "o.png")
    assert code == 2
    assert "model.safetensors was altered" in err
    write_manifest(bad)
    code, _, err = run(capsys, "sample", bad, "-o", tmp_path / "o.png")
    assert code == 2
    assert "'final.proj.weight' is not finite" in err
    assert not (tmp_path / "o.png").exists()


def test_a_misspelt_key_in_a_bundle_is_named_with_the_nearest(folder, capsys, tmp_path):
    """A27: no key is dropped."""
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in folder.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    config = json.loads((bad / "config.json").read_text())
    config["sampling"]["num-inference-steps"] = config["sampling"].pop("num_inference_steps")
    config["backbone"]["config"]["dept"] = 4
    (bad / "config.json").write_text(json.dumps(config))
    write_manifest(bad)
    code, _, err = run(capsys, "sample", bad)
    assert code == 2
    assert "'sampling.num-inference-steps'" in err
    assert "did you mean 'num_inference_steps'" in err


def test_nothing_of_that_name(capsys):
    code, _, err = run(capsys, "sample", "no-such-bundle")
    assert code == 2
    assert "no folder 'no-such-bundle'" in err
    code, _, err = run(capsys, "smaple", "x")
    assert code == 2
    assert "did you mean 'sample'" in err


def test_a_pickled_checkpoint_is_converted_then_sampled(capsys, tmp_path):
    from ditkit.interop import dit

    model = DiT.tiny()
    square = DiT(model.config.model_copy(update={"input_size": (8, 8)}))
    square.load_state_dict(model.state_dict())
    weights = dit.official_table(square.config).export(square.state_dict())
    path = tmp_path / "released.pt"
    torch.save({"ema": weights, "model": {}, "opt": {}}, path)
    code, _, err = run(capsys, "sample", path)
    assert code == 2
    assert f"ditkit convert {path}" in err
    code, _, err = run(capsys, "convert", path, tmp_path / "b")
    assert code == 2
    assert "--num-heads" in err
    code, out, err = run(capsys, "convert", path, tmp_path / "b", "--num-heads", 4)
    assert code == 0, err
    assert "ddpm, 250 steps" in out
    code, out, _ = run(capsys, "sample", tmp_path / "b", "--num-inference-steps", 2, "--class-labels", 1, "-o", tmp_path / "o.png")
    assert code == 0
    assert "on the first 3 channels" in out


def test_every_verb_says_what_it_does():
    assert all(text and not text.endswith(".") for text in VERBS.values())


def test_the_matrix_says_what_goes_together_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "matrix"]) == 0
    table, refused = capsys.readouterr().out.split("refused, and why")
    rows = {line.split()[0]: line.split()[1:] for line in table.strip().splitlines()}
    assert rows.keys() >= set(registry.entries("methods"))
    backbones = table.split("\n", 1)[0].split()
    assert rows["fora"] == ["yes"] * len(backbones)
    assert "fora with taylorseer: fora and taylorseer both decide reuse" in refused
    assert refused.count(" on ") >= sum(row.count("refused") for row in rows.values())
