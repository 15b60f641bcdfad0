"""Run the commands: open the model with its SAEs, measure, and write results and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...shared.core.disk import write_file
from ...shared.core.errors import ConfigError, DataError, HookPointError
from ...shared.core.paths import user_path
from ...shared.core.terminal.results import print_result
from ...shared.intervene.edits import Add, Edit
from ...shared.intervene.metrics import LogitDifference, LogProbability
from ...shared.intervene.sae_model import SaeModel
from ...shared.intervene.spliced_model import Target
from ...shared.intervene.texts import one_token
from ..features.token_text import TokenTexts
from ..results.output import parquet_bytes
from .config import AttributeConfig, CausalConfig, ContrastConfig, SteerConfig
from .contrast import contrast as contrast_texts
from .lm_eval_files import write_lm_eval
from .pages import write_page
from .steering_curve import SteeringCurve, baseline_of, steering_curve, strongest_latent

QUANTITIES = ("effect", "kl", "perplexity")


def steer(config: SteerConfig) -> SteeringCurve:
    """Steer a latent at several strengths, and write what was found, the texts, a page, and steering files if asked."""
    prompts = read_texts(config.prompts, "prompts")
    maxima = prompts if config.maxima_texts is None else read_texts(config.maxima_texts, "maxima_texts")
    lm = _open(config)
    hook_point = _hook_point(lm, config.hook_point)
    lm.at(hook_point)
    latent = config.latent
    if latent is None:
        latent = strongest_latent(lm, hook_point, prompts, config.concept)
        print_result(f"latent {latent} at {hook_point} adds most to {', '.join(map(repr, config.concept))}")
    lm.measure_maxima(maxima, config.batch_size)
    curve = steering_curve(
        lm,
        hook_point,
        latent,
        config.strengths,
        prompts,
        concept=config.concept,
        action=config.action,
        unit=config.unit,
        where=config.where,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        n=config.n,
        random_latents=config.random_latents,
        seed=config.seed,
    )
    maximum = float(lm.maxima[hook_point][latent])
    baseline = {key: baseline_of(curve, key) for key in QUANTITIES}
    found = {"hook_point": hook_point, "latent": latent, "maximum": maximum}
    found |= {"action": config.action, "unit": config.unit, "where": config.where, "concept": config.concept}
    found |= {"points": curve.points, "baseline": baseline}
    output = user_path(config.output)
    _write_json(output / "steering.json", found)
    write_file(output / "texts.parquet", parquet_bytes(pa.Table.from_pylist(curve.texts)))
    if config.lm_eval:
        for strength in dict.fromkeys(config.strengths):
            edits: dict[Target, Edit] = {(hook_point, latent): Add(strength, unit=config.unit)}
            write_lm_eval(lm, edits, output / f"strength-{strength:g}.pt")
    title = f"Steering latent {latent} at {hook_point}"
    page = write_page(output / "steering.html", "steering", title, config.model, found | {"texts": curve.texts})
    own = [point for point in curve.points if not point["is_random"]]
    for point in own:
        values = "  ".join(f"{key} {point[key]:.3g}" for key in QUANTITIES if point[key] is not None)
        print_result(f"strength {point['strength']:g}: {values}")
    print_result(f"wrote '{page}'")
    return curve


def report_attribution(config: AttributeConfig) -> list[dict[str, Any]]:
    """Score each latent's part in a prediction; write attribution.parquet, attribution.json and attribution.html."""
    lm = _open(config)
    run = lm.run(config.text)
    likeliest = run.logits[0, int(run.lengths[0]) - 1].topk(2).indices.tolist()
    right = likeliest[0] if config.right is None else one_token(config.right, lm.tokenizer)
    wrong = next(token for token in likeliest if token != right)
    wrong = wrong if config.wrong is None else one_token(config.wrong, lm.tokenizer)
    metric = LogitDifference(right, wrong)
    scores = lm.attribute(
        run,
        metric,
        config.method,
        steps=config.steps,
        groups=config.groups,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    rows = scores.table(None)
    for row in rows:
        row["activation"] = float(run.latents[row["hook_point"]][0, row["position"], row["latent"]])
        row["ablation"] = None
    _verify(lm, run, metric, rows[: config.verify], config.batch_size)
    tokens = run.tokens[0].tolist()
    assert lm.tokenizer is not None
    texts = TokenTexts.of(lm.tokenizer, {*tokens, right, wrong})
    errors = {name: each[0].tolist() for name, each in scores.errors.items()}
    found = {"tokens": tokens, "token_texts": texts.in_context(tokens), "right": texts.alone(right)}
    found |= {"wrong": texts.alone(wrong), "metric": float(scores.metric[0]), "method": config.method}
    found |= {"probability": float(run.logits[0, int(run.lengths[0]) - 1].float().softmax(-1)[right]), "errors": errors}
    output = user_path(config.output)
    _write_json(output / "attribution.json", found)
    table = [{key: value for key, value in row.items() if key != "text"} for row in rows]
    write_file(output / "attribution.parquet", parquet_bytes(pa.Table.from_pylist(table)))
    title = f"Why “{texts.alone(right)}” rather than “{texts.alone(wrong)}”"
    page = write_page(output / "attribution.html", "attribution", title, config.model, found | {"rows": rows[:2000]})
    print_result(f"logit of {texts.alone(right)!r} minus that of {texts.alone(wrong)!r}: {found['metric']:.3f}")
    for row in rows[:5]:
        measured = "" if row["ablation"] is None else f", {row['ablation']:+.3f} if ablated"
        where = f"token {row['position']} {texts.alone(tokens[row['position']])!r}"
        print_result(f"{row['hook_point']} latent {row['latent']} at {where}: {row['score']:+.3f}{measured}")
    print_result(f"wrote '{page}'")
    return rows


def report_contrast(config: ContrastConfig) -> list[dict[str, Any]]:
    """Compare two sets of texts, and write contrast.parquet and contrast.html."""
    a, b = read_texts(config.a, "a"), read_texts(config.b, "b")
    lm = _open(config)
    metric = (
        LogProbability(start=1, mean=True)
        if config.right is None or config.wrong is None
        else LogitDifference(config.right, config.wrong)
    )
    rows = contrast_texts(lm, a, b, metric=metric, pool=config.pool, top=config.top, batch_size=config.batch_size)
    output = user_path(config.output)
    write_file(output / "contrast.parquet", parquet_bytes(pa.Table.from_pylist(rows)))
    of = "log-probability per token" if config.right is None else f"logit of {config.right!r} minus {config.wrong!r}"
    found = {"rows": rows, "n_a": len(a), "n_b": len(b), "metric": of, "pool": config.pool}
    page = write_page(output / "contrast.html", "contrast", "Contrast of two sets of texts", config.model, found)
    for row in rows[:5]:
        effects = f"ablated: {row['effect_a']:+.3g} in a, {row['effect_b']:+.3g} in b"
        print_result(f"{row['hook_point']} latent {row['latent']}: AUC {row['auc']:.3f}, q {row['q']:.2g}; {effects}")
    print_result(f"wrote '{page}'")
    return rows


def read_texts(given: str | Sequence[str], key: str) -> list[str]:
    """Return the texts that a setting gives: one, several, or the lines of a .txt file.

    Raises:
        DataError: the file is not there, or has no text.
    """
    if not isinstance(given, str):
        return list(given)
    if not given.endswith(".txt"):
        return [given]
    try:
        lines = user_path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read '{given}', which {key} names: {error}") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise DataError(f"'{given}', which {key} names, has no text; expected one on each line")
    return texts


def _open(config: CausalConfig) -> SaeModel:
    saes = [config.saes] if isinstance(config.saes, str) else config.saes
    return SaeModel.open(
        config.model,
        saes,
        error=config.error,
        dtype=config.model_dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _hook_point(lm: SaeModel, given: str | None) -> str:
    if given is not None:
        return lm.at(given).name
    if len(lm.saes) > 1:
        raise ConfigError(f"there are SAEs at {', '.join(lm.saes)}; say which with hook_point")
    if not lm.saes:
        raise HookPointError("there is no SAE to steer; give saes")
    return next(iter(lm.saes))


def _verify(lm: SaeModel, run: Any, metric: LogitDifference, rows: list[dict[str, Any]], batch_size: int) -> None:
    """Ablate the latents of some rows, each at its token, and keep what the metric loses."""
    only: dict[str, set[int]] = {}
    for row in rows:
        only.setdefault(row["hook_point"], set()).add(row["latent"])
    if rows:
        found = lm.ablate(run, metric, only=only, batch_size=batch_size).latents
        for row in rows:
            row["ablation"] = float(found[row["hook_point"]][0, row["position"], row["latent"]])


def _write_json(path: Path, content: Any) -> None:
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
