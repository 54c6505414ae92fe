"""Generate the rows that `data.py` reads, write any number of them to a file, and train a tokenizer on them."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from records import Record

SEED = 0

KINDS = {
    "parquet-100k": (".parquet", 100_000),
    "parquet-default": (".parquet", 2**20),
    "jsonl": (".jsonl", 100_000),
}
"""For each kind of file: its suffix, and the number of rows per write (in parquet: per row group)."""

_BLOCK_ROWS = 100_000
_NUM_WORDS = 4096


def words() -> list[bytes]:
    """Return made-up words of two to nine letters."""
    generator = np.random.default_rng(SEED)
    letters = generator.integers(ord("a"), ord("z") + 1, (_NUM_WORDS, 9), dtype=np.uint8)
    return [row[:length].tobytes() for row, length in zip(letters, generator.integers(2, 10, _NUM_WORDS), strict=True)]


def texts(generator: np.random.Generator, num_rows: int, fewest: int, most: int):
    """Return a pyarrow array of texts of `fewest` to `most` words. Some words are far more frequent than others."""
    import pyarrow as pa

    # each word twice: with a space after it and, for the end of a text, without
    written = [word + b" " for word in words()] + words()
    lengths = np.array([len(word) for word in written])
    starts = np.cumsum(lengths) - lengths
    num_words = generator.integers(fewest, most + 1, num_rows)
    ends = np.cumsum(num_words)
    chosen = (generator.random(ends[-1]) ** 3 * _NUM_WORDS).astype(np.int64)
    chosen[ends - 1] += _NUM_WORDS
    stops = np.cumsum(lengths[chosen])
    indices = np.arange(stops[-1]) + np.repeat(starts[chosen] - stops + lengths[chosen], lengths[chosen])
    data = np.frombuffer(b"".join(written), np.uint8)[indices]
    offsets = np.concatenate([[0], stops[ends - 1]]).astype(np.int32)
    return pa.StringArray.from_buffers(num_rows, pa.py_buffer(offsets), pa.py_buffer(data))


def block(number: int):
    """Return a table of _BLOCK_ROWS rows of about 75 bytes. A prompt starts with 10**8 + its row's number."""
    import pyarrow as pa
    from pyarrow import compute

    generator = np.random.default_rng((SEED, number))
    ids = pa.array(np.arange(_BLOCK_ROWS) + number * _BLOCK_ROWS + 10**8).cast(pa.string())
    prompts = compute.binary_join_element_wise(ids, texts(generator, _BLOCK_ROWS, 2, 8), " ")
    return pa.table({"prompt": prompts, "response": texts(generator, _BLOCK_ROWS, 2, 8)})


def number_of(row: dict[str, str]) -> int:
    return int(row["prompt"][:9]) - 10**8


def tables(num_rows: int, rows_each: int) -> Iterator:
    """Yield the first `num_rows` rows in tables of at most `rows_each` rows. `rows_each` does not change the rows."""
    import pyarrow as pa

    rest = block(0).slice(0, 0)
    for number in range(-(-num_rows // _BLOCK_ROWS)):
        rest = pa.concat_tables([rest, block(number).slice(0, num_rows - number * _BLOCK_ROWS)])
        while rest.num_rows >= rows_each:
            yield rest.slice(0, rows_each)
            rest = rest.slice(rows_each)
    if rest.num_rows:
        yield rest


def generate(file: str, kind: str, num_rows: int) -> Record:
    """Write a file of `num_rows` rows atomically, with one row group in memory at a time."""
    from pyarrow import compute, parquet

    unfinished, rows_each = Path(f"{file}.unfinished"), KINDS[kind][1]
    if kind == "jsonl":
        with open(unfinished, "wb") as lines:
            for table in tables(num_rows, rows_each):
                columns = [column.combine_chunks() for column in table.columns]
                parts = ('{"prompt": "', columns[0], '", "response": "', columns[1], '"}\n', "")
                lines.write(compute.binary_join_element_wise(*parts).buffers()[2])
    else:
        with parquet.ParquetWriter(unfinished, block(0).schema) as writer:
            for table in tables(num_rows, rows_each):
                writer.write_table(table, row_group_size=rows_each)
    os.replace(unfinished, file)
    return {}


def train_tokenizer(folder: str) -> Record:
    """Train a byte-level BPE of 8,192 tokens on the first rows and save it for `make_encode`."""
    table = next(tables(20_000, 20_000))
    fast_tokenizer([text for column in table.columns for text in column.to_pylist()], 8192).save_pretrained(folder)
    return {}


def fast_tokenizer(corpus: list[str], vocab_size: int):
    """Train a byte-level BPE on `corpus`; return it as a transformers fast tokenizer that appends </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
