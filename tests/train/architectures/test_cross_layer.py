"""Cross-layer transcoders: gradients against autograd, and their way through training, saving, resuming and loading."""

import json
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.core.errors import ConfigError, SaeError
from thresher.shared.sae import CrossLayerTranscoder
from thresher.train import TrainConfig, train
from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.architectures.cross_layer.selection import largest_of_batch_and_layers
from thresher.train.kernels import kernels_for
from thresher.train.memory import held_bytes, parameter_shapes
from thresher.train.stream.normalization import Normalization, normalization_across
from thresher.train.stream.rotation import Rotation
from thresher.train.sweep.grids import expand_sweep

N, D_SAE, D_IN, D_OUT, BATCH = 3, 7, 5, 4, 30
READS = tuple(f"blocks.{i}.mlp_in" for i in range(N))
WRITES = tuple(f"blocks.{i}.mlp_out" for i in range(N))
TOTAL_VARIANCE = 3.7
RULES = {
    "standard": {"architecture": "standard", "l1_coefficient": 0.7},
    "topk": {"architecture": "topk", "k": 4},
    "topk by layer": {"architecture": "topk", "k": 2, "select_over": "layer"},
    "batch_topk": {"architecture": "batch_topk", "k": 4},
    "batch_topk by layer": {"architecture": "batch_topk", "k": 2, "select_over": "layer"},
    "jumprelu": {"architecture": "jumprelu", "l0_coefficient": 0.3, "bandwidth": 0.8, "initial_threshold": 0.4},
    "tanh": {
        "architecture": "jumprelu",
        "l0_coefficient": 0.3,
        "sparsity_loss": "tanh",
        "bandwidth": 0.8,
        "initial_threshold": 0.4,
        "pre_act_coefficient": 0.05,
    },
}


def problem(d_sae=D_SAE, bias=0.0, **keys):
    """Return an architecture with random float64 parameters, and rows with their targets."""
    torch.manual_seed(0)
    config = make_config(hook_point=READS[0], d_sae=d_sae, reads=READS, writes=WRITES, cross_layer=True, **keys)
    architecture = make_architecture(config, N * D_IN, N * D_OUT)
    parameters = {
        name: tensor.double() + 0.3 * torch.randn(tensor.shape, dtype=torch.float64) + bias * (name == "b_enc")
        for name, tensor in architecture.initial_parameters(torch.Generator().manual_seed(0)).items()
    }
    x = torch.randn(BATCH, N * D_IN, dtype=torch.float64)
    return architecture, parameters, x, torch.randn(BATCH, N * D_OUT, dtype=torch.float64)


def in_full(W_dec, d_sae=D_SAE):
    """Return the decoders as `[layer, target, d_sae, d_out]`, with zeros for targets before a layer."""
    full = [[torch.zeros(d_sae, D_OUT, dtype=W_dec.dtype)] * N for _ in range(N)]
    for (layer, target), block in zip(combinations_with_replacement(range(N), 2), W_dec.split(d_sae), strict=True):
        full[layer][target] = block
    return torch.stack([torch.stack(row) for row in full])


def pre_activations(p, x):
    """Return `[batch, layer, d_sae]`."""
    W_enc, b_enc = p["W_enc"].view(N, -1, D_IN), p["b_enc"].view(N, -1)
    return torch.einsum("bld,lfd->blf", x.view(-1, N, D_IN), W_enc) + b_enc


def decoded(acts, W_dec):
    return torch.einsum("blf,lmfd->bmd", acts, in_full(W_dec, acts.shape[2])).flatten(1)


def norms_of(W_dec, d_sae=D_SAE):
    return in_full(W_dec, d_sae).square().sum((1, 3)).clamp_min(1e-30).sqrt()


class Step(torch.autograd.Function):
    """JumpReLU and its straight-through estimate: `[z > theta]` times z, or times one for L0."""

    @staticmethod
    def forward(ctx, z, theta, epsilon, is_l0):
        ctx.save_for_backward(z, theta)
        ctx.epsilon, ctx.is_l0 = epsilon, is_l0
        return (z > theta).double() * (1 if is_l0 else z)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.epsilon / 2).double()
        by_theta = -(g * near * (1 if ctx.is_l0 else theta)).sum(0) / ctx.epsilon
        return (torch.zeros_like(g) if ctx.is_l0 else g * (z > theta)), by_theta, None, None


