"""Every format that is written: read again it computes the same, and written again it has the same bytes."""

import json

import numpy as np
import pytest
import torch

from thresher.shared.core.errors import SaeError
from thresher.shared.sae import Sae
from thresher.shared.sae.formats import FORMATS
from thresher.shared.sae.formats.folding import NotExactError

AUTOENCODERS = ("standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit")
TRANSCODERS = tuple(
    f"{selection}{skip}transcoder" for selection in ("", "topk_", "jumprelu_", "gated_") for skip in ("", "skip_")
)
HELD = {
    "saelens": AUTOENCODERS + TRANSCODERS,
    "sparsify": ("topk", "abstopk", "topk_transcoder", "topk_skip_transcoder"),
    "dictionary_learning": AUTOENCODERS[:-1],
    "gemma-scope": ("standard", "jumprelu", "gated", "transcoder", "jumprelu_transcoder", "gated_transcoder"),
    "gemma-scope-2": ("standard", "jumprelu", "gated", *(name for name in TRANSCODERS if "topk" not in name)),
    "circuit-tracer": ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
    "llamascopium": ("standard", "jumprelu", "topk", "abstopk", "transcoder", "jumprelu_transcoder", "topk_transcoder"),
}
CASES = [(name, architecture) for name, held in HELD.items() for architecture in held]


def reference(sae, x):
    """Return the reconstruction in float64, from the definition of each selection."""
    t = {name: value.detach().double().numpy() for name, value in sae.named_parameters()}
    raw = x = x.double().numpy()
    mean, scale = 0, 1
    if sae.normalize_activations == "layer_norm":
        mean, scale = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        x = (x - mean) / (scale + 1e-5)
    elif sae.normalize_activations == "constant_norm_rescale":
        scale = np.sqrt((x**2).mean(1, keepdims=True))
        x = x / scale
    centred = x - t["b_dec"] if sae.apply_b_dec_to_input else x
    inside = centred @ t["W_enc"]
    if sae.selection == "matching_pursuit":
        latents = pursued(centred, t["W_dec"], len(t["b_dec"]), 1e-2)
    elif sae.selection == "gated":
        latents = (inside * np.exp(t["r_mag"]) + t["b_mag"]).clip(0) * (inside + t["b_gate"] > 0)
    else:
        pre_acts = inside + t["b_enc"]
        latents = pre_acts if sae.selection == "abstopk" else pre_acts.clip(0)
        if sae.selection == "abstopk":
            sizes = np.abs(pre_acts)
            latents = latents * (sizes >= np.sort(sizes, axis=1)[:, -sae.config["k"]][:, None])
        if sae.selection == "jumprelu":
            latents = latents * (pre_acts > t["threshold"])
        if sae.selection == "topk":
            latents = latents * (pre_acts >= np.sort(pre_acts, axis=1)[:, -sae.config["k"]][:, None])
    skipped = raw @ t["W_skip"].T if "W_skip" in t else 0
    y = latents @ t["W_dec"] + t["b_dec"]
    return (y * scale + mean if sae.wiring_kind == "sae" else y) + skipped


