"""Every architecture's hand-written gradients equal autograd's, in float64, of the plain formula."""

import pytest
import torch

from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.architectures.parts.first_batch import first_encoder_scale
from thresher.train.kernels import kernels_for

TOTAL_VARIANCE = 3.7


def problem(d_in=7, d_sae=19, batch=13, seed=0, bias=0.0, noise=0.3, **config):
    """Return an architecture with random float64 parameters and a batch."""
    torch.manual_seed(seed)
    architecture = make_architecture(make_config(hook_point="h", d_sae=d_sae, **config), d_in)
    parameters = {
        name: tensor.double()
        + noise * torch.randn(tensor.shape, dtype=torch.float64)
        + (bias if name in ("b_enc", "b_gate") else 0)
        for name, tensor in architecture.initial_parameters(torch.Generator().manual_seed(seed)).items()
    }
    return architecture, parameters, torch.randn(batch, d_in, dtype=torch.float64)


def run(architecture, parameters, x, dead=None, sparsity_scale=1.0, row_weights=None):
    step = StepInput(
        kernels=kernels_for("cpu"),
        W_enc_compute=parameters["W_enc"],
        total_variance=TOTAL_VARIANCE,
        dead=dead,
        sparsity_scale=sparsity_scale,
        buffers=architecture.initial_buffers(),
    )
    batch = Batch(x, x, row_weights=row_weights)
    return architecture.step({name: tensor.clone() for name, tensor in parameters.items()}, batch, step)


def weights_of_rows(x, weighs):
    """Return random weights of rows, or None, and the factors of their squared errors."""
    if not weighs:
        return None, 1.0
    weights = torch.rand(len(x), 1, dtype=torch.float64)
    return weights, weights.squeeze(1) ** 2


def check(output, parameters, loss_of):
    """Compare a step's loss and gradients with autograd's of `loss_of(parameters)`."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    loss = loss_of(leaves)
    expected = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert output.loss == pytest.approx(loss.item(), rel=1e-10)
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def pre_activations(p, x):
    return (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]


def keep_topk(pre_acts, k):
    return torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(k, dim=1).indices, 1.0) * pre_acts.relu()


def auxk(p, x, x_hat, dead, k_aux, coefficient):
    residual = (x - x_hat).detach()
    pre_acts = pre_activations(p, x).masked_fill(~dead, -torch.inf)
    chosen = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(min(k_aux, int(dead.sum()))).indices, 1.0)
    e_hat = torch.where(chosen > 0, pre_acts, 0.0).relu() @ p["W_dec"]
    return coefficient * (residual - e_hat).square().sum() / residual.square().sum()


@pytest.mark.parametrize("k", [1, 4, 19])
@pytest.mark.parametrize("bias", [0.0, -2.0])
def test_topk(k, bias):
    """With the lower bias, rows have fewer than k positives: those entries must pass no gradient."""
    architecture, parameters, x = problem(k=k, bias=bias)

    def loss_of(p):
        x_hat = keep_topk(pre_activations(p, x), k) @ p["W_dec"] + p["b_dec"]
        return (x - x_hat).square().sum(1).mean() / TOTAL_VARIANCE

    check(run(architecture, parameters, x), parameters, loss_of)


@pytest.mark.parametrize("n_dead", [1, 5, 12])
@pytest.mark.parametrize("k_aux", [None, 2])
def test_topk_with_auxk(n_dead, k_aux):
    """Dead latents learn from the residual, which is held constant, without the decoder's bias."""
    architecture, parameters, x = problem(k=3, k_aux=k_aux, aux_coefficient=0.4)
    dead = torch.zeros(19, dtype=torch.bool)
    dead[torch.randperm(19)[:n_dead]] = True

    def loss_of(p):
        x_hat = keep_topk(pre_activations(p, x), 3) @ p["W_dec"] + p["b_dec"]
        mse = (x - x_hat).square().sum(1).mean() / TOTAL_VARIANCE
        return mse + auxk(p, x, x_hat, dead, k_aux or 3, 0.4)

    output = run(architecture, parameters, x, dead)
    check(output, parameters, loss_of)
    assert output.gradients["W_enc"][dead].abs().sum() > 0


@pytest.mark.parametrize("bias", [0.0, -3.0])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_standard(bias, scale):
    """Both ways through the loss, dense and, with few latents active, sparse, are the formula."""
    architecture, parameters, x = problem(architecture="standard", l1_coefficient=0.7, bias=bias, batch=40)

    def loss_of(p):
        acts = pre_activations(p, x).relu()
        x_hat = acts @ p["W_dec"] + p["b_dec"]
        penalty = (acts * p["W_dec"].norm(dim=1)).sum(1).mean()
        return (x - x_hat).square().sum(1).mean() + 0.7 * scale * penalty

    output = run(architecture, parameters, x, sparsity_scale=scale)
    assert (output.l0 < 19 / 16) == (bias < 0)
    check(output, parameters, loss_of)


