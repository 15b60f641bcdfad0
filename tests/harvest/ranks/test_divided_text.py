"""Ranks that divide a text tokenize each document once, and all of them get what one process gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Barrier

import numpy as np
import pytest
from torch.distributed import HashStore

from thresher.harvest.documents.documents import Document
from thresher.harvest.ranks.divided_text import VALUE_BYTES, DividedText, batches_ahead, documents_checksum
from thresher.harvest.ranks.rank_group import RankGroup
from thresher.harvest.tokens.encode import Tokenized, TokenizedBatch
from thresher.shared.core.errors import DataError, RankError

N_BATCHES = 17
SECONDS = 60


def batches_of(text: str = "") -> list[list[Document]]:
    return [[Document(f"{text}{n}.{m}", "x" * (50 * n + m)) for m in range(n % 4)] for n in range(N_BATCHES)]


def tokenize(batch: list[Document]) -> TokenizedBatch:
    """Return lengths as tokens; a document of an even length has roles, one of 51 characters is refused."""
    found = []
    for document in batch:
        n = len(document.text)
        tokens = np.arange(n, dtype=np.int32) * 70_000
        roles = None if n % 2 else (np.arange(n) % 5).astype(np.int8)
        found.append(Tokenized((1 << 64) - 1 - n, tokens, roles, "no" if n == 51 else ""))
    return TokenizedBatch([document.name for document in batch], found)


def plain(batch: TokenizedBatch) -> list[object]:
    return [
        (name, one.hash, one.tokens.tolist(), one.tokens.dtype, roles_of(one), one.refusal)
        for name, one in zip(batch.names, batch.tokenized, strict=True)
    ]


def roles_of(document: Tokenized) -> list[int] | None:
    return None if document.roles is None else document.roles.tolist()


def run(n: int, each: Callable[[RankGroup], object]) -> tuple[list[object], HashStore]:
    """Call a function as every rank, in threads; return what each returned or raised, and what connects them."""
    store = HashStore()
    with ThreadPoolExecutor(n) as threads:
        futures = [threads.submit(each, RankGroup(rank, n, store, None)) for rank in range(n)]
        return [future.exception(SECONDS) or future.result(SECONDS) for future in futures], store


@pytest.mark.parametrize("n", [2, 3])
def test_every_rank_gets_all_tokens_and_tokenizes_its_own_batches(n: int) -> None:
    tokenized: list[list[str]] = [[] for _ in range(n)]

    def each(ranks: RankGroup) -> list[object]:
        def counted(batch: list[Document]) -> TokenizedBatch:
            tokenized[ranks.rank] += [document.name for document in batch]
            return tokenize(batch)

        return [plain(batch) for batch in DividedText(ranks, ahead=2)(counted, iter(batches_of()))]

    found, store = run(n, each)
    batches = batches_of()
    assert found == [[plain(tokenize(batch)) for batch in batches]] * n
    for rank in range(n):
        assert tokenized[rank] == [document.name for batch in batches[rank::n] for document in batch]
    assert store.num_keys() == 0  # all messages were deleted


def test_a_batch_may_be_larger_than_a_value_of_the_key_value_store() -> None:
    n_tokens = VALUE_BYTES // 2  # four bytes each: two pieces and a bit

    def long(batch: list[Document]) -> TokenizedBatch:
        return TokenizedBatch([batch[0].name], [Tokenized(1, np.arange(n_tokens, dtype=np.int32))])

    def each(ranks: RankGroup) -> list[np.ndarray]:
        return [batch.tokenized[0].tokens for batch in DividedText(ranks, ahead=1)(long, iter([[Document("a", "b")]]))]

    (first, second), store = run(2, each)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert np.array_equal(first[0], second[0])
    assert len(second[0]) == n_tokens
    assert store.num_keys() == 0


def test_a_rank_that_reads_other_text_is_named() -> None:
    def each(ranks: RankGroup) -> list[TokenizedBatch]:
        return list(DividedText(ranks, ahead=2)(tokenize, iter(batches_of("other " if ranks.rank else ""))))

    (first, second), _ = run(2, each)
    assert isinstance(first, DataError)
    assert isinstance(second, DataError)
    assert str(first) == (
        "rank 1 read other text than rank 0 (documents from 'other 1.0' on); give all ranks the same text"
    )
    assert str(second).startswith("rank 0 read other text than rank 1 (documents from '2.0' on); ")


def test_a_rank_that_fails_ends_the_others() -> None:
    def each(ranks: RankGroup) -> list[TokenizedBatch]:
        def failing(batch: list[Document]) -> TokenizedBatch:
            if batch and batch[0].name == "5.0":
                raise DataError("document '5.0' is wrong")
            return tokenize(batch)

        with ranks.reporting_failures():
            return list(DividedText(ranks, ahead=2)(failing, iter(batches_of())))

    (first, second), _ = run(2, each)
    assert isinstance(second, DataError)
    assert str(second) == "document '5.0' is wrong"
    assert isinstance(first, RankError)
    assert str(first).startswith("rank 0 stops: rank 1 failed: document '5.0' is wrong; ")


def test_a_rank_reads_no_further_ahead_than_it_may() -> None:
    met = Barrier(2)
    furthest = [0, 0]

    def each(ranks: RankGroup) -> int:
        def read() -> Iterator[list[Document]]:
            for number, batch in enumerate(batches_of()):
                furthest[ranks.rank] = number
                yield batch

        tokens = DividedText(ranks, ahead=4)(tokenize, read())
        for _ in islice(tokens, 3):
            pass
        met.wait(SECONDS)
        tokens.close()  # pyright: ignore[reportAttributeAccessIssue]
        return furthest[ranks.rank]

    found, _ = run(2, each)
    assert all(isinstance(n, int) and 2 <= n <= 3 + 4 + 1 for n in found)


def test_checksums_tell_documents_apart() -> None:
    documents = [
        Document("a", "b"),
        Document("a", "c"),
        Document("d", "b"),
        Document("a", "", messages=[{"role": "user", "content": "b"}]),
        Document("a", "", messages=[{"role": "user", "content": "c"}]),
        Document("a", "", input_ids=[1, 2]),
        Document("a", "", input_ids=[1, 3]),
        Document("a", "\ud800"),  # half of a surrogate pair
    ]
    assert len({documents_checksum([document]) for document in documents}) == len(documents)
    assert documents_checksum(documents) != documents_checksum(documents[::-1])


def test_ranks_may_be_two_shards_each_apart() -> None:
    assert batches_ahead(1_000, 2) == 2
    assert batches_ahead(1_000_000, 8) == 8 + 256
