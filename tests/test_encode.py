import math
from functools import partial

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import ByT5Tokenizer, MBartTokenizer, PreTrainedTokenizerFast

from lowmem.data.batch import IGNORED, collate
from lowmem.data.encode import (
    encode_causal,
    encode_chat,
    encode_seq2seq,
    encode_text,
    end_tokens,
    make_encoder,
    with_weights,
)
from lowmem.data.encoder import Then, encode_rows
from lowmem.errors import RowError, UsageError

TOKENIZER = ByT5Tokenizer()
END = TOKENIZER.eos_token_id


def ids(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def test_seq2seq_adds_an_end_token_to_both_prompt_and_response():
    encoded = encode_seq2seq(TOKENIZER, max_seq_len=64)({"prompt": "问?", "response": "yes"})
    assert encoded == {"input_ids": [*ids("问?"), END], "labels": [*ids("yes"), END]}


def test_seq2seq_cuts_content_and_keeps_the_end_token():
    encoded = encode_seq2seq(TOKENIZER, max_seq_len=4)({"prompt": "abcdef", "response": "xyz"})
    assert encoded == {"input_ids": [*ids("abc"), END], "labels": [*ids("xyz"), END], "num_cut": 3}


def test_causal_masks_the_prompt_out_of_the_loss():
    encoded = encode_causal(TOKENIZER, max_seq_len=64)({"prompt": "ask", "response": "yes"})
    assert encoded == {"input_ids": [*ids("askyes"), END], "labels": [IGNORED] * 3 + [*ids("yes"), END]}


@pytest.mark.parametrize("prompt", [1, 5, 100])
@pytest.mark.parametrize("response", [0, 1, 5, 100])
@pytest.mark.parametrize("max_seq_len", [2, 7, 20])
def test_causal_rows_are_cut_to_max_seq_len_and_keep_targets(prompt, response, max_seq_len):
    row = {"prompt": "p" * prompt, "response": "r" * response}
    encoded = encode_causal(TOKENIZER, max_seq_len=max_seq_len)(row)
    whole = prompt + response + 1
    assert len(encoded["input_ids"]) == len(encoded["labels"]) == min(whole, max_seq_len)
    assert any(label != IGNORED for label in encoded["labels"])
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        assert label in (token, IGNORED)
    assert encoded.get("num_cut", 0) == max(0, whole - max_seq_len)


def test_text_trains_on_every_token_except_the_first():
    encoded = encode_text(TOKENIZER, max_seq_len=64)({"text": "all of it"})
    assert encoded == {"input_ids": [*ids("all of it"), END], "labels": [IGNORED, *ids("ll of it"), END]}
    assert encode_text(TOKENIZER, max_seq_len=3)({"text": "all of it"})["labels"] == [IGNORED, *ids("ll")]
    unprompted = encode_causal(TOKENIZER, max_seq_len=64)({"prompt": "", "response": "ab"})
    assert unprompted["labels"] == [IGNORED, *ids("b"), END]


@pytest.mark.parametrize(
    ("encode", "row", "whole"),
    [
        (encode_seq2seq, {"prompt": "p" * 30, "response": "r" * 20}, 52),
        (encode_causal, {"prompt": "p" * 30, "response": "r" * 20}, 51),
        (encode_text, {"text": "t" * 50}, 51),
    ],
)
def test_kept_and_cut_tokens_add_up_to_the_whole_row(encode, row, whole):
    for max_seq_len in (2, 10, 20, 21, 29, 30, 31, 50, 51):
        encoded = encode(TOKENIZER, max_seq_len=max_seq_len)(row)
        kept = len(encoded["input_ids"]) + (len(encoded["labels"]) if encode is encode_seq2seq else 0)
        assert kept + encoded.get("num_cut", 0) == whole
        assert ("num_cut" in encoded) == (kept < whole)


def test_a_row_without_a_token_has_no_label():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    assert encode_text(tokenizer, max_seq_len=4)({"text": ""}) == {"input_ids": [], "labels": []}


# --- the special tokens of other tokenizers
def fast(tokens, pre_tokenizer, begin="", end="", **special):
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    added = [(token, tokens.index(token)) for token in (begin, end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}".split(), special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


WORDS = ["<unk>", "<s>", "</s>", "a", "b", "hi", "yes"]


def words(encoded, tokenizer, name="input_ids"):
    return tokenizer.convert_ids_to_tokens([token for token in encoded[name] if token != IGNORED])


@pytest.mark.parametrize(("begin", "end"), [("", ""), ("<s>", ""), ("<s>", "</s>")])
def test_special_tokens_that_a_text_already_has_are_kept_and_not_doubled(begin, end):
    tokenizer = fast(WORDS, pre_tokenizers.WhitespaceSplit(), begin, end, bos_token="<s>", eos_token="</s>")
    starts = [begin] if begin else []
    encode = encode_causal(tokenizer, max_seq_len=9)
    for start in ("", "<s> "):
        for stop in ("", " </s>"):
            encoded = encode({"prompt": f"{start}a </s> hi </s>", "response": f"yes{stop}"})
            expected = (["<s>"] if start else starts) + ["a", "</s>", "hi", "</s>", "yes", "</s>"]
            assert words(encoded, tokenizer) == expected
            assert words(encoded, tokenizer, "labels") == ["yes", "</s>"]
            whole = encode_text(tokenizer, max_seq_len=9)({"text": f"{start}a yes{stop}"})
            assert words(whole, tokenizer) == (["<s>"] if start else starts) + ["a", "yes", "</s>"]


def test_a_response_ends_with_what_the_tokenizer_adds_if_it_has_no_eos_token():
    tokenizer = fast([*WORDS, "[CLS]", "[SEP]"], pre_tokenizers.WhitespaceSplit(), "[CLS]", "[SEP]", sep_token="[SEP]")
    encoded = encode_causal(tokenizer, max_seq_len=9)({"prompt": "hi", "response": "yes"})
    assert words(encoded, tokenizer) == ["[CLS]", "hi", "yes", "[SEP]"]
    assert words(encoded, tokenizer, "labels") == ["yes", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(end_tokens(tokenizer)) == ["[SEP]"]


def metaspace(scheme):
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = BpeTrainer(special_tokens=["<unk>", "</s>"], initial_alphabet=list("abc:\n▁"), show_progress=False)
    tokenizer.train_from_iterator(["ab cab", "c: a\n"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_no_space_is_inserted_between_prompt_and_response(scheme):
    tokenizer = metaspace(scheme)
    for response in ("cab", " cab", "\ncab", ""):
        encoded = encode_causal(tokenizer, max_seq_len=30)({"prompt": "c:", "response": response})
        text = "".join(words(encoded, tokenizer)).removesuffix("</s>").replace("▁", " ")
        assert text.removeprefix(" ") == f"c:{response}"


def translation_tokenizer(**languages):
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{c}", -2.0) for c in "abcdefgh")]
    return MBartTokenizer(vocab=vocabulary, **languages)


def test_a_translation_tokenizer_without_a_target_language_is_refused():
    with pytest.raises(UsageError, match="no tgt_lang, so it would encode responses as en_XX: set src_lang and"):
        encode_seq2seq(translation_tokenizer(src_lang="en_XX"), max_seq_len=8)
    encode_seq2seq(translation_tokenizer(src_lang="en_XX", tgt_lang="en_XX"), max_seq_len=8)


def test_a_cut_keeps_all_tokens_that_a_translation_tokenizer_adds():
    tokenizer = translation_tokenizer(src_lang="en_XX", tgt_lang="ro_RO")
    row = {"prompt": "a b c d e f g h", "response": "b a d c f e h g"}
    for max_seq_len in (5, 6, 64):
        encoded = encode_seq2seq(tokenizer, max_seq_len=max_seq_len)(row)
        options = {"truncation": True, "max_length": max_seq_len}
        expected = tokenizer(row["prompt"], text_target=row["response"], **options)
        assert encoded["input_ids"] == expected["input_ids"] and encoded["labels"] == expected["labels"]


@pytest.mark.parametrize("kind", [encode_seq2seq, encode_causal, encode_text])
@pytest.mark.parametrize(
    "tokenizer",
    [TOKENIZER, metaspace("first"), metaspace("always"), translation_tokenizer(src_lang="en_XX", tgt_lang="ro_RO")],
    ids=["python", "first", "always", "translation"],
)
def test_rows_encoded_together_are_those_encoded_one_by_one(tokenizer, kind):
    encode = kind(tokenizer, max_seq_len=9)
    texts = ["ab cab", "", "c: a\n", "\na", " a", "b" * 20, "好", "a</s>"]
    rows = [{"prompt": text, "response": text[::-1], "text": text, "w": n / 2} for n, text in enumerate(texts)]
    assert encode.batch(rows) == [encode(row) for row in rows] and encode.batch([]) == []
    weighted = with_weights(encode, "w")
    assert weighted.batch(rows) == [weighted(row) for row in rows]


class Together:
    """An encoder that records how many rows it gets at once."""

    def __init__(self):
        self.sizes = []

    def __call__(self, row):
        return self.batch([row])[0]

    def batch(self, rows):
        self.sizes.append(len(rows))
        return [{"input_ids": [row["id"]], "labels": [1 // row["id"]]} for row in rows]


def test_rows_are_encoded_together_and_one_by_one_if_one_of_them_is_bad():
    rows, encode = [{"id": number} for number in range(-150, 10)], Together()
    encoded, bad = encode_rows(rows, range(140), encode, may_skip=False)
    assert [number for number, _ in encoded] == [*range(140)] and not bad and encode.sizes == [64, 64, 12]
    encoded, bad = encode_rows(rows, range(100, 160), encode, may_skip=True)
    assert [number for number, _ in encoded] == [*range(100, 150), *range(151, 160)]
    assert [x.content for x in bad] == [{"id": 0}] and "row 150 cannot be encoded: " in str(bad[0].error)
    assert encode.sizes[3:] == [60, *[1] * 60]


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (lambda rows: rows[1:], ValueError("the encoder's method `batch` returned 2 rows for 3: return one for each")),
        (lambda rows: rows[0]["absent"], KeyError("absent")),
        (lambda rows: bytearray(2**62), MemoryError()),
    ],
)
def test_a_method_batch_that_fails_for_good_rows_is_at_fault(batch, error):
    encode = partial(dict)
    encode.batch = batch
    rows = [{"input_ids": [5], "labels": [5]}] * 3
    with pytest.raises(type(error)) as found:
        encode_rows(rows, range(3), encode, may_skip=True)
    assert found.value.args == error.args


@pytest.mark.parametrize("encode", [dict, Then(dict, lambda _, encoded: encoded)])
def test_a_row_with_another_number_of_weights_than_labels_is_bad(encode):
    rows = [{"input_ids": [5], "labels": [5], "weights": [1.0] * number} for number in (1, 2, 1)]
    encoded, bad = encode_rows(rows, range(3), encode, may_skip=True)
    assert [number for number, _ in encoded] == [0, 2] and [x.content for x in bad] == [rows[1]]
    message = "row 1 cannot be encoded: a row has 2 weights for 1 labels: return one for each label"
    with pytest.raises(RowError, match=message):
        encode_rows(rows, range(3), encode, may_skip=False)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e39, "1", True, None])
def test_a_row_whose_encoder_returns_a_weight_below_0_or_not_finite_is_bad(weight):
    rows = [{"input_ids": [5, 5], "labels": [5, 5], "weights": [np.float32(1), x]} for x in (0, weight)]
    encoded, bad = encode_rows(rows, range(2), dict, may_skip=True)
    assert [number for number, _ in encoded] == [0] and [x.content for x in bad] == [rows[1]]
    found = f"row 1 cannot be encoded: weights must be numbers from 0 to 3.4e+38, found {weight!r}: "
    assert str(bad[0].error).startswith(found)


# --- encoding conversations
CHAT = ByT5Tokenizer(
    chat_template="{% for m in messages %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "yes"}] * 2


def test_chat_trains_on_what_the_assistant_says():
    encoded = encode_chat(CHAT, max_seq_len=64)({"messages": MESSAGES})
    assert encoded["input_ids"] == ids("u:问;a:yes;" * 2)
    assert encoded["labels"] == ([IGNORED] * len(ids("u:问;a:")) + ids("yes;")) * 2


def test_chat_is_cut_at_its_end_and_may_be_left_without_a_target():
    whole = encode_chat(CHAT, max_seq_len=64)({"messages": MESSAGES})
    length = len(whole["input_ids"])
    for max_seq_len in range(1, length):
        cut = encode_chat(CHAT, max_seq_len=max_seq_len)({"messages": MESSAGES})
        assert cut["input_ids"] == whole["input_ids"][:max_seq_len]
        assert cut["labels"] == whole["labels"][:max_seq_len]
        assert cut["num_cut"] == length - max_seq_len
    targetless = encode_chat(CHAT, max_seq_len=3)({"messages": MESSAGES})
    assert collate([targetless, whole], causal=True).num_targets == 8


def test_the_first_token_is_no_target_even_if_the_assistant_says_it():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    encoded = encode_chat(ByT5Tokenizer(chat_template=template), max_seq_len=64)({"messages": MESSAGES[1:2]})
    assert encoded == {"input_ids": ids("yes"), "labels": [IGNORED, *ids("es")]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", r"must hold messages, \[{'role': ..., 'content': ...}, ...\], found str 'hi': fix the row"),
        ([], r"found list \[\]"),
        (["hi"], "with a role and text or tool calls, message 1 is 'hi': fix the row"),
        ([*MESSAGES, {"role": "user", "content": None}], "message 5 is {'role': 'user', 'content': None}"),
        ([{"role": "user", "content": 3}], "message 1 is {'role': 'user', 'content': 3}"),
        ([{"from": "human", "text": "hi"}], "message 1 is {'from': 'human'"),
    ],
)
def test_a_value_that_is_not_a_conversation_is_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(CHAT, max_seq_len=9)({"messages": messages})


def test_the_error_for_a_row_without_messages_lists_its_columns():
    with pytest.raises(ValueError, match="column 'messages' must hold messages.* found columns 'text': fix the row"):
        encode_chat(CHAT, max_seq_len=9)({"text": "a"})


# --- make_encoder
def test_columns_have_the_names_that_the_caller_gives():
    encode = make_encoder(
        TOKENIZER, is_encoder_decoder=True, max_seq_len=9, prompt_column="question", response_column="answer"
    )
    assert encode({"question": "a", "answer": "b"})["labels"] == [*ids("b"), END]


@pytest.mark.parametrize("row", [{"response": "b"}, {"prompt": None, "response": "b"}, {"prompt": 3, "response": "b"}])
def test_the_error_for_a_row_without_text_names_the_column(row):
    with pytest.raises(ValueError, match="column 'prompt' must hold text, found"):
        encode_seq2seq(TOKENIZER, max_seq_len=9)(row)


@pytest.mark.parametrize("column", ["text_column", "messages_column"])
def test_encoder_decoder_models_take_only_prompts_and_responses(column):
    with pytest.raises(UsageError, match=f"{column}=x needs a causal model"):
        make_encoder(CHAT, is_encoder_decoder=True, max_seq_len=9, **{column: "x"})


def test_text_and_messages_together_are_refused():
    with pytest.raises(UsageError, match="text_column=x and messages_column=y exclude each other"):
        make_encoder(CHAT, is_encoder_decoder=False, max_seq_len=9, text_column="x", messages_column="y")


def test_the_column_argument_selects_the_encoder():
    make = partial(make_encoder, CHAT, is_encoder_decoder=False, max_seq_len=64)
    row = {"chat": MESSAGES, "text": "t", "prompt": "p", "response": "r"}
    assert make(messages_column="chat")(row) == encode_chat(CHAT, max_seq_len=64)({"messages": MESSAGES})
    assert make(text_column="text")(row) == encode_text(CHAT, max_seq_len=64)(row)
    assert make()(row) == encode_causal(CHAT, max_seq_len=64)(row)


def test_a_token_beyond_the_embeddings_is_an_error_that_names_it():
    encode = make_encoder(TOKENIZER, is_encoder_decoder=True, max_seq_len=9, num_embeddings=200)
    assert encode({"prompt": "a", "response": "b"})["input_ids"]
    with pytest.raises(ValueError, match=r"has the id \d+, but the model has 200 embeddings: use the model's tokeni"):
        encode({"prompt": "好", "response": "b"})
