"""Captions to text tokens: normalization and a sentencepiece BPE vocabulary with byte fallback and BPE dropout.

The vocabulary is one unknown piece, 256 byte pieces, then merges and characters. It has no start, end or padding piece,
because those belong to the layout. Every caption has an encoding: a character that is not in the vocabulary is spelled
in UTF-8 bytes.
"""

import collections
import functools
import hashlib
import io
import itertools
import logging
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable

import numpy as np
import sentencepiece

from dalle_jax import files
from dalle_jax.errors import UserError

FILE_NAME = "tokenizer.model"
RESERVED = 1 + 256  # the unknown piece and the byte pieces
SPACE = "\u2581"  # sentencepiece's character for a space; in a caption it counts as a space
MAX_WORD = 256  # characters; dropout merges a longer word in parts, because its cost grows with the square
CACHED_WORDS = 1 << 16  # words whose merges without dropout are cached
KEPT_FORMAT_CHARACTERS = "\u200c\u200d"  # joiners: they build emoji and spell Persian and Indic words

_log = logging.getLogger(__name__)


def normalize(caption: str) -> str:
    """The caption as the tokenizer reads it: lower-case NFKC, single spaces, no control characters. Idempotent."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).lower()).replace(SPACE, " ")
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(c for c in text if _is_text(c))
    return unicodedata.normalize("NFKC", " ".join(text.split()))


def _is_text(character: str) -> bool:
    """Whether a character is none of control character, lone surrogate and invisible formatting mark."""
    return character in KEPT_FORMAT_CHARACTERS or unicodedata.category(character) not in ("Cc", "Cs", "Cf")


class BPETokenizer:
    """A trained vocabulary; immutable, thread-safe, picklable.

    Attributes:
      vocab_size: number of pieces; ids are 0 .. vocab_size - 1.
      longest_piece: the most characters that one token stands for.
      digest: SHA-256 (hex) of the model file, which tells two vocabularies apart.
    """

    def __init__(self, model: bytes):
        """model: the content of a sentencepiece BPE model file; `load` and `train` are the usual constructors."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.digest = hashlib.sha256(model).hexdigest()
        self._id_of_byte, self._id_of_piece = {}, {}
        for i in range(self.vocab_size):
            if self._processor.is_byte(i):
                self._id_of_byte[int(self._processor.id_to_piece(i)[1:-1], 16)] = i
            elif not self._processor.is_unknown(i) and not self._processor.is_control(i):
                self._id_of_piece[self._processor.id_to_piece(i)] = i
        self.longest_piece = max(map(len, self._id_of_piece))
        self._rank = {piece: -self._processor.get_score(i) for piece, i in self._id_of_piece.items()}
        self._merged = functools.lru_cache(maxsize=CACHED_WORDS)(self._merge_whole)

    def __reduce__(self):
        return BPETokenizer, (self._model,)

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int) -> "BPETokenizer":
        """Learn a vocabulary of `vocab_size` entries, or fewer if the captions hold no more.

        The captions are read once. Only their different words are kept, with how often each comes: pieces never cross
        a space, so nothing else counts.

        Raises:
          UserError: no captions with any text, or a size too small for the byte pieces.
        """
        words: collections.Counter[str] = collections.Counter()
        for caption in captions:
            words.update(normalize(caption).split())
        if not words:
            raise UserError("expected captions to train a tokenizer on, got none with any text: check the source")
        if vocab_size < RESERVED + 16:
            raise UserError(
                f"expected a vocabulary of at least {RESERVED + 16} entries (256 are bytes), got {vocab_size}"
            )
        rare = _rare_characters(words, room=(vocab_size - RESERVED) // 2)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(f"{word.translate(rare)}\t{count}" for word, count in words.items()),
                input_format="tsv",
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                byte_fallback=True,
                normalization_rule_name="identity",
                max_sentence_length=1 << 20,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,  # another number changes no piece, but the file and so the digest
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"sentencepiece could not learn {vocab_size} entries from these captions: {error}"
            ) from error
        tokenizer = cls(model.getvalue())
        if tokenizer.vocab_size < vocab_size:
            _log.warning(
                "the captions hold only %d distinct pieces, so the vocabulary has %d entries instead of %d",
                tokenizer.vocab_size - RESERVED,
                tokenizer.vocab_size,
                vocab_size,
            )
        return tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPETokenizer":
        """Read a model file, or `tokenizer.model` of a folder.

        Raises:
          UserError: nothing there, or not a BPE model with byte pieces and without start, end and padding pieces.
        """
        path = _file(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(f"expected a tokenizer at {path}, got {error.strerror}: train one first") from error
        try:
            tokenizer = cls(model)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"expected a sentencepiece model at {path}, got something else: train it again") from error
        processor = tokenizer._processor
        if len(tokenizer._id_of_byte) != 256 or max(processor.bos_id(), processor.eos_id(), processor.pad_id()) >= 0:
            raise UserError(
                f"expected a tokenizer with byte pieces and without start, end and padding pieces at {path}: "
                "train it with this program"
            )
        return tokenizer

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Write the model to a file, or as `tokenizer.model` into a folder; returns the file."""
        path = _file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, self._model)
        return path

    def encode(self, caption: str, *, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """Token ids of a caption, which is normalized first.

        dropout: probability of skipping a possible merge, at every merge step (Provilkov et al. 2019), so that the same
        caption has many encodings; all choices come from `rng`.
        """
        text = normalize(caption)
        if dropout == 0.0:
            return self._processor.encode(text)
        if rng is None or not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout {dropout} must be in [0, 1] and needs a random generator")
        return self._merge_with_dropout(text, dropout, rng)

    def decode(self, ids: Iterable[int]) -> str:
        """The normalized caption of these ids; bytes that are not UTF-8 become the replacement character."""
        return self._processor.decode([int(i) for i in ids])

    def _merge_with_dropout(self, text: str, dropout: float, rng: np.random.Generator) -> list[int]:
        ids, choices = [], _Dropout(dropout, rng)
        for word in text.split(" ") if text else []:
            word = SPACE + word
            for start in range(0, len(word), MAX_WORD):
                part = word[start : start + MAX_WORD]
                merges, whole = self._merged(part)
                if choices.kept >= merges:  # no merge of this word is skipped
                    choices.kept -= merges
                    ids += whole
                else:
                    ids += self._ids(self._merge_word(part, choices.keeps))
        return ids

    def _merge_whole(self, word: str) -> tuple[int, tuple[int, ...]]:
        """The number of merges of a word if none is skipped, and its ids."""
        pieces = self._merge_word(word, lambda: True)
        return len(word) - len(pieces), tuple(self._ids(pieces))

    def _ids(self, pieces: list[str]) -> list[int]:
        ids = []
        for piece in pieces:
            if piece in self._id_of_piece:
                ids.append(self._id_of_piece[piece])
            else:
                ids.extend(self._id_of_byte[byte] for byte in piece.encode())
        return ids

    def _merge_word(self, word: str, keeps: Callable[[], bool]) -> list[str]:
        """Greedy BPE of one word, as pieces never cross a space: at each step the best merge that `keeps` accepts,
        until none is left. `keeps` is not called for the merges after that one: nothing depends on their answers."""
        pieces = list(word)
        ranks = [self._rank.get(left + right) for left, right in itertools.pairwise(pieces)]
        while True:
            merges = sorted((rank, i) for i, rank in enumerate(ranks) if rank is not None)
            i = next((i for _, i in merges if keeps()), None)
            if i is None:
                return pieces
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
            del ranks[i]
            for left in (i - 1, i):  # only the merged piece has new neighbours
                if 0 <= left < len(ranks):
                    ranks[left] = self._rank.get(pieces[left] + pieces[left + 1])


class _Dropout:
    """Random choices that keep each merge with probability 1 - dropout, made with one draw per skipped merge.

    kept: merges that will be kept before the next one is skipped.
    """

    def __init__(self, dropout: float, rng: np.random.Generator):
        self._dropout, self._rng = dropout, rng
        self.kept = int(rng.geometric(dropout)) - 1

    def keeps(self) -> bool:
        if self.kept:
            self.kept -= 1
            return True
        self.kept = int(self._rng.geometric(self._dropout)) - 1
        return False


def _file(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    return path if path.suffix == ".model" else path / FILE_NAME


def _rare_characters(words: collections.Counter[str], *, room: int) -> dict[int, str]:
    """A translation of all but the `room` most frequent characters to spaces: they are spelled in bytes instead."""
    counts: collections.Counter[str] = collections.Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return {ord(character): " " for character, _ in counts.most_common()[room:]}
