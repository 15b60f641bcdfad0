"""Folders that are not a model of text, or not whole, give one line; so does a tokenizer that would be made up."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
import transformers as tr
from tokenizers import Tokenizer, models, pre_tokenizers

from thresher.shared.core.errors import ModelError
from thresher.shared.model.language_model import is_encoder, load_model, load_model_config, load_tokenizer

SHAPE = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
TEXT = SHAPE | dict(vocab_size=37, bos_token_id=0, eos_token_id=2)
VISION = SHAPE | dict(image_size=16, patch_size=8)
SEQ2SEQ = dict(
    vocab_size=37, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=20, pad_token_id=0,
)  # fmt: skip
CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own"
    num_hidden_layers = 1
    vocab_size = 37

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "base"
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(37, 8)
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def forward(self, input_ids=None, **_):
        return (self.embed(input_ids),)
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tr.LlamaForCausalLM(tr.LlamaConfig(**TEXT)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(llama, tmp_path):
    """A model's folder to be spoilt."""
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def byte_tokenizer(**special):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **special)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: tr.T5ForConditionalGeneration(tr.T5Config(vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=1,
                                                           num_heads=2)), "is an encoder-decoder"),
        (lambda: tr.BartForConditionalGeneration(tr.BartConfig(**SEQ2SEQ)), "is an encoder-decoder"),
        (lambda: tr.PegasusForConditionalGeneration(tr.PegasusConfig(**SEQ2SEQ)), "is an encoder-decoder"),
        (lambda: tr.WhisperForConditionalGeneration(tr.WhisperConfig(**SEQ2SEQ)), "is an encoder-decoder"),
        (lambda: tr.ViTForImageClassification(tr.ViTConfig(**VISION)), r"\(vit\) reads pixel_values, not tokens"),
        (lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(**VISION)), "reads pixel_values, not tokens"),
        (lambda: tr.CLIPModel(tr.CLIPConfig(text_config=SHAPE | dict(vocab_size=37), vision_config=VISION)),
         r"cannot run on tokens alone \(it also reads pixel_values\)"),
        (lambda: tr.SiglipModel(tr.SiglipConfig(text_config=SHAPE | dict(vocab_size=37), vision_config=VISION)),
         r"cannot run on tokens alone \(it also reads pixel_values\)"),
        (lambda: tr.Wav2Vec2ForCTC(tr.Wav2Vec2Config(**SHAPE, vocab_size=37, conv_dim=(8,), conv_stride=(5,),
                                                     conv_kernel=(10,), num_conv_pos_embeddings=4,
                                                     num_conv_pos_embedding_groups=2, num_feat_extract_layers=1)),
         r"\(wav2vec2\) reads input_values, not tokens"),
        (lambda: tr.ResNetModel(tr.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])), "reads pixel_values"),
    ],
    ids=["t5", "bart", "pegasus", "whisper", "vit", "clip-vision", "clip", "siglip", "wav2vec2", "resnet"],
)  # fmt: skip
def test_models_that_do_not_read_tokens(model, told, tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=told) as caught:
        load_model(str(tmp_path), "float32")
    assert "expected a decoder such as GPT-2 or Llama, or an encoder such as BERT" in str(caught.value)


def test_a_decoder_saved_alone_is_none_of_them(tmp_path):
    for model, config in ((tr.BartForCausalLM, tr.BartConfig), (tr.PegasusForCausalLM, tr.PegasusConfig)):
        torch.manual_seed(0)
        built = model(config(**SEQ2SEQ)).eval()
        built.save_pretrained(tmp_path)
        tokens = torch.tensor([[4, 5, 6]])
        torch.testing.assert_close(load_model(str(tmp_path), "float32")(tokens).logits, built(tokens).logits)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), r"no model .* not a valid JSON file"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "no model '"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "no model '"),
        (lambda folder: (folder / "config.json").unlink(), "no model '"),
        (lambda folder: edit_config(folder, model_type="glyph"), "no model .*model type `glyph`"),
        (lambda folder: edit_config(folder, hidden_size="wide"), "no model .*hidden_size.*int"),
        (lambda folder: edit_config(folder, num_attention_heads=3), "no model '|cannot load model '"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "cannot load model .*header"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no file named model\.safetensors"),
        (lambda folder: truncate(folder / "model.safetensors"), "cannot load model '"),
        (lambda folder: pickled(folder), "cannot load model '"),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
         "it is quantised .gptq.; .*; install what that needs, or give the unquantised model"),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4}),
         "it is quantised .awq.; "),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
         "it is quantised .bitsandbytes.; "),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "hqq"}), "it is quantised .hqq.; "),
    ],
)  # fmt: skip
def test_folders_that_are_not_whole(change, told, copy):
    change(copy)
    with pytest.raises(ModelError, match=told) as caught:
        load_model(str(copy), "float32")
    assert len(str(caught.value).splitlines()) == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(37, 16)}, folder / "pytorch_model.bin")
    truncate(folder / "pytorch_model.bin")


