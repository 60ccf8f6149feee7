"""VideoReward on a tiny Qwen2-VL with random weights, in the files of the published checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rfengine.training.video_reward import (
    SCORES,
    SPECIAL_TOKENS,
    UNVERIFIED_CONSTANTS,
    VideoReward,
    VideoRewardSettings,
    engine_name,
    fitted_size,
    newest_checkpoint,
    prepare_frames,
    read_settings,
    read_template,
    to_patches,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = (
    "\nRate {x}.\nVisual <|VQ_reward|>\nEND\n"
    "Motion <|MQ_reward|>\nEND\n{text_prompt}\nText <|TA_reward|>\nEND\n"
)
SHA256 = hashlib.sha256(TEMPLATE.encode()).hexdigest()
CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CPU = torch.device("cpu")
RANK, ALPHA, WIDTH = 2, 5.0, 32
PATCH, MERGE = 14, 2
PROMPTS = ["a dog {runs}", "two cats"]


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes alone, and the tokens of the chat."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(list(CHAT_TOKENS))
    return made


def base_config(**changes: int) -> transformers.Qwen2VLConfig:
    known = tokenizer()
    return transformers.Qwen2VLConfig(
        text_config={
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": known.get_vocab_size() + 40,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "bos_token_id": 0, "eos_token_id": 1, **changes,
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 4, "patch_size": PATCH,
        },
        image_token_id=known.token_to_id("<|image_pad|>"), video_token_id=known.token_to_id("<|video_pad|>"),
        vision_start_token_id=known.token_to_id("<|vision_start|>"),
        vision_end_token_id=known.token_to_id("<|vision_end|>"),
    )  # fmt: skip


def model_config() -> dict:
    return {
        "data_config": {"prompt_template_type": "detailed_special", "max_frame_pixels": 56 * 84, "fps": 2},
        "model_config": {"output_dim": 3},
        "peft_lora_config": {"r": RANK, "lora_alpha": ALPHA},
        "inference_config": dict(UNVERIFIED_CONSTANTS),
    }


class Checkpoint:
    """The effective model, and directories of it in both layouts."""

    def __init__(self, folder: Path, outputs: int = 3) -> None:
        torch.manual_seed(0)
        self.base = folder / "base"
        self.base.mkdir(parents=True)
        config = base_config()
        config.save_pretrained(self.base)
        tokenizer().save(str(self.base / "tokenizer.json"))
        self.model = transformers.Qwen2VLModel(config).eval()
        for parameter in self.model.parameters():
            parameter.data = torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.15)
        self.head = torch.randn(outputs, WIDTH)
        self.lora = {}
        for name, module in self.model.language_model.named_modules():
            if isinstance(module, nn.Linear):
                self.lora[f"{name}.lora_A"] = torch.randn(RANK, module.in_features) * 0.2
                self.lora[f"{name}.lora_B"] = torch.randn(module.out_features, RANK) * 0.2
        self.whole, self.adapter = folder / "whole", folder / "adapter"
        for directory in (self.whole, self.adapter):
            (directory / "checkpoint-9").mkdir(parents=True)
            (directory / "checkpoint-10").mkdir()
            (directory / "model_config.json").write_text(json.dumps(model_config() | {"model_config": {}}))
            (directory / "prompt.txt").write_bytes(TEMPLATE.encode())
        self._write_whole()
        self._write_adapter()

    def before_lora(self, name: str) -> Tensor:
        weight = self.model.language_model.get_parameter(name).data
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" not in self.lora:
            return weight
        return weight - ALPHA / RANK * self.lora[f"{layer}.lora_B"] @ self.lora[f"{layer}.lora_A"]

    def _write_whole(self) -> None:
        """model.pth: one PEFT model under the older names, its embedding cut to the tokenizer's length."""
        prefix, state = "base_model.model.", {"base_model.model.rm_head.weight": self.head}
        for name, _ in self.model.language_model.named_parameters():
            layer = name.removesuffix(".weight").removesuffix(".bias")
            adapted = f"{layer}.lora_A" in self.lora
            written = name.replace(layer, f"{layer}.base_layer") if adapted else name
            state[f"{prefix}model.{written}"] = self.before_lora(name).clone()
        rows = tokenizer().get_vocab_size() + len(SPECIAL_TOKENS)
        embedding = f"{prefix}model.embed_tokens.weight"
        state[embedding] = state[embedding][:rows].clone()
        state[f"{prefix}lm_head.weight"] = torch.zeros(rows, WIDTH)
        state |= {f"{prefix}visual.{name}": p.data for name, p in self.model.visual.named_parameters()}
        state |= {f"{prefix}model.{name}.default.weight": tensor for name, tensor in self.lora.items()}
        torch.save(state, self.whole / "checkpoint-10" / "model.pth")

    def _write_adapter(self) -> None:
        """The adapter with the newer names, the tower and the head beside it, the rest in the base."""
        prefix = "base_model.model."
        folder = self.adapter / "checkpoint-10"
        pairs = {f"{prefix}model.language_model.{name}.weight": tensor for name, tensor in self.lora.items()}
        save_file(pairs, folder / "adapter_model.safetensors")
        visual = dict(self.model.visual.named_parameters())
        rest = {f"{prefix}model.visual.{name}": tensor.data for name, tensor in visual.items()}
        torch.save(rest | {f"{prefix}rm_head.weight": self.head}, folder / "non_lora_state_dict.pth")
        base = {f"visual.{name}": torch.zeros_like(tensor) for name, tensor in visual.items()}
        names = [name for name, _ in self.model.language_model.named_parameters()]
        base |= {f"model.{name}": self.before_lora(name).contiguous() for name in names}
        save_file(base, self.base / "model.safetensors")

    def load(self, directory: Path, **options: object) -> VideoReward:
        return VideoReward(directory, CPU, torch.float32, base=self.base, prompt_sha256=SHA256, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return torch.rand(2, 33, 48, 80, 3, generator=torch.Generator().manual_seed(1))


def plain_patches(video: Tensor) -> tuple[Tensor, list[int]]:
    """Patch by patch: two frames deep, those of one merged token after each other."""
    grid = [len(video) // 2, video.shape[2] // PATCH, video.shape[3] // PATCH]
    rows = []
    for t in range(grid[0]):
        for top in range(0, grid[1], MERGE):
            for left in range(0, grid[2], MERGE):
                for y in range(top, top + MERGE):
                    for x in range(left, left + MERGE):
                        window = video[
                            2 * t : 2 * t + 2, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH
                        ]
                        rows.append(window.transpose(0, 1).reshape(-1))  # channel, frame, row, column
    return torch.stack(rows), grid


def plain_score(checkpoint: Checkpoint, clip: Tensor, prompt: str, plain_positions: bool = True) -> Tensor:
    """From the description alone, on the weights before they were split; the clip has the model's size."""
    mean, std = (
        torch.tensor(part)[:, None, None]
        for part in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    rows = [round(i * (len(clip) - 1) / 3) for i in range(4)]  # 33 frames at 16 a second are 4.1 at 2
    video = (clip[rows].permute(0, 3, 1, 2) - mean) / std
    patches, grid = plain_patches(video)
    known = tokenizer()
    known.add_special_tokens(list(SPECIAL_TOKENS))
    pad = "<|video_pad|>" * (len(patches) // MERGE**2)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{pad}<|vision_end|>{TEMPLATE.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor(known.encode(text, add_special_tokens=False).ids)
    model = checkpoint.model
    with torch.no_grad():
        embedded = model.language_model.embed_tokens(ids)
        video_rows = ids == known.token_to_id("<|video_pad|>")
        embedded[video_rows] = model.visual(patches, grid_thw=torch.tensor([grid])).pooler_output
        positions = torch.arange(len(ids)).repeat(3, 1, 1)
        if not plain_positions:
            kinds = 2 * video_rows[None].int()
            positions, _ = model.get_rope_index(ids[None], kinds, video_grid_thw=torch.tensor([grid]))
        hidden = model.language_model(inputs_embeds=embedded[None], position_ids=positions).last_hidden_state[
            0
        ]
    scores = []
    for index, quality in enumerate(("VQ", "MQ", "TA")):
        place = ids.tolist().index(known.token_to_id(SPECIAL_TOKENS[index]))
        logit = checkpoint.head[index % len(checkpoint.head)] @ hidden[place]
        scores.append(
            (logit - UNVERIFIED_CONSTANTS[f"{quality}_mean"]) / UNVERIFIED_CONSTANTS[f"{quality}_std"]
        )
    return torch.stack(scores)


def test_both_layouts_give_equal_scores(checkpoint, frames):
    whole = checkpoint.load(checkpoint.whole)(frames, PROMPTS)
    adapter = checkpoint.load(checkpoint.adapter)(frames, PROMPTS)
    assert tuple(whole) == tuple(adapter) == SCORES
    for name in SCORES:
        assert whole[name].shape == (2,) and whole[name].dtype == torch.float32
        torch.testing.assert_close(whole[name], adapter[name], atol=1e-5, rtol=1e-5)
    assert (whole["motion_quality"][0] - whole["motion_quality"][1]).abs() > 1e-3


@pytest.mark.parametrize("outputs", [1, 3])
def test_scores_are_those_of_a_plain_computation(outputs, tmp_path):
    made = Checkpoint(tmp_path, outputs)
    clips = torch.rand(2, 33, 56, 84, 3, generator=torch.Generator().manual_seed(2))
    scores = made.load(made.whole)(clips, PROMPTS)
    expected = torch.stack([plain_score(made, clip, text) for clip, text in zip(clips, PROMPTS, strict=True)])
    torch.testing.assert_close(
        torch.stack([scores[name] for name in SCORES], 1), expected, atol=2e-4, rtol=1e-4
    )
    spatial = plain_score(made, clips[0], PROMPTS[0], plain_positions=False)
    assert (spatial - expected[0]).abs().max() > 1e-2


def test_bytes_are_scored_as_floats_and_each_video_by_itself(checkpoint, frames):
    reward = checkpoint.load(checkpoint.whole)
    as_bytes = (frames * 255).round().to(torch.uint8)
    pair, single = reward(as_bytes, PROMPTS), reward(as_bytes[1:].float() / 255, PROMPTS[1:])
    for name in SCORES:
        torch.testing.assert_close(pair[name][1:], single[name], atol=1e-5, rtol=1e-5)


def test_base_lies_in_the_checkpoint_unless_it_is_given(tmp_path, frames):
    made = Checkpoint(tmp_path)
    made.base.rename(made.whole / "base")
    reward = VideoReward(made.whole, CPU, torch.float32, prompt_sha256=SHA256)
    assert {name: len(scores) for name, scores in reward(frames[:0], []).items()} == dict.fromkeys(SCORES, 0)
    with pytest.raises(ValueError, match="give the directory of the base model"):
        VideoReward(made.adapter, CPU, torch.float32, prompt_sha256=SHA256)


def test_bfloat16_is_near_float32(checkpoint, frames):
    full = checkpoint.load(checkpoint.whole)(frames, PROMPTS)
    half = VideoReward(checkpoint.whole, CPU, base=checkpoint.base, prompt_sha256=SHA256)(frames, PROMPTS)
    for name in SCORES:
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], full[name], atol=0.15, rtol=0)


def test_special_tokens_in_prompts_are_refused(checkpoint, frames):
    reward = checkpoint.load(checkpoint.whole)
    for token in ("<|MQ_reward|>", "<|video_pad|>"):
        with pytest.raises(ValueError, match="holds a special token"):
            reward(frames[:1], [f"a {token} dog"])


def test_frames_are_sampled_at_two_a_second_and_fitted():
    settings = VideoRewardSettings((0.0,) * 3, (1.0,) * 3, None, 448 * 448, 2.0, None, None)
    clip = torch.arange(81.0)[:, None, None, None].expand(-1, 480, 832, 3) / 100
    pixels = prepare_frames(clip, 16.0, settings, 28)
    assert pixels.shape == (10, 3, 336, 588)
    shown = pixels[:, 0, 0, 0] * 0.26862954 + 0.48145466
    expected = torch.tensor([0.0, 9, 18, 27, 36, 44, 53, 62, 71, 80]) / 100
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)
    assert to_patches(pixels, 14, 2, 2)[1] == (5, 24, 42)
    for length, count in ((2, 2), (3, 2), (5, 4), (16, 4), (65, 8)):
        assert len(prepare_frames(clip[:length, :28, :28], 16.0, settings, 28)) == count


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((480, 832), (336, 588)), ((64, 64), (56, 56)), ((10, 300), (28, 308)), ((448, 448), (448, 448))],
)
def test_sides_are_multiples_within_the_area(size, fitted):
    assert fitted_size(*size, 28, 448 * 448) == fitted


