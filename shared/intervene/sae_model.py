"""A language model with SAEs in it: run it, steer it, generate from it, and find what its latents cause."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..core.errors import InterventionError
from .ablation import Replacement, ablate
from .attribution import Method, attribute
from .generation import OnTokens, Sampling, sample
from .metrics import MetricLike
from .run import Run
from .scores import Scores
from .spliced_model import SplicedModel
from .texts import Prompts


class SaeModel(SplicedModel):
    """A causal language model with any number of SAEs, transcoders and crosscoders at its hook points.

    `open` loads one, `run` gives logits and latents, `steer` edits latents in all that follows, `generate` continues
    texts, and `ablate` and `attribute` say which latents a metric of the logits depends on.

    Attributes:
        model: the Hugging Face model.
        tokenizer: its tokenizer, or None.
        saes: the SAEs by hook point.
        skipped: the token that SAEs leave alone, or None.
        maxima: for each SAE, the largest activation of each latent `[d_sae]`: what `unit="max"` means.
    """

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 40,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        n: int = 1,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> list[str]:
        """Return `n` continuations of each prompt, those of the first prompt first; special tokens are left out.

        With `temperature=0` the likeliest token is taken each time. A crosscoder's edit reads the unedited text again
        at each token, without a cache.

        Raises:
            InterventionError: prompt and new tokens are longer than the model's context, or a setting is out of bounds.
        """
        lists = self.generate_tokens(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            n=n,
            seed=seed,
            use_cache=use_cache,
        )
        if self.tokenizer is None:
            raise InterventionError("the model was opened without a tokenizer; use generate_tokens")
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in lists]

    def generate_tokens(
        self, prompts: Prompts, max_new_tokens: int = 40, *, on_tokens: OnTokens | None = None, **settings: Any
    ) -> list[list[int]]:
        """Return the token ids of continuations, each up to the end-of-text token; settings are those of `generate`.

        `on_tokens` is called with the next token of every continuation as soon as it is there.
        """
        return sample(self, self.tokens(prompts), Sampling(max_new_tokens, **settings), on_tokens)

    def ablate(
        self,
        run: Run,
        metric: MetricLike,
        replacement: Replacement = "zero",
        *,
        by: str = "position",
        only: Mapping[str, Iterable[int]] | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> Scores:
        """Return what a metric loses if a latent is ablated: exactly, by one pass for each active latent.

        Args:
            run: the clean run, or a steered one if this is called within the same `steer`.
            metric: see `metrics`; its drop is positive where the latent raises it.
            replacement: "zero", "mean" (over the run's tokens), or "resample" (its activation at a random token of it).
            by: "position" for each latent at each token, "latent" for each latent at all tokens of a text at once.
            only: the latents to ablate, by hook point; by default all that are active.
            batch_size: passes that run at once.
            seed: of "resample".
        """
        return ablate(self, run, metric, replacement, by=by, only=only, batch_size=batch_size, seed=seed)

    def attribute(
        self,
        run: Run,
        metric: MetricLike,
        method: Method = "attribution_patching",
        *,
        steps: int = 2,
        groups: int = 32,
        baseline: Mapping[str, Float[Tensor, " d_sae"]] | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> Scores:
        """Return an estimate of what a metric loses if each active latent, or each error, is set to its baseline.

        "attribution_patching" is the gradient times the activation minus the baseline, from one pass forward and back.
        "integrated_gradients" divides each SAE's active latents into `groups` and averages the gradient over `steps`
        points of each group's path to the baseline: `groups * steps` passes for a text. Errors are scored by the
        gradient alone.

        Args:
            run: the clean run, or a steered one if this is called within the same `steer`.
            metric: see `metrics`.
            method: how to estimate.
            steps: points of each path.
            groups: paths; with one, all latents move at once.
            baseline: by hook point, the activation that each latent is compared with; by default zero.
            batch_size: passes that run at once.
            seed: of the random groups.

        Raises:
            InterventionError: the metric has no gradient.
        """
        return attribute(self, run, metric, method, steps, groups, baseline, batch_size, seed)
