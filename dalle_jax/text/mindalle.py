"""The text tokenizer of minDALL-E: character BPE of lower-case words, whose last piece is marked."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dalle_jax.text.published import PublishedTokenizer, bpe, library, read_bpe

VOCAB, MERGES = "bpe-16k-vocab.json", "bpe-16k-merges.txt"
UNKNOWN, PAD, WORD_END = "[UNK]", "[PAD]", "</w>"  # kakaobrain's dalle/models/tokenizer.py; the package's default


class MinDALLETokenizer(PublishedTokenizer):
    """`tokenizers.CharBPETokenizer` as minDALL-E sets it up; see `PublishedTokenizer`.

    Words end at spaces and punctuation; Chinese characters are words of their own. `pad` is the entry [PAD], which is
    added behind the others if they have none.
    """

    family = "mindalle"

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        vocab = content["vocab"]
        if UNKNOWN not in vocab:
            raise ValueError(f"there is no entry {UNKNOWN}")
        self._bpe = bpe(vocab, content["merges"], unk_token=UNKNOWN, end_of_word_suffix=WORD_END)
        self._bpe.add_special_tokens([UNKNOWN, PAD])  # a caption that spells one gets it, as in the original
        self.pad = self._bpe.token_to_id(PAD)
        self.vocab_size = 1 + max(self._bpe.get_vocab().values())
        normalizers = library().normalizers
        self._bpe.normalizer = normalizers.Sequence(
            [normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()]
        )
        self._bpe.pre_tokenizer = library().pre_tokenizers.BertPreTokenizer()

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "MinDALLETokenizer":
        """Read bpe-16k-vocab.json and bpe-16k-merges.txt, which lie in the folder `tokenizer` of minDALL-E's archive.

        Raises:
          UserError: they are not there, or not such files.
        """
        vocab = pathlib.Path(folder) / VOCAB
        return cls._made_of(vocab, read_bpe(vocab, pathlib.Path(folder) / MERGES, cls.family))

    def _ids(self, caption: str) -> list[int]:
        return self._bpe.encode(caption).ids
