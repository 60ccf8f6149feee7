"""Text encoder: golden states of the published T5, tokenizers, prompt cleaning."""

import copy
import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from rfengine.accuracy import relative_error
from rfengine.checkpoint.layouts import transformers_text_from_wan
from rfengine.config import TextConfig
from rfengine.models.text_encoder import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TextEncoder,
    build_umt5,
    clean_text,
)
from rfengine.presets import PRESETS

# torch lists what torch.device("meta") redirects at its first use; that must come before the fixture replaces
# torch.empty, or a model asked for on meta is allocated in full
with torch.device("meta"):
    torch.empty(0)

GOLDEN = Path(__file__).parents[1] / "golden" / "umt5.safetensors"
GOLDEN_TOLERANCE = 5e-6  # float32, norm of the difference over norm
BYTES = ByteTokenizer()
SMALL = TextConfig(
    vocab_size=259, dim=32, attention_dim=48, ffn_dim=64, num_heads=3, num_layers=2, tokenizer="bytes"
)
PROMPTS = ["a red cube rolls over the floor", "naïve café, 猫が走る"]


@pytest.fixture(scope="module")
def golden() -> tuple[TextConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, weights in transformers' names, and recorded tensors."""
    with safe_open(GOLDEN, framework="pt") as file:
        shape = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = TextConfig(
        vocab_size=shape["vocab"],
        dim=shape["dim"],
        attention_dim=shape["dim"],
        ffn_dim=shape["dim_ffn"],
        num_heads=shape["num_heads"],
        num_layers=shape["num_layers"],
        num_buckets=shape["num_buckets"],
    )
    weights = {
        transformers_text_from_wan(name[2:]): tensor
        for name, tensor in tensors.items()
        if name.startswith("w.")
    }
    recorded = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("t.")}
    return config, weights, recorded


def golden_model(golden) -> nn.Module:
    config, weights, _ = golden
    with torch.device("meta"):
        model = build_umt5(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert (missing, unexpected) == (["encoder.embed_tokens.weight"], [])  # tied again by TextEncoder
    return model


def golden_error(golden, model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    recorded = golden[2]
    encoder = TextEncoder(model, BYTES, recorded["ids"].shape[1], dtype=dtype)
    found = encoder.encode_ids(recorded["ids"], recorded["mask"])
    assert found.dtype == dtype
    return relative_error(found.float(), recorded["embeds"])


@pytest.fixture(scope="module")
def small_model() -> nn.Module:
    torch.manual_seed(5)
    return build_umt5(SMALL)


@pytest.fixture
def small(small_model) -> nn.Module:
    return copy.deepcopy(small_model)


def text_of(ids: list[int]) -> str:
    """The text of byte ids; a character cut in the middle is left out."""
    return bytes(token - 3 for token in ids if token >= 3).decode("utf-8", errors="ignore")


# Encoder


def test_golden_states_of_the_published_encoder_are_reproduced(golden):
    assert golden_error(golden, golden_model(golden)) <= GOLDEN_TOLERANCE


def test_golden_tolerance_tells_exact_gelu_from_tanh_gelu(golden):
    model = golden_model(golden)
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.act = nn.GELU()
    assert golden_error(golden, model) > GOLDEN_TOLERANCE


def test_golden_tolerance_tells_scaled_attention_from_unscaled(golden):
    model = golden_model(golden)
    for block in model.encoder.block:
        block.layer[0].SelfAttention.scaling = 0.25
    assert golden_error(golden, model) > GOLDEN_TOLERANCE


def test_golden_tolerance_tells_padded_keys_from_masked_ones(golden):
    recorded = golden[2]
    model = golden_model(golden)
    model.tie_weights()
    unmasked = model(input_ids=recorded["ids"]).last_hidden_state * recorded["mask"][:, :, None]
    assert recorded["mask"].sum(dim=1).min() < recorded["mask"].shape[1]
    assert relative_error(unmasked, recorded["embeds"]) > GOLDEN_TOLERANCE


# the recorded weights are large and attention is unscaled: rounding shows; measured 5.8e-2 and 7.3e-3
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 7e-2), (torch.float16, 9e-3)])
def test_half_precision_stays_near_the_golden_states(golden, dtype, bound):
    assert golden_error(golden, golden_model(golden), dtype) <= bound


