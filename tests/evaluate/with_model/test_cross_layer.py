"""Cross-layer transcoders through the whole stage, against float64 NumPy and hooks on plain transformers modules."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.shared.core.errors import HookPointError
from thresher.shared.sae import CrossLayerTranscoder, Sae

N, D, D_SAE, CONTEXT, VOCABULARY, N_CONTEXTS = 3, 16, 30, 12, 50, 30
READS = tuple(f"blocks.{i}.mlp_in" for i in range(N))
WRITES = tuple(f"blocks.{i}.mlp_out" for i in range(N))


def transcoder(activation, seed, reads=READS, writes=WRITES, skip=False, **config):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(N):
        tensors[f"W_enc_{i}"] = 0.5 * torch.randn(D_SAE, D, generator=generator)
        tensors[f"b_enc_{i}"] = -0.5 * torch.ones(D_SAE)
        tensors[f"W_dec_{i}"] = 0.3 * torch.randn(D_SAE, N - i, D, generator=generator)
        tensors[f"b_dec_{i}"] = torch.randn(D, generator=generator)
        if activation == "jumprelu":
            tensors[f"threshold_{i}"] = 2 * torch.rand(D_SAE, generator=generator)
        if skip:
            tensors[f"W_skip_{i}"] = 0.2 * torch.randn(D, D, generator=generator)
    keys = {"reads": reads, "writes": writes, "activation": activation}
    return CrossLayerTranscoder(tensors, config=keys | config)


SAES = {
    "relu": transcoder("relu", 1),
    "jumprelu": transcoder("jumprelu", 2),
    "topk_layer": transcoder("topk", 3, k=4, select_over="layer"),
    "skip": transcoder("relu", 5, skip=True),
    "topk_all": transcoder("topk", 4, k=12, select_over="all"),
}


@pytest.fixture(scope="module")
def model_store(tmp_path_factory):
    """A model of three layers on disk, and a store of what its MLPs read and write."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from thresher.shared.model.language_model import capture, resolve_hook_points
    from thresher.shared.store import ActivationStoreWriter

    root = tmp_path_factory.mktemp("cross_layer")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=N, n_embd=D, n_head=2, n_positions=CONTEXT, vocab_size=VOCABULARY, bos_token_id=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)
    model.save_pretrained(root / "model")
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (N_CONTEXTS, CONTEXT))
    tokens[:, 0] = 0
    held_out = np.arange(N_CONTEXTS) % 3 == 0
    rows = capture(model, torch.from_numpy(tokens), resolve_hook_points(model, (*READS, *WRITES)))
    metadata = {"model": str(root / "model"), "model_dtype": "float32", "mask_token_ids": [0]}
    with ActivationStoreWriter(
        root / "store", dict.fromkeys(rows, D), CONTEXT, dtype="float32", mask_token_ids=[0], metadata=metadata
    ) as writer:
        writer.append(rows, tokens=tokens, held_out=held_out)
    usable = (tokens != 0) & held_out[:, None]
    return SimpleNamespace(root=root, model=model, rows=rows, tokens=tokens[held_out], usable=usable)


@pytest.fixture(scope="module")
def result(model_store):
    folder, output = model_store.root / "saes", model_store.root / "out"
    for name, sae in SAES.items():
        sae.save(folder / name)
    config = EvaluateConfig(saes=str(folder), store=str(model_store.root / "store"), output=str(output), block_rows=50)
    return {row["name"]: row for row in evaluate(config)}, output


def encode(sae, layer, x):
    """Return a layer's latents in float64, for rows of a layer."""
    W_enc, b_enc = (sae.get_parameter(f"{name}_{layer}").double().numpy() for name in ("W_enc", "b_enc"))
    z = x @ W_enc.T + b_enc
    if sae.activation == "jumprelu":
        return z * (z > sae.get_parameter(f"threshold_{layer}").double().numpy())
    if sae.activation == "topk":
        z = z * (z >= np.sort(z, axis=1)[:, -4:-3])
    return np.maximum(z, 0)


def written(sae, acts, target, x):
    """Return what the latents of all layers up to a target write there, and its skip path of what its layer reads."""
    y_hat = sae.get_parameter(f"b_dec_{target}").double().numpy()
    for layer in range(target + 1):
        y_hat = y_hat + acts[layer] @ sae.get_parameter(f"W_dec_{layer}").double().numpy()[:, target - layer]
    if f"W_skip_{target}" in dict(sae.named_parameters()):
        y_hat = y_hat + x @ sae.get_parameter(f"W_skip_{target}").double().numpy().T
    return y_hat


def rows_of(model_store, hook):
    return model_store.rows[hook].numpy()[model_store.usable].astype(np.float64)


def check(row, y, y_hat):
    mse = ((y - y_hat) ** 2).sum(axis=1).mean()
    assert row["mse"] == pytest.approx(mse, rel=1e-4)
    assert row["explained_variance"] == pytest.approx(1 - mse / y.var(axis=0).sum(), rel=1e-4)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "topk_layer", "skip"])
