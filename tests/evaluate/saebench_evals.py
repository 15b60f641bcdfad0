"""Run SAEBench's own evaluations that need no network on our adapter; run by the peers' interpreter.

usage: saebench_evals.py MODEL_FOLDER TOKENS.npy MASKED_TOKEN TEXT_MODEL_FOLDER OUTPUT.json SAE_FOLDER TEXT_SAE_FOLDER

The first SAE belongs to the first model, whose tokens are given; the second to the model that has a tokenizer.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.evals.meta_structure import main as meta_structure
from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from saelens_evals import StoredTokens, hooked_gpt2
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from thresher.evaluate.saebench import saebench_sae

CLASSES = ("asyncio", "email", "tkinter")
LETTERS, TRAIN, TEST = 600, 150, 50


def core(model, tokens, masked, sae):
    """The core evaluation, all of its parts, on all tokens in one batch."""
    config = CoreEvalConfig(
        model_name=sae.cfg.model_name,
        batch_size_prompts=len(tokens),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        exclude_special_tokens_from_reconstruction=True,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    metrics, latents = run_evals(sae, StoredTokens(tokens), model, config, ignore_tokens={masked})
    return {name: value for group in metrics.values() for name, value in group.items()} | latents


def library_text():
    """Pieces of the source of three packages of the standard library, by package: training and test, disjoint."""
    train, test = {}, {}
    for name in CLASSES:
        files = sorted((Path(json.__file__).parents[1] / name).glob("*.py"))
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        pieces = [text[start : start + LETTERS] for start in range(0, len(text) - LETTERS, LETTERS)]
        order = np.random.default_rng(0).permutation(len(pieces))
        chosen = [pieces[number] for number in order]
        assert len(chosen) >= TRAIN + TEST, f"{name} has {len(chosen)} pieces"
        train[name], test[name] = chosen[:TRAIN], chosen[TRAIN : TRAIN + TEST]
    return train, test


def probing(folder, sae):
    """Sparse probing, with its data set replaced by local text; everything else is SAEBench's."""
    model = hooked_gpt2(HookedTransformer, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model.set_tokenizer(tokenizer, default_padding_side="right")
    sparse_probing.dataset_utils.get_multi_label_train_test_data = lambda *_: library_text()
    sparse_probing.dataset_info.chosen_classes_per_dataset["library"] = list(CLASSES)
    config = SparseProbingEvalConfig(
        model_name="local",
        dataset_names=["library"],
        probe_train_set_size=TRAIN,
        probe_test_set_size=TEST,
        llm_batch_size=50,
        llm_dtype="float32",
        k_values=[1, 5],
    )
    with tempfile.TemporaryDirectory() as artifacts, torch.enable_grad():
        return sparse_probing.run_eval_single_sae(config, sae, model, "cpu", artifacts)[0]


def meta(sae):
    """The meta-structure of the decoder: a small SAE trained on its rows."""
    config = MetaStructureEvalConfig(model_name="local", train_steps=50, train_batch_size=64)
    with torch.enable_grad():
        output = meta_structure.run_eval_single_sae("local", "local", sae, config, "cpu")
    return output.eval_result_metrics.meta_structure.decoder_fraction_variance_explained


def main(model_folder, tokens_file, masked, text_model, output, folder, text_folder):
    """Check the adapter by SAEBench's own interface check, and run the three evaluations."""
    torch.set_grad_enabled(False)
    sae = saebench_sae(folder, "gpt2", context_size=12)
    check = [BaseSAE.check_decoder_norms(sae)]
    found = {
        "check": check,
        "core": core(hooked_gpt2(HookedTransformer, model_folder), np.load(tokens_file), int(masked), sae),
    }
    text_sae = saebench_sae(text_folder, "local")
    found["sparse_probing"] = probing(text_model, text_sae)
    found["meta_structure"] = meta(text_sae)
    with open(output, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
