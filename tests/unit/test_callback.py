"""The callback of a pipeline: called once a solver step, with what the network saw and foresees; it changes nothing."""

import pytest
import torch

from ditkit.backbones.dit import DiT
from ditkit.bundle import BundleConfig, DataCard, Part, Sampling
from ditkit.pipeline import Pipeline, StepEnd


@pytest.fixture(scope="module")
def pipe():
    model = DiT.tiny(depth=2, out_channels=3)
    config = BundleConfig(
        backbone=Part(name="dit", config=model.config.to_dict()),
        process=Part(name="flow"),
        data=DataCard(name="noise", shape=(3, 8, 12)),
        sampling=Sampling(solver="euler", num_inference_steps=4),
    )
    return Pipeline(model, config)


def follow(pipe, **options):
    """The output, and every step's end with copies of its tensors and its x0."""
    ends: list[tuple[StepEnd, torch.Tensor, torch.Tensor]] = []
    out = pipe([1, 2, 3], progress=False, callback_on_step_end=lambda end: ends.append((end, end.x.clone(), end.x0.clone())), **options)
    return out, ends


def test_it_changes_no_bit(pipe):
    out, _ = follow(pipe, guidance_scale=2.0)
    assert torch.equal(out.x, pipe([1, 2, 3], progress=False, guidance_scale=2.0).x)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++2m", "rk4"])
def test_once_a_step_whatever_the_evaluations(pipe, solver):
    _, ends = follow(pipe, solver=solver, num_inference_steps=5)
    assert [end.step for end, *_ in ends] == [0, 1, 2, 3, 4]
    assert {end.num_inference_steps for end, *_ in ends} == {5}


def test_an_adaptive_solver_counts_the_steps_it_took(pipe):
    _, ends = follow(pipe, solver="dopri5", num_inference_steps=200, solver_options={"rtol": 1e-2, "atol": 1e-2})
    assert [end.step for end, *_ in ends] == list(range(len(ends)))
    assert 1 < len(ends) < 200


def test_euler_arrives_at_the_data_it_foresees_last(pipe):
    """x_t = (1 - t) x0 + t noise: a straight step from t to 0 along the velocity ends at the x0 foreseen from x_t."""
    out, ends = follow(pipe)
    torch.testing.assert_close(ends[-1][2].clamp(-1, 1), out.x, atol=1e-5, rtol=0)
    times = [float(end.t[0]) for end, *_ in ends]
    assert times == pytest.approx([1.0, 0.75, 0.5, 0.25])
    velocity = (ends[0][1] - ends[0][2]) / times[0]
    torch.testing.assert_close(ends[1][1], ends[0][1] - 0.25 * velocity, atol=1e-5, rtol=0)


def test_nobody_writes_into_the_tensors_that_were_handed_out(pipe):
    kept = []
    pipe([1], progress=False, callback_on_step_end=lambda end: kept.append((end, end.x.clone(), end.output.clone())))
    for end, x, output in kept:
        assert torch.equal(end.x, x)
        assert torch.equal(end.output, output)


def test_every_batch_says_where_it_begins(pipe):
    _, ends = follow(pipe, batch_size=2)
    assert [(end.first, len(end.x)) for end, *_ in ends] == [(0, 2)] * 4 + [(2, 1)] * 4


def test_x0_is_computed_only_when_asked_for(pipe, monkeypatch):
    calls = []
    predict = type(pipe.process).predict
    monkeypatch.setattr(type(pipe.process), "predict", lambda *a: calls.append(0) or predict(*a))
    pipe([1], progress=False)
    without = len(calls)
    pipe([1], progress=False, callback_on_step_end=lambda end: None)
    assert len(calls) == 2 * without


def test_what_it_raises_ends_the_call(pipe):
    class Enough(Exception):
        pass

    steps = []

    def stop(end):
        steps.append(end.step)
        if end.step == 1:
            raise Enough

    with pytest.raises(Enough):
        pipe([1], progress=False, callback_on_step_end=stop)
    assert steps == [0, 1]
