"""The scripts of examples/ and the page on Python run as they are; test_notebooks.py has the notebooks."""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from thresher import ActivationStore, ThresherError, show

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = Path(__file__).parents[1] / "models" / "stdlib-lm"
HOOK_POINT = "blocks.2.resid_post"


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    monkeypatch.setattr("thresher.shared.store.local.durable.flush", lambda handle: None)


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_and_in_the_readme():
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py" and not path.name[0].isdigit()}
    assert names == {"harvest_with_vllm.py", "harvest_with_nnsight.py", "harvest_with_interp_engine.py"}
    notebooks = {f"notebooks/{path.name}" for path in (EXAMPLES / "notebooks").iterdir()}
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert all(f"examples/{name}" in readme for name in names | notebooks)


def check_card(card, evaluation, store, latents, usable):
    """Compare a card with the store's text, and what it prints and draws with what it holds."""
    assert card.density == pytest.approx(float((latents > 0).double().mean()), rel=0.01)
    assert card.max_activation == pytest.approx(float(latents.max()), rel=1e-4)
    first = card.contexts[0]
    assert first.activations[first.peak] == pytest.approx(card.max_activation, rel=1e-3)  # float16
    row = usable.nonzero()[int(latents.argmax()), 0].item()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert first.texts[first.peak] == tokenizer.decode(store.tokens(row, row + 1).tolist())
    assert f"[{first.texts[first.peak]!r}]" in str(card)
    html = card._repr_html_()
    assert f"latent {card.latent}" in html
    assert html.count("outline:1px solid") == len(card.contexts)
    assert "<script" not in html
    with pytest.raises(ThresherError, match="no feature index of 'topk'"):
        show("topk", 0, evaluation)
    with pytest.raises(ThresherError, match="expected a latent from 0 to 511"):
        show(card.sae, 512, evaluation)


def test_the_page_on_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (EXAMPLES.parent / "docs/python.md").read_text()
    names: dict = {}
    for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)):
        exec(compile(snippet, f"docs/python.md, snippet {number}", "exec"), names)
    assert [row["name"] for row in names["rows"]] == ["topk-k8", "topk-k16"]
    assert "topk-k16" in names["rows"]._repr_html_()
    assert (names["card"].sae, names["card"].latent) == ("topk-k8", 100)
    assert names["table"].num_rows == 512
    assert torch.equal((names["latents"] > 0).sum(1), torch.full((256,), 8))
    store = names["store"]
    usable = torch.from_numpy(store.row_mask(0, store.n_rows))
    latents = names["sae"].encode(store.read(HOOK_POINT, 0, store.n_rows).float()[usable])
    latent = int(latents.amax(0).argmax())
    check_card(
        show("topk-k8", latent, "runs/python/evaluation"), "runs/python/evaluation", store, latents[:, latent], usable
    )


@torch.no_grad()
def test_harvest_with_vllm_imports_what_an_engine_of_its_documented_interface_writes(tmp_path, monkeypatch):
    """vLLM is not installed here: the engine is a stand-in that runs the model by transformers."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    class LLM:
        def __init__(self, model, speculative_config, kv_transfer_config, **options):
            draft = speculative_config["draft_model_config"]["hf_config"]
            self.layers = draft["eagle_aux_hidden_state_layer_ids"]
            self.folder = Path(kv_transfer_config["kv_connector_extra_config"]["shared_storage_path"])

        def generate(self, prompts, sampling_params):
            self.folder.mkdir(parents=True)
            for number, prompt in enumerate(prompts):
                tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
                states = model(tokens, output_hidden_states=True).hidden_states
                kept = torch.stack([states[layer][0] for layer in self.layers], dim=1)
                save_file({"hidden_states": kept, "token_ids": tokens[0]}, self.folder / f"{number}.safetensors")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"def f{n}(x):\n    return x + {n}" for n in range(40)))
    assert load("harvest_with_vllm").main(str(MODEL), text, tmp_path / "out", [1, 3]) == 0
    store = ActivationStore.open(tmp_path / "out" / "store")
    documents, positions = store.documents(0, store.n_rows)
    first = store.tokens(0, store.n_rows)[documents == documents[0]][None].long()
    expected = model(first, output_hidden_states=True).hidden_states[3][0]
    rows = store.read("blocks.2.resid_post", 0, store.n_rows)[documents == documents[0]]
    assert positions[: len(rows)].tolist() == list(range(len(rows)))
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit, match="vLLM is not installed"):
        load("harvest_with_vllm").main(str(MODEL), text, tmp_path / "other", [1])


IN_PEERS = """
import runpy, site, sys
site.addsitedir(sys.argv[1])  # after the packages of the peers' environment
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.peers
@torch.no_grad()
def test_harvest_with_nnsight(tmp_path, run_peers):
    run_peers("-c", IN_PEERS, sysconfig.get_paths()["purelib"], EXAMPLES / "harvest_with_nnsight.py", MODEL, tmp_path)
    store = ActivationStore.open(tmp_path / "store")
    n = 2 * store.context_size
    tokens = store.tokens(0, n).long().reshape(2, -1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    expected = model(tokens, output_hidden_states=True).hidden_states[2].flatten(0, 1)
    stored = store.read("blocks.1.resid_post", 0, n).double()
    assert (stored - expected).norm() < 1e-5 * expected.norm()
    documents, positions = store.documents(0, n)
    first = sorted((EXAMPLES.parent / "docs").glob("*.md"))[0]
    text = AutoTokenizer.from_pretrained(MODEL)(first.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    roles = store.roles(0, n)
    assert np.flatnonzero(roles == 0).tolist() == [0, store.context_size]  # placed
    assert (documents == 0).all()
    assert store.document_info(0)[1] == first.name
    for row in np.flatnonzero(roles == 1):
        assert tokens.flatten()[row] == text[positions[row] - 1]


@pytest.mark.peers
@torch.no_grad()
def test_harvest_with_interp_engine(tmp_path, run_peers):
    script = EXAMPLES / "harvest_with_interp_engine.py"
    run_peers("-c", IN_PEERS, sysconfig.get_paths()["purelib"], script, MODEL, tmp_path)
    store = ActivationStore.open(tmp_path / "store")
    n = 2 * store.context_size
    tokens = store.tokens(0, n).long().reshape(2, -1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    seen = {}
    block = model.transformer.h[1]
    block.ln_2.register_forward_hook(lambda _, __, y: seen.update({"blocks.1.mlp_in": y}))
    block.mlp.register_forward_hook(lambda _, __, y: seen.update({"blocks.1.mlp_out": y}))
    seen["blocks.1.resid_post"] = model(tokens, output_hidden_states=True).hidden_states[2]
    assert set(store.hook_points) == set(seen)
    for name, expected in seen.items():
        stored = store.read(name, 0, n).double()
        assert (stored - expected.flatten(0, 1)).norm() < 1e-5 * expected.norm()
    documents, positions = store.documents(0, n)
    assert (documents == 0).all()
    assert positions.tolist() == list(range(n))
    first = sorted((EXAMPLES.parent / "docs").glob("*.md"))[0]
    assert store.document_info(0)[1] == first.name
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = tokenizer(first.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    assert tokens.flatten().tolist() == [tokenizer.bos_token_id, *text][:n]
    assert np.flatnonzero(~store.row_mask(0, n)).tolist() == [0]
    held_out, of = store.held_out_contexts(), store.documents(0, store.n_rows)[0].reshape(-1, store.context_size)
    assert 0 < held_out.sum() < len(held_out)
    assert not set(of[held_out].flatten()) & set(of[~held_out].flatten())
