"""Rows that need no file: short questions of three kinds, generated from the row number. No two rows are equal."""

from dataclasses import dataclass
from string import ascii_lowercase

from lowmem.data.order import permute

NUM_BUNDLED_ROWS = 12_000
_VARIETIES = (26**4, 90 * 90, 9_000)  # how many questions of each kind there are


def _question(kind: int, number: int) -> tuple[str, str]:
    """Return a question and its answer. Kinds: a word backwards, the larger of two numbers, a number's successor."""
    if kind == 0:
        word = "".join(ascii_lowercase[number // 26**i % 26] for i in range(4))
        return f"spell {word} backwards", word[::-1]
    if kind == 1:
        a, b = (10 + digit for digit in divmod(number, 90))
        return f"which is larger, {a} or {b}?", str(max(a, b))
    return f"what comes after {1000 + number}?", str(1001 + number)


@dataclass(frozen=True)
class BundledRows:
    """The bundled rows [first, stop), each `{"prompt": str, "response": str}`."""

    first: int = 0
    stop: int = NUM_BUNDLED_ROWS

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, index: int) -> dict[str, object]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} bundled rows does not exist")
        number, kind = divmod(self.first + index, len(_VARIETIES))
        # A permutation picks each question at most once, so held-out questions never occur in training.
        prompt, response = _question(kind, int(permute([number], _VARIETIES[kind], (kind,))[0]))
        return {"prompt": prompt, "response": response}

    def slice(self, first: int, stop: int) -> "BundledRows":
        return BundledRows(self.first + first, self.first + stop)

    def where(self, index: int) -> str:
        return f"bundled row {self.first + index}"
