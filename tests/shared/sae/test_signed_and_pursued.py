"""SAEs whose latents may be negative, and SAEs that choose latents one after another."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from thresher.shared.core.errors import SaeError
from thresher.shared.intervene.sae_model import SaeModel
from thresher.shared.sae import Sae
from thresher.shared.sae.formats.folding import split_signs
from thresher.shared.sae.matching_pursuit import matching_pursuit

D, N, K, HOOK = 8, 24, 3, "blocks.1.resid_post"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(architecture="abstopk", **config):
    W_dec = torch.nn.functional.normalize(draw(N, D), dim=1)
    tensors = {"W_enc": draw(D, N, seed=1), "b_enc": draw(N, seed=2), "W_dec": W_dec, "b_dec": draw(D, seed=3)}
    return Sae(architecture, tensors, hook_point=HOOK, config=({"k": K} if architecture == "abstopk" else {}) | config)


def test_the_largest_by_absolute_value_keep_their_signs():
    sae, x = make(), draw(4, 10, D, seed=4)
    pre_acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).double().numpy()
    expected = np.zeros_like(pre_acts)
    order = np.argsort(-np.abs(pre_acts), axis=-1)[..., :K]
    np.put_along_axis(expected, order, np.take_along_axis(pre_acts, order, -1), -1)
    np.testing.assert_allclose(sae.encode(x), expected, rtol=1e-5, atol=1e-5)
    assert (expected < 0).any(axis=-1).mean() > 0.5
    flat = x.flatten(0, 1)
    top_acts, top_indices = sae.encode_sparse(flat)
    assert top_acts.shape == (40, K)
    dense = torch.zeros(40, N).scatter_(1, top_indices, top_acts)
    torch.testing.assert_close(dense, sae.encode(flat))
    torch.testing.assert_close(sae.decode_sparse(top_acts, top_indices), sae(flat))


def test_a_latent_of_either_sign_is_two_that_are_never_negative():
    sae, x = make(), draw(50, D, seed=4)
    parts = split_signs(sae.parts())
    split = Sae(parts.architecture, parts.tensors, hook_point=HOOK, config=parts.config)
    assert (split.architecture, split.d_sae) == ("topk", 2 * N)
    latents = split.encode(x)
    torch.testing.assert_close(latents[:, :N] - latents[:, N:], sae.encode(x))
    torch.testing.assert_close(split(x), sae(x))


def test_norms_that_choose_are_folded(tmp_path):
    sae = make(rescale_acts_by_decoder_norm=True)
    norms = torch.rand(N, generator=torch.Generator().manual_seed(5)) + 0.5
    sae.W_dec.mul_(norms[:, None])
    folder = sae.save(tmp_path / "sae")
    config, key = (folder / "cfg.json").read_text(), '"rescale_acts_by_decoder_norm": '
    (folder / "cfg.json").write_text(config.replace(f"{key}false", f"{key}true"))
    x = draw(50, D, seed=4)
    weighed = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).double().numpy() * norms.double().numpy()
    kept = np.abs(weighed) >= np.sort(np.abs(weighed), axis=1)[:, -K][:, None]
    x_hat = (weighed * kept / norms.numpy()) @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
    np.testing.assert_allclose(Sae.load(folder)(x), x_hat, rtol=1e-4, atol=1e-5)


def test_what_takes_no_negative_latents_says_so(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=D, n_head=2, n_positions=8, vocab_size=20)).eval()
    said = r"takes latents that are never negative, .*: thresher sae convert SOURCE FOLDER --format sparsify"
    with pytest.raises(SaeError, match=f"SaeModel {said}"):
        SaeModel.open(model, [make()])
    make().save(tmp_path / "layers.1", "sparsify")
    assert SaeModel.open(model, [tmp_path / "layers.1"]).saes[HOOK].d_sae == 2 * N


def by_hand(row, directions, threshold, steps, once):
    """Matching pursuit of one row, in float64, as SAELens states it: sets of chosen latents before and after a step."""
    left, found, before = row.copy(), np.zeros(len(directions)), np.zeros(len(directions), bool)
    for _ in range(steps):
        best = (directions @ left).argmax()
        value = max(directions[best] @ left, 0)
        found[best] += value
        left = left - value * directions[best]
        if (once and np.array_equal(found != 0, before)) or (threshold > 0 and np.linalg.norm(left) < threshold):
            break
        before = found != 0
    return found


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_matching_pursuit_is_its_definition(threshold, limit, once, tmp_path):
    settings = {"residual_threshold": threshold, "max_iterations": limit, "stop_on_duplicate_support": once}
    sae, x = make("matching_pursuit", **settings), draw(2, 30, D, seed=6)
    x[0, 0] = sae.b_dec  # nothing is left from the start
    centred, directions = (x - sae.b_dec).double().numpy(), sae.W_dec.double().numpy()
    expected = [[by_hand(row, directions, threshold, limit or D, once) for row in rows] for rows in centred]
    np.testing.assert_allclose(sae.encode(x), expected, rtol=1e-4, atol=1e-5)
    top_acts, top_indices = sae.encode_sparse(x[0])
    torch.testing.assert_close(sae.decode_sparse(top_acts, top_indices), sae(x[0]))
    assert len({int(n) for n in (sae.encode(x) > 0).sum(-1).unique()}) > 1 or limit
    again = Sae.load(sae.save(tmp_path / "sae"))
    assert again.config.items() >= settings.items()
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again.W_enc, again.W_dec.T)


def test_gradients_of_matching_pursuit_are_those_of_differences():
    rows = draw(3, D, seed=7).double().requires_grad_()
    directions = torch.nn.functional.normalize(draw(N, D).double(), dim=1).requires_grad_()
    options = {"residual_threshold": 0.3, "max_iterations": 4, "stop_on_duplicate_support": True}
    assert torch.autograd.gradcheck(lambda x, w: matching_pursuit(x, w, **options), (rows, directions))
    assert matching_pursuit(rows[:0], directions, **options).shape == (0, N)


def test_what_matching_pursuit_has_not_is_refused():
    sae = make("matching_pursuit")
    with pytest.raises(SaeError, match="has no pre-activations"):
        sae.pre_activations(draw(2, D))
    with pytest.raises(SaeError, match="decoder norms of a matching_pursuit SAE cannot be folded"):
        sae.fold_decoder_norm()
    with pytest.raises(SaeError, match="adds the b_dec that it subtracts"):
        make("matching_pursuit", apply_b_dec_to_input=False)


def test_a_bias_that_is_not_subtracted_is_not_added(tmp_path):
    sae = make("matching_pursuit")
    folder = sae.save(tmp_path / "sae")
    config = (folder / "cfg.json").read_text()
    (folder / "cfg.json").write_text(config.replace('"apply_b_dec_to_input": true', '"apply_b_dec_to_input": false', 1))
    again, x = Sae.load(folder), draw(20, D, seed=8)
    expected = [by_hand(row, sae.W_dec.double().numpy(), 1e-2, D, True) for row in x.double().numpy()]
    np.testing.assert_allclose(again.encode(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again(x), again.encode(x) @ sae.W_dec)