class LogStep(torch.autograd.Function):
    """JumpReLU whose gradient by the threshold's logarithm t is `-(exp(t) / epsilon)` near it."""

    @staticmethod
    def forward(ctx, z, log_theta, epsilon):
        ctx.save_for_backward(z, log_theta)
        ctx.epsilon = epsilon
        return (z > log_theta.exp()).double() * z

    @staticmethod
    def backward(ctx, g):
        z, log_theta = ctx.saved_tensors
        theta = log_theta.exp()
        near = ((z - theta).abs() < ctx.epsilon / 2).double()
        return g * (z > theta), -(g * near).sum(0) * theta / ctx.epsilon, None


def kept(pre_acts, k, rule):
    """Return which entries are among the largest: of a row or the batch, over all layers or in each."""
    mask = torch.zeros(pre_acts.shape, dtype=pre_acts.dtype)
    if rule == "topk":
        flat = mask.view(BATCH, -1)
        flat.scatter_(1, pre_acts.flatten(1).topk(k).indices, 1.0)
    elif rule == "topk by layer":
        mask.scatter_(2, pre_acts.topk(k, dim=2).indices, 1.0)
    elif rule == "batch_topk":
        mask.view(-1)[pre_acts.flatten().topk(BATCH * k).indices] = 1.0
    else:
        for layer in range(N):
            part = torch.zeros(BATCH * pre_acts.shape[2], dtype=mask.dtype)
            part[pre_acts[:, layer].flatten().topk(BATCH * k).indices] = 1.0
            mask[:, layer] = part.view(BATCH, -1)
    return mask * (pre_acts > 0)


def loss_of(rule, p, x, y, keys):
    """Return the loss, written densely."""
    z = pre_activations(p, x)
    shape = z.shape[1:]

    def mse(acts):
        return (y - decoded(acts, p["W_dec"]) - p["b_dec"]).square().sum(1).mean()

    if rule == "standard":
        acts = z.relu()
        return mse(acts) + 0.7 * (acts * norms_of(p["W_dec"])).sum((1, 2)).mean()
    if rule == "jumprelu":
        theta = p["log_threshold"].exp().view(shape)
        l0 = Step.apply(z, theta, 0.8, True).sum((1, 2)).mean()
        return mse(Step.apply(z, theta, 0.8, False)) / D_OUT + 0.3 * l0
    if rule == "tanh":
        log_theta, norms = p["log_threshold"].view(shape), norms_of(p["W_dec"])
        acts = LogStep.apply(z, log_theta, 0.8)
        loss = mse(acts) + 0.3 * torch.tanh(4 * acts * norms).sum((1, 2)).mean()
        return loss + 0.05 * ((log_theta.exp() - z).relu() * norms).sum((1, 2)).mean()
    with torch.no_grad():
        mask = kept(z, keys["k"], rule)
    return mse(z * mask) / TOTAL_VARIANCE


