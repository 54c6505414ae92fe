"""Read the JSON files of a checkpoint, and check the type and range of each field. Imports no torch."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from reprlib import repr as shortened
from typing import NamedTuple

import xxhash

from lowmem.config.train_config import choices
from lowmem.errors import UsageError
from lowmem.storage.files import read_json
from lowmem.storage.shard_files import has_shards, model_stem

FORMAT = 1
ADVICE = "use another checkpoint"


class _Rule(NamedTuple):
    """What a field holds: `allows` checks a value, `words` describe it."""

    words: str
    allows: Callable[[object], bool]
    is_required: bool = True

    def or_null(self) -> "_Rule":
        return self._replace(words=f"null or {self.words}", allows=lambda value: value is None or self.allows(value))

    def if_set(self) -> "_Rule":
        """The rule of a field that not every version or caller writes."""
        return self._replace(is_required=False)


def _is_name(name: str) -> bool:
    """Whether `name` is the plain relative path of a file in the folder, so that no other path means the same file."""
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return is_inside and str(path) == name and name not in ("", ".", "manifest.json")


_COUNT = _Rule("an integer from 0 to 2**63 - 1", lambda value: type(value) is int and 0 <= value < 2**63)
_POSITIVE = _Rule("an integer from 1 to 2**63 - 1", lambda value: _COUNT.allows(value) and value > 0)
_SEED = _Rule("an integer of up to 64 bits", lambda value: type(value) is int and -(2**63) <= value < 2**64)
_NUMBER = _Rule("a finite number", lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max)
_SCALES = [2.0**power for power in range(25)]
_SCALE = _Rule("a power of two from 1 to 2**24", lambda value: _NUMBER.allows(value) and value in _SCALES)
_TEXT = _Rule("text", lambda value: isinstance(value, str))
_SWITCH = _Rule("true or false", lambda value: isinstance(value, bool))
_OBJECT = _Rule("an object", lambda value: isinstance(value, dict))
_NAMES = _Rule("a list of names", lambda value: isinstance(value, list) and all(map(_TEXT.allows, value)))
_TIER = _Rule(f"one of {', '.join(choices('memory'))}", lambda value: value in choices("memory"))
_HASH = _Rule("a hash", lambda value: _TEXT.allows(value) and re.fullmatch("[0-9a-f]{32}", value) is not None)

_MANIFEST = {"format": _POSITIVE, "step": _COUNT, "files": _OBJECT}
_RECORD = {"bytes": _COUNT, "xxh3_128": _HASH}
_STATE = {"step": _COUNT, "updates": _COUNT.if_set(), "best": _OBJECT.or_null(), "seed": _SEED}
_STATE |= {"stream": _OBJECT.or_null(), "tokenizer": _TEXT.or_null().if_set(), "optimizer": _TEXT}
_STATE |= {"memory": _TIER.if_set(), "definition": _COUNT.if_set(), "parameters": _NAMES.if_set()}
_STATE |= {"evaluated_step": _COUNT.if_set(), "evaluations_since_best": _COUNT.if_set()}
_STATE |= {"base": _TEXT.or_null().if_set(), "loss_scale": _OBJECT.or_null().if_set()}
_LOSS_SCALE = {"value": _SCALE, "finite_steps": _COUNT}
_BEST = {"step": _COUNT, "eval_loss": _NUMBER}
_STREAM = {"position": _COUNT, "num_rows": _POSITIVE, "row_groups": _TEXT.if_set()}
_STREAM |= {"seed": _SEED, "global_batch_size": _POSITIVE, "shuffle": _SWITCH.if_set(), "files": _NAMES.if_set()}
_SETTINGS = {"memory": _TIER.or_null().if_set(), "template_time": _TEXT.or_null().if_set()}


def read_manifest(path: str | Path) -> dict:
    """Return {"format", "step", "files": {name: record}}. Raises UsageError if it is missing, changed or too new."""
    path = Path(path)
    file = path / "manifest.json"
    if not file.is_file():
        found = "has no manifest.json, so it is not a complete checkpoint" if path.exists() else "does not exist"
        raise UsageError(f"{path} {found}: {ADVICE}")
    sealed = read_json(file, advice=ADVICE)
    _check(sealed, {"manifest": _OBJECT, "xxh3_128": _HASH}, file)
    manifest = sealed["manifest"]
    if sealed["xxh3_128"] != hash_of(manifest):
        raise UsageError(f"{file} changed since it was saved: {ADVICE}")
    _check(manifest, {"format": _POSITIVE}, file)
    if manifest["format"] > FORMAT:
        raise UsageError(f"{path} has format {manifest['format']}, but lowmem reads up to {FORMAT}: upgrade lowmem")
    _check(manifest, _MANIFEST, file)
    files = manifest["files"]
    for name, record in files.items():
        if not _is_name(name):
            raise UsageError(f"{file}: files has {shortened(name)}, which is not a file of the checkpoint: {ADVICE}")
        _check(record, _RECORD, file, f"files.{name}")
    missing = [] if "state.json" in files else ["state.json"]
    missing += [f"{stem}.safetensors" for stem in (model_stem(files), "optimizer") if not has_shards(stem, files)]
    if missing:
        raise UsageError(f"{file}: files does not list {', '.join(missing)}: {ADVICE}")
    return manifest


def hash_of(manifest: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def saved_settings(path: str | Path) -> tuple[dict, dict]:
    """Return the contents of state.json, and the `config` that was passed to `save_checkpoint` ({} if none was).

    Raises UsageError naming the first field that is missing or invalid.
    """
    path = Path(path)
    manifest = read_manifest(path)
    file = path / "state.json"
    state = read_json(file, advice=ADVICE)
    _check(state, _STATE, file)
    if state["best"] is not None:
        _check(state["best"], _BEST, file, "best")
    if state.get("loss_scale") is not None:
        _check(state["loss_scale"], _LOSS_SCALE, file, "loss_scale")
    stream = state["stream"] or {}
    if "num_rows" in stream or "global_batch_size" in stream:  # a stream of `open_stream`, not of a user's class
        _check(stream, _STREAM, file, "stream")
    if state["step"] != manifest["step"]:
        raise UsageError(f"{file}: step is {state['step']}, but manifest.json has {manifest['step']}: {ADVICE}")
    file = path / "model" / "lowmem.json"
    settings = read_json(file, advice=ADVICE) if "model/lowmem.json" in manifest["files"] else {}
    _check(settings, {}, file)
    return state, settings


def check_resumable(path: Path, *, has_stream: bool = True) -> None:
    """Raise UsageError unless `train` can resume from a checkpoint: its settings are valid, and its position too.

    Without `has_stream`, the run chooses its batches by the step alone, so a checkpoint needs no position.
    """
    state, settings = saved_settings(path)
    _check(settings, _SETTINGS, path / "model" / "lowmem.json")
    if not has_stream:
        return
    if state["stream"] is None:
        raise UsageError(f"{path} was saved without a stream, so it has no position to resume from: start over")
    _check(state["stream"], _STREAM, path / "state.json", "stream")
    position, rows = state["stream"]["position"], state["stream"]["global_batch_size"]
    if position != state["step"] * rows:
        found = f"stream.position is {position}, but step is {state['step']} with {rows} rows per step"
        raise UsageError(f"{path / 'state.json'}: {found}: {ADVICE}")


def _check(values: object, rules: Mapping[str, _Rule], file: Path, where: str = "") -> None:
    """Raise UsageError naming `file` and the first field of `values`, an object at `where`, that breaks its rule."""
    if not isinstance(values, dict):
        raise UsageError(f"{file}: {where or 'the content'} is {shortened(values)}, not an object: {ADVICE}")
    for name, rule in rules.items():
        field = f"{where}.{name}" if where else name
        if name not in values and rule.is_required:
            raise UsageError(f"{file}: {field} is missing: {ADVICE}")
        if name in values and not rule.allows(values[name]):
            raise UsageError(f"{file}: {field} is {shortened(values[name])}, not {rule.words}: {ADVICE}")
