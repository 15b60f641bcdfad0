"""Measure how long the microscope takes for a latent's page, a list and a search, on a synthetic index of many latents.

    python benchmarks/microscope_latents.py --latents 1000000

The index has random contexts and tokens; a few latents have a word that no other has, and an embedding near that of
the query. Before any time is printed, the search must find these, and a latent's page must show what was written. Times
are those of requests to the server over loopback: the median and the largest of 20, and the CPU seconds of the process
per request, which show the cost also on a shared machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import torch
import uvicorn

from thresher.evaluate.features.files import CONTEXT_TYPE, NEIGHBOUR, TOKEN_EFFECT, nested, struct, write_index
from thresher.evaluate.features.token_text import TokenTexts
from thresher.evaluate.microscope.config import MicroscopeConfig
from thresher.evaluate.microscope.run import server_settings
from thresher.evaluate.microscope.search.encoder import SentenceEncoder, packaged_encoder
from thresher.evaluate.microscope.search.vectors import LatentVectors
from thresher.evaluate.microscope.server.application import application
from thresher.evaluate.microscope.server.security import Access
from thresher.evaluate.microscope.server.services import Services

NAME, VOCABULARY, CONTEXTS, WINDOW, EFFECTS, NEIGHBOURS = "synthetic", 20_000, 3, 16, 10, 8
PLANTED, RARE = 5, "xylophone"
PAGE_TARGET, SEARCH_TARGET = 0.1, 0.3
REQUESTS = 20


def rows_of(start: int, stop: int, n_latents: int) -> dict[str, pa.Array]:
    """Return the columns of some latents; words are skewed, as in language."""
    rng = np.random.default_rng(start)
    n = stop - start

    def tokens(*shape: int) -> np.ndarray:
        return np.minimum(rng.zipf(1.3, shape) - 1, VOCABULARY - 2).astype(np.int32)

    def contexts() -> pa.ListArray:
        m = n * CONTEXTS
        found = tokens(m, WINDOW)
        if start == 0:
            found[: PLANTED * CONTEXTS, 7] = VOCABULARY - 1
        zeros = np.zeros(m, dtype=np.int64)
        activations = np.where(rng.random((m, WINDOW)) < 0.1, rng.random((m, WINDOW)), 0).astype(np.float32)
        columns = {"activation": rng.random(m).astype(np.float32), "context": zeros, "offset": zeros, "document": zeros}
        columns |= {"position": zeros, "peak": np.full(m, 10), "tokens": found, "activations": activations}
        return nested(np.full(n, CONTEXTS), struct(CONTEXT_TYPE, columns))

    def effects() -> pa.ListArray:
        columns = {"token": tokens(n * EFFECTS), "effect": rng.random(n * EFFECTS).astype(np.float32)}
        return nested(np.full(n, EFFECTS), struct(TOKEN_EFFECT, columns))

    others = {"latent": rng.integers(0, n_latents, n * NEIGHBOURS), "score": rng.random(n * NEIGHBOURS)}
    density = 10 ** rng.uniform(-6, -1, n)
    return {
        "latent": pa.array(np.arange(start, stop)),
        "firings": pa.array((density * 1e6).astype(np.int64) + 1),
        "density": pa.array(density),
        "mean_activation": pa.array(rng.random(n)),
        "max_activation": pa.array(rng.random(n).astype(np.float32) + 1),
        "interestingness": pa.array(rng.random(n).astype(np.float32)),
        "histogram_end": pa.array(np.ones(n, dtype=np.float32)),
        "histogram": nested(np.full(n, 30), pa.array(rng.integers(0, 99, n * 30).astype(np.int32))),
        "top": contexts(),
        "sampled": contexts(),
        "promoted": effects(),
        "suppressed": effects(),
        "neighbours": nested(np.full(n, NEIGHBOURS), struct(NEIGHBOUR, others)),
    }


def write_evaluation(folder: Path, n_latents: int) -> None:
    """Write an evaluation with one feature index."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = {i: " " + "".join(rng.choice(letters, 3 + i % 7)) for i in range(VOCABULARY)}
    words[VOCABULARY - 1] = f" {RARE}"
    (folder / "features").mkdir(parents=True)
    metadata = {"name": NAME, "fingerprint": "synthetic", "hook_point": "blocks.0.resid_post", "n_rows": 10**6}
    path = folder / "features" / f"{NAME}.parquet"
    write_index(path, n_latents, lambda a, b: rows_of(a, b, n_latents), metadata, TokenTexts(words, {}), {})
    row = {"name": NAME, "hook_point": "blocks.0.resid_post", "architecture": "topk", "d_sae": n_latents}
    (folder / "metrics.json").write_text(json.dumps([row]))
    (folder / "config.toml").write_text('store = "none"\nsaes = "none"\noutput = "none"\n')


