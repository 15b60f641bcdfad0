"""Each mistake that public SAE code has made has a test that fails when it is made here.

The numbers are those of the docstrings below. Elsewhere: 7 (explained variance per batch, or on scaled activations) in
`tests/evaluate/test_reconstruction.py`, `test_explained_variance_is_pooled_not_averaged_over_blocks` and
`test_a_mean_far_from_zero_does_not_cost_the_variance`; 15 (evaluation on trained tokens) in
`tests/evaluate/test_held_out.py`, `test_blocks_hold_every_usable_held_out_row_once_in_order`, and 10 end to end, with
a kill at any moment, in `tests/train/test_training.py`. The GPU kernels' part of 2, 13 and 14 is in
`tests/train/kernels`. Tests named `..._is_noticed` make the mistake and expect the check to fail.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import thresher.train.architectures.jumprelu as jumprelu_module
import thresher.train.architectures.topk as topk_module
import thresher.train.batches as batches_module
from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.errors import ConfigError
from thresher.train import ShuffledBatches
from thresher.train.architectures import ARCHITECTURES, make_architecture
from thresher.train.architectures.auxk import add_auxk
from thresher.train.architectures.base import Batch, StepInput
from thresher.train.architectures.latents import DenseLatents
from thresher.train.config import SaeConfig
from thresher.train.kernels import kernels_for
from thresher.train.normalization import Normalization, normalization_of
from thresher.train.optimizer import Optimizer
from thresher.train.resampling import resample_dead_latents
from thresher.train.sae_trainer import SaeTrainer, Schedule

D_IN, D_SAE = 6, 16


def sae_config(**keys):
    return SaeConfig(**{"hook_point": "h", "d_sae": D_SAE, "k": 3} | keys)


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
    inputs = StepInput(
        kernels_for("cpu"), parameters["W_enc"], variance, dead=dead, buffers=architecture.initial_buffers()
    )
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
    loss = auxk(gradients, parameters, Batch(x, x), parameters["W_enc"], residual, dead, 4, 1.0)
    assert loss < 1e-20
    assert all(gradient.abs().max() < 1e-9 for gradient in gradients.values())


def test_3_auxk_decodes_without_the_bias():
    check_auxk_reconstructs_the_bare_residual(add_auxk)


def test_3_a_second_bias_is_noticed():
    def biased(gradients, parameters, batch, W_enc, residual, *rest):
        return add_auxk(gradients, parameters, batch, W_enc, residual - parameters["b_dec"], *rest)

    with pytest.raises(AssertionError):
        check_auxk_reconstructs_the_bare_residual(biased)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka_batch_topk", "hierarchical_topk"])
def test_3_auxk_takes_the_residual_as_constant(name):
    """Living latents get from AuxK no gradient at all, nor does b_dec but through the dead encoders."""
    architecture, parameters, x = make(architecture=name, aux_coefficient=5.0)
    dead = torch.arange(D_SAE) >= 10
    parameters["b_enc"][dead] = -1.0
    gradients = step(architecture, parameters, x, dead).gradients
    without = step(make(architecture=name, aux_coefficient=0.0)[0], parameters, x, dead).gradients
    for key in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(gradients[key][~dead], without[key][~dead], rtol=0, atol=0)
    by_encoder = -parameters["W_enc"][dead].T @ (gradients["b_enc"] - without["b_enc"])[dead]
    torch.testing.assert_close(gradients["b_dec"] - without["b_dec"], by_encoder)


def test_4_losses_of_prefixes_are_averaged_over_rows_alone():
    """Where the later prefixes add nothing, three prefixes cost and pull three times what one does."""
    one, parameters, x = make(architecture="matryoshka_batch_topk", prefix_sizes=(D_SAE,))
    three = make(architecture="matryoshka_batch_topk", prefix_sizes=(4, 9, D_SAE))[0]
    parameters["W_dec"][4:] = 0
    dead = torch.arange(D_SAE) >= 12
    once, thrice = (step(architecture, parameters, x, dead) for architecture in (one, three))
    assert thrice.terms["mse_loss"] == pytest.approx(3 * once.terms["mse_loss"])
    assert thrice.terms["auxk_loss"] == pytest.approx(once.terms["auxk_loss"])
    assert once.terms["mse_loss"] == pytest.approx(once.mse / 2.0)


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


@pytest.mark.parametrize("name", ["topk", "standard", "gated", "jumprelu"])
def test_6_resampling_changes_the_trained_tensors(name):
    """The very tensors that the optimizer steps change, in the dead rows alone, and so do their moments."""
    architecture, parameters, x = make(architecture=name, l1_coefficient=1.0, l0_coefficient=1.0, dtype=torch.float32)
    optimizer = Optimizer(parameters, architecture)
    optimizer.step({key: torch.randn_like(tensor) for key, tensor in parameters.items()}, 0.01)
    before = {key: tensor.clone() for key, tensor in parameters.items()}
    dead = torch.arange(D_SAE) % 3 == 0
    error = torch.zeros_like(x)
    error[5:15] = 1.0
    initial = architecture.initial_parameters(torch.Generator().manual_seed(9))
    count = resample_dead_latents(optimizer, initial, dead, x, x, error, torch.Generator().manual_seed(0))
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


def test_8_moments_are_of_all_rows(tmp_path):
    """Batches whose means agree but rows vary, then rows of a hundred times the norm in the last batch."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 8, D_IN, generator=generator) * (1 + 100 * (i == 11)) for i in range(12)]
    with ActivationStoreWriter(tmp_path / "store", {"h": D_IN}, 8, dtype="float32") as writer:
        for part in parts:
            writer.append({"h": part - part.mean((0, 1))})
    store = ActivationStore.open(tmp_path / "store")
    x = np.concatenate([(part - part.mean((0, 1))).double().numpy().reshape(-1, D_IN) for part in parts])
    scale = D_IN**0.5 / np.linalg.norm(x, axis=1).mean()
    normalization = normalization_of(store, "h", "expected_average_only_in")
    assert normalization.scale == pytest.approx(scale, rel=1e-6)
    assert normalization.total_variance == pytest.approx(x.var(0).sum() * scale**2, rel=1e-6)


