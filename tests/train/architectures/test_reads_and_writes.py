"""What is read and written, times how latents are chosen: each pair's gradients are autograd's of the formula."""

from types import SimpleNamespace

import pytest
import torch

from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.kernels import kernels_for

VARIANCE, D, D_SAE, ROWS = 3.7, 4, 19, 40

WIRINGS = {
    "sae": {"hook_point": "a"},
    "transcoder": {"reads": "a", "writes": "b"},
    "skip transcoder": {"reads": "a", "writes": "b", "skip": True},
    "crosscoder": {"hook_points": ("a", "b")},
    "two to three": {"reads": ("a", "b"), "writes": ("c", "d", "e")},
    "two to three, skip": {"reads": ("a", "b"), "writes": ("c", "d", "e"), "skip": True},
    "one to itself and another": {"reads": "a", "writes": ("a", "b")},
}
SELECTIONS = {
    "standard": {"architecture": "standard", "l1_coefficient": 0.7},
    "p_annealed": {"architecture": "standard", "l1_coefficient": 0.7, "p_final": 0.5, "p_anneal_steps": 10},
    "gated": {"architecture": "gated", "l1_coefficient": 0.7},
    "jumprelu": {"architecture": "jumprelu", "l0_coefficient": 0.6, "bandwidth": 0.2, "initial_threshold": 0.3},
    "tanh": {
        "architecture": "jumprelu",
        "l0_coefficient": 0.6,
        "sparsity_loss": "tanh",
        "bandwidth": 0.5,
        "tanh_scale": 3.0,
        "pre_act_coefficient": 0.2,
    },
    "topk": {"architecture": "topk", "k": 3},
    "annealed_topk": {"architecture": "topk", "k": 2, "k_anneal_steps": 10, "multi_topk_coefficient": 0.3},
    "batch_topk": {"architecture": "batch_topk", "k": 3},
    "matryoshka_batch_topk": {"architecture": "matryoshka_batch_topk", "k": 3, "prefix_sizes": (2, 7, 19)},
    "hierarchical_topk": {"architecture": "hierarchical_topk", "k": 3},
}
REVIVING = ("topk", "batch_topk", "matryoshka_batch_topk", "hierarchical_topk")
DONE = 5
"""Steps taken before: halfway through annealing."""


def problem(wiring, selection, d_out=D, bias=0.0):
    """Return an architecture, float64 parameters and a batch; each hook point that is written is `d_out` wide."""
    torch.manual_seed(0)
    table = {"hook_point": "a"} | WIRINGS[wiring] | SELECTIONS[selection]
    config = make_config(d_sae=D_SAE, **table)
    n_read, n_written = len(config.wiring.reads), len(config.wiring.writes)
    same = config.wiring.reads == config.wiring.writes
    architecture = make_architecture(config, D * n_read, D * n_read if same else d_out * n_written)
    parameters = {
        name: tensor.double()
        + 0.4 * torch.randn(tensor.shape, dtype=torch.float64)
        + bias * (name in ("b_enc", "b_gate"))
        for name, tensor in architecture.initial_parameters(torch.Generator().manual_seed(0)).items()
    }
    x = torch.randn(ROWS, architecture.d_in, dtype=torch.float64)
    y = None if same else torch.randn(ROWS, architecture.d_out, dtype=torch.float64)
    return architecture, parameters, Batch(x, x, y)