def test_softmax_of_half_precision_scores_computes_in_float32():
    scores = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)) * 8
    for dtype in (torch.bfloat16, torch.float16):
        rounded = scores.to(dtype)
        exact = rounded.double().softmax(-1)
        through_float32 = relative_error(rounded.float().softmax(-1).to(dtype).double(), exact)
        assert relative_error(rounded.softmax(-1).double(), exact) <= 1.01 * through_float32


def test_float16_survives_activations_that_leave_its_range(small):
    reference = copy.deepcopy(small)
    for model in (small, reference):
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.data.mul_(3e5)
    expected = TextEncoder(reference, BYTES, 64).encode(PROMPTS)
    encoder = TextEncoder(small, BYTES, 64, dtype=torch.float16)
    assert small.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert small.encoder.block[0].layer[0].SelfAttention.o.weight.dtype == torch.float16
    assert relative_error(encoder.encode(PROMPTS).float(), expected) <= 1e-2


def test_bfloat16_encoder_is_cast_as_a_whole(small):
    TextEncoder(small, BYTES, 64, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


def test_states_agree_with_the_plain_umt5_model_on_padded_input(small):
    ids, mask = BYTES.encode(PROMPTS, 90)
    with torch.no_grad():
        expected = small(input_ids=ids, attention_mask=mask).last_hidden_state * mask[:, :, None]
    encoder = TextEncoder(small, BYTES, 90)
    assert relative_error(encoder.encode_ids(ids, mask), expected) <= 1e-6
    assert relative_error(encoder.encode(PROMPTS), expected) <= 1e-6


def test_encoder_runs_only_to_the_longest_prompt(small):
    seen = []
    small.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    ids, mask = BYTES.encode(["abc", "abcdefg"], 512)
    assert TextEncoder(small, BYTES, 512).encode_ids(ids, mask).shape == (2, 512, SMALL.dim)
    assert seen == [(2, 8)]


def test_states_have_512_rows_and_exact_zeros_after_the_prompt(small):
    states = TextEncoder(small, BYTES, 512).encode(PROMPTS)
    assert states.shape == (2, 512, SMALL.dim)
    for row, prompt in enumerate(PROMPTS):
        length = len(prompt.encode()) + 1
        assert torch.count_nonzero(states[row, length:]) == 0
        assert states[row, :length].abs().sum(dim=1).min() > 0


def test_states_of_a_prompt_do_not_depend_on_its_batch(small):
    encoder = TextEncoder(small, BYTES, 64)
    together = encoder.encode([*PROMPTS, PROMPTS[0]])
    assert torch.equal(together[0], encoder.encode(PROMPTS[:1])[0])
    assert torch.equal(together[2], together[0])


def test_states_can_be_used_in_training(small):
    states = TextEncoder(small, BYTES, 64).encode(PROMPTS)
    weight = torch.ones(SMALL.dim, requires_grad=True)
    (states * weight).sum().backward()
    assert weight.grad is not None and not states.requires_grad


def test_states_move_to_the_asked_device_and_dtype_and_the_encoder_stays(small):
    encoder = TextEncoder(small, BYTES, 64)
    states = encoder.encode(PROMPTS, device="meta", dtype=torch.bfloat16)
    assert states.device.type == "meta" and states.dtype == torch.bfloat16
    assert {parameter.device.type for parameter in small.parameters()} == {"cpu"}
    assert encoder.encode(PROMPTS).dtype == torch.float32


def test_a_whole_number_as_eps_is_taken():
    with torch.device("meta"):
        assert build_umt5(replace(SMALL, eps=1)).config.layer_norm_epsilon == 1.0


def test_model_built_on_meta_takes_weights_and_keeps_its_tie(small):
    with torch.device("meta"):
        model = build_umt5(SMALL)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="no values"):
        TextEncoder(model, BYTES, 64)
    model.load_state_dict(small.state_dict(), assign=True)
    encoder = TextEncoder(model, BYTES, 64, dtype=torch.float64)
    assert model.shared.weight.data_ptr() == model.encoder.embed_tokens.weight.data_ptr()
    assert (
        relative_error(encoder.encode(PROMPTS).float(), TextEncoder(small, BYTES, 64).encode(PROMPTS)) <= 1e-6
    )


def test_encoder_of_the_full_size_has_the_published_parameter_count():
    with torch.device("meta"):
        model = build_umt5(PRESETS["wan-1.3b"].text)
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_680_910_336
    assert len(model.state_dict()) == 242 + 1  # the tied embedding has two names