def take_step(architecture, parameters, x, y, dead=None, device_kernels="cpu"):
    step = StepInput(
        kernels_for("cpu", device_kernels),
        parameters["W_enc"],
        TOTAL_VARIANCE,
        dead=dead,
        buffers=architecture.initial_buffers(),
    )
    return architecture.step({name: tensor.clone() for name, tensor in parameters.items()}, Batch(x, x, y), step), step


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("bias", [0.0, -2.5])
@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule, bias, kernels):
    """Dense where many latents fire and sparse where few do; with the lower bias rows have fewer than k positives."""
    architecture, parameters, x, y = problem(bias=bias, **RULES[rule])
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    loss = loss_of(rule, leaves, x, y, RULES[rule])
    expected = torch.autograd.grad(loss, list(leaves.values()))
    output, _ = take_step(architecture, parameters, x, y, device_kernels=kernels)
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-10)
    for name, gradient in zip(leaves, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(("rule", "bias"), [("standard", -2.5), ("batch_topk", 0.0)])
def test_the_triton_kernels_give_the_same_step_in_their_interpreter(rule, bias):
    triton = pytest.importorskip("thresher.train.kernels.triton").Triton()
    architecture, parameters, *rows = problem(bias=bias, **RULES[rule])
    parameters, (x, y) = {name: tensor.float() for name, tensor in parameters.items()}, (part.float() for part in rows)
    dead = torch.arange(N * D_SAE) % 6 == 1
    outputs = []
    for kernels in (triton, kernels_for("cpu")):
        buffers = architecture.initial_buffers()
        step = StepInput(kernels, parameters["W_enc"], TOTAL_VARIANCE, dead=dead, buffers=buffers)
        outputs.append(architecture.step(parameters, Batch(x, x, y), step))
    assert float(outputs[0].loss) == pytest.approx(float(outputs[1].loss), rel=1e-5)
    assert torch.equal(outputs[0].fired, outputs[1].fired)
    for name, gradient in outputs[1].gradients.items():
        torch.testing.assert_close(outputs[0].gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("k_aux", [2, 50])
@pytest.mark.parametrize("rule", ["topk", "batch_topk by layer"])
def test_auxk_reconstructs_what_is_left_of_every_target(rule, k_aux):
    architecture, parameters, x, y = problem(k_aux=k_aux, **RULES[rule])
    dead = torch.zeros(N * D_SAE, dtype=torch.bool)
    dead[[1, 3, 8, 15, 16, 20]] = True

    def loss(p):
        z = pre_activations(p, x)
        mask = kept(z.detach(), RULES[rule]["k"], rule)
        y_hat = decoded(z * mask, p["W_dec"]) + p["b_dec"]
        residual = (y - y_hat).detach()
        revived = z.flatten(1).masked_fill(~dead, -torch.inf)
        chosen = torch.zeros(revived.shape, dtype=z.dtype)
        chosen.scatter_(1, revived.detach().topk(min(k_aux, int(dead.sum()))).indices, 1.0)
        acts = torch.where(chosen > 0, revived, 0.0).relu().view(z.shape)
        left = (residual - decoded(acts, p["W_dec"])).square().sum() / residual.square().sum()
        return (y - y_hat).square().sum(1).mean() / TOTAL_VARIANCE + left / 32

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    expected = loss(leaves)
    output, _ = take_step(architecture, parameters, x, y, dead)
    assert float(output.loss) == pytest.approx(expected.item(), rel=1e-10)
    for name, gradient in zip(leaves, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("sampled_rows_are_large", [False, True])
def test_the_largest_of_a_batch_are_found_whatever_a_sample_of_its_rows_shows(sampled_rows_are_large):
    """Sampled rows may be so much larger than the others that too few entries exceed their bound."""
    generator = torch.Generator().manual_seed(0)
    architecture, parameters, *_ = problem(d_sae=64, **RULES["batch_topk"])
    parameters = {name: tensor.float() for name, tensor in parameters.items()}
    x = torch.randn(256, N * D_IN, generator=generator)
    if sampled_rows_are_large:
        x[::4] *= 20
    step = StepInput(kernels_for("cpu"), parameters["W_enc"].bfloat16(), TOTAL_VARIANCE)
    inputs = architecture.layers.inputs(parameters, Batch(x, x.bfloat16()), step)
    z = pre_activations({name: tensor.double() for name, tensor in parameters.items()}, x.double()).flatten()
    chosen = largest_of_batch_and_layers(inputs, step, 5)
    values = torch.cat([some.pre_acts for some in chosen])
    torch.testing.assert_close(
        values.double().sort().values, z.topk(256 * 5).values.sort().values, rtol=1e-4, atol=1e-4
    )
    for layer, some in enumerate(chosen):
        rows = torch.repeat_interleave(torch.arange(256), some.offsets.diff())
        torch.testing.assert_close(
            some.pre_acts.double(), z.view(256, N, 64)[rows, layer, some.indices], rtol=1e-4, atol=1e-4
        )


def test_running_thresholds_are_of_all_latents_or_of_each_layer():
    for rule, n_thresholds in (("batch_topk", 1), ("batch_topk by layer", N)):
        architecture, parameters, x, y = problem(**RULES[rule])
        z = pre_activations(parameters, x)
        acts = z * kept(z, RULES[rule]["k"], rule)
        acts[acts == 0] = torch.inf
        smallest = acts.amin((0, 2)) if n_thresholds == N else acts.amin()[None]
        output, step = take_step(architecture, parameters, x, y)
        torch.testing.assert_close(step.buffers["threshold"].double(), smallest)
        assert torch.equal(output.fired, torch.isfinite(acts).any(0).flatten())


def raw(rule, dtype=torch.float32):
    """Return an architecture with parameters and buffers, a normalisation, and raw rows."""
    architecture, parameters, *_ = problem(**RULES[rule])
    by_hook = {
        name: Normalization(torch.randn(D_IN if name in READS else D_OUT), 0.3 + torch.rand(()).item() * 4, 2.0)
        for name in READS + WRITES
    }
    buffers = architecture.initial_buffers()
    buffers = {name: 0.2 + 0.3 * torch.rand(tensor.shape) for name, tensor in buffers.items()}
    parameters = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    return (
        architecture,
        parameters,
        buffers,
        normalization_across(architecture.config, by_hook),
        torch.randn(40, 15) * 2,
    )


@pytest.mark.parametrize("rule", RULES)
def test_what_is_trained_along_other_axes_is_rotated_back(rule):
    """The transcoder of rotated parameters computes on rotated rows, in their units, what the saved one does."""
    architecture, parameters, buffers, normalization, rows = raw(rule)
    turns = [torch.linalg.qr(torch.randn(N, d, d)).Q for d in (D_IN, D_OUT)]
    turned_in, turned_out = (Rotation(tuple(V)) for V in turns)
    kind = replace(normalization, rotation=turned_in, target=replace(normalization.target, rotation=turned_out))
    turned = architecture.rotated(parameters, kind)
    back = architecture.rotated(turned, kind, back=True)
    for name, tensor in parameters.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-5, atol=1e-5)
    x = (rows - normalization.mean) * normalization.scale
    y, y_turned = (
        architecture.to_sae(p, buffers, normalization.identity(), {})(z)
        for p, z in ((parameters, x), (turned, x @ torch.block_diag(*turns[0])))
    )
    torch.testing.assert_close(y_turned, y @ torch.block_diag(*turns[1]), rtol=1e-4, atol=1e-4)


def trained_estimate(rule, architecture, parameters, buffers, normalization, rows):
    """Return the estimates of raw targets, computed densely from normalised rows with the rule used after training."""
    z = pre_activations(parameters, (rows - normalization.mean) * normalization.scale)
    if "log_threshold" in parameters:
        acts = z * (z > parameters["log_threshold"].exp().view(z.shape[1:]))
    elif rule.startswith("batch_topk"):
        acts = z.relu() * (z > buffers["threshold"].view(-1, 1).expand(N, 1))
    elif rule == "topk":
        acts = (
            torch.zeros(z.shape).view(len(z), -1).scatter(1, z.flatten(1).topk(4).indices, 1.0).view(z.shape) * z.relu()
        )
    elif rule == "topk by layer":
        acts = torch.zeros(z.shape).scatter(2, z.topk(2, dim=2).indices, 1.0) * z.relu()
    else:
        acts = z.relu()
    y_hat = decoded(acts, parameters["W_dec"]) + parameters["b_dec"]
    return y_hat / normalization.target.scale + normalization.target.mean, acts.flatten(1)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_saved_computes_on_raw_rows_what_was_trained(rule, tmp_path):
    architecture, parameters, buffers, normalization, rows = raw(rule)
    sae = Sae.load(architecture.to_sae(parameters, buffers, normalization, {"model_name": "m"}).save(tmp_path / "sae"))
    assert type(sae) is CrossLayerTranscoder
    assert (sae.d_in, sae.d_sae, sae.d_out) == (15, 21, 12)
    assert (sae.reads, sae.writes, sae.metadata["model_name"]) == (READS, WRITES, "m")
    expected, acts = trained_estimate(rule, architecture, parameters, buffers, normalization, rows)
    torch.testing.assert_close(sae(rows), expected, rtol=1e-4, atol=1e-4)
    latents = sae.encode(rows)
    assert torch.equal(latents > 0, acts > 0)
    torch.testing.assert_close(sae.decode_sparse(*sae.encode_sparse(rows)), expected, rtol=1e-4, atol=1e-4)
    norms = sae.decoder_norms().square().sum(1).sqrt()
    if architecture.folds:
        torch.testing.assert_close(norms, torch.ones(21))
    else:
        torch.testing.assert_close(latents, acts, rtol=1e-4, atol=1e-4)
    if sae.chooses_by_layer:
        by_layer = [sae.encode_layer(i, part) for i, part in enumerate(rows.chunk(N, dim=1))]
        torch.testing.assert_close(torch.cat(by_layer, 1), latents)
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("W")} == {
        **{f"W_enc_{i}": (D_SAE, D_IN) for i in range(N)},
        **{f"W_dec_{i}": (D_SAE, N - i, D_OUT) for i in range(N)},
    }


@pytest.mark.parametrize("rule", RULES)
def test_training_starts_from_what_was_saved(rule):
    architecture, parameters, buffers, normalization, rows = raw(rule)
    sae = architecture.to_sae(parameters, buffers, normalization, {})
    again, buffers = architecture.imported(sae, normalization)
    before = sae(rows)
    torch.testing.assert_close(
        architecture.to_sae(again, buffers, normalization, {})(rows), before, rtol=1e-4, atol=1e-4
    )
    assert again.keys() == parameters.keys()
    if not architecture.folds:
        for name, tensor in parameters.items():
            torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)
    told = architecture.differences(sae, normalization)
    assert [line.split(" =")[0] for line in told] == ["initial_threshold"] * ("initial_threshold" in RULES[rule])


