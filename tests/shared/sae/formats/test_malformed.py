"""Damaged configurations and weights of published formats: one error of ours, or the same SAE, never another."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from thresher.shared.core.errors import ThresherError
from thresher.shared.sae import Sae
from thresher.shared.sae.formats import find_saes

VALUES = [None, "x", -1, True, 3.5, [], {"x": 1}, 10**30]
SAES = {
    "gemma-scope-2": ("jumprelu_skip_transcoder", "config.json"),
    "llamascopium": ("jumprelu", "config.json"),
    "llamascopium topk": ("topk", "config.json"),
    "circuit-tracer": ("jumprelu_transcoder", "config.yaml"),
    "sparsify": ("topk_skip_transcoder", "cfg.json"),
    "llamascopium clt": ("clt", "config.json"),
    "gemma-scope-2 clt": ("clt", "config.json"),
    "circuit-tracer clt": ("clt", "config.yaml"),
}
UNKNOWN = SAES | {
    "saelens": ("jumprelu", "cfg.json"),
    "dictionary_learning": ("jumprelu", "config.json"),
    "gemma-scope": ("jumprelu", None),
    "thresher clt": ("clt", "cfg.json"),
}
CHANGES_FUNCTION = (
    "k",
    "top_k",
    "act_fn",
    "sparsity_include_decoder_norm",
    "transcode",
    "skip_connection",
    "num_latents",
)
"""Keys of which another valid value is another valid SAE."""


@pytest.fixture(params=SAES)
def written(request, make_sae, make_cross_layer, tmp_path):
    """A folder of a format, the path of its SAE and that of its configuration."""
    architecture, config = SAES[request.param]
    sae = make_cross_layer() if architecture == "clt" else make_sae(architecture)
    folder = sae.save(tmp_path / "clt" / "sae", request.param.split()[0])
    return find_saes(folder)[0][1], folder / config


def load(path):
    return yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())


def dump(path, config):
    path.write_text(yaml.safe_dump(config) if path.suffix == ".yaml" else json.dumps(config))


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_change_the_function_and_is_not_known_is_named(name, make_sae, make_cross_layer, tmp_path):
    architecture, config_name = UNKNOWN[name]
    sae = make_cross_layer() if architecture == "clt" else make_sae(architecture)
    folder = sae.save(tmp_path / "clt" / "sae", name.split()[0])
    path = find_saes(folder)[0][1]
    assert Sae.load(path).d_in == sae.d_in
    if config_name:
        config = load(folder / config_name)
        nested = [config, *(value for value in config.values() if isinstance(value, dict))]
        for place in nested if name == "dictionary_learning" else nested[:1]:
            place["a_new_gate"] = 2.5
            dump(folder / config_name, config)
            with pytest.raises(ThresherError, match=r"a_new_gate = 2\.5, which this version does not know"):
                Sae.load(path)
            del place["a_new_gate"]
        dump(folder / config_name, config)
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        tensors = load_file(file)
        save_file(tensors | {"a_new_gate": torch.ones(3)}, file)
    for file in folder.glob("*.npz"):
        np.savez(file, **dict(np.load(file)), a_new_gate=np.ones(3))
    for file in folder.glob("ae.pt"):
        torch.save(torch.load(file, weights_only=True) | {"a_new_gate": torch.ones(3)}, file)
    with pytest.raises(ThresherError, match="a_new_gate"):
        Sae.load(path)


def test_a_malformed_configuration_gives_an_error_of_ours_or_the_same_sae(written, rows):
    path, config_path = written
    if path.is_dir() and (path / "W_enc_0.safetensors").exists():
        pytest.skip("the same configuration as a set's")
    config, sae = load(config_path), Sae.load(path)
    x = rows(sae.d_in)
    expected, n_refused = sae(x), 0
    for key in config:
        changes = [{name: value for name, value in config.items() if name != key}]
        changes += [config | {key: value} for value in VALUES]
        for changed in changes:
            dump(config_path, changed)
            try:
                y = Sae.load(path)(x)
            except ThresherError:
                n_refused += 1
                continue
            if key not in CHANGES_FUNCTION:
                assert torch.equal(y, expected), (key, changed.get(key))
    assert n_refused > 15


def test_damaged_files_give_an_error_of_ours(written):
    path, config_path = written
    good = config_path.read_bytes()
    for content in (b"", b"{", b"[]", b"null", b"\xff" + good, b"[" * 10_000, b"!!python/object:os.system {}"):
        config_path.write_bytes(content)
        with pytest.raises(ThresherError):
            Sae.load(path)
    config_path.write_bytes(good)
    folder = path if path.is_dir() else path.parent
    for file in folder.glob("*.safetensors"):
        saved = file.read_bytes()
        lying = (10**9).to_bytes(8, "little") + saved[8:]
        for content in (b"", saved[: len(saved) // 2], saved[:-1], lying, saved[:8] + b"\xff" * 40 + saved[48:]):
            file.unlink()  # the old content may be mapped
            file.write_bytes(content)
            with pytest.raises(ThresherError):
                Sae.load(path)
        file.unlink()
        file.write_bytes(saved)