def keep_batch_topk(pre_acts, k):
    lowest = pre_acts.flatten().sort(descending=True).values[k * len(pre_acts) - 1]
    return pre_acts.relu() * (pre_acts >= lowest)


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("n_dead", [0, 5])
def test_batch_topk(k, n_dead):
    """With k = 12 fewer than batch * k are positive."""
    architecture, parameters, x = problem(architecture="batch_topk", k=k, aux_coefficient=0.4, bias=-0.3)
    dead = torch.arange(19) < n_dead

    def loss_of(p):
        x_hat = keep_batch_topk(pre_activations(p, x), k) @ p["W_dec"] + p["b_dec"]
        mse = (x - x_hat).square().sum(1).mean() / TOTAL_VARIANCE
        return mse + (auxk(p, x, x_hat, dead, 3, 0.4) if n_dead else 0)

    output = run(architecture, parameters, x, dead if n_dead else None)
    check(output, parameters, loss_of)
    assert output.l0 <= k


@pytest.mark.parametrize("prefixes", [None, (19,), (1, 5, 19), (2, 3, 4, 19)])
def test_matryoshka_batch_topk(prefixes):
    """The losses of the prefixes are summed, each averaged over rows once."""
    architecture, parameters, x = problem(architecture="matryoshka_batch_topk", k=4, prefix_sizes=prefixes)
    dead = torch.arange(19) >= 14

    def loss_of(p):
        acts = keep_batch_topk(pre_activations(p, x), 4)
        loss = 0
        for size in architecture.prefixes:
            x_hat = acts[:, :size] @ p["W_dec"][:size] + p["b_dec"]
            loss = loss + (x - x_hat).square().sum(1).mean() / TOTAL_VARIANCE
        return loss + auxk(p, x, x_hat, dead, 3, 1 / 32)

    check(run(architecture, parameters, x, dead), parameters, loss_of)


@pytest.mark.parametrize("k", [1, 4])
def test_hierarchical_topk(k):
    architecture, parameters, x = problem(architecture="hierarchical_topk", k=k, bias=-0.5)

    def loss_of(p):
        pre_acts = pre_activations(p, x)
        losses = [
            (x - keep_topk(pre_acts, j) @ p["W_dec"] - p["b_dec"]).square().sum(1).mean() for j in range(1, k + 1)
        ]
        return sum(losses) / (k * TOTAL_VARIANCE)

    check(run(architecture, parameters, x), parameters, loss_of)


@pytest.mark.parametrize("bias", [0.0, -2.0])
def test_gated(bias):
    """Dense, and sparse with few gates open; the auxiliary path trains no decoder."""
    architecture, parameters, x = problem(architecture="gated", l1_coefficient=0.7, bias=bias, batch=40)

    def loss_of(p):
        linear = (x - p["b_dec"]) @ p["W_enc"].T
        gate = linear + p["b_gate"]
        acts = (gate > 0) * (linear * p["r_mag"].exp() + p["b_mag"]).relu()
        x_hat = acts @ p["W_dec"] + p["b_dec"]
        frozen = gate.relu() @ p["W_dec"].detach() + p["b_dec"].detach()
        terms = (x - x_hat).square().sum(1) + (x - frozen).square().sum(1) + 0.7 * gate.relu().sum(1)
        return terms.mean()

    output = run(architecture, parameters, x)
    assert output.l0 > 0
    assert (output.l0 < 19 / 16) == (bias < 0)
    check(output, parameters, loss_of)


class StraightThrough(torch.autograd.Function):
    """H(z - theta) times z, or 1, with the rectangle's estimate of the gradient by theta."""

    @staticmethod
    def forward(ctx, z, theta, epsilon, times_z):
        ctx.save_for_backward(z, theta)
        ctx.epsilon, ctx.times_z = epsilon, times_z
        return (z if times_z else 1.0) * (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.epsilon / 2).to(z.dtype) / ctx.epsilon
        by_theta = -(theta if ctx.times_z else 1.0) * near * g
        return (g * (z > theta) if ctx.times_z else None), by_theta.sum(0), None, None


