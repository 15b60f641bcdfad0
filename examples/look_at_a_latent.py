"""Evaluate two small SAEs and look at one latent.

    python examples/look_at_a_latent.py [OUTPUT]

Harvests and trains first, so that it needs nothing from the other examples. Takes a quarter of a minute on a CPU. Open
`OUTPUT/evaluation/report.html` to browse all latents. In a notebook, `show` draws a card.
"""

from __future__ import annotations

import sys
from pathlib import Path

from thresher import evaluate, harvest, show, train
from thresher.evaluate.features.files import FeatureIndex
from thresher.evaluate.notebook.latent_card import LatentCard

HOOK_POINT = "blocks.2.resid_post"


def main(output: Path, tokens: int = 65_536) -> LatentCard:
    # A store, and a sweep of two SAEs: a list of values is a grid.
    store = output / "store"
    harvest(model="stdlib-lm", hook_points=[HOOK_POINT], tokens=tokens, store=store, holdout_fraction=0.2)
    tables = [{"architecture": "topk", "hook_point": HOOK_POINT, "d_sae": 512, "k": [8, 16], "lr": 5e-3}]
    train(store=store, output=output / "saes", sae=tables, batch_size=512, warmup_steps=10)

    # Metrics on held-out text, from the store and with each SAE spliced into the model; report.html shows them all.
    evaluation = output / "evaluation"
    results = evaluate(store=store, saes=output / "saes", output=evaluation, model_rows=2048, feature_rows=tokens)
    for row in results:
        print(f"{row['name']}: explained variance {row['explained_variance']:.3f}, CE score {row['ce_loss_score']:.3f}")

    # The feature index holds a row per latent: statistics, top contexts, promoted tokens.
    name = results[0]["name"]
    index = FeatureIndex.open(evaluation / "features" / f"{name}.parquet")
    scores = index.columns(["interestingness"])["interestingness"].to_numpy()
    card = show(name, int(scores.argmax()), evaluation)
    print(card)
    return card


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/look_at_a_latent"))
