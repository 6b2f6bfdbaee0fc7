"""Numbers that are not finite: noticed at the step at which they appear, and traced to the first module that made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class NotFinite(Exception):
    """The network's output at ``step`` holds NaN or infinity."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


def finite(value: Any) -> bool:
    """Whether all floating-point tensors in ``value`` (a tensor, or tuples, lists and dicts of them) are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(finite(v) for v in value.values())
    return not isinstance(value, tuple | list) or all(finite(v) for v in value)


class Watch:
    """Looks at the output of each step: at once on the CPU, on a GPU at the end, so that no step waits."""

    def __init__(self) -> None:
        self._later: list[tuple[int, Tensor]] = []

    def see(self, step: int, output: Tensor) -> None:
        """Raises NotFinite, or remembers to look."""
        flag = torch.isfinite(output).all()
        if output.device.type != "cpu":
            self._later.append((step, flag))
        elif not bool(flag):
            raise NotFinite(step)

    def end(self) -> None:
        """Raises NotFinite for the first step that was not finite."""
        for step, flag in self._later:
            if not bool(flag):
                raise NotFinite(step)


class _Found(Exception):
    pass


def find_module(model: nn.Module, again: Callable[[], Any]) -> str | None:
    """Run ``again`` and return the path of the first module of ``model`` whose output is not finite; None if all are."""

    def hook(path: str) -> Callable[..., None]:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if not finite(output):
                raise _Found(path)

        return check

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules() if path]
    try:
        again()
    except _Found as found:
        return str(found)
    except NotFinite:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None
