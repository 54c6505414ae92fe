"""Find and open the safetensors files of a model or optimizer, which may have an index. Imports no torch."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lowmem.errors import UsageError
from lowmem.storage.files import describe, read_json

_ADVICE = "copy or download it again, or use another"


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def model_stem(files: Collection[str]) -> str:
    """Return the stem of a checkpoint's weights. If its model/ is an adapter folder, they are those of the adapters."""
    return "model/adapter_model" if "model/adapter_config.json" in files else "model/model"


def has_shards(stem: str, files: Collection[str]) -> bool:
    """Whether `files` lists the one file of `stem`, or the index of its shards."""
    return f"{stem}.safetensors" in files or index_name(stem) in files


def shard_files(folder: Path, stem: str, files: Collection[str] | None = None) -> list[Path]:
    """Return the paths of the files of `stem`. `files` lists the names in `folder` (None: look there).

    Raises UsageError if the index is damaged, or names a file that is not in `files` or not next to the index.
    """
    index = folder / index_name(stem)
    if not (index.exists() if files is None else index_name(stem) in files):
        return [folder / f"{stem}.safetensors"]
    content = read_json(index, advice=_ADVICE)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map of tensors to files: {_ADVICE}")
    paths = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UsageError(f"{index}: weight_map.{tensor} is {name!r:.100}, not a file in the same folder: {_ADVICE}")
        path = index.with_name(name)
        if files is not None and path.relative_to(folder).as_posix() not in files:
            raise UsageError(f"{index}: weight_map.{tensor} is {name}, which the checkpoint does not list: {_ADVICE}")
        paths.add(path)
    return sorted(paths)


@contextmanager
def open_shard(path: Path, framework: str) -> Iterator[safe_open]:
    """Open a safetensors file, which checks its header. Raises UsageError if it is damaged or no regular file."""
    if path.exists() and not path.is_file():  # opening a FIFO may never end
        raise UsageError(f"{path} {describe(path)}: {_ADVICE}")
    try:
        opened = safe_open(path, framework=framework)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is not a valid safetensors file ({error}): {_ADVICE}") from error
    with opened as file:
        yield file
