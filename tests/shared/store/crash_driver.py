"""Kill writers of a store at chosen moments, resume each, and compare: run as a script by test_crash.py.

One process imports torch once and forks a child for every writer; it prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.store.local import durable

N, CONTEXT, HOOK_POINTS = 41, 8, {"a": 12, "b": 5}
N_BEFORE, N_KEPT = 29, 25
"""Contexts of a store that is extended, and those of them that may be kept: all but its last two shards."""


def rows_of(name: str) -> torch.Tensor:
    """Return all rows of a hook point."""
    generator = torch.Generator().manual_seed(HOOK_POINTS[name])
    return torch.randn(N, CONTEXT, HOOK_POINTS[name], generator=generator).bfloat16()


def write(path: Path, codec: str, pause: float = 0.0, n: int = N, keep: int | None = None) -> None:
    """Write the store, or resume it, from the first context that is not committed; extend it if some are to be kept."""
    rows = {name: rows_of(name)[:n] for name in HOOK_POINTS}
    tokens = torch.arange(N * CONTEXT).reshape(N, CONTEXT)[:n]
    settings = {"chunk_bytes": 200, "shard_bytes": 2000, "threads": 2, "mask_token_ids": [5], "keep_contexts": keep}
    with ActivationStoreWriter(path, HOOK_POINTS, CONTEXT, codec=codec, n_contexts=n, **settings) as writer:
        for i in range(writer.n_committed_contexts, n, 3):
            part = {name: values[i : i + 3] for name, values in rows.items()}
            documents = torch.arange(i, min(i + 3, n))[:, None].expand(-1, CONTEXT)
            writer.append(part, tokens[i : i + 3], held_out=documents[:, 0] % 4 == 0, documents=documents)
            time.sleep(pause)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in sorted(path.rglob("*"))}


def in_child(action) -> int:
    """Run an action in a forked child; return its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(step: int, path: Path, codec: str, keep: int | None) -> None:
    """Write, and be killed just before the given step that reaches the disk."""
    steps = 0

    def count(_: str) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)

    durable.observer = count
    write(path, codec, keep=keep)
    os._exit(9)


def killed_after(delay: float, path: Path, codec: str) -> None:
    """Start a writer and kill it after a while."""
    child = os.fork()
    if not child:
        write(path, codec, pause=0.004)
        os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def check(path: Path, expected: dict[str, bytes], codec: str, what: str, keep: int | None) -> str | None:
    """Return what is wrong after a kill, before and after resuming."""
    problem: list[str] = []

    def look() -> None:
        store = ActivationStore.open(path)
        store.moments("a")
        faults = [fault for fault in store.verify() if "not finished" not in fault and ".partial" not in fault]
        stored = store.read("a", 0, store.n_rows).reshape(-1, CONTEXT, HOOK_POINTS["a"])
        is_whole = not keep or store.n_contexts >= keep - keep % store.manifest.header.contexts_per_shard
        os._exit(0 if not faults and is_whole and torch.equal(stored, rows_of("a")[: store.n_contexts]) else 7)

    if any(path.rglob("c.0.0")) and (path / "manifest.jsonl").read_bytes().count(b"\n") and in_child(look):
        problem.append("what was committed is not readable")
    if in_child(lambda: write(path, codec, keep=keep)):
        problem.append("going on failed")
    elif tree(path) != expected:
        problem.append(f"differs in {sorted(set(tree(path).items()) ^ set(expected.items()))[0][0]}")
    return f"{what}: {', '.join(problem)}" if problem else None


def main(folder: Path, mode: str, count: int, seed: int) -> None:
    durable.flush = lambda handle: None
    torch.set_num_threads(1)
    codec = "lz4"
    whole = folder / "whole"
    in_child(lambda: write(whole, codec))
    expected = tree(whole)
    problems, kills, rng = [], 0, random.Random(seed)
    keep = N_KEPT if mode.startswith("extend") else None
    steps = range(1, 10**6) if mode.endswith("every-step") else sorted(rng.sample(range(1, 70 if keep else 200), count))
    moments = [rng.uniform(0, 0.1) for _ in range(count)] if mode == "random-time" else list(steps)[:count]
    for moment in moments:
        path = folder / "killed"
        shutil.rmtree(path, ignore_errors=True)
        if keep is not None:
            in_child(lambda path=path: write(path, codec, n=N_BEFORE))
        if mode == "random-time":
            killed_after(moment, path, codec)
        elif in_child(lambda moment=moment, path=path: die_at(int(moment), path, codec, keep)) == 9:
            break
        kills += 1
        print(f"kill {kills} at {moment}", file=sys.stderr, flush=True)
        found = check(path, expected, codec, f"kill at {moment}", keep)
        problems += [found] if found else []
    print(json.dumps({"kills": kills, "problems": problems, "files": len(expected)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
