"""`thresher hooks` prints what was measured, and costs no import of torch until it is asked."""

from __future__ import annotations

import subprocess
import sys

import pytest

from thresher.shared.core.cli import main
from thresher.shared.model.hook_points import KINDS

from ...tiny_models import build


@pytest.fixture
def saved(tmp_path):
    def save(model_type, **changes):
        build(model_type, **changes).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def test_every_kind_is_listed(saved, capsys):
    assert main(["hooks", saved("falcon"), "--model_dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines] == list(KINDS)
    told = dict(lines)
    assert "FalconForCausalLM: 4 blocks in transformer.h, measured in float32\n\nblocks 0 to 3\n" in shown
    assert told["resid_mid"].startswith("refused: attention and MLP are parallel")
    assert told["mlp_out"].startswith("32  transformer.h.N.mlp (output)  resid_pre + attn_out + mlp_out = resid_post")
    assert "the model writes into it later" in told["mlp_out"]
    assert told["resid_pre"].endswith("resid_post of block N - 1, if any; the library's hidden_states[N]")


def test_blocks_that_differ_are_listed_apart(saved, capsys):
    assert main(["hooks", saved("jamba"), "--model-dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "\nblock 0\n" in shown
    assert "refused: the block has no attention with a known name; its modules are mamba" in shown


def test_a_derived_activation_says_how(saved, capsys):
    assert main(["hooks", saved("granite")]) == 0
    assert "taken as model.layers.N.mlp times residual_multiplier" in capsys.readouterr().out


def test_mistakes_cost_one_line(tmp_path, capsys):
    assert main(["hooks"]) == 2
    assert main(["hooks", "harvest.toml"]) == 2
    assert "expected the model itself: thresher hooks MODEL" in capsys.readouterr().err
    assert main(["hooks", str(tmp_path), "--revison", "main"]) == 2
    assert "did you mean 'revision'?" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = (
        "import sys; from thresher.shared.core.cli import main; "
        "main(['hooks', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model_dtype" in done.stdout