def stream(array_store, epochs=2, **options):
    """Return a numbered store's rows as a stream gives them, epoch by epoch."""
    rows = torch.arange(96, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()
    store = array_store({"h": rows})
    with ShuffledBatches(store, ["h"], 16, window_bytes=2 * 12 * 4 * 2 * 4, **options) as batches:
        return [[int(row) for _ in range(6) for row in next(batches)["h"][:, 0]] for _ in range(epochs)]


def check_shuffle(array_store):
    first, second = stream(array_store)
    assert sorted(first) == sorted(second) == list(range(96))
    assert first != sorted(first)
    assert first != second
    ranks = [np.argsort(np.argsort(part)).tolist() for part in (first[:48], first[48:], second[:48], second[48:])]
    assert len({tuple(rank) for rank in ranks}) == 4, "the same permutation in two windows or epochs"


def test_9_every_epoch_and_window_has_an_order_of_its_own(array_store):
    check_shuffle(array_store)


@pytest.mark.parametrize("mistake", ["never read", "the same in every window"])
def test_9_an_order_that_does_not_change_is_noticed(array_store, monkeypatch, mistake):
    order_epoch, order_window = batches_module.order_epoch, batches_module.order_window

    def unshuffled_chunks(rows, per_window, seed, epoch):
        order = order_epoch(rows, per_window, seed, 0)
        return order._replace(chunks=np.arange(len(order.chunks)))

    def one_order(rows, seed, epoch, window):
        return np.arange(rows.sum()) if mistake == "never read" else order_window(rows, seed, 0, 0)

    monkeypatch.setattr(batches_module, "order_epoch", unshuffled_chunks)
    monkeypatch.setattr(batches_module, "order_window", one_order)
    with pytest.raises(AssertionError):
        check_shuffle(array_store)


def trainer():
    x = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(3)).double()
    normalization = Normalization(torch.zeros(D_IN), 1.0, float(x.var(0).sum()))
    config = sae_config(architecture="batch_topk", k=1, dead_after_tokens=30, resample_every_tokens=120, lr=0.02)
    return SaeTrainer(config, D_IN, normalization, Schedule(20, 24, 3, 0.2), kernels_for("cpu"), torch.float32)


