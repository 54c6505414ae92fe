import pytest
from transformers import ByT5Tokenizer

from lowmem.config import UsageError
from lowmem.data.encode import IGNORED, encode_causal, encode_seq2seq, encode_text, make_encoder

TOKENIZER = ByT5Tokenizer()
END = TOKENIZER.eos_token_id


def ids(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def test_seq2seq_encodes_each_side_with_its_end_token():
    encoded = encode_seq2seq(TOKENIZER, max_seq_len=64)({"prompt": "问?", "response": "yes"})
    assert encoded == {"input_ids": [*ids("问?"), END], "labels": [*ids("yes"), END]}


def test_seq2seq_cuts_content_and_keeps_the_end_token():
    encoded = encode_seq2seq(TOKENIZER, max_seq_len=4)({"prompt": "abcdef", "response": "xyz"})
    assert encoded == {"input_ids": [*ids("abc"), END], "labels": [*ids("xyz"), END]}


def test_causal_masks_the_prompt_out_of_the_loss():
    encoded = encode_causal(TOKENIZER, max_seq_len=64)({"prompt": "ask", "response": "yes"})
    assert encoded == {"input_ids": [*ids("askyes"), END], "labels": [IGNORED] * 3 + [*ids("yes"), END]}


@pytest.mark.parametrize("prompt", [1, 5, 100])
@pytest.mark.parametrize("response", [0, 1, 5, 100])
@pytest.mark.parametrize("max_seq_len", [2, 7, 20])
def test_causal_rows_fit_and_keep_targets(prompt, response, max_seq_len):
    row = {"prompt": "p" * prompt, "response": "r" * response}
    encoded = encode_causal(TOKENIZER, max_seq_len=max_seq_len)(row)
    whole = prompt + response + 1
    assert len(encoded["input_ids"]) == len(encoded["labels"]) == min(whole, max_seq_len)
    assert any(label != IGNORED for label in encoded["labels"])
    targets = [(token, label) for token, label in zip(*encoded.values(), strict=True) if label != IGNORED]
    assert all(token == label for token, label in targets)


def test_text_learns_every_token_but_the_first_which_nothing_predicts():
    encoded = encode_text(TOKENIZER, max_seq_len=64)({"text": "all of it"})
    assert encoded == {"input_ids": [*ids("all of it"), END], "labels": [IGNORED, *ids("ll of it"), END]}
    assert encode_text(TOKENIZER, max_seq_len=3)({"text": "all of it"})["labels"] == [IGNORED, *ids("ll")]
    unprompted = encode_causal(TOKENIZER, max_seq_len=64)({"prompt": "", "response": "ab"})
    assert unprompted["labels"] == [IGNORED, *ids("b"), END]


def test_columns_have_the_names_that_the_caller_gives():
    encode = make_encoder(
        TOKENIZER, is_encoder_decoder=True, max_seq_len=9, prompt_column="question", response_column="answer"
    )
    assert encode({"question": "a", "answer": "b"})["labels"] == [*ids("b"), END]


@pytest.mark.parametrize("row", [{"response": "b"}, {"prompt": None, "response": "b"}, {"prompt": 3, "response": "b"}])
def test_a_row_without_text_is_refused_with_its_column(row):
    with pytest.raises(ValueError, match="column 'prompt' must hold text, found"):
        encode_seq2seq(TOKENIZER, max_seq_len=9)(row)


def test_plain_text_is_refused_for_encoder_decoder_models():
    with pytest.raises(UsageError, match="needs a causal model"):
        make_encoder(TOKENIZER, is_encoder_decoder=True, max_seq_len=9, text_column="text")
