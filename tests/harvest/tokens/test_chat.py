"""Chat text: tokens as transformers makes them, and whose they are, for the templates of several families."""

from __future__ import annotations

import json

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from thresher.harvest.config import HarvestConfig
from thresher.harvest.documents.documents import Document
from thresher.harvest.run import harvest
from thresher.harvest.tokens.chat import ChatTemplate
from thresher.harvest.tokens.encode import token_roles, tokenize
from thresher.harvest.tokens.text_rules import text_rules
from thresher.shared import ActivationStore
from thresher.shared.core.errors import ConfigError, DataError, ModelError
from thresher.shared.store.format.roles import ASSISTANT, MARKER, OTHER, PLACED, SYSTEM, TEXT, TOOL, USER

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
)
LLAMA2 = """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- if loop.first and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}
{%- else %}{% set text = m.content %}{% endif %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n"
    "{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " user: wie groß, 👍?\n"},
    {"role": "assistant", "content": 'assistant "3" <b>m</b> '},
    {"role": "user", "content": "<b>ok</b>"},
    {"role": "assistant", "content": "model"},
]
HIDDEN = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
    {"role": "user", "content": "<q>c?</q>"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n<b>no</b>"},
    {"role": "user", "content": "<q>"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nd \n"},
]


def chatml(*turns):
    return [
        piece
        for name, *parts in turns
        for piece in [(f"<|im_start|>{name}\n", MARKER), *parts, ("<|im_end|>\n", MARKER)]
    ]


# Each rendering in pieces, written by hand: what a message says, and what the template says around it.
CASES = {
    "chatml": (
        CHATML,
        TURNS,
        chatml(
            ("system", ("Be brief.", SYSTEM)),
            ("user", (" user: wie groß, 👍?\n", USER)),
            ("assistant", ('assistant "3" <b>m</b> ', ASSISTANT)),
            ("user", ("<b>ok</b>", USER)),
            ("assistant", ("model", ASSISTANT)),
        ),
    ),
    "llama 3, bos in the template, stripped": (
        LLAMA3,
        TURNS,
        [
            ("<s><|start_header_id|>system<|end_header_id|>\n\n", MARKER),
            ("Be brief.", SYSTEM),
            ("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n", MARKER),
            ("user: wie groß, 👍?", USER),
            ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", MARKER),
            ('assistant "3" <b>m</b>', ASSISTANT),
            ("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n", MARKER),
            ("<b>ok</b>", USER),
            ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", MARKER),
            ("model", ASSISTANT),
            ("<|eot_id|>", MARKER),
        ],
    ),
    "llama 2, system merged into the first message": (
        LLAMA2,
        TURNS,
        [
            ("<s>[INST] <<SYS>>\n", MARKER),
            ("Be brief.", SYSTEM),
            ("\n<</SYS>>\n\n", MARKER),
            (" user: wie groß, 👍?", USER),
            (" [/INST] ", MARKER),
            ('assistant "3" <b>m</b>', ASSISTANT),
            (" </s><s>[INST] ", MARKER),
            ("<b>ok</b>", USER),
            (" [/INST] ", MARKER),
            ("model", ASSISTANT),
            (" </s>", MARKER),
        ],
    ),
    "gemma": (
        GEMMA,
        TURNS[1:],
        [
            ("<s><start_of_turn>user\n", MARKER),
            ("user: wie groß, 👍?", USER),
            ("<end_of_turn>\n<start_of_turn>model\n", MARKER),
            ('assistant "3" <b>m</b>', ASSISTANT),
            ("<end_of_turn>\n<start_of_turn>user\n", MARKER),
            ("<b>ok</b>", USER),
            ("<end_of_turn>\n<start_of_turn>model\n", MARKER),
            ("model", ASSISTANT),
            ("<end_of_turn>\n", MARKER),
        ],
    ),
    "earlier reasoning left out": (
        THINKING,
        HIDDEN,
        chatml(
            ("user", ("a?", USER)),
            ("assistant", ("b", ASSISTANT)),
            ("user", ("<q>c?</q>", USER)),
            ("assistant", ("<b>no</b>", ASSISTANT)),
            ("user", ("<q>", USER)),
            ("assistant", ("<think>\nso\n</think>\n\nd \n", ASSISTANT)),
        ),
    ),
    "white space collapsed": (
        "{% for m in messages %}{{ m.role }}: {{ m.content.replace('\n\n', '\n') }}\n\n{% endfor %}",
        [{"role": "user", "content": "b\n\n</x>\n\nc"}],
        [("user: ", MARKER), ("b\n</x>\nc", USER), ("\n\n", MARKER)],
    ),
    "other roles, parts, reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% endif %}"
        "<|im_end|>\n{% endfor %}",
        [
            {"role": "developer", "content": "x\x00y"},
            {"role": "critic", "content": [{"type": "text", "text": "c d"}, {"type": "text", "text": "e"}], "id": None},
            {"role": "ipython", "content": '{"a": ["\\n"]}'},
            {"role": "assistant", "content": "", "reasoning_content": "r\n"},
        ],
        chatml(
            ("developer", ("x\x00y", SYSTEM)),
            ("critic", ("c de", OTHER)),
            ("ipython", ('{"a": ["\\n"]}', TOOL)),
            ("assistant", ("<think>", MARKER), ("r\n", ASSISTANT), ("</think>", MARKER)),
        ),
    ),
}


def byte_tokenizer(**options):
    """Return a tokenizer with one token per byte, but for its special tokens."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options = dict(bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL) | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def by_transformers(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def tokenized(tokenizer, documents, **options):
    config = HarvestConfig(model="m", hook_points=["x"], store="s", dataset="d", **options)
    rules = text_rules(config, tokenizer, documents[0])
    return rules, list(tokenize(documents, tokenizer, rules))


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_roles_of_a_conversation(case):
    template, messages, pieces = CASES[case]
    tokenizer = byte_tokenizer(chat_template=template)
    rules, (document,) = tokenized(tokenizer, [Document("d", "", messages=messages)])
    theirs = by_transformers(tokenizer, messages)
    expected = []
    for text, role in pieces:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected += [(i, role) for i in ids]
    assert [i for i, _ in expected] == theirs
    if theirs[0] == rules.bos:
        expected = expected[1:]
    assert list(zip(document.tokens.tolist(), document.roles.tolist(), strict=True)) == expected
    assert rules.keeps_roles
    assert rules.mask_token_ids == []