def test_thresholds_that_become_one_are_reported():
    architecture, parameters, buffers, normalization, _ = raw("jumprelu")
    sae = architecture.to_sae(parameters, buffers, normalization, {})
    for rule, kept in (("batch_topk", "become one, their mean"), ("batch_topk by layer", "become one a layer")):
        other, *_ = problem(**RULES[rule])
        _, started = other.imported(sae, normalization)
        thresholds = torch.stack([sae.get_parameter(f"threshold_{i}") for i in range(N)])
        expected = thresholds.mean(1) if rule.endswith("layer") else thresholds.mean()[None]
        torch.testing.assert_close(started["threshold"], expected)
        assert kept in " ".join(other.differences(sae, normalization))


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    """Write three layers whose targets are sums over what the layers up to theirs read."""
    path = tmp_path_factory.mktemp("cross_layer") / "store"
    x = sparse_activations[: 372 * 16].float()
    generator = torch.Generator().manual_seed(5)
    inputs = [x @ torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q * (1 + i) for i in range(N)]
    written, hooks = torch.zeros(len(x), 20), {}
    for i, (read, write) in enumerate(zip(READS, WRITES, strict=True)):
        written = written + 0.1 * (inputs[i] @ torch.randn(32, 20, generator=generator)).relu()
        hooks |= {read: inputs[i], write: written + 2}
    with ActivationStoreWriter(path, {name: part.shape[1] for name, part in hooks.items()}, 16) as writer:
        rows = {name: part.view(372, 16, -1) for name, part in hooks.items()}
        writer.append(rows, held_out=np.arange(372) % 5 == 0)
    return path


