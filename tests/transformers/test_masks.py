"""Descriptions of masks against the masks: those that transformers composes, and those made as tensors."""

import pytest
import torch
from transformers import masking_utils

from attnstats.errors import InputError
from attnstats.transformers.masks import MaskDescription, describe_mask, describe_tensor

B, T = 2, 19
LEFT = torch.tensor([0, 5])
PADDING = torch.arange(T)[None] >= LEFT[:, None]
SEGMENTS = torch.tensor([[0] * 4 + [1] * 9 + [2] * 6, [0] * 10 + [1] * 9])
POSITIONS = torch.cat([torch.cat([torch.arange(int(n)) for n in row.bincount()])[None] for row in SEGMENTS])


def packed(function):
    """As transformers packs sequences; 5.17 leaves positions alone."""
    if remap := getattr(masking_utils, "remap_positions_for_packed_sequence", None):
        function = remap(function, POSITIONS)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(SEGMENTS))


CAUSAL = masking_utils.causal_mask_function
UNDERSTOOD = {
    "causal": CAUSAL,
    "full": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "window on both sides": masking_utils.sliding_window_bidirectional_mask_function(4),
    "two windows": masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(4), masking_utils.sliding_window_overlay(7)
    ),
    "chunks": masking_utils.chunked_causal_mask_function(6, LEFT),
    "packed": packed(CAUSAL),
    "packed window": packed(masking_utils.sliding_window_causal_mask_function(3)),
    "no blocks": masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(torch.full((B, T), -1))),
}


def truth(function, queries, keys, padding=None):
    """(B, queries, keys) as transformers makes it."""
    mask = masking_utils.sdpa_mask(
        B, len(queries), len(keys), q_offset=int(queries[0]), kv_offset=int(keys[0]), mask_function=function,
        attention_mask=padding, allow_is_causal_skip=False,
    )  # fmt: skip
    return mask[:, 0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_composed_mask_is_understood(name, padded):
    padding = PADDING if padded else None
    found = describe_mask(B, T, T, mask_function=UNDERSTOOD[name], attention_mask=padding)
    assert found.unknown == ()
    expected = truth(UNDERSTOOD[name], torch.arange(T), torch.arange(T), padding)
    assert torch.equal(found.visible(torch.arange(T)).expand(B, -1, -1), expected)
    assert torch.equal(found.dense()[:, 0], expected)


@pytest.mark.parametrize("name", ["causal", "window", "chunks"])
@pytest.mark.parametrize(("query", "key", "slots"), [(12, 0, 19), (18, 0, 19), (12, 7, 12), (5, 0, 30)])
def test_it_may_begin_anywhere(name, query, key, slots):
    """With a cache: queries from `query` on, keys from `key` on, and slots of a static cache behind them."""
    length = min(7, T - query)
    found = describe_mask(B, length, slots, query, key, UNDERSTOOD[name], PADDING[:, : query + length])
    visible = found.visible(torch.arange(length)).expand(B, -1, -1)
    padding = torch.nn.functional.pad(PADDING[:, : query + length], (0, max(0, key + slots - query - length)))
    expected = truth(UNDERSTOOD[name], query + torch.arange(length), key + torch.arange(slots), padding)
    assert torch.equal(visible, expected)
    assert found.used_keys == min(slots, query + length - key)
    assert not visible[..., found.used_keys :].any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["causal", "window", "chunks"])
def test_the_place_of_a_query_may_be_a_tensor(name, padded):
    """A static cache counts its tokens in a tensor, which goes on in place while the mask is still in use."""
    padding = PADDING[:, :13] if padded else None
    place = torch.tensor(11)
    found = describe_mask(B, 2, 25, place, 0, UNDERSTOOD[name], padding)
    numbered = describe_mask(B, 2, 25, 11, 0, UNDERSTOOD[name], padding)
    place.add_(1)
    assert torch.equal(
        found.visible(torch.arange(2)).expand(B, -1, -1), numbered.visible(torch.arange(2)).expand(B, -1, -1)
    )
    assert found.used_keys == numbered.used_keys == 13
    assert found.real_queries.all()
    assert found.key_length == found.readable_keys == 25
    placed = found.placed()
    assert (placed.query_offset, placed.left, placed.right) == (11, numbered.left, numbered.right)
    assert (placed.key_mask is None) == (not padded)
    assert placed is found.placed()