@pytest.mark.parametrize(("bias", "noise"), [(0.0, 0.3), (-2.5, 0.3)])
@pytest.mark.parametrize("target", [None, 1.5])
@pytest.mark.parametrize("weighs", [False, True])
def test_jumprelu(bias, noise, target, weighs, monkeypatch):
    """The estimator sees pre-activations just below the threshold too, for latents that output zero."""
    monkeypatch.setattr("thresher.train.architectures.jumprelu._BANDWIDTH", 0.1)
    architecture, parameters, x = problem(
        architecture="jumprelu", l0_coefficient=0.6, target_l0=target, bias=bias, noise=noise, batch=60
    )
    epsilon = architecture.bandwidth
    weights, factors = weights_of_rows(x, weighs)

    def loss_of(p):
        z, theta = pre_activations(p, x), p["log_threshold"].exp()
        x_hat = StraightThrough.apply(z, theta, epsilon, True) @ p["W_dec"] + p["b_dec"]
        l0 = StraightThrough.apply(z, theta, epsilon, False).sum(1).mean()
        penalty = 0.6 * (l0 if target is None else (l0 / target - 1) ** 2)
        return ((x - x_hat).square().sum(1) * factors).mean() / 7 + penalty

    output = run(architecture, parameters, x, row_weights=weights)
    below = pre_activations(parameters, x) - parameters["log_threshold"].exp()
    assert ((below < 0) & (below > -epsilon / 2)).any()
    check(output, parameters, loss_of)


@pytest.mark.parametrize(("keys", "fires"), [({}, 6), ({"initial_l0": 250.0}, 12), ({"initial_threshold": 0.7}, None)])
def test_jumprelu_with_a_target_starts_at_it(keys, fires):
    """Each latent fires on target_l0, or initial_l0, / d_sae of the first batch, unless thresholds are given."""
    config = {"architecture": "jumprelu", "l0_coefficient": 1.0, "target_l0": 125.0, **keys}
    architecture, parameters, x = problem(d_sae=2500, batch=120, noise=0.0, **config)
    parameters["b_dec"] += 0.3
    parameters["b_enc"] += torch.rand(2500, dtype=torch.float64)
    # A latent that fires below zero gets no threshold below it.
    parameters["b_enc"][:3] = -20
    architecture.start(parameters, Batch(x, x))
    theta = parameters["log_threshold"].exp()
    if fires is None:
        assert theta.tolist() == pytest.approx([0.7] * 2500)
        return
    counts = (pre_activations(parameters, x) > theta * (1 + 1e-12)).sum(0).tolist()
    assert counts == [0] * 3 + [fires] * 2497
    assert theta.min() > 0


@pytest.mark.parametrize(("initial_l0", "fires"), [(125.0, 6), (1.0, 1)])
def test_gated_starts_at_a_given_l0(initial_l0, fires):
    """Each gate opens on initial_l0 / d_sae of the first batch, at least once; at half of it biases stay zero."""
    config = {"architecture": "gated", "l1_coefficient": 1.0, "initial_l0": initial_l0}
    architecture, parameters, x = problem(d_sae=2500, batch=120, noise=0.0, **config)
    parameters["b_dec"] += 0.3
    architecture.start(parameters, Batch(x + 0.3, x + 0.3))
    gates = x @ parameters["W_enc"].T + parameters["b_gate"]
    assert (gates > 1e-12).sum(0).tolist() == [fires] * 2500
    wide, parameters, x = problem(d_sae=20, batch=120, noise=0.0, **config | {"initial_l0": 19.0})
    wide.start(parameters, Batch(x, x))
    assert parameters["b_gate"].tolist() == [0.0] * 20


def test_gated_starts_with_a_small_encoder():
    """Rows are a tenth of the decoder's, which have unit norm."""
    _, parameters, _ = problem(architecture="gated", l1_coefficient=1.0, d_in=40, d_sae=500, noise=0.0)
    assert parameters["W_enc"].norm(dim=1).tolist() == pytest.approx([0.1] * 500)
    assert parameters["W_dec"].norm(dim=1).tolist() == pytest.approx([1.0] * 500)
    cosine = (parameters["W_enc"] * parameters["W_dec"]).sum(1) / 0.1
    assert cosine.tolist() == pytest.approx([1.0] * 500)


class TanhStraightThrough(torch.autograd.Function):
    """z H(z - exp(t)) with the estimate by t of Anthropic's January 2025 update."""

    @staticmethod
    def forward(ctx, z, t, epsilon):
        ctx.save_for_backward(z, t.exp())
        ctx.epsilon = epsilon
        return z * (z > t.exp())

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.epsilon / 2).to(z.dtype)
        return g * (z > theta), (-theta / ctx.epsilon * near * g).sum(0), None