def run_config(store, output, *tables, **keys):
    common = {"d_sae": 96, "lr": 3e-3, "reads": list(READS), "writes": list(WRITES), "cross_layer": True}
    return TrainConfig(
        store=str(store),
        output=str(output),
        batch_size=128,
        device="cpu",
        sae=[common | table for table in tables],
        **{"tokens": 128 * 100, "warmup_steps": 5} | keys,
    )


SWEEP = [
    {"architecture": "standard", "l1_coefficient": 0.05},
    {"architecture": "topk", "k": 24},
    {"architecture": "topk", "k": 8, "select_over": "layer"},
    {"architecture": "batch_topk", "k": 24, "dead_after_tokens": 256},
    {"architecture": "jumprelu", "l0_coefficient": 0.001, "target_l0": 30},
    {"architecture": "jumprelu", "l0_coefficient": 0.1, "sparsity_loss": "tanh", "name": "tanh"},
]


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    return train(run_config(store, tmp_path_factory.mktemp("trained"), *SWEEP, tokens=128 * 40))


def test_every_rule_learns_and_its_logged_variance_is_that_of_normalised_targets(store, trained):
    opened = ActivationStore.open(store)
    x, y = (torch.cat([opened.read(hook, 0, 4000).float() for hook in hooks], 1) for hooks in (READS, WRITES))
    centred = (y - y.mean(0)).view(len(y), N, -1)
    scale = 1 / centred.norm(dim=2).mean(0)[:, None]
    for folder in trained:
        error = (y - Sae.load(folder)(x)).view(len(y), N, -1)
        explained = 1 - (error * scale).square().sum() / (centred * scale).square().sum()
        logged = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["explained_variance"]
        assert explained > 0.5, folder.name
        assert float(explained) == pytest.approx(logged, abs=0.06), folder.name


