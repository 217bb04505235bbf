"""The text that each token adds: of tokenizers that drop spaces, of characters of several tokens, of broken bytes."""

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from attnstats.study.reading import pieces, shown

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


def bytes_merged():
    """As SmolLM2 has it: a space and the first two bytes of an emoji are one token, as are some whole characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ð", "Ł"), ("Ġ", "ðŁ"), ("Ã", "©"), ("Ġ", "Ã©"), ("Ġ", "o")]
    vocabulary = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [words_with_a_mark_for_spaces, bytes_alone, bytes_merged])
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


@pytest.mark.parametrize(("make", "text", "texts", "seen"), [
    # The space belongs to the token that has it, and the emoji to the token of its last byte.
    (bytes_merged, "o 🥐🥖 é o", ["o", " ", "", "🥐", "", "", "🥖", " é", " o"],
     ["o", " <0xF0><0x9F>", "<0xA5>", "🥐", "<0xF0><0x9F>", "<0xA5>", "🥖", " é", " o"]),
    (bytes_alone, "é漢", ["", "é", "", "", "漢"], ["<0xC3>", "é", "<0xE6>", "<0xBC>", "漢"]),
    (words_with_a_mark_for_spaces, "a é", ["", "a", " ", "", "é"], ["", "a", " ", "<0xC3>", "é"]),
    # A character that is there three times over is not a broken one.
    (bytes_alone, "\ufffd", ["", "", "\ufffd"], ["<0xEF>", "<0xBF>", "\ufffd"]),
    (bytes_alone, "<0xF0>", list("<0xF0>"), list("<0xF0>")),
])  # fmt: skip
def test_a_part_of_a_character_is_shown_as_its_bytes(make, text, texts, seen):
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    assert pieces(tokenizer, ids) == texts
    assert shown(tokenizer, ids, texts) == seen


def test_a_response_that_is_cut_within_a_character_ends_with_its_bytes():
    tokenizer = bytes_merged()
    ids = tokenizer("o 🥐")["input_ids"]
    for end, seen in ((2, ["o", " <0xF0><0x9F>"]), (3, ["o", " <0xF0><0x9F>", "<0xA5>"])):
        texts = pieces(tokenizer, ids[:end])
        assert "".join(texts) == "o \ufffd"
        assert shown(tokenizer, ids[:end], texts) == seen
    broken = [*ids[:2], ids[0], *ids[2:]]  # a letter within the emoji
    texts = pieces(tokenizer, broken)
    assert "".join(texts) == tokenizer.decode(broken)
    assert shown(tokenizer, broken, texts) == ["o", " <0xF0><0x9F>", "o", "<0xA5>", "<0x90>"]


def test_bytes_that_are_no_text_do_not_hold_up_the_rest():
    tokenizer = bytes_alone()
    lone, rest = tokenizer.convert_tokens_to_ids("\u0122"), tokenizer("a b")["input_ids"]  # the byte 0x80
    ids = [lone] * 9 + rest
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == "\ufffd" * 9 + "a b"
    assert parts[-2:] == [" ", "b"]
    assert next(i for i, piece in enumerate(parts) if piece) < 5
