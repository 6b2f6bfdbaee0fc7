"""diffusers' scheduler_config.json -> our process and sampling defaults. Keys and values we do not know are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ditkit.bundle import BundleConfig, Part, Sampling
from ditkit.core.config import Config, read_data
from ditkit.core.errors import ConfigError, nearest

from .hints import without_notes


class _Betas(Config):
    """What all of diffusers' Gaussian schedulers share. Fields of one allowed value are those that ours compute in no other way."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = Field(0, ge=0)  # only of the spacing "leading"
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: Literal[False] = False


class _DDIM(_Betas):
    clip_sample: bool = True
    clip_sample_range: float = Field(1.0, ge=1, le=1)
    set_alpha_to_one: Literal[True] = True
    skip_prk_steps: Any = None  # left over from other schedulers


class _DDPM(_Betas):
    clip_sample: bool = True
    clip_sample_range: float = Field(1.0, ge=1, le=1)
    variance_type: Literal["fixed_small", "fixed_large", "learned_range", "learned"] = "fixed_small"


class _DPM(_Betas):
    timestep_spacing: Literal["trailing", "linspace"] = "linspace"
    algorithm_type: Literal["dpmsolver++"] = "dpmsolver++"
    solver_order: Literal[2, 3] = 2
    solver_type: Literal["midpoint"] = "midpoint"
    lower_order_final: Literal[True] = True
    euler_at_final: Literal[False] = False
    final_sigmas_type: Literal["zero"] = "zero"
    lambda_min_clipped: Any = None
    variance_type: Literal["learned", "learned_range"] | None = None
    use_karras_sigmas: Literal[False] | None = False
    use_exponential_sigmas: Literal[False] | None = False
    use_beta_sigmas: Literal[False] | None = False
    use_lu_lambdas: Literal[False] | None = False
    use_flow_sigmas: Literal[False] | None = False
    use_dynamic_shifting: Literal[False] | None = False
    flow_shift: float | None = 1.0  # of flows only
    time_shift_type: str = "exponential"

    @field_validator("lambda_min_clipped")
    @classmethod
    def _not_clipped(cls, value: Any) -> Any:
        if value not in (None, -math.inf):
            raise ValueError("only -Infinity, no clipping")
        return value


class _FlowMatch(Config):
    num_train_timesteps: int = Field(1000, ge=1)
    shift: float = Field(1.0, gt=0)
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: Literal[False] = False
    shift_terminal: None = None
    use_karras_sigmas: Literal[False] | None = False
    use_exponential_sigmas: Literal[False] | None = False
    use_beta_sigmas: Literal[False] | None = False
    time_shift_type: Literal["exponential"] = "exponential"
    stochastic_sampling: Literal[False] = False


SCHEDULERS: dict[str, tuple[str, type[_Betas]]] = {
    "DDIMScheduler": ("ddim", _DDIM),
    "DDPMScheduler": ("ddpm", _DDPM),
    "DPMSolverMultistepScheduler": ("dpm++2m", _DPM),
}
_PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def read_scheduler(path: Path, learned: bool) -> tuple[Part, Sampling]:
    """Process and sampling of a scheduler's configuration; without a file, those of DiT's release.

    Args:
        learned: the network has output channels for the variance.
    """
    if not path.is_file():
        return gaussian(learned), Sampling(solver="ddim", num_inference_steps=50, guidance={"scale": 4.0})
    values = read_data(path)
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name not in SCHEDULERS:
        raise ConfigError(f"{path}: _class_name is {name!r}", allowed=", ".join(SCHEDULERS), hint=nearest(str(name), SCHEDULERS) or "")
    solver, schema = SCHEDULERS[name]
    cfg: Any = schema.parse(without_notes(values), str(path))
    process = gaussian(
        learned,
        num_train_steps=cfg.num_train_timesteps,
        schedule=cfg.beta_schedule,
        beta_range=None if cfg.beta_schedule == "squaredcos_cap_v2" else [cfg.beta_start, cfg.beta_end],
        prediction=_PREDICTION[cfg.prediction_type],
        **({"variance": cfg.variance_type} if not learned and str(getattr(cfg, "variance_type", "")).startswith("fixed") else {}),
    )
    if name == "DPMSolverMultistepScheduler":
        solver = f"dpm++{cfg.solver_order}m"
        spacing = "dpm" if cfg.timestep_spacing == "linspace" else cfg.timestep_spacing
        return process, Sampling(solver=solver, num_inference_steps=20, guidance={"scale": 4.5}, options={"spacing": spacing})
    offset = f"+{cfg.steps_offset}" if cfg.timestep_spacing == "leading" and cfg.steps_offset else ""
    options = {"spacing": cfg.timestep_spacing + offset, "clip": cfg.clip_sample}
    return process, Sampling(solver=solver, num_inference_steps=50, guidance={"scale": 4.0}, options=options)


