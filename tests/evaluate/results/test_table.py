"""The printed table: aligned, at most 100 columns, honest about what is missing."""

from __future__ import annotations

from thresher.evaluate.results.table import metrics_table, shorten


def row(name, **values):
    known = {"name": name, "hook_point": "blocks.2.resid_post", "d_sae": 131072, "k": 64, "l1_coefficient": None}
    measured = {"explained_variance": 0.91234, "mse": 12345.678, "l0": 1234.5, "dead_fraction": 0.5}
    interval = {"confidence_95": {"explained_variance": [0.91, 0.92]}}
    return known | measured | interval | {"ce_loss_score": 0.98765, "kl_div_score": 0.97} | values


def test_fits_and_aligns():
    rows = [
        row("topk_k64_with_a_very_long_name_from_a_grid_of_many_keys_lr_0.0003"),
        row("standard", k=None, l1_coefficient=0.00025, ce_loss_score=None, kl_div_score=None),
        row("other", hook_point="blocks.10.mlp_out", explained_variance=None, confidence_95={}),
    ]
    lines = metrics_table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "blocks.2.resid_post"
    figures = [line for line in lines if "131,072" in line]
    assert len(figures) == 3
    assert len({len(line) for line in figures}) == 1
    assert len({line.index("131,072") for line in figures}) == 1
    assert "λ 0.00025" in figures[1]
    assert figures[1].split()[-2:] == ["-", "-"]
    assert "0.9123  0.0050" in figures[0]


def test_the_penalties_of_jumprelu_are_shown():
    by_target = row("jumprelu", k=None, l0_coefficient=1.0, target_l0=20.0)
    by_weight = row("other", k=None, l0_coefficient=0.5)
    assert [line.split()[2:4] for line in metrics_table([by_target, by_weight]).splitlines()[-2:]] == [
        ["L0", "20"],
        ["λ", "0.5"],
    ]


def test_shorten_keeps_both_ends():
    assert shorten("short", 10) == "short"
    assert shorten("abcdefghijklmnop", 7) == "abc…nop"
    assert len(shorten("x" * 50, 20)) == 20
