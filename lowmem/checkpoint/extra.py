"""What a caller saves in a checkpoint next to the training state: tensors and JSON values by name, in extra/."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowmem.checkpoint.manifest import EXTRA_NAME, extra_names
from lowmem.checkpoint.saved import ADVICE, read_manifest
from lowmem.distributed.collectives import gather_json, raise_on_all_ranks
from lowmem.distributed.dtensor import pieces
from lowmem.distributed.fill import read_local
from lowmem.distributed.heartbeat import phase
from lowmem.errors import UsageError
from lowmem.storage.files import MOST_JSON_BYTES, FileRecord, make_folder, read_json, to_json, write_file
from lowmem.storage.tensor_files import check_dtype, open_shards, tensor_differences


class Extra(NamedTuple):
    """What `save_checkpoint` got as `extra`."""

    tensors: dict[str, dict[str, Tensor]]
    """By the stem of their files, relative to the checkpoint."""
    contents: dict[str, bytes]
    """JSON by file name."""

    @classmethod
    def of(cls, extra: Mapping[str, object]) -> "Extra":
        """Check `extra` on every rank. Raises UsageError on all if a value cannot be saved, or ranks have others."""
        tensors, contents = {}, {}
        with raise_on_all_ranks():
            for name, value in extra.items():
                if not isinstance(name, str) or EXTRA_NAME.fullmatch(name) is None:
                    raise UsageError(f"extra has the name {name!r}: use letters, digits and underscores")
                if isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in value.values()):
                    tensors[f"extra/{name}"] = _checked(name, value)
                else:
                    contents[f"extra/{name}.json"] = _encoded(name, value)
        outlines = [  # in order, because ranks write and send tensors in this order
            [stem, name, str(x.dtype), [*x.shape], isinstance(x, DTensor)]
            for stem, group in tensors.items()
            for name, x in group.items()
        ]
        first, *others = gather_json([outlines, [*contents]])
        if any(other != first for other in others):
            found = "extra has other names, shapes or dtypes, or another order, on another rank"
            raise UsageError(f"{found}: pass the same on every rank")
        return cls(tensors, contents)

    def write_contents(self, unfinished: Path) -> dict[str, FileRecord]:
        if self.contents and not (unfinished / "extra").exists():
            make_folder(unfinished / "extra")
        return {name: write_file(unfinished / name, [content]) for name, content in self.contents.items()}


def _checked(name: str, value: Mapping[object, object]) -> dict[str, Tensor]:
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            found = f"extra[{name!r}] has tensors, but {key!r} is a {type(tensor).__name__}"
            raise UsageError(f"{found}: give tensors and other values names of their own in extra")
        if key == "__metadata__":  # safetensors takes it for its own
            raise UsageError(f"extra[{name!r}] has a tensor named {key}, which safetensors cannot read: rename it")
        if tensor.is_meta or tensor.layout != torch.strided:
            found = "is on meta and has no data" if tensor.is_meta else f"has the layout {tensor.layout}"
            raise UsageError(f"extra[{name!r}][{key!r}] {found}: checkpoints need dense tensors, convert it")
        check_dtype(f"{name}.{key}", tensor)
        if isinstance(tensor, DTensor):
            pieces(tensor)  # raises UsageError if its sharding cannot be saved
    return dict(value)


def _encoded(name: str, value: object) -> bytes:
    try:
        content = to_json(value)
        if keys := [key for key in _keys(value) if not isinstance(key, str)]:
            raise TypeError(f"the key {keys[0]!r} is not text")  # JSON would make text of it: 1 and "1" become one
    except (TypeError, ValueError, RecursionError) as error:
        found = f"extra[{name!r}] is neither a mapping of names to tensors nor a JSON value ({error})"
        raise UsageError(f"{found}: convert it") from error
    if len(content) > MOST_JSON_BYTES:
        found = f"extra[{name!r}] has {len(content):,} bytes as JSON, more than {MOST_JSON_BYTES:,}"
        raise UsageError(f"{found}: make tensors of it, or several values")
    return content


def _keys(value: object) -> Iterator[object]:
    """Yield the keys of all mappings in a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    for part in value if isinstance(value, list | tuple) else ():
        yield from _keys(part)


@phase("loading extra values")
def load_extra(path: str | Path, name: str, *, into: Mapping[str, Tensor] | None = None) -> object:
    """Return what `save_checkpoint` got as `extra[name]`: a JSON value or {name: whole tensor in host memory}.

    With `into`, fills these tensors in place, and returns them: of a sharded one, this rank's part. Call it on every
    rank. `load_checkpoint` has verified the files; otherwise call `verify_checkpoint` first. Raises UsageError if the
    checkpoint has no such name, or if `into` has other names, shapes or dtypes.
    """
    path = Path(path)
    with raise_on_all_ranks():
        files = read_manifest(path)["files"]
        if name not in (known := extra_names(files)):
            found = f"{path} has no extra value {name!r}, but {', '.join(known) or 'none at all'}"
            raise UsageError(f"{found}: load one that it has, or use another checkpoint")
        if not known[name]:
            if into is not None:
                raise UsageError(f"extra[{name!r}] of {path} is a JSON value, not tensors: remove into")
            return read_json(path / f"extra/{name}.json", advice=ADVICE)
        stored = open_shards(path, f"extra/{name}", files)
        if into is None:
            into = {key: torch.empty(x.shape, dtype=x.torch_dtype) for key, x in stored.items()}
        if differences := tensor_differences(stored, into, any_dtype=False):
            raise UsageError(
                f"extra[{name!r}] of {path} does not match: {'; '.join(differences[:10])}: pass such tensors"
            )
        with torch.no_grad():
            for key, tensor in into.items():
                read_local(tensor, stored[key])
        return into
