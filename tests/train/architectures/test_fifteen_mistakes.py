"""Each mistake that public SAE code has made has a test that fails when it is made here.

8, 9, 11, 12 and the stream's part of 10 are in `test_fifteen_mistakes_of_data.py`. Elsewhere: 7 (explained variance
per batch, or on scaled activations) in `tests/evaluate/metrics/test_reconstruction.py`,
`test_explained_variance_is_pooled_not_averaged_over_blocks` and `test_a_mean_far_from_zero_does_not_cost_the_variance`;
15 (evaluation on trained tokens) in `tests/evaluate/metrics/test_held_out.py`,
`test_blocks_hold_every_usable_held_out_row_once_in_order`, and 10 end to end, with a kill at any moment, in
`tests/train/test_training.py`. The GPU kernels' part of 2, 13 and 14 is in `tests/train/kernels`. Tests named
`..._is_noticed` make the mistake and expect the check to fail.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import thresher.train.architectures.jumprelu as jumprelu_module
import thresher.train.architectures.topk as topk_module
import thresher.train.step.resampling as resampling_module
from thresher.train.architectures import ARCHITECTURES, architectures_using, make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.architectures.matryoshka import MatryoshkaBatchTopK
from thresher.train.architectures.parts.auxk import add_auxk
from thresher.train.architectures.parts.latents import DenseLatents
from thresher.train.kernels import kernels_for
from thresher.train.kernels.cpu import Cpu, topk_of_rows
from thresher.train.step.optimizer import Optimizer
from thresher.train.step.resampling import resample_dead_latents
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization

D_IN, D_SAE = 6, 16


def sae_config(**keys):
    """Return a configuration with those of the keys that its architecture uses."""
    keys = {"hook_point": "h", "d_sae": D_SAE, "k": 3} | keys
    architecture = keys.get("architecture", "topk")
    return make_config(**{key: value for key, value in keys.items() if architecture in architectures_using(key)})


def make(seed=0, dtype=torch.float64, **keys):
    """Return an architecture, noisy parameters and a batch."""
    architecture = make_architecture(sae_config(**keys), D_IN)
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        name: tensor.to(dtype) + 0.3 * torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in architecture.initial_parameters(generator).items()
    }
    return architecture, parameters, torch.randn(24, D_IN, generator=generator).to(dtype)


def step(architecture, parameters, x, dead=None, variance=2.0):
    encoder = parameters.get("W_enc", parameters["W_dec"])
    inputs = StepInput(kernels_for("cpu"), encoder, variance, dead=dead, buffers=architecture.initial_buffers())
    return architecture.step(parameters, Batch(x, x), inputs)


def check_auxk_trains_the_encoder():
    architecture, parameters, x = make()
    parameters["b_enc"][10:] = -50
    dead = torch.arange(D_SAE) >= 10
    parameters["b_enc"][dead] += 50
    gradients = step(architecture, parameters, x, dead).gradients
    without = step(make(aux_coefficient=0.0)[0], parameters, x, dead).gradients
    for name in ("W_enc", "b_enc", "W_dec"):
        assert (gradients[name][dead] - without[name][dead]).abs().sum() > 1e-3, name


def test_1_auxk_trains_the_encoder():
    check_auxk_trains_the_encoder()


def test_1_an_encoder_without_gradient_is_noticed(monkeypatch):
    def decoder_only(gradients, *arguments):
        copies = {name: tensor if name == "W_dec" else tensor.clone() for name, tensor in gradients.items()}
        return add_auxk(copies, *arguments)

    monkeypatch.setattr(topk_module, "add_auxk", decoder_only)
    with pytest.raises(AssertionError, match="W_enc"):
        check_auxk_trains_the_encoder()


def check_latents_that_output_zero_get_no_gradient():
    architecture, parameters, x = make(k=12)
    pre_acts = (x - parameters["b_dec"]) @ parameters["W_enc"].T
    silent = torch.arange(D_SAE) % 2 == 0
    parameters["b_enc"] = torch.where(silent, -pre_acts.amax(0) - 0.01, 0.0)
    output = step(architecture, parameters, x)
    assert not output.fired[silent].any()
    for name in ("W_enc", "b_enc", "W_dec"):
        assert not output.gradients[name][silent].any(), name
    assert output.gradients["W_enc"][~silent].any()


def test_2_latents_that_output_zero_get_no_gradient():
    check_latents_that_output_zero_get_no_gradient()


def test_2_a_missing_relu_mask_is_noticed(monkeypatch):
    monkeypatch.setattr(topk_module, "torch", SimpleNamespace(**vars(torch) | {"where": lambda mask, a, b: a}))
    with pytest.raises(AssertionError, match="W_enc"):
        check_latents_that_output_zero_get_no_gradient()


def check_auxk_reconstructs_the_bare_residual(auxk):
    """Dead latents that decode to the residual have no loss, however large b_dec is."""
    _, parameters, x = make()
    parameters["b_dec"] = torch.full_like(parameters["b_dec"], 7.0)
    dead = torch.arange(D_SAE) < 4
    pre_acts = (x - parameters["b_dec"]) @ parameters["W_enc"][:4].T + parameters["b_enc"][:4]
    residual = pre_acts.relu() @ parameters["W_dec"][:4]
    gradients = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    loss = auxk(gradients, parameters, Batch(x, x), parameters["W_enc"], -residual, dead, 4, 1.0, topk_of_rows, True)
    assert loss < 1e-20
    assert all(gradient.abs().max() < 1e-9 for gradient in gradients.values())


def test_3_auxk_decodes_without_the_bias():
    check_auxk_reconstructs_the_bare_residual(add_auxk)


def test_3_a_second_bias_is_noticed():
    def biased(gradients, parameters, batch, W_enc, error, *rest):
        return add_auxk(gradients, parameters, batch, W_enc, error + parameters["b_dec"], *rest)

    with pytest.raises(AssertionError):
        check_auxk_reconstructs_the_bare_residual(biased)


def check_auxk_takes_the_residual_as_constant(name):
    """AuxK gives live latents no gradient, and b_dec only that through the encoders of dead latents."""
    architecture, parameters, x = make(architecture=name, aux_coefficient=5.0)
    dead = torch.arange(D_SAE) >= 10
    parameters["b_enc"][dead] = -1.0
    gradients = step(architecture, parameters, x, dead).gradients
    without = step(make(architecture=name, aux_coefficient=0.0)[0], parameters, x, dead).gradients
    for key in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(gradients[key][~dead], without[key][~dead], rtol=0, atol=0)
    by_encoder = -parameters["W_enc"][dead].T @ (gradients["b_enc"] - without["b_enc"])[dead]
    torch.testing.assert_close(gradients["b_dec"] - without["b_dec"], by_encoder)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka_batch_topk", "hierarchical_topk"])
def test_3_auxk_takes_the_residual_as_constant(name):
    check_auxk_takes_the_residual_as_constant(name)


def test_3_a_residual_that_is_not_constant_is_noticed(monkeypatch):
    """The loss's gradient by the residual, which an undetached one passes on to the reconstruction and so to b_dec."""

    def undetached(gradients, parameters, batch, W_enc, error, dead, k, coefficient, *rest):
        loss = add_auxk(gradients, parameters, batch, W_enc, error, dead, k, coefficient, *rest)
        gradients["b_dec"] += 2 * coefficient * error.mean(0) / error.square().sum(1).mean()
        return loss

    monkeypatch.setattr(topk_module, "add_auxk", undetached)
    with pytest.raises(AssertionError, match="not close"):
        check_auxk_takes_the_residual_as_constant("topk")


