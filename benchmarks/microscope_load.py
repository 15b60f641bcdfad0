"""Ask a running microscope from many clients at once, and check that nothing fails and that its memory stays flat.

    thresher microscope runs/demo --port 8765 --open false &
    python benchmarks/microscope_load.py --port 8765 --pid $! --seconds 60

Each client takes random pages, lists, searches and activations, one after another. A request to the model that finds
the queue full (503) counts as refused, everything else that is not 200 as failed. Memory is the resident set of the
process, measured after a quarter of the time and at the end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote

WORDS = ("open", "return", "raise", "import", "class", "file", "path", "error", "test", "self")
MOST_GROWTH = 1.1


def resident(pid: int) -> float:
    """Return a process's resident memory in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def client(port: int, saes: list[dict], until: float, seed: int, counts: Counter, lock: threading.Lock) -> None:
    """Ask until the time is over."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        sae = rng.choice(saes)
        name, number = quote(sae["name"]), rng.randrange(sae["n_latents"])
        kind, path, body = rng.choice(
            [
                ("page", f"/api/saes/{name}/latents/{number}", None),
                ("list", f"/api/saes/{name}/latents?offset={number // 2}", None),
                ("search", f"/api/search?q={rng.choice(WORDS)}+{rng.choice(WORDS)}", None),
                ("page files", "/", None),
                ("text", "/api/activations", {"text": " ".join(rng.choices(WORDS, k=8)), "saes": [sae["name"]]}),
            ]
        )
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except OSError as error:
            status = type(error).__name__
        finally:
            connection.close()
        outcome = "ok" if status == 200 else "refused" if status == 503 and body else f"failed ({status})"
        with lock:
            counts[kind, outcome] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="process of the microscope")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    connection = http.client.HTTPConnection("127.0.0.1", arguments.port, timeout=60)
    connection.request("GET", "/api/saes")
    saes = json.loads(connection.getresponse().read())["saes"]
    connection.close()
    counts: Counter = Counter()
    until, lock = time.monotonic() + arguments.seconds, threading.Lock()
    threads = [
        threading.Thread(target=client, args=(arguments.port, saes, until, seed, counts, lock))
        for seed in range(arguments.clients)
    ]
    for thread in threads:
        thread.start()
    time.sleep(arguments.seconds / 4)
    early = resident(arguments.pid)
    for thread in threads:
        thread.join()
    late = resident(arguments.pid)
    for (kind, outcome), n in sorted(counts.items()):
        print(f"{kind:12}{outcome:24}{n:>8,}")
    print(f"memory {early:,.0f} MiB after a quarter, {late:,.0f} MiB at the end")
    if any(outcome.startswith("failed") for _, outcome in counts):
        sys.exit("some requests failed")
    if late > early * MOST_GROWTH:
        sys.exit(f"memory grew by more than {100 * (MOST_GROWTH - 1):.0f}%")


if __name__ == "__main__":
    main()
