"""A GPT-2 whose heads are known, as its weights are set by hand: an induction circuit and heads of other kinds.

A token's hidden state has a one for its word, one for its position, and after the first layer one for the word before
it. The MLPs add nothing. Heads:

    0.0 the token before, whose word it writes        1.0 induction: the token after the earlier same word
    0.1 the first token                               1.1 the word KEY
    0.2 all tokens alike                              1.2 all tokens alike
    0.3 the token itself and the one before, alike    1.3 the same word
"""

from typing import Any

import torch

from tests.tiny import VOCABULARY

SIZE = VOCABULARY  # of vocabulary, positions and head
WORD, POSITION, BEFORE = (slice(i * SIZE, (i + 1) * SIZE) for i in range(3))
KEY = 30
PREVIOUS, SINK, UNIFORM, LOCAL = ((0, head) for head in range(4))
INDUCTION, RECEIVER, UNIFORM_TOO, SAME = ((1, head) for head in range(4))
SHARP = 3.0  # factor of queries and of keys: scores of 60 and more


def known_heads() -> Any:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=SIZE, n_positions=SIZE, n_embd=4 * SIZE, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        one, before = torch.eye(SIZE), torch.diag(torch.ones(SIZE - 1), -1)
        model.transformer.wte.weight[:, WORD] = one
        model.transformer.wpe.weight[:, POSITION] = one
        first, second = (Weights(block.attn, SHARP) for block in model.transformer.h)
        first.look(0, POSITION, before, POSITION)
        first.look_for(1, POSITION.start)
        first.look(3, POSITION, one + before, POSITION)
        first.write(0, WORD, BEFORE)
        second.look(0, WORD, one, BEFORE)
        second.look_for(1, WORD.start + KEY)
        second.look(3, WORD, one, WORD)
    return model


class Weights:
    """The weights of an attention layer of GPT-2, head by head."""

    def __init__(self, attention: Any, sharp: float):
        self.attention, self.sharp = attention, sharp
        self.query, self.key, self.value = attention.c_attn.weight.view(-1, 3, 4, SIZE).unbind(1)

    def look(self, head: int, of: slice, to: torch.Tensor, at: slice) -> None:
        """The query with a one at i in `of` looks at keys with a one at j in `at`, where to[i, j] is 1."""
        self.query[of, head] = self.sharp * to
        self.key[at, head] = self.sharp * torch.eye(SIZE)

    def look_for(self, head: int, at: int) -> None:
        """Every query looks at keys with a one at this place."""
        self.attention.c_attn.bias.view(3, 4, SIZE)[0, head, 0] = self.sharp**2
        self.key[at, head, 0] = self.sharp

    def write(self, head: int, of: slice, to: slice) -> None:
        """The part of `of` of the tokens that are looked at is added to `to`."""
        self.value[of, head] = torch.eye(SIZE)
        # Two ones among 160 entries are about 9 after the layer norm.
        self.attention.c_proj.weight.view(4, SIZE, -1)[head, :, to] = torch.eye(SIZE) / 9
