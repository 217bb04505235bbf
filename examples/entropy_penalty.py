"""A penalty on the entropy of attention: a model trained with it solves the same task with sharper attention maps.

`differentiable=True` lets a statistic carry gradients into query and key. The backward pass recomputes the map tile by
tile, so that the penalty costs O(T) memory at any length. The task: read `T` symbols, and at each of them predict the
one `--lag` symbols before. Both models start from the same seed and see the same sequences.

    python examples/entropy_penalty.py
    python examples/entropy_penalty.py --strength 0.01 --length 64 --steps 500
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

import attnstats

SYMBOLS, WIDTH, HEADS, LAYERS, BATCH = 16, 32, 2, 1, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.into(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        output, stats = attnstats.attention(query, key, value, statistics=["entropy"], differentiable=True)
        return self.out(output.transpose(1, 2).flatten(2)), stats["entropy"].mean()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norms = Attention(), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, entropy = self.attention(self.norms[0](x))
        x = x + attended
        return x + self.mlp(self.norms[1](x)), entropy


class Model(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the mean entropy of all rows of all heads and layers, in nats."""
        x = self.symbols(ids) + self.positions.weight
        entropies = []
        for block in self.blocks:
            x, entropy = block(x)
            entropies.append(entropy)
        return self.head(x), torch.stack(entropies).mean()


def train(strength: float, options: argparse.Namespace) -> list[tuple[float, float]]:
    """The loss on the task and the entropy at every step."""
    torch.manual_seed(options.seed)
    model = Model(options.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(options.steps):
        ids = torch.randint(SYMBOLS, (BATCH, options.length))
        logits, entropy = model(ids)
        loss = functional.cross_entropy(logits[:, options.lag :].flatten(0, 1), ids[:, : -options.lag].flatten())
        optimizer.zero_grad()
        (loss + strength * entropy).backward()
        optimizer.step()
        history.append((loss.item(), entropy.item()))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strength", type=float, default=0.05, help="factor of the mean entropy in the loss")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--lag", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    plain, penalised = train(0.0, options), train(options.strength, options)
    print(f"{'':>5}  {'no penalty':^14}  {f'{options.strength} x entropy':^14}")
    print(f"{'step':>5}  {'loss':>5}  {'entropy':>7}  {'loss':>5}  {'entropy':>7}")
    shown = sorted({*range(0, options.steps, max(1, options.steps // 6)), options.steps - 1})
    for step in shown:
        print(
            f"{step:5}  "
            + "  ".join(f"{loss:5.3f}  {entropy:7.3f}" for loss, entropy in (plain[step], penalised[step]))
        )


if __name__ == "__main__":
    main()