def test_mask_with_a_hole_is_refused(small):
    encoder = TextEncoder(small, BYTES, 8)
    ids = torch.ones(1, 4, dtype=torch.int64)
    for mask in ([[1, 0, 1, 0]], [[0, 1, 1, 1]], [[0, 0, 0, 0]]):
        with pytest.raises(ValueError, match="run of ones"):
            encoder.encode_ids(ids, torch.tensor(mask))
    with pytest.raises(ValueError, match="both must be"):
        encoder.encode_ids(ids, torch.ones(1, 3))


def test_prompts_that_cannot_be_encoded_are_refused(small):
    encoder = TextEncoder(small, BYTES, 8)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        encoder.encode(["a", " &nbsp; \n"])
    with pytest.raises(ValueError, match="into a list"):
        encoder.encode("a cat")
    with pytest.raises(ValueError, match="at least one"):
        encoder.encode([])


# Cleaning


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&lt;b&gt; &amp;quot;x&amp;quot;", '<b> "x"'),
        ("<i> &amp;amp; &amp;lt;", "<i> & <"),
        ("cafÃ© au lait", "café au lait"),
        ("  a\t\tb \r\n c\u3000d  ", "a b c d"),
        ("&nbsp;a&nbsp;&nbsp;b&nbsp;", "a b"),
        ("猫が走る", "猫が走る"),
        (" \n ", ""),
    ],
)
def test_prompt_is_cleaned(text, cleaned):
    assert clean_text(text) == cleaned


# Tokenizers


def test_bytes_are_shifted_by_the_special_ids_and_end_with_eos():
    ids, mask = BYTES.encode(["aé", "b"], 5)
    assert ids.tolist() == [[0x61 + 3, 0xC3 + 3, 0xA9 + 3, 1, 0], [0x62 + 3, 1, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4), length=st.integers(1, 40)
)
def test_ids_never_exceed_the_length_and_the_mask_counts_them(texts, length):
    ids, mask = BYTES.encode(texts, length)
    assert ids.shape == mask.shape == (len(texts), length)
    for row, text in enumerate(texts):
        valid = min(len(text.encode()) + 1, length)
        assert mask[row].tolist() == [1] * valid + [0] * (length - valid)
        assert ids[row, valid - 1] == 1 and not ids[row, valid:].any()
        assert ids[row].max() < BYTES.vocab_size
        decoded = text_of(ids[row].tolist())
        assert text.startswith(decoded) and (valid == length or decoded == text)


def test_text_that_just_fits_is_kept_without_a_warning(caplog):
    ids, _ = BYTES.encode(["abcd"], 5)
    assert text_of(ids[0].tolist()) == "abcd"
    assert not caplog.records


def test_cut_prompt_keeps_eos_and_the_warning_says_where(caplog):
    with caplog.at_level(logging.WARNING):
        ids, mask = BYTES.encode(["fits", "a cat on a mat sees one two three four"], 10)
    assert text_of(ids[1].tolist()) == "a cat on "
    assert ids[1, -1] == 1 and mask[1].sum() == 10
    (record,) = caplog.records
    message = record.getMessage()
    assert "prompt 1 has 39 tokens and the limit is 10" in message
    assert "'a mat sees one two three ...'" in message


def test_blank_text_and_impossible_length_are_refused():
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        BYTES.encode(["  "], 5)
    with pytest.raises(ValueError, match="length is 0"):
        BYTES.encode(["a"], 0)


