"""Make a TrainConfig from flags, presets and a config file, or list all problems in one error. Imports no torch."""

import json
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import get_args

from lowmem.config.advice import advice_of, flags_in, near_name
from lowmem.config.fields import Field, alternatives_of, fields_of
from lowmem.config.presets import PRESETS
from lowmem.config.row_formats import ROW_FORMATS
from lowmem.config.rules import conflicts
from lowmem.config.train_config import FIELDS, TIERED_OPTIMIZERS, TrainConfig
from lowmem.errors import UsageError
from lowmem.storage.files import read_text

_BUNDLED_VALIDATION_ROWS = 240
_SWITCHES = [*PRESETS.keys() - {"tiny"}, "is_keep_training"]


def resolve(
    flags: Mapping[str, object],
    *,
    given: Mapping[str, object] | None = None,
    config_class: type[TrainConfig] = TrainConfig,
) -> TrainConfig:
    """Merge defaults, a preset, `given`, a `config` file and flags into a `config_class`; later ones win.

    The keys of `flags` are fields, presets, `config` (a YAML or JSON file) and `is_keep_training`; values may be text.
    `given` has fields from a launcher or a model's folder. Raises one UsageError that lists all problems.
    """
    problems: list[str] = []
    of_class = fields_of(config_class)
    alternatives = alternatives_of(of_class)
    file_switches, file_fields = _read(_read_config_file(flags.get("config"), problems), problems, of_class)
    switches, fields = _read({name: value for name, value in flags.items() if name != "config"}, problems, of_class)
    presets = sorted(name for name, is_on in (file_switches | switches).items() if is_on)
    if len(presets) > 1:
        problems.append(f"{' and '.join('--' + name for name in presets)} were set together: choose one preset")
    # what a derived class changes takes the place of TrainConfig's defaults, and of the preset that nobody chose
    changed = {name: of_class[name].default for name in FIELDS if of_class[name].default != FIELDS[name].default}
    layers = [changed, PRESETS[presets[0]] if presets else {}, dict(given or {}), file_fields, fields]
    names_model = any(layer.get("model_name_or_path") or layer.get("model_config") for layer in layers)
    merged: dict[str, object] = {}
    for layer in [{} if presets or names_model else PRESETS["tiny"], *layers]:
        for a, b in alternatives:
            if layer.get(a) is not None and layer.get(b) is not None:
                problems.append(f"--{a} and --{b} were both set, but they are alternatives: remove one of them")
            for one, other in ((a, b), (b, a)):
                if layer.get(one) is not None and other in merged:
                    merged[other] = None
        merged |= layer
    if merged.get("train_file") is None and merged.get("validation_file") is None:
        merged.setdefault("validation_rows", _BUNDLED_VALIDATION_ROWS)
    for name, field in of_class.items():
        fallback = field.metadata.get("fallback")
        others = {other for pair in alternatives if name in pair for other in pair}
        if fallback is not None and all(merged.get(other) is None for other in others):
            merged[name] = fallback
    if merged.get("row_format") in ROW_FORMATS:
        merged |= ROW_FORMATS[merged.pop("row_format")]
    if merged.get("memory") is None and merged.get("mixed_precision") == "bf16":
        has_tier = merged.get("optimizer", of_class["optimizer"].default) in TIERED_OPTIMIZERS
        merged["memory"] = "exact" if has_tier and merged.get("deepspeed") is None else "off"
    if merged.get("offload_weights"):
        merged.setdefault("layered", True)
    config = config_class(**merged)
    problems += conflicts(config, presets)
    if problems:
        raise UsageError("; ".join(dict.fromkeys(problems)))
    return config


def typed_fields(values: Mapping[str, object], source: Path) -> dict[str, object]:
    """Convert `values`, which are fields read from the file `source`. Raises UsageError that lists all problems."""
    problems: list[str] = []
    _, fields = _read(values, problems, FIELDS)
    if problems:
        raise UsageError(f"{source}: {'; '.join(problems)}")
    return fields


def named_fields(flags: Mapping[str, object], config_class: type[TrainConfig]) -> frozenset[str]:
    """The fields that flags or the config file set directly, not through a preset."""
    return frozenset(fields_of(config_class).keys() & {*flags, *_read_config_file(flags.get("config"), [])})


def _read_config_file(path: object, problems: list[str]) -> dict[str, object]:
    if path is None:
        return {}
    import yaml

    try:
        text = read_text(str(path), f"--config={path}", advice="name a YAML or JSON file", most_bytes=2**17)
        nested = _nested_key(yaml.parse(text))
        values = yaml.safe_load(text) if nested is None else None
    except UsageError as error:
        problems.append(str(error))
    except Exception as error:  # PyYAML raises errors of many types if a value does not fit its tag
        problems.append(f"--config={path} is not YAML: {' '.join(str(error).split())}")
    else:
        if isinstance(values, dict) and all(isinstance(key, str) for key in values):
            return values
        found = f", but the value of {nested} is nested" if nested else ""
        advice = advice_of(nested or "", "nested") or "rewrite it or remove --config"
        problems.append(f"--config={path} must contain only `field: value` pairs{found}: {advice}")
    return {}


