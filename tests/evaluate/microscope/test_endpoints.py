"""The endpoints that read, against the files of the evaluation."""

from __future__ import annotations

import json
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest

from thresher.evaluate.features.files import FeatureIndex
from thresher.shared.sae import Sae


@pytest.fixture(scope="module")
def client(scope):
    return scope.client


@pytest.fixture(scope="module")
def indexes(run_folder):
    found = [FeatureIndex.open(path) for path in (run_folder / "evaluation" / "features").glob("*.parquet")]
    return {index.name: index for index in found}


def test_saes_are_those_of_the_evaluation_with_their_metrics(client, run_folder):
    rows = json.loads((run_folder / "evaluation" / "metrics.json").read_text())
    found = client.json("GET", "/api/saes")["saes"]
    assert [sae["name"] for sae in found] == [row["name"] for row in rows]
    for sae, row in zip(found, rows, strict=True):
        assert sae["n_latents"] == row["d_sae"]
        assert sae["metrics"]["explained_variance"] == row["explained_variance"]
        assert sae["has_weights"]
        assert client.json("GET", f"/api/saes/{quote(sae['name'])}")["metrics"] == sae["metrics"]


def test_a_latent_has_what_its_index_and_its_decoder_say(client, indexes, sweep, run_folder):
    index = indexes["topk_k2"]
    lines = [line for batch in index.batches() for line in batch]
    line = max(lines, key=lambda line: line["firings"])
    found = client.json("GET", f"/api/saes/topk_k2/latents/{line['latent']}")
    assert found["firings"] == line["firings"]
    assert found["histogram"] == line["histogram"]
    for shown, entry in zip(found["top"], line["top"], strict=True):
        assert shown["tokens"] == entry["tokens"]
        assert shown["texts"] == [index.texts.alone(token) for token in entry["tokens"]]
        np.testing.assert_allclose(shown["activations"], entry["activations"], rtol=1e-3)
    assert [effect["token"] for effect in found["promoted"]] == [effect["token"] for effect in line["promoted"]]
    assert [other["latent"] for other in found["neighbours"]] == [other["latent"] for other in line["neighbours"]]
    directions = Sae.load(sweep / "topk_k2").W_dec.detach().double().numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosine = directions @ directions[line["latent"]]
    cosine[line["latent"]] = -2
    nearest = np.argsort(-cosine)[: len(found["decoder_neighbours"])]
    assert [other["latent"] for other in found["decoder_neighbours"]] == nearest.tolist()
    np.testing.assert_allclose([other["cosine"] for other in found["decoder_neighbours"]], cosine[nearest], atol=1e-5)


def test_the_same_latent_of_another_sae_is_the_one_of_largest_cosine(client, sweep):
    a, b = (Sae.load(sweep / name).W_dec.detach().double().numpy() for name in ("topk_k2", "topk_k10"))
    expected = (b @ a[5]) / np.linalg.norm(b, axis=1) / np.linalg.norm(a[5])
    matches = client.json("GET", "/api/saes/topk_k2/latents/5/matches")["matches"]
    assert [match["sae"] for match in matches] == ["topk_k10"], "an SAE at another hook point is not comparable"
    best = np.argsort(-expected)[:3]
    assert [row["latent"] for row in matches[0]["latents"]] == best.tolist()
    np.testing.assert_allclose([row["cosine"] for row in matches[0]["latents"]], expected[best], atol=1e-4)


@pytest.mark.parametrize("sort", ["interestingness", "density", "max_activation", "latent"])
def test_latents_are_listed_in_order(client, indexes, sort):
    lines = [line for batch in indexes["topk_k10"].batches() for line in batch if line["firings"]]
    expected = sorted(lines, key=lambda line: (-line[sort], line["latent"]))
    first = client.json("GET", f"/api/saes/topk_k10/latents?sort={sort}&limit=5")
    rest = client.json("GET", f"/api/saes/topk_k10/latents?sort={sort}&limit=500&offset=5")
    assert first["total"] == len(lines)
    listed = [row["latent"] for row in first["latents"] + rest["latents"]]
    assert listed == [line["latent"] for line in expected]


def test_latents_are_filtered_by_density_and_by_tokens(client, indexes):
    index = indexes["topk_k10"]
    lines = [line for batch in index.batches() for line in batch if line["firings"]]
    bound = float(np.median([line["density"] for line in lines]))
    token = lines[0]["promoted"][0]["token"]
    expected = {
        line["latent"]
        for line in lines
        if line["density"] <= bound and token in [effect["token"] for effect in line["promoted"]]
    }
    where = f"max_density={bound!r}&promotes={quote(index.texts.alone(token))}&limit=500"
    assert {row["latent"] for row in client.json("GET", f"/api/saes/topk_k10/latents?{where}")["latents"]} == expected
    folded = quote(index.texts.alone(token).strip().upper())
    again = client.json("GET", f"/api/saes/topk_k10/latents?max_density={bound!r}&promotes={folded}&limit=500")
    assert {row["latent"] for row in again["latents"]} == expected
    peaks = {line["latent"] for line in lines if token in [c["tokens"][c["peak"]] for c in line["top"]]}
    where = f"peaks={quote(index.texts.alone(token))}&limit=500"
    assert {row["latent"] for row in client.json("GET", f"/api/saes/topk_k10/latents?{where}")["latents"]} == peaks
    assert client.json("GET", "/api/saes/topk_k10/latents?promotes=nothing-like-it")["total"] == 0


