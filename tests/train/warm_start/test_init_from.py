"""Training starts from trained SAEs: the first step reconstructs what they did, on whatever scale they were trained."""

import json
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.core.errors import ConfigError, MissingFileError, SaeError
from thresher.train import TrainConfig, train
from thresher.train.architectures import ARCHITECTURES, make_architecture, make_config
from thresher.train.architectures.contract import Batch
from thresher.train.kernels import kernels_for
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization, normalization_across
from thresher.train.warm_start import initialise_trainers, read_initial, read_trained_sae

D_IN, D_SAE, HOOK = 6, 19, "blocks.0.resid_post"
IN, OUT, OTHER = "blocks.0.mlp_in", "blocks.0.mlp_out", "blocks.1.mlp_in"
KEYS = {
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "matryoshka_batch_topk": {"k": 3},
    "hierarchical_topk": {"k": 3},
    "random": {"k": 3},
    "lista_matryoshka": {"k": 3},
    "matching_pursuit": {"k": 3},
    "standard": {"l1_coefficient": 0.1},
    "gated": {"l1_coefficient": 0.1},
    "jumprelu": {"l0_coefficient": 0.1},
    "transcoder": {"l1_coefficient": 0.1, "hook_point_out": OUT},
    "skip_transcoder": {"l1_coefficient": 0.1, "hook_point_out": OUT},
    "crosscoder": {"l1_coefficient": 0.1, "hook_points": (IN, OTHER)},
}


def sae_config(name, **changes):
    return make_config(**{"hook_point": IN, "d_sae": D_SAE, "architecture": name, "name": name} | KEYS[name] | changes)


def normalization(config, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    by_hook = {
        hook: Normalization(torch.randn(D_IN, generator=generator), scale * factor, 2.0)
        for hook, factor in ((IN, 1.0), (OUT, 0.3), (OTHER, 2.0))
    }
    return normalization_across(config, by_hook)


def trained(config, kind):
    """Return an architecture's SAE with parameters that none of its formulas leaves out."""
    architecture = make_architecture(config, len(kind.mean), D_IN if kind.target else len(kind.mean))
    generator = torch.Generator().manual_seed(3)
    parameters = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in architecture.initial_parameters(generator).items()
    }
    if architecture.unit_norm_decoder:
        parameters["W_dec"] /= parameters["W_dec"].norm(dim=1, keepdim=True)
    buffers = {name: torch.tensor(0.4) for name in architecture.initial_buffers()}
    return architecture.to_sae(parameters, buffers, kind, {})


