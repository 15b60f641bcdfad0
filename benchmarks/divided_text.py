"""Time the text of a harvest: two ranks that divide it, and two that each tokenize all of it.

    .venv/bin/python benchmarks/divided_text.py [--text FOLDER] [--tokens 4000000] [--repeat 3]

Each rank is a process with one core that reads, tokenizes and packs the same contexts, without a model. Both ways run
alternately, after a check that all ranks get the same contexts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

N = 2


def read(rank: int, port: int, divided: bool, text: str, tokens: int) -> tuple[str, int, float, float]:
    """Read the contexts as one rank; return a checksum, the tokens, and the seconds and CPU seconds that this took."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(N), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(N)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false"}
    from thresher.harvest.config import HarvestConfig
    from thresher.harvest.ranks.divided_text import DividedText, batches_ahead
    from thresher.harvest.ranks.multi_process import TextChecksum
    from thresher.harvest.ranks.rank_group import join_ranks
    from thresher.harvest.tokens.tokens import find_text_rules, read_contexts
    from thresher.shared.model.language_model import load_tokenizer

    config = HarvestConfig(
        model="stdlib-lm", hook_points=["blocks.2.resid_post"], dataset=text, store="unused", tokens=tokens
    )
    tokenizer = load_tokenizer(config.model, None, trust_remote_code=False)
    rules = find_text_rules(config, tokenizer)
    with join_ranks() as (ranks, _):
        ranks.meet()
        started, cpu = time.perf_counter(), time.process_time()
        text_read = TextChecksum()
        divide = DividedText(ranks, batches_ahead(1 << 19, N)) if divided else None
        for _ in text_read.follow(read_contexts(config, tokenizer, 2, rules, tokenize_batches=divide)):
            pass
        seconds = time.perf_counter() - started, time.process_time() - cpu
        ranks.meet()
    return text_read.summary, text_read.n_contexts * config.context_size, *seconds


def run(divided: bool, options: argparse.Namespace) -> tuple[str, int, float, float]:
    """Return what ranks read, the tokens, the seconds of the slowest, and the CPU seconds of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(N, multiprocessing.get_context("spawn")) as processes:
        arguments = port, divided, options.text, options.tokens
        found = [future.result() for future in [processes.submit(read, rank, *arguments) for rank in range(N)]]
    summaries = {summary for summary, *_ in found}
    assert len(summaries) == 1, summaries
    return summaries.pop(), found[0][1], max(seconds for *_, seconds, _ in found), sum(cpu for *_, cpu in found)


def main() -> None:
    """Print seconds and tokens per second of both ways, and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", default="python-stdlib", help="what `dataset` would be")
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    found = {divided: [run(divided, options)] for divided in (False, True)}
    assert found[False][0][0] == found[True][0][0], found
    for _ in range(options.repeat - 1):
        for divided in (False, True):
            found[divided].append(run(divided, options))
    print(f"{N} ranks, {found[True][0][0]}\n")
    print("| | seconds | CPU seconds of both | tokens per second |\n|---|---|---|---|")
    seconds = {}
    for divided in (False, True):
        _, tokens, *_ = found[divided][0]
        seconds[divided] = statistics.median(run[2] for run in found[divided])
        cpu = statistics.median(run[3] for run in found[divided])
        name = "divided" if divided else "each tokenizes all"
        print(f"| {name} | {seconds[divided]:.2f} | {cpu:.2f} | {tokens / seconds[divided]:,.0f} |")
    print(f"\ndivided: {seconds[False] / seconds[True]:.2f} times as fast")


if __name__ == "__main__":
    main()
