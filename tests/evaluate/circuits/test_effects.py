"""Direct effects against explicit linear algebra, and the identities that they obey, over model families."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thresher.evaluate.circuits.attribution import GraphSettings, attribution_graph
from thresher.shared.core.errors import InterventionError, ModelError, SaeError

from ...tiny_models import HEADS, LAYERS, WIDTH, build

N = 7
FAMILIES = [
    "gpt2",
    "gpt_neox",
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "cohere",
    "granite",
    "olmo2",
    "bloom",
]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 60, (N,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def run_plain(model, tokens, names):
    """Return logits and the outputs of modules, from a plain pass."""
    seen, handles = {}, []
    for name in names:
        keep = lambda _, __, y, name=name: seen.__setitem__(name, (y[0] if isinstance(y, tuple) else y)[0])  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_add_up_to_what_the_model_computes(family, tokens, make_transcoders):
    model = build(family)
    model = model if family == "mixtral" else model.double()  # PyTorch has no grouped product of experts in float64
    skip = "skip_" if family in ("llama", "gpt2") else ""
    graph, replacement = attribution_graph(model, make_transcoders(f"topk_{skip}transcoder"), tokens, skipped=1)
    logits, _ = run_plain(model, tokens, [])
    assert replacement.logit_gap == pytest.approx(0, abs=1e-4 * float(logits.abs().max()))
    assert graph.gap < (1e-10 if model.dtype == torch.float64 else 1e-5)
    sums = np.asarray(graph.adjacency.sum(axis=1)).ravel() + graph.constants
    for number, node in enumerate(graph.nodes):
        if node.kind == "latent":
            b_enc = float(replacement.wired.attached[node.layer].sae.b_enc[node.number])
            assert sums[number] + b_enc == pytest.approx(
                node.value, rel=1e-4, abs=0 if model.dtype == torch.float64 else 1e-4
            )
    assert {node.position for node in graph.nodes if node.kind == "latent"} == set(range(1, N))
    first = next(number for number, node in enumerate(graph.nodes) if node.kind == "logit")
    uncapped = uncapped_logits(family, model, logits)
    assert sums[first] == pytest.approx(float(uncapped.max() - uncapped.mean()), rel=1e-4)


def uncapped_logits(family, model, logits):
    """Return what the unembedding gives, before the factor or cap that some families put on logits."""
    if family == "gemma2":
        return torch.atanh(logits / model.config.final_logit_softcapping) * model.config.final_logit_softcapping
    if family == "cohere":
        return logits / model.logit_scale
    return logits * (model.config.logits_scaling if family == "granite" else 1)


def test_without_biases_nothing_is_left_for_the_constants(tokens, make_transcoders):
    for family in ("llama", "gemma2"):
        graph, _ = attribution_graph(build(family).double(), make_transcoders(b_dec=0), tokens)
        assert np.nanmax(np.abs(graph.constants)) < 1e-12
    graph, _ = attribution_graph(build("gpt2").double(), make_transcoders(b_dec=0), tokens)
    assert np.nanmax(np.abs(graph.constants)) > 1e-3  # its biases and positions


@pytest.mark.parametrize("architecture", ["topk_transcoder", "jumprelu_transcoder", "skip_transcoder"])
def test_single_effects_are_those_of_explicit_algebra(architecture, tokens, make_transcoders):
    model = build("gpt2").double()
    saes = make_transcoders(architecture)
    graph, _ = attribution_graph(model, saes, tokens)
    oracle = FrozenGpt2(model, tokens, saes if architecture == "skip_transcoder" else None)
    outs = [f"transformer.h.{layer}.mlp" for layer in range(LAYERS)]
    _, seen = run_plain(model, tokens, [*outs, "transformer.wte", *(f"transformer.h.{i}.ln_2" for i in range(LAYERS))])
    adjacency = graph.adjacency.toarray()
    rng = np.random.default_rng(0)
    targets = [number for number, node in enumerate(graph.nodes) if node.kind in ("latent", "logit")]
    checked = 0
    for target in rng.choice(targets, 12, replace=False):
        node = graph.nodes[target]
        weight = model.lm_head.weight
        direction = (
            (weight[node.number] - weight.mean(0)) if node.kind == "logit" else saes[node.layer].W_enc[:, node.number]
        )
        for source in rng.choice(len(graph.nodes), 40, replace=False):
            other = graph.nodes[source]
            if other.kind == "logit":
                continue
            if other.kind == "latent":
                vector = other.value * saes[other.layer].W_dec[other.number]
            elif other.kind == "embedding":
                vector = seen["transformer.wte"][other.position]
            else:
                sae, x = saes[other.layer], seen[f"transformer.h.{other.layer}.ln_2"][other.position]
                vector = seen[outs[other.layer]][other.position] - sae(x)
            expected = oracle.effect(vector, other.layer, other.position, direction, node.layer, node.position)
            assert adjacency[target, source] == pytest.approx(expected, rel=1e-7, abs=1e-10)
            checked += expected != 0
    assert checked > 60


class FrozenGpt2:
    """GPT-2 with its patterns and norm scales on some tokens, as matrix products."""

    def __init__(self, model, tokens, skips):
        self.model, self.skips = model, skips
        model.set_attn_implementation("eager")
        run = model(torch.tensor([tokens]), output_attentions=True, output_hidden_states=True, use_cache=False)
        model.set_attn_implementation("sdpa")
        self.patterns = [pattern[0] for pattern in run.attentions]
        names = [f"transformer.h.{layer}.attn" for layer in range(LAYERS)]
        _, seen = run_plain(model, tokens, names)
        pre = [state[0] for state in run.hidden_states]
        self.first = [self.scale(pre[layer]) for layer in range(LAYERS)]
        self.second = [self.scale(pre[layer] + seen[names[layer]]) for layer in range(LAYERS)]
        _, seen = run_plain(model, tokens, [f"transformer.h.{LAYERS - 1}"])
        self.last = self.scale(seen[f"transformer.h.{LAYERS - 1}"])

    def scale(self, x):
        return 1 / (x.var(dim=-1, correction=0, keepdim=True) + self.model.config.layer_norm_epsilon).sqrt()

    @torch.no_grad()
    def effect(self, vector, layer, position, direction, target_layer, target_position):
        """Return the effect of a vector added to an MLP's output (or an embedding, layer -1) on a direction."""
        stream = torch.zeros(len(self.last), WIDTH, dtype=torch.float64)
        stream[position] = vector
        centred = lambda x: x - x.mean(dim=-1, keepdim=True)  # noqa: E731
        if target_layer <= layer:
            return 0.0
        for number in range(layer + 1, LAYERS):
            block = self.model.transformer.h[number]
            x = centred(stream) * self.first[number] * block.ln_1.weight
            values = x @ block.attn.c_attn.weight[:, 2 * WIDTH :]
            heads = values.view(len(x), HEADS, -1).transpose(0, 1)
            mixed = (self.patterns[number] @ heads).transpose(0, 1).reshape(len(x), WIDTH)
            stream = stream + mixed @ block.attn.c_proj.weight
            y = centred(stream) * self.second[number] * block.ln_2.weight
            if number == target_layer:
                return float(y[target_position] @ direction)
            if self.skips is not None:
                stream = stream + y @ self.skips[number].W_skip.T
        y = centred(stream) * self.last * self.model.transformer.ln_f.weight
        return float(y[target_position] @ direction)