def test_all_architectures_are_here():
    assert set(KEYS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", sorted(KEYS))
@pytest.mark.parametrize("keys", [{}, {"sparsity_loss": "tanh"}], ids=["", "tanh"])
def test_an_sae_continues_under_another_normalisation(name, keys, tmp_path):
    """Saved from one store's mean and scale, taken into another's, and saved again, it computes the same."""
    if keys and name != "jumprelu":
        pytest.skip("an option of JumpReLU alone")
    config = sae_config(name, **keys)
    sae = Sae.load(trained(config, normalization(config, 0, 1.7)).save(tmp_path / name))
    other = normalization(config, 1, 0.2)
    architecture = make_architecture(config, len(other.mean), D_IN if other.target else len(other.mean))
    parameters, buffers = architecture.imported(sae, other)
    again = architecture.to_sae(parameters, buffers, other, {})
    x = torch.randn(50, len(other.mean)) * 2
    torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
    assert sae.encode(x).any(0).sum() > 5


@pytest.mark.parametrize("name", ["topk", "standard", "gated", "jumprelu", "skip_transcoder", "crosscoder"])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_first_step_reconstructs_what_the_sae_did(name, ema_decay, tmp_path):
    config = sae_config(name, init_from=str(tmp_path / name), ema_decay=ema_decay)
    kind = normalization(config, 1, 0.2)
    sae = trained(config, normalization(config, 0, 1.7))
    sae.save(tmp_path / name)
    trainer = SaeTrainer(
        config=config,
        d_in=len(kind.mean),
        normalization=kind,
        schedule=Schedule(9, 64, 1, 0.0),
        kernels=kernels_for("cpu"),
        compute_dtype=torch.float32,
    )
    initialise_trainers([trainer], None)
    rows, targets = torch.randn(64, len(kind.mean)) * 2, torch.randn(64, D_IN)
    x = (rows - kind.mean) * kind.scale
    y = (targets - kind.target.mean) * kind.target.scale if kind.target else None
    error = (sae(rows) - (targets if kind.target else rows)) * (kind.target or kind).scale
    expected = 1 - float(error.square().sum(1).mean()) / kind.total_variance
    assert torch.equal(trainer.to_sae({}).W_dec, trainer.architecture.to_sae(trainer.parameters, {}, kind, {}).W_dec)
    assert trainer.step(Batch(x, x, y))["explained_variance"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_ranks_that_shard_an_sae_each_take_their_latents(name, tmp_path):
    """They take rows of the encoder, its bias and the decoder, and all of `b_dec`, which is as long here."""
    config = msgspec.structs.replace(sae_config(name), d_sae=D_IN, init_from=str(tmp_path))
    kind = normalization(config, 1, 0.2)
    sae = trained(config, kind)
    sae.save(tmp_path)
    taken = []
    for rows in (slice(0, 4), slice(4, D_IN)):
        architecture = make_architecture(config, D_IN).sharded(rows)
        keep = SimpleNamespace(config=config, name="x", normalization=kind, architecture=architecture)
        keep.initialise = lambda parameters, buffers: taken.append(parameters)
        initialise_trainers([keep], None)
    whole, _ = make_architecture(config, D_IN).imported(sae, kind)
    for key, tensor in whole.items():
        parts = [parameters[key] for parameters in taken]
        if key == "b_dec":
            assert all(torch.equal(part, tensor) for part in parts)
        else:
            assert torch.equal(torch.cat(parts), tensor)
            assert len(parts[0]) == 4


def test_a_topk_sae_of_free_norms_starts_only_where_norms_are_free():
    config = sae_config("topk", unit_norm_decoder=False)
    kind = normalization(config, 0, 1.0)
    sae = trained(config, kind)
    sae.W_dec.copy_(1.5 * torch.nn.functional.normalize(sae.W_dec))
    with pytest.raises(SaeError, match=r"norms from 1\.5 to 1\.5, expected 1.*unit_norm_decoder = false"):
        make_architecture(sae_config("topk"), D_IN).imported(sae, kind)
    parameters, _ = make_architecture(config, D_IN).imported(sae, kind)
    assert torch.equal(parameters["W_dec"], sae.W_dec)


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    path = tmp_path_factory.mktemp("init") / "store"
    with ActivationStoreWriter(path, {HOOK: 32}, 16) as writer:
        writer.append({HOOK: 5 * sparse_activations[: 200 * 16].view(200, 16, 32)}, held_out=np.arange(200) % 5 == 0)
    return path


def run_config(store, output, **changes):
    tables = [
        {"architecture": "topk", "hook_point": HOOK, "d_sae": 48, "k": [3, 4], "lr": 3e-3},
        {"architecture": "gated", "hook_point": HOOK, "d_sae": 48, "l1_coefficient": 0.1, "lr": 3e-3},
    ]
    keys = {"batch_size": 64, "tokens": 64 * 40, "warmup_steps": 2, "device": "cpu", "sae": tables}
    return TrainConfig(store=str(store), output=str(output), **keys | changes)


def test_a_run_starts_from_another_runs_saes(store, tmp_path, capsys):
    """Each from that of its name; steps that move nothing give the same SAEs, and training improves on them."""
    first = train(run_config(store, tmp_path / "first"))
    config = run_config(store, tmp_path / "second", init_from=str(tmp_path / "first"), tokens=64)
    still = msgspec.structs.replace(config, sae=[table | {"lr": 1e-12} for table in config.sae])
    for before, after in zip(first, train(still), strict=True):
        for name, tensor in Sae.load(before).named_parameters():
            torch.testing.assert_close(getattr(Sae.load(after), name), tensor, rtol=1e-4, atol=1e-4)
    further = train(msgspec.structs.replace(config, output=str(tmp_path / "third"), tokens=64 * 40))
    x = ActivationStore.open(store).read(HOOK, 0, 400).float()
    for before, after in zip(first, further, strict=True):
        errors = [float((Sae.load(folder)(x) - x).square().sum()) for folder in (before, after)]
        assert errors[1] < 0.95 * errors[0], after.name
    capsys.readouterr()
    assert train(msgspec.structs.replace(config, dry_run=True)) == []
    assert "3 SAEs" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_in_a_line(store, tmp_path):
    (folder, *_) = train(run_config(store, tmp_path / "first"))
    table = {"architecture": "topk", "hook_point": HOOK, "d_sae": 48, "k": 3, "name": "x", "init_from": str(folder)}
    by_row = Sae.load(folder)
    by_row.normalize_activations = "layer_norm"
    by_row.save(tmp_path / "by-row")
    for changes, error, message in (
        ({"d_sae": 64}, SaeError, r"it has d_sae 48, expected 64\b"),
        ({"architecture": "gated", "k": None, "l1_coefficient": 1.0}, SaeError, "is a 'topk' SAE; expected 'gated'"),
        ({"init_from": str(tmp_path / "by-row")}, SaeError, r"it normalises each row by itself \(layer_norm\)"),
        ({"init_from": str(tmp_path / "nowhere")}, MissingFileError, "no SAE to start from at .*nowhere"),
    ):
        merged = {key: value for key, value in (table | changes).items() if value is not None}
        for dry_run in (False, True):
            with pytest.raises(error, match=message):
                train(run_config(store, tmp_path / "other", sae=[merged], dry_run=dry_run))
    with pytest.raises(ConfigError, match=r"differing: init_from"):
        train(run_config(store, tmp_path / "first", init_from=str(tmp_path)))


def test_pickles_are_refused(tmp_path):
    (tmp_path / "ae.pt").write_bytes(b"cos\nsystem\n")
    for path in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(SaeError, match=r"ae\.pt' is a pickle, which may run code when read; expected safetensors"):
            read_trained_sae(path)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(D_SAE, D_IN, generator=generator)
    W /= W.norm(dim=1, keepdim=True)
    return W, torch.randn(D_SAE, D_IN, generator=generator), torch.randn(D_SAE, generator=generator)


def test_sparsify_is_read(tmp_path):
    W_dec, W_enc, b_enc = weights()
    b_dec, x = torch.randn(D_IN), torch.randn(30, D_IN)
    tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    save_file(tensors, tmp_path / "sae.safetensors")
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "num_latents": D_SAE,
        "k": 4,
        "transcode": False,
        "d_in": D_IN,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    values, indices = (torch.nn.functional.linear(x - b_dec, W_enc, b_enc)).relu().topk(4)
    expected = torch.stack([v @ W_dec[i] for v, i in zip(values, indices, strict=True)]) + b_dec
    sae = read_initial(sae_config("topk", init_from=str(tmp_path)), None, make_architecture(sae_config("topk"), D_IN))
    torch.testing.assert_close(sae(x), expected)
    for change, said in (({"signed": True}, "signed"), ({"activation": "groupmax"}, "groupmax")):
        (tmp_path / "cfg.json").write_text(json.dumps(config | change))
        with pytest.raises(SaeError, match=said):
            read_trained_sae(tmp_path)


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"]
)
def test_dictionary_learning_is_read(kind, tmp_path):
    """A state dict of the class, saved again as safetensors; `encoder` and `decoder` are linear layers there."""
    W_dec, W_enc, b_enc = weights()
    b_dec, b_mag, r_mag, x = torch.randn(D_IN), torch.rand(D_SAE), torch.rand(D_SAE), torch.randn(30, D_IN)
    tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": W_dec.T.contiguous()}
    z = (x - (0 if kind == "AutoEncoderNew" else b_dec)) @ W_enc.T + b_enc
    if kind == "AutoEncoder":
        tensors["bias"], acts = b_dec, z.relu()
    elif kind == "AutoEncoderNew":
        tensors["decoder.bias"], acts = b_dec, z.relu()
    elif kind == "GatedAutoEncoder":
        del tensors["encoder.bias"]
        tensors |= {"gate_bias": b_enc, "mag_bias": b_mag, "r_mag": r_mag, "decoder_bias": b_dec}
        acts = ((z - b_enc) * r_mag.exp() + b_mag).relu() * (z > 0)
    elif kind == "AutoEncoderTopK":
        tensors |= {"b_dec": b_dec, "k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
        acts = torch.zeros_like(z).scatter(1, z.topk(4).indices, 1.0) * z.relu()
    else:
        tensors |= {"b_dec": b_dec, "k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(0.7)}
        acts = z * (z > 0.7)
    save_file(tensors, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "k": 4}}))
    sae = read_trained_sae(tmp_path)
    torch.testing.assert_close(sae(x), acts @ W_dec + b_dec)
    names = {"standard": "standard", "gated": "gated", "topk": "topk", "jumprelu": "batch_topk"}
    config = sae_config(names[sae.architecture], **({"k": 4} if kind == "AutoEncoderTopK" else {}))
    norm = normalization(config, 1, 0.3)
    architecture = make_architecture(config, D_IN)
    ours = architecture.to_sae(*architecture.imported(sae, norm), norm, {})
    torch.testing.assert_close(ours(x), sae(x), rtol=1e-4, atol=1e-4)


def test_damaged_folders_are_refused(tmp_path):
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "sae.safetensors")
    with pytest.raises(MissingFileError, match=r"but no cfg\.json"):
        read_trained_sae(tmp_path)
    (tmp_path / "cfg.json").write_text('{"k": 1}')
    with pytest.raises(SaeError, match=r"lack encoder\.bias"):
        read_trained_sae(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"x")
    with pytest.raises(SaeError, match="damaged"):
        read_trained_sae(tmp_path)
