"""patch_sdpa on a vision transformer of timm's, as a process of its own: `python -m tests.vision`.

timm needs torchvision, whose build on PyPI belongs to another build of torch than a CPU one: its compiled operators
don't load, and importing it then fails, also for a transformers that finds it. So `make` installs both where only
this process looks, and the operators that its Python code mentions are declared here, without a body.
"""

import sys
from pathlib import Path

import torch

import attnstats

FOLDER = Path(sys.prefix) / "vision"


def check() -> None:
    sys.path.insert(0, str(FOLDER))
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64).eval()
    assert model.blocks[0].attn.fused_attn, "timm calls SDPA"
    images = torch.randn(2, 3, 64, 64)
    inputs: list[torch.Tensor] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        expected = model(images)
        with attnstats.patch_sdpa(statistics=["entropy", "received"]) as run:
            output = model(images)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
        assert len(run) == len(model.blocks) == 12
        # The first block's map by hand: 16 patches and the class token.
        query, key, _ = model.blocks[0].attn.qkv(inputs[0]).reshape(2, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)
        weights = (query.double() @ key.double().mT / 8).softmax(-1)
    torch.testing.assert_close(run[0]["received"].double(), weights.sum(-2), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(run[0]["entropy"].double(), torch.special.entr(weights).sum(-1), atol=1e-5, rtol=0.0)
    assert not torch.equal(run[0]["received"], run[1]["received"])


if __name__ == "__main__":
    check()
    print("passes")
