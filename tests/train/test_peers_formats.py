"""SAEs that sparsify and dictionary_learning made are read as they compute. Runs both in their own environment."""

import pytest
import torch
from safetensors.torch import load_file

from thresher.train.trained_saes import read_trained_sae

pytestmark = pytest.mark.peers

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
root = Path(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(40, 12)
out = {"x": x}
def shaken(module):
    for tensor in module.parameters():
        tensor.data += 0.2 * torch.randn_like(tensor)
    return module
coder = shaken(SparseCoder(12, SparseCoderConfig(num_latents=30, k=4)))
coder.save_to_disk(root / "sparsify")
out["sparsify"] = coder(x).sae_out.detach()
made = {
    "AutoEncoder": AutoEncoder(12, 30), "AutoEncoderNew": AutoEncoderNew(12, 30),
    "GatedAutoEncoder": GatedAutoEncoder(12, 30), "JumpReluAutoEncoder": JumpReluAutoEncoder(12, 30),
    "AutoEncoderTopK": AutoEncoderTopK(12, 30, 4), "BatchTopKSAE": BatchTopKSAE(12, 30, 4),
    "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(12, 30, 4, [10, 20]),
}
for name, module in made.items():
    shaken(module)
    if "BatchTopK" in name:
        module.threshold.fill_(0.5)
    (root / name).mkdir()
    save_file({key: tensor.contiguous() for key, tensor in module.state_dict().items()}, root / name / "ae.safetensors")
    (root / name / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": 4}}))
    out[name] = module(x).detach()
save_file({key: tensor.contiguous() for key, tensor in out.items()}, root / "out.safetensors")
"""


def test_peers_saes_compute_the_same_here(tmp_path, run_peers):
    run_peers("-c", SCRIPT, tmp_path)
    theirs = load_file(tmp_path / "out.safetensors")
    x = theirs.pop("x")
    assert len(theirs) == 8
    for name, expected in theirs.items():
        torch.testing.assert_close(read_trained_sae(tmp_path / name)(x), expected, rtol=1e-4, atol=1e-4, msg=name)
