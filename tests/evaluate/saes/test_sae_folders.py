"""Which folders hold the SAEs, in which order, and under which names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from thresher.evaluate.saes.sae_folders import load_saes, sae_folders, unique_names
from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.core.errors import MissingFileError, SaeError


@pytest.fixture
def folders(tmp_path):
    for name in ("sweep/k16", "sweep/k8", "sweep/k128", "other/k8", "sweep/checkpoints/step"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("sweep/k16", "sweep/k8", "sweep/k128", "other/k8"):
        (tmp_path / name / "cfg.json").write_text("{}")
    return tmp_path


def test_a_sweep_is_its_children_in_natural_order(folders):
    assert [path.name for path in sae_folders(str(folders / "sweep"))] == ["k8", "k16", "k128"]


def test_lists_and_single_folders(folders):
    assert sae_folders(str(folders / "other" / "k8")) == [folders / "other" / "k8"]
    listed = sae_folders([str(folders / "other"), str(folders / "sweep" / "k8"), str(folders / "sweep")])
    assert [path.relative_to(folders).as_posix() for path in listed] == [
        "other/k8",
        "sweep/k8",
        "sweep/k16",
        "sweep/k128",
    ]
    assert unique_names(listed) == ["other/k8", "sweep/k8", "sweep/k16", "sweep/k128"]
    assert unique_names(listed[1:]) == ["k8", "k16", "k128"]


def test_a_sweep_of_several_kinds_is_sorted_by_kind_first(folders):
    for name in ("topk-16", "topk-8", "standard-12", "standard-l1-0.5"):
        (folders / "kinds" / name).mkdir(parents=True)
        (folders / "kinds" / name / "cfg.json").write_text("{}")
    names = [path.name for path in sae_folders(str(folders / "kinds"))]
    assert names == ["standard-12", "standard-l1-0.5", "topk-8", "topk-16"]


def test_a_folder_under_two_names_is_one_sae(folders):
    sweep = folders / "sweep"
    (sweep / "latest").symlink_to(sweep / "k16")
    found = sae_folders([str(sweep), str(folders / "other" / ".." / "sweep" / "k8")])
    assert [path.name for path in found] == ["k8", "k16", "k128"]
    assert unique_names(found) == ["k8", "k16", "k128"]


def test_an_empty_folder_is_refused(folders):
    with pytest.raises(MissingFileError, match=r"expected cfg\.json"):
        sae_folders(str(folders / "sweep" / "checkpoints"))


D, N, HOOK, OUT = 4, 6, "blocks.1.resid_post", "blocks.1.mlp_out"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("saes") / "store"
    with ActivationStoreWriter(path, {HOOK: D, OUT: D}, 8) as writer:
        writer.append({hook: torch.randn(2, 8, D) for hook in (HOOK, OUT)})
    return ActivationStore.open(path)


def make(architecture, hook_point=HOOK, **metadata):
    tensors = {"W_enc": torch.randn(D, N), "b_enc": torch.randn(N), "W_dec": torch.randn(N, D), "b_dec": torch.zeros(D)}
    return Sae(architecture, tensors, hook_point=hook_point, config={"k": 2}, metadata=metadata)


def test_saes_of_other_libraries_are_found_and_placed(tmp_path, store):
    make("topk").save(tmp_path / "a")
    sae = make("topk")
    linear = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T}
    (tmp_path / "b").mkdir()
    torch.save(linear | {"b_dec": sae.b_dec}, tmp_path / "b" / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "k": 2, "submodule_name": "resid_post_layer_1"}
    (tmp_path / "b" / "config.json").write_text(json.dumps({"trainer": trainer}))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    folders = sae_folders(str(tmp_path))
    assert [folder.name for folder in folders] == ["a", "b"]
    loaded = load_saes(folders, store, "cpu")
    assert [(sae.hook_point, sae.target) for sae in loaded] == [(HOOK, HOOK)] * 2
    x = torch.randn(5, D)
    torch.testing.assert_close(loaded[1].sae(x), sae(x))


def test_saes_that_do_not_say_where_they_belong_are_refused(tmp_path, store):
    make("transcoder").save(tmp_path / "a")
    with pytest.raises(SaeError, match=r"SAE 'a': this transcoder of .* does not say which hook point it reconstructs"):
        load_saes([tmp_path / "a"], store, "cpu")
    make("transcoder", hook_name_out="blocks.1.hook_mlp_out").save(tmp_path / "a")
    (loaded,) = load_saes([tmp_path / "a"], store, "cpu")
    assert (loaded.hook_point, loaded.target) == (HOOK, OUT)
    make("topk", hook_point="").save(tmp_path / "a")
    with pytest.raises(SaeError, match="SAE 'a' does not say which hook point it reads"):
        load_saes([tmp_path / "a"], store, "cpu")


def test_saes_of_a_rewritten_model_are_refused(tmp_path, store):
    """TransformerLens can centre the weights that write to the stream; a store contains the original stream."""
    kwargs = {"center_writing_weights": False, "n_devices": 2}
    make("topk", model_from_pretrained_kwargs=kwargs).save(tmp_path / "a")
    assert len(load_saes([tmp_path / "a"], store, "cpu")) == 1
    make("topk", model_from_pretrained_kwargs=kwargs | {"center_writing_weights": True}).save(tmp_path / "a")
    with pytest.raises(SaeError, match="SAE 'a' was trained on a model loaded with center_writing_weights = true"):
        load_saes([tmp_path / "a"], store, "cpu")


def test_weights_of_another_library_are_read_beside_their_configuration(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "sae.safetensors")
    with pytest.raises(MissingFileError, match=r"it has sae\.safetensors but no cfg\.json"):
        Sae.load(tmp_path)
