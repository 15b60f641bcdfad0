"""Evaluation of a store of conversations, limited to the assistant's rows: values by plain transformers and NumPy."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from thresher.evaluate import evaluate
from thresher.evaluate.config import EvaluateConfig
from thresher.harvest.config import HarvestConfig
from thresher.harvest.run import harvest
from thresher.shared import ActivationStore, Sae
from thresher.shared.store.format.roles import ASSISTANT, PLACED

HOOK, D, CONTEXT = "blocks.0.resid_post", 8, 16
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def chat(tmp_path_factory, make_sae):
    folder = tmp_path_factory.mktemp("chat")
    vocab = {token: i for i, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), n_embd=D, n_layer=2, n_head=2, n_positions=CONTEXT)
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "model")
    lines = []
    for i in range(30):
        turns = [("user", f"what is {i}?"), ("assistant", f"it is {i * i}, of course")]
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    config = HarvestConfig(
        model=str(folder / "model"),
        dataset=str(folder / "chat.jsonl"),
        text_column="messages",
        hook_points=[HOOK],
        store=str(folder / "store"),
        tokens=100_000,
        context_size=CONTEXT,
        holdout_fraction=0.4,
        dtype="float32",
        model_dtype="float32",
        device="cpu",
        workers=1,
    )
    harvest(config)
    make_sae(k=3, seed=1, hook_point=HOOK, d_in=D).save(folder / "saes" / "topk")
    return folder


@pytest.mark.parametrize("roles", [None, ["assistant"]])
def test_metrics_are_of_the_roles(chat, tmp_path, roles):
    config = EvaluateConfig(
        store=str(chat / "store"),
        saes=str(chat / "saes"),
        output=str(tmp_path),
        roles=roles,
        device="cpu",
        bootstrap_samples=0,
    )
    (row,) = evaluate(config)
    store = ActivationStore.open(chat / "store")
    kind = store.roles(0, store.n_rows).numpy().reshape(-1, CONTEXT)
    held_out = store.held_out_contexts()
    usable = (kind != PLACED if roles is None else kind == ASSISTANT)[held_out]
    assert row["n_rows"] == usable.sum()
    assert ("assistant" in row["mask"]) == (roles is not None)
    x = store.read(HOOK, 0, store.n_rows).reshape(-1, CONTEXT, D)[torch.from_numpy(held_out)]
    rows = x[torch.from_numpy(usable)]
    x_hat = Sae.load(chat / "saes" / "topk")(rows).detach()
    rows, x_hat = rows.double().numpy(), x_hat.double().numpy()
    expected = 1 - ((rows - x_hat) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    assert row["explained_variance"] == pytest.approx(expected, abs=1e-5)

    tokens = store.tokens(0, store.n_rows).reshape(-1, CONTEXT)[torch.from_numpy(held_out)].long()
    model = GPT2LMHeadModel.from_pretrained(chat / "model").eval()
    with torch.no_grad():
        log_probs = model(tokens).logits.log_softmax(-1)
    losses = -log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].double().numpy()
    counted = usable[:, :-1] & (kind[held_out][:, 1:] != PLACED)
    assert row["ce_clean"] == pytest.approx(losses[counted].mean(), rel=1e-5)


def test_other_roles_than_in_training_are_noted(chat, tmp_path, capsys):
    sae = Sae.load(chat / "saes" / "topk")
    sae.metadata["roles"] = ["assistant"]
    sae.save(tmp_path / "sae")
    options = dict(store=str(chat / "store"), saes=[str(tmp_path / "sae")], device="cpu", model=False, feature_rows=0)
    for number, (roles, noted) in enumerate([(None, True), (["user"], True), (["assistant"], False)]):
        evaluate(EvaluateConfig(output=str(tmp_path / str(number)), roles=roles, **options))
        said = capsys.readouterr().err
        assert ("was trained on rows of role assistant, and is evaluated on" in said) == noted
