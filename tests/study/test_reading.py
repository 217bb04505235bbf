"""The text that each token adds: of tokenizers that drop spaces, of characters of several tokens, of broken bytes."""

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from attnstats.study.reading import pieces

TEXTS = (
    "how many rolls? 48 - 30 = 18.",
    "  two spaces,\n\n\ttabs and don't . clean up",
    "漢字 é 🥐🥖 ß",
    "a🥐",
    "�� a real replacement character",
    "",
)


def words_with_a_mark_for_spaces():
    """As Llama 2 has it: `▁` for a space, bytes for what isn't in the vocabulary, the first space dropped."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz,.'", "▁h", "ma"]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, [("▁", "h"), ("m", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    drop = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), drop])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def bytes_alone():
    """As GPT-2 has it, without a merge: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [words_with_a_mark_for_spaces, bytes_alone])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_are_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    parts = pieces(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text
    # Each character is whole, in the token that ends it.
    assert all("\ufffd" not in piece for piece in parts) or "\ufffd" in text


def test_pieces_keep_the_spaces_between_words():
    tokenizer = words_with_a_mark_for_spaces()
    assert pieces(tokenizer, tokenizer("so how ma é")["input_ids"]) == [
        "", "s", "o", " h", "o", "w", " ", "ma", " ", "", "é",
    ]  # fmt: skip


def test_bytes_that_are_no_text_do_not_hold_up_the_rest():
    tokenizer = bytes_alone()
    lone, rest = tokenizer.convert_tokens_to_ids("\u0122"), tokenizer("a b")["input_ids"]  # the byte 0x80
    ids = [lone] * 9 + rest
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == "\ufffd" * 9 + "a b"
    assert parts[-2:] == [" ", "b"]
    assert next(i for i, piece in enumerate(parts) if piece) < 5
