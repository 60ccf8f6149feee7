"""Sentences about scenes of the toy world, and the scenes that a sentence means.

`caption` says everything in one pattern. `paraphrase` says it, or what is not left open, in many patterns and
with synonyms; `parse_caption` reads all of them, and any other text by the words that it knows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from rfengine.toy.world import DEFAULT_WORLD, PANNING, Scene, SceneObject, WorldConfig, draw_scene

Split = Literal["train", "held_out", "all"]
Words = Mapping[str, tuple[str, ...]]  # of every value, the first one in captions

COLOUR_WORDS: Words = {
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
}
SHAPE_WORDS: Words = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
}
ANY_SHAPE = ("shape", "thing", "object")
SIZE_WORDS: Words = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
MOTION_WORDS: Words = {
    "moving": ("moving", "going", "rolling", "drifting", "gliding", "travelling"),
    "bouncing": ("bouncing", "swinging", "hopping"),
    "turning": ("turning", "spinning", "rotating"),
    "growing": ("growing and shrinking", "pulsing", "pulsating"),
}
SPEED_WORDS: Words = {
    "slowly": ("slowly", "gently", "at a slow pace"),
    "fast": ("fast", "quickly", "rapidly", "at high speed"),
}
SPEED_ADJECTIVES: Words = {"slowly": ("slow",), "fast": ("quick", "speedy")}
DIRECTION_WORDS: dict[str, Words] = {
    "moving": {
        "left": ("to the left", "leftwards", "towards the left", "left"),
        "right": ("to the right", "rightwards", "towards the right", "right"),
        "up": ("upwards", "up", "to the top"),
        "down": ("downwards", "down", "to the bottom"),
    },
    "bouncing": {
        "right": ("left and right", "from side to side", "sideways"),
        "down": ("up and down", "vertically"),
    },
}
BACKGROUND_WORDS: Words = {
    "grey wall": ("a grey wall", "a plain wall", "a gray wall"),
    "checkered floor": ("a checkered floor", "a chequered floor", "a chessboard"),
    "striped wall": ("a striped wall", "stripes", "a wall with stripes"),
    "dotted wall": ("a dotted wall", "polka dots", "a wall with dots"),
    "cloudy sky": ("a cloudy sky", "the sky", "clouds"),
    "sandy beach": ("a sandy beach", "a beach", "sand"),
    "grassy meadow": ("a grassy meadow", "a meadow", "grass"),
}
CAMERA_VERBS = ("pans", "moves", "swings")
PLACES = ("over", "on", "in front of", "above", "against")

# clauses of pieces; a piece whose attribute is open falls away, and so does a clause without pieces
Pattern = tuple[tuple[str, ...], ...]
_CAMERA = ("{camera}",)
PATTERNS: tuple[Pattern, ...] = (
    (("{objects}", "{motion}", "{speed}", "{direction}", "{place}"), _CAMERA),
    (("{objects}", "{speed}", "{motion}", "{direction}", "{place}"), _CAMERA),
    (("{objects}", "{motion}", "{direction}", "{speed}", "{place}", "while {camera}"),),
    (("{place}",), ("{objects}", "{motion}", "{direction}", "{speed}"), _CAMERA),
    (("{objects}", "that can be seen {motion}", "{speed}", "{direction}", "{place}"), _CAMERA),
    (("there is {objects}", "{motion}", "{direction}", "{place}", "{speed}"), _CAMERA),
    (("{slow_objects}", "{motion}", "{direction}", "{place}"), _CAMERA),
    (_CAMERA, ("{objects}", "{motion}", "{speed}", "{direction}", "{place}")),
    (("{explained_objects}",), ("{motion}", "{direction}", "{speed}", "{place}"), _CAMERA),
    (("{background}",), ("{objects}", "{motion}", "{speed}", "{direction}"), _CAMERA),
    (("a video of {objects}", "{direction}", "{motion}", "{speed}"), ("{background} behind",), _CAMERA),
    (("{motion}", "{direction}", "{speed}", "{place}"), ("{objects}",), _CAMERA),
)
HELD_OUT_PATTERNS: tuple[Pattern, ...] = (  # which no training sees
    (("{objects}", "{place}"), ("{motion}", "{speed}", "{direction}"), _CAMERA),
    (("{speed}", "{direction}", "{motion}"), _CAMERA, ("{objects}", "{place}")),
)
LONGEST = 143  # bytes of a paraphrase at most
_UNSAID_MOTION = 0.15  # of the paraphrases with a direction, which says whether a shape moves or bounces
_SWAPPED = 0.3  # of the noun phrases say the colour first


def caption(scene: Scene) -> str:
    """The sentence that describes the scene; equal sentences mean scenes that differ in `start` and `view`
    alone. What is open is not said."""
    return _written(PATTERNS[0], scene, None)


def open_caption(scene: Scene) -> str:
    """The caption without its speed: slow and fast videos are equally likely under it."""
    return caption(dataclasses.replace(scene, speed=None))


def opened(scene: Scene, generator: random.Random, share: float) -> Scene:
    """The scene with each of its attributes left open with the probability `share`."""

    def left(value: str | None) -> str | None:
        return None if generator.random() < share else value

    objects = tuple(
        SceneObject(left(entry.colour), left(entry.shape), left(entry.size)) for entry in scene.objects
    )
    motion, direction = left(scene.motion), left(scene.direction)
    panned = scene.camera not in ("still", None)
    return dataclasses.replace(
        scene,
        objects=objects,
        motion=motion,
        speed=left(scene.speed),
        direction=direction if motion else None,
        background=left(scene.background),
        camera=(left(scene.camera) or PANNING) if panned else scene.camera,
        pan=left(scene.pan),
    )


def paraphrase(scene: Scene, generator: random.Random, patterns: Sequence[Pattern] = PATTERNS) -> str:
    """A sentence of at most LONGEST bytes that means the scene, in one of the patterns and with synonyms that
    are drawn."""
    while len((text := _written(generator.choice(patterns), scene, generator)).encode()) > LONGEST:
        pass
    return text


def _written(pattern: Pattern, scene: Scene, generator: random.Random | None) -> str:
    """The pattern with the words of the scene: the first of each without a generator, else drawn ones."""
    words = _Wording(generator).of(scene)
    clauses = []
    for pieces in pattern:
        said = [piece.format(**words) for piece in pieces if words[re.findall(r"{(\w+)}", piece)[0]]]
        if said:
            clauses.append(" ".join(said))
    return re.sub(r"\ba (?=[aeiou])", "an ", ", ".join(clauses))


@dataclasses.dataclass(frozen=True, slots=True)
class _Wording:
    """The words for the parts of a sentence, "" for a part that is open; generator: as _written."""

    generator: random.Random | None

    def of(self, scene: Scene) -> dict[str, str]:
        speed = self._word(SPEED_WORDS, scene.speed)
        background = self._word(BACKGROUND_WORDS, scene.background)
        adjective = self._word(SPEED_ADJECTIVES, scene.speed)
        implied = scene.direction is not None and self._chance(_UNSAID_MOTION)
        return {
            "objects": " and ".join(self._noun_phrase(entry) for entry in scene.objects),
            "slow_objects": " and ".join(self._noun_phrase(entry, adjective) for entry in scene.objects),
            "explained_objects": self._explained(scene.objects),
            "motion": "" if implied else self._word(MOTION_WORDS, scene.motion),
            "speed": speed,
            "direction": self._word(DIRECTION_WORDS.get(scene.motion or "", {}), scene.direction),
            "background": background,
            "place": background and f"{self._choice(PLACES)} {background}",
            "camera": self._camera(scene),
        }

    def _choice(self, options: Sequence[str]) -> str:
        return self.generator.choice(options) if self.generator else options[0]

    def _chance(self, share: float) -> bool:
        return self.generator is not None and self.generator.random() < share

    def _word(self, words: Words, value: str | None) -> str:
        return "" if value is None else self._choice(words[value])

    def _noun(self, entry: SceneObject) -> str:
        return self._choice(ANY_SHAPE if entry.shape is None else SHAPE_WORDS[entry.shape])

    def _noun_phrase(self, entry: SceneObject, adjective: str = "") -> str:
        said = [self._word(SIZE_WORDS, entry.size), self._word(COLOUR_WORDS, entry.colour)]
        if self._chance(_SWAPPED):
            said.reverse()
        return " ".join(filter(None, ("a", adjective, *said, self._noun(entry))))

    def _explained(self, objects: Sequence[SceneObject]) -> str:
        """A single shape with its attributes behind it; of two it could not be told whose they are."""
        (entry, *others) = objects
        said = [self._word(COLOUR_WORDS, entry.colour), self._word(SIZE_WORDS, entry.size)]
        if others or not any(said):
            return " and ".join(self._noun_phrase(entry) for entry in objects)
        return f"a {self._noun(entry)} that is {' and '.join(filter(None, said))}"

    def _camera(self, scene: Scene) -> str:
        if scene.camera in ("still", None):
            return ""
        direction = None if scene.camera == PANNING else scene.camera
        said = [self._word(SPEED_WORDS, scene.pan), self._word(DIRECTION_WORDS["moving"], direction)]
        if self._chance(0.5):
            said.reverse()
        subject = self._choice(("the camera", "the view"))
        return " ".join(filter(None, (subject, self._choice(CAMERA_VERBS), *said)))


def parse_caption(text: str) -> Scene:
    """The scene that a text means, with None for what it leaves open, from the middle.

    It looks for the words that it knows, in any order, and passes over others. Raises ValueError where there
    is none, and where the words contradict each other.
    """
    clauses = re.split(r"[,;:.]|\bwhile\b|\bas\b|\band (?=the (?:camera|view)\b)", text.lower())
    camera = [clause for clause in clauses if re.search(r"\b(camera|view)\b", clause)]
    scene_text = " , ".join(clause for clause in clauses if clause not in camera)
    background, rest = _taken(scene_text, BACKGROUND_WORDS)
    bouncing, rest = _taken(rest, DIRECTION_WORDS["bouncing"])
    going, rest = _taken(rest, DIRECTION_WORDS["moving"])
    motion, rest = _taken(rest, MOTION_WORDS)
    speed, rest = _taken(rest, SPEED_WORDS)
    slow, rest = _taken(rest, SPEED_ADJECTIVES)
    direction = bouncing or going
    if direction and motion is None:
        motion = "bouncing" if bouncing else "moving"
    objects = _objects(rest)
    said = [background, direction, motion, speed or slow, *camera, *objects]
    if not any(said):
        raise ValueError(
            f"{text!r} has no word of the toy world; it knows {', '.join(sorted(known_words()))}"
        )
    try:
        scene = Scene(objects or (SceneObject(),), motion, speed or slow, direction, background)
        return dataclasses.replace(scene, **_camera_of(camera))
    except ValueError as error:
        raise ValueError(f"{text!r} is no scene of the toy world: {error}") from error


def _camera_of(clauses: Sequence[str]) -> dict[str, str | None]:
    """The fields of a scene that the clauses about a camera set; without a verb it stands still."""
    direction, rest = _taken(" ".join(clauses), DIRECTION_WORDS["moving"])
    pan, rest = _taken(rest, SPEED_WORDS)
    if direction is None and not re.search(rf"\b({'|'.join(CAMERA_VERBS)}|panning|moving)\b", rest):
        return {}
    return {"camera": direction or PANNING, "pan": pan}


def _objects(text: str) -> tuple[SceneObject, ...]:
    """The shapes that a text names, each with the attributes before it, a single one with all of them."""
    nouns = {word: shape for shape, words in SHAPE_WORDS.items() for word in words}
    nouns |= {word: None for word in (*ANY_SHAPE, "something")}
    found = list(re.finditer(rf"\b({'|'.join(nouns)})\b", text))
    if len(found) < 2:
        entry = _described(text, nouns[found[0][1]] if found else None)
        return (entry,) if found or entry != SceneObject() else ()
    starts = [0, *(match.end() for match in found)]
    return tuple(
        _described(text[start : match.start()], nouns[match[1]])
        for start, match in zip(starts, found, strict=False)
    )


def _described(text: str, shape: str | None) -> SceneObject:
    return SceneObject(_taken(text, COLOUR_WORDS)[0], shape, _taken(text, SIZE_WORDS)[0])


def _taken(text: str, words: Words) -> tuple[str | None, str]:
    """The value that the longest of its phrases in the text stands for, and the text without that phrase."""
    phrases = [(phrase, value) for value, phrases in words.items() for phrase in phrases]
    for phrase, value in sorted(phrases, key=lambda entry: -len(entry[0])):
        bare = phrase.removeprefix("a ").removeprefix("the ")
        match = re.search(rf"\b{re.escape(bare)}\b", text)
        if match:
            return value, text[: match.start()] + " " + text[match.end() :]
    return None, text


def known_words() -> set[str]:
    """The phrases that a sentence about a scene is made of, without those of its pattern."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, MOTION_WORDS, SPEED_WORDS, SPEED_ADJECTIVES)
    directions = DIRECTION_WORDS.values()
    phrases = {
        phrase
        for words in (*tables, *directions, BACKGROUND_WORDS)
        for some in words.values()
        for phrase in some
    }
    return {phrase.removeprefix("a ").removeprefix("the ") for phrase in phrases} | {"camera"}


def is_held_out(scene: Scene) -> bool:
    """Whether the caption belongs to the tenth that training never sees; stable across processes."""
    return hashlib.sha256(caption(scene).encode()).digest()[0] % 10 == 0


def sample_scenes(
    count: int, seed: int, config: WorldConfig = DEFAULT_WORLD, split: Split = "all"
) -> list[Scene]:
    """Draw `count` scenes; the same arguments give the same scenes."""
    generator = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = draw_scene(generator, config)
        if split == "all" or is_held_out(scene) == (split == "held_out"):
            scenes.append(scene)
    return scenes