def test_a_token_is_the_messages_of_which_it_has_a_character():
    text = "the user says the model says the quick fox "
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator([text] * 9, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=LLAMA2
    )
    messages = [{"role": "user", "content": "the user says"}, {"role": "assistant", "content": "the model says"}]
    rules, (document,) = tokenized(tokenizer, [Document("d", "", messages=messages)])
    assert document.tokens.tolist() == by_transformers(tokenizer, messages)[1:]
    assert rules.mask_token_ids == [0]
    for role, content in ((USER, "the user says"), (ASSISTANT, "the model says")):
        mine = tokenizer.convert_ids_to_tokens(document.tokens[document.roles == role])
        assert len(mine) < len(content)
        assert "".join(mine).strip("▁") == content.replace(" ", "▁")


def test_white_space_that_has_an_empty_range_is_whose_it_is():
    roles = np.array([MARKER, USER, USER, USER, MARKER], np.int8)
    assert token_roles(roles, [(0, 1), (1, 2), (3, 3), (4, 4), (4, 5)]).tolist() == [MARKER, USER, USER, USER, MARKER]


@hypothesis.given(
    roles=st.lists(st.sampled_from([MARKER, USER, ASSISTANT]), min_size=1, max_size=12),
    cuts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8),
)
def test_roles_of_tokens_one_at_a_time(roles, cuts):
    offsets = sorted((min(a, b, len(roles)), min(max(a, b), len(roles))) for a, b in cuts)
    end, expected = 0, []
    for start, stop in offsets:
        of_messages = [role for role in roles[start if start < stop else end : stop] if role != MARKER]
        expected.append(of_messages[0] if of_messages else MARKER)
        end = max(end, stop)
    assert token_roles(np.array(roles, np.int8), offsets).tolist() == expected