class Timed:
    """Requests to the server, each with its seconds and CPU seconds."""

    def __init__(self, port: int):
        self._port = port

    def ask(self, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            content = json.loads(answer.read())
            if answer.status != 200:
                sys.exit(f"{path}: {content}")
            return content
        finally:
            connection.close()

    def measure(self, paths: list[str]) -> dict[str, float]:
        self.ask(paths[0])
        seconds, cpu = [], []
        for path in paths:
            start, start_cpu = time.perf_counter(), time.process_time()
            self.ask(path)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        return {"median": float(np.median(seconds)), "largest": max(seconds), "cpu": float(np.median(cpu))}


def check(client: Timed, n_latents: int, has_vectors: bool) -> None:
    """Check that the planted latents are found, and that a page shows what was written."""
    found = client.ask(f"/api/search?q={RARE}&limit={PLANTED}")["results"]
    if {row["latent"] for row in found} != set(range(PLANTED)):
        sys.exit(f"the search for {RARE} found {[row['latent'] for row in found]}, expected 0 to {PLANTED - 1}")
    if has_vectors and any(row["places"]["meaning"] is None for row in found):
        sys.exit("the search by meaning missed a planted latent")
    first = (n_latents // 2) // 512 * 512
    expected = rows_of(first, min(first + 512, n_latents), n_latents)
    page = client.ask(f"/api/saes/{NAME}/latents/{first + 3}")
    if [entry["tokens"] for entry in page["top"]] != [entry["tokens"] for entry in expected["top"][3].as_py()]:
        sys.exit("the page of a latent does not show its contexts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write the index, to keep it for another run")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/microscope_latents.json"))
    arguments = parser.parse_args()
    n = arguments.latents
    folder = arguments.folder or Path(tempfile.mkdtemp())
    if not (folder / "metrics.json").exists():
        write_evaluation(folder, n)
        print(f"wrote an index of {n:,} latents", flush=True)
    services = Services.open(MicroscopeConfig(run=str(folder), model=False, encoder=False))
    start = time.process_time()
    services.preparation.run()
    print(f"prepared the words in {time.process_time() - start:.0f} CPU s", flush=True)
    encoder = packaged_encoder()
    if encoder is not None:
        embedding = SentenceEncoder(encoder)
        services.preparation.encoder = embedding
        vectors = torch.empty(n, embedding.size, dtype=torch.float16)
        generator = torch.Generator().manual_seed(0)
        for some in vectors.split(65536):
            some.copy_(torch.nn.functional.normalize(torch.randn(some.shape, generator=generator), dim=1))
        vectors[:PLANTED] = embedding.embed([RARE]).half()
        services.preparation.state.vectors[NAME] = LatentVectors(torch.arange(n), vectors)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_settings(application(services, Access.of("127.0.0.1", (), None))))
    thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
    thread.start()
    client = Timed(listening.getsockname()[1])
    check(client, n, encoder is not None)
    rng = np.random.default_rng(1)
    texts = services.tables.index(NAME).vocabulary
    common = [texts[i].strip() for i in range(REQUESTS)]
    rare = [texts[i].strip() for i in rng.integers(2000, VOCABULARY, REQUESTS)]
    pages = [f"/api/saes/{NAME}/latents/{i}" for i in rng.integers(0, n, REQUESTS)]
    lists = [f"/api/saes/{NAME}/latents?max_density=1e-3&promotes={quote(texts[i])}" for i in range(REQUESTS)]
    pairs = [f"/api/search?q={a}+{b}" for a, b in zip(common, common[1:] + common[:1], strict=True)]
    requests = {
        "page of a latent": (pages, PAGE_TARGET),
        "list by density and promoted token": (lists, None),
        "search, rare word": ([f"/api/search?q={word}" for word in rare], SEARCH_TARGET),
        "search, two common words": (pairs, SEARCH_TARGET),
    }
    measured = {}
    searched = "words and meaning" if encoder else "words"
    print(f"{'ms, ' + searched:36}{'median':>9}{'largest':>9}{'CPU':>9}")
    for name, (paths, target) in requests.items():
        found = client.measure(paths)
        verdict = "" if target is None else f"  target {1000 * target:.0f}"
        print(f"{name:36}{''.join(f'{1000 * found[key]:9.1f}' for key in ('median', 'largest', 'cpu'))}{verdict}")
        measured[name] = found
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"latents": n, "requests": measured}, indent=1) + "\n")
    server.should_exit = True
    thread.join(10)
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
