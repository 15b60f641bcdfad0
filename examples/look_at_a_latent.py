"""Evaluate two small SAEs and look at one latent.

    python examples/look_at_a_latent.py [OUTPUT]

Harvests and trains first, so that it needs nothing from the other examples. Takes a quarter of a minute on a CPU. Open
`OUTPUT/evaluation/report.html` to browse all latents.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from thresher import EvaluateConfig, HarvestConfig, TrainConfig, evaluate, harvest, train
from thresher.evaluate.features.files import FeatureIndex

MODEL = Path(__file__).parents[1] / "models" / "stdlib-lm"
HOOK_POINT = "blocks.2.resid_post"


def make_saes(output: Path, tokens: int) -> None:
    """Harvest a store and train a sweep of two SAEs; a list of values is a grid."""
    store = str(output / "store")
    harvest(HarvestConfig(model=str(MODEL), hook_points=[HOOK_POINT], tokens=tokens, store=store, holdout_fraction=0.2))
    tables = [{"architecture": "topk", "hook_point": HOOK_POINT, "d_sae": 512, "k": [8, 16], "lr": 5e-3}]
    train(TrainConfig(store=store, output=str(output / "saes"), sae=tables, batch_size=512, warmup_steps=10))


def show(index: FeatureIndex, latent: dict[str, Any]) -> None:
    """Print what a latent fires on: its peak token is marked in each context."""
    print(f"\nlatent {latent['latent']}: fires on {latent['density']:.2%} of the rows")
    for context in latent["top"][:5]:
        texts = index.texts.in_context(context["tokens"])
        peak = context["peak"]
        before, after = "".join(texts[max(peak - 8, 0) : peak]), "".join(texts[peak + 1 : peak + 5])
        name = index.documents.get(context["document"], "")
        print(f"{context['activation']:8.2f}  {before!r} [{texts[peak]!r}] {after!r}  {name}")
    print("promotes:", ", ".join(repr(index.texts.alone(effect["token"])) for effect in latent["promoted"][:8]))


def main(output: Path, tokens: int = 65_536) -> dict[str, Any]:
    make_saes(output, tokens)

    # Metrics on held-out text, from the store and with each SAE spliced into the model; report.html shows them all.
    results = evaluate(
        EvaluateConfig(
            store=str(output / "store"),
            saes=str(output / "saes"),
            output=str(output / "evaluation"),
            model_rows=2048,
            feature_rows=tokens,
        )
    )
    for row in results:
        print(f"{row['name']}: explained variance {row['explained_variance']:.3f}, CE score {row['ce_loss_score']:.3f}")

    # The feature index holds a row per latent: statistics, top contexts, promoted tokens.
    index = FeatureIndex.open(output / "evaluation" / "features" / f"{results[0]['name']}.parquet")
    scores = index.columns(["interestingness"])["interestingness"].to_numpy()
    latent = index.latent(int(scores.argmax()))
    show(index, latent)
    return latent


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/look_at_a_latent"))
