"""A U-shaped trunk, as in HunyuanDiT: a block of the second half sees the output of its mirror. The trunk serves the skips."""

import torch
from torch import Tensor, nn

from ditkit.backbones.dit import DiT, DiTConfig, draw_parameters
from ditkit.core import registry
from ditkit.core.seams import Seam
from ditkit.core.streams import Streams
from ditkit.nn.adaln import AdaLNBlock, AdaLNPart


class SkipBlock(AdaLNBlock):
    """The adaLN block with a linear layer in front that joins the skip."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__({"img": AdaLNPart(dim, num_heads)})
        self.join = nn.Linear(2 * dim, dim)

    def forward(self, s: Streams, seam: Seam, kv: Streams | None = None, skip: dict[str, Tensor] | None = None) -> Streams:
        if skip is None:
            raise TypeError("a skip block needs its skip")
        return super().forward({**s, "img": s["img"]._replace(x=self.join(torch.cat([s["img"].x, skip["img"]], -1)))}, seam, kv)


@registry.register("backbones", "long_skips")
class LongSkips(DiT):
    """x, t, y as DiT."""

    sizes = {}

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        half = config.depth // 2
        for i in range(half, config.depth):
            self.blocks[i] = SkipBlock(config.dim, config.num_heads)
        self.skips = tuple((config.depth - 1 - i, i) for i in range(half, config.depth))

    @classmethod
    def tiny(cls) -> "LongSkips":
        torch.manual_seed(2)
        return draw_parameters(
            cls(DiTConfig(input_size=(8, 8), in_channels=3, out_channels=3, dim=24, depth=4, num_heads=3, num_classes=5))
        ).eval()
