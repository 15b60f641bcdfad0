"""SAEs that sparsify and dictionary_learning made are read as they compute. Runs both in their own environment."""

import pytest
import torch
from safetensors.torch import load_file

from thresher.train.warm_start import read_trained_sae

pytestmark = pytest.mark.peers

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
root = Path(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(40, 12)
out = {"x": x}
def shaken(module):
    for tensor in module.parameters():
        tensor.data += 0.2 * torch.randn_like(tensor)
    return module
for name, kinds in (("sae", {}), ("transcoder", {"transcode": True}),
                    ("skip transcoder", {"transcode": True, "skip_connection": True})):
    coder = shaken(SparseCoder(12, SparseCoderConfig(num_latents=30, k=4, **kinds)))
    coder.save_to_disk(root / ("sparsify " + name))
    out["sparsify " + name] = coder(x).sae_out.detach()
common = {"steps": 9000, "activation_dim": 12, "dict_size": 30, "layer": 1, "lm_name": "m", "device": "cpu", "seed": 0}
annealed = common | {"sparsity_function": "Lp^p", "sparsity_queue_length": 2}
trainers = {
    "AutoEncoder": StandardTrainer(**common), "April": StandardTrainerAprilUpdate(**common),
    "annealed": PAnnealTrainer(**annealed), "GatedAutoEncoder": GatedSAETrainer(**common),
    "gated and annealed": GatedAnnealTrainer(**annealed), "JumpReluAutoEncoder": JumpReluTrainer(**common),
    "AutoEncoderTopK": TopKTrainer(k=4, **common), "BatchTopKSAE": BatchTopKTrainer(k=4, **common),
    "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKTrainer(k=4, group_fractions=[0.4, 0.6], **common),
}
modules = {name: (trainer.ae, trainer.config) for name, trainer in trainers.items()}
modules["AutoEncoderNew"] = AutoEncoderNew(12, 30), {"dict_class": "AutoEncoderNew"}
for name, (module, config) in modules.items():
    shaken(module)
    if "BatchTopK" in name:
        module.threshold.fill_(0.5)
    (root / name).mkdir()
    torch.save({key: tensor.cpu() for key, tensor in module.state_dict().items()}, root / name / "ae.pt")
    (root / name / "config.json").write_text(json.dumps({"trainer": config}))
    out[name] = module(x).detach()
    out[name + ".latents"] = module.encode(x).detach()
save_file({key: tensor.contiguous() for key, tensor in out.items()}, root / "out.safetensors")
"""


def test_peers_saes_compute_the_same_here(tmp_path, run_peers):
    run_peers("-c", SCRIPT, tmp_path)
    theirs = load_file(tmp_path / "out.safetensors")
    x = theirs.pop("x")
    assert len(theirs) == 3 + 2 * 10
    for name, expected in theirs.items():
        folder, _, latents = name.partition(".")
        sae = read_trained_sae(tmp_path / folder)
        torch.testing.assert_close(sae.encode(x) if latents else sae(x), expected, rtol=1e-4, atol=1e-4, msg=name)
