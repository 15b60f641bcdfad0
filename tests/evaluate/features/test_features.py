"""The feature index against a plain loop over every row, latent and context."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thresher.evaluate.features import build as build_module
from thresher.evaluate.features.build import FeatureSettings, build_feature_index
from thresher.evaluate.features.contexts import sampling_priority
from thresher.evaluate.features.files import FeatureIndex
from thresher.evaluate.features.logits import logit_effects
from thresher.evaluate.features.progress import restore_progress, save_progress
from thresher.evaluate.features.rows import interestingness
from thresher.evaluate.features.sparse import ActiveLatents, active_latents
from thresher.evaluate.features.statistics import N_BINS, ActivationStatistics, CoFiring
from thresher.evaluate.metrics.encoding import FEWEST_ROWS
from thresher.shared.core.errors import ConfigError, DataError, MissingFileError, StoreError
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStore, ActivationStoreWriter

CONTEXT, N_CONTEXTS, D_IN, D_SAE, BOS = 12, 43, 8, 24, 0
SETTINGS = FeatureSettings(n_top=3, n_sampled=4, window=5, n_neighbours=3, n_tokens=4)


@dataclass
class Named:
    name: str
    sae: Sae
    hook_point: str = "blocks.0.resid_post"
    target: str = "blocks.0.resid_post"


def make_sae(architecture="topk", seed=0, k=4):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(D_IN, D_SAE, generator=generator),
        "b_enc": torch.randn(D_SAE, generator=generator) * 0.3 - (1.0 if architecture == "standard" else 0.0),
        "W_dec": torch.randn(D_SAE, D_IN, generator=generator),
        "b_dec": torch.zeros(D_IN),
    }
    tensors["b_enc"][5] = -1e4
    return Sae(architecture, tensors, config={"k": k})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "store"
    generator = np.random.default_rng(3)
    x = generator.normal(size=(N_CONTEXTS, CONTEXT, D_IN)).astype(np.float32)
    x[20] *= 50
    tokens = generator.integers(1, 50, (N_CONTEXTS, CONTEXT)).astype(np.int32)
    tokens[:, 0] = BOS
    documents = np.repeat(np.arange(N_CONTEXTS)[:, None] // 2, CONTEXT, axis=1)
    positions = np.broadcast_to(np.arange(CONTEXT), documents.shape).astype(np.int32)
    hooks = {"blocks.0.resid_post": D_IN}
    with ActivationStoreWriter(path, hooks, CONTEXT, dtype="float32", mask_token_ids=[BOS]) as writer:
        info = {int(number): (int(number) + 1, f"file_{number}.py") for number in np.unique(documents)}
        writer.append({"blocks.0.resid_post": x}, tokens, documents=documents, positions=positions, document_info=info)
    return ActivationStore.open(path)


def dense_latents(store, sae):
    latents = sae.encode(store.read("blocks.0.resid_post", 0, store.n_rows)).numpy().copy()
    latents[~store.row_mask(0, store.n_rows)] = 0
    return latents.reshape(N_CONTEXTS, CONTEXT, D_SAE)


def lines(index):
    return [line for batch in index.batches(7) for line in batch]


@pytest.mark.parametrize("architecture", ["topk", "standard"])
@pytest.mark.parametrize("block_rows", [1, 60, 8192])
def test_index_matches_a_plain_loop(store, tmp_path, monkeypatch, architecture, block_rows):
    monkeypatch.setattr("thresher.evaluate.features.build.BLOCK_ROWS", block_rows)
    sae = make_sae(architecture)
    index = build_feature_index(store, [Named("a/b", sae)], tmp_path, settings=SETTINGS)["a/b"]
    latents = dense_latents(store, sae)
    tokens = store.tokens(0, store.n_rows).numpy().reshape(N_CONTEXTS, CONTEXT)
    found = lines(index)
    assert [line["latent"] for line in found] == list(range(D_SAE))
    assert sum(line["firings"] for line in found) == (latents > 0).sum()
    for line in found:
        acts = latents[:, :, line["latent"]]
        fired = acts[acts > 0]
        assert line["firings"] == len(fired)
        assert line["density"] == pytest.approx(len(fired) / (N_CONTEXTS * (CONTEXT - 1)))
        assert line["max_activation"] == pytest.approx(acts.max(), rel=1e-5)
        assert line["mean_activation"] == pytest.approx(fired.mean() if len(fired) else 0, rel=1e-5)
        if len(fired):
            edges = np.linspace(0, line["histogram_end"], N_BINS + 1)
            assert line["histogram"] == np.histogram(fired, edges)[0].tolist()
            assert line["histogram_end"] / 2 <= line["max_activation"] < line["histogram_end"]
        peaks = acts.max(axis=1)
        best = [int(c) for c in np.argsort(-peaks, kind="stable")[:3] if peaks[c] > 0]
        assert [entry["context"] for entry in line["top"]] == best
        sampled = [entry["context"] for entry in line["sampled"]]
        assert len(sampled) == len(set(sampled)) == min(4, (peaks > 0).sum())
        shown = [entry["activation"] for entry in line["sampled"]]
        assert shown == sorted(shown, reverse=True)
        for entry in line["top"] + line["sampled"]:
            context, part = entry["context"], slice(entry["offset"], entry["offset"] + 5)
            assert entry["activation"] == pytest.approx(peaks[context], rel=1e-5)
            assert entry["tokens"] == tokens[context, part].tolist()
            np.testing.assert_allclose(entry["activations"], acts[context, part], rtol=2e-3, atol=1e-6)
            assert entry["activations"][entry["peak"]] == pytest.approx(entry["activation"], rel=2e-3)
            assert entry["document"] == context // 2
            assert entry["position"] == entry["offset"] + entry["peak"]
            assert index.documents[entry["document"]] == f"file_{entry['document']}.py"


def test_blocks_do_not_change_the_sample(store, tmp_path, monkeypatch):
    sae = Named("a", make_sae())
    columns = []
    for rows in (1, 8192):
        monkeypatch.setattr("thresher.evaluate.features.build.BLOCK_ROWS", rows)
        index = build_feature_index(store, [sae], tmp_path / str(rows), settings=SETTINGS)["a"]
        columns.append([[entry["context"] for entry in line["sampled"]] for line in lines(index)])
    assert columns[0] == columns[1]


def test_sampling_is_fair():
    latent, context = (part.reshape(-1) for part in np.meshgrid(np.arange(100), np.arange(1000), indexing="ij"))
    priority = sampling_priority(latent, context, seed=1)
    counts = np.histogram(priority, 20, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 50
    by_latent = priority.reshape(100, 1000)
    assert abs(np.corrcoef(by_latent)[np.triu_indices(100, 1)]).max() < 0.2
    assert abs(np.corrcoef(priority, sampling_priority(latent, context, seed=2))[0, 1]) < 0.02
    assert len(np.unique(priority)) == len(priority)


def test_neighbours_are_the_cosine_of_firing(store, tmp_path):
    sae = make_sae("standard")
    index = build_feature_index(store, [Named("a", sae)], tmp_path, settings=SETTINGS)["a"]
    fires = (dense_latents(store, sae) > 0).reshape(-1, D_SAE).astype(np.float64)
    together = fires.T @ fires
    norm = np.sqrt(np.diag(together))
    with np.errstate(invalid="ignore"):
        cosine = np.where(together >= 2, together / np.outer(norm, norm), 0)
    np.fill_diagonal(cosine, 0)
    for line in lines(index):
        best = sorted(cosine[line["latent"]][cosine[line["latent"]] > 0], reverse=True)[:3]
        assert [n["score"] for n in line["neighbours"]] == pytest.approx(best)
        for neighbour in line["neighbours"]:
            assert cosine[line["latent"], neighbour["latent"]] == pytest.approx(neighbour["score"])


def test_pairs_are_counted_alike_in_a_table_and_in_a_list(store):
    x = store.read("blocks.0.resid_post", 0, store.n_rows)
    rows = np.ones(store.n_rows, dtype=bool)
    block = active_latents(make_sae("standard"), x, rows, 0, CONTEXT, 100)
    found = []
    for tabled in (True, False):
        co_firing = CoFiring(D_SAE, store.n_rows)
        assert co_firing._tabled
        if not tabled:
            co_firing._tabled, co_firing._counts = False, np.zeros(0, dtype=np.int64)
        co_firing.add(block, store.n_rows)
        co_firing.merge()
        latent, neighbour, score = co_firing.neighbours(5)
        found.append((latent.tolist(), np.round(score, 9).tolist(), set(zip(latent, neighbour, strict=True))))
    assert found[0] == found[1]
    assert CoFiring(D_SAE, 10, max_pairs=D_SAE**2 - 1)._counts.size == 0


def test_the_pair_budget_bounds_the_rows_that_are_counted(store):
    sae = make_sae("topk", k=4)
    x = store.read("blocks.0.resid_post", 0, store.n_rows)
    block = active_latents(sae, x, np.ones(store.n_rows, dtype=bool), 0, CONTEXT, 100)
    co_firing = CoFiring(D_SAE, store.n_rows, max_pairs=6 * 50)
    co_firing.add(block, store.n_rows)
    assert 0 < co_firing.firings.sum() <= 4 * 51


def test_the_rows_that_are_counted_are_of_any_position():
    n_contexts, k = 64, 3
    row = np.repeat(np.arange(n_contexts * CONTEXT), k)
    latent = (row % CONTEXT) * k + np.tile(np.arange(k), n_contexts * CONTEXT)  # each position has latents of its own
    block = ActiveLatents(0, CONTEXT, CONTEXT * k, row, latent, np.ones(len(row), dtype=np.float32))
    co_firing = CoFiring(CONTEXT * k, n_contexts * CONTEXT, max_pairs=3 * n_contexts)
    co_firing.add(block, n_contexts * CONTEXT)
    assert co_firing.firings.sum() == k * n_contexts
    assert (co_firing.firings > 0).sum() > CONTEXT * k // 2


def test_one_latent_is_its_line_of_the_index(store, tmp_path, monkeypatch):
    monkeypatch.setattr("thresher.evaluate.features.files.ROW_GROUP", 5)
    index = build_feature_index(store, [Named("a", make_sae())], tmp_path, settings=SETTINGS)["a"]
    assert index._file.metadata.num_row_groups > 1
    assert [index.latent(number) for number in range(D_SAE)] == lines(index)
    for number in (-1, D_SAE):
        with pytest.raises(ConfigError, match=f"expected a latent from 0 to {D_SAE - 1}"):
            index.latent(number)


def test_a_growing_maximum_keeps_the_histogram_exact(store):
    sae = make_sae("standard")
    statistics = ActivationStatistics(D_SAE)
    seen = []
    for scale in (1e-3, 1.0, 0.1, 700.0):
        x = store.read("blocks.0.resid_post", 0, 120) * scale
        block = active_latents(sae, x, np.ones(120, dtype=bool), 0, CONTEXT, 50)
        statistics.add(block, 120)
        seen.append(block.value[block.latent == 2])
    edges = np.linspace(0, 2.0 ** statistics.exponent[2], N_BINS + 1)
    assert statistics.counts[2].tolist() == np.histogram(np.concatenate(seen), edges)[0].tolist()


def test_an_index_of_the_same_sae_is_kept_and_another_is_not(store, tmp_path):
    def build(seed, **changes):
        settings = SETTINGS._replace(**changes)
        return build_feature_index(store, [Named("a", make_sae(seed=seed))], tmp_path, settings=settings)[
            "a"
        ].path.stat()

    first = build(0)
    assert build(0).st_ino == first.st_ino
    assert build(0, n_top=2).st_ino != first.st_ino
    assert len(lines(FeatureIndex.open(tmp_path / "a.parquet"))[0]["top"]) == 2
    changed = build(1, n_top=2).st_mtime_ns
    assert build(0, n_top=2).st_mtime_ns != changed


def test_an_index_of_another_model_or_of_other_rows_is_not_kept(store, tmp_path):
    def promoted(store, model=None):
        index = build_feature_index(store, [Named("a", make_sae())], tmp_path, model=model, settings=SETTINGS)["a"]
        return [[effect["token"] for effect in line["promoted"]] for line in lines(index)]

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=D_IN, n_head=2, vocab_size=60, bos_token_id=0, eos_token_id=0)
    first, second = (GPT2LMHeadModel(config).eval() for _ in range(2))
    ours = promoted(store, first)
    assert promoted(store, second) != ours
    assert promoted(store, first) == ours
    assert promoted(store) == [[]] * D_SAE
    with ActivationStoreWriter(tmp_path / "store", {Named.hook_point: D_IN}, CONTEXT, dtype="float32") as writer:
        rows = store.read(Named.hook_point, 0, store.n_rows)
        writer.append({Named.hook_point: -rows.reshape(N_CONTEXTS, CONTEXT, D_IN)}, np.ones((N_CONTEXTS, CONTEXT), int))
    other = ActivationStore.open(tmp_path / "store")
    firings = [line["firings"] for line in lines(FeatureIndex.open(tmp_path / "a.parquet"))]
    promoted(other)
    assert [line["firings"] for line in lines(FeatureIndex.open(tmp_path / "a.parquet"))] != firings


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_an_index_is_built_again_after_any_weight_changed(store, tmp_path, name):
    sae = make_sae()
    before = build_feature_index(store, [Named("a", sae)], tmp_path, settings=SETTINGS)["a"]
    getattr(sae, name).data.view(-1)[-7] += 1e-6
    after = build_feature_index(store, [Named("a", sae)], tmp_path, settings=SETTINGS)["a"]
    assert after.metadata["fingerprint"] != before.metadata["fingerprint"]


def test_an_index_is_built_again_after_the_readout_or_the_tokenizer_changed(store, tmp_path):
    config = GPT2Config(n_layer=1, n_embd=D_IN, n_head=2, vocab_size=60, bos_token_id=0, eos_token_id=0)
    model, words = GPT2LMHeadModel(config).eval(), [f"word{i}" for i in range(50)]

    def build(*words):
        model_of = WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model_of), name_or_path="the same")
        indexes = build_feature_index(
            store, [Named("a", make_sae())], tmp_path, model=model, tokenizer=tokenizer, settings=SETTINGS
        )
        return indexes["a"]

    first = build(*words)
    assert first.metadata["logit_effects"] == "through transformer.ln_f (LayerNorm), the unembedding"
    assert max(effect["token"] for line in lines(first) for effect in line["promoted"]) < 50 < 60
    assert build(*words).metadata == first.metadata
    second = build("other", *words[1:])
    assert second.vocabulary != first.vocabulary
    model.transformer.ln_f.weight.data[3] += 1e-4
    third = build("other", *words[1:])
    model.lm_head.weight.data[41, 5] += 1e-4
    fourth = build("other", *words[1:])
    assert len({index.metadata["fingerprint"] for index in (first, second, third, fourth)}) == 4


@pytest.mark.parametrize("where", ["page", "end", "empty"])
def test_a_damaged_index_is_built_again(store, tmp_path, capsys, where):
    whole = build_feature_index(store, [Named("a", make_sae())], tmp_path, settings=SETTINGS)["a"]
    content, expected = bytearray(whole.path.read_bytes()), lines(whole)
    content[{"page": 300, "end": -6, "empty": 0}[where]] ^= 0x55
    whole.path.write_bytes(b"" if where == "empty" else content)
    again = build_feature_index(store, [Named("a", make_sae())], tmp_path, settings=SETTINGS)["a"]
    assert lines(again) == expected
    assert "is damaged and is built again" in capsys.readouterr().err


def test_a_flipped_byte_in_kept_progress_is_noticed(tmp_path):
    path, other = tmp_path / ".a.progress", ActivationStatistics(3)
    save_progress(path, "print", 5, {"s": ActivationStatistics(3)})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert restore_progress(path, "print", {"s": other}) == 0


def test_latents_that_are_not_finite_have_no_index(store, tmp_path):
    broken, failures = make_sae("standard"), {}
    broken.b_enc.data[4] = float("inf")
    saes = [Named("a", make_sae()), Named("b", broken)]
    indexes = build_feature_index(store, saes, tmp_path, settings=SETTINGS, on_failure=failures.__setitem__)
    assert list(indexes) == ["a"]
    assert "NaN or infinite" in failures["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_the_reason_for_missing_logit_effects_is_recorded(store, tmp_path, capsys):
    config = GPT2Config(n_layer=1, n_embd=D_IN, n_head=2, vocab_size=60, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    model.lm_head.register_forward_hook(lambda module, args, output: output.flip(-1))
    index = build_feature_index(store, [Named("a", make_sae())], tmp_path, model=model, settings=SETTINGS)["a"]
    assert lines(index)[0]["promoted"] == []
    assert index.metadata["logit_effects"].startswith("none: GPT2LMHeadModel computes its logits differently from")
    assert capsys.readouterr().err.count("logit effects  none: GPT2LMHeadModel") == 1


def test_a_killed_pass_resumes_where_it_was(store, tmp_path, monkeypatch):
    monkeypatch.setattr("thresher.evaluate.features.build.BLOCK_ROWS", CONTEXT)
    monkeypatch.setattr("thresher.evaluate.features.progress.SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("thresher.evaluate.features.progress.SHARE_OF_TIME", 1e9)
    saes = [Named("a", make_sae()), Named("b", make_sae("standard"))]
    whole = build_feature_index(store, saes, tmp_path / "whole", settings=SETTINGS)
    encoded = []
    original = build_module.active_latents
    kill_at: list[int] = []

    def encode(sae, x, usable, first_row, *more):
        if sae is saes[1].sae and first_row // CONTEXT in kill_at:
            raise KeyboardInterrupt
        encoded.append(first_row // CONTEXT)
        return original(sae, x, usable, first_row, *more)

    monkeypatch.setattr(build_module, "active_latents", encode)
    for block in (9, 30):
        kill_at[:] = [block]
        with pytest.raises(KeyboardInterrupt):
            build_feature_index(store, saes, tmp_path / "cut", settings=SETTINGS)
    kill_at.clear()
    resumed = build_feature_index(store, saes, tmp_path / "cut", settings=SETTINGS)
    assert len(encoded) <= 2 * N_CONTEXTS + 2, "only the block in which each kill fell is encoded twice"
    for name, index in resumed.items():
        assert lines(index) == lines(whole[name])
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["a.parquet", "b.parquet"]


def test_progress_of_other_work_or_damaged_is_not_used(tmp_path):
    path = tmp_path / ".a.progress"
    kept, other = ActivationStatistics(3), ActivationStatistics(3)
    kept.firings[1] = 7
    kept.n_rows = 9
    save_progress(path, "print", 5, {"s": kept})
    assert restore_progress(path, "another", {"s": other}) == 0
    assert other.n_rows == 0
    assert restore_progress(path, "print", {"s": other}) == 5
    assert (other.n_rows, other.firings.tolist()) == (9, [0, 7, 0])
    path.write_bytes(path.read_bytes()[:100])
    assert restore_progress(path, "print", {"s": other}) == 0


MILLION = """
import resource, sys
from types import SimpleNamespace
import numpy as np, torch
from thresher.evaluate.features.build import FeatureSettings, build_feature_index
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStore

