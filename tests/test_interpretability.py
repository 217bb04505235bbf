"""The code of docs/interpretability.md, with nnsight and TransformerLens where they are installed."""

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import attnstats
from attnstats.errors import InputError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "interpretability.md"
WORDS = {"_": 0, ".": 1, "a": 2, "b": 3}


def run(name: str, scope: dict[str, Any]) -> None:
    """Execute the page's blocks of this name, in order, in one scope."""
    blocks = re.findall(rf"<!-- code: {name} -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        # nnsight reads a trace's lines from its file.
        path = scope["folder"] / f"{name}_{number}.py"
        path.write_text(block, encoding="utf-8")
        exec(compile(block, str(path), "exec"), scope)


@pytest.fixture
def scope(tmp_path):
    scope: dict[str, Any] = {"folder": tmp_path, "__name__": "page"}
    run("model", scope)
    return scope


@pytest.fixture
def tokenizer(tmp_path):
    """From a folder, as TransformerLens reads a tokenizer again to add its first token."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="_"))
    names = {"pad_token": "_", "eos_token": "."}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path / "words")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "words")


def test_every_block_of_the_page_has_a_name_that_is_run():
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("```python") == len(
        re.findall(r"<!-- code: (?:model|nnsight|transformer_lens) -->\n```python", text)
    )


def test_the_model(scope):
    assert scope["plain"]["waad"].shape == (3, 1, 4, 40)


def test_nnsight(scope):
    pytest.importorskip("nnsight", reason="pip install nnsight")
    run("nnsight", scope)


def test_transformer_lens(scope, tokenizer):
    pytest.importorskip("transformer_lens", reason="pip install transformer-lens")
    scope["tokenizer"] = tokenizer
    run("transformer_lens", scope)
    with pytest.raises(InputError, match="of another library took the place"):
        attnstats.capture(scope["model"], **scope["settings"]).__enter__()

    with torch.no_grad(), scope["bridge"].hooks(fwd_hooks=[("blocks.1.attn.hook_attn_scores", attend_to_the_first)]):
        _, cache = scope["bridge"].run_with_cache(scope["ids"])
    lse = cache["blocks.1.attn.hook_attn_scores"].logsumexp(-1)
    with pytest.raises(ValueError, match="lse: not the natural log"):
        attnstats.statistics_from_lse(scope["query"], scope["key"], lse, statistics=["received"], enable_gqa=True)

    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=3, n_head=4, initializer_range=0.2)
    without_rope = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad(), attnstats.capture(without_rope, **scope["settings"]) as plain:
        without_rope(scope["ids"])
    bridge = scope["TransformerBridge"].boot_transformers("tiny", hf_model=without_rope, tokenizer=tokenizer)
    _, found = scope["statistics"](bridge, ("hook_q", "hook_k", "hook_v"), statistics=["waad"])
    for layer, stats in enumerate(found):
        torch.testing.assert_close(stats["waad"], plain["waad"][layer], atol=1e-4, rtol=1e-4)


def attend_to_the_first(scores: torch.Tensor, hook: Any) -> torch.Tensor:
    return torch.cat([scores[..., :1] + 5, scores[..., 1:]], -1)