def test_words_find_the_latents_whose_contexts_have_them(client, indexes):
    index = indexes["topk_k2"]
    lines = [line for batch in index.batches() for line in batch if line["firings"]]
    texts = {}
    for line in lines:
        contexts = [index.texts.alone(token) for entry in line["top"][:3] for token in entry["tokens"]]
        peaks = [index.texts.alone(entry["tokens"][entry["peak"]]) for entry in line["top"]]
        promoted = [index.texts.alone(effect["token"]) for effect in line["promoted"]]
        texts[line["latent"]] = {text.strip() for text in contexts + peaks + promoted}
    expected = {latent for latent, some in texts.items() if "word20" in some}
    assert 0 < len(expected) < len(lines)
    found = client.json("GET", "/api/search?q=Word20&sae=topk_k2&limit=200")
    assert {row["latent"] for row in found["results"]} == expected
    assert not found["complete"]
    assert "no sentence encoder" in found["note"]
    assert client.json("GET", "/api/search?q=%22%29+OR+NEAR%28+%2A+-")["results"] == []


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/api/saes/nobody", 404, "no SAE 'nobody'"),
        ("/api/saes/nobody/latents/1", 404, "no SAE 'nobody'"),
        ("/api/saes/topk_k2/latents/9999", 422, "expected a latent from 0 to 31"),
        ("/api/saes/topk_k2/latents/9999/matches", 422, "expected a latent from 0 to 31"),
        ("/api/saes/topk_k2/latents?sort=name", 422, "sort"),
        ("/api/saes/topk_k2/latents?limit=0", 422, "limit"),
        ("/api/saes/topk_k2/latents?unknown=1", 422, "unknown"),
        ("/api/search", 422, "q"),
        ("/api/nothing", 404, "nothing at this address"),
        ("/../evaluation/metrics.json", 404, "nothing at this address"),
        ("/%2e%2e/%2e%2e/etc/passwd", 404, "nothing at this address"),
        ("/api/saes/..%2f..%2fmetrics.json", 404, "no SAE"),
    ],
)
def test_a_bad_request_is_answered_in_one_line(client, path, status, reason):
    error = client.json("GET", path, status=status)["error"]
    assert reason in error
    assert "\n" not in error


def test_the_description_names_every_endpoint(client):
    found = client.json("GET", "/api/openapi.json")
    assert {"/api/saes", "/api/saes/{name}/latents/{latent}", "/api/search", "/api/activations", "/api/steer"} <= found[
        "paths"
    ].keys()
    assert found["paths"].keys() >= {"/api/notes"}
    assert set(found["paths"]["/api/notes"]) == {"get", "put"}
    _, headers, page = client.send("GET", "/api")
    assert headers["content-type"].startswith("text/html")
    for path in found["paths"]:
        assert path in page.decode()


def test_notes_are_kept_exported_and_removed(client, run_folder, tmp_path):
    note = {"sae": "topk_k2", "latent": 3, "label": "<b>opens</b> files", "comment": "see *io*", "starred": True}
    written = client.json("PUT", "/api/notes", note | {"lists": ["to check", " to check", ""]})["note"]
    assert written["lists"] == ["to check"]
    other = client.json("PUT", "/api/notes", {"sae": "topk_k10", "latent": 1, "label": "raise"})["note"]
    notes = client.json("GET", "/api/notes")["notes"]
    assert [(one["sae"], one["latent"], one["label"]) for one in notes] == [
        ("topk_k10", 1, "raise"),
        ("topk_k2", 3, "<b>opens</b> files"),
    ]
    assert client.json("GET", "/api/notes?sae=topk_k10")["notes"] == [other]
    assert client.json("GET", "/api/saes/topk_k2/latents/3")["note"] == written
    starred = client.json("GET", "/api/saes/topk_k2/latents?starred=true&alive=false")
    assert [row["latent"] for row in starred["latents"]] == [3]
    assert client.json("GET", "/api/search?q=opens")["notes"][0]["latent"] == 3
    _, headers, content = client.send("GET", "/api/notes?format=parquet")
    assert "attachment" in headers["content-disposition"]
    (tmp_path / "notes.parquet").write_bytes(content)
    table = pq.read_table(tmp_path / "notes.parquet").to_pylist()
    assert [(row["sae"], row["latent"], row["lists"]) for row in table] == [
        ("topk_k10", 1, []),
        ("topk_k2", 3, ["to check"]),
    ]
    for sae, latent in (("topk_k2", 3), ("topk_k10", 1)):
        assert client.json("PUT", "/api/notes", {"sae": sae, "latent": latent})["note"] is None
    assert client.json("GET", "/api/notes")["notes"] == []
    assert "at most 300" in client.json("PUT", "/api/notes", note | {"label": "x" * 301}, status=422)["error"]
    assert "no SAE" in client.json("PUT", "/api/notes", note | {"sae": "nobody"}, status=404)["error"]


def test_words_match_other_forms_and_common_ones_give_way_to_rare_ones(tmp_path):
    from thresher.evaluate.microscope.search.full_text import match_words, write_words
    from thresher.evaluate.microscope.search.latent_texts import LatentText

    contexts = {latent: ["of the"] for latent in range(300)} | {7: ["of files"], 9: ["a file of the"], 11: ["raise"]}
    made = [LatentText(latent, "", "", some, []) for latent, some in contexts.items()]
    write_words(tmp_path / "words.sqlite", [*made, LatentText(300, "opens files", "", [], [])], "key")
    found = [latent for latent, _ in match_words(tmp_path / "words.sqlite", "file of the", 50)]
    assert found[0] == 300, "a word of the explanation counts more than one of a context"
    assert set(found) == {7, 9, 300}, "`of` and `the` are everywhere"
    assert [latent for latent, _ in match_words(tmp_path / "words.sqlite", '"of files"', 50)] == [7]
    assert len(match_words(tmp_path / "words.sqlite", "the", 50)) == 50
