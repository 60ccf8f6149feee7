import torch

from recipes.tiny.text_encoder import LABELS, TextStage, scene_labels
from recipes.tiny.training import StageConfig
from rfengine.models.text_encoder import ByteTokenizer, TextEncoder
from rfengine.presets import PRESETS
from rfengine.toy.captions import caption, sample_scenes
from rfengine.toy.world import PANNING, Scene, SceneObject, WorldConfig
from rfengine.training.parallel import Ranks


def test_labels_name_every_attribute_and_the_missing_second_object():
    scene = Scene((SceneObject("blue", "square", "large"),), "turning", "fast", None, "dotted wall")
    names = {name: LABELS[name][index] for name, index in scene_labels(scene).items()}
    assert names == {
        "background": "dotted wall", "motion": "turning", "speed": "fast", "direction": "open",
        "camera": "still", "pan": "open",
        "colour_0": "blue", "shape_0": "square", "size_0": "large",
        "colour_1": "none", "shape_1": "none", "size_1": "none",
    }  # fmt: skip


def test_what_is_open_has_a_label_of_its_own():
    pair = Scene((SceneObject("red"), SceneObject(shape="square")), None, None, None, None, camera=PANNING)
    names = {name: LABELS[name][index] for name, index in scene_labels(pair).items()}
    assert names == {
        "background": "open", "motion": "open", "speed": "open", "direction": "open",
        "camera": "panning", "pan": "open",
        "colour_0": "red", "shape_0": "open", "size_0": "open",
        "colour_1": "open", "shape_1": "square", "size_1": "open",
    }  # fmt: skip


def test_labels_are_equal_exactly_when_captions_are():
    scenes = sample_scenes(300, 5, WorldConfig(motion_weights=(1, 1, 1, 1), pair_share=0.5))
    by_caption = {caption(scene): tuple(scene_labels(scene).values()) for scene in scenes}
    assert len(set(by_caption.values())) == len(by_caption)


def test_a_short_training_gives_a_frozen_encoder_with_zero_padding():
    stage = TextStage(StageConfig("text", PRESETS["tiny"], 1, 0), Ranks())
    stage.update(0)
    model = stage.encoder()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    states = TextEncoder(model, ByteTokenizer(), 32).encode(["a small red circle", "a large blue square"])
    assert states.shape == (2, 32, 96)
    assert not states[0, len("a small red circle") + 1 :].any() and states[0, len("a small red circle")].any()
    assert torch.isfinite(states).all()
