"""Text states: prompt cleaning, tokenizers and the UMT5 encoder."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfengine.config import TextConfig
from rfengine.files import read_text
from rfengine.host_state import own_state
from rfengine.models.layered_text import bring_by_layers

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as TokenizerFile

logger = logging.getLogger(__name__)

PAD_ID = 0
EOS_ID = 1
UNKNOWN_ID = 2
_SPECIAL_TOKENS = {"<pad>": PAD_ID, "</s>": EOS_ID, "<unk>": UNKNOWN_ID}
_QUOTED_WORDS = 6  # of the dropped text, in a warning
_QUOTED_CHARACTERS = 60
_QUOTED_REASON = 200  # characters of another library's error
_MOST_TOKENIZER_BYTES = 64 << 20  # that of umt5-xxl has 17 MB
# transformers loads a class lazily, and a second thread that asks meanwhile gets an ImportError
_one_import_at_a_time = Lock()
_SAMPLE_TEXT = "a \u00fc\u4f60 \U0001f600 1"  # tried once, so that a damaged file is seen before a prompt


def clean_text(text: str) -> str:
    """The prompt in the form that the published model was trained on.

    Broken encodings are repaired, HTML entities unescaped twice, every run of whitespace becomes one space,
    the ends are stripped. Not idempotent (a thrice escaped entity changes again): clean a prompt once.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class Tokenizer:
    """Turns cleaned text into token ids; a subclass splits one text."""

    def encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask of `texts`, each [B, length] int64: content, EOS, then padding, where the mask is 0.

        A text of more than `length` tokens, EOS counted, loses its end but keeps EOS; a warning says where.
        Raises ValueError for a blank text, no text at all, or a length below 1.
        """
        if length < 1:
            raise ValueError(f"length is {length}; EOS alone needs 1 token")
        if not texts:
            raise ValueError("there are 0 prompts to tokenize; give at least one")
        ids = torch.full((len(texts), length), PAD_ID, dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"prompt {row} is empty once cleaned; give it at least one word")
            content = self._split(text)
            if len(content) >= length:
                dropped = self._remainder(text, length - 1)
                _warn_of_cut(row, len(content) + 1, length, dropped)
            tokens = [*content[: length - 1], EOS_ID]
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
            mask[row, : len(tokens)] = 1
        return ids, mask

    def _split(self, text: str) -> list[int]:
        """Ids of the whole text, without EOS."""
        raise NotImplementedError

    def _remainder(self, text: str, kept: int) -> str:
        """The text after its first `kept` tokens."""
        raise NotImplementedError


def _warn_of_cut(row: int, tokens: int, limit: int, dropped: str) -> None:
    words = dropped.split()
    quoted = " ".join(words[:_QUOTED_WORDS])[:_QUOTED_CHARACTERS]
    quoted += " ..." if len(quoted) < len(" ".join(words)) else ""
    logger.warning(
        "prompt %d has %d tokens and the limit is %d; everything from %r on was dropped, shorten the prompt",
        row, tokens, limit, quoted,
    )  # fmt: skip


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, above the three special ids; needs no file."""

    vocab_size = 256 + len(_SPECIAL_TOKENS)

    def _split(self, text: str) -> list[int]:
        return [byte + len(_SPECIAL_TOKENS) for byte in text.encode("utf-8")]

    def _remainder(self, text: str, kept: int) -> str:
        return text.encode("utf-8")[kept:].decode("utf-8", errors="ignore")


class SentencePieceTokenizer(Tokenizer):
    """The UMT5 vocabulary from the `tokenizer.json` of a local directory; nothing is ever downloaded.

    The file is run as written. The T5 class that AutoTokenizer picks for it in transformers 5 rebuilds the
    pipeline from the vocabulary alone and loses byte fallback: rare characters would become <unk>.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises ValueError when the directory or its tokenizer.json is missing, damaged or not UMT5's."""
        path = Path(directory) / "tokenizer.json"
        if not path.parent.is_dir():
            raise ValueError(f"tokenizer directory {path.parent} does not exist; give that of umt5-xxl")
        if not os.path.lexists(path):
            raise ValueError(f"{path} does not exist; copy tokenizer.json of umt5-xxl into that directory")
        self._path = path
        self._file = _read_tokenizer(path)
        for token, expected in _SPECIAL_TOKENS.items():
            found = self._file.token_to_id(token)
            if found != expected:
                raise ValueError(f"{path} gives {token} id {found}, not {expected}; use the file of umt5-xxl")
        self.vocab_size = max(self._file.get_vocab().values()) + 1
        self._split(_SAMPLE_TEXT)

    def _split(self, text: str) -> list[int]:
        return self._encoded(text).ids

    def _remainder(self, text: str, kept: int) -> str:
        start, _ = self._encoded(text).offsets[kept]
        return text[start:]

    def _encoded(self, text: str) -> Encoding:
        with _named_failures(self._path):
            return self._file.encode(text, add_special_tokens=False)


def _read_tokenizer(path: Path) -> TokenizerFile:
    from tokenizers import Tokenizer as TokenizerFile

    text = read_text(path, _MOST_TOKENIZER_BYTES)
    with _named_failures(path):
        file = TokenizerFile.from_str(text)
        file.no_truncation()
        file.no_padding()
    return file


@contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """Turn the exceptions of the tokenizers library for a damaged file into a ValueError that names the file.

    It raises plain Exceptions, and a BaseException where its Rust code panics.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_QUOTED_REASON]
        raise ValueError(
            f"{path} is damaged or no tokenizer ({reason}); get tokenizer.json of umt5-xxl again"
        ) from error


def build_umt5(config: TextConfig) -> nn.Module:
    """A UMT5EncoderModel of the given shape, in eval mode, with random weights and transformers' names.

    Built inside `torch.device("meta")` it takes no memory and needs its weights loaded. Attention is eager:
    scores in the model's dtype, its finite minimum at masked keys, softmax in float32.
    """
    with _one_import_at_a_time:
        from transformers import UMT5Config, UMT5EncoderModel

    umt5_config = UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.attention_dim // config.num_heads,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=float(config.eps),  # transformers refuses 1 for 1.0
        feed_forward_proj="gated-gelu",  # transformers reads this as the tanh form
        dropout_rate=0.0,
        attn_implementation="eager",
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
    )
    return UMT5EncoderModel(umt5_config).eval()


class StateCache(Protocol):
    """Keeps the valid rows [n, dim] of the text states of a cleaned prompt (checkpoint/text_states.py)."""

    def load(self, text: str, length: int, dtype: torch.dtype) -> Tensor | None:
        """The `length` rows of `text`, or None where they have to be computed."""

    def store(self, text: str, states: Tensor) -> None: ...


class TextEncoder:
    """Prompts to text states [B, text_len, dim]; rows at and after a prompt's true length are exactly 0.

    `model` is a UMT5EncoderModel, or a function that builds one, called at the first prompt that `cache` does
    not hold. It is moved to `device` and `dtype` in place and stays there, whatever device `encode` returns
    on. In float16 the last projection of each feed-forward stays in float32, and with it the residual stream.
    by_layers: the weights are in host memory, and its layers come to `device` one by one (layered_text.py).
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        tokenizer: Tokenizer,
        text_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        cache: StateCache | None = None,
        by_layers: bool = False,
    ) -> None:
        self.by_layers = by_layers
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.device = torch.device(device)
        self.dtype = dtype
        self._model = self._placed(model) if isinstance(model, nn.Module) else None
        self._build_model = model
        self._cache = cache

    @own_state()
    def encode(
        self, prompts: list[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Text states [B, text_len, dim] of `prompts`, on `device`, in `dtype`: by default the encoder's.

        Each prompt goes through the encoder alone, so its states depend neither on the others nor on a cache.
        Raises ValueError for a single string, no prompt, or a prompt that is empty once cleaned.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts[:40]!r}; put it into a list")
        texts = [clean_text(prompt) for prompt in prompts]
        ids, mask = self.tokenizer.encode(texts, self.text_len)
        device = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        states: dict[str, Tensor] = {}
        for row, text in enumerate(texts):
            if text not in states:
                found = self._states(text, ids[row : row + 1], mask[row : row + 1])
                padded = functional.pad(found, (0, 0, 0, self.text_len - found.shape[0]))
                states[text] = padded.to(device=device, dtype=dtype)
        return torch.stack([states[text] for text in texts])

    @own_state()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text states [B, L, dim] of token ids and mask [B, L], on the encoder's device and in its dtype.

        The encoder runs only on the columns up to the longest prompt; padding is masked, so valid rows do not
        change. Raises ValueError unless every mask row is a run of ones followed by zeros.
        """
        if ids.shape != mask.shape or ids.ndim != 2:
            raise ValueError(f"ids are {list(ids.shape)}, mask is {list(mask.shape)}; both must be [B, L]")
        valid = mask.to(self.device) > 0
        lengths = valid.sum(dim=1)
        columns = torch.arange(ids.shape[1], dtype=torch.int64, device=self.device)
        if not torch.equal(valid, columns < lengths[:, None]) or not bool(lengths.all()):
            raise ValueError("a row of mask is not a run of ones followed by zeros; pad on the right only")
        longest = int(lengths.max())
        ids, valid = ids.to(self.device)[:, :longest], valid[:, :longest]
        states = self._loaded_model()(input_ids=ids, attention_mask=valid.to(torch.int64)).last_hidden_state
        states = states.to(self.dtype).masked_fill(~valid[:, :, None], 0)
        return functional.pad(states, (0, 0, 0, columns.numel() - longest))

    def _states(self, text: str, ids: Tensor, mask: Tensor) -> Tensor:
        """Valid rows [n, dim] of one prompt, from the cache if they are there."""
        length = int(mask.sum())
        states = None if self._cache is None else self._cache.load(text, length, self.dtype)
        if states is None:
            states = self.encode_ids(ids, mask)[0, :length]
            if self._cache is not None:
                self._cache.store(text, states)
        return states

    def _loaded_model(self) -> nn.Module:
        if self._model is None:
            self._model = self._placed(self._build_model())
        return self._model

    def _placed(self, model: nn.Module) -> nn.Module:
        if not self.by_layers:
            return _place(model, self.device, self.dtype)
        return bring_by_layers(_place(model, torch.device("cpu"), self.dtype), self.device)


def _place(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move `model` to device and dtype in place, tied weights staying tied; float16 keeps `wo` in float32."""
    with _one_import_at_a_time:
        from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise RuntimeError(f"{name} of the text encoder has no values; load its weights before use")
        keep = dtype == torch.float16 and name.endswith(".wo.weight")
        own = parameter.dtype if not parameter.is_floating_point() else torch.float32 if keep else dtype
        parameter.data = parameter.data.to(device=device, dtype=own)
    return model.eval()