def train_on(sae_trainer, steps):
    for i in steps:
        x = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(i)) + torch.arange(D_IN)
        sae_trainer.step(Batch(x, x))
    return {name: tensor.clone() for name, tensor in sae_trainer.state_dict().items()}


def test_10_a_resumed_trainer_goes_on_as_if_never_stopped():
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


def test_10_the_stream_goes_on_where_it_was(array_store):
    rows = torch.arange(96, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()
    with (
        ShuffledBatches(array_store({"h": rows}), ["h"], 7) as batches,
        ShuffledBatches(batches.store, ["h"], 7) as other,
    ):
        for _ in range(9):
            next(batches)
        other.load_state_dict(batches.state_dict())
        assert torch.equal(next(batches)["h"], next(other)["h"])


@pytest.mark.parametrize("batch_size", [1, 7, 50, 95, 200])
def test_11_no_row_is_dropped_or_repeated_at_an_end(array_store, batch_size):
    """96 rows are no multiple of the batch, nor of the shards; after two epochs each was given twice."""
    rows = torch.arange(96, dtype=torch.float32)[:, None]
    with ShuffledBatches(array_store({"h": rows}, chunk_rows=7), ["h"], batch_size) as batches:
        seen = torch.cat([next(batches)["h"][:, 0] for _ in range(-(-192 // batch_size))])[:192]
    assert torch.bincount(seen[:96].long()).tolist() == [1] * 96
    assert torch.bincount(seen.long()).tolist() == [2] * 96


def test_12_ranks_share_the_rows_without_overlap_or_rest(array_store):
    """A context held out and some rows masked, over 3 ranks; an uneven batch is refused, not cut."""
    masked = np.arange(112) % 37 == 0
    store = array_store({"h": torch.arange(112.0)[:, None]}, held_out=np.arange(14) == 5, masked=masked)
    usable = np.flatnonzero(store.training_mask())
    ranks = [ShuffledBatches(store, ["h"], 9, rank=rank, world_size=3) for rank in range(3)]
    seen = torch.cat([next(rank)["h"][:, 0] for _ in range(-(-len(usable) // 9)) for rank in ranks])[: len(usable)]
    for rank in ranks:
        rank.close()
    assert sorted(seen.int().tolist()) == usable.tolist()
    with pytest.raises(ConfigError, match="multiple of the 3 ranks"):
        ShuffledBatches(store, ["h"], 10, world_size=3)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_13_equal_steps_are_bitwise_equal(name):
    """Also with another number of threads, which must not change the order of any sum by latent."""
    keys = {"architecture": name, "l1_coefficient": 0.1, "l0_coefficient": 0.1, "d_sae": 64}
    places = {"hook_point_out": "out", "hook_points": ("h", "i")}
    keys |= {key: place for key, place in places.items() if key in ARCHITECTURES[name].required}
    architecture, parameters, _ = make(dtype=torch.float32, **keys)
    x = torch.randn(512, D_IN, generator=torch.Generator().manual_seed(2))
    dead = torch.arange(64) >= 50
    threads, outputs = torch.get_num_threads(), []
    try:
        for n_threads in (1, 1, 2):
            torch.set_num_threads(n_threads)
            outputs.append(step(architecture, {key: t.clone() for key, t in parameters.items()}, x, dead))
    finally:
        torch.set_num_threads(threads)
    for key, gradient in outputs[0].gradients.items():
        assert torch.equal(gradient, outputs[1].gradients[key]), key
        if key != "b_dec":
            torch.testing.assert_close(gradient, outputs[2].gradients[key], rtol=1e-4, atol=1e-6)


def test_14_sums_of_many_terms_are_not_taken_in_bfloat16():
    """1,001 ones: counted in bfloat16 one by one they stop at 256."""
    ones = torch.ones(1, 1001, dtype=torch.bfloat16)
    latents = DenseLatents(ones, torch.float32)
    assert latents.decode(ones, torch.ones(1001, 3)).tolist() == [[1000.0] * 3]
    tall = DenseLatents(ones.T, torch.float32)
    assert tall.sum(ones.T).tolist() == [1001.0]
    assert tall.grad_weights(ones.T, torch.ones(1001, 2)).tolist() == [[1000.0] * 2]


def test_14_values_and_reconstructions_are_float32_where_the_encoder_is_bfloat16():
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
