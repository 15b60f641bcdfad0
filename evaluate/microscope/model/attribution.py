"""Which latents a prompt's next token depends on: the graph's stand-in for a run without transcoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....shared.intervene.metrics import LogProbability
from ...report.definitions import significant
from .loaded import LoadedModel
from .worker import Job

N_ROWS = 60


def attribute_prompt(lm: LoadedModel, job: Job, tokens: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Return what each latent adds to the log-probability of the likeliest next token, in nats, by its token.

    An estimate, attribution patching: the gradient times the activation (`SaeModel.attribute`). `errors` is what the
    SAE's error at each token adds.

    Raises:
        InterventionError: two of the SAEs are at the same hook point.
    """
    job.check()
    spliced, keys = lm.with_saes(names)
    run = spliced.run([list(tokens)])
    probabilities = run.logits[0, -1].detach().float().softmax(dim=-1)
    target = int(probabilities.argmax())
    job.check()
    scores = spliced.attribute(run, LogProbability(token=target))
    by_hook_point = {key: name for name, key in keys.items()}
    (text,) = lm.alone([target])
    active = {name: run.latents[key] for name, key in keys.items()}
    rows = []
    for row in scores.table(N_ROWS):
        if not row["score"]:
            break  # the rest act on nothing that is predicted here
        name = by_hook_point[row["hook_point"]]
        activation = active[name][0, row["position"], row["latent"]]
        kept = {"sae": name, "latent": row["latent"], "position": row["position"]}
        rows.append(kept | {"score": significant(row["score"], 5), "activation": significant(float(activation), 5)})
    errors = {name: [significant(float(value), 5) for value in scores.errors[key][0]] for name, key in keys.items()}
    return {
        "tokens": [{"id": token, "text": word} for token, word in zip(tokens, lm.texts(tokens), strict=True)],
        "target": {"id": target, "text": text, "probability": significant(float(probabilities[target]), 4)},
        "latents": rows,
        "errors": errors,
    }
