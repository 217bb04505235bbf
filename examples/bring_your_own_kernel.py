"""Statistics beside an attention kernel of your own, which only has to return the log-sum-exp of its rows.

Two kernels stand in for yours: attention with a running softmax over blocks of keys, in ten lines of PyTorch, and
torch's FlexAttention (compiled on a GPU; on a CPU it runs eagerly and holds its scores). `statistics_from_lse` is told
the mask of the kernel, here a sliding window. The results are compared with attnstats.attention, which computes both.

    python examples/bring_your_own_kernel.py
    python examples/bring_your_own_kernel.py --kernel flex --length 1024
"""

import argparse
import warnings

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import attnstats
from attnstats import FAI, WAAD

BLOCK = 128  # keys


def running_softmax(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Output, and lse (B, H, T) in natural log; a query sees itself and the `window` tokens before it."""
    group, t = query.shape[1] // key.shape[1], torch.arange(query.shape[2], device=query.device)
    output = torch.zeros_like(query)
    lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
    for block in t.split(BLOCK):
        distance = t[:, None] - block
        scores = query @ key[:, :, block].repeat_interleave(group, 1).mT * query.shape[3] ** -0.5
        scores = scores.masked_fill((distance < 0) | (distance > window), -torch.inf)
        grown = torch.logaddexp(lse, scores.logsumexp(-1))
        pivot = grown.nan_to_num(neginf=0.0)[..., None]  # rows that have seen no key yet
        weights = (scores - pivot).exp()
        output = output * (lse[..., None] - pivot).exp() + weights @ value[:, :, block].repeat_interleave(group, 1)
        lse = grown
    return output, lse


def flex(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The same by FlexAttention."""
    length = query.shape[2]
    mask = create_block_mask(
        lambda b, h, t, s: (s <= t) & (t - s <= window), None, None, length, length, device=query.device.type
    )
    attend = torch.compile(flex_attention) if query.is_cuda else flex_attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about running eagerly
        output, aux = attend(query, key, value, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return output, aux.lse


KERNELS = {"running-softmax": running_softmax, "flex": flex}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, default="running-softmax")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=511, help="tokens that a query sees before its own")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    query = torch.randn(1, 9, options.length, 64, device=device)
    key, value = torch.randn(2, 1, 3, options.length, 64, device=device)

    output, lse = KERNELS[options.kernel](query, key, value, options.window)
    masks = {"window_size": (options.window, 0), "enable_gqa": True}
    statistics = [WAAD(10), FAI(10, 100), "entropy"]
    beside = attnstats.statistics_from_lse(query, key, lse, statistics=statistics, **masks)

    same, inside = attnstats.attention(query, key, value, statistics=statistics, **masks)
    print(
        f"{options.kernel}, {options.length} tokens, window {options.window}: largest difference to attnstats.attention"
    )
    differences = {"output": output - same, "lse": lse - inside.lse}
    differences |= {name: beside[name] - inside[name] for name in ("waad", "fai", "entropy")}
    for name, difference in differences.items():
        print(f"  {name:8} {difference.abs().max().item():.1e}")


if __name__ == "__main__":
    main()