def test_cross_layer_and_missing_layers(tokens, make_transcoders, make_cross_layer):
    model = build("llama").double()
    some = [make_cross_layer(), make_cross_layer(activation="topk", k=30, select_over="all")]
    for sae in some:
        graph, replacement = attribution_graph(model, [sae], tokens, skipped=1)
        assert graph.gap < 1e-10
        latents = sae.encode(torch.cat([replacement.clean.inputs[0, i][0] for i in range(LAYERS)], -1))[1:]
        assert graph.n_active == int((latents > 0).sum())
    graph, replacement = attribution_graph(model, make_transcoders(layers=[1, 3]), tokens)
    _, seen = run_plain(model, tokens, ["model.layers.0.mlp"])
    torch.testing.assert_close(replacement.errors[0], seen["model.layers.0.mlp"], atol=1e-5, rtol=1e-5)
    assert {node.layer for node in graph.nodes if node.kind == "latent"} == {1, 3}
    assert graph.gap < 1e-10


def test_a_norm_before_its_weight_is_read_frozen(tokens, make_transcoders):
    graph, _ = attribution_graph(build("gpt2").double(), make_transcoders(read="mlp_in_normalized"), tokens)
    assert graph.gap < 1e-10


def test_batches_and_limits_do_not_change_what_is_found(tokens, make_transcoders):
    model = build("gpt2").double()
    whole, _ = attribution_graph(model, make_transcoders(), tokens)
    again, _ = attribution_graph(model, make_transcoders(), tokens, GraphSettings(batch_size=3))
    np.testing.assert_allclose(whole.adjacency.toarray(), again.adjacency.toarray(), atol=1e-12)
    few, _ = attribution_graph(model, make_transcoders(), tokens, GraphSettings(max_nodes=20, batch_size=4))
    assert sum(node.kind == "latent" for node in few.nodes) == 20
    place = {node: number for number, node in enumerate(whole.nodes)}
    at = [place[node] for node in few.nodes]
    np.testing.assert_allclose(few.adjacency.toarray(), whole.adjacency.toarray()[np.ix_(at, at)], atol=1e-12)
    first = whole.adjacency.toarray()
    logits = [number for number, node in enumerate(whole.nodes) if node.kind == "logit"]
    shares = np.abs(first[logits]) / np.abs(first[logits]).sum(1, keepdims=True)
    direct = whole.weights[logits] @ shares
    best = max((i for i, node in enumerate(whole.nodes) if node.kind == "latent"), key=lambda i: direct[i])
    assert whole.nodes[best] in few.nodes


@pytest.mark.parametrize(
    ("family", "change", "error", "expected"),
    [
        ("qwen3_next", {}, (ModelError,), "not linear|attention"),
        ("gpt2", {"dtype": torch.bfloat16}, (ModelError,), "expected float32 or float64"),
        ("gpt2", {"tokens": []}, (InterventionError,), "a graph needs"),
        ("gpt2", {"saes": "two"}, (SaeError,), "two transcoders write"),
        ("gpt2", {"saes": "sae"}, (SaeError,), "is no transcoder"),
        ("gpt2", {"saes": "by row"}, (SaeError,), "normalises each row"),
    ],
)
def test_what_does_not_fit_is_refused(family, change, error, expected, tokens, make_transcoders):
    model = build(family)
    model = model.to(change.get("dtype", torch.float32))
    saes = make_transcoders()
    if change.get("saes") == "two":
        saes.append(saes[0])
    if change.get("saes") == "sae":
        saes[0] = make_transcoders("topk", [1])[0]
    if change.get("saes") == "by row":
        saes[0].normalize_activations = "layer_norm"
    with pytest.raises(error, match=expected):
        attribution_graph(model, saes, change.get("tokens", tokens))
