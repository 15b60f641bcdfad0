"""The command that runs the 16k law unattended, rehearsed at a tiny size: it resumes, and its table is of all seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.long
def test_the_16k_command_from_rows_to_table(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import synth_16k

    arguments = ["--rehearse", "--seeds", "2", "--output", str(tmp_path)]
    evaluated = []
    evaluate = synth_16k.evaluate
    monkeypatch.setattr(synth_16k, "evaluate", lambda config: [evaluated.append(config.saes), evaluate(config)][1])
    with monkeypatch.context() as patch:
        patch.setattr(synth_16k, "evaluate", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            synth_16k.main(arguments)
    trained = {path: path.read_bytes() for path in (tmp_path / "saes-0").glob("*/sae_weights.safetensors")}
    assert len(trained) == 35
    lines = synth_16k.main(arguments)
    assert {path: path.read_bytes() for path in trained} == trained
    assert len(evaluated) == 2
    assert synth_16k.main(arguments) == lines
    assert len(evaluated) == 2
    assert (tmp_path / "table.md").read_text().splitlines() == lines
    assert len(lines) == 2 + 35 + 21  # thresholds, which refinement needs, have batch_topk, Matryoshka and jumprelu
    rows = [json.loads((tmp_path / f"seed-{seed}.json").read_text()) for seed in (0, 1)]
    values = [next(r["f1"] for r in some if r["name"].startswith("matryoshka") and r["k"] == 25) for some in rows]
    half = student.ppf(0.975, 1) * np.std(values, ddof=1) / 2**0.5
    line = next(line for line in lines if "`matryoshka_batch_topk` | 25 " in line)
    assert line.split(" | ")[2:4] == ["2", f"{np.mean(values):.3f} ± {half:.3f}"]
    sys.modules.pop("synth_16k")