def read_flow_scheduler(path: Path, process: Part, sampling: Sampling) -> tuple[Part, Sampling]:
    """``process`` and ``sampling`` with the shift of a FlowMatchEulerDiscreteScheduler's configuration.

    A static shift is applied once, where diffusers applies it twice to the last step (``spacing="twice"`` has its times). Steps,
    guidance, and the spacing of a pipeline that makes its times itself (FLUX) are the pipeline's, not the scheduler's, and stay.
    """
    values = read_data(path)
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name != "FlowMatchEulerDiscreteScheduler":
        raise ConfigError(f"{path}: _class_name is {name!r}", allowed="FlowMatchEulerDiscreteScheduler")
    cfg = _FlowMatch.parse(without_notes(values), str(path))
    if cfg.use_dynamic_shifting:  # tokens are of 2 x 2 latent pixels
        mu = ((4 * cfg.base_image_seq_len, cfg.base_shift), (4 * cfg.max_image_seq_len, cfg.max_shift))
        settings: dict[str, Any] = {"resolution": "exponential", "mu": mu}
    else:
        settings = {"shift": cfg.shift, "num_train_steps": cfg.num_train_timesteps}
    options = {"spacing": "uniform" if cfg.use_dynamic_shifting else "linspace", **sampling.options}
    told: dict[str, Any] = {key: process.config[key] for key in ("network_time", "discard_half") if key in process.config}
    return Part(name="flow", config={**told, **settings}), sampling.model_copy(update={"options": options})


def gaussian(learned: bool, **values: Any) -> Part:
    """The Gaussian process; with "learned" variance where the network has channels for it."""
    return Part(name="gaussian", config={"variance": "learned" if learned else "fixed_large", **values})


def write_scheduler(config: BundleConfig) -> dict[str, Any] | None:
    """The scheduler_config.json of a bundle, as ``read_scheduler`` reads it; None where diffusers has no such process."""
    from ditkit.diffusion.gaussian import GaussianConfig

    if config.process.name != "gaussian":
        return None
    cfg = GaussianConfig.parse(config.process.config, "process gaussian")
    names = {"ddpm": "DDPMScheduler"} | dict.fromkeys(("dpm++2m", "dpm++3m"), "DPMSolverMultistepScheduler")
    name = names.get(config.sampling.solver, "DDIMScheduler")
    options = config.sampling.options
    spacing, _, offset = str(options.get("spacing", "linspace")).partition("+")
    scale = 1000 / cfg.num_train_steps
    start, end = cfg.beta_range or (1e-4 * scale, 0.02 * scale)
    values: dict[str, Any] = {
        "_class_name": name,
        "num_train_timesteps": cfg.num_train_steps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": cfg.schedule,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTION.items()}[cfg.prediction],
        "timestep_spacing": spacing if spacing in ("leading", "trailing", "linspace") else "leading",
        **({"steps_offset": int(offset)} if offset else {}),
    }
    if name == "DPMSolverMultistepScheduler":
        order = {"solver_order": 3} if config.sampling.solver == "dpm++3m" else {}
        return {**values, "timestep_spacing": "trailing" if spacing == "trailing" else "linspace", **order}
    values["clip_sample"] = options.get("clip", False)
    if name == "DDPMScheduler":
        values["variance_type"] = "fixed_small" if cfg.variance == "fixed_small" else "fixed_large"
    return values
