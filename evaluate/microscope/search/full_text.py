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
COMMON, COMMON_SHARE = 20_000, 10
"""A word of more latents than this, or of a tenth of all, is left out if there are rarer ones. If there are none, the
first so many latents are ranked."""


def write_words(path: Path, texts: Iterable[LatentText], key: str) -> None:
    """Write the table of an SAE's latents atomically; `key` says what it was made from."""
    with replacing(path) as unfinished:
        unfinished.unlink(missing_ok=True)
        with closing(sqlite3.connect(unfinished)) as db:
            db.executescript(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                "CREATE TABLE made (key TEXT, n INTEGER);"
                "CREATE VIRTUAL TABLE words USING fts5(explanation, tokens, contexts, content='', "
                'tokenize="porter unicode61 remove_diacritics 2");'
            )
            db.executemany(
                "INSERT INTO words (rowid, explanation, tokens, contexts) VALUES (?, ?, ?, ?)",
                ((text.latent, text.explanation, text.tokens, "\n".join(text.contexts)) for text in texts),
            )
            (n,) = db.execute("SELECT count(*) FROM words_docsize").fetchone()
            db.execute("INSERT INTO made VALUES (?, ?)", [key, n])
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

    Text in quotation marks is a phrase. Words that many latents have count only if there are no rarer ones.
    """
    phrases = [" ".join(_WORD.findall(phrase)) for phrase in _PHRASE.findall(query)]
    words = _WORD.findall(_PHRASE.sub(" ", query))
    if not any(phrases) and not words:
        return []
    with closing(_open(path)) as db:
        n_latents = db.execute("SELECT n FROM made").fetchone()[0]
        common = min(COMMON, max(n_latents // COMMON_SHARE, 20))
        counts = {word: _count(db, word, common + 1) for word in dict.fromkeys(words)}
        known = [word for word, count in counts.items() if count]
        rare = [word for word in known if counts[word] <= common]
        wanted = [*filter(None, phrases), *(rare or known)]
        if not wanted:
            return []
        expression = " OR ".join(f'"{some}"' for some in wanted)
        scored = f"SELECT rowid AS latent, -bm25(words, {WEIGHTS}) AS score FROM words WHERE words MATCH ? LIMIT ?"
        sql = f"SELECT latent, score FROM ({scored}) ORDER BY score DESC, latent LIMIT ?"
        return db.execute(sql, [expression, -1 if rare else COMMON, n]).fetchall()


def _count(db: sqlite3.Connection, word: str, most: int) -> int:
    """Return in how many latents a word occurs, up to `most`."""
    sql = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"
    return int(db.execute(sql, [f'"{word}"', most]).fetchone()[0])


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
