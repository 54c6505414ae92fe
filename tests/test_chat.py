"""Tokenize conversations with the slow ByT5 tokenizer, and with a byte-level BPE tokenizer that is trained here."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lowmem.data.chat import chat_tokenizer
from lowmem.data.chat_spans import assistant_spans
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
# This template writes a <think> block only into the last message.
FORGETFUL = (
    "{% for message in messages %}{{ message.role + ': ' }}{% if loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL = ["<|User|>", "<|Assistant|>", "<|end|>", "<|call|>", "<|output|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


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
def test_the_assistants_tokens_are_its_content_and_the_end_of_its_turn(name, expected, slow):
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


# "plain" is left out: in its text, one token can hold both the space after "role:" and a message's first word.
@pytest.mark.parametrize("name", ["chatml", "tagged", "llama-3"])
def test_offsets_that_exclude_spaces_mark_the_same_tokens(name):
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
    with pytest.raises(
        UsageError,
        match="messages need a chat template, but the tokenizer ByT5Tokenizer has none: add chat_template.jinja",
    ):
        chat_tokenizer(ByT5Tokenizer())


@pytest.mark.parametrize("name", ["chatml", "tagged"])
def test_a_conversation_in_which_the_assistant_says_nothing_is_refused(name):
    with pytest.raises(ValueError, match="no assistant text in a conversation of turns user, user"):
        chat_tokenizer(TOKENIZERS[name])([{"role": "user", "content": "a"}] * 2)


def test_a_template_whose_assistant_text_cannot_be_found_is_refused():
    twice = CHATML.replace("message.content +", "message.content + ' / ' + message.content +") + "{{ messages|length }}"
    with pytest.raises(
        UsageError, match=r"in message 2 cannot be found in what the chat template prints: put {% generation"
    ):
        chat_tokenizer(bpe(twice))


def test_a_conversation_may_begin_with_the_assistant():
    messages = [{"role": "assistant", "content": "hello"}, *turns("a", "b")]
    for name in ("chatml", "tagged"):
        spans = said(TOKENIZERS[name], *chat_tokenizer(TOKENIZERS[name])(messages))
        assert [span.rstrip("\n") for span in spans] == ["hello<|im_end|>", "b<|im_end|>"]


# Templates written like those of well-known models. Each conversation's text is written by hand, with the assistant's
# tokens between « and ».
QWEN_3 = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set content = message.content or '' %}
{%- if message.role == 'assistant' %}
{%- set thought = message.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set content = content.split('</think>')[-1].lstrip() %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for call in message.tool_calls or [] %}
{%- if content or not loop.first %}{{ '\n' }}{% endif %}
{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + content + '</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
R1 = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content }}{% endif %}
{%- if message.role == 'assistant' and message.tool_calls %}{{ '<|Assistant|>' }}
{%- for call in message.tool_calls %}{{ '<|call|>' + call.function.name + ' ' + (call.function.arguments | tojson) }}
{%- endfor %}{{ '<|end|>' }}
{%- elif message.role == 'assistant' %}{{ '<|Assistant|>' + message.content.split('</think>')[-1] + '<|end|>' }}
{%- elif message.role == 'tool' %}{{ '<|output|>' + message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
R1_NULL = R1.replace("and message.tool_calls", "and message.content is none").replace(
    "elif message.role == 'assistant'", "elif message.role == 'assistant' and message.content is not none"
)
MISTRAL = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.index0 == messages | map(attribute='role') | list | join(' ') | wordcount - 2 %}
{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content | trim + '<|end|>' }}{% endif %}
{%- endfor %}"""
GEMMA = """{{- bos_token }}{% for message in messages %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- message.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
LOOK = {"type": "function", "function": {"name": "look", "arguments": {"city": "A"}}}
CALLS = [
    {"role": "user", "content": "look"},
    {"role": "assistant", "content": None, "tool_calls": [LOOK]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "seven"},
    *turns("more", "8"),
]
LOOKED = '{"name": "look", "arguments": {"city": "A"}}'
SPANS = {
    "qwen 3": (
        QWEN_3,
        turns("hi", "<think>\nwhy\n</think>\n\nred", "more", "<think>\nso\n</think>\n\nblue"),
        None,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>\n»<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nso\n</think>\n\nblue<|im_end|>\n»",
    ),
    "qwen 3, without thoughts": (
        QWEN_3,
        turns("hi", "red", "more", "blue"),
        None,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>\n»<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nblue<|im_end|>\n»",
    ),
    "qwen 3, with tools": (
        QWEN_3,
        CALLS,
        [LOOK],
        '<|im_start|>system\n{"type": "function", "function": '
        + LOOKED
        + "}\n<|im_end|>\n<|im_start|>user\nlook<|im_end|>\n"
        "<|im_start|>assistant\n«<tool_call>" + LOOKED + "</tool_call><|im_end|>\n»"
        "<|im_start|>user\n<tool_response>7</tool_response><|im_end|>\n<|im_start|>assistant\n«seven<|im_end|>\n»"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\n8<|im_end|>\n»",
    ),
    "r1": (
        R1,
        turns("hi", "red", "s", "<think>why</think>blue"),
        None,
        "<|begin|><|User|>hi<|Assistant|>«red<|end|>»<|User|>s<|Assistant|>«blue<|end|>»",
    ),
    "r1, with tools": (
        R1,
        CALLS,
        None,
        '<|begin|><|User|>look<|Assistant|>«<|call|>look {"city": "A"}<|end|>»<|output|>7<|Assistant|>«seven<|end|>»'
        "<|User|>more<|Assistant|>«8<|end|>»",
    ),
    "mistral, with tools": (
        MISTRAL,
        turns("hi", " red ", "more", "blue"),
        [LOOK],
        "<|begin|>[INST] hi[/INST]« red<|end|>»[TOOLS][" + '{"type": "function", "function": ' + LOOKED + "}"
        "][/TOOLS][INST] more[/INST]« blue<|end|>»",
    ),
    "gemma": (
        GEMMA,
        turns("hi", "red", "more", "blue"),
        None,
        "<|begin|><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n«red<end_of_turn>\n»"
        "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n«blue<end_of_turn>\n»",
    ),
    "llama 3": (
        LLAMA_3,
        turns("hi", "red", "more", "blue"),
        None,
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "«red<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«blue<|eot_id|>»",
    ),
    "chatml": (
        CHATML,
        turns("hi", "red", "more", "blue"),
        None,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>\n»<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n«blue<|im_end|>\n»",
    ),
    "a template that forgets": (
        FORGETFUL,
        turns("hi", "red", "more", "blue"),
        None,
        "user: hi\nassistant: «red\n»user: more\nassistant: «<think></think>blue\n»",
    ),
    "a prompt that closes an empty thought": (
        QWEN_3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}"),
        turns("hi", "<think>\nwhy\n</think>\n\nred"),
        None,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n«why\n</think>\n\nred<|im_end|>\n»",
    ),
    "r1, with an empty turn for an empty content": (
        R1_NULL,
        CALLS[:4],
        None,
        '<|begin|><|User|>look<|Assistant|>«<|call|>look {"city": "A"}<|end|>»<|output|>7<|Assistant|>«seven<|end|>»',
    ),
    "a called function's name printed with the result": (
        R1.replace("'<|output|>' +", "'<|output|>' + messages[loop.index0 - 1].tool_calls[0].function.name + ': ' +"),
        CALLS,
        None,
        '<|begin|><|User|>look<|Assistant|>«<|call|>look {"city": "A"}<|end|>»<|output|>look: 7'
        "<|Assistant|>«seven<|end|>»<|User|>more<|Assistant|>«8<|end|>»",
    ),
    "contents as lists of parts": (
        "{% for m in messages %}{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' }}{% for part in m.content %}"
        "{{ part.text }}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}",
        turns("hi", "red"),
        None,
        "<|User|>hi<|end|><|Assistant|>«red<|end|>»",
    ),
}


@pytest.mark.parametrize("name", SPANS)
def test_the_assistants_tokens_are_those_marked_by_hand(name):
    template, messages, tools, expected = SPANS[name]
    tokenizer = bpe(template)
    ids, is_assistant = [], []
    # every « and » is between two tokens, so the decoded spans of tokens equal the texts between the marks
    for piece in re.split("(«.*?»)", expected, flags=re.DOTALL):
        ids.append(piece.strip("«»"))
        is_assistant.append(piece.startswith("«"))
    found, marks = chat_tokenizer(tokenizer)(messages, tools)
    assert tokenizer.decode(found) == "".join(ids)
    assert said(tokenizer, found, marks) == [text for text, wanted in zip(ids, is_assistant, strict=True) if wanted]


def test_a_template_that_fails_in_any_way_is_an_error_of_the_row():
    tokenizer = ByT5Tokenizer(chat_template="{% for x in range(999999999) %}{{ x }}{% endfor %}")
    with pytest.raises(OverflowError, match="Range too big"):  # of jinja's sandbox
        chat_tokenizer(tokenizer)([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_a_template_prints_the_given_time():
    tokenizer = bpe("{{ 'today ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML)
    ids, _ = chat_tokenizer(tokenizer, time="2026-01-31T12:00:00")(turns("a", "b"))
    assert tokenizer.decode(ids).startswith("today 31 Jan 2026\n<|im_start|>user")
    with pytest.raises(UsageError, match="--template_time=noon is not a time such as 2026-01-31T12:00:00"):
        chat_tokenizer(tokenizer, time="noon")
    with pytest.raises(UsageError, match="a computed format"):
        chat_tokenizer(bpe("{{ strftime_now(bos_token) }}" + CHATML))


def test_tools_that_the_template_does_not_use_are_an_error():
    with pytest.raises(ValueError, match="the row has tools, but the chat template does not print them"):
        chat_tokenizer(TOKENIZERS["chatml"])(turns("a", "b"), [LOOK])


def test_keys_that_arrow_filled_with_null_are_dropped_and_contents_may_be_parts_or_null():
    tokenizer = bpe(QWEN_3)
    tokenize = chat_tokenizer(tokenizer)
    filled = {"type": "function", "function": {"name": "look", "arguments": {"city": "A", "x": None}}, "id": None}
    parts = [{"type": "text", "text": "lo"}, {"type": "text", "text": "ok", "image": None}]
    as_in_arrow = [
        {"role": "user", "content": parts, "tool_calls": None},
        CALLS[1] | {"tool_calls": [filled]},
        *CALLS[2:],
    ]
    schemas = json.dumps([LOOK])
    assert tokenize(as_in_arrow, schemas) == tokenize(CALLS, [LOOK])


@pytest.mark.parametrize("tools", ["{not json", ["{"], 3])
def test_tools_that_are_no_json_schemas_are_an_error(tools):
    with pytest.raises(ValueError, match="column 'tools' must hold a list of JSON schemas, found .*: fix the row"):
        chat_tokenizer(bpe(QWEN_3))(turns("a", "b"), tools)


def test_rows_with_tools_use_the_template_that_is_for_tools():
    tokenizer = bpe({"default": CHATML, "tool_use": QWEN_3})
    tokenize = chat_tokenizer(tokenizer)
    assert tokenize(CALLS, [LOOK]) == chat_tokenizer(bpe(QWEN_3))(CALLS, [LOOK])
    assert tokenize(turns("a", "b")) == chat_tokenizer(bpe(CHATML))(turns("a", "b"))
    with pytest.raises(UsageError, match="has several chat templates .a, b.: name one of them 'default'"):
        chat_tokenizer(bpe({"a": CHATML, "b": CHATML}))


def test_tool_calls_that_the_template_does_not_print_are_an_error():
    tokenize = chat_tokenizer(TOKENIZERS["chatml"])
    with pytest.raises(ValueError, match=r"does not print message 2 \(assistant\)'s tool calls: remove this"):
        tokenize([{"role": "user", "content": "look"}, CALLS[1], *turns("b", "c")])
    with pytest.raises(ValueError, match=r"does not print message 2 \(assistant\) with its tool calls"):
        tokenize([{"role": "user", "content": "look"}, CALLS[1] | {"content": "I call look"}, *turns("b", "c")])


@pytest.mark.parametrize("form", [R1, R1.replace("(call.function.arguments | tojson)", "call.function.arguments")])
@pytest.mark.parametrize("arguments", [{"city": "A"}, '{"city": "A"}'])
def test_arguments_may_be_objects_or_json_text_for_either_kind_of_template(form, arguments):
    function = LOOK["function"] | {"arguments": arguments}
    messages = [*CALLS[:1], CALLS[1] | {"tool_calls": [LOOK | {"function": function}]}, *CALLS[2:]]
    assert chat_tokenizer(bpe(form))(messages) == chat_tokenizer(bpe(R1))(CALLS)


def test_an_empty_list_of_tool_calls_is_none():
    template = CHATML.replace(
        "message.content", "(message.tool_calls | tojson if 'tool_calls' in message else message.content)"
    )
    messages = [message | {"tool_calls": []} for message in [*turns("a", "b")]]
    assert chat_tokenizer(bpe(template))(messages) == chat_tokenizer(bpe(CHATML))(turns("a", "b"))


def test_messages_and_thoughts_that_the_template_does_not_print_are_errors():
    tokenize = chat_tokenizer(bpe(R1))
    with pytest.raises(ValueError, match=r"does not print message 1 \(system\): remove this, or use another template"):
        tokenize(turns("be brief", "hi", "red", first="system"))
    with pytest.raises(ValueError, match="messages have reasoning_content, but the chat template does not use it"):
        tokenize([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}])
    with pytest.raises(ValueError, match="the row has tools, but the chat template does not print them"):
        chat_tokenizer(bpe("{# has no tools #}" + CHATML))(turns("a", "b"), [LOOK])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | map(attribute='content') | join | length }}" + CHATML,  # the text depends on all contents
        CHATML.split("{% if add_generation_prompt")[0] + "<|im_start|>assistant\n",  # always ends with the prompt
        CHATML.replace("message.content +", "''  +"),  # prints no content
    ],
)
def test_a_template_in_which_the_assistants_text_is_uncertain_is_refused(template):
    with pytest.raises(UsageError, match="cannot be found|does not print"):
        chat_tokenizer(bpe(template))


def test_a_tool_result_within_the_assistants_turn_is_refused():
    result = (
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{{ (messages + [m])[loop.index].content }}{% endif %}"
    )
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
        "<|Assistant|>" + result + "{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    )
    messages = [CALLS[0], CALLS[1] | {"content": "I look"}, *CALLS[2:]]
    with pytest.raises(ValueError, match="in message 2 cannot be found"):
        chat_tokenizer(bpe(template))(messages)


def test_a_slow_tokenizer_gets_whole_special_tokens():
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"
    tokenizer = ByT5Tokenizer(chat_template=template + prompt)
    ids, marks = chat_tokenizer(tokenizer)(turns("a", "b", "c", "d"))
    text = "<|user|>a<|end|><|assistant|>«b<|end|>»<|user|>c<|end|><|assistant|>«d<|end|><|endoftext|>»"
    assert tokenizer.decode(ids) == re.sub("[«»]", "", text)
    assert said(tokenizer, ids, marks) == re.findall("«(.*?)»", text)


@pytest.mark.parametrize("none", [None, ""])
def test_a_template_may_test_for_null_content_or_slice_the_content(none):
    tokenizer, plain = bpe(R1_NULL), bpe(R1)
    messages = [*CALLS[:1], CALLS[1] | {"content": none}, *CALLS[2:]]
    assert chat_tokenizer(tokenizer)(messages) == chat_tokenizer(plain)(messages)
    tokenizer = bpe(R1.replace("message.content.split", "message.content[:99].split"))
    assert chat_tokenizer(tokenizer)(messages) == chat_tokenizer(plain)(messages)


@pytest.mark.parametrize("tag", ["", "{% generation %}{% endgeneration %}"])
def test_a_conversation_that_the_template_refuses_is_a_bad_row(tag):
    tokenize = chat_tokenizer(bpe("{{ raise_exception('roles must alternate') }}" + tag))
    with pytest.raises(ValueError, match=r"rejects a conversation of turns user, assistant \(roles must alternate\)"):
        tokenize(turns("a", "b"))


def chatml(messages, add_generation_prompt=False):
    turns = [f"<|{message['role']}|>\n{printed(message)}<|end|>\n" for message in messages]
    return "".join(turns) + ("<|assistant|>\n" if add_generation_prompt else "")


def printed(message):
    """Print a message as Llama's template does: contents stripped, calls as JSON, the results of tools as JSON."""
    if message["role"] == "tool":
        return json.dumps(message["content"], ensure_ascii=False)
    return message["content"].strip() + "".join(json.dumps(call) for call in message.get("tool_calls", ()))