def check_losses_of_prefixes_are_averaged_over_rows_alone():
    """Where the later prefixes add nothing, three prefixes cost and pull three times what one does."""
    one, parameters, x = make(architecture="matryoshka_batch_topk", prefix_sizes=(D_SAE,))
    three = make(architecture="matryoshka_batch_topk", prefix_sizes=(4, 9, D_SAE))[0]
    parameters["W_dec"][4:] = 0
    dead = torch.arange(D_SAE) >= 12
    once, thrice = (step(architecture, parameters, x, dead) for architecture in (one, three))
    assert thrice.terms["mse_loss"] == pytest.approx(3 * once.terms["mse_loss"])
    assert thrice.terms["auxk_loss"] == pytest.approx(once.terms["auxk_loss"])
    assert once.terms["mse_loss"] == pytest.approx(once.mse / 2.0)
    torch.testing.assert_close(thrice.gradients["W_dec"][:4], 3 * once.gradients["W_dec"][:4])


def test_4_losses_of_prefixes_are_averaged_over_rows_alone():
    check_losses_of_prefixes_are_averaged_over_rows_alone()


@pytest.mark.parametrize("mistaken", ["loss", "gradients"])
def test_4_a_mean_over_prefixes_is_noticed(monkeypatch, mistaken):
    def averaged(self, parameters, batch, step, latents, gradients, error, terms, mse):
        n = len(self.prefixes)
        if mistaken == "loss":
            terms = {name: term / n for name, term in terms.items()}
        else:
            gradients = {name: gradient / n for name, gradient in gradients.items()}
        return finish(self, parameters, batch, step, latents, gradients, error, terms, mse)

    finish = MatryoshkaBatchTopK.finish
    monkeypatch.setattr(MatryoshkaBatchTopK, "finish", averaged)
    with pytest.raises(AssertionError):
        check_losses_of_prefixes_are_averaged_over_rows_alone()


