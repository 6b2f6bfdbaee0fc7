"""Two streams with weights of their own, as in MM-DiT: padded text, per-stream modulation, a last block that only reads the text."""

import torch
from torch import Tensor, nn

from ditkit.backbones.dit import DiT, DiTConfig, draw_parameters
from ditkit.core import registry
from ditkit.core.backbone import Backbone, Prepared
from ditkit.core.errors import DitkitError
from ditkit.core.streams import Layout, Stream, Streams
from ditkit.nn.adaln import AdaLNBlock, AdaLNPart


@registry.register("backbones", "two_streams")
class TwoStreams(DiT):
    """x, t, text (B, L, 20), mask (B, L)."""

    sizes = {}

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        del self.label
        self.text_in = nn.Linear(20, config.dim)
        last = config.depth - 1
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                {
                    "img": AdaLNPart(config.dim, config.num_heads, qk_norm=True),
                    "text": AdaLNPart(config.dim, config.num_heads, qk_norm=True, writes=i < last),
                }
            )
            for i in range(config.depth)
        )

    def prepare(self, *, text: Tensor, mask: Tensor) -> Prepared:
        if text.shape[-1] != 20:
            raise DitkitError(f"text is {tuple(text.shape)}", allowed="(B, L, 20)")
        length = text.shape[1]
        layout = Layout(torch.zeros(1, length, 2), length, valid=mask)
        text = self.text_in(text)
        return Prepared({"text": text, "layout": layout, "label": text.mean(1, keepdim=True)})

    def embed(self, x: Tensor, t: Tensor, prepared: Prepared) -> Streams:
        s = super().embed(x, t, prepared)
        return {**s, "text": Stream(prepared.shared["text"], prepared.shared["layout"], s["img"].c)}

    def conditioning(self, t: Tensor, prepared: Prepared) -> dict[str, Tensor]:
        c = super().conditioning(t, prepared)["img"]
        return {"img": c, "text": c}

    @classmethod
    def tiny(cls) -> Backbone:
        torch.manual_seed(1)
        return draw_parameters(
            cls(DiTConfig(input_size=(8, 8), in_channels=4, out_channels=4, dim=24, depth=3, num_heads=3, num_classes=1))
        ).eval()

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        x, t = torch.randn(batch, 4, 8, 8, generator=g), torch.rand(batch, generator=g) * 999
        mask = torch.arange(5)[None] < torch.randint(2, 6, (batch, 1), generator=g)
        return x, t, {"text": torch.randn(batch, 5, 20, generator=g), "mask": mask}
