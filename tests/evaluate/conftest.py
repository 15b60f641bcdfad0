"""A small store of a tiny model's real activations, and SAEs that fit it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thresher.shared.sae import Sae

from .chromium import CHROMIUM, SWITCHES, TIMEOUT, Tab

HOOKS = ("blocks.0.resid_post", "blocks.1.resid_post")
D, CONTEXT, VOCABULARY, N_CONTEXTS = 16, 12, 50, 40


def random_sae(architecture="topk", seed=0, d_in=D, d_sae=32, hook_point=HOOKS[1], k=4, **config):
    """An SAE whose decoder is unit norm and whose encoder is the decoder's transpose."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": 0.1 * torch.randn(d_sae, generator=generator)}
    tensors |= {"W_dec": W_dec, "b_dec": 0.1 * torch.randn(d_in, generator=generator)}
    own = {"k": k} if architecture == "topk" else {"l1_coefficient": 0.5}
    return Sae(architecture, tensors, hook_point=hook_point, config=own | config)


@pytest.fixture(scope="session")
def words():
    """A tokenizer of the tiny model's ids: each is a word with its number and the space before it."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"▁word{token}": token for token in range(VOCABULARY)}, unk_token="▁word0"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def make_sae():
    """The function that makes an SAE of random weights."""
    return random_sae


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model on disk, and a store of its activations in float32 with documents, held-out contexts and masked BOS."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from thresher.shared.model.language_model import capture, resolve_hook_points
    from thresher.shared.store import ActivationStoreWriter

    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=D, n_head=2, n_positions=CONTEXT, vocab_size=VOCABULARY, bos_token_id=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)
    model.save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (N_CONTEXTS, CONTEXT))
    tokens[:, 0] = 0
    tokens[7, 5] = 0
    documents = np.repeat(np.arange(N_CONTEXTS) // 3, CONTEXT).reshape(N_CONTEXTS, CONTEXT)
    documents[7, 5:] = 99
    held_out = np.isin(np.arange(N_CONTEXTS) // 3, [0, 2, 3, 9])
    activations = capture(model, torch.from_numpy(tokens), resolve_hook_points(model, HOOKS))
    metadata = {"model": str(root / "model"), "model_dtype": "float32", "mask_token_ids": [0]}
    with ActivationStoreWriter(
        root / "store",
        dict.fromkeys(HOOKS, D),
        CONTEXT,
        dtype="float32",
        mask_token_ids=[0],
        metadata=metadata,
    ) as writer:
        for part in np.array_split(np.arange(N_CONTEXTS), 3):
            batch = {hook: activations[hook][part] for hook in HOOKS}
            writer.append(batch, tokens=tokens[part], held_out=held_out[part], documents=documents[part])
    return SimpleNamespace(
        root=root,
        store=root / "store",
        model=model,
        activations=activations,
        tokens=tokens,
        documents=documents,
        held_out=held_out,
        usable=(tokens != 0) & held_out[:, None],
    )


@pytest.fixture(scope="session")
def sweep(tiny):
    """The folder of a sweep: two TopK SAEs and one ReLU SAE, at two hook points, one with a loss curve."""
    folder = tiny.root / "saes"
    random_sae(k=2, seed=1).save(folder / "topk_k2")
    random_sae(k=10, seed=1).save(folder / "topk_k10")
    random_sae("standard", seed=2, hook_point=HOOKS[0], d_sae=24).save(folder / "standard")
    lines = '{"step": 1, "tokens": 512, "loss": 2.0}\n{"step": 2, "tokens": 1024, "loss": 1.5}\n'
    (folder / "topk_k2" / "metrics.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def chromium():
    """Chromium, driven by Playwright, whose event loop runs in this thread until the module ends."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    sync_api.expect.set_options(timeout=TIMEOUT)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser(chromium):
    """A tab of Chromium."""
    return Tab(chromium)