def check_jumprelu_counts_entries_below():
    """No latent fires; one lies a quarter of the bandwidth below its threshold and pulls it down."""
    architecture, parameters, _ = make(architecture="jumprelu", k=None, l0_coefficient=0.0)
    parameters = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    epsilon = architecture.bandwidth
    theta = 4 * epsilon
    parameters["log_threshold"] += np.log(theta)
    parameters["W_enc"][0, 0] = theta - epsilon / 4
    parameters["W_dec"][0, 0] = 1.0
    x = torch.zeros(1, D_IN, dtype=torch.float64)
    x[0, 0] = 1.0
    output = step(architecture, parameters, x)
    assert output.l0 == 0
    by_f = 2 * (0 - 1) / D_IN
    expected = -(theta / epsilon) * by_f * theta
    assert float(output.gradients["log_threshold"][0]) == pytest.approx(expected)


def test_5_jumprelu_counts_entries_just_below_the_threshold():
    check_jumprelu_counts_entries_below()


def test_5_an_estimator_fed_with_latents_is_noticed(monkeypatch):
    def fired_only(step, parameters, batch, bias, threshold):
        theta = parameters["log_threshold"].exp()
        return jumprelu_above(step, parameters, batch, bias, theta)

    jumprelu_above = jumprelu_module.above_threshold
    monkeypatch.setattr(jumprelu_module, "above_threshold", fired_only)
    with pytest.raises(AssertionError):
        check_jumprelu_counts_entries_below()


def check_resampling_changes_the_trained_tensors(name, resample):
    """The very tensors that the optimizer steps change, in the dead rows alone, and so do their moments."""
    architecture, parameters, x = make(architecture=name, l1_coefficient=1.0, l0_coefficient=1.0, dtype=torch.float32)
    optimizer = Optimizer(parameters, architecture)
    optimizer.step({key: torch.randn_like(tensor) for key, tensor in parameters.items()}, 0.01)
    before = {key: tensor.clone() for key, tensor in parameters.items()}
    dead = torch.arange(D_SAE) % 3 == 0
    error = torch.zeros_like(x)
    error[5:15] = 1.0
    initial = architecture.initial_parameters(torch.Generator().manual_seed(9))
    count = resample(optimizer, initial, dead, x, x, error, torch.Generator().manual_seed(0))
    assert count == dead.sum()
    candidates = torch.nn.functional.normalize(x[5:15] - before["b_dec"], dim=1)
    directions = torch.nn.functional.normalize(parameters["W_dec"][dead], dim=1)
    assert ((directions @ candidates.T).amax(1) > 1 - 1e-5).all()
    for key, share in (("W_enc", 0.2), ("W_dec", 1.0)):
        norm = before[key][~dead].norm(dim=1).mean() * share
        torch.testing.assert_close(parameters[key][dead].norm(dim=1), norm.expand(count))
    for key, tensor in parameters.items():
        kept = torch.ones(len(tensor), dtype=torch.bool) if key == "b_dec" else ~dead
        assert torch.equal(before[key][kept], tensor[kept])
        if key != "b_dec":
            assert not optimizer.exp_avg[key][dead].any()
            assert not optimizer.exp_avg_sq[key][dead].any()
            assert optimizer.exp_avg[key][~dead].all()


