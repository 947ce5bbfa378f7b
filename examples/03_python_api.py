"""The same from Python: inspect a module of one's own, optimize it, save it, load it and call it.

python examples/03_python_api.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import attnopt

OUT = Path("attnopt-out/python-api")


class Block(nn.Module):
    """A causal transformer block as it is often written: attention spelled out, with a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, seq, width]` to the same shape."""
        batch, seq, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, seq, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        above = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(above, float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, seq, width))
        return x + self.mlp(x)


def main(length: int = 1024, out: Path = OUT) -> float:
    """Optimize the model on inputs `[2, length, 256]`; returns the largest difference of its output
    from the original's.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(256, 8) for _ in range(4))).eval()
    x = torch.randn(2, length, 256)

    for site in attnopt.inspect(model, x, time=False).sites:
        print(f"{site['module']}: {site['heads']} heads, {site['mask']} mask, {site['spelling']}")

    result = attnopt.optimize(model, x, max_drop=0.0, out=out)
    if result.speed is not None:
        ratio = result.speed.ratio
        print(f"{ratio.value:.2f}x over {result.speed.best} ({ratio.kind})")

    faster = attnopt.load(out)
    with torch.no_grad():
        difference = float((faster(x) - model(x)).abs().max())
    print(f"largest difference of the outputs: {difference:.1e}; report: {out / 'report.html'}")
    return difference


if __name__ == "__main__":
    main()
    sys.exit(0)
