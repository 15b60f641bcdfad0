"""Steering files of lm-evaluation-harness, against hooks that edit modules' outputs as the harness does."""

from __future__ import annotations

import pytest
import torch

from thresher import Ablate, Add, Clamp, SaeModel
from thresher.evaluate.causal.lm_eval_files import read_lm_eval, write_lm_eval
from thresher.shared.core.errors import ThresherError
from thresher.shared.sae import Sae

from ...tiny_models import WIDTH, build

HOOK = "blocks.1.resid_post"
HEAD = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description,\n"


@pytest.fixture(scope="module")
def gpt2():
    return build("gpt2")


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {"W_enc": draw(WIDTH, 40), "b_enc": draw(40), "W_dec": draw(40, WIDTH), "b_dec": draw(WIDTH)}
    return Sae("topk", tensors, hook_point=HOOK, config={"k": 4})


@pytest.fixture
def tokens():
    return torch.randint(1, 60, (2, 10), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def hooked(model, changes, tokens):
    """Run a model in which a function changes the output of each module of the model without its head."""
    handles = []
    for place, change in changes.items():

        def after(_, __, output, change=change):
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        handles.append(model.base_model.get_submodule(place).register_forward_hook(after))
    logits = model(input_ids=tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def test_a_csv_is_read_as_the_harness_reads_it(gpt2, sae, tokens, tmp_path):
    sae.save(tmp_path / "sparse" / "h.1", format="sparsify")
    sae.save(tmp_path / "sparse" / "h.0.mlp", format="sparsify")
    rows = [f"sparsify,clamp,{tmp_path / 'sparse'},h.1,7,2.5,,,dogs,", f",add,{tmp_path / 'sparse'},h.0.mlp,3,-1.5,,,,"]
    (tmp_path / "steer.csv").write_text(HEAD + "\n".join(rows) + "\n\n")
    v = sae.W_dec[7] / sae.W_dec[7].norm()

    def clamp(x):
        centred = x - sae.b_dec
        return centred + v * (2.5 - (centred * v).sum(-1, keepdim=True)) + sae.b_dec

    expected = hooked(gpt2, {"h.1": clamp, "h.0.mlp": lambda x: x - 1.5 * sae.W_dec[3]}, tokens)
    lm = SaeModel.open(gpt2)
    with lm.steer(read_lm_eval(lm, tmp_path / "steer.csv")):
        torch.testing.assert_close(lm.run(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_written_is_what_the_harness_documents(gpt2, sae, tokens, tmp_path):
    lm = SaeModel.open(gpt2, [sae])
    lm.measure_maxima(tokens)
    latent = int(lm.maxima[HOOK].argmax())
    amount = 2 * float(lm.maxima[HOOK][latent])
    edits = {(HOOK, latent): Add(2.0, unit="max"), (HOOK, 5): Add(-1.0), ("transformer.h.2", sae.W_dec[3]): Clamp(4.0)}
    path = write_lm_eval(lm, edits, tmp_path / "steer.pt")
    content = torch.load(path, weights_only=True)
    assert {place: entry["action"] for place, entry in content.items()} == {"h.1": "add", "h.2": "clamp"}
    added = content["h.1"]["steering_vector"] * content["h.1"]["steering_coefficient"]
    torch.testing.assert_close(added, amount * sae.W_dec[latent] - sae.W_dec[5])
    v = content["h.2"]["steering_vector"]
    v, value = v / v.norm(), content["h.2"]["steering_coefficient"]
    changes = {"h.1": lambda x: x + added, "h.2": lambda x: x + v * (value - (x * v).sum(-1, keepdim=True))}
    expected = hooked(gpt2, changes, tokens)
    for some in (edits, read_lm_eval(lm, path)):
        with lm.steer(some):
            torch.testing.assert_close(lm.run(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_one_line(gpt2, sae, tmp_path):
    sae.save(tmp_path / "sparse" / "h.1", format="sparsify")
    row = f"sparsify,clamp,{tmp_path / 'sparse'},h.1,7,2.5,,,,\n"
    csvs = {
        "no column": "loader,action\nsparsify,add\n",
        "or no row": HEAD,
        "names latent 40": HEAD + row.replace(",7,", ",40,"),
        "feature_index = 'x'": HEAD + row.replace(",7,", ",x,"),
        "the action 'swap'": HEAD + row.replace("clamp", "swap"),
        "the loader 'other'": HEAD + row.replace("sparsify", "other", 1),
        "has a head_index, which": HEAD + row.replace("2.5,,", "2.5,1,"),
        "edits 'h.1' again": HEAD + row + row,
    }
    lm = SaeModel.open(gpt2, [sae])
    cases = []
    for number, (match, content) in enumerate(csvs.items()):
        path = tmp_path / f"{number}.csv"
        path.write_text(content)
        cases.append((match, lambda path=path: read_lm_eval(lm, path)))
    entry = {"steering_vector": torch.ones(WIDTH), "steering_coefficient": 1.0, "action": "add"}
    files = {
        "has no steering_vector": {"h.1": {"action": "add"}},
        "has a head_index": {"h.1": entry | {"head_index": 1}},
        "with a bias": {"h.1": entry | {"bias": torch.ones(WIDTH)}},
        "that is not zero": {"h.1": entry | {"steering_vector": torch.zeros(WIDTH)}},
        "the action 'None'": {"h.1": entry | {"action": None}},
    }
    for number, (match, content) in enumerate(files.items()):
        torch.save(content, tmp_path / f"{number}.pt")
        cases.append((match, lambda number=number: read_lm_eval(lm, tmp_path / f"{number}.pt")))
    out, v = tmp_path / "out.pt", sae.W_dec[3]
    write = lambda edits: lambda: write_lm_eval(lm, edits, out)  # noqa: E731
    cases += [
        ("cannot read", lambda: read_lm_eval(lm, tmp_path / "none.csv")),
        ("no such file", lambda: read_lm_eval(lm, tmp_path / "none.pt")),
        ("expected Add, Orthogonal", write({(HOOK, 3): Ablate()})),
        ("expected Add, Orthogonal", write({(HOOK, 3): Clamp(2.0)})),
        ("edits all tokens", write({(HOOK, 3): Add(2.0, where="active")})),
        ("no module's own output", write({("blocks.1.mlp_in", v): Add(2.0)})),
        ("only additions merge", write({(HOOK, 3): Add(2.0), (HOOK, v): Clamp(1.0)})),
        ("no latent 99", write({(HOOK, 99): Add(2.0)})),
    ]
    for match, action in cases:
        with pytest.raises(ThresherError, match=match) as caught:
            action()
        assert "\n" not in str(caught.value)
    assert not out.exists()
