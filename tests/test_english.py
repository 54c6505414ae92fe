"""The files in FILES, except this one, contain no words of DIALECT, which make a sentence hard to read."""

import re

import pytest

from tests.processes import ROOT

# Pattern of forbidden words: what to write instead.
DIALECT = {
    r"anew|begun again": "again",
    r"alike": "identically, the same",
    r"beside(?!s)": "next to, with, compared with",
    r"meanwhile": "during that time",
    r"turn by turn|in turns(?!\])": "interleaved",
    r"in vain": "timed out",
    r"(was|is|were|are) asked for": "was set",
    r"last words": "on_abort",
    r"leave(s|d)? --\w+": "remove --flag, or set --flag=X",
    r"told": "reported, printed, configured",
    r"tells? (that|which|how|what|it|of|so|by|whether|apart)": "reports, prints, says",
    r"stands?|stood": "is, exists",
    r"whoever|whomever|wherever": "name who or where",
    r"(goes|going|went) on": "continues",
    r"as ever": "as usual",
    r"passe[sd] over": "skipped, ignored",
    r"hand(s|ed)? out": "allocates, assigns",
    r"found out": "detected",
    r"dealt out|deals? out": "distributed",
    r"one another": "each other",
    r"but for": "except",
    r"com(es?|ing) back|came back": "returns, restarts",
    r"take(s|n)? along": "include",
    r"no more than": "at most",
    r"(sent|send|sends) round": "broadcast",
    r"(rows|bytes|MiB|seconds) a (step|process|rank|parameter|weight|row)": "per",
    r"is no (file|folder|model|record|checkpoint|row|number)": "is not a",
    r"as asked": "unchanged, as set",
    r"(is|are) not built": "is not supported",
    r"divided over|gathered weights|weights that were gathered": "sharded, all-gathered",
}
# For a pattern in DIALECT, texts that exempt a line from it.
EXCEPTIONS = {
    "last words": ["last_words"],  # an argument of `join`; `join` remains as an alias of `init_distributed`
}

BOUNDED = r"(?<![\w-])({})(?!\w)"
ANY = re.compile(BOUNDED.format("|".join(DIALECT)), re.IGNORECASE)

FILES = sorted(
    path
    for pattern in (
        "*.md",
        "*.py",
        "docs/*.md",
        "accelerate_configs/*.yaml",
        "benchmarks/**/*.py",
        "benchmarks/*.md",
        "examples/*.*",
    )
    for path in ROOT.glob(pattern)
)
FILES += sorted(path for folder in ("lowmem", "tests", "examples") for path in (ROOT / folder).rglob("*.py"))


def dialect_in(text):
    """Return (line number, words, what to write instead) for each line of `text` and pattern in it."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.replace("_", " ")
        for pattern, instead in DIALECT.items() if ANY.search(words) else ():
            match = re.search(BOUNDED.format(pattern), words, re.IGNORECASE)
            if match and not any(allowed in line for allowed in EXCEPTIONS.get(pattern, [])):
                found.append((number, match[0], instead))
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name != "test_english.py"],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_text_is_plain_english(path):
    assert dialect_in(path.read_text()) == []


def test_every_pattern_is_detected_and_besides_is_allowed():
    text = """the file is read anew
        all ranks raise alike
        the copy beside its file
        meanwhile others wait
        two systems in turns
        it tried in vain
        what was asked for
        its last words
        leave --release
        the user is told
        the line tells which
        a file stands there
        whoever starts it
        the run goes on
        the model is written as ever
        a damaged checkpoint is passed over
        what the allocator handed out
        it is found out
        rows are dealt out
        ranks wait for one another
        the same gradient but for rounding
        a killed worker comes back
        settings are taken along
        it takes no more than a second
        weights are sent round
        8 rows a step
        it is no checkpoint
        it fits as asked
        fp16 is not built
        a model divided over ranks"""
    found = dialect_in(text)
    assert [line for line, _, _ in found] == list(range(1, len(DIALECT) + 1))
    assert [instead for _, _, instead in found] == list(DIALECT.values())
    assert dialect_in("Besides, it continues.") == []
