"""Print, as JSON, how much memory spliced losses take beyond a forward pass, and the clean loss computed by hand.

python tests/real/large_vocabulary.py MODEL
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from thresher.evaluate.metrics.bootstrap import point_estimates
from thresher.evaluate.metrics.held_out import HeldOut
from thresher.evaluate.saes.sae_folders import EvaluatedSae
from thresher.evaluate.with_model.splice_losses import accumulate_losses, splice_metrics
from thresher.shared.model.capture import resolve_hook_points
from thresher.shared.model.language_model import load_model
from thresher.shared.sae import Sae

HOOK, BATCH, CONTEXT = "blocks.9.resid_post", 4, 256


def peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    torch.manual_seed(0)
    model = load_model(sys.argv[1], dtype="bfloat16")
    width = model.config.hidden_size
    tokens = torch.randint(1000, 200_000, (2 * BATCH, CONTEXT))
    tokens[:, 0] = 2
    usable = (tokens != 2).numpy()
    store = SimpleNamespace(
        path="store",
        context_size=CONTEXT,
        tokens=lambda start, stop: tokens.reshape(-1)[start:stop].int(),
        moments=lambda hook: SimpleNamespace(mean=np.zeros(width)),
    )
    group = np.repeat(np.arange(2 * BATCH)[:, None], CONTEXT, axis=1)
    rows = HeldOut(store, np.arange(2 * BATCH), usable, group, 2 * BATCH)
    W_dec = F.normalize(torch.randn(256, width), dim=1)
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(256), "W_dec": W_dec, "b_dec": torch.zeros(width)}
    sae = EvaluatedSae("sae", None, Sae("topk", tensors, hook_point=HOOK, config={"k": 8}), HOOK, HOOK)
    hook_points = resolve_hook_points(model, [HOOK])
    losses = []
    with torch.no_grad():
        for part, kept in zip(tokens.split(BATCH), torch.from_numpy(usable).split(BATCH), strict=True):
            logits = model(part).logits
            counts = kept[:, :-1] & kept[:, 1:]
            for context in range(BATCH):  # in float64, one context at a time, before memory is measured
                scores = logits[context, :-1][counts[context]]
                losses += [
                    F.cross_entropy(row.double()[None], target[None])
                    for row, target in zip(scores, part[context, 1:][counts[context]], strict=True)
                ]
    n_bytes, vocabulary = logits.numel() * logits.element_size(), logits.shape[-1]
    del logits
    before = peak()
    sums = accumulate_losses(model, hook_points, [sae], rows, BATCH)
    metrics = point_estimates(splice_metrics, sums["sae"])
    found = {"vocabulary": vocabulary, "logits_bytes": n_bytes, "increase": peak() - before}
    found |= {"ce_clean": float(metrics["ce_clean"]), "ce_sae": float(metrics["ce_sae"])}
    print(json.dumps(found | {"ce_by_hand": float(torch.stack(losses).mean())}))


if __name__ == "__main__":
    main()