class Formula:
    """The loss of a pair from its definition: dense, by autograd, a target at a time."""

    def __init__(self, wiring, p, batch):
        self.p, self.x, self.y = p, batch.x, batch.x if batch.target is None else batch.target
        self.inputs = self.x - p["b_dec"] if wiring == "sae" else self.x
        writes = WIRINGS[wiring].get("writes", WIRINGS[wiring].get("hook_points", "a"))
        self.n = 1 if isinstance(writes, str) else len(writes)

    def pre_acts(self, bias="b_enc"):
        return self.inputs @ self.p["W_enc"].T + (self.p[bias] if bias else 0)

    def norms(self):
        return sum(part.norm(dim=1) for part in self.p["W_dec"].chunk(self.n, 1))

    def squares(self, acts, W_dec=None, b_dec=None, W_skip=None):
        """Return each row's squared error, summed over targets."""
        p = self.p
        y_hat = acts @ (p["W_dec"] if W_dec is None else W_dec) + (p["b_dec"] if b_dec is None else b_dec)
        if "W_skip" in p:
            y_hat = y_hat + self.x @ (p["W_skip"] if W_skip is None else W_skip).T
        return sum(
            (y - part).square().sum(1) for y, part in zip(self.y.chunk(self.n, 1), y_hat.chunk(self.n, 1), strict=True)
        )

    def auxk(self, acts, dead, k_aux):
        p = self.p
        y_hat = acts @ p["W_dec"] + p["b_dec"] + (self.x @ p["W_skip"].T if "W_skip" in p else 0)
        residual = (self.y - y_hat).detach()
        of_dead = self.pre_acts().masked_fill(~dead, -torch.inf)
        chosen = torch.zeros_like(of_dead).scatter(1, of_dead.topk(min(k_aux, int(dead.sum()))).indices, 1.0)
        missing = residual - torch.where(chosen > 0, of_dead, 0.0).relu() @ p["W_dec"]
        return missing.square().sum() / residual.square().sum() / 32


def of_rows(z, k):
    return torch.zeros_like(z).scatter(1, z.topk(k, dim=1).indices, 1.0) * z.relu()


def of_batch(z, k):
    return z.relu() * (z >= z.flatten().sort(descending=True).values[k * len(z) - 1])


class Jump(torch.autograd.Function):
    """`z H(z - theta)`, or `H(z - theta)`, whose gradient by theta is `-size / epsilon` within the rectangle."""

    @staticmethod
    def forward(ctx, z, theta, epsilon, size, times_z):
        ctx.save_for_backward(z, theta, size)
        ctx.epsilon, ctx.times_z = epsilon, times_z
        return (z if times_z else 1.0) * (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, g):
        z, theta, size = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.epsilon / 2).to(z.dtype) / ctx.epsilon
        return (g * (z > theta) if ctx.times_z else None), -(size * near * g).sum(0), None, None, None


def standard(f, keys):
    acts = f.pre_acts().relu()
    return (f.squares(acts) + 0.7 * (acts * f.norms()).sum(1)).mean()


def p_annealed(f, keys):
    """At step 5 of 10 p is 0.75; the scale is that of the change from p = 1."""
    acts = f.pre_acts().relu()
    weighted = acts * f.norms()

    def powers(p):
        return (((weighted + 1e-3) ** p - 1e-3**p) * (weighted > 0)).sum(1)

    scale = (powers(1.0).sum() / powers(0.75).sum()).detach()
    return (f.squares(acts) + 0.7 * scale * powers(0.75)).mean()


def gated(f, keys):
    linear = f.pre_acts(None)
    gate = linear + f.p["b_gate"]
    acts = (gate > 0) * (linear * f.p["r_mag"].exp() + f.p["b_mag"]).relu()
    frozen = {name: f.p[name].detach() for name in ("W_dec", "b_dec", "W_skip") if name in f.p}
    return (f.squares(acts) + f.squares(gate.relu(), **frozen) + 0.7 * gate.relu().sum(1)).mean()


def jumprelu(f, keys):
    z, theta = f.pre_acts(), f.p["log_threshold"].exp()
    l0 = Jump.apply(z, theta, keys["bandwidth"], torch.ones_like(theta), False).sum(1)
    return (f.squares(Jump.apply(z, theta, keys["bandwidth"], theta, True)) / f.y.shape[1] + 0.6 * l0).mean()


def tanh(f, keys):
    z, theta, norms = f.pre_acts(), f.p["log_threshold"].exp(), f.norms()
    acts = Jump.apply(z, theta, keys["bandwidth"], torch.ones_like(theta), True)
    below = ((theta - z).relu() * norms).sum(1)
    return (f.squares(acts) + 0.6 * torch.tanh(3.0 * acts * norms).sum(1) + 0.2 * below).mean()


