"""`thresher sae info|convert|verify`: what they print, write and refuse."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared import ActivationStoreWriter
from thresher.shared.exchange.command import main
from thresher.shared.sae import Sae
from thresher.shared.sae.formats import FORMATS, walk_saes

D, N, K = 8, 24, 4
HOOK = "blocks.1.resid_post"


def make(architecture="topk", seed=0):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1)
    tensors = {
        "W_enc": W_dec.T.clone(),
        "b_enc": torch.zeros(N),
        "W_dec": W_dec,
        "b_dec": 0.1 * torch.randn(D, generator=generator),
        "threshold": torch.full((N,), 0.4),
    }
    config = {"k": K} if architecture == "topk" else {}
    return Sae(architecture, tensors, hook_point=HOOK, config=config, metadata={"model_name": "a/model"})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of sparse combinations of the SAE's own directions, with every second context held out."""
    path, generator, directions = (
        tmp_path_factory.mktemp("exchange") / "store",
        torch.Generator().manual_seed(3),
        make().W_dec,
    )
    with ActivationStoreWriter(path, {HOOK: D}, context_size=16, dtype="float32") as writer:
        for number in range(80):
            latents = torch.rand(16, N, generator=generator) * (torch.rand(16, N, generator=generator) < 0.15)
            writer.append({HOOK: (latents @ directions)[None]}, held_out=[number % 2 == 0])
    return path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def held_out_rows(store):
    from thresher.shared import ActivationStore

    opened = ActivationStore.open(store)
    return torch.cat([opened.read(HOOK, 16 * c, 16 * c + 16) for c in range(0, 80, 2)]).float()


def test_an_approximation_states_what_is_lost(store, tmp_path, capsys):
    make("jumprelu").save(tmp_path / "jumprelu")
    make("topk").save(tmp_path / "topk")
    x = held_out_rows(store)
    for source, name, selection in (("jumprelu", "sparsify", "topk"), ("topk", "gemma-scope-2", "jumprelu")):
        target = tmp_path / f"{source} as {selection}"
        code, _, err = run(capsys, "convert", tmp_path / source, target, "--format", name)
        assert code == 2
        assert "--approximate" in err
        assert not target.exists()
        options = ("--format", name, "--approximate", "--store", store, "--rows", 640)
        code, out, _ = run(capsys, "convert", tmp_path / source, target, *options)
        assert code == 0
        figures = []
        for path in (tmp_path / source, target):
            sae = Sae.load(path)
            latents, x_hat = sae.encode(x), sae(x)
            y = x.double().numpy()
            error = np.square(y - x_hat.double().detach().numpy()).sum()
            figures.append((1 - error / np.square(y - y.mean(0)).sum(), float((latents > 0).sum() / len(x))))
        assert f"explained variance {figures[0][0]:.4f} before, {figures[1][0]:.4f} after" in out
        assert f"L0 {figures[0][1]:.1f} before, {figures[1][1]:.1f} after, on 640 held-out rows" in out
        assert Sae.load(target).selection == selection
        if selection == "jumprelu":
            assert abs(figures[1][1] - figures[0][1]) < 0.05


def test_a_folder_of_several_formats_is_shown_converted_and_verified(tmp_path, capsys):
    root = tmp_path / "all"
    make("topk").save(root / "a" / "layers.3", "sparsify")
    make("jumprelu").save(root / "gemma-scope-2b-pt-res" / "layer_7" / "width_16k" / "average_l0_41", "gemma-scope")
    make("topk", 1).save(root / "k-2.5")
    make("topk", 2).save(root / "k-2.7")
    (root / "other").mkdir()
    save_file({"x": torch.zeros(1)}, root / "other" / "model.safetensors")
    found, notes = walk_saes(root)
    assert [(fmt.name, path.name) for fmt, path in found] == [
        ("sparsify", "layers.3"),
        ("gemma-scope", "average_l0_41"),
        ("saelens", "k-2.5"),
        ("saelens", "k-2.7"),
    ]
    assert notes == [f"'{root / 'other'}' has model.safetensors, which no known format has"]
    code, out, err = run(capsys, "info", root)
    assert code == 0
    assert err.startswith("note: ")
    for text in (
        "sparsify: cfg.json and sae.safetensors",
        "reads       blocks.7.resid_post",
        "model       google/gemma-2-2b",
        "published   l0 41",
        "the 4 largest of a row",
        "above thresholds of 0.4 to 0.4",
        f"d_in {D}, d_sae {N}, float32",
    ):
        assert text in out
    code, out, _ = run(capsys, "verify", root)
    assert (code, f"\n{out}".count("\nok "), "4 SAEs, 0 with faults" in out) == (0, 4, True)
    code, out, _ = run(capsys, "convert", root, tmp_path / "new", "--format", "dictionary_learning")
    assert code == 0
    assert len(walk_saes(tmp_path / "new")[0]) == 4
    assert (tmp_path / "new" / "k-2.5" / "ae.pt").exists()


def test_a_damaged_sae_is_a_fault(tmp_path, capsys):
    folder = make().save(tmp_path / "saes" / "good")
    tensors = load_file(make().save(tmp_path / "saes" / "nan") / "sae_weights.safetensors")
    tensors["b_enc"][2] = float("nan")
    save_file(tensors, tmp_path / "saes" / "nan" / "sae_weights.safetensors")
    code, out, _ = run(capsys, "verify", tmp_path / "saes")
    assert code == 1
    assert "ok     good  saelens" in out
    assert "fault  nan: " in out
    assert "1 of 24 values that are NaN" in out
    assert "not read" in run(capsys, "info", tmp_path / "saes")[1]
    assert folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "x"], "no action 'show'; expected one of: info, convert, verify, push, pull"),
        (["info"], "`thresher sae info` needs source first"),
        (["convert", "sae"], "needs source and folder first"),
        (["convert", "sae", "new", "--format", "onnx"], "no format 'onnx' can be written"),
        (["convert", "sae", "sae", "--format", "sparsify"], "'sae' is there already"),
        (["convert", "sae", "new", "--format", "sparsify", "--approximate"], "--approximate and --store go together"),
        (["info", "nowhere"], "no SAE in 'nowhere'"),
        (["pull", "sae", "new"], "'sae' is not on the Hub"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    make().save(tmp_path / "sae")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_help_names_every_action(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for action in ("info", "convert", "verify", "push", "pull"):
        assert f"thresher sae {action}" in out
    assert {fmt.name for fmt in FORMATS} >= {"saelens", "gemma-scope", "circuit-tracer"}
