"""Text encoders from local folders, through transformers: T5, CLIP, Gemma, BERT. Frozen; nothing is downloaded, no pickle is read.

The folder is a model's own, or a diffusers pipeline's (``text_encoder/`` with ``tokenizer/`` beside it). Which states are taken, and
whether padding is seen, is what differs between the systems that use the same encoder; several for one network: ``_several.py``.

    PixArt    T5      layer -1   masked          SD3, FLUX   T5    layer -1   not masked
    Lumina    Gemma   layer -2   masked          SD3         CLIP  layer -2   pooled
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ditkit.core import registry
from ditkit.core.config import read_data
from ditkit.core.errors import ConfigError, WeightsError
from ditkit.core.lazy import require

from ..text import LongPrompts, Text, TextConfig, TextEncoder, Tokens

_KINDS = {  # model_type of config.json -> class, the key of its width
    "t5": ("T5EncoderModel", "d_model"),
    "mt5": ("MT5EncoderModel", "d_model"),
    "umt5": ("UMT5EncoderModel", "d_model"),
    "clip_text_model": ("CLIPTextModel", "hidden_size"),
    "gemma": ("GemmaModel", "hidden_size"),
    "gemma2": ("Gemma2Model", "hidden_size"),
    "bert": ("BertModel", "hidden_size"),
}
_PROJECTED = "CLIPTextModelWithProjection"


@dataclass(frozen=True)
class Use:
    """What an encoder is for, where it is one of several (``_several.py``).

    Attributes:
        title: what errors call it.
        kinds: model types of transformers that it may be.
        projected: whether a CLIP's pooled vector is the projected one; None: as its config.json says.
        pooled: whether the pooled vector is taken, where there is one.
        padding: whether what it says at padding is kept; otherwise that is zero, where masked.
    """

    title: str = ""
    kinds: tuple[str, ...] = tuple(_KINDS)
    projected: bool | None = None
    pooled: bool = True
    padding: bool = False


class TransformersConfig(TextConfig):
    """Which encoder, and what is taken of it."""

    path: str = Field(description="local folder of the model, or of a diffusers pipeline")
    subfolder: str = Field("text_encoder", description="of a diffusers pipeline's folder: which of its encoders")
    tokenizer: str | None = Field(None, description="folder of the tokenizer; None: the model's own, or tokenizer/ beside it")
    max_length: int = Field(120, ge=2, le=1 << 16, description="tokens of a prompt, those that mark its ends among them")
    layer: int = Field(-1, le=-1, description="which states: -1 the last, normalised; -2 those before the last layer")
    lower_case: bool = Field(False, description="prompts are read in lower case and without spaces at their ends, as PixArt was trained")
    null_caption: Literal["empty", "model"] = Field(
        "empty", description="what stands for no caption: the empty prompt, or the network's own"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the encoder's weights and arithmetic")


@registry.register("encoders", "transformers")
class TransformersEncoder(TextEncoder):
    """Token numbers (B, L), mask (B, L) -> states (B, L, D); pooled (B, D) where the model is a CLIP or a BERT.

    The model is read when it is first called. Raises DitkitError for a folder that is missing or holds another kind of model.
    """

    config_class = TransformersConfig
    config: TransformersConfig

    def __init__(self, config: TransformersConfig | None = None, use: Use | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.use = use or Use()
        self.title = self.use.title
        self.null_caption = self.config.null_caption
        self._held: dict[str, Any] = {}  # what was read so far; not a module of this one, whose weights it would seem to be
        self._device = torch.device("cpu")

    @property
    def folder(self) -> Path:
        """Where the model's ``config.json`` is."""
        root = Path(self.config.path).expanduser()
        for folder in (root / self.config.subfolder, root):
            if (folder / "config.json").is_file():
                return folder
        raise ConfigError(
            f"there is no {self.title or 'text encoder'} in {root}",
            allowed=f"a folder with config.json, or with {self.config.subfolder}/config.json",
            hint="check the path; from_pretrained(..., text_encoder=FOLDER) says where it is now",
        )

    @property
    def described(self) -> dict[str, Any]:
        """The model's ``config.json``, if it is of a kind that is known here."""
        if "described" not in self._held:
            path = self.folder / "config.json"
            values = read_data(path)
            values = values if isinstance(values, dict) else {}
            if (kind := values.get("model_type")) not in self.use.kinds:
                found = kind or values.get("_class_name") or "no model"
                where = f", and {self.title} is read from there" if self.title else ""
                raise ConfigError(
                    f"{path} describes {found}{where}", allowed=", ".join(self.use.kinds), hint="give a text encoder's folder"
                )
            self._held["described"] = values
        described: dict[str, Any] = self._held["described"]
        return described

    @property
    def class_name(self) -> str:
        """The class of transformers that reads it."""
        said, kind = _PROJECTED in (self.described.get("architectures") or ()), self.described["model_type"]
        projected = said if self.use.projected is None else self.use.projected
        return _PROJECTED if projected and kind == "clip_text_model" else _KINDS[kind][0]

    @property
    def dim(self) -> int:
        return int(self.described[_KINDS[self.described["model_type"]][1]])

    @property
    def pooled_dim(self) -> int | None:
        if not self.use.pooled:
            return None
        if self.class_name == _PROJECTED:
            return int(self.described["projection_dim"])
        return self.dim if self.described["model_type"] in ("clip_text_model", "bert") else None

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def model(self) -> Any:
        """The model of transformers."""
        if "model" not in self._held:
            self.check_hash(self.folder)
            more = {"add_pooling_layer": False} if self.described["model_type"] == "bert" and not self.use.pooled else {}
            self._held["model"] = _loaded(self.folder, self.class_name, getattr(torch, self.config.dtype), **more).to(self._device)
        return self._held["model"]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        if "tokenizer" not in self._held:
            transformers = require("transformers", "text")
            folder = self.tokenizer_folder
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise ConfigError(f"{folder}: the tokenizer cannot be read: {_line(error)}", hint="check its files") from None
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._held["tokenizer"] = tokenizer
        return self._held["tokenizer"]

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files are."""
        beside = self.folder.parent / self.folder.name.replace("text_encoder", "tokenizer")
        given = [Path(self.config.tokenizer).expanduser()] if self.config.tokenizer else list(dict.fromkeys([self.folder, beside]))
        for folder in given:
            if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
                return folder
        raise ConfigError(
            f"there is no tokenizer in {', '.join(map(str, given))}", allowed="a folder with tokenizer_config.json", hint="set tokenizer"
        )

    def cut(self, prompts: Sequence[str], how: LongPrompts) -> tuple[Tokens, list[int]]:
        _ = self.described  # another kind of model is named before its tokenizer is missed
        tokenizer, length = self.tokenizer, self.config.max_length
        texts = [prompt.lower().strip() if self.config.lower_case else prompt for prompt in prompts]
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, padding_side="right", return_tensors="pt")
        return Tokens(found["input_ids"], found["attention_mask"].bool()), lengths

    @torch.no_grad()
    def forward(self, tokens: Tensor, mask: Tensor) -> Text:
        deep = self.config.layer != -1
        seen = mask.long() if self.config.masked else None
        out = self.model(input_ids=tokens, attention_mask=seen, **({"output_hidden_states": True} if deep else {}))
        states = out.hidden_states[self.config.layer] if deep else out.last_hidden_state
        if self.config.masked and not self.use.padding:
            states = states * mask[..., None]
        pooled = None
        if self.pooled_dim is not None:
            pooled = out.text_embeds if self.class_name == _PROJECTED else out.pooler_output
        return Text(states, mask, pooled)

    def identity(self) -> dict[str, Any]:
        """The settings; not where the files lie."""
        found = super().identity()
        config = {k: v for k, v in found["config"].items() if k not in ("path", "subfolder", "tokenizer", "null_caption")}
        return {**found, "config": config}

    def content_hash(self) -> str:
        """SHA-256 of ``identity`` and of the files of model and tokenizer; the weights are read, not loaded."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        files = {(folder / path.name) for folder in (self.folder, self.tokenizer_folder) for path in folder.iterdir() if path.is_file()}
        for path in sorted(files, key=lambda p: p.name):
            if path.suffix in (".json", ".safetensors", ".model", ".txt"):
                with path.open("rb") as file:
                    digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
        return digest.hexdigest()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._device = fn(torch.empty(0, device=self._device)).device  # only the device: the dtype is the configuration's
        if "model" in self._held:
            self._held["model"].to(self._device)
        return self


def _loaded(folder: Path, class_name: str, dtype: torch.dtype, **more: Any) -> Any:
    transformers = require("transformers", "text")
    if not list(folder.glob("*.safetensors")):
        other = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".msgpack", ".h5"))
        there = f"; there is {', '.join(other)}" if other else ""
        raise WeightsError(
            f"{folder} holds no weights in safetensors files{there}", hint="save the model with transformers' save_pretrained"
        )
    try:
        model, report = getattr(transformers, class_name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True, **more
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{folder} cannot be read as {class_name}: {_line(error)}", hint="check its files") from None
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(f"{folder} lacks {', '.join(missing[:3])} of a {class_name}", hint="its config.json is of another model")
    return model.eval().requires_grad_(False)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