def thinking(messages, add_generation_prompt=False):
    """Print an empty thought in the replies after the last question only, as Qwen3's template does."""
    last = max((turn for turn, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn > last:
            messages = [*messages]
            messages[turn] = message | {"content": f"<think></think>{message['content']}"}
    return chatml(messages, add_generation_prompt)


def numbered(messages, add_generation_prompt=False):
    return "".join(f"<{turn % 3}>{message['content']}</{turn % 5}>" for turn, message in enumerate(messages)) + (
        f"<{len(messages) % 3}>" if add_generation_prompt else ""
    )


def forgetful(messages, add_generation_prompt=False):
    """Print replies without their thoughts, as Qwen3's template prints all but the last."""
    return chatml(
        [message | {"content": message["content"].rpartition("</think>")[2]} for message in messages],
        add_generation_prompt,
    )


def calling(number):
    """Return a question, a call of a tool, its result and a reply."""
    call = {"name": "weather", "arguments": {"city": "Rome" * number}}
    return [
        {"role": "user", "content": f"question {number}" if number % 7 else ""},
        {"role": "assistant", "content": "I call" if number % 3 == 1 else "", "tool_calls": [call]},
        {"role": "tool", "content": f'{{"degrees": "{number}"}}\n'},
        {"role": "assistant", "content": f"<think>{number}</think>degrees {number}" if number % 5 else ""},
    ]


@pytest.mark.parametrize("render", [chatml, thinking, numbered, forgetful])
def test_the_turns_of_a_long_conversation_are_the_same_whether_each_or_some_are_measured(render):
    contents = ("hi", "yes ", "a b\n", "<|end|>\n", "", "turn 3")
    for messages in (
        turns(*(contents[number % len(contents)] for number in range(40))),
        turns(*(contents[number % 4] for number in range(40))),
        [message for number in range(20) for message in calling(number)],
    ):
        expected = assistant_spans(render, messages, few_replies=100)
        assert assistant_spans(render, messages, few_replies=0) == expected


@pytest.mark.parametrize("render", [chatml, thinking, forgetful])
def test_a_long_conversation_is_rendered_a_few_times_only(render):
    def counting(*arguments, **options):
        counts.append(1)
        return render(*arguments, **options)

    empty = [f"turn {number}" if number % 7 else "" for number in range(2000)]
    calls = [message for number in range(1, 3500, 7) for message in calling(number)]  # no question is empty
    for messages in (turns(*(f"turn {number}" for number in range(2000))), turns(*empty), calls):
        counts = []
        text, spans = assistant_spans(counting, messages)
        assert len(counts) < 120
        for message, (start, stop) in zip(messages[1::2], spans[:-2], strict=False):
            says = printed(message).rpartition("</think>")[2] if render is forgetful else printed(message)
            assert text[start:stop] == f"{says}<|end|>\n"