def topk(f, keys):
    return f.squares(of_rows(f.pre_acts(), 3)).mean() / VARIANCE


def annealed_topk(f, keys):
    """Halfway from d_in, or d_sae if it is smaller, to 2; and four times as many in the second term."""
    z = f.pre_acts()
    k = round(f.x.shape[1] + (2 - f.x.shape[1]) * DONE / 10)
    return (f.squares(of_rows(z, k)) + 0.3 * f.squares(of_rows(z, min(4 * k, D_SAE)))).mean() / VARIANCE


def batch_topk(f, keys):
    return f.squares(of_batch(f.pre_acts(), 3)).mean() / VARIANCE


def matryoshka_batch_topk(f, keys):
    acts = of_batch(f.pre_acts(), 3)
    return sum(f.squares(acts[:, :n], f.p["W_dec"][:n]).mean() for n in keys["prefix_sizes"]) / VARIANCE


def hierarchical_topk(f, keys):
    z = f.pre_acts()
    return sum(f.squares(of_rows(z, k)).mean() for k in (1, 2, 3)) / (3 * VARIANCE)


LOSSES = {
    function.__name__: function
    for function in (
        *(standard, p_annealed, gated, jumprelu, tanh, topk, annealed_topk, batch_topk),
        *(matryoshka_batch_topk, hierarchical_topk),
    )
}


def check(wiring, selection, d_out, bias, dead=None):
    architecture, parameters, batch = problem(wiring, selection, d_out, bias)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    formula = Formula(wiring, leaves, batch)
    loss = LOSSES[selection](formula, SELECTIONS[selection])
    if dead is not None:
        kept = of_batch if "batch" in selection else of_rows
        loss = loss + formula.auxk(kept(formula.pre_acts(), 3), dead, architecture.k_aux)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    step = StepInput(
        kernels_for("cpu"),
        parameters["W_enc"],
        VARIANCE,
        dead=dead,
        buffers={n: b.double() if selection == "p_annealed" else b for n, b in architecture.initial_buffers().items()},
        steps_done=DONE,
    )
    output = architecture.step({name: tensor.clone() for name, tensor in parameters.items()}, batch, step)
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-10)
    assert output.gradients.keys() == leaves.keys()
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
    return SimpleNamespace(output=output, architecture=architecture)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("bias", [0.0, -1.6])
def test_gradients(wiring, selection, bias):
    """With the lower bias few latents are active, and are sparse; targets are wider than inputs, or not."""
    for d_out in (D, 5):
        found = check(wiring, selection, d_out, bias)
        assert found.output.l0 > 0


@pytest.mark.parametrize("selection", REVIVING)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_dead_latents_learn_from_the_residual_of_what_is_written(wiring, selection):
    dead = torch.arange(D_SAE) >= 12
    found = check(wiring, selection, 5, -0.3, dead)
    assert found.output.gradients["W_enc"][dead].abs().sum() > 0


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_first_parameters(wiring, selection):
    """Decoders start with one norm, encoders as their transpose where widths agree; a skip path starts at zero."""
    for d_out in (D, 5):
        architecture, _, _ = problem(wiring, selection, d_out)
        first = architecture.initial_parameters(torch.Generator().manual_seed(3))
        assert first["W_enc"].shape == (D_SAE, architecture.d_in)
        assert first["W_dec"].shape == (D_SAE, architecture.d_out)
        assert first["b_dec"].tolist() == [0.0] * architecture.d_out
        norms = {"standard": 0.1, "p_annealed": 0.1, "tanh": None}.get(selection, 1.0)
        if norms is not None:
            assert first["W_dec"].norm(dim=1).tolist() == pytest.approx([norms] * D_SAE)
        cosine = torch.nn.functional.cosine_similarity(first["W_enc"], first["W_dec"][:, : architecture.d_in])
        assert (architecture.d_in == architecture.d_out) == (float(cosine.min()) > 0.999)
        assert ("W_skip" in first) == ("skip" in wiring)
        if "skip" in wiring:
            assert first["W_skip"].shape == (architecture.d_out, architecture.d_in)
            assert not first["W_skip"].any()
