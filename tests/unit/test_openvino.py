"""OpenVINO as an engine: the same numbers, the same graphs, the weights of the moment, and clear refusals."""

import sys

import pytest
import torch

from ditkit.backbones.dit import DiT, draw_parameters
from ditkit.core.backbone import count_graphs
from ditkit.core.errors import ConfigError, DitkitError, MissingDependency
from ditkit.core.openvino import Converted
from ditkit.core.run import Run
from ditkit.core.view import compile_view, with_methods
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.int8 import Int8
from ditkit.methods.specs import parse_spec

pytestmark = pytest.mark.slow


def tiny():
    return draw_parameters(DiT(dim=16, depth=2, num_heads=2, input_size=(8, 8), patch_size=4, in_channels=2, out_channels=2)).eval()


def difference(a, b):
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def outputs(model, steps=3):
    x, t, cond = model.example()
    run = Run(model, steps)
    return [model(x + i, t, run=run, **cond) for i in run.steps()]


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'ditkit[openvino]'")


@pytest.mark.compile
def test_the_numbers_are_the_eager_ones_and_the_graphs_those_of_the_schedule(openvino):
    model = with_methods(tiny(), FORA(interval=2))
    view = compile_view(model, "step", engine="openvino")
    torch._dynamo.utils.counters.clear()
    for got, want in zip(outputs(view), outputs(model)):
        assert difference(got, want) <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count_graphs(model, 3)


@pytest.mark.compile
def test_blocks_of_one_kind_keep_their_own_weights_and_what_is_written_to_them_is_seen(openvino):
    model = tiny()
    view = compile_view(model, "block", engine="openvino")
    assert difference(outputs(view, 1)[0], outputs(model, 1)[0]) <= 1e-5
    with torch.no_grad():
        next(model.blocks[1].parameters()).mul_(3)
    assert difference(outputs(view, 1)[0], outputs(model, 1)[0]) <= 1e-5


@pytest.mark.compile
def test_what_it_cannot_do_is_said(openvino):
    with pytest.raises(DitkitError, match="computes no gradients"):
        Converted(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)))(torch.ones(1, 2))
    with pytest.raises(DitkitError, match="leave int8 out"):
        outputs(compile_view(with_methods(tiny(), Int8()), engine="openvino"))
    with torch.no_grad(), pytest.raises(DitkitError, match=r"for fp32 on a CPU, and this model is torch.float64"):
        Converted(torch.fx.symbolic_trace(torch.nn.Linear(2, 2).double()))(torch.ones(1, 2, dtype=torch.float64))


def test_an_unknown_engine_and_a_missing_one_are_named(monkeypatch):
    with pytest.raises(DitkitError, match="engine is 'tensorrt'.*inductor"):
        compile_view(tiny(), engine="tensorrt")
    with pytest.raises(ConfigError, match="engine=tensorrt"):
        parse_spec("compile:engine=tensorrt")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match=r"ditkit\[openvino\]"):
        compile_view(tiny(), engine="openvino")


def test_a_line_names_it():
    spec = parse_spec("fora:interval=2+compile:engine=openvino")
    assert (spec.grain, spec.engine, spec.compilation) == ("step", "openvino", "compile:grain=step,engine=openvino")
    assert parse_spec("compile").compilation == "compile:grain=step"
