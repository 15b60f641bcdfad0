"""Edits in a model's passes, against hooks written here with plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from thresher import Ablate, Add, Clamp, Fires, Orthogonal, ProjectionCap, SaeModel, Scale
from thresher.shared.core.errors import HookPointError, InterventionError, SaeError, ThresherError

from ...tiny_models import build

HOOK = "blocks.1.resid_post"


def hooked(model, module, change, tokens, before=False):
    """Run a model in which `change` acts on what a module returns, or on what it reads."""
    target = model.get_submodule(module)

    def after(_, __, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def first(_, arguments):
        return (change(arguments[0]), *arguments[1:])

    handle = target.register_forward_pre_hook(first) if before else target.register_forward_hook(after)
    try:
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()


def latents_of(sae, x):
    """Return TopK latents, by sorting."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    floor = pre.sort(dim=-1, descending=True).values[..., int(sae.config["k"]) - 1 :][..., :1]
    return torch.where(pre >= floor, pre, 0).clamp_min(0)


EDITS = {
    "clamp": (Clamp(3.0), lambda f, on: torch.full_like(f, 3.0)),
    "range": (Clamp(0.2, 0.5), lambda f, on: f.clamp(0.2, 0.5)),
    "add": (Add(-1.5), lambda f, on: f - 1.5),
    "scale": (Scale(2.5), lambda f, on: 2.5 * f),
    "ablate": (Ablate(), lambda f, on: 0 * f),
    "active": (Clamp(4.0, where="active"), lambda f, on: torch.where(f > 0, 4.0, f)),
    "position": (Clamp(4.0, where=3), lambda f, on: torch.where(on == 3, 4.0, f)),
    "from the end": (Clamp(4.0, where=-2), lambda f, on: torch.where(on == 8, 4.0, f)),
    "list": (Clamp(4.0, where=[1, 5]), lambda f, on: torch.where((on == 1) | (on == 5), 4.0, f)),
    "range of positions": (Clamp(4.0, where=range(2, 9, 3)), lambda f, on: torch.where(on % 3 == 2, 4.0, f)),
    "slice": (Clamp(4.0, where=slice(-4, None, 2)), lambda f, on: torch.where((on == 6) | (on == 8), 4.0, f)),
    "prompt": (Clamp(4.0, where="prompt"), lambda f, on: torch.full_like(f, 4.0)),
    "generated": (Clamp(4.0, where="generated"), lambda f, on: f),
}


