"""An SAE of a million latents of 4,096 channels, 16 GiB, is loaded without being copied into memory."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

D, N = 4096, 1 << 20
SHAPES = {"w_enc": [D, N], "w_dec": [N, D], "b_enc": [N], "b_dec": [D], "threshold": [N]}
SCRIPT = """
import sys, torch
from thresher.shared.sae import Sae
def held():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10
before = held()
sae = Sae.load(sys.argv[1], dtype=None)
assert sae.W_enc.dtype == torch.bfloat16 and tuple(sae.W_dec.shape) == (1 << 20, 4096)
top_indices = torch.tensor([[0, (1 << 20) - 1]])
x_hat = sae.decode_sparse(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), top_indices)
print(held() - before, x_hat.float().tolist()[0][-1])
"""


def test_a_million_latents_are_mapped(tmp_path):
    """The files have holes, which read as zeros and take no space, apart from the decoder's last value."""
    header, at = {}, 0
    for name, shape in SHAPES.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    folder = tmp_path / "resid_post" / "layer_4_width_1m_l0_small"
    folder.mkdir(parents=True)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "params.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        file.seek(8 + len(text) + header["w_dec"]["data_offsets"][1] - 2)
        file.write(b"\x00\x3f")  # 0.5 in bfloat16
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    held, last = done.stdout.split()
    assert int(held) < 1 << 29
    assert float(last) == 1.0