def write_sentencepiece(directory: Path, specials: tuple[str, ...] = ("<pad>", "</s>", "<unk>")) -> None:
    """A small Unigram file laid out like the one of UMT5: special tokens, bytes to fall back on, pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁cat", "▁on", *"abcdeinot"]
    scores = [0.0 if piece in specials else -2.0 - index / 100 for index, piece in enumerate(pieces)]
    vocabulary = list(zip(pieces, scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(4)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "extra_ids": 0}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def test_sentencepiece_file_is_run_as_written_with_eos_and_padding(tmp_path):
    write_sentencepiece(tmp_path)
    tokenizer = SentencePieceTokenizer(tmp_path)
    ids, mask = tokenizer.encode(["cat on cat", "cat 猫"], 8)
    cat, on, space = 260, 261, 259
    assert ids[0].tolist() == [cat, on, cat, 1, 0, 0, 0, 0]
    assert ids[1].tolist() == [cat, space, *(byte + 3 for byte in "猫".encode()), 1, 0, 0]
    assert mask.sum(dim=1).tolist() == [4, 6]


def test_cut_sentencepiece_prompt_quotes_the_text_it_lost(tmp_path, caplog):
    write_sentencepiece(tmp_path)
    with caplog.at_level(logging.WARNING):
        ids, mask = SentencePieceTokenizer(tmp_path).encode(["cat on cat on a tin"], 4)
    assert ids.tolist() == [[260, 261, 260, 1]] and mask.sum() == 4
    (record,) = caplog.records
    assert "11 tokens and the limit is 4" in record.getMessage()
    assert "'on a tin'" in record.getMessage()


def test_directory_without_the_umt5_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give that of umt5-xxl"):
        SentencePieceTokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match="copy tokenizer.json"):
        SentencePieceTokenizer(tmp_path)
    write_sentencepiece(tmp_path, specials=("<s>", "<pad>", "<unk>", "</s>"))
    with pytest.raises(ValueError, match="gives <pad> id 1, not 0"):
        SentencePieceTokenizer(tmp_path)


def test_a_damaged_tokenizer_is_one_sentence_that_names_the_file(tmp_path):
    write_sentencepiece(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_bytes()
    source = random.Random(0)
    contents = [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"\0" * 100, b"\x80\x04K\x01.", b"<html></html>"]
    contents += [whole[: len(whole) * part // 12] for part in range(1, 12)]
    for _ in range(60):
        flipped = bytearray(whole)
        for _ in range(4):
            flipped[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        contents.append(bytes(flipped))
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            SentencePieceTokenizer(tmp_path).encode(["cat on cat"], 8)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 60  # a flip inside a piece is another vocabulary, which only a checksum tells


def test_a_panic_of_the_tokenizers_library_is_a_sentence(tmp_path):
    write_sentencepiece(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    replace = {"type": "Replace", "pattern": {"String": ""}, "content": " "}
    values["normalizer"] = {"type": "Sequence", "normalizers": [replace, {"type": "NFKC"}]}
    path.write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"tokenizer.json is damaged or no tokenizer \(.*\); get tokenizer.json"
    ):
        SentencePieceTokenizer(tmp_path).encode(["cat 猫 😀 x"], 8)


def test_a_tokenizer_that_is_no_ordinary_file_or_too_large_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="tokenizer.json is a pipe"):
        SentencePieceTokenizer(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(ValueError, match="tokenizer.json has more than the 67108864 bytes that are read"):
        SentencePieceTokenizer(tmp_path)
    path.unlink()
    path.symlink_to("absent")
    with pytest.raises(ValueError, match="tokenizer.json is a link to a file that is not there"):
        SentencePieceTokenizer(tmp_path)


def test_nothing_is_written_without_a_cache(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TextEncoder(small, BYTES, 64).encode(PROMPTS)
    assert not list(tmp_path.iterdir())


def test_threads_that_build_their_first_encoder_at_once_all_get_one():
    """Three of them come while the first is in the midst of importing transformers. Its modules of the model
    take seconds and come after that: a class of the same name stands for them."""
    code = (
        "import sys, threading, time, types\n"
        "from rfengine.config import TextConfig\n"
        "from rfengine.models.text_encoder import build_umt5\n"
        "class Encoder:\n"
        "    def __init__(self, config): self.config = config\n"
        "    def eval(self): return self\n"
        "light = types.ModuleType('transformers.models.umt5.modeling_umt5')\n"
        "light.UMT5EncoderModel = Encoder\n"
        "sys.modules[light.__name__] = light\n"
        "built = []\n"
        "def build():\n"
        "    built.append(build_umt5(TextConfig(259, 16, 16, 24, 2, 1, tokenizer='bytes')))\n"
        "threads = [threading.Thread(target=build) for _ in range(3)]\n"
        "class Midst:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'transformers.utils':\n"
        "            [thread.start() for thread in threads]\n"
        "            time.sleep(0.2)\n"
        "sys.meta_path.insert(0, Midst)\n"
        "build()\n"
        "[thread.join() for thread in threads]\n"
        "assert [encoder.config.d_model for encoder in built] == [16] * 4\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