def test_every_target_is_evaluated_and_all_together(model_store, result, name):
    row, sae = result[0][name], SAES[name]
    x = [rows_of(model_store, hook) for hook in READS]
    acts = [encode(sae, i, rows) for i, rows in enumerate(x)]
    y_hat = [written(sae, acts, target, x[target]) for target in range(N)]
    y = [rows_of(model_store, hook) for hook in WRITES]
    check(row, np.concatenate(y, axis=1), np.concatenate(y_hat, axis=1))
    assert (row["hook_point"], row["target_hook_point"]) == (" + ".join(READS), " + ".join(WRITES))
    fired = np.concatenate(acts, axis=1) > 0
    assert row["l0"] == pytest.approx(fired.sum(axis=1).mean())
    assert [part["hook_point"] for part in row["per_hook"]] == list(WRITES)
    for target, part in enumerate(row["per_hook"]):
        check(part, y[target], y_hat[target])
        assert part["l0"] <= fired[:, : (target + 1) * D_SAE].sum(axis=1).mean() + 1e-9
    assert "not compared" in row["dictionary_note"]
    latents = pq.read_table(result[1] / "latents" / f"{name}.parquet")
    np.testing.assert_array_equal(latents["firings"].to_numpy(), fired.sum(axis=0))
    shares = np.array(latents["decoder_norm_share"].to_pylist())
    assert (shares[D_SAE:, 0] == 0).all()
    assert (shares[2 * D_SAE :, 2] == 1).all()


def losses_by_hand(model_store, sae):
    """CE clean, with the transcoder in place of all MLPs in one pass, and with all MLPs' outputs set to zero.

    The transcoder runs in hooks on the modules: before an MLP its layer's latents are computed from what it would read
    in the changed model, and after it its output is overwritten.
    """
    tokens = torch.from_numpy(model_store.tokens)
    usable = torch.from_numpy(model_store.tokens != 0)
    acts, x = {}, {}

    def before(layer):
        def hook(_, inputs):
            x[layer] = inputs[0][usable].double().numpy()
            acts[layer] = encode(sae, layer, x[layer])

        return hook

    def after(target):
        def hook(_, __, output):
            output = output.clone()
            output[usable] = torch.from_numpy(written(sae, acts, target, x[target])).float()
            return output

        return hook

    def loss(hooks):
        log_probs = model_store.model(tokens).logits.double().log_softmax(-1)
        for handle in hooks:
            handle.remove()
        ce = -log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        return float(ce[usable[:, :-1] & usable[:, 1:]].mean())

    mlps = [block.mlp for block in model_store.model.transformer.h]
    clean = loss([])
    replaced = [mlp.register_forward_pre_hook(before(i)) for i, mlp in enumerate(mlps)]
    replaced += [mlp.register_forward_hook(after(i)) for i, mlp in enumerate(mlps)]
    spliced = loss(replaced)
    return clean, spliced, loss([mlp.register_forward_hook(lambda _, __, out: torch.zeros_like(out)) for mlp in mlps])


@pytest.mark.parametrize("name", ["relu", "jumprelu", "topk_layer", "skip"])
def test_all_mlps_are_replaced_in_one_pass(model_store, result, name):
    clean, spliced, zero = losses_by_hand(model_store, SAES[name])
    row = result[0][name]
    assert row["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert row["ce_sae"] == pytest.approx(spliced, rel=1e-4)
    assert row["ce_zero"] == pytest.approx(zero, rel=1e-5)
    assert row["ce_loss_score"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)
    # Reading the clean model's activations instead would give another loss.
    x = [rows_of(model_store, hook) for hook in READS]
    from_clean = [encode(SAES[name], i, rows) for i, rows in enumerate(x)]
    assert abs(spliced_from(model_store, SAES[name], from_clean, x) - spliced) > 1e-3


def spliced_from(model_store, sae, acts, x):
    """Return the loss where latents, and what skip paths read, are given rather than those of the changed model."""
    usable, tokens = torch.from_numpy(model_store.tokens != 0), torch.from_numpy(model_store.tokens)

    def after(target):
        def hook(_, __, output):
            output = output.clone()
            output[usable] = torch.from_numpy(written(sae, acts, target, x[target])).float()
            return output

        return hook

    handles = [block.mlp.register_forward_hook(after(i)) for i, block in enumerate(model_store.model.transformer.h)]
    log_probs = model_store.model(tokens).logits.double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    ce = -log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return float(ce[usable[:, :-1] & usable[:, 1:]].mean())


def test_transcoders_that_need_later_layers_are_evaluated_offline_only(model_store, result):
    row, sae = result[0]["topk_all"], SAES["topk_all"]
    assert row["l0"] == pytest.approx(12)
    x = torch.cat([model_store.rows[hook][model_store.usable] for hook in READS], dim=1)
    y = torch.cat([model_store.rows[hook][model_store.usable] for hook in WRITES], dim=1)
    check(row, y.double().numpy(), sae(x).double().numpy())
    assert row["ce_loss_score"] is None
    assert "select_over" in row["model_metrics_note"]


def test_layers_must_be_in_the_models_order(model_store, tmp_path):
    swapped = transcoder("relu", 5, reads=(READS[1], READS[0], READS[2]))
    assert Sae.load(swapped.save(tmp_path / "swapped")).reads == swapped.reads
    config = EvaluateConfig(
        saes=str(tmp_path / "swapped"), store=str(model_store.root / "store"), output=str(tmp_path / "out")
    )
    with pytest.raises(HookPointError, match="in the order of the model's layers"):
        evaluate(config)
