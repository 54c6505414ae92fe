"""Find the files of a model that the Hugging Face hub has cached."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache


def model_folder(name: str) -> Path | None:
    """Return the folder `name`, or the cached snapshot of the model of that name; None if there is neither."""
    if Path(name).is_dir():
        return Path(name) if name else None  # a model built from a config has no name
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name on the hub, so it was a folder, which is gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None