@pytest.mark.parametrize("name", ["topk", "standard", "gated", "jumprelu"])
def test_6_resampling_changes_the_trained_tensors(name):
    check_resampling_changes_the_trained_tensors(name, resample_dead_latents)


@pytest.mark.parametrize("copied", ["parameters", "exp_avg", "exp_avg_sq"])
def test_6_writing_into_a_copy_is_noticed(copied):
    def into_copies(optimizer, *rest):
        copies = {name: tensor.clone() for name, tensor in getattr(optimizer, copied).items()}
        return resample_dead_latents(SimpleNamespace(**vars(optimizer) | {copied: copies}), *rest)

    with pytest.raises(AssertionError):
        check_resampling_changes_the_trained_tensors("topk", into_copies)


def test_6_rows_that_are_not_normalised_are_noticed(monkeypatch):
    functional = SimpleNamespace(normalize=lambda rows, dim: rows)
    nn = SimpleNamespace(functional=functional)
    monkeypatch.setattr(resampling_module, "torch", SimpleNamespace(**vars(torch) | {"nn": nn}))
    with pytest.raises(AssertionError):
        check_resampling_changes_the_trained_tensors("topk", resample_dead_latents)


def trainer():
    x = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(3)).double()
    normalization = Normalization(torch.zeros(D_IN), 1.0, float(x.var(0).sum()))
    config = sae_config(architecture="batch_topk", k=1, dead_after_tokens=30, resample_every_tokens=120, lr=0.02)
    return SaeTrainer(
        config=config,
        d_in=D_IN,
        normalization=normalization,
        schedule=Schedule(20, 24, 3, 0.2),
        kernels=kernels_for("cpu"),
        compute_dtype=torch.float32,
    )


def train_on(sae_trainer, steps):
    for i in steps:
        x = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(i)) + torch.arange(D_IN)
        sae_trainer.step(Batch(x, x))
    return {name: tensor.clone() for name, tensor in sae_trainer.state_dict().items()}


def test_10_a_resumed_trainer_continues_as_if_never_stopped():
    """Nothing that the state holds could be left out; resampling, which draws at random, is part of it."""
    whole = train_on(trainer(), range(12))
    cut = train_on(trainer(), range(4))
    resumed = trainer()
    resumed.load_state_dict(cut)
    after = train_on(resumed, range(4, 12))
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.items())
    fresh = trainer().state_dict()
    for lost in ("tokens_since_fired", "steps_done", "buffers.threshold", "optimizer.exp_avg.W_enc"):
        resumed = trainer()
        resumed.load_state_dict(cut | {lost: fresh[lost]})
        after = train_on(resumed, range(4, 12))
        assert not all(torch.equal(after[name], tensor) for name, tensor in whole.items()), lost


