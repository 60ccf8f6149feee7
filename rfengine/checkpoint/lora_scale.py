"""At which scale a LoRA is merged: what adapter_config.json and the safetensors header say of rank and alpha.

PEFT writes adapter_config.json beside the tensors. The header has it as Diffusers' lora_adapter_metadata
(JSON with keys such as transformer.lora_alpha), as plain lora_alpha and rank (SimpleTuner, lightx2v), or as
kohya's ss_network_alpha and ss_network_dim.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from rfengine.checkpoint.layouts import list_names
from rfengine.files import json_object, read_text, strict_json

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
DIFFUSERS_KEY = "lora_adapter_metadata"
MAX_ALPHA = 1e6
MAX_RANK = 1 << 20
_MAX_CONFIG_BYTES = 4 << 20  # of adapter_config.json; a pattern for each layer of the 14B model takes 60 kB
_MAX_PATTERNS = 2000
_MAX_PATTERN_LENGTH = 200
# In one pattern, and how many may have any of them: matching tries the product of all choices.
_MAX_REPEATS, _MAX_GROUPS, _MAX_BARS, _MAX_CHOICES = 3, 2, 10, 32

# What these make of the base weights is in no adapter file.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Options of PEFT that change what an adapter computes, and that have to be off.
_UNREAD_OPTIONS = {
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "layers that are repeated",
    "alora_invocation_tokens": "an activated LoRA",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters of bare parameters",
}
_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_HEADER_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
_HEADER_RANKS = ("rank", "lora_rank", "r", "network_dim")
_KOHYA_ALPHA, _KOHYA_RANK = "ss_network_alpha", "ss_network_dim"
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
_OURS = ("transformer", "")  # of the prefixes in Diffusers' metadata

Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True, slots=True)
class ScaleStatement:
    """What one place says of an adapter. A number is None where it says nothing of it.

    Patterns are matched as PEFT does: a regular expression for the end of a layer's name, from a dot on.
    """

    source: str  # how errors call the place
    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Patterns = ()
    alpha_pattern: Patterns = ()
    is_rslora: bool = False  # the scale is alpha / sqrt(rank)
    has_lora_bias: bool | None = None
    saved_modules: tuple[str, ...] = ()  # trained whole and saved beside the adapter
    has_biases: bool = False  # of the base, trained and saved beside the adapter

    def scale(self, layers: Iterable[str], rank: int) -> float | None:
        """The scale of a layer whose matrices have `rank`; None where no alpha is stated.

        layers: the names that the layer has with more and fewer prefixes. Raises ValueError when the rank
        that is stated is another.
        """
        layers = tuple(layers)
        stated = _matched(self.rank_pattern, layers, self.rank)
        if stated is not None and stated != rank:
            raise ValueError(
                f"{self.source} states rank {stated:g} for {layers[-1]} and its tensors have {rank}; they do "
                "not belong together"
            )
        alpha = _matched(self.alpha_pattern, layers, self.alpha)
        if alpha is None:
            return None
        return alpha / math.sqrt(rank) if self.is_rslora else alpha / rank

    def unused_patterns(self, layers: Iterable[tuple[str, ...]]) -> list[str]:
        """The patterns that match no layer; they may be meant for layers that are not adapted."""
        names = [name for each in layers for name in each]
        patterns = (*self.rank_pattern, *self.alpha_pattern)
        return [pattern.pattern for pattern, _ in patterns if not any(map(pattern.match, names))]


def _matched(patterns: Patterns, layers: tuple[str, ...], default: float | None) -> float | None:
    return next((value for pattern, value in patterns if any(map(pattern.match, layers))), default)


def read_adapter_config(path: Path) -> ScaleStatement:
    """What PEFT's adapter_config.json says. Raises ValueError for damaged files and what is not merged."""
    return _from_options(json_object(read_text(path, _MAX_CONFIG_BYTES), str(path)), str(path))