def pursued(rows, directions, steps, threshold):
    """Return the latents of matching pursuit, row by row: until little is left, or a direction is chosen again."""
    latents = np.zeros((len(rows), len(directions)))
    for row, found in zip(rows.copy(), latents, strict=True):
        for _ in range(steps):
            products = directions @ row
            best = products.argmax()
            again = found[best] != 0 or products[best] <= 0
            found[best] += max(products[best], 0)
            row -= max(products[best], 0) * directions[best]
            if again or np.linalg.norm(row) < threshold:
                break
    return latents


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded(folder):
    """Load what was written; a set of circuit-tracer is loaded by the file of its layer."""
    layers = sorted(folder.glob("layer_*.safetensors"))
    return Sae.load(layers[0] if layers else folder)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_what_is_written_computes_the_same(name, architecture, subtracts, make_sae, rows, tmp_path):
    if ("transcoder" in architecture and subtracts) or (architecture == "matching_pursuit" and not subtracts):
        return
    sae, x = make_sae(architecture, apply_b_dec_to_input=subtracts), rows()
    folder = sae.save(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_4" / "sae", name)
    again = loaded(folder)
    expected = reference(sae, x)
    np.testing.assert_allclose(again(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert again.format == name
    if name != "gemma-scope":
        assert again.reads == sae.reads
        assert again.writes == sae.writes
    written = files(folder)
    again.save(tmp_path / "again", name)
    assert files(tmp_path / "again") == written


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", [fmt.name for fmt in FORMATS if fmt.write is not None and fmt.name != "thresher"])
def test_normalisation_of_rows_is_written_or_refused(name, kind, make_sae, rows, tmp_path):
    states = name == "saelens" or (name == "llamascopium" and kind == "constant_norm_rescale")
    for architecture in HELD[name]:
        sae, x, folder = make_sae(architecture, normalize_activations=kind), 3 * rows() + 0.5, tmp_path / architecture
        np.testing.assert_allclose(sae(x).detach().numpy(), reference(sae, x), rtol=1e-4, atol=1e-4)
        if not states or (name == "llamascopium" and sae.wiring_kind == "transcoder"):
            with pytest.raises(
                SaeError, match=r"cannot state that each row is normalised|by the norm of its own target"
            ):
                sae.save(folder / "sae", name)
            assert not (folder / "sae").exists()
            continue
        again = Sae.load(sae.save(folder / "sae", name))
        assert again.normalize_activations == kind
        np.testing.assert_allclose(again(x).detach().numpy(), reference(sae, x), rtol=1e-4, atol=1e-4)
        again.save(folder / "again", name)
        assert files(folder / "again") == files(folder / "sae")
    if name == "saelens":
        config = json.loads((folder / "sae" / "cfg.json").read_text())
        (folder / "sae" / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "none"}))
        assert Sae.load(folder / "sae").normalize_activations == "none"


def test_rows_are_needed_to_decode_latents_of_normalised_rows(make_sae, rows):
    sae, x = make_sae("topk", normalize_activations="layer_norm"), rows()
    top_acts, top_indices = sae.encode_sparse(x)
    torch.testing.assert_close(sae.decode_sparse(top_acts, top_indices, x), sae(x))
    with pytest.raises(SaeError, match=r"can be decoded only with the rows that were encoded: decode\(latents, x\)"):
        sae.decode(sae.encode(x))
    still = make_sae("standard", normalize_activations="constant_norm_rescale")
    assert torch.equal(still(torch.zeros(2, 8)), torch.zeros(2, 8))
    with pytest.raises(SaeError, match="normalize_activations is 'batch', expected one of: none, layer_norm"):
        make_sae("topk", normalize_activations="batch")


@pytest.mark.parametrize("name", [fmt.name for fmt in FORMATS if fmt.write is not None])
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(name, make_sae, make_cross_layer, tmp_path):
    held = HELD.get(name, ())
    for architecture in AUTOENCODERS + TRANSCODERS:
        if architecture in held or name == "thresher":
            continue
        with pytest.raises(SaeError):
            make_sae(architecture).save(tmp_path / "sae", name)
        assert not (tmp_path / "sae").exists()


def test_thresholds_are_not_taken_for_the_k_largest(make_sae, tmp_path):
    with pytest.raises(NotExactError, match="--approximate"):
        make_sae("jumprelu").save(tmp_path / "sae", "sparsify")
    with pytest.raises(NotExactError, match="--approximate"):
        make_sae("topk").save(tmp_path / "sae", "gemma-scope")
    with pytest.raises(SaeError, match="no format 'onnx' can be written; expected one of: thresher,"):
        make_sae("topk").save(tmp_path / "sae", "onnx")


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("name", ["thresher", "circuit-tracer", "llamascopium", "gemma-scope-2"])
def test_cross_layer_transcoders_go_from_format_to_format(name, activation, make_cross_layer, rows, tmp_path):
    sae, x = make_cross_layer(activation), rows(24)
    again = Sae.load(sae.save(tmp_path / "clt" / "sae", name))
    assert again.format == name
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    assert (again.reads, again.writes) == (sae.reads, sae.writes)
    again.save(tmp_path / "clt" / "again", name)
    assert files(tmp_path / "clt" / "again") == files(tmp_path / "clt" / "sae")


@pytest.mark.parametrize("name", ["thresher", "gemma-scope-2"])
def test_skip_paths_of_cross_layer_transcoders_are_kept(name, make_cross_layer, rows, tmp_path):
    sae, x = make_cross_layer(skip=True), rows(24)
    plain = make_cross_layer()
    skipped = [part @ sae.get_parameter(f"W_skip_{i}").T for i, part in enumerate(x.split(8, dim=1))]
    torch.testing.assert_close(sae(x), plain(x) + torch.cat(skipped, 1), rtol=1e-5, atol=1e-5)
    again = Sae.load(sae.save(tmp_path / "clt" / "sae", name))
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)
    for other in ("circuit-tracer", "llamascopium"):
        with pytest.raises(SaeError, match="skip"):
            sae.save(tmp_path / "other", other)
    assert not (tmp_path / "other").exists()


def test_several_layers_of_one_set_are_written_into_one_folder(make_sae, rows, tmp_path):
    for layer in range(3):
        sae = make_sae("jumprelu_transcoder")
        sae.hook_point, sae.metadata["hook_name_out"] = f"blocks.{layer}.mlp_in", f"blocks.{layer}.mlp_out"
        sae.save(tmp_path / "set", "circuit-tracer")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "config.yaml",
        *(f"layer_{layer}.safetensors" for layer in range(3)),
    ]
    with pytest.raises(SaeError, match="holds 3 SAEs; name one of its files, such as layer_0"):
        Sae.load(tmp_path / "set")
    assert Sae.load(tmp_path / "set" / "layer_2.safetensors").reads == ("blocks.2.mlp_in",)
    sae.metadata["model_name"] = "another"
    with pytest.raises(SaeError, match="has model_name 'google/gemma-3-1b-pt', and this layer 'another'"):
        sae.save(tmp_path / "set", "circuit-tracer")
