"""Full-text search of one SAE's latents: an SQLite database with an FTS5 table, ranked by BM25."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from ....shared.core.disk import replacing
from .latent_texts import LatentText

_WORD = re.compile(r"\w+")
_PHRASE = re.compile(r'"([^"]+)"')
WEIGHTS = "4.0, 2.0, 1.0"
"""Of a match in the explanation, in a token and in a context."""
COMMON = 20_000
"""A word of more latents than this is left out if there are rarer ones, and ranks only so many of them otherwise."""


def write_words(path: Path, texts: Iterable[LatentText], key: str) -> None:
    """Write the table of an SAE's latents atomically; `key` says what it was made from."""
    with replacing(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        with closing(sqlite3.connect(unfinished)) as db:
            db.executescript(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                "CREATE TABLE made (key TEXT);"
                "CREATE VIRTUAL TABLE words USING fts5(explanation, tokens, contexts, content='', "
                'tokenize="unicode61 remove_diacritics 2");'
                "CREATE VIRTUAL TABLE counts USING fts5vocab(words, row);"
            )
            db.execute("INSERT INTO made VALUES (?)", [key])
            db.executemany(
                "INSERT INTO words (rowid, explanation, tokens, contexts) VALUES (?, ?, ?, ?)",
                ((text.latent, text.explanation, text.tokens, "\n".join(text.contexts)) for text in texts),
            )
            db.commit()


def words_key(path: Path) -> str | None:
    """Return what a table was made from; None if there is none."""
    if not path.is_file():
        return None
    try:
        with closing(_open(path)) as db:
            return db.execute("SELECT key FROM made").fetchone()[0]
    except (sqlite3.Error, TypeError):
        return None


def match_words(path: Path, query: str, n: int) -> list[tuple[int, float]]:
    """Return the latents that match some words of a query best, with BM25 scores: larger is better.

    Text in quotation marks is a phrase. A word matches its own form only.
    """
    phrases = [" ".join(_WORD.findall(phrase)) for phrase in _PHRASE.findall(query)]
    words = _WORD.findall(_PHRASE.sub(" ", query))
    if not any(phrases) and not words:
        return []
    with closing(_open(path)) as db:
        known = {word: _count(db, word) for word in dict.fromkeys(words)}
        rare = [word for word, count in known.items() if 0 < count <= COMMON]
        wanted = [*filter(None, phrases), *(rare or [word for word, count in known.items() if count])]
        if not wanted:
            return []
        expression = " OR ".join(f'"{some}"' for some in wanted)
        sql = f"SELECT rowid, -bm25(words, {WEIGHTS}) AS score FROM words WHERE words MATCH ? LIMIT ?"
        found = [(row, score) for row, score in db.execute(sql, [expression, -1 if rare else COMMON])]
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:n]


def _count(db: sqlite3.Connection, word: str) -> int:
    """Return in how many latents a word occurs, as the table's tokenizer folds it."""
    folded = word.lower()
    found = db.execute("SELECT doc FROM counts WHERE term = ?", [folded]).fetchone()
    if found is not None:
        return int(found[0])
    other = db.execute("SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT 1)", [f'"{word}"'])
    return int(other.fetchone()[0])


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