def test_every_rule_resumes_to_the_same_end(store, tmp_path, train_killed):
    keys = {"tokens": 128 * 10, "checkpoint_every_tokens": 128 * 4}
    tables = [table | {"d_sae": 16, "ema_decay": 0.9, "clip_grad_norm": 1.0} for table in SWEEP]
    whole = train(run_config(store, tmp_path / "whole", *tables, **keys))
    cut = run_config(store, tmp_path / "cut", *tables, **keys)
    train_killed(cut, 6)
    for before, after in zip(whole, train(cut), strict=True):
        weights = [(folder / "sae_weights.safetensors").read_bytes() for folder in (before, after)]
        assert weights[0] == weights[1], before.name


def test_a_run_starts_from_saved_transcoders(store, trained, tmp_path, capsys):
    """The first step, at a learning rate of next to nothing, leaves each what it was."""
    tables = [table | {"lr": 1e-12} for table in SWEEP]
    config = run_config(store, tmp_path, *tables, tokens=128, warmup_steps=0, init_from=str(trained[0].parent))
    rows = ActivationStore.open(store)
    x = torch.cat([rows.read(hook, 0, 50).float() for hook in READS], 1)
    for before, after in zip(trained, train(config), strict=True):
        if before.name.startswith("batch_topk"):  # its threshold moves towards the batch's
            continue
        torch.testing.assert_close(Sae.load(after)(x), Sae.load(before)(x), rtol=1e-3, atol=1e-3, msg=before.name)
    assert "but" not in capsys.readouterr().err
    other = run_config(store, tmp_path / "other", SWEEP[0], init_from=str(trained[1]))
    with pytest.raises(SaeError, match="its latents are chosen by topk; expected relu"):
        train(other)


def test_the_plan_counts_the_decoders_that_there_are(store, tmp_path, capsys):
    config = run_config(store, tmp_path, SWEEP[1], dry_run=True)
    train(config)
    said = capsys.readouterr().out
    n_parameters = N * 96 * (32 + 1) + 6 * 96 * 20 + N * 20
    assert f"{n_parameters:,} parameters" in said
    assert "blocks.0.mlp_in and 2 more" in said
    assert "3 x 96" in said
    assert "topk-cross_layer-3x96-k24" in said
    assert "cannot be evaluated in the model" in said
    architecture = make_architecture(expand_sweep(config.sae)[0], N * 32, N * 20)
    shapes = {name: tuple(tensor.shape) for name, tensor in parameter_shapes(architecture).items()}
    assert shapes == {"W_enc": (288, 32), "b_enc": (288,), "W_dec": (576, 20), "b_dec": (60,)}
    # Parameters and Adam's moments in float32, bfloat16 copies of the matrices, and a counter for each latent.
    assert held_bytes(architecture, "bfloat16") == 12 * n_parameters + 2 * (288 * 32 + 576 * 20) + 8 * 288


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "hierarchical_topk"}, "'hierarchical_topk' has no cross-layer transcoder"),
        ({"writes": list(WRITES[:2])}, "3 hook points to read and 2 to write"),
        ({"reads": READS[0], "writes": WRITES[0]}, "1 hook points to read and 1 to write"),
        ({"skip": True}, "no skip path"),
        ({"k": 97 * 3}, "k is 291, expected at most the 288 latents of all layers"),
        ({"k": 97, "select_over": "layer"}, "k is 97, expected at most the d_sae = 96 latents of a layer"),
        ({"cross_layer": False, "select_over": "layer"}, "only a table with cross_layer = true"),
        ({"k_anneal_steps": 5}, "'k_anneal_steps' is given, but a cross-layer transcoder does not use it"),
        ({"resample_every_tokens": 500}, "'resample_every_tokens' is given, but"),
    ],
)
def test_refusals(store, tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        train(run_config(store, tmp_path, SWEEP[1] | keys, tokens=128 * 20))
