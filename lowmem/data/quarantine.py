"""Skip rows that cannot be read or encoded: count them, write them to a file, and stop at a limit."""

import json
from functools import cached_property
from pathlib import Path

from lowmem.data.encoder import BadRow
from lowmem.errors import RowError


class Quarantine:
    """The rows that a process has skipped, each counted once, and those that earlier runs wrote to the file `path`."""

    def __init__(self, limit: int, path: str | Path | None = None):
        self.limit, self.path = limit, path if path is None else Path(path)

    def __len__(self) -> int:
        return len(self._recorded)

    def add(self, bad: BadRow) -> None:
        """Skip a row. Raises RowError if too many rows are skipped, OSError if `path` cannot be written."""
        error = str(bad.error)
        if error in self._recorded:
            return
        if len(self._recorded) >= self.limit:
            where = f" (the others are in {self.path})" if self.path and self.limit else ""
            what = f"{error}. More than --max_bad_rows={self.limit} rows are bad{where}"
            raise RowError(f"{what}: fix them, or raise --max_bad_rows") from bad.error
        self._recorded.add(error)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"error": error, "row": bad.content}, default=repr) + "\n")

    @cached_property
    def _recorded(self) -> set[str]:
        """The error messages of all skipped rows. Each message names its row."""
        if self.path is None:
            return set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            *lines, rest = file.read().split(b"\n")
            file.truncate(file.tell() - len(rest))  # remove the incomplete line of a run that was killed while writing
        return {json.loads(line)["error"] for line in lines}