def _nested_key(events: Iterable[object]) -> str | None:
    """Return the key at which YAML events nest more than a list in a mapping; None if they do not.

    Anchors of lists and mappings count as nesting, because their aliases can expand without limit.
    """
    depth, key = 0, ""
    for event in events:
        kind = type(event).__name__  # yaml is imported only if there is a file
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > 4 or (kind in ("MappingStartEvent", "SequenceStartEvent") and event.anchor):  # stream and document
            return key
        if kind == "ScalarEvent" and depth == 3:
            key = event.value
    return None


def _read(
    values: Mapping[str, object], problems: list[str], of_class: Mapping[str, Field]
) -> tuple[dict[str, bool], dict[str, object]]:
    """Split `values` into preset switches and fields, and convert each to its type."""
    switches, fields = {}, {}
    unknown: dict[str, list[str]] = {}
    for name, value in values.items():
        is_field = name in of_class
        is_own = is_field and name not in FIELDS  # a derived class may use the name of another trainer's flag
        if advice := None if is_own else advice_of(name, value):
            if is_field:
                problems.append(f"--{name}={value}: {advice}")
            else:
                unknown.setdefault(advice, []).append(name)
            meant = _read(flags_in(advice), problems, of_class)  # to check other flags with what was meant
            switches, fields = meant[0] | switches, meant[1] | fields
        elif is_field:
            fields[name] = _coerce(name, of_class[name], value, problems)
        elif name in _SWITCHES:
            switches[name] = _coerce(name, Field(bool, False, {}), value, problems) is True
        else:
            near = near_name(name, [*of_class, *_SWITCHES, "config"])
            hint = f"did you mean --{near}?" if near else "`--help` lists all flags"
            unknown.setdefault(hint, []).append(name)
    for advice, names in unknown.items():
        problems.append(f"unknown flag{'s' * (len(names) > 1)} {', '.join(f'--{name}' for name in names)}: {advice}")
    if switches.pop("is_keep_training", False) and fields.setdefault("resume", "auto") != "auto":
        problems.append(f"--is_keep_training means --resume=auto, but --resume={fields['resume']} was set: remove one")
    return switches, fields


def _coerce(name: str, field: Field, value: object, problems: list[str]) -> object:
    """Convert `value` to the field's type, or add a problem. Command lines have only text, YAML and Python types."""
    kind, rules = field.type, field.metadata
    if isinstance(kind, types.UnionType):
        if NoneType in get_args(kind) and (value is None or str(value).lower() in ("none", "null")):
            return None
        kind = get_args(kind)[0]
    if isinstance(value, dict) and rules.get("holds") == "options":
        value = json.dumps(value, default=str)
    takes_list = rules.get("holds") in ("names", "files")
    is_list = isinstance(value, list | tuple) and takes_list
    parts = value if is_list else [value]
    if any(isinstance(part, list | tuple | dict | set | bytes) for part in parts):
        expected = "a value or a flat list" if takes_list else "a single value"
        problems.append(f"--{name} must be {expected}, not a {'nested ' * is_list}{type(value).__name__}")
        return rules.get("default")
    if value is None and not rules.get("may_be_empty"):
        problems.append(f"--{name} is empty: give it a value")
        return rules.get("default")
    if any("\0" in str(part) for part in parts):
        problems.append(f"--{name} contains a null byte: remove it")
        return rules.get("default")
    if kind is str:
        return _text(name, value, problems, rules.get("holds"))
    text = str(value).strip()
    if text == rules.get("or_word"):
        return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(value, bool):
            raise ValueError
        if kind is int:
            number = float(text)  # float() accepts 1e3, int() does not
            if not number.is_integer():
                raise ValueError
            return int(text) if text.lstrip("+-").isdigit() else int(number)
        return float(text)
    except (KeyError, ValueError, OverflowError):
        must = "must be True or False" if kind is bool else f"is not {'an' if kind is int else 'a'} {kind.__name__}"
        problems.append(f"--{name}={value} {must}")
        return None


def _text(name: str, value: object, problems: list[str], holds: str | None) -> str | None:
    """Return `value` as it was typed, with its blanks and commas; a list of names or files separated by commas."""
    text, is_list = str(value), isinstance(value, list | tuple)
    if name == "resume" and text.lower() in ("true", "false"):
        return "auto" if text.lower() == "true" else "never"
    if name == "mixed_precision" and value is False:
        return "no"  # YAML reads a bare `no` as false
    if text in ("True", "False"):  # what Fire passes for a flag without a value
        problems.append(f"--{name} needs a value: --{name}=...")
        return None
    if holds == "names":
        text = ",".join(str(part).strip() for part in (value if is_list else text.split(",")))
    if holds in ("names", "options"):
        return "" if text.lower() in ("none", "null") else text
    if holds == "files" and is_list:
        return ",".join(str(file).replace(",", r"\,") for file in value)  # `expand` splits it again
    return os.path.expanduser(text) if holds == "path" else text