def test_a_long_conversation_whose_tags_repeat():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    messages = [{"role": ("user", "assistant")[i % 2], "content": "ab" * 20_000} for i in range(5)]
    template = ChatTemplate(tokenizer, None)
    rendered = template.render(messages, "d")
    roles = template.character_roles(messages, rendered, "d")
    assert [(roles == role).sum() for role in (USER, ASSISTANT)] == [120_000, 80_000]
    assert "".join(np.array(list(rendered))[roles != MARKER]) == "ab" * 100_000


def test_the_assistants_rows_are_those_that_transformers_marks():
    """A template whose generation blocks hold the content alone says in another way which rows are the assistant's."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    encoded = tokenizer.apply_chat_template(TURNS, return_assistant_tokens_mask=True, return_dict=True)
    _, (document,) = tokenized(tokenizer, [Document("d", "", messages=TURNS)])
    assert document.tokens.tolist() == encoded["input_ids"]
    assert (document.roles == ASSISTANT).astype(int).tolist() == encoded["assistant_masks"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{% if 'long' in m.content %}L{% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(template):
    tokenizer = byte_tokenizer(chat_template=template)
    with pytest.raises(DataError, match="of document 'dialogue 7' in a way that does not show which rows are whose"):
        tokenized(tokenizer, [Document("dialogue 7", "", messages=[{"role": "user", "content": "long text"}])])


def test_refusals_name_the_document():
    user = {"role": "user", "content": "x"}
    with pytest.raises(DataError, match="refuses the messages of document 'd1': roles must alternate"):
        tokenized(byte_tokenizer(chat_template=LLAMA2), [Document("d1", "", messages=[user, user])])
    with pytest.raises(DataError, match="document 'd2': System role not supported"):
        tokenized(byte_tokenizer(chat_template=GEMMA), [Document("d2", "", messages=[user | {"role": "system"}])])
    with pytest.raises(ModelError, match="has no chat template"):
        tokenized(byte_tokenizer(), [Document("d", "", messages=[user])])
    with pytest.raises(DataError, match=r"refuses the messages of document 'd': .*unknown tag"):
        tokenized(byte_tokenizer(), [Document("d", "", messages=[user])], chat_template="{% fro %}")
    with pytest.raises(ConfigError, match=r"no chat_template at 'no\.jinja'"):
        tokenized(byte_tokenizer(), [Document("d", "", messages=[user])], chat_template="no.jinja")
    with pytest.raises(ConfigError, match="chat_template is for a column of messages, 'text' of 'd' holds text"):
        tokenized(byte_tokenizer(), [Document("d", "x")], chat_template=CHATML)
    with pytest.raises(DataError, match="document 'e' holds text, the documents before it messages"):
        tokenized(byte_tokenizer(chat_template=CHATML), [Document("d", "", messages=[user]), Document("e", "x")])


def test_a_template_that_breaks_is_one_line():
    with pytest.raises(DataError, match=r"refuses the messages of document 'd': integer division"):
        ChatTemplate(byte_tokenizer(), "{{ 1 // 0 }}").render(TURNS, "d")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}], "a part of type 'image'"),
        ([{"type": "image_url", "text": "a", "image_url": {"url": "b"}}], "a part of type 'image_url'"),
        (["a", "b"], "'a'"),
        ([], r"\[\]"),
        ({"text": "a"}, r"\{'text': 'a'\}"),
        (42, "42"),
        (False, "False"),
    ],
)
def test_contents_that_are_not_text_are_refused(content, got):
    tokenizer = byte_tokenizer(chat_template=CHATML)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=f"a message of document 'd' has content that is not text: .*, got {got};"):
        tokenized(tokenizer, [Document("d", "", messages=messages)])


def test_refused_documents_are_passed_over_where_asked_for(chat_model, tmp_path, capsys):
    folder, _, conversations = chat_model
    strict = "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}" + CHATML
    rows = [
        json.dumps({"messages": part}) for part in ([conversations[0][:1], *conversations[1:], conversations[0][:2]])
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    options = dict(dataset=str(tmp_path / "chat.jsonl"), chat_template=strict)
    with pytest.raises(DataError, match=r"document 'row 0': too short; .*or set on_bad_document = \"skip\""):
        harvested(folder, tmp_path / "store", **options)
    store = harvested(folder, tmp_path / "store", **options, on_bad_document="skip")
    assert "note: skipped 2 documents, first: the chat template refuses the messages" in capsys.readouterr().err
    assert set(store.documents(0, store.n_rows)[0]) <= set(range(1, len(conversations)))


def test_a_template_of_a_file_and_one_of_several(tmp_path):
    messages = [{"role": "user", "content": "x"}]
    (tmp_path / "t.jinja").write_text(CHATML)
    named = {"default": LLAMA3, "chat": CHATML}
    expected = by_transformers(byte_tokenizer(chat_template=CHATML), messages)
    for tokenizer, given in (
        (byte_tokenizer(), str(tmp_path / "t.jinja")),
        (byte_tokenizer(), CHATML),
        (byte_tokenizer(chat_template=named), "chat"),
    ):
        _, (document,) = tokenized(tokenizer, [Document("d", "", messages=messages)], chat_template=given)
        assert document.tokens.tolist() == expected


def test_a_template_with_the_date_gives_the_same_every_day():
    tokenizer = byte_tokenizer(chat_template="\n{{ strftime_now('%d %b %Y') }}" + CHATML)
    _, (document,) = tokenized(tokenizer, [Document("d", "", messages=[{"role": "user", "content": "x"}])])
    assert tokenizer.decode(document.tokens).startswith("\n26 Jul 2024<|im_start|>user")


def test_special_tokens_of_text_are_kept_where_asked_for():
    tokenizer = byte_tokenizer()
    text = "<s><|im_start|>user\nhi<|im_end|>\n<s>"
    plain, (document,) = tokenized(tokenizer, [Document("d", text)])
    assert document.tokens.tolist() == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert (document.roles, plain.keeps_roles) == (None, False)
    rules, (document,) = tokenized(tokenizer, [Document("d", text)], special_tokens="tokens")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert document.tokens.tolist() == ids[1:]
    special = set(tokenizer.all_special_ids)
    assert document.roles.tolist() == [MARKER if i in special else TEXT for i in ids[1:]]
    assert rules.keeps_roles
    assert rules.mask_token_ids == []
    # The setting is a state of the tokenizer: it does not stay.
    assert tokenized(tokenizer, [Document("d", text)])[1][0].tokens.tolist() != ids


@pytest.mark.parametrize("named", [{"bos_token": "Ċ"}, {"bos_token": "!"}, {"pad_token": "!"}, {"eos_token": "Ċ"}])
def test_an_ordinary_token_that_is_named_as_special_is_not_masked_in_text(named):
    options = dict(bos_token="<s>", eos_token="</s>", extra_special_tokens=[]) | named
    tokenizer = byte_tokenizer(**options)
    ordinary = tokenizer.convert_tokens_to_ids(next(iter(named.values())))
    rules, (document,) = tokenized(tokenizer, [Document("d", "go!\nstop!\n")])
    assert ordinary in document.tokens
    assert ordinary not in rules.mask_token_ids
    assert rules.keeps_roles == ("bos_token" in named)
    assert set(rules.mask_token_ids) == set(tokenizer.all_special_ids) - {ordinary}
    usual, _ = tokenized(byte_tokenizer(), [Document("d", "go")])
    assert set(usual.mask_token_ids) == set(byte_tokenizer().all_special_ids)


def test_token_ids_are_used_as_they_are():
    tokenizer = byte_tokenizer()
    rules, documents = tokenized(
        tokenizer, [Document("a", "", input_ids=[0, 5, 1, 0, 6]), Document("b", "", input_ids=[7])]
    )
    assert [document.tokens.tolist() for document in documents] == [[5, 1, 0, 6], [7]]
    assert documents[0].hash != documents[1].hash
    assert set(rules.mask_token_ids) == set(tokenizer.all_special_ids)
    for wrong in (-1, len(tokenizer), 2**40):
        with pytest.raises(DataError, match=f"document 'c' holds token id {wrong}; expected 0 to {len(tokenizer) - 1}"):
            tokenized(tokenizer, [Document("c", "", input_ids=[3, wrong])])


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = byte_tokenizer(chat_template=LLAMA3)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    rng = np.random.default_rng(0)
    words = ["who", "why", "übel", "yes", "no, never"]
    conversations = [
        [{"role": ("user", "assistant")[i % 2], "content": " ".join(rng.choice(words, 4))} for i in range(4)]
        for _ in range(30)
    ]
    lines = [json.dumps({"messages": messages, "id": i}) for i, messages in enumerate(conversations)]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    return folder, tokenizer, conversations


def harvested(folder, store, **options):
    options = dict(dataset=str(folder / "chat.jsonl"), text_column="messages", holdout_fraction=0.3) | options
    config = HarvestConfig(
        model=str(folder),
        hook_points=["blocks.0.resid_post"],
        store=str(store),
        tokens=100_000,
        context_size=32,
        model_dtype="float32",
        device="cpu",
        workers=1,
        **options,
    )
    return ActivationStore.open(harvest(config))


def test_a_store_of_conversations(chat_model, tmp_path):
    folder, tokenizer, conversations = chat_model
    store = harvested(folder, tmp_path / "store")
    assert store.verify() == []
    tokens, roles = store.tokens(0, store.n_rows).numpy(), store.roles(0, store.n_rows).numpy()
    documents, positions = store.documents(0, store.n_rows)
    assert np.array_equal(roles == PLACED, positions == 0)
    assert np.array_equal(store.row_mask(0, store.n_rows), positions > 0)
    for number in np.unique(documents):
        mine = (documents == number) & (positions > 0)
        theirs = by_transformers(tokenizer, conversations[number])
        assert tokens[mine].tolist() == theirs[1 : 1 + mine.sum()]
    limited = ActivationStore.open(tmp_path / "store", roles=["assistant"])
    assert np.array_equal(limited.row_mask(0, store.n_rows), roles == ASSISTANT)
    assert store.metadata["chat_template"] == LLAMA3
    assert store.metadata["mask_token_ids"] == []


def test_a_store_of_token_ids_holds_the_same_rows(chat_model, tmp_path):
    folder, tokenizer, conversations = chat_model
    rows = [json.dumps({"ids": by_transformers(tokenizer, messages)}) for messages in conversations]
    (tmp_path / "ids.jsonl").write_text("\n".join(rows))
    given = dict(dataset=str(tmp_path / "ids.jsonl"), text_column="ids", holdout_fraction=0.0)
    ours = harvested(folder, tmp_path / "chat", holdout_fraction=0.0)
    theirs = harvested(folder, tmp_path / "ids", **given)
    assert torch.equal(ours.tokens(0, ours.n_rows), theirs.tokens(0, theirs.n_rows))
    assert not theirs.has_roles
    special = np.isin(theirs.tokens(0, theirs.n_rows).numpy(), tokenizer.all_special_ids)
    assert np.array_equal(theirs.row_mask(0, theirs.n_rows), ~special)