def header_statements(metadata: Mapping[str, str], label: str, has_alphas: bool) -> list[ScaleStatement]:
    """What the metadata in a safetensors header says, of each layout that it has.

    label: what the file is called in errors. has_alphas: there are alphas among the tensors, which kohya's
    header only repeats, for the most part of the layers. Raises ValueError for damaged values and for what
    is not merged.
    """
    source = f"the header of {label}"
    statements: list[ScaleStatement | None] = []
    if DIFFUSERS_KEY in metadata:
        where = f"{DIFFUSERS_KEY} in {source}"
        statements += _from_prefixed(json_object(metadata[DIFFUSERS_KEY], where), where)
    statements += _from_prefixed({key: _parsed(text) for key, text in metadata.items() if "." in key}, source)
    statements.append(_from_names(metadata, _HEADER_ALPHAS, _HEADER_RANKS, source))
    if not has_alphas:
        statements.append(_from_names(metadata, (_KOHYA_ALPHA,), (_KOHYA_RANK,), source))
    understood = {*_HEADER_ALPHAS, _KOHYA_ALPHA, DIFFUSERS_KEY}
    strange = [
        key
        for key in metadata
        if "alpha" in key.lower() and key not in understood and key.rpartition(".")[2] not in _FIELDS
    ]
    if strange:
        logger.warning("%s has %s, of which nothing is taken", source, list_names(map(shortened, strange)))
    return [each for each in statements if each is not None]


def _from_prefixed(values: Mapping[str, Any], source: str) -> list[ScaleStatement]:
    """Options whose names start with the part they are for, as Diffusers writes them."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        part, _, option = key.rpartition(".")
        parts.setdefault(part, {})[option] = value
    parts = {part: options for part, options in parts.items() if not options.keys().isdisjoint(_FIELDS)}
    strange = [part for part in parts if part not in _OURS and not part.startswith("text_encoder")]
    if strange:
        raise ValueError(
            f"{source} states rank and alpha of {list_names(map(shortened, strange))}, and not of the "
            "transformer alone; give a LoRA of the transformer"
        )
    return [_from_options(parts[part], source) for part in _OURS if part in parts]


def _from_names(
    metadata: Mapping[str, str], alphas: tuple[str, ...], ranks: tuple[str, ...], source: str
) -> ScaleStatement | None:
    """Numbers that stand in the header by themselves, under any of several names."""
    alpha = _only(metadata, alphas, check_alpha, source)
    rank = _only(metadata, ranks, _check_rank, source)
    if alpha is None and rank is None:
        return None
    is_rslora = _switch("use_rslora", _parsed(metadata.get("use_rslora", "")) or None, source)
    return ScaleStatement(source, rank, alpha, is_rslora=bool(is_rslora))


def _only(
    metadata: Mapping[str, str], keys: tuple[str, ...], check: Callable[[Any, str], Any], source: str
) -> Any:
    """The one value that the header states under any of `keys`; None where there is none."""
    stated = {key: check(_parsed(metadata[key]), f"{key} in {source}") for key in keys if key in metadata}
    if len(set(stated.values())) > 1:
        listed = ", ".join(f"{key} {value:g}" for key, value in stated.items())
        raise ValueError(
            f"{source} states {listed}, which contradict each other; give a file that states one"
        )
    return next(iter(stated.values()), None)


def _from_options(options: Mapping[str, Any], source: str) -> ScaleStatement:
    """A statement from the options of PEFT's LoraConfig."""
    _refuse_unread(options, source)
    if options.get("lora_alpha") is None:
        raise ValueError(f"{source} has no lora_alpha, without which the scale is unknown; add it there")
    rank, modules, bias = (options.get(key) for key in ("r", "modules_to_save", "bias"))
    if modules is not None and not (
        isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    ):
        raise ValueError(f"{source} has modules_to_save {shortened(modules)}; it has to be a list of names")
    if bias not in (None, "none", "all", "lora_only"):
        raise ValueError(f"{source} has bias {shortened(bias)}; it has to be none, all or lora_only")
    return ScaleStatement(
        source,
        None if rank is None else _check_rank(rank, f"r in {source}"),
        check_alpha(options["lora_alpha"], f"lora_alpha in {source}"),
        _patterns(options, "rank_pattern", _check_rank, source),
        _patterns(options, "alpha_pattern", check_alpha, source),
        bool(_switch("use_rslora", options.get("use_rslora"), source)),
        _switch("lora_bias", options.get("lora_bias"), source),
        tuple(modules or ()),
        bias in ("all", "lora_only"),
    )


