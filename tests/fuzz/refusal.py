"""What both fuzz tests share: a folder that is put right again after each case, and the verdict over all cases."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from pathlib import Path

import torch

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.bundle import BundleConfig, DataCard, Part, Sampling
from ditkit.core.errors import DitkitError
from ditkit.core.files import write_json, write_tensors
from ditkit.interop.dit import config_to_diffusers, diffusers_table
from ditkit.methods.adaptation.lora import LoRA
from ditkit.pipeline import Pipeline

SECONDS = 1.0  # of processor time: a case that takes longer hangs


def model():
    torch.manual_seed(0)
    return draw_parameters(DiT(input_size=(4, 4), dim=16, depth=2, num_heads=2, num_classes=3)).eval()


def write_ours(folder):
    """A bundle with a learned method."""
    net = model()
    config = BundleConfig(
        backbone=Part(name="dit", config=net.config.to_dict()),
        process=Part(name="gaussian", config={"variance": "learned", "schedule": "linear", "num_train_steps": 100}),
        data=DataCard(name="noise", shape=(4, 4, 4), labels=("a", "b", "c")),
        sampling=Sampling(num_inference_steps=4, guidance={"scale": 2.0, "channels": 3, "interval": [0.0, 1.0]}),
    )
    Pipeline(net, config).with_methods(LoRA(rank=2)).save_pretrained(folder)
    return folder


def write_theirs(folder):
    """A diffusers pipeline folder without a VAE; no manifest stands."""
    net = model()
    (folder / "transformer").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    write_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", diffusers_table(net.config).export(net.state_dict()))
    notes = {"_diffusers_version": "0.30.0"}
    write_json(folder / "transformer" / "config.json", {**config_to_diffusers(net.config), **notes})
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": False}
    write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, "beta_start": 0.0001, "beta_end": 0.02, **notes})
    parts = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    labels = {"0": "a", "1": "b", "2": "c"}
    write_json(folder / "model_index.json", {"_class_name": "DiTPipeline", **notes, **parts, "id2label": labels})
    return folder


def seal(folder):
    """A manifest that fits what is in the folder now, so that what lies behind the manifest is tested."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    contents = {name: (folder / name).read_bytes() for name in sorted(names)}
    files = {name: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for name, raw in contents.items()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def load(folder):
    return Pipeline.from_pretrained(folder, device="cpu", dtype="float32")


class Verdict:
    """Runs cases and sorts what is no plain refusal: silent loads, crashes, hangs, messages that are no line of text."""

    def __init__(self):
        self.refused, self.faults, self.slowest = Counter(), [], 0.0

    def __call__(self, name, action, *args):
        start = time.process_time()
        try:
            action(*args)
            self.faults.append(f"{name}: loaded silently")
        except DitkitError as error:
            self.refused[name.split()[0]] += 1
            if not 10 < len(str(error)) < 10_000:
                self.faults.append(f"{name}: a message of {len(str(error))} characters")
        except Exception as error:
            self.faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        seconds = time.process_time() - start
        self.slowest = max(self.slowest, seconds)
        if seconds > SECONDS:
            self.faults.append(f"{name}: took {seconds:.1f} s")

    def check(self, cases):
        assert not self.faults, "\n".join([f"{len(self.faults)} faults", *self.faults[:20]])
        assert sum(self.refused.values()) >= cases


class Kept:
    """One file of a folder: written anew for a case, and put back afterwards."""

    def __init__(self, path: Path, sealed: bool) -> None:
        self.path, self.good, self.sealed = path, path.read_bytes(), sealed
        self.folder = next(p for p in path.parents if (p / "manifest.json").is_file()) if sealed else path.parent

    def __call__(self, raw: bytes):
        return _Written(self, raw)

    def write(self, raw: bytes) -> None:
        self.path.write_bytes(raw)
        if self.sealed:
            seal(self.folder)


class _Written:
    def __init__(self, file: Kept, raw: bytes) -> None:
        self.file, self.raw = file, raw

    def __enter__(self):
        assert self.raw != self.file.good
        self.file.write(self.raw)

    def __exit__(self, *_: object) -> None:
        self.file.write(self.file.good)