def test_what_hides_nothing_is_left_out():
    found = describe_mask(B, T, T, mask_function=masking_utils.sliding_window_causal_mask_function(T))
    assert (found.left, found.right) == (None, 0)
    found = describe_mask(B, T, T, mask_function=CAUSAL, attention_mask=torch.ones(B, T))
    assert found.key_mask is None
    found = describe_mask(B, T, T, mask_function=masking_utils.chunked_causal_mask_function(T, LEFT * 0))
    assert found.chunks is None
    one = masking_utils.packed_sequence_mask_function(torch.zeros(B, T, dtype=torch.long))
    assert describe_mask(B, T, T, mask_function=masking_utils.and_masks(CAUSAL, one)).segments is None


def test_a_mask_of_the_models_own_is_named_and_can_be_made():
    def diagonal_stripes(batch_idx, head_idx, q_idx, kv_idx):
        return (q_idx - kv_idx) % 2 == 0

    function = masking_utils.and_masks(CAUSAL, diagonal_stripes)
    found = describe_mask(B, T, T, mask_function=function)
    assert len(found.unknown) == 1
    assert "diagonal_stripes" in found.unknown[0]
    assert torch.equal(found.dense()[:, 0], truth(function, torch.arange(T), torch.arange(T)))


MISREAD = {
    "a window": lambda query, key: key + 5 >= query,
    "the first query": lambda query, key: query > 0,
    "the last query": lambda query, key: query < T - 1,
}


@pytest.mark.parametrize("name", MISREAD)
def test_a_misread_mask_is_an_error(name):
    def causal_mask_function(batch_idx, head_idx, q_idx, kv_idx):  # the name means another mask in this version
        return (kv_idx <= q_idx) & MISREAD[name](q_idx, kv_idx)

    causal_mask_function.__qualname__ = "causal_mask_function"
    with pytest.raises(RuntimeError, match="misread the attention mask causal_mask_function"):
        describe_mask(B, T, T, mask_function=causal_mask_function)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("left", "right"), [(None, 0), (None, None), (4, 0), (3, 2), (None, 3), (0, 0)])
def test_a_mask_made_as_a_tensor_is_recognised(left, right, padded, additive):
    made = MaskDescription(0, 0, T, T, left, right, PADDING if padded else None)
    visible = made.visible(torch.arange(T)).expand(B, -1, -1)[:, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min) if additive else visible
    found = describe_tensor(mask, T, T)
    assert found.unknown == ()
    assert torch.equal(found.visible(torch.arange(T)).expand(B, -1, -1), visible[:, 0])


def test_queries_are_the_last_positions_or_the_first():
    visible = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    last = describe_tensor(visible[:, :, -5:], 5, T)
    assert (last.query_offset, last.right) == (T - 5, 0)
    first = describe_tensor(visible[:, :, :5], 5, T)
    assert first.unknown == ()
    assert torch.equal(first.visible(torch.arange(5)), visible[:, 0, :5])


@pytest.mark.parametrize(
    "mask",
    [
        torch.randn(1, 1, T, T),
        torch.randn(1, 1, T, T) > 0,
        torch.stack([torch.ones(T, T).tril(), torch.ones(T, T)])[None].bool(),
        torch.ones(T, T).bool(),
        torch.ones(1, 1, T, T - 1).bool(),
    ],
    ids=["bias", "holes", "by head", "two dimensions", "too short"],
)
def test_other_tensors_are_not(mask):
    found = describe_tensor(mask, T, T)
    assert found.unknown == (f"{tuple(mask.shape)} that was passed as a tensor",)
    assert torch.equal(found.dense(), mask[..., :T])


def test_a_model_may_ask_for_the_last_queries_and_nothing_else():
    found = describe_mask(B, T, T, mask_function=UNDERSTOOD["window"], attention_mask=PADDING)
    rows = torch.arange(3)
    assert torch.equal(found[:, :, -3:, :].visible(rows), found.visible(torch.arange(T - 3, T)))
    assert found[:, :, 0:, :] is found
    assert not hasattr(found, "shape")
    for use in (
        lambda: found[:, :, :, :5],
        lambda: found[:, :, :3, :],
        lambda: found + 1,
        lambda: 1 * found,
        lambda: ~found,
        lambda: found == 0,
        lambda: found.dtype,
        lambda: found.masked_fill,
    ):
        with pytest.raises(InputError, match="computes with its attention mask"):
            use()
