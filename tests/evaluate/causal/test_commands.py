"""The three commands on the bundled model, against plain passes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from thresher import Add, SaeModel
from thresher.evaluate.causal import attribute_command, contrast_command, steer_command
from thresher.evaluate.causal.steering_curve import baseline_of, steering_curve
from thresher.shared.core.errors import InterventionError
from thresher.shared.sae import Sae

MODEL = Path(__file__).parents[3] / "models" / "stdlib-lm"
HOOK = "blocks.2.resid_post"
SETTINGS = ["--model", str(MODEL), "--device", "cpu"]
A = ["raise ValueError(name)", "raise TypeError(value)", "raise KeyError(key) from None", "raise OSError(code)"]
B = ["return self._name", "return len(value)", "return {key: 1}", "return [x for x in y]", "return None"]


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(300, 256, generator=generator), dim=1)
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(300), "W_dec": W_dec, "b_dec": torch.zeros(256)}
    return Sae("topk", tensors, hook_point=HOOK, config={"k": 12}).save(tmp_path_factory.mktemp("sae") / "topk")


def data_of(page):
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


@torch.no_grad()
def test_attribute_writes_scores_that_ablation_confirms(sae_folder, tmp_path, capsys):
    arguments = ["--saes", str(sae_folder), "--text", "import os\nimport", "--output", str(tmp_path), "--verify", "6"]
    assert attribute_command.main([*SETTINGS, *arguments]) == 0
    rows = pq.read_table(tmp_path / "attribution.parquet").to_pylist()
    lm = SaeModel.open(MODEL, [sae_folder])
    run = lm.run("import os\nimport")
    right, wrong = run.logits[0, -1].topk(2).indices.tolist()
    clean = float(run.logits[0, -1, right] - run.logits[0, -1, wrong])
    found = json.loads((tmp_path / "attribution.json").read_text())
    assert found["metric"] == pytest.approx(clean, abs=1e-4)
    sizes = [abs(row["score"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    for row in rows[:3]:
        with lm.steer({(HOOK, row["latent"]): Add(-row["activation"], where=row["position"])}):
            last = lm.run("import os\nimport").logits[0, -1]
        assert row["ablation"] == pytest.approx(clean - float(last[right] - last[wrong]), abs=1e-4)
        assert row["score"] == pytest.approx(row["ablation"], rel=0.4)
    assert [row["ablation"] is None for row in rows] == [False] * 6 + [True] * (len(rows) - 6)
    page = data_of(tmp_path / "attribution.html")
    assert "".join(page["token_texts"]) == "<|endoftext|>import os\nimport"
    assert f"latent {rows[0]['latent']} at token" in capsys.readouterr().out


@torch.no_grad()
def test_contrast_finds_and_ablates(sae_folder, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(A) + "\n\n")
    arguments = ["--saes", str(sae_folder), "--a", str(tmp_path / "a.txt"), "--b", json.dumps(B), "--top", "5"]
    assert contrast_command.main([*SETTINGS, *arguments, "--output", str(tmp_path / "out")]) == 0
    rows = pq.read_table(tmp_path / "out" / "contrast.parquet").to_pylist()
    lm = SaeModel.open(MODEL, [sae_folder])
    x, losses = {}, {}
    for text in A + B:
        run = lm.run(text)
        x[text] = run.latents[HOOK].to_dense()[0, 1:].mean(0).double().numpy()
        losses[text] = text_log_probability(run)
    for row in rows:
        latent = row["latent"]
        first, second = (np.array([x[text][latent] for text in side]) for side in (A, B))
        assert (row["mean_a"], row["mean_b"]) == pytest.approx((first.mean(), second.mean()), rel=1e-4, abs=1e-6)
        assert row["auc"] == pytest.approx(np.mean([(p > q) + (p == q) / 2 for p in first for q in second]))
    latent = rows[0]["latent"]
    effects = []
    for text in A:
        activation = lm.run(text).latents[HOOK].to_dense()[0, :, latent]
        at = {position: float(value) for position, value in enumerate(activation) if value > 0}
        change = torch.zeros(1, len(activation), 256)
        for position, value in at.items():
            change[0, position] = -value * lm.saes[HOOK].W_dec[latent]
        handle = lm.model.transformer.h[2].register_forward_hook(lambda _, __, y, c=change: y + c)
        effects.append(losses[text] - text_log_probability(lm.run(text)))
        handle.remove()
    assert rows[0]["effect_a"] == pytest.approx(np.mean(effects), abs=1e-5)
    assert [row["latent"] for row in data_of(tmp_path / "out" / "contrast.html")["rows"]] == [r["latent"] for r in rows]


def text_log_probability(run):
    each = run.logits[0, :-1].log_softmax(-1).gather(1, run.tokens[0, 1:, None])
    return float(each.mean())


@torch.no_grad()
def test_steer_measures_effect_and_damage(sae_folder, tmp_path, capsys):
    prompts = ["def read(path):", "import"]
    lm = SaeModel.open(MODEL, [sae_folder])
    lm.measure_maxima(prompts)
    latent = int(lm.maxima[HOOK].argmax())
    arguments = ["--saes", str(sae_folder), "--latent", str(latent), "--prompts", json.dumps(prompts)]
    more = ["--strengths", "0,2.5", "--concept", '[" os", " sys"]', "--random_latents", "3", "--max_new_tokens", "5"]
    assert (
        steer_command.main([*SETTINGS, *arguments, *more, "--n", "1", "--temperature", "0", "--output", str(tmp_path)])
        == 0
    )
    found = json.loads((tmp_path / "steering.json").read_text())
    own = {point["strength"]: point for point in found["points"] if not point["is_random"]}
    assert len(found["points"]) == 8
    assert own[0.0]["kl"] == 0
    clean = lm.run(prompts)
    with lm.steer({(HOOK, latent): Add(2.5 * float(lm.maxima[HOOK][latent]))}):
        steered = lm.run(prompts)
        tokens = lm.generate_tokens(prompts, 5, temperature=0)
    concept = [lm.tokenizer(" os")["input_ids"][0], lm.tokenizer(" sys")["input_ids"][0]]
    ends = [steered.logits[i, int(steered.lengths[i]) - 1].softmax(-1)[concept].sum().log() for i in range(2)]
    assert own[2.5]["effect"] == pytest.approx(float(sum(ends) / 2), abs=1e-4)
    total, n = 0.0, 0
    for ids, new in zip(lm.tokens(prompts), tokens, strict=True):
        logits = lm.model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0].log_softmax(-1)
        total += sum(float(logits[len(ids) + i - 1, token]) for i, token in enumerate(new))
        n += len(new)
    assert own[2.5]["perplexity"] == pytest.approx(np.exp(-total / n), rel=1e-4)
    kl = []
    for i in range(2):
        p, q = (each.logits[i, : int(clean.lengths[i])].log_softmax(-1) for each in (clean, steered))
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert own[2.5]["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
    random = [point["kl"] for point in found["points"] if point["is_random"] and point["strength"] == 2.5]
    assert found["baseline"]["kl"][1]["mean"] == pytest.approx(np.mean(random))
    assert data_of(tmp_path / "steering.html")["latent"] == latent
    assert "strength 2.5: effect" in capsys.readouterr().out


@torch.no_grad()
def test_steer_finds_the_latent_that_adds_most_to_the_concept(sae_folder, tmp_path, capsys):
    prompts = ["import os\nimport", "import"]
    arguments = ["--prompts", json.dumps(prompts), "--concept", '[" os", " sys"]', "--strengths", "1", "--n", "1"]
    more = ["--random_latents", "0", "--max_new_tokens", "2", "--output", str(tmp_path)]
    assert steer_command.main([*SETTINGS, "--saes", str(sae_folder), *arguments, *more]) == 0
    chosen = json.loads((tmp_path / "steering.json").read_text())["latent"]
    assert f"latent {chosen} at {HOOK} adds most to ' os', ' sys'" in capsys.readouterr().out
    lm = SaeModel.open(MODEL, [sae_folder])
    concept = [lm.tokenizer(" os")["input_ids"][0], lm.tokenizer(" sys")["input_ids"][0]]
    drops = np.zeros(300)
    for prompt in prompts:
        run = lm.run(prompt)
        clean = run.logits[0, -1].softmax(-1)[concept].sum().log()
        x = run.latents[HOOK].to_dense()[0]
        for latent in x.sum(0).nonzero()[:, 0].tolist():
            at = [(position, float(value)) for position, value in enumerate(x[:, latent]) if value > 0]
            change = torch.zeros(1, len(x), 256)
            for position, value in at:
                change[0, position] = -value * lm.saes[HOOK].W_dec[latent]
            handle = lm.model.transformer.h[2].register_forward_hook(lambda _, __, y, c=change: y + c)
            drops[latent] += float(clean - lm.run(prompt).logits[0, -1].softmax(-1)[concept].sum().log())
            handle.remove()
    assert drops[chosen] > 0.7 * drops.max()  # its score is an estimate


def test_a_scorer_of_ones_own_and_what_does_not_fit(sae_folder):
    lm = SaeModel.open(MODEL, [sae_folder])
    with pytest.raises(InterventionError, match="call measure_maxima"):
        steering_curve(lm, HOOK, 1, [1.0], ["import"], random_latents=2)
    curve = steering_curve(
        lm, HOOK, 1, [0.0, 3.0], ["import"], scorer=lambda texts: map(len, texts), random_latents=0, max_new_tokens=3
    )
    for point in curve.points:
        lengths = [len(text["text"]) for text in curve.texts if text["strength"] == point["strength"]]
        assert point["score"] == np.mean(lengths)
    assert baseline_of(curve, "kl") == []


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (steer_command, ["--latent", "300", "--prompts", "import"], "no latent 300"),
        (steer_command, ["--latent", "3", "--prompts", "import", "--hook_point", "blocks.1.resid_post"], "no SAE at"),
        (steer_command, ["--latent", "3", "--prompts", "none.txt"], "cannot read 'none.txt'"),
        (steer_command, ["--prompts", "import"], "neither latent nor concept"),
        (attribute_command, ["--text", "import", "--right", "two tokens here"], "expected one token"),
        (attribute_command, ["--text", "x = 1\n" * 200], "longer than the model's context of 256"),
        (contrast_command, ["--a", '["one"]', "--b", '["two", "three"]'], "at least two texts"),
        (contrast_command, ["--a", '["a", "b"]', "--b", '["two", "three"]', "--right", "a"], "give both or none"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(sae_folder, tmp_path, capsys, command, arguments, expected):
    output = tmp_path / "out"
    assert command.main([*SETTINGS, "--saes", str(sae_folder), "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not output.exists()
