"""Skip rows that cannot be read or encoded: count them, write them down, and stop at a limit."""

import json
from functools import cached_property
from pathlib import Path

from lowmem.data.encode import BadRow
from lowmem.errors import RowError


class Quarantine:
    """The rows that a process skips, each counted once, with those that earlier runs wrote to `path` as JSON lines."""

    def __init__(self, limit: int, path: str | Path | None = None):
        self.limit, self.path = limit, path if path is None else Path(path)

    def __len__(self) -> int:
        return len(self._taken)

    def add(self, bad: BadRow) -> None:
        """Skip a row. Raises RowError if it is one too many, OSError if it cannot be written."""
        error = str(bad.error)
        if error in self._taken:
            return
        if len(self._taken) >= self.limit:
            where = f", the others are in {self.path}" if self.path and self.limit else ""
            what = f"{error}. Bad rows are skipped, but there are more than {self.limit} of them{where}"
            raise RowError(f"{what}: fix them, or set --max_bad_rows higher") from bad.error
        self._taken.add(error)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"error": error, "row": bad.content}, default=repr) + "\n")

    @cached_property
    def _taken(self) -> set[str]:
        """The errors of all rows so far; each names its row."""
        if self.path is None:
            return set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            *lines, rest = file.read().split(b"\n")
            file.truncate(file.tell() - len(rest))  # half a line, if a run was killed while it wrote
        return {json.loads(line)["error"] for line in lines}
