"""Options of recipes: Multi-TopK, k-annealing, free decoder norms and averaged weights."""

import pytest
import torch

from thresher.shared.core.errors import ConfigError
from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.kernels import kernels_for
from thresher.train.kernels.triton import Triton
from thresher.train.step.fused_step import FusedStep
from thresher.train.step.optimizer import Optimizer
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization

D_IN, D_SAE = 7, 19


def keep_topk(pre_acts, k):
    return torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(k, dim=1).indices, 1.0) * pre_acts.relu()


@pytest.mark.parametrize(("steps_done", "k"), [(0, 7), (3, 6), (5, 4), (10, 2), (99, 2)])
@pytest.mark.parametrize("coefficient", [None, 0.125])
def test_annealed_topk_gradients(steps_done, k, coefficient):
    """4 k is more than there are latents while k is large; AuxK is of the narrow reconstruction."""
    keys = {"k": 2, "k_anneal_steps": 10, "multi_topk_coefficient": coefficient, "aux_coefficient": 0.4}
    architecture = make_architecture(make_config(hook_point="h", d_sae=D_SAE, **keys), D_IN)
    torch.manual_seed(0)
    p = {
        name: tensor.double() + 0.3 * torch.randn(tensor.shape, dtype=torch.float64)
        for name, tensor in architecture.initial_parameters(torch.Generator().manual_seed(0)).items()
    }
    x, dead = torch.randn(13, D_IN, dtype=torch.float64), torch.arange(D_SAE) >= 15
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    pre_acts = (x - leaves["b_dec"]) @ leaves["W_enc"].T + leaves["b_enc"]
    error = x - keep_topk(pre_acts, k) @ leaves["W_dec"] - leaves["b_dec"]
    loss = error.square().sum(1).mean() / 3.7
    if coefficient:
        wide = x - keep_topk(pre_acts, min(4 * k, D_SAE)) @ leaves["W_dec"] - leaves["b_dec"]
        loss = loss + coefficient * wide.square().sum(1).mean() / 3.7
    residual = error.detach()
    e_hat = keep_topk(pre_acts[:, 15:], 3) @ leaves["W_dec"][15:]
    loss = loss + 0.4 * (residual - e_hat).square().sum() / residual.square().sum()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    inputs = StepInput(kernels_for("cpu"), p["W_enc"], 3.7, dead=dead, steps_done=steps_done)
    output = architecture.step(p, Batch(x, x), inputs)
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-10)
    assert float(output.l0) <= k
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_p_annealing_gradients(bias):
    """Dense and sparse; when p falls to 0.6, the penalty at once is what it was with p = 1, and another later."""
    keys = {"architecture": "standard", "l1_coefficient": 0.7, "p_final": 0.2, "p_anneal_steps": 10}
    architecture = make_architecture(make_config(hook_point="h", d_sae=D_SAE, **keys), D_IN)
    torch.manual_seed(0)
    p = {
        name: tensor.double() + 0.3 * torch.randn(tensor.shape, dtype=torch.float64) + bias * (name == "b_enc")
        for name, tensor in architecture.initial_parameters(torch.Generator().manual_seed(0)).items()
    }
    buffers = {name: tensor.double() for name, tensor in architecture.initial_buffers().items()}
    first, second = torch.randn(2, 40, D_IN, dtype=torch.float64)

    def loss_of(leaves, x, power):
        acts = ((x - leaves["b_dec"]) @ leaves["W_enc"].T + leaves["b_enc"]).relu()
        mse = (x - acts @ leaves["W_dec"] - leaves["b_dec"]).square().sum(1).mean()
        sparsity = ((acts * leaves["W_dec"].norm(dim=1) + 1e-3) ** power - 1e-3**power).sum(1).mean()
        return mse, 0.7 * sparsity

    def take(x):
        return architecture.step(
            p, Batch(x, x), StepInput(kernels_for("cpu"), p["W_enc"], 3.7, buffers=buffers, steps_done=5)
        )

    scale = float(loss_of(p, first, 1.0)[1] / loss_of(p, first, 0.6)[1])
    assert float(take(first).terms["sparsity_loss"]) == pytest.approx(float(loss_of(p, first, 1.0)[1]))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    mse, sparsity = loss_of(leaves, second, 0.6)
    loss = mse + scale * sparsity
    expected = torch.autograd.grad(loss, list(leaves.values()))
    output = take(second)
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-9)
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def train_steps(config, n=12):
    kind = Normalization(torch.zeros(D_IN), 1.0, float(D_IN))
    trainer = SaeTrainer(
        config=config,
        d_in=D_IN,
        normalization=kind,
        schedule=Schedule(n, 32, 2, 0.2),
        kernels=kernels_for("cpu"),
        compute_dtype=torch.float32,
    )
    history = []
    for i in range(n):
        x = torch.randn(32, D_IN, generator=torch.Generator().manual_seed(i))
        trainer.step(Batch(x, x))
        history.append({name: tensor.clone() for name, tensor in trainer.parameters.items()})
    return trainer, history