def check_equal_steps_are_bitwise_equal(name, take):
    """Also with another number of threads, which must not change the order of any sum by latent."""
    keys = {"architecture": name, "l1_coefficient": 0.1, "l0_coefficient": 0.1, "d_sae": 64}
    if "transcoder" in name:
        keys |= {"reads": "h", "writes": "out"}
    elif name == "crosscoder":
        keys |= {"hook_points": ("h", "i")}
    architecture, parameters, _ = make(dtype=torch.float32, **keys)
    x = torch.randn(512, D_IN, generator=torch.Generator().manual_seed(2))
    dead = torch.arange(64) >= 50
    threads, outputs = torch.get_num_threads(), []
    try:
        for n_threads in (1, 1, 2):
            torch.set_num_threads(n_threads)
            outputs.append(take(architecture, {key: t.clone() for key, t in parameters.items()}, x, dead))
    finally:
        torch.set_num_threads(threads)
    for key, gradient in outputs[0].gradients.items():
        assert torch.equal(gradient, outputs[1].gradients[key]), key
        if key != "b_dec":
            torch.testing.assert_close(gradient, outputs[2].gradients[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_13_equal_steps_are_bitwise_equal(name):
    check_equal_steps_are_bitwise_equal(name, step)


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_13_sums_in_whatever_order_are_noticed(name):
    """As with float atomics: the same rows are added, each time in another order."""
    generator = torch.Generator().manual_seed(0)

    def in_some_order(architecture, parameters, x, dead):
        return step(architecture, parameters, x[torch.randperm(len(x), generator=generator)], dead)

    with pytest.raises(AssertionError):
        check_equal_steps_are_bitwise_equal(name, in_some_order)


def check_sums_of_many_terms(kind):
    """1,001 ones: counted in bfloat16 one by one they stop at 256."""
    ones = torch.ones(1, 1001, dtype=torch.bfloat16)
    latents = kind(ones, torch.float32)
    assert latents.decode(ones, torch.ones(1001, 3)).tolist() == [[1000.0] * 3]
    tall = kind(ones.T, torch.float32)
    assert tall.sum(ones.T).tolist() == [1001.0]
    assert tall.grad_weights(ones.T, torch.ones(1001, 2)).tolist() == [[1000.0] * 2]


def test_14_sums_of_many_terms_are_not_taken_in_bfloat16():
    check_sums_of_many_terms(DenseLatents)


@pytest.mark.parametrize("where", ["sum", "decode", "grad_weights"])
def test_14_sums_in_bfloat16_are_noticed(where):
    def one_by_one(rows):
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        return total

    def product(self, a, b):
        terms = a[:, :, None] * b.to(a.dtype)[None] if where == "decode" else a.T[:, :, None] * b.to(a.dtype)[None]
        return one_by_one(terms.transpose(0, 1)).to(self.precise)

    made = (lambda self, values: one_by_one(values).to(self.precise)) if where == "sum" else product
    with pytest.raises(AssertionError):
        check_sums_of_many_terms(type("Half", (DenseLatents,), {where: made}))


def check_values_are_float32_where_the_encoder_is_bfloat16():
    architecture, parameters, x = make(dtype=torch.float32, k=12)
    half = x.bfloat16()
    inputs = StepInput(kernels_for("cpu"), parameters["W_enc"].bfloat16(), 2.0)
    low = architecture.step(parameters, Batch(x, half), inputs)
    exact = {name: tensor.double() for name, tensor in parameters.items()}
    bias = parameters["b_enc"] - parameters["W_enc"] @ parameters["b_dec"]
    _, chosen = inputs.kernels.select_topk(half, inputs.W_enc_compute, bias, 12)
    pre_acts = (x.double() - exact["b_dec"]) @ exact["W_enc"].T + exact["b_enc"]
    acts = torch.zeros_like(pre_acts).scatter(1, chosen, pre_acts.gather(1, chosen)).relu()
    mse = (x.double() - acts @ exact["W_dec"] - exact["b_dec"]).square().sum(1).mean()
    assert low.mse == pytest.approx(float(mse), rel=1e-6)


def test_14_values_and_reconstructions_are_float32_where_the_encoder_is_bfloat16():
    check_values_are_float32_where_the_encoder_is_bfloat16()


def test_14_values_in_bfloat16_are_noticed(monkeypatch):
    def rounded(*arguments):
        entries = values_at(*arguments)
        return entries._replace(pre_acts=entries.pre_acts.bfloat16().float())

    values_at = Cpu.values_at
    monkeypatch.setattr(Cpu, "values_at", rounded)
    with pytest.raises(AssertionError):
        check_values_are_float32_where_the_encoder_is_bfloat16()