@pytest.mark.parametrize("name", EDITS)
@torch.no_grad()
def test_an_edit_adds_the_difference_of_the_decodings(gpt2, make, tokens, name):
    sae, (edit, by_hand) = make(), EDITS[name]
    on = torch.arange(tokens.shape[1]).expand(tokens.shape)

    def change(x):
        f = latents_of(sae, x)
        new = f.clone()
        new[..., 7] = by_hand(f[..., 7], on)
        return x + (new @ sae.W_dec + sae.b_dec) - (f @ sae.W_dec + sae.b_dec)

    lm = SaeModel.open(gpt2, {HOOK: sae})
    assert (lm.run(tokens).latents[HOOK].to_dense()[..., 7] > 0).any()
    with lm.steer({(HOOK, 7): edit}):
        run = lm.run(tokens)
    expected = hooked(gpt2, "transformer.h.1", change, tokens)
    torch.testing.assert_close(run.logits, expected, rtol=1e-10, atol=1e-10)
    clean = gpt2(input_ids=tokens, use_cache=False).logits
    assert (name != "generated") == bool((run.logits - clean).abs().max() > 1e-3)
    torch.testing.assert_close(lm.run(tokens).logits, clean, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@torch.no_grad()
def test_only_the_edited_latents_are_encoded_where_others_do_not_matter(gpt2, make, tokens, architecture):
    first, sae = make(architecture, reads="blocks.0.resid_post", seed=5), make(architecture)

    def latents(sae, x):
        pre = (x - sae.b_dec) @ sae.W_enc
        if architecture == "gated":
            return torch.where(pre + sae.b_gate > 0, (pre * sae.r_mag.exp() + sae.b_mag).clamp_min(0), 0)
        pre = pre + sae.b_enc
        return torch.where(pre > sae.threshold, pre, 0) if architecture == "jumprelu" else pre.clamp_min(0)

    states = gpt2(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    fires = latents(first, states[1]) > 0
    counts = fires.sum((0, 1))
    other = int(((counts > 3) & (counts < 17)).nonzero()[0])

    def change(x):
        f = latents(sae, x)
        new = f.clone()
        new[..., 7] = torch.where(f[..., 7] > 0, 4.0, 0)
        new[..., 9] = torch.where(fires[..., other], f[..., 9] - 2.0, f[..., 9])
        return x + (new - f) @ sae.W_dec

    expected = hooked(gpt2, "transformer.h.1", change, tokens)
    edits = {
        (HOOK, 7): Clamp(4.0, where="active"),
        (HOOK, 9): Add(-2.0, where=Fires("blocks.0.resid_post", other)),
    }
    lm = SaeModel.open(gpt2, [first, sae])
    lengths = torch.full((len(tokens),), tokens.shape[1])
    with lm.steer(edits):
        logits, splicer = lm.forward(tokens, lengths)
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lm.run(tokens).logits, expected, rtol=1e-10, atol=1e-10)
    assert [site.clean[0].values.shape[1] for site in splicer.sites] == [1, 2]


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_an_edit_of_a_latent_of_normalised_rows_is_scaled_back(gpt2, make, tokens, norm):
    sae = make(norm=norm)

    def statistics(x):
        if norm == "layer_norm":
            mean = x.sum(-1, keepdim=True) / x.shape[-1]
            deviation = ((x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
            return mean, deviation, deviation + 1e-5
        scale = x.square().mean(-1, keepdim=True).sqrt()
        return 0, scale, scale

    def change(x, edited=lambda f: torch.full_like(f, 3.0), error=True):
        mean, scale, divisor = statistics(x)
        f = latents_of(sae, (x - mean) / divisor)
        new = f.clone()
        new[..., 7] = edited(f[..., 7])
        x_hat, clean = ((g @ sae.W_dec + sae.b_dec) * scale + mean for g in (new, f))
        return x + x_hat - clean if error else x_hat

    lm = SaeModel.open(gpt2, {HOOK: sae})
    with lm.steer({(HOOK, 7): Clamp(3.0)}):
        run = lm.run(tokens)
    expected = hooked(gpt2, "transformer.h.1", change, tokens)
    torch.testing.assert_close(run.logits, expected, rtol=1e-10, atol=1e-10)
    clean = lm.run(tokens)
    assert torch.equal(clean.logits, gpt2(input_ids=tokens, use_cache=False).logits)
    with lm.steer({(HOOK, 7): Scale(1.0)}):
        assert torch.equal(lm.run(tokens).logits, clean.logits)
    x = []
    hooked(gpt2, "transformer.h.1", lambda y: x.append(y) or y, tokens)
    torch.testing.assert_close(clean.errors[HOOK], x[0] - change(x[0], lambda f: f, error=False))
    with SaeModel.open(gpt2, {HOOK: sae}, error="drop").steer({(HOOK, 7): Clamp(3.0)}) as without:
        dropped = hooked(gpt2, "transformer.h.1", lambda y: change(y, error=False), tokens)
        torch.testing.assert_close(without.run(tokens).logits, dropped, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_edits_of_projections_and_of_directions(gpt2, make, tokens):
    sae = make()
    v = sae.W_dec[7] / sae.W_dec[7].norm()
    lm = SaeModel.open(gpt2, {HOOK: sae})
    cases = {
        Orthogonal(0.25): lambda p: 0.25 * p,
        ProjectionCap(-0.1, 0.2): lambda p: p.clamp(-0.1, 0.2),
    }
    for edit, by_hand in cases.items():
        expected = hooked(gpt2, "transformer.h.1", lambda x: x + (by_hand(x @ v) - x @ v)[..., None] * v, tokens)  # noqa: B023
        for target in (7, 3 * sae.W_dec[7]):
            with lm.steer({(HOOK, target): edit}):
                torch.testing.assert_close(lm.run(tokens).logits, expected, rtol=1e-9, atol=1e-9)
    with SaeModel.open(gpt2).steer({("blocks.2.hook_attn_out", sae.W_dec[7]): Add(2.0)}) as plain:
        expected = hooked(gpt2, "transformer.h.2.attn", lambda x: x + 2 * v, tokens)
        torch.testing.assert_close(plain.run(tokens).logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_an_edit_where_another_latent_fires(gpt2, make, tokens):
    first, sae = make(reads="blocks.0.resid_post", seed=5), make()
    lm = SaeModel.open(gpt2, [first, sae])
    above = lm.run(tokens).latents["blocks.0.resid_post"].to_dense() > 0.1
    latent = int(((above.sum((0, 1)) > 3) & (above.sum((0, 1)) < 12)).nonzero()[0])
    on = above[..., latent].nonzero().tolist()
    with lm.steer({(HOOK, 7): Add(2.0, where=Fires("blocks.0.resid_post", latent, above=0.1))}):
        run = lm.run(tokens)
    change = torch.zeros(*tokens.shape, sae.d_in, dtype=torch.float64)
    for text, position in on:
        change[text, position] = 2 * sae.W_dec[7]
    expected = hooked(gpt2, "transformer.h.1", lambda x: x + change, tokens)
    torch.testing.assert_close(run.logits, expected, rtol=1e-9, atol=1e-9)
    late = {("blocks.0.resid_post", 1): Add(2.0, where=Fires(HOOK, 3))}
    with lm.steer(late), pytest.raises(InterventionError, match="reaches only after the edit"):
        lm.run(tokens)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "granite", "falcon", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_nothing_changes_a_bit_unless_a_latent_does(make, tokens, kind, dtype):
    model = build(kind).to(dtype)
    names = ["blocks.1.resid_post", "blocks.2.attn_out", "blocks.3.resid_pre"]
    names += ["blocks.0.mlp_out"] + ([] if kind == "falcon" else ["blocks.2.resid_mid", "blocks.1.mlp_in_normalized"])
    saes = {name: make(reads=name, seed=i).float() for i, name in enumerate(names)}
    clean = model(input_ids=tokens, use_cache=False).logits
    lm = SaeModel.open(model, saes)
    assert torch.equal(lm.run(tokens).logits, clean)
    # A latent set to what it is, and an edit where it does not act.
    with lm.steer({(name, 7): Scale(1.0) for name in names} | {(names[0], 8): Clamp(9.0, where=99)}):
        assert torch.equal(lm.run(tokens).logits, clean)
    for name in names:
        with lm.steer({(name, 7): Add(50.0, where=6)}):
            run = lm.run(tokens)
        assert torch.equal(run.logits[:, :6], clean[:, :6])
        assert not torch.equal(run.logits[:, 6:], clean[:, 6:])


@torch.no_grad()
def test_without_the_error_the_reconstruction_takes_the_place(gpt2, make, tokens):
    sae = make()

    def change(x):
        f = latents_of(sae, x)
        f[..., 7] = 3.0
        return f @ sae.W_dec + sae.b_dec

    with SaeModel.open(gpt2, {HOOK: sae}, error="drop").steer({(HOOK, 7): Clamp(3.0)}) as lm:
        run = lm.run(tokens)
    torch.testing.assert_close(run.logits, hooked(gpt2, "transformer.h.1", change, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["jumprelu_transcoder", "topk_skip_transcoder"])
@torch.no_grad()
def test_a_transcoder_takes_the_place_of_its_mlp(gpt2, make, tokens, architecture):
    sae = make(architecture, reads="blocks.2.mlp_in", writes="blocks.2.hook_mlp_out")
    mlp, seen = gpt2.transformer.h[2].mlp, []
    handle = mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    clean, replaced = SaeModel.open(gpt2, [sae]), SaeModel.open(gpt2, [sae], error="drop")
    seen.clear()
    run = replaced.run(tokens)
    handle.remove()
    expected = hooked(gpt2, "transformer.h.2.mlp", lambda y: sae(seen[0]), tokens)
    torch.testing.assert_close(run.logits, expected, rtol=1e-9, atol=1e-9)
    run = clean.run(tokens)
    name = "blocks.2.mlp_in"
    torch.testing.assert_close(run.errors[name], gpt2.transformer.h[2].mlp(seen[0]) - sae(seen[0]))
    with clean.steer({(name, 4): Add(2.0)}):
        expected = hooked(gpt2, "transformer.h.2.mlp", lambda y: y + 2 * sae.W_dec[4], tokens)
        torch.testing.assert_close(clean.run(tokens).logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_crosscoder_acts_at_all_its_hook_points(gpt2, make, tokens):
    names = ["blocks.0.resid_post", "blocks.2.resid_post"]
    sae = make("standard", reads=names)
    states = gpt2(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    f = (torch.cat([states[1], states[3]], dim=-1) @ sae.W_enc + sae.b_enc).relu()
    lm = SaeModel.open(gpt2, [sae])
    key = " + ".join(names)
    torch.testing.assert_close(lm.run(tokens).latents[key].to_dense(), f)
    torch.testing.assert_close(lm.run(tokens).errors[key], torch.cat([states[1], states[3]], dim=-1) - sae.decode(f))
    change = ((1.5 - f[..., 7])[..., None] * sae.W_dec[7]).chunk(2, dim=-1)
    inner = gpt2.transformer.h[0].register_forward_hook(lambda _, __, y: y + change[0])
    expected = hooked(gpt2, "transformer.h.2", lambda y: y + change[1], tokens)
    inner.remove()
    with lm.steer({(key, 7): Clamp(1.5)}):
        torch.testing.assert_close(lm.run(tokens).logits, expected, rtol=1e-9, atol=1e-9)
        cached = lm.generate_tokens(tokens, 4, temperature=0)
        sequence = tokens
        for _ in range(4):
            sequence = torch.cat([sequence, lm.run(sequence).logits[:, -1:].argmax(-1)], dim=1)
    assert cached == sequence[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_a_cross_layer_transcoder_writes_to_all_later_layers(gpt2, make_cross_layer, tokens, skip):
    sae = make_cross_layer(skip=skip)
    lm = SaeModel.open(gpt2, [sae])
    (name,) = lm.saes
    assert torch.equal(lm.run(tokens).logits, gpt2(input_ids=tokens, use_cache=False).logits)
    handles = [
        gpt2.transformer.h[i].mlp.register_forward_hook(lambda _, __, y, i=i: y + 0.7 * sae.W_dec_1[5, i - 1])
        for i in (1, 2, 3)
    ]
    expected = gpt2(input_ids=tokens, use_cache=False).logits
    [handle.remove() for handle in handles]
    with lm.steer({(name, 20 + 5): Add(0.7)}):
        torch.testing.assert_close(lm.run(tokens).logits, expected, rtol=1e-9, atol=1e-9)
    # In place of the MLPs, layer by layer, each reading the changed model.
    seen = {}
    handles = []
    for i in range(4):
        mlp = gpt2.transformer.h[i].mlp
        handles.append(mlp.register_forward_pre_hook(lambda _, a, i=i: seen.__setitem__(i, sae.encode_layer(i, a[0]))))

        def write(_, arguments, y, i=i):
            skipped = arguments[0] @ getattr(sae, f"W_skip_{i}").T if skip else 0
            decoded = sum(seen[j] @ getattr(sae, f"W_dec_{j}")[:, i - j] for j in range(i + 1))
            return decoded + getattr(sae, f"b_dec_{i}") + skipped

        handles.append(mlp.register_forward_hook(write))
    expected = gpt2(input_ids=tokens, use_cache=False).logits
    [handle.remove() for handle in handles]
    run = SaeModel.open(gpt2, [sae], error="drop").run(tokens)
    torch.testing.assert_close(run.logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.latents[name].to_dense(), torch.cat([seen[i] for i in range(4)], dim=-1))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_generation_with_a_cache_and_padding_is_that_of_plain_passes(make, kind):
    lm = SaeModel.open(build(kind).double(), {HOOK: make()})
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 60, (n,), generator=generator).tolist() for n in (9, 3, 6)]
    edits = {(HOOK, 7): Add(60.0, where="generated"), (HOOK, 9): Add(2.0, where=1), (HOOK, 3): Add(40.0, where=-1)}
    with lm.steer(edits):
        batched = lm.generate_tokens(prompts, 6, temperature=0)
        assert batched == lm.generate_tokens(prompts, 6, temperature=0, use_cache=False)
    for prompt, found in zip(prompts, batched, strict=True):
        ids = list(prompt)
        for _ in range(6):
            last = len(prompt)
            at = {(HOOK, 7): Add(60.0, where=slice(last, None)), (HOOK, 9): Add(2.0, where=1)}
            with lm.steer(at | {(HOOK, 3): Add(40.0, where=last - 1)}):
                ids.append(int(lm.run([ids]).logits[0, -1].argmax()))
        new = [*ids[len(prompt) :], 0]
        assert found == new[: new.index(0)]
    clean = lm.generate_tokens(prompts, 6, temperature=0)
    assert clean != batched


@torch.no_grad()
def test_sampling_repeats_with_a_seed_and_leaves_the_random_state(gpt2, make):
    lm = SaeModel.open(gpt2, {HOOK: make()})
    state = torch.random.get_rng_state()
    first = lm.generate_tokens([[5, 6], [7, 8, 9]], 8, n=3, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == lm.generate_tokens([[5, 6], [7, 8, 9]], 8, n=3, seed=4)
    assert len(first) == 6
    assert len({tuple(ids) for ids in first[:3]}) > 1


@torch.no_grad()
def test_strengths_in_multiples_of_the_maximum(gpt2, make, tokens):
    lm = SaeModel.open(gpt2, {HOOK: make()})
    with (
        pytest.raises(InterventionError, match="maxima of the latents"),
        lm.steer({(HOOK, 7): Clamp(2.0, unit="max")}),
    ):
        pass
    lm.measure_maxima(tokens)
    maxima = lm.run(tokens).latents[HOOK].to_dense().amax((0, 1))
    torch.testing.assert_close(lm.maxima[HOOK].double(), maxima, rtol=1e-6, atol=1e-6)
    with lm.steer({(HOOK, 7): Clamp(2.0, unit="max")}):
        run = lm.run(tokens).latents[HOOK].to_dense()[..., 7]
    torch.testing.assert_close(run, torch.full_like(run, 2 * float(lm.maxima[HOOK][7])))


def test_what_does_not_fit_is_one_line(gpt2, make, tokens):
    sae = make()
    lm = SaeModel.open(gpt2, {HOOK: sae})

    def steer(target, edit):
        with lm.steer({target: edit}):
            pass

    cases = [
        (HookPointError, "no latent 48", lambda: steer((HOOK, 48), Add(1.0))),
        (HookPointError, "no SAE at 'blocks.0.resid_post'", lambda: steer(("blocks.0.resid_post", 1), Add(1.0))),
        (HookPointError, "no hook point", lambda: SaeModel.open(gpt2, {"blocks.9.resid_post": make(reads="")})),
        (SaeError, "was trained at", lambda: SaeModel.open(gpt2, {"blocks.0.resid_post": sae})),
        (SaeError, "reads 20 channels", lambda: SaeModel.open(gpt2, [make(width=20)])),
        (InterventionError, "longer than the model's context of 64", lambda: lm.run([[1] * 65])),
        (InterventionError, "shorten it, or lower max_new_tokens", lambda: lm.generate_tokens([[1] * 60], 5)),
        (InterventionError, "is empty", lambda: lm.run([[]])),
        (InterventionError, "without a tokenizer", lambda: lm.run("text")),
        (InterventionError, "where is 'somewhere'", lambda: Add(1.0, where="somewhere")),
        (InterventionError, "must be a vector", lambda: steer((HOOK, torch.ones(3)), Add(1.0))),
        (InterventionError, "lower bound", lambda: Clamp(2.0, 1.0)),
        (InterventionError, "error is 'none'", lambda: SaeModel.open(gpt2, [sae], error="none")),
        (HookPointError, "no latent 99", lambda: steer((HOOK, 1), Add(1.0, where=Fires(HOOK, 99)))),
    ]
    for kind, match, action in cases:
        with pytest.raises(kind, match=match) as caught:
            action()
        assert isinstance(caught.value, ThresherError)
        assert "\n" not in str(caught.value)
