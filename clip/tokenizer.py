"""Text to token ids, by the byte-pair encoding of OpenAI's CLIP (Radford et al. 2021, section 2.4).

A word is its UTF-8 bytes, the last of which is marked as an end. The pair of neighbours that comes
first in a list of merges becomes one token, wherever it stands in the word, until no pair is in the
list (Sennrich et al. 2016, algorithm 1). Ids 0 to 255 are bytes, 256 to 511 bytes at the end of a
word; then come the merges in their order, the start and the end token.
"""

import gzip
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import regex

from clip.config import MERGES
from maskgit.common import UserError

if TYPE_CHECKING:
    from torch import Tensor

ASSET = Path(__file__).parent / "assets" / "merges.txt.gz"  # see the licence file beside it
BYTES = 512  # ids before the first merge
WORDS = 65_536  # kept with their ids, by all tokenizers together
LONG = 64  # characters of a word that is too rare to be kept
START, END = "<|startoftext|>", "<|endoftext|>"

# As published: case is ignored although texts come in lower case, since that makes "ſ" an "s".
WORD = regex.compile(
    rf"{regex.escape(START)}|{regex.escape(END)}"
    r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


@dataclass(frozen=True)
class Tokenizer:
    """Texts to ids, padded to `context` tokens; only the first `merges` merges are used.

    `Tokenizer()` gives the ids of OpenAI's models for every text. Fewer merges mean a smaller
    vocabulary and more tokens a word. Raises UserError where a number is out of range.
    """

    merges: int = MERGES
    context: int = 77

    def __post_init__(self) -> None:
        if not 0 <= self.merges <= MERGES:
            raise UserError(f"merges={self.merges} is not from 0 to {MERGES}")
        if self.context < 3:
            raise UserError(f"context={self.context}: start, a word and end take 3")

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return BYTES + self.merges + 2

    @property
    def start(self) -> int:
        return BYTES + self.merges

    @property
    def end(self) -> int:
        return BYTES + self.merges + 1  # the largest id: text towers find it by argmax

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without start and end, however many there are.

        A start or end token that is spelt out in the text becomes that token, as in OpenAI's.
        """
        if not isinstance(text, str):
            raise UserError(f"a text must be a string, not {type(text).__name__}")
        ids: list[int] = []
        for word in WORD.findall(clean(text)):
            if word == START:
                ids.append(self.start)
            elif word == END:
                ids.append(self.end)
            elif len(word) > LONG:
                ids += merge(word, self.merges)
            else:
                ids += _kept(word, self.merges)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, a space after each word; start and end tokens are spelt out.

        Bytes that are no UTF-8, as those of a text that was cut off, become U+FFFD. Raises
        UserError for ids that are not in the vocabulary.
        """
        pieces, _ = _vocabulary()
        special = {self.start: START.encode(), self.end: END.encode()}
        found = []
        for i in map(int, ids):
            if not 0 <= i < self.vocabulary:
                raise UserError(f"token id {i} is not from 0 to {self.vocabulary - 1}")
            found.append(special.get(i) or pieces[i])
        return b"".join(found).decode(errors="replace")

    def __call__(self, texts: str | Sequence[str]) -> "Tensor":
        """One text or B of them -> (B, context) int64: start, ids, end, zeros.

        A text of more than context - 2 ids is cut (see `too_long`); the end token stays. Raises
        UserError where there is no text, or something else than texts.
        """
        import torch  # the rest of the module does without

        rows = []
        for ids in self._encode_all(texts):
            row = [self.start, *ids[: self.context - 2], self.end]
            rows.append(row + [0] * (self.context - len(row)))
        return torch.tensor(rows)

    def too_long(self, texts: str | Sequence[str]) -> list[bool]:
        """Which of the texts are cut when they are tokenized."""
        return [len(ids) > self.context - 2 for ids in self._encode_all(texts)]

    def _encode_all(self, texts: str | Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, Sequence) or isinstance(texts, bytes):
            kind = type(texts).__name__
            raise UserError(f"texts must be a string or a list of strings, not {kind}")
        if not texts:
            raise UserError("there is no text to tokenize: give a string or a list of strings")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{i}] must be a string, not {type(text).__name__}")
        return [self.encode(text) for text in texts]


def clean(text: str) -> str:
    """Repair wrongly decoded characters, resolve HTML entities twice, one space for any blanks,
    lower case: what CLIP does to a text before it looks for words."""
    # For printable ASCII, of which most captions are, ftfy and HTML change nothing but entities.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def merge(word: str, merges: int) -> tuple[int, ...]:
    """The ids of one word, by the first `merges` merges."""
    _, pairs = _vocabulary()
    first = _byte_ids()
    none = BYTES + merges  # from here on, a merge that there is not or that is not used
    ids = [first[byte] for byte in word.encode()]
    ids[-1] += 256
    made = [pairs.get(pair, none) for pair in pairwise(ids)]  # by each two neighbours
    while made and (best := min(made)) < none:  # merges come in the order of the ids they make
        i = made.index(best)
        ids[i : i + 2] = [best]
        del made[i]
        if i > 0:
            made[i - 1] = pairs.get((ids[i - 1], best), none)
        if i < len(made):
            made[i] = pairs.get((best, ids[i + 1]), none)
    return tuple(ids)


_kept = lru_cache(WORDS)(merge)


@cache
def _byte_ids() -> list[int]:
    """The id of each byte: first those that Latin-1 shows as a character, then the others."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = shown + sorted(set(range(256)) - set(shown))
    return sorted(range(256), key=order.__getitem__)


@cache
def _vocabulary() -> tuple[list[bytes], dict[tuple[int, int], int]]:
    """The text of every id, and the id that a pair of ids merges to.

    The file writes the byte of id i as its Latin-1 character, or, where that is none to be seen
    (i >= 188), as character 256 + i - 188; and the end of a word as "</w>".
    """
    pieces = [bytes([byte]) for byte in sorted(range(256), key=_byte_ids().__getitem__)]
    names = [piece.decode("latin-1") for piece in pieces[:188]] + [chr(256 + i) for i in range(68)]
    pieces += [piece + b" " for piece in pieces]
    names += [name + "</w>" for name in names]
    ids = {name: i for i, name in enumerate(names)}
    pairs = {}
    parts = gzip.decompress(ASSET.read_bytes()).decode().split()
    for left, right in zip(parts[::2], parts[1::2], strict=True):
        pair = ids[left], ids[right]
        pairs[pair] = ids[left + right] = len(pieces)
        pieces.append(pieces[pair[0]] + pieces[pair[1]])
    return pieces, pairs