store, output, d_sae = sys.argv[1], sys.argv[2], int(sys.argv[3])
generator = torch.Generator().manual_seed(0)
W_enc = torch.randn(4, d_sae, generator=generator)
tensors = {"W_enc": W_enc, "b_enc": torch.zeros(d_sae), "W_dec": W_enc.T.contiguous(), "b_dec": torch.zeros(4)}
sae = SimpleNamespace(name="wide", sae=Sae("topk", tensors, config={"k": 16}), hook_point="h", target="h")
settings = FeatureSettings(n_top=4, n_sampled=4, window=16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build_feature_index(ActivationStore.open(store), [sae], output, settings=settings)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.long
def test_a_million_latents_stay_within_the_memory_stated(tmp_path):
    """The growth of the process's peak memory, NumPy's, torch's and Arrow's together, in a process of its own."""
    d_sae, n_contexts = 1 << 20, 8
    generator = torch.Generator().manual_seed(0)
    with ActivationStoreWriter(tmp_path / "store", {"h": 4}, 32, dtype="float32") as writer:
        x = torch.randn(n_contexts, 32, 4, generator=generator)
        writer.append({"h": x.numpy()}, np.arange(n_contexts * 32, dtype=np.int32).reshape(n_contexts, 32))
    arguments = [str(tmp_path / "store"), str(tmp_path), str(d_sae)]
    done = subprocess.run([sys.executable, "-c", MILLION, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    index = FeatureIndex.open(tmp_path / "wide.parquet")
    assert index.n_latents == d_sae
    assert sum(index.columns(["firings"])["firings"].to_pylist()) == n_contexts * 32 * 16
    a_latent = 8 * (2 * 16 + 20) + 350
    pre_activations = 3 * FEWEST_ROWS * 4 * d_sae
    stated = d_sae * a_latent + pre_activations + (64 << 20)
    peak = int(done.stdout)
    assert peak < stated, f"{peak / d_sae:.0f} bytes a latent, {stated / d_sae:.0f} stated"


def test_max_rows_spreads_over_the_store(store, tmp_path, monkeypatch):
    monkeypatch.setattr("thresher.evaluate.features.build.BLOCK_ROWS", CONTEXT)
    settings = SETTINGS._replace(max_rows=10 * CONTEXT)
    index = build_feature_index(store, [Named("a", make_sae())], tmp_path, settings=settings)["a"]
    assert index.metadata["n_rows"] == 10 * (CONTEXT - 1)
    contexts = {entry["context"] for line in lines(index) for entry in line["top"]}
    assert contexts <= {i * N_CONTEXTS // 10 for i in range(10)}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logit_effects(family):
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8)).eval()
        norm = model.transformer.ln_f
        norm.bias.data.normal_()
    else:
        config = LlamaConfig(
            num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=40
        )
        model = LlamaForCausalLM(config).eval()
        norm = model.model.norm
    norm.weight.data.uniform_(0.5, 2)
    rows = torch.randn(9, 16)
    found = logit_effects(model, rows, "blocks.0.mlp_out", n=3, step=4)
    x, weight = rows.double(), norm.weight.detach().double()
    if family == "gpt2":
        x = x - x.mean(dim=1, keepdim=True)
    x = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * weight
    logits = x @ model.lm_head.weight.detach().double().T
    logits -= logits.mean(dim=1, keepdim=True)
    order = logits.argsort(dim=1, descending=True)
    np.testing.assert_array_equal(found.promoted, order[:, :3])
    np.testing.assert_array_equal(found.suppressed, order.flip(1)[:, :3])
    np.testing.assert_allclose(found.promoted_effect, logits.gather(1, order[:, :3]), rtol=1e-3)
    np.testing.assert_allclose(found.peak, logits.max(dim=1).values / logits.std(dim=1, correction=0), rtol=1e-3)
    assert logit_effects(model, torch.randn(4, 7), "blocks.0.resid_post") is None
    assert logit_effects(model, rows, "blocks.0.attn_z") is None
    assert logit_effects(model, rows, "blocks.0.mlp_in") is None


def test_interestingness_by_hand():
    tokens = np.array([[7, 7, 7, 8], [1, 2, 3, 4], [-1, -1, -1, -1], [5, 5, -1, -1]])
    documents = np.array([[0, 1, 2, 3], [4, 4, 4, 4], [-1, -1, -1, -1], [0, 9, -1, -1]])
    density = np.array([0.0, 0.1, 0.0, 0.5])
    score = interestingness(tokens, documents, density, None)
    np.testing.assert_allclose(score, [0.75, 0.25 * 0.25 * 0.5, 0, 0])
    with_logits = interestingness(tokens, documents, density, np.array([5.0, 40.0, 1.0, 1.0]))
    np.testing.assert_allclose(with_logits[:2], [0.625, 0.625 * 0.25 * 0.5])


def test_faults_are_named(store, tmp_path):
    with pytest.raises(MissingFileError, match="no feature index"):
        FeatureIndex.open(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("PAR1 is not enough")
    with pytest.raises(DataError, match="not a feature index"):
        FeatureIndex.open(tmp_path / "text.parquet")
    with ActivationStoreWriter(tmp_path / "bare", {"h": 4}, 4, dtype="float32") as writer:
        writer.append({"h": np.ones((2, 4, 4), dtype=np.float32)})
    with pytest.raises(StoreError, match="needs tokens"):
        build_feature_index(ActivationStore.open(tmp_path / "bare"), [], tmp_path)
