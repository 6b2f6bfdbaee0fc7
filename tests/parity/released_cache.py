"""Released routers: their tables, and a count of the sub-layers that are really computed."""

import torch
from golden import Golden

from ditkit.core.method import Method
from ditkit.core.view import with_methods


class Counter(Method):
    """Innermost layer: counts the calls of each sub-layer, by step and column."""

    name, stage = "counter", "numbers"

    def start(self, run):
        self.calls, self.num_steps = {}, run.num_steps

    def plan(self, at):
        return at.step, at.block  # a mode of its own each, so that the layer below knows it

    def branch(self, nxt, h, site):
        (step, block), column = site.mode, {"attn": 0, "mlp": 1}[site.branch]
        self.calls[step, 2 * block + column] = self.calls.get((step, 2 * block + column), 0) + 1
        return nxt(h)

    def table(self, columns):
        """(T, J) by the released step index s = T - 1 - step."""
        steps = range(self.num_steps)
        return torch.tensor([[self.calls.get((self.num_steps - 1 - s, j), 0) for j in range(columns)] for s in steps])


def attach(model, router, g: Golden):
    """A view with the router, its table as released, and a counter."""
    counter = Counter()
    view = with_methods(model.requires_grad_(False), router, counter)
    steps = router.config.num_inference_steps
    for i, p in router.routers.items():
        p.data.copy_(g[f"w/routers.{steps - 1 - int(i)}.prob"])
    return view, counter


def hard(net, solve, run, x):
    """x after each step and the outputs, in order of execution."""
    xs, outs = [], []

    def denoise(x, t):
        xs.append(x)
        outs.append(net(run, x, t))
        return outs[-1]

    with torch.no_grad():
        last = solve(denoise, x, run)
    return torch.stack([*xs[1:], last]), torch.stack(outs)