@pytest.mark.parametrize(
    ("name", "known"),
    [
        (
            "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
            "language_model.layers.0.mlp.up_proj.weight",
        ),
        ("base_model.model.model.language_model.norm.weight", "language_model.norm.weight"),
        ("base_model.model.model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("base_model.model.visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"),
        ("base_model.model.model.visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"),
        ("base_model.model.rm_head.weight", "rm_head.weight"),
        ("model.norm.weight", "language_model.norm.weight"),
    ],
)
def test_names_of_every_layout_become_one(name, known):
    assert engine_name(name) == known


def test_highest_checkpoint_is_taken(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist"),
        (TEMPLATE + "\n", "has the sha256"),
    ],
)
def test_another_prompt_file_is_refused(text, sentence, tmp_path):
    path = tmp_path / "prompt.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_template(path, SHA256)
    path.write_text(TEMPLATE)
    assert read_template(path, SHA256) == TEMPLATE
    with pytest.raises(ValueError, match="fdb6309bac618dd0"):
        read_template(path)


def test_constants_that_are_absent_are_named_as_unverified(tmp_path):
    config = model_config()
    del config["inference_config"]["MQ_std"]
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match='no MQ_std in inference_config.*unverified.*"MQ_std": 1.3811'):
        read_settings(tmp_path)
    (tmp_path / "model_config.json").write_text(json.dumps(model_config()))
    settings = read_settings(tmp_path)
    assert settings.mean == (3.6757, 1.1646, 2.8105) and settings.std == (2.2476, 1.3811, 2.5121)
    assert (settings.lora_alpha, settings.lora_rank, settings.fps) == (ALPHA, RANK, 2.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist"),
        ("{", "no model_config.json of VideoAlign"),
        ("[]", "no model_config.json of VideoAlign"),
        (
            json.dumps(model_config() | {"data_config": {"prompt_template_type": "none"}}),
            "prompt_template_type 'none'",
        ),
        (
            json.dumps(model_config() | {"data_config": {"num_frames": 8}}),
            "num_frames 8; only None is served",
        ),
        (
            json.dumps(model_config() | {"inference_config": {**UNVERIFIED_CONSTANTS, "VQ_std": 0}}),
            "VQ_std in .* is 0; it must be at least",
        ),
        *(
            (
                json.dumps(model_config() | {section: {key: value}}),
                f"{key} in .*model_config.json is .*; it must be a",
            )
            for section, key in (
                ("peft_lora_config", "lora_alpha"),
                ("peft_lora_config", "r"),
                ("model_config", "output_dim"),
                ("data_config", "fps"),
                ("data_config", "max_frame_pixels"),
            )
            for value in ("64", 0, -1, True, [64], 1e30)
        ),
        (
            json.dumps(model_config() | {"peft_lora_config": {"r": 1.5}}),
            "r in .* is 1.5; it must be an integer",
        ),
        ('{"inference_config": {"VQ_mean": NaN}}', "NaN is no number of JSON"),
    ],
)
def test_other_settings_are_refused(text, sentence, tmp_path):
    if text is not None:
        (tmp_path / "model_config.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_settings(tmp_path)


def rewrite(made: Checkpoint, change) -> None:
    path = made.whole / "checkpoint-10" / "model.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


HEAD = "base_model.model.rm_head.weight"
LORA_A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.update({HEAD: torch.zeros(2, WIDTH)}), r"rm_head.weight is \(2, 32\)"),
        (lambda state: state.update({HEAD: torch.zeros(3, WIDTH + 1)}), r"rm_head.weight is \(3, 33\)"),
        (lambda state: state.update({HEAD: torch.zeros(WIDTH)}), r"rm_head.weight is \(32,\)"),
        (lambda state: state.pop(HEAD), "no rm_head.weight"),
        (lambda state: state.pop(LORA_A), "has only one of lora_A and lora_B for .*up_proj"),
        (lambda state: state.update({LORA_A: torch.zeros(RANK + 1, WIDTH)}), "does not fit"),
        (
            lambda state: state.update({EMBEDDING: state[EMBEDDING][:-1].clone()}),
            r"1 mis-shaped: language_model.embed_tokens.weight",
        ),
        (
            lambda state: state.pop("base_model.model.model.norm.weight"),
            "1 missing: language_model.norm.weight",
        ),
        (
            lambda state: state.update({"base_model.model.model.extra": torch.zeros(1)}),
            "1 unexpected: language_model.extra",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(change, sentence, tmp_path):
    made = Checkpoint(tmp_path)
    rewrite(made, change)
    with pytest.raises(ValueError, match=sentence) as caught:
        made.load(made.whole)
    assert "\n" not in str(caught.value)


def test_head_has_to_be_as_high_as_the_settings_say(tmp_path):
    made = Checkpoint(tmp_path)
    path = made.whole / "model_config.json"
    path.write_text(json.dumps(model_config() | {"model_config": {"output_dim": 1}}))
    with pytest.raises(ValueError, match="output_dim in model_config.json, which is 1"):
        made.load(made.whole)


def test_files_that_are_absent_are_named(tmp_path):
    made = Checkpoint(tmp_path)
    (made.base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors"):
        made.load(made.adapter)
    made.load(made.whole)  # needs none
    (made.base / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json does not exist"):
        made.load(made.whole)
    (made.adapter / "checkpoint-10" / "adapter_model.safetensors").unlink()
    tokenizer().save(str(made.base / "tokenizer.json"))
    with pytest.raises(ValueError, match="neither model.pth nor"):
        made.load(made.adapter)
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    plain.save(str(made.base / "tokenizer.json"))
    with pytest.raises(ValueError, match="not the tokenizer of a Qwen2-VL"):
        made.load(made.whole)
