"""The columns of the report's table: each metric's label, definition and format."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

Style = Literal["text", "integer", "fraction", "percent", "number"]


class Column(NamedTuple):
    """One column; `better` says which direction is better, or is empty if neither is."""

    key: str
    label: str
    style: Style
    better: Literal["higher", "lower", "nearer 1", ""]
    definition: str


def _probe_columns(prefix: str, label: str, what: str) -> tuple[Column, ...]:
    """Return the columns of a kind of k-sparse probes."""
    accuracy = "Mean held-out accuracy of a logistic regression on"
    return (
        *(
            Column(
                f"{prefix}_accuracy_k{k}",
                f"{label}, k = {k}",
                "fraction",
                "higher",
                f"{accuracy} {k} latent{'s' * (k > 1)} for {what}.",
            )
            for k in (1, 2, 5, 16)
        ),
        Column(
            f"{prefix}_accuracy_activations",
            f"{label}, activations",
            "fraction",
            "",
            f"{accuracy} the activations themselves for {what}.",
        ),
        Column(f"{prefix}_tasks", f"{label}, tasks", "integer", "", "Number of tasks that these accuracies are over."),
    )


METRICS = (
    Column("name", "SAE", "text", "", "Name of the SAE, which is also its folder in the sweep."),
    Column("architecture", "Architecture", "text", "", "How the latents are made sparse."),
    Column("hook_point", "Hook point", "text", "", "Where in the language model the activations were taken."),
    Column("d_sae", "d_sae", "integer", "", "Number of latents."),
    Column("k", "k", "integer", "", "Latents kept per token, for the TopK architectures."),
    Column("l1_coefficient", "L1 coefficient", "number", "", "Weight of the L1 penalty, for ReLU and gated SAEs."),
    Column("l0_coefficient", "L0 coefficient", "number", "", "Weight of the sparsity penalty, for JumpReLU."),
    Column("target_l0", "Target L0", "number", "", "The L0 that JumpReLU's penalty aims at, if one was set."),
    Column("l0", "L0", "number", "lower", "Mean number of latents active per token."),
    Column("published_l0", "Published L0", "number", "", "The L0 that the release of the SAE states."),
    Column(
        "published_explained_variance",
        "Published explained variance",
        "fraction",
        "",
        "The explained variance that the release of the SAE states.",
    ),
    Column(
        "explained_variance",
        "Explained variance",
        "fraction",
        "higher",
        "1 - E‖x - x̂‖² / (E‖x‖² - ‖E x‖²), over all evaluated tokens.",
    ),
    Column(
        "explained_variance_without_outliers",
        "Explained variance, usual rows",
        "fraction",
        "higher",
        "Explained variance without outliers: rows whose distance from the mean is above 10 median distances.",
    ),
    Column(
        "outlier_rows", "Outliers", "integer", "", "Number of evaluated rows that are outliers: massive activations."
    ),
    Column(
        "outlier_variance_share",
        "Outliers' share",
        "percent",
        "",
        "Share of the variance that the outliers hold; where it is large, explained variance is mostly theirs.",
    ),
    Column("fvu", "FVU", "fraction", "lower", "Fraction of variance unexplained: 1 - explained variance."),
    Column("mse", "MSE", "number", "lower", "E‖x - x̂‖²: squared error summed over d_in, averaged over tokens."),
    Column("cossim", "Cosine", "fraction", "higher", "Mean over tokens of the cosine between x and x̂."),
    Column("l2_ratio", "L2 ratio", "fraction", "nearer 1", "Mean of ‖x̂‖ / ‖x‖: below 1 the SAE shrinks its input."),
    Column(
        "relative_reconstruction_bias",
        "Reconstruction bias",
        "fraction",
        "nearer 1",
        "E‖x̂‖² / E[x · x̂]: 1 if the scale of the reconstruction is unbiased.",
    ),
    Column("l1", "L1", "number", "", "Mean over tokens of the sum of the latents' activations."),
    Column("dead_fraction", "Dead", "percent", "lower", "Share of latents that fired on no evaluated token."),
    Column(
        "ce_loss_score",
        "CE loss score",
        "fraction",
        "higher",
        "(CE_zero - CE_sae) / (CE_zero - CE_clean): 1 if the model with the SAE spliced in predicts as well as without "
        "it; 0 if it predicts as badly as with the activation set to zero.",
    ),
    Column(
        "kl_div_score",
        "KL score",
        "fraction",
        "higher",
        "(KL_zero - KL_sae) / KL_zero, with KL the divergence of the model's predictions from the clean model's.",
    ),
    Column(
        "top1_agreement",
        "Top-1 agreement",
        "percent",
        "higher",
        "Share of tokens after which the model with the SAE predicts the same next token as the clean model.",
    ),
    Column(
        "ce_clean",
        "CE clean",
        "number",
        "",
        "Cross-entropy of the unmodified model, in nats per token. This and the other cross-entropies do not count "
        "predictions of masked tokens, such as a BOS before a document.",
    ),
    Column("ce_sae", "CE with SAE", "number", "lower", "Cross-entropy with the SAE spliced in, in nats per token."),
    Column("ce_zero", "CE zero", "number", "", "Cross-entropy with the activation set to zero, in nats per token."),
    Column("ce_mean", "CE mean", "number", "", "Cross-entropy with the activation set to its mean, in nats per token."),
    Column(
        "kl_sae", "KL with SAE", "number", "lower", "KL divergence of the predictions with the SAE, in nats per token."
    ),
    Column("kl_zero", "KL zero", "number", "", "KL divergence with the activation set to zero, in nats per token."),
    Column("kl_mean", "KL mean", "number", "", "KL divergence with the activation set to its mean, in nats per token."),
    Column(
        "ce_loss_score_mean_ablation",
        "CE loss score, mean",
        "fraction",
        "higher",
        "The CE loss score with the activation set to its mean instead of zero.",
    ),
    Column(
        "kl_div_score_mean_ablation",
        "KL score, mean",
        "fraction",
        "higher",
        "The KL score with the activation set to its mean instead of zero.",
    ),
    Column(
        "max_decoder_cosine_mean",
        "Max decoder cosine",
        "fraction",
        "lower",
        "Mean over live latents of the largest cosine of their decoder row with another. Near 1, latents are copies.",
    ),
    Column(
        "encoder_decoder_cosine_mean",
        "Encoder-decoder cosine",
        "fraction",
        "",
        "Mean over live latents of the cosine between encoder column and decoder row.",
    ),
    *_probe_columns("probe", "Probe accuracy", "whether the next token is a particular one"),
    *_probe_columns("label", "Label", "whether a text has a particular label, from means over its tokens"),
    *_probe_columns("first_letter", "First letter", "whether a row's own token begins with a particular letter"),
    Column(
        "f1",
        "F1",
        "fraction",
        "higher",
        "Mean over latents of the harmonic mean of precision and recall, each latent taken as a detector of the true "
        "feature whose direction is closest to its decoder row.",
    ),
    Column("precision", "Precision", "fraction", "higher", "Mean share of a latent's firings where its feature fires."),
    Column("recall", "Recall", "fraction", "higher", "Mean share of a feature's firings where its latent fires."),
    Column(
        "mcc",
        "MCC",
        "fraction",
        "higher",
        "Mean absolute cosine of decoder rows and true directions under the best one-to-one matching.",
    ),
    Column(
        "uniqueness",
        "Uniqueness",
        "fraction",
        "higher",
        "Number of features that are some latent's closest one, per latent: 1 if no two latents share one.",
    ),
    Column("shrinkage", "Shrinkage", "fraction", "nearer 1", "Mean of ‖x̂‖ / ‖x‖ over the rows drawn from the law."),
    Column(
        "absorption",
        "Absorption",
        "fraction",
        "lower",
        "For latents whose feature has children: the share of its firings that they miss when a child fires, minus the "
        "share when none does.",
    ),
    Column(
        "splitting",
        "Splitting",
        "fraction",
        "lower",
        "Among features with children of which a latent exists for itself or a child: the share that has no latent of "
        "its own.",
    ),
    Column("true_l0", "True L0", "number", "", "Mean number of features that fire per row of the law."),
    Column(
        "seed_stability",
        "Stability, seeds",
        "fraction",
        "higher",
        "Mean cosine of live decoder rows with the matched ones of SAEs that differ in their seed only.",
    ),
    Column("repetitions", "Repetitions", "integer", "", "Number of SAEs that differ in their seed only."),
    Column(
        "half_stability",
        "Stability, data",
        "fraction",
        "higher",
        "Mean cosine of live decoder rows with the matched ones of the SAE trained on the other half of the documents.",
    ),
    Column(
        "pursuit_explained_variance",
        "Explained variance, pursuit",
        "fraction",
        "higher",
        "Explained variance of non-negative gradient pursuit with the decoder, at the encoder's L0.",
    ),
    Column(
        "amortisation_gap",
        "Amortisation gap",
        "fraction",
        "lower",
        "By how much the encoder's explained variance is below that of pursuit.",
    ),
    Column("n_rows", "Tokens", "integer", "", "Number of held-out tokens evaluated."),
    Column("n_model_tokens", "Model tokens", "integer", "", "Number of those tokens on which the model was run."),
    Column(
        "n_predictions",
        "Predictions",
        "integer",
        "",
        "Number of next-token predictions that the cross-entropies count.",
    ),
)
NOT_COLUMNS = (
    *("n_contexts", "n_documents", "d_in", "top1_agreement_zero", "top1_agreement_mean"),
    *(f"ce_{part}_saelens" for part in ("clean", "zero", "sae", "loss_score")),
    *(f"max_decoder_cosine_{part}" for part in ("p50", "p90", "p99", "max")),
)
PER_HOOK = (
    *(metric for metric in METRICS if metric.key in ("hook_point", "l0", "explained_variance", "mse")),
    *(metric for metric in METRICS if metric.key in ("ce_loss_score", "kl_div_score")),
    Column(
        "decoder_norm_share", "Decoder norm share", "percent", "", "Mean share of the live latents' decoder norms here."
    ),
)
"""The columns of the table of crosscoders and cross-layer transcoders at each hook point that they write."""
PROVENANCE_LABELS = {"n_rows": "Tokens", "n_contexts": "Contexts", "n_documents": "Documents"}
NOT_MEASURED = "\N{EN DASH}"
KNOWN = {metric.key: metric for metric in METRICS}
FIRST = ("name", "l0", "explained_variance", "ce_loss_score", "kl_div_score", "dead_fraction")
ALWAYS_SHOWN = (*FIRST[:-2], "dead_fraction", "architecture", "hook_point", "d_sae")


def columns(metrics: list[dict[str, Any]]) -> list[Column]:
    """Return the columns of a table of `metrics`: the known metrics that any SAE has, then other plain numbers."""
    present = {key for row in metrics for key, value in row.items() if value is not None}
    ordered = [KNOWN[key] for key in FIRST] + [metric for metric in METRICS if metric.key not in FIRST]
    known = [metric for metric in ordered if metric.key in present or metric.key in ALWAYS_SHOWN]
    others = [key for key in dict.fromkeys(key for row in metrics for key in row) if key not in (*KNOWN, *NOT_COLUMNS)]
    return known + [
        Column(key, key.replace("_", " "), "number", "", f"`{key}` in metrics.json.")
        for key in others
        if any(isinstance(row.get(key), int | float) and not isinstance(row.get(key), bool) for row in metrics)
    ]


def significant(value: float | None, digits: int = 6) -> float | None:
    """Return a number with a few significant digits; None for None, NaN and infinity."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def format_value(value: Any, style: Style) -> str:
    """Format a value for the report; a missing value gives a dash."""
    if value is None or value != value:
        return NOT_MEASURED
    if style == "text" or isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return ", ".join(format_value(item, style) for item in value)
    if style == "integer" and float(value).is_integer():
        return f"{int(value):,}"
    if style == "percent":
        return f"{100 * value:.1f}%"
    if style == "fraction":
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