def _refuse_unread(options: Mapping[str, Any], source: str) -> None:
    """Raises ValueError for options that make the adapter another one than a LoRA that can be merged."""
    kind = options.get("peft_type")
    if kind is not None and kind != "LORA":
        raise ValueError(f"{source} is of peft_type {shortened(kind)}; the engine merges LORA alone")
    for key, value in options.items():
        if value and (key in _UNREAD_OPTIONS or (key.startswith("use_") and key != "use_rslora")):
            meaning = _UNREAD_OPTIONS.get(key, f"{key.removeprefix('use_')} in place of plain LoRA")
            raise ValueError(
                f"{source} has {key} {shortened(value)}: {meaning}, which the engine does not merge; "
                "merge it with PEFT's merge_and_unload and convert the merged model"
            )
    start = options.get("init_lora_weights")
    if start not in _PLAIN_STARTS or isinstance(start, int) is not isinstance(start, bool):
        raise ValueError(
            f"{source} has init_lora_weights {shortened(start)}, which changes the base as well, and the "
            "adapter does not hold that; convert it to a plain LoRA with PEFT, or merge it there"
        )


def _patterns(
    options: Mapping[str, Any], key: str, check: Callable[[Any, str], float], source: str
) -> Patterns:
    values = options.get(key)
    if values is None:
        return ()
    if not isinstance(values, dict):
        raise ValueError(
            f"{source} has {key} {shortened(values)}; it has to be an object of names and numbers"
        )
    if len(values) > _MAX_PATTERNS:
        raise ValueError(f"{source} has {len(values)} entries in {key}, above the limit of {_MAX_PATTERNS}")
    choices = [name for name in values if re.search(r"(?<!\\)[*+?{|]", name)]
    if len(choices) > _MAX_CHOICES:
        raise ValueError(
            f"{source} has {len(choices)} patterns with repeats or choices in {key}, above the limit of "
            f"{_MAX_CHOICES}; give the names of the layers instead"
        )
    return tuple(
        (_pattern(name, key, source), check(value, f"{key} in {source}")) for name, value in values.items()
    )


def _pattern(text: str, key: str, source: str) -> re.Pattern[str]:
    """A pattern as PEFT matches it. Those that could take for ever to match are refused."""
    repeats, bars, groups = (len(re.findall(rf"(?<!\\)[{signs}]", text)) for signs in (r"*+?{", "|", "("))
    nested = re.search(r"\)[*+?{]|\(\?|\\\d", text)
    too_many = repeats > _MAX_REPEATS or bars > _MAX_BARS or groups > _MAX_GROUPS
    if len(text) > _MAX_PATTERN_LENGTH or nested or too_many:
        raise ValueError(
            f"{source} has the pattern {shortened(text)} in {key}, which is too long or repeats too much; "
            "give the names of the layers instead"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{source} has the pattern {shortened(text)} in {key}, which is no regular expression ({error}); "
            "mend it there"
        ) from error


def check_alpha(value: Any, what: str) -> float:
    """`value` as a float, where it can be an alpha; raises ValueError that calls it `what`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_ALPHA:
        raise ValueError(
            f"{what} is {shortened(value)}; an alpha is a number above 0 and up to {MAX_ALPHA:g}, so get the "
            "file again"
        )
    return float(value)


def _check_rank(value: Any, what: str) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= MAX_RANK
    if not whole or value != int(value):
        raise ValueError(
            f"{what} is {shortened(value)}; a rank is a whole number from 1 to {MAX_RANK}, so get "
            "the file again"
        )
    return int(value)


def _switch(key: str, value: Any, source: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{source} has {key} {shortened(value)}; it has to be true or false")
    return value


def _parsed(text: str) -> Any:
    """A value of the header, where all are strings, as it was written: by JSON or by Python's str."""
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        return strict_json(text)
    except ValueError:
        return text