def test_a_file_is_not_a_model(copy):
    for load in (load_model, load_model_config, load_tokenizer):
        with pytest.raises(ModelError, match="is a file; expected the folder with"):
            load(str(copy / "model.safetensors"))


def test_a_folder_that_is_not_there(tmp_path):
    for load in (load_model, load_model_config, load_tokenizer):
        with pytest.raises(ModelError, match=r"'.*/nowhere': .*there is no such folder"):
            load(str(tmp_path / "nowhere"))


def test_the_home_folder(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    byte_tokenizer().save_pretrained(copy)
    assert load_model("~/model", "float32").config.vocab_size == 37
    assert load_tokenizer("~/model").vocab_size == 257


def test_a_models_own_code_is_run_only_if_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own_model"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    weight = torch.randn(37, 8)
    torch.save({"embed.weight": weight}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="its own code; read that code, then set trust_remote_code = true"):
        load_model(str(folder), "float32")
    model = load_model(str(folder), "float32", trust_remote_code=True)
    assert not is_encoder(model.config)
    torch.testing.assert_close(model(torch.tensor([[3]]))[0], weight[None, None, 3])


def test_the_implementation_of_attention(llama):
    for name in ("eager", "sdpa"):
        assert load_model(str(llama), "float32", attn_implementation=name).config._attn_implementation == name
    with pytest.raises(ModelError, match=r"cannot load model .*quick"):
        load_model(str(llama), "float32", attn_implementation="quick")


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gemma2", "llama", "gpt_neox", "qwen2", "xlnet", "roberta", "bloom"])
def test_a_tokenizer_that_would_be_made_up_is_refused(kind, tmp_path):
    tr.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"contains no tokenizer: expected a vocabulary such as tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128}))
    with pytest.raises(ModelError, match=r"contains no tokenizer: expected a vocabulary such as tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_tokenizers_of_every_kind_of_file_are_loaded(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dust", "grain"]
    for kind, files in (
        ("bert", {"vocab.txt": "\n".join(words)}),
        ("gpt2", {"vocab.json": json.dumps({"d": 0, "u": 1, "du": 2}), "merges.txt": "#version: 0.2\nd u\n"}),
        ("canine", {}),  # reads characters as they are
    ):
        folder = tmp_path / kind
        tr.AutoConfig.for_model(kind).save_pretrained(folder)
        for name, content in files.items():
            (folder / name).write_text(content)
        assert load_tokenizer(str(folder)) is not None
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    tr.LlamaConfig(**TEXT).save_pretrained(tmp_path / "llama")
    assert load_tokenizer(str(tmp_path / "llama")).vocab_size == 257


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
@pytest.mark.parametrize(
    ("kind", "file"), [("llama", "tokenizer.model"), ("t5", "spiece.model"), ("xlm-roberta", "sentencepiece.bpe.model")]
)
def test_a_vocabulary_of_sentencepiece_needs_its_library(kind, file, tmp_path):
    tr.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"a model")
    with pytest.raises(ModelError, match="to read it, pip install sentencepiece protobuf"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_named(copy):
    byte_tokenizer().save_pretrained(copy)
    truncate(copy / "tokenizer.json")
    with pytest.raises(ModelError, match="cannot load the tokenizer of '"):
        load_tokenizer(str(copy))


def test_the_tokenizer_of_a_snapshot_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("bare", "whole"):
        repository = tmp_path / f"models--lab--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        tr.GPT2Config(vocab_size=257).save_pretrained(repository / "snapshots" / commit)
    byte_tokenizer().save_pretrained(tmp_path / "models--lab--whole" / "snapshots" / commit)
    assert load_tokenizer("lab/whole").vocab_size == 257
    with pytest.raises(ModelError, match="'lab/bare' contains no tokenizer"):
        load_tokenizer("lab/bare")
    for name in ("bare", "whole"):  # adapters without a tokenizer, and with one
        settings = json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
        folder = tmp_path / f"models--lab--{name}" / "snapshots" / commit
        (folder / "adapter_config.json").write_text(settings)
    tr.GPT2Config(vocab_size=257).save_pretrained(tmp_path / "base")
    byte_tokenizer(pad_token="<pad>").save_pretrained(tmp_path / "base")
    assert [len(load_tokenizer(f"lab/{name}")) for name in ("bare", "whole")] == [258, 257]


def test_an_adapter_has_its_own_tokenizer_or_the_base_model_s(copy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(copy)}))
    with pytest.raises(ModelError, match="contains no tokenizer"):
        load_tokenizer(str(adapter))
    byte_tokenizer().save_pretrained(copy)
    assert load_tokenizer(str(adapter)).name_or_path == str(copy)
    byte_tokenizer(pad_token="<pad>").save_pretrained(adapter)
    own = load_tokenizer(str(adapter))
    assert (own.name_or_path, len(own)) == (str(adapter), 258)
