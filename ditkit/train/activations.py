"""Activation checkpointing of a view's blocks: less memory for more arithmetic. Off unless the recipe asks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ditkit.core.backbone import Backbone, count_graphs
from ditkit.core.view import allow_graphs, shallow

_aten: Any = torch.ops.aten
_KEEP = {  # products and attention cost the time: their results are kept, all that is cheap is computed again
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpoint_activations(model: Backbone, how: str, compiled: bool = False) -> Backbone:
    """A view whose blocks keep only their input ("full"), or also the results of matrix products ("selective").

    Args:
        compiled: each block and its recomputation become one graph.
    """
    view = shallow(model)
    # the model has no random numbers of its own: there is no generator's state to preserve
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    view._call = partial(checkpoint, view._call, **options)
    if compiled:
        allow_graphs(2 * count_graphs(view, 1))
        view._call = torch.compile(view._call, fullgraph=True, dynamic=False)
    return view


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEEP else CheckpointPolicy.PREFER_RECOMPUTE
