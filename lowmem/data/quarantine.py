"""Rows -> encoded rows. One that cannot be read or encoded ends the run, or is left out, counted and written down."""

import json
from functools import cached_property
from pathlib import Path

from lowmem.data.encode import BadRow
from lowmem.errors import RowError


class Quarantine:
    """Takes rows that are left out, each once over all epochs and resumed runs; too many of them are an error.

    `path` gets them as JSON lines {"error", "row"}, to mend them or to look what they have in common; None keeps none.
    What it holds when the first row is added counts as taken. Every process has its own.
    """

    def __init__(self, limit: int, path: str | Path | None = None):
        self.limit, self.path = limit, path if path is None else Path(path)

    def __len__(self) -> int:
        return len(self._taken)

    def add(self, bad: BadRow) -> None:
        """Take one. Raises RowError if it is one too many, OSError if it cannot be written."""
        told = str(bad.error)
        if told in self._taken:
            return
        if len(self._taken) >= self.limit:
            where = f", the others are in {self.path}" if self.path and self.limit else ""
            raise RowError(
                f"{told}. Bad rows may be left out, but this is more than {self.limit} of them{where}: mend them, or "
                "set --max_bad_rows higher"
            ) from bad.error
        self._taken.add(told)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"error": told, "row": bad.content}, default=repr) + "\n")

    @cached_property
    def _taken(self) -> set[str]:
        """The errors of all rows so far, which tell their places."""
        if self.path is None:
            return set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            *lines, half = file.read().split(b"\n")
            if half:  # of a run that was killed while it wrote
                file.truncate(file.tell() - len(half))
        return {json.loads(line)["error"] for line in lines}
