"""ControlNet: what it adds by hand, zero at first, its input in runs and pipelines, training with a frozen base, files, refusals."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import ditkit
from ditkit.backbones.dit import DiT
from ditkit.backbones.pixart import PixArt
from ditkit.core.backbone import Backbone
from ditkit.core.errors import Conflict, DitkitError
from ditkit.core.method import Method
from ditkit.core.run import Run
from ditkit.core.seams import Seam
from ditkit.core.view import with_methods
from ditkit.diffusion.flow import Flow
from ditkit.methods.adaptation.lora import LoRA
from ditkit.methods.control.controlnet import ControlNet
from ditkit.methods.efficiency.fora import FORA
from ditkit.methods.efficiency.int8 import Int8
from ditkit.methods.efficiency.ras import RAS
from ditkit.testing.contract import draw
from ditkit.testing.training import tiny_recipe
from ditkit.train import train
from ditkit.train.control import edges
from ditkit.train.objectives import objective_from

TINIES = {"dit": DiT.tiny, "pixart": PixArt.tiny}


def attached(model: Backbone, **values: object) -> tuple[Backbone, ControlNet]:
    """A view whose ControlNet has drawn parameters."""
    net = ControlNet(**values)
    return draw(with_methods(model, net)), net


@torch.no_grad()
def test_the_equation_by_hand() -> None:
    model = DiT.tiny()
    view, net = attached(model, blocks=2, strength=0.7)
    x, t, cond = model.example()
    prepared, control = model.prepare(**cond), x.flip(-1)
    s, k = model.embed(x, t, prepared), model.embed(control, t, prepared)["img"].x

    def through(block: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return block({"img": s["img"]._replace(x=tokens)}, Seam())["img"].x

    h = through(model.blocks[0], s["img"].x)
    c = through(net.copies[0], h + net.before(k))
    h = through(model.blocks[1], h + 0.7 * net.after[0](c))
    h = through(model.blocks[2], h + 0.7 * net.after[1](through(net.copies[1], c)))
    h = through(model.blocks[3], h)
    want = model.unembed(model.head({"img": s["img"]._replace(x=h)}), x)
    assert torch.allclose(view(x, t, **cond, control=control), want, atol=1e-6)


@pytest.mark.parametrize("name", TINIES)
@torch.no_grad()
def test_fresh_or_without_its_input_it_is_the_base(name: str) -> None:
    model = TINIES[name]()
    x, t, cond = model.example()
    base = model(x, t, **cond)
    fresh = with_methods(model, ControlNet(blocks=1))
    assert torch.equal(fresh(x, t, **cond, control=x.flip(-1)), base)
    view, _ = attached(model, blocks=1)
    assert torch.equal(view(x, t, **cond), base)
    assert not torch.equal(view(x, t, **cond, control=x.flip(-1)), base)
    assert torch.equal(view(x, t, **cond, control=x[:1]), view(x, t, **cond, control=x[:1].expand_as(x)))


def test_default_is_one_less_than_half() -> None:
    assert len(attached(DiT.tiny(depth=6))[1].copies) == 2
    assert len(attached(DiT.tiny(depth=2))[1].copies) == 1


@pytest.mark.parametrize("method", [LoRA(rank=2), FORA(interval=2), Int8()], ids=["lora", "fora", "int8"])
@torch.no_grad()
def test_it_goes_with_other_methods(method: Method) -> None:
    """The copies are of plain weights, whichever was attached first; both act."""
    model = DiT.tiny()
    net = ControlNet(blocks=2)
    view = draw(with_methods(model, net, method))
    assert {type(m) for b in net.copies for m in b.modules() if hasattr(m, "in_features")} == {torch.nn.Linear}
    later = ControlNet(blocks=2)
    with_methods(with_methods(model, method), later)
    assert {n: p.shape for n, p in later.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}
    x, t, cond = model.example()
    outputs = []
    for control in ({}, {"control": x.flip(-1)}):
        run = Run(view, 4, inputs=control)
        for _ in run.steps():
            out = view(x, t, view.prepare(**cond), run=run)
            run.close(out)
        outputs.append(out)
        assert run.finish()["controlnet"] == {"controlled": bool(control)}
    assert not torch.equal(*outputs)


def test_refusals() -> None:
    model = DiT.tiny()
    x, t, cond = model.example()
    view, net = attached(model, blocks=1)
    with pytest.raises(Conflict, match="copies 4 blocks of 4"):
        with_methods(model, ControlNet(blocks=4))
    with pytest.raises(Conflict, match="model of other sizes"):
        with_methods(DiT.tiny(dim=16), net)
    with pytest.raises(Conflict, match="static tokens"):
        with_methods(model, ControlNet(blocks=1), RAS(sample_ratio=0.5))
    with pytest.raises(DitkitError, match="no method takes the input"):
        Run(model, inputs={"control": x})
    with pytest.raises(DitkitError, match="control is"):
        view(x, t, **cond, control=x[..., :4])
    with pytest.raises(DitkitError, match="3 rows for a batch of 2"):
        view(x, t, **cond, control=torch.cat([x, x[:1]]))
    with pytest.raises(DitkitError, match="no method takes a control"):
        objective_from("control", {}, Flow()).begin(model)
    with pytest.raises(DitkitError, match="have no 'control'"):
        objective_from("control", {"condition": "data"}, Flow()).loss(view, {"x": x})


def test_edges_are_gradients() -> None:
    x = torch.linspace(-1, 1, 9).expand(1, 3, 9, 9)  # a ramp of 0.25 a pixel: the filter's 8 x 0.25, over 8
    assert torch.allclose(edges(x)[..., 1:-1], torch.tensor(2 * 0.25 - 1))
    assert torch.equal(edges(torch.zeros(2, 1, 5, 5)), -torch.ones(2, 1, 5, 5))


def test_only_the_copies_learn_and_the_loss_falls() -> None:
    """A base that knows nothing of the digits' edges; after some steps its ControlNet does. The base keeps its bits."""
    model = DiT.tiny(in_channels=3, out_channels=3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    view = with_methods(model, ControlNet(blocks=2))
    for n, p in view.named_parameters():
        p.requires_grad_(n.startswith("methods."))
    objective = objective_from("control", {"label_dropout": 0.5}, Flow())
    objective.begin(view)
    x, _, cond = model.example(4)
    g = torch.Generator().manual_seed(0)
    batch = {
        "x": x,
        **cond,
        "noise": torch.randn(x.shape, generator=g),
        "time": torch.rand(4, generator=g),
        "drop": torch.rand(4, generator=g),
    }
    optimizer = torch.optim.AdamW([p for p in view.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = objective.loss(view.train(), batch).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet trained by a recipe on a base that a recipe trained."""
    folder = tmp_path_factory.mktemp("controlnet")
    train(tiny_recipe(steps=1), folder / "base", progress=False)
    sections = {"base": str(folder / "base"), "backbone": None, "process": None, "trainable": ["methods.*"]}
    sections |= {"methods": [{"name": "controlnet", "config": {"blocks": 1}}], "objective": {"name": "control"}}
    train(tiny_recipe(sections, steps=3, ema_decay=0.0), folder / "net", progress=False)
    return folder


def test_a_recipe_a_file_and_a_picture(bundle: Path, tmp_path: Path) -> None:
    assert (bundle / "net" / "model.safetensors").read_bytes() == (bundle / "base" / "model.safetensors").read_bytes()
    pipe = ditkit.from_pretrained(bundle / "net")
    options = dict(class_labels=[3, 5], num_inference_steps=2, progress=False)
    plain, base = pipe(**options), ditkit.from_pretrained(bundle / "base")(**options)
    assert torch.equal(plain.x, base.x)
    picture = Image.fromarray((torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    picture.save(tmp_path / "edges.png")
    drawn = pipe(**options, inputs={"control": tmp_path / "edges.png"})
    assert not torch.equal(drawn.x, plain.x)
    assert torch.equal(drawn.x, pipe(**options, inputs={"control": [picture, picture]}, batch_size=2).x)
    assert list(drawn.record["inputs"]) == ["control"]
    again = {**drawn.record, "seed": drawn.seeds[1], "class_label": 5}
    assert (pipe.remake(again, inputs={"control": picture}).x - drawn.x[1:]).abs().max() < 1e-5
    with pytest.raises(DitkitError, match="made with inputs"):
        pipe.remake(again)
    later = ditkit.from_pretrained(bundle / "base").with_methods(bundle / "net" / "methods" / "controlnet.json")
    assert torch.equal(later(**options, inputs={"control": picture}).x, drawn.x)
    for wrong, message in (
        (picture.resize((4, 4)), "control is"),
        ([], "no picture"),
        (tmp_path / "none.png", "does not exist"),
        (3, "is a int"),
    ):
        with pytest.raises(DitkitError, match=message):
            pipe(**options, inputs={"control": wrong})
    with pytest.raises(DitkitError, match="no method takes"):
        pipe(**options, inputs={"depth": picture})
