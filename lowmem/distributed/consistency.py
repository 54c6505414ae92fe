"""Check before the first step that all ranks have the same code, flags, data and weights."""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sized
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lowmem.distributed.collectives import gather_json, on_main_rank, rank_and_world_size
from lowmem.distributed.fill import stored_weights
from lowmem.errors import UsageError
from lowmem.storage.files import make_folders, write_file
from lowmem.storage.tensor_files import StoredTensor, open_shards

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")  # their versions affect results or tokens
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_SECONDS_TO_APPEAR = 5.0  # a network file system may show a new file late
_MOST_CHARACTERS = 200  # longer values are truncated in messages


def check_same(what: Mapping[str, object]) -> None:
    """Compare the values in `what` across ranks, as text. If any differ, every rank raises UsageError listing them."""
    mine = {name: str(value) for name, value in what.items()}
    (first_host, first), *others = gather_json([socket.gethostname(), mine])
    ranks_by_difference: dict[str, list[str]] = {}
    for rank, (host, other) in enumerate(others, 1):
        names = [name for name in first | other if first.get(name) != other.get(name)]
        if names:
            differences = [f"{name} {_value(other, name)} (rank 0: {_value(first, name)})" for name in names]
            ranks_by_difference.setdefault("; ".join(differences), []).append(f"{rank} on {host}")
    if ranks_by_difference:
        clauses = [f"rank {', '.join(ranks)} has {difference}" for difference, ranks in ranks_by_difference.items()]
        raise UsageError(f"{'. '.join(clauses)}. Rank 0 is on {first_host}: use the same flags, files and code")


def check_same_inputs(flags: Mapping[str, object], rows: dict[str, Sized | None], output: Path | None = None) -> None:
    """Run `check_same` on code, versions, `flags`, each of `rows` that is not None, and `output` unless it is None."""
    if rank_and_world_size()[1] > 1:
        digests = {f"{name} rows": rows_digest(each) for name, each in rows.items() if each is not None}
        check_same(code() | flags | digests | (shared_output_dir(output) if output else {}))


def check_same_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, weights: bool) -> None:
    """Run `check_same` on tokenizer and model. Set `weights=False` for random weights, which can differ across CPUs."""
    if rank_and_world_size()[1] > 1:
        check_same({"the model": model_digest(model, weights=weights), "the tokenizer": tokenizer_digest(tokenizer)})


def _value(values: Mapping[str, str], name: str) -> str:
    value = values.get(name, "missing")
    return value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}..."


def code() -> dict[str, str]:
    """Return values for `check_same`: hashes of this package and of the program, and the versions of `_PACKAGES`."""
    root, digest = Path(__file__).parent.parent, xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or "")  # no file: an interpreter's prompt
    of_program = xxhash.xxh3_64_hexdigest(program.read_bytes()) if program.is_file() else ""
    versions = {package: version(package) for package in _PACKAGES}
    return {"lowmem's code": digest.hexdigest(), "the program's code": of_program} | versions


def shared_output_dir(folder: Path) -> dict[str, str]:
    """Return {"output_dir": text}. The text equals rank 0's only if this rank sees rank 0's token file in `folder`."""

    def write_token() -> str:
        make_folders(folder)
        for leftover in folder.glob(".seen-*"):  # token files of runs that were killed
            leftover.unlink()
        token = folder / f".seen-{uuid4().hex}"  # a new name, because a file system may remember an old name as removed
        write_file(token, [])
        return str(token)

    token = on_main_rank(write_token)
    token_of_first = Path(gather_json(token)[0])
    seen, limit = folder / token_of_first.name, time.monotonic() + _SECONDS_TO_APPEAR
    while not (is_seen := os.path.exists(seen)) and time.monotonic() < limit:  # also False if access is denied
        time.sleep(0.1)
    gather_json(None)  # wait until every rank has looked
    if token is not None:
        token_of_first.unlink(missing_ok=True)
    return {"output_dir": str(token_of_first.parent) if is_seen else f"{folder}, which is another folder"}


def rows_digest(rows: Sized) -> str:
    """Return the number of rows and a hash of their files' fingerprints (of an empty list if there are none)."""
    fingerprints = [fingerprint for _, fingerprint in getattr(rows, "fingerprints", list)()]
    return f"{len(rows):,}, fingerprint {_digest(fingerprints)}"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what affects tokens: the Rust tokenizer or a Python one's vocabulary; special tokens; chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return _digest([kind, len(tokenizer), tokenizer.special_tokens_map, tokenizer.chat_template])


def _digest(value: object) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, default=str).encode())


def model_digest(model: nn.Module, *, weights: bool) -> str:
    """Hash names, shapes and dtypes; with `weights`, also 16 samples of 4 KiB per tensor (on meta: as stored)."""
    digest = xxhash.xxh3_64()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if weights and not tensor.is_meta and tensor.numel():
            data = _bytes(tensor)
            for start in _samples(len(data)):
                digest.update(data[start : start + _SAMPLE_BYTES])
    if weights and any(parameter.is_meta for parameter in model.parameters()):
        have_data = {name for name, parameter in model.named_parameters() if not parameter.is_meta}  # of a new head
        for stored in stored_weights(model, Path(model.name_or_path), but=have_data).values():
            _add_samples(digest, stored)
    return digest.hexdigest()


def files_digest(folder: Path) -> str:
    """Hash names, shapes, dtypes and 16 samples of 4 KiB of each tensor in a model's files, in any number of files."""
    digest = xxhash.xxh3_64()
    for name, stored in sorted(open_shards(folder, "model").items()):
        digest.update(f"{name} {stored.shape} {stored.dtype}\n".encode())
        _add_samples(digest, stored)
    return digest.hexdigest()


def _add_samples(digest: xxhash.xxh3_64, stored: StoredTensor) -> None:
    row_bytes = stored.read(slice(0, 1)).nbytes if stored.shape else 0
    for start in _samples(stored.shape[0] * row_bytes) if row_bytes else ():
        rows = slice(start // row_bytes, -(-(start + _SAMPLE_BYTES) // row_bytes))
        digest.update(_bytes(stored.read(rows)))


def _samples(num_bytes: int) -> list[int]:
    """Return where the samples of a tensor begin; a small tensor has fewer."""
    last = max(0, num_bytes - _SAMPLE_BYTES)
    return sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)})


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
