"""Tokenize conversations with a byte-level BPE tokenizer, which is trained here, and with the slow ByT5 tokenizer."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lowmem.data.chat import chat_tokenizer
from lowmem.errors import UsageError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The first line renders as nothing, because transformers strips whitespace around a block that is alone on its line.
TAGGED_CHATML = """  {% set end = '<|im_end|>' %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + end }}{% endgeneration %}
    {%- else %}
        {{- message.content + end }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}"""
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + "
    "message.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# Like Qwen3's template, this template writes a <think> block only into the last message.
FORGETFUL = (
    "{% for message in messages %}{{ message.role + ': ' }}{% if loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else [first, "user", "assistant"]
    return [{"role": roles[i] if i < len(roles) else roles[-2 + (i - len(roles)) % 2], "content": text}
            for i, text in enumerate(contents)]  # fmt: skip


CHATS = [
    turns("你好吗", "我很好 thank you"),
    turns("你是助手", "what is 1 + 1?", " 2\n\nbecause 二 ", "and then", "那么三", first="system"),
    turns("  spaced  ", "", "再来一次", "第 12 行\n"),
    turns("a", "b") + [{"role": "assistant", "content": "c 又说"}, {"role": "user", "content": "last"}],
    turns("<|im_end|> in a text", "答 <|im_start|>"),
]


def bpe(template, trim_offsets=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    rows = (f"第 {i} 行: the answer to question {i * 7} is 答案 {i % 13}, thank you" for i in range(300))
    tokenizer.train_from_iterator(rows, trainer)
    begins = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), begins])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


TEMPLATES = {"chatml": CHATML, "tagged": TAGGED_CHATML, "llama-3": LLAMA_3, "plain": PLAIN}
TOKENIZERS = {name: bpe(template) for name, template in TEMPLATES.items()}


@pytest.fixture
def switching_threads():
    """Make Python switch threads very often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def said(tokenizer, ids, is_said):
    """Decode each contiguous span of tokens that `is_said` marks as the assistant's."""
    spans, before = [], False
    for token, says in zip(ids, is_said, strict=True):
        if says and not before:
            spans.append([])
        if says:
            spans[-1].append(token)
        before = says
    return [tokenizer.decode(span, clean_up_tokenization_spaces=False) for span in spans]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_apply_chat_template(name, messages):
    tokenizer = TOKENIZERS[name]
    ids, is_said = chat_tokenizer(tokenizer)(messages)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert len(is_said) == len(ids)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", [" 2\n\nbecause 二 <|im_end|>\n", "那么三<|im_end|>\n"]),
        ("tagged", [" 2\n\nbecause 二 <|im_end|>", "那么三<|im_end|>"]),
        ("llama-3", ["2\n\nbecause 二<|eot_id|>", "那么三<|eot_id|>"]),
        ("plain", ["  2\n\nbecause 二 \n", " 那么三\n"]),
    ],
)
def test_the_assistant_says_its_content_and_the_end_of_its_turn(name, expected, slow):
    tokenizer = TOKENIZERS[name]
    if slow:
        tokenizer = ByT5Tokenizer(bos_token="<|begin|>", chat_template=TEMPLATES[name])
        assert not tokenizer.is_fast
    assert said(tokenizer, *chat_tokenizer(tokenizer)(CHATS[1])) == expected


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_of_a_slow_tokenizer_are_those_of_apply_chat_template(name, messages):
    tokenizer = ByT5Tokenizer(bos_token="<|begin|>", chat_template=TEMPLATES[name])
    assert chat_tokenizer(tokenizer)(messages)[0] == tokenizer.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("messages", CHATS)
def test_generation_tags_mark_the_same_tokens_as_in_transformers(messages):
    tokenizer = TOKENIZERS["tagged"]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert chat_tokenizer(tokenizer)(messages)[1] == [mark == 1 for mark in encoded["assistant_masks"]]


# The "plain" template is left out: one token can hold both its space after "role:" and the first word of a message.
@pytest.mark.parametrize("name", ["chatml", "tagged", "llama-3"])
def test_offsets_without_spaces_mark_the_same_tokens(name):
    trimmed = bpe(TEMPLATES[name], trim_offsets=True)
    for messages in CHATS:
        assert chat_tokenizer(trimmed)(messages) == chat_tokenizer(TOKENIZERS[name])(messages)


@pytest.mark.parametrize("begin, end", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_a_field_that_is_none_counts_as_missing(begin, end):
    tools = "{% if m.tools is defined %}{{ m.tools }}{% endif %}"
    tokenize = chat_tokenizer(bpe(f"{{% for m in messages %}}{begin}{{{{ m.content }}}}{tools}{end}{{% endfor %}}"))
    messages = turns("a", "b")
    assert tokenize([message | {"tools": None} for message in messages]) == tokenize(messages)
    assert tokenize([message | {"tools": "c"} for message in messages]) != tokenize(messages)


def test_spans_are_right_while_other_threads_render_the_same_template(switching_threads):
    tokenizer = TOKENIZERS["tagged"]
    tokenize = chat_tokenizer(tokenizer)
    expected = [tokenize(messages) for messages in CHATS]

    def encode():
        return [tokenize(messages) for _ in range(40) for messages in CHATS]

    def render():
        return [tokenizer.apply_chat_template(messages, tokenize=False) for _ in range(40) for messages in CHATS]

    with ThreadPoolExecutor(3) as threads:
        encoding = [threads.submit(encode), threads.submit(encode)]
        rendering = threads.submit(render)
    assert all(future.result() == expected * 40 for future in encoding)
    rendering.result()


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(UsageError, match="messages need a chat template, but ByT5Tokenizer of .* has none: use"):
        chat_tokenizer(ByT5Tokenizer())


@pytest.mark.parametrize("name", ["chatml", "tagged"])
def test_a_conversation_in_which_the_assistant_says_nothing_is_refused(name):
    with pytest.raises(ValueError, match="no assistant text in a conversation of turns user, user"):
        chat_tokenizer(TOKENIZERS[name])([{"role": "user", "content": "a"}] * 2)


def test_the_error_for_a_template_that_changes_earlier_text_names_the_turn():
    tokenize = chat_tokenizer(bpe(FORGETFUL))
    with pytest.raises(ValueError, match=r"changes earlier text at turn 1 \(the assistant's\): put {% generation %}"):
        tokenize(CHATS[2])


def test_a_template_without_tags_needs_a_turn_before_the_first_assistant_turn():
    messages = [{"role": "assistant", "content": "hello"}, *turns("a", "b")]
    with pytest.raises(ValueError, match="turn 0 is the assistant's, with no turn before it"):
        chat_tokenizer(TOKENIZERS["chatml"])(messages)
    assert said(TOKENIZERS["tagged"], *chat_tokenizer(TOKENIZERS["tagged"])(messages)) == [
        "hello<|im_end|>",
        "b<|im_end|>",
    ]


@pytest.mark.parametrize("tag", ["", "{% generation %}{% endgeneration %}"])
def test_a_conversation_that_the_template_refuses_is_a_bad_row(tag):
    tokenize = chat_tokenizer(bpe("{{ raise_exception('roles must alternate') }}" + tag))
    with pytest.raises(ValueError, match=r"rejects a conversation of turns user, assistant \(roles must alternate\)"):
        tokenize(turns("a", "b"))