@pytest.mark.parametrize(("bias", "epsilon"), [(0.0, 2.0), (-2.5, 0.3)])
@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("pre_act", [None, 0.2, 0.0])
@pytest.mark.parametrize("weighs", [False, True])
def test_tanh_jumprelu(bias, epsilon, scale, pre_act, weighs):
    """Dense, and sparse with few latents active; the pre-activation loss pulls all latents, at no dense product."""
    options = {"sparsity_loss": "tanh", "bandwidth": epsilon, "tanh_scale": 3.0, "pre_act_coefficient": pre_act}
    architecture, parameters, x = problem(
        architecture="jumprelu", l0_coefficient=0.6, bias=bias, batch=60, noise=0.1, **options
    )
    weights, factors = weights_of_rows(x, weighs)

    def loss_of(p):
        z, norms = pre_activations(p, x), p["W_dec"].norm(dim=1)
        acts = TanhStraightThrough.apply(z, p["log_threshold"], epsilon)
        error = (x - acts @ p["W_dec"] - p["b_dec"]).square().sum(1) * factors
        sparsity = torch.tanh(3.0 * acts * norms).sum(1)
        below = ((p["log_threshold"].exp() - z).relu() * norms).sum(1)
        return (error + 0.6 * scale * sparsity + (3e-6 if pre_act is None else pre_act) * below).mean()

    output = run(architecture, parameters, x, sparsity_scale=scale, row_weights=weights)
    assert (output.l0 < 19 / 16) == (bias < 0)
    check(output, parameters, loss_of)


def test_tanh_jumprelu_starts_with_the_published_share_of_latents_active():
    """Ten thousand latents a row, where that is fewer than half; each latent fires equally often."""
    architecture = make_architecture(
        make_config(hook_point="h", d_sae=40_000, architecture="jumprelu", sparsity_loss="tanh", l0_coefficient=1.0), 6
    )
    initial = architecture.initial_parameters(torch.Generator().manual_seed(0))
    parameters = {name: tensor.double() for name, tensor in initial.items()}
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)).double() + 1
    architecture.start(parameters, Batch(x, x))
    pre_acts = (x - parameters["b_dec"]) @ parameters["W_enc"].T + parameters["b_enc"]
    fires = pre_acts > parameters["log_threshold"].exp() + 1e-12
    assert fires.sum(0).tolist() == [16] * 40_000


@pytest.mark.parametrize(
    ("keys", "norm"), [({"l1_coefficient": 1.0}, 0.1), ({"target_l0": 4.0}, 1.0), ({"target_l0": 24.0}, 0.25)]
)
@pytest.mark.parametrize("d_out", [None, 30])
def test_standard_starts_larger_where_few_latents_are_to_fire(keys, norm, d_out):
    """Rows have norm 0.1 without a target L0, and with one .15 d_in / target_l0, at most one."""
    places = {"hook_point": "a"} | ({} if d_out is None else {"writes": "b"})
    architecture = make_architecture(make_config(architecture="standard", d_sae=50, **keys, **places), 40, d_out)
    first = architecture.initial_parameters(torch.Generator().manual_seed(0))
    for name in ("W_enc", "W_dec"):
        assert first[name].norm(dim=1).tolist() == pytest.approx([norm] * 50)


@pytest.mark.parametrize(
    ("keys", "norm"),
    [
        ({"architecture": "topk", "k": 4}, 0.1),
        ({"architecture": "standard", "l1_coefficient": 0.7}, 0.1),
        ({"architecture": "standard", "target_l0": 4.0}, 1.0),
        ({"architecture": "jumprelu", "l0_coefficient": 0.3}, 0.1),
        ({"architecture": "jumprelu", "target_l0": 4.0, "initial_threshold": 0.4}, 0.1),
        ({"architecture": "jumprelu", "target_l0": 4.0}, 1.0),
        ({"architecture": "jumprelu", "l0_coefficient": 0.3, "initial_l0": 4.0}, 1.0),
    ],
)
def test_cross_layer_transcoders_start_larger_where_the_first_batch_decides_what_fires(keys, norm):
    """Each latent's decoders together have the norm; an encoder of JumpReLU is scaled for its layer's share of L0."""
    places = {"hook_point": "a", "reads": ("a", "b"), "writes": ("c", "d"), "cross_layer": True}
    first = make_architecture(make_config(d_sae=50, **keys, **places), 80, 60).initial_parameters(torch.Generator())
    to_first, to_second, of_second = first["W_dec"].split(50)
    decoders = [torch.cat([to_first, to_second], dim=1), of_second]
    assert torch.cat([rows.norm(dim=1) for rows in decoders]).tolist() == pytest.approx([norm] * 100)
    scale = first_encoder_scale(2.0, 50, 40) if norm == 1 and keys["architecture"] == "jumprelu" else 1.0
    assert first["W_enc"].norm(dim=1).tolist() == pytest.approx([norm * scale] * 100)
