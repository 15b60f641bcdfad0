"""Run `thresher graph`: open the model and its transcoders, make the graph, check it, and write it and its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...shared.core.config import configured
from ...shared.core.disk import write_file
from ...shared.core.paths import user_path
from ...shared.core.terminal.results import print_result
from ...shared.intervene.texts import first_token, token_lists
from ...shared.model.language_model import load_model, load_tokenizer
from ...shared.model.loading.context_limit import context_limit
from ...shared.sae import Sae
from ...shared.sae.formats import walk_saes
from ..causal.pages import render_page
from ..features.logits import effects_through, readout_of
from ..features.token_text import TokenTexts
from ..results.output import write_rows
from .attribution import GraphSettings, attribution_graph
from .config import GraphConfig
from .graph import Graph, Node
from .replacement import LocalReplacement
from .verify import agreement, verify
from .viewer import node_id, viewer_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMOTED = 3


def graph(config: GraphConfig | str | Path | None = None, **settings: Any) -> Graph:
    """Make the graph of a text's next token, and write it with its summary, the viewers' graph.json and graph.html.

    The configuration is an object, the path of a TOML file, or none; keywords replace its keys.
    """
    config = configured(GraphConfig, config, settings)
    model = load_model(
        config.model,
        "float32",
        config.device,
        trust_remote_code=config.trust_remote_code,
        attn_implementation="eager",
    )
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    saes = {name: Sae.load(path, device=model.device) for name, path in _named(config.transcoders).items()}
    dtype = getattr(torch, config.precision)
    model.to(dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    for sae in saes.values():
        sae.to(dtype)
    first = first_token(tokenizer)
    (tokens,) = token_lists(config.text, tokenizer, first, context_limit(model))
    limits = GraphSettings(
        config.max_nodes,
        config.max_logits,
        config.logit_mass,
        config.node_threshold,
        config.edge_threshold,
        config.batch_size,
    )
    skipped = int(config.skip_first_token and tokens[0] == first)
    found, replacement = attribution_graph(model, saes.values(), tokens, limits, skipped=skipped)
    rows = verify(found, replacement, found.strongest_edges(config.verify))
    _write(config, found, replacement, rows, model, tokenizer, list(saes))
    return found


def _named(given: str | Sequence[str]) -> dict[str, str | Path]:
    """Return where each transcoder is, by name; a folder of several stands for all of them."""
    found: dict[str, str | Path] = {}
    for source in [given] if isinstance(given, str) else given:
        folder = user_path(source)
        several = [path for _, path in walk_saes(folder)[0]] if folder.exists() else []
        for path in several or [source]:
            name = Path(path).name
            found[str(path) if name in found else name] = path
    return found


def _write(
    config: GraphConfig,
    found: Graph,
    replacement: LocalReplacement,
    rows: list[dict[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
) -> None:
    output = user_path(config.output)
    logits = [node for node in found.nodes if node.kind == "logit"]
    content, labels, texts = graph_content(
        found, replacement, model, tokenizer, config.text, output.name or "graph", config.model, names
    )
    summary = found.summary() | {
        "text": config.text,
        "model": config.model,
        "transcoders": names,
        "missing_layers": sorted(set(range(found.n_layers)) - set(replacement.wired.replaced)),
        "verified": rows,
        "direct_correlation": agreement(rows, "direct", "direct_measured"),
        "frozen_correlation": agreement(rows, "total", "total_frozen"),
        "total_correlation": agreement(rows, "total", "total_measured"),
    }
    found.save(output)
    if rows:
        write_rows(output / "verified.parquet", rows)
    _write_json(output / "graph.json", content)
    _write_json(output / "summary.json", summary)
    verified = [row | {key: node_id(found.nodes[row[key]]) for key in ("source", "target")} for row in rows]
    page = _page(output / "graph.html", config, found, content, summary | {"verified": verified}, logits[0], texts)
    _print(found, rows, labels)
    print_result(f"wrote '{page}'")


def graph_content(
    found: Graph,
    replacement: LocalReplacement,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    slug: str,
    model_name: str,
    names: Sequence[str],
) -> tuple[dict[str, Any], dict[int, str], TokenTexts]:
    """Return a graph in the viewers' schema, the labels of its nodes by number, and the texts of its tokens."""
    promoted = _promoted(found, replacement, model)
    logits = [node.number for node in found.nodes if node.kind == "logit"]
    known = {*found.tokens, *logits, *(token for some in promoted.values() for token in some)}
    texts = TokenTexts.of(tokenizer, known)
    labels = {number: _label(node, texts, promoted.get(number)) for number, node in enumerate(found.nodes)}
    written = texts.in_context(found.tokens)
    scan = f"{Path(model_name).name}-{'-'.join(names)}"
    return viewer_json(found, written, text, slug, scan, names, labels), labels, texts


def _promoted(found: Graph, replacement: LocalReplacement, model: PreTrainedModel) -> dict[int, list[int]]:
    """Return the tokens whose logits each kept latent raises most by itself, at its own position, by node."""
    readout = readout_of(model)
    kept = [i for i, node in enumerate(found.nodes) if node.kind == "latent" and found.pruned.nodes[i]]
    if isinstance(readout, str) or not kept:
        return {}
    written = replacement.written([int(found.columns[number]) for number in kept])
    effects = effects_through(readout, written.float(), PROMOTED)
    return dict(zip(kept, effects.promoted.tolist(), strict=True))


def _label(node: Node, texts: TokenTexts, promoted: list[int] | None) -> str:
    if node.kind == "logit":
        return f'Output "{texts.alone(node.number)}" (p={node.value:.3f})'
    if node.kind == "latent" and promoted:
        return "promotes " + ", ".join(repr(texts.alone(token)) for token in promoted)
    return ""


def _page(
    path: Path,
    config: GraphConfig,
    found: Graph,
    content: dict[str, Any],
    summary: dict[str, Any],
    top: Node,
    texts: TokenTexts,
) -> Path:
    own = resources.files(__package__ or __name__)
    template, style, script = (
        own.joinpath(f"graph.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    return render_page(
        path,
        template,
        [style],
        [script],
        data={"graph": content, "n_layers": found.n_layers, "summary": summary},
        title=f"What leads to “{texts.alone(top.number)}”",
        model=config.model,
        found=summary,
        probability=top.value,
        logit=texts.alone(top.number),
    )


def _print(found: Graph, rows: list[dict[str, Any]], labels: dict[int, str]) -> None:
    s = found.summary()
    print_result(
        f"{s['tokens']} tokens, {s['active_latents']} active latents, {s['latent_nodes']} in the graph; "
        f"{s['kept_nodes']} nodes and {s['kept_edges']} edges kept"
    )
    print_result(f"replacement score {s['replacement_score']:.3f}, completeness score {s['completeness_score']:.3f}")
    print_result(
        f"{s['backward_passes']} backward passes, {s['seconds']:.2f} s; effects add up within {s['gap']:.1e}, "
        f"logits within {s['logit_gap']:.1e} of the model's"
    )
    for row in rows:
        source, target = (found.nodes[row[key]] for key in ("source", "target"))
        there = labels[row["target"]] if target.kind == "logit" else f"{target.layer}/{target.number}@{target.position}"
        print_result(
            f"without {source.layer}/{source.number}@{source.position} -> {there}: "
            f"direct {row['direct']:+.4f} predicted, {row['direct_measured']:+.4f} measured; "
            f"total {row['total']:+.4f} predicted, {row['total_frozen']:+.4f} with patterns and norms frozen, "
            f"{row['total_measured']:+.4f} in the model"
        )


def _write_json(path: Path, content: Any) -> None:
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