def test_saved_weights_are_the_running_mean():
    config = make_config(hook_point="h", d_sae=D_SAE, k=2, lr=0.01, ema_decay=0.6)
    initial = make_architecture(config, D_IN).initial_parameters(torch.Generator().manual_seed(0))
    trainer, history = train_steps(config)
    mean = initial["W_dec"]
    for done, weights in enumerate(history, 1):
        decay = min(0.6, (1 + done) / (10 + done))
        mean = decay * mean + (1 - decay) * weights["W_dec"]
    torch.testing.assert_close(trainer.to_sae({}).W_dec, mean)
    resumed, _ = train_steps(config, 1)
    resumed.load_state_dict(trainer.state_dict())
    assert torch.equal(resumed.to_sae({}).W_dec, trainer.to_sae({}).W_dec)


def test_decoder_norms_may_be_free():
    """Then neither is the gradient projected nor are the rows normalised: plain Adam."""
    config = make_config(hook_point="h", d_sae=D_SAE, k=2, unit_norm_decoder=False)
    architecture = make_architecture(config, D_IN)
    parameters = architecture.initial_parameters(torch.Generator().manual_seed(0))
    expected = torch.nn.Parameter(parameters["W_dec"].clone())
    expected.grad = torch.randn(D_SAE, D_IN)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    Optimizer(parameters, architecture).step(gradients | {"W_dec": expected.grad.clone()}, 0.1)
    torch.optim.Adam([expected], lr=0.1, betas=architecture.betas, eps=architecture.eps).step()
    torch.testing.assert_close(parameters["W_dec"], expected.data)


def test_weight_decay_does_not_use_the_fused_step():
    """The fused step has no decay; it must not be taken as if it had."""
    kind = Normalization(torch.zeros(D_IN), 1.0, float(D_IN))
    for decay, fuses in ((0.0, True), (0.1, False)):
        config = make_config(hook_point="h", d_sae=D_SAE, k=2, weight_decay=decay)
        trainer = SaeTrainer(
            config=config,
            d_in=D_IN,
            normalization=kind,
            schedule=Schedule(9, 32, 2, 0.2),
            kernels=Triton(),
            compute_dtype=torch.float32,
        )
        assert isinstance(trainer.mode, FusedStep) == fuses


@pytest.mark.parametrize(
    "keys",
    [
        {"architecture": "batch_topk", "k": 2, "k_anneal_steps": 3},
        {"architecture": "standard", "l1_coefficient": 1.0, "multi_topk_coefficient": 0.1},
        {"architecture": "gated", "l1_coefficient": 1.0, "p_final": 0.2},
        {"architecture": "standard", "l1_coefficient": 1.0, "threshold_lr_scale": 2.0},
        {"architecture": "random", "k": 2, "decoder_lr_scale": 2.0},
        {"k": 2, "initial_l0": 2.0},
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "initial_threshold": 1.0, "initial_l0": 2.0},
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "sparsity_loss": "tanh", "initial_l0": 2.0},
        {"architecture": "standard", "l1_coefficient": 1.0, "p_final": 0.2},
        {"architecture": "standard", "l1_coefficient": 1.0, "unit_norm_decoder": True},
        {"architecture": "topk", "k": 4, "target_l0": 3.0},
        {"architecture": "standard", "l1_coefficient": 1.0, "sparsity_loss": "tanh"},
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "tanh_scale": 4.0},
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "pre_act_coefficient": 3e-6},
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "sparsity_loss": "tanh", "target_l0": 3.0},
    ],
)
def test_an_option_without_effect_is_refused(keys):
    with pytest.raises(ConfigError, match=next(reversed(keys))):
        make_architecture(make_config(hook_point="h", d_sae=D_SAE, **keys), D_IN)


@pytest.mark.parametrize(
    ("keys", "k"),
    [
        ({"k": 64}, 64),
        ({"architecture": "batch_topk", "k": 16}, 16),
        ({"k": 4, "k_anneal_steps": 9}, 512),
        ({"architecture": "jumprelu", "target_l0": 64}, 64),
    ],
)
def test_the_first_reconstructions_have_the_best_size(keys, k):
    """Inputs are long in two directions; the best size is found by least squares in float64."""
    d_in, d_sae = 512, 4096
    trained = make_architecture(make_config(hook_point="h", d_sae=d_sae, **keys), d_in)
    p = {name: t.double() for name, t in trained.initial_parameters(torch.Generator().manual_seed(0)).items()}
    x = torch.randn(200, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, :2] *= 20
    x_hat = keep_topk(x @ p["W_enc"].T, k) @ p["W_dec"]
    best = float((x * x_hat).sum() / x_hat.square().sum())
    assert best == pytest.approx(1, rel=0.05)  # exact for wide rows
    norm = p["W_enc"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(norm, norm.mean().expand_as(norm), rtol=1e-6, atol=0)
    torch.testing.assert_close(p["W_enc"] / norm, p["W_dec"])


def test_the_first_scale_is_for_reconstructing_what_is_read():
    """Not where it makes no sense: other outputs than inputs, the random baseline, thresholds given for norm one."""
    jumprelu = {"architecture": "jumprelu", "target_l0": 2, "initial_threshold": 0.3}
    for keys in ({"k": 2, "reads": "h", "writes": "y"}, {"k": 2, "architecture": "random"}, jumprelu):
        trained = make_architecture(make_config(hook_point="h", d_sae=D_SAE, **keys), D_IN)
        W_enc = trained.initial_parameters(torch.Generator().manual_seed(0))["W_enc"]
        torch.testing.assert_close(W_enc.norm(dim=1), torch.ones(D_SAE))
