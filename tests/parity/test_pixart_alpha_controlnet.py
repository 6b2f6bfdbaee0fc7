"""PixArt's ControlNet against the released classes: every output of pixart-alpha-controlnet.safetensors."""

import pytest
import torch
from golden import open_golden, relative
from released_pixart import Released

from ditkit.core.run import Run
from ditkit.core.view import with_methods
from ditkit.diffusion.guidance import Guidance, guided
from ditkit.interop.pixart import Constructor
from ditkit.interop.pixart_control import controlnet_from_official

G = open_golden("pixart-alpha-controlnet")
pytestmark = pytest.mark.parity


class Base:
    """The file's base network, under the names of a file that holds nothing else."""

    def __init__(self, g):
        self.metadata, self.call = g.metadata, g.call
        self.config = {name: value for name, value in g.config.items() if name in Constructor.model_fields}
        self._names = {n.replace("w/base_model.", "w/"): n for n in g.names if not n.startswith("w/controlnet")}
        self.names = sorted(self._names)

    def __getitem__(self, name):
        return G[self._names[name]]

    def starting(self, prefix):
        return [name for name in self.names if name.startswith(prefix)]


class Controlled(Released):
    """The base with the file's ControlNet, in float32 or float64."""

    def __init__(self, double):
        super().__init__(Base(G), double)
        self.base = self.model
        copies = {n.removeprefix("w/"): G[n].to(self.dtype) for n in G.starting("w/controlnet")}
        self.model = with_methods(self.base, controlnet_from_official(copies, self.base))

    @torch.no_grad()
    def compute(self, name):
        x, t, c = self["x"], self["t"], self["c"]
        match name:
            case "forward_control":
                return self.model(x, t, **self.cond(), control=c)
            case "forward_no_control":
                plain = self.model(x, t, **self.cond())
                assert torch.equal(plain, self.base(x, t, **self.cond()))
                return plain
            case "control_tokens":
                prepared = self.base.prepare(**self.cond())
                return self.base.embed(c, t, prepared)["img"].x
            case "forward_with_dpmsolver_c1":
                return self.both_halves(x, t, c[:1])
        raise AssertionError(f"{name} is new: say here what it is")

    def both_halves(self, x, t, control):
        """One control picture for all rows of both passes: in two passes, and in one of twice the batch."""
        rows = [self.model(x, t, **self.cond(null=null), control=control)[:, : x.shape[1]] for null in (False, True)]
        public = (t.double() + 1) / self.process.config.num_train_steps
        run = Run(self.model, inputs={"control": control})
        options = Guidance(scale=self.g.call["cfg"], batched=True)
        both = guided(self.model, self.process, options, run, self.cond(), self.cond(null=True))(x, public)
        want = rows[1] + options.scale * (rows[0] - rows[1])
        assert relative(both[:, : x.shape[1]], want) <= 1e-5
        return torch.cat(rows)


@pytest.mark.parametrize("name", G.starting("out"))
def test_output(name):
    kind, _, output = name.partition("/")
    assert relative(Controlled(kind == "out64").compute(output), G[name]) <= 1e-5
