"""The tokenizer: every caption encodes and comes back, dropout included, reproducibly and on several threads."""

import argparse
import collections
import concurrent.futures
import io
import pickle
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece

from dalle_jax.cli import tokenizer as train_tokenizer
from dalle_jax.data.record import Dropped, Record
from dalle_jax.errors import UserError
from dalle_jax.text import load_tokenizer
from dalle_jax.text.bpe import RESERVED, BPETokenizer, normalize

TRAINING = [f"a {size} {colour} {shape} on the {place}" for size in ("small", "large", "tiny", "über-large")
            for colour in ("red", "green", "blue", "crème") for shape in ("circle", "square", "star 🙂", "사과")
            for place in ("left", "right", "table")]  # fmt: skip
CAPTIONS = [
    *TRAINING[::17],
    "",
    "A RED CIRCLE",
    "unseenwords andmorecircles, squares; tables!",
    "漢字とかな 混じり",
    "emoji 🙂🙃 👩‍👩‍👧 🏳️‍🌈",
    "<0x41> <unk> <s> </s>",
    "tabs\tand\nnew lines \u2028 \u00a0 wide\u3000space",
    "under▁score ▁▁",
    "ﬁ ligature, Ⅷ roman, İstanbul, ΣΊΣΥΦΟΣ, ẞ",
    "nul\x00 bell\x07 lone\ud800surrogate \ufeffbom",
    "aaaaaaaa" * 20,
]


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(TRAINING, vocab_size=340)


def test_normalize():
    assert normalize("  A Red\tAPPLE \n") == "a red apple"
    assert normalize("ﬁne Ⅷ") == "fine viii"
    assert normalize("a\x00b\x1b\ud800\u00ad") == "ab"
    assert normalize("x\u2581y") == "x y"
    assert normalize("👩\u200d👩") == "👩\u200d👩"


def test_normalize_is_idempotent_for_every_character():
    changed = [
        c for c in map(chr, range(0, sys.maxunicode, 3)) if normalize(normalize(f"x{c}y")) != normalize(f"x{c}y")
    ]
    assert not changed


def test_normalized_text_has_no_control_characters():
    text = normalize("".join(map(chr, range(0x3000))))
    assert not {unicodedata.category(c) for c in text} & {"Cc", "Cs"}


@pytest.mark.parametrize("caption", [*CAPTIONS, "circle" * 100 + "漢🙂" * 50], ids=ascii)
def test_every_caption_comes_back(tokenizer, caption):
    rng = np.random.default_rng(0)
    for dropout in (0.0, 0.1, 0.5, 1.0):
        ids = tokenizer.encode(caption, dropout=dropout, rng=rng)
        assert all(isinstance(i, int) and 0 < i < tokenizer.vocab_size for i in ids)  # 0 is the unknown piece
        assert tokenizer.decode(ids) == normalize(caption)
        assert tokenizer.longest_piece * len(ids) >= len(normalize(caption))


def test_merging_without_dropout_is_sentencepiece(tokenizer):
    """The smallest dropout above zero never skips a merge here, so our procedure must choose sentencepiece's pieces."""
    rng = np.random.default_rng(0)
    words = " ".join(TRAINING).split() + ["xyz", "漢", "🙃"]
    random_captions = [
        " ".join(rng.choice(words, size=6)) + "".join(rng.choice(list("abcdelrst "), 12)) for _ in range(300)
    ]
    for caption in [*CAPTIONS, *TRAINING, *random_captions]:
        assert tokenizer.encode(caption, dropout=1e-300, rng=rng) == tokenizer.encode(caption)


def test_full_dropout_leaves_characters(tokenizer):
    ids = tokenizer.encode("red star", dropout=1.0, rng=np.random.default_rng(0))
    assert [tokenizer.decode([i]) for i in ids] == ["", "r", "e", "d", "", "s", "t", "a", "r"]


def merged_by_definition(tokenizer, word, dropout, rng):
    """Provilkov et al. 2019, algorithm 1: at each step every possible merge is skipped with this probability."""
    pieces = list(word)
    while True:
        ranks = {i: tokenizer._rank.get(pieces[i] + pieces[i + 1]) for i in range(len(pieces) - 1)}
        kept = [(rank, i) for i, rank in ranks.items() if rank is not None and rng.random() >= dropout]
        if not kept:
            return pieces
        _, i = min(kept)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_has_the_distribution_of_its_definition(tokenizer, dropout):
    """Every way to cut two words comes as often as by the definition, which draws for every merge at every step."""
    draws, rng = 4000, np.random.default_rng(0)
    ours, wanted = collections.Counter(), collections.Counter()
    for _ in range(draws):
        ours[tuple(tokenizer.encode("green star", dropout=dropout, rng=rng))] += 1
        words = [merged_by_definition(tokenizer, word, dropout, rng) for word in ("\u2581green", "\u2581star")]
        wanted[tuple(tokenizer._ids([piece for word in words for piece in word]))] += 1
    assert len(wanted) > 5
    for ids in {**ours, **wanted}:
        share = (ours[ids] + wanted[ids]) / (2 * draws)
        error = (2 * share * (1 - share) / draws) ** 0.5  # of the difference of two shares
        assert abs(ours[ids] - wanted[ids]) / draws < 5 * error, ids


def test_threads_do_not_disturb_each_other(tokenizer):
    def encode(seed):
        return tokenizer.encode(CAPTIONS[seed % len(CAPTIONS)], dropout=0.2, rng=np.random.default_rng(seed))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, range(400))) == [encode(seed) for seed in range(400)]


def test_dropout_needs_a_generator(tokenizer):
    with pytest.raises(ValueError, match="random generator"):
        tokenizer.encode("a", dropout=0.1)


def test_too_few_captions_make_a_smaller_vocabulary(caplog):
    small = BPETokenizer.train(["a red apple", "a blue circle"], vocab_size=16_384)
    assert RESERVED < small.vocab_size < 400
    assert f"{small.vocab_size} entries instead of 16384" in caplog.text


@pytest.mark.parametrize("vocab_size", [300, 330, 400])
def test_words_and_their_counts_teach_what_whole_captions_teach(vocab_size):
    """The pieces are those that sentencepiece learns from the lines, with as many of its threads as you like."""
    captions = [*TRAINING, *CAPTIONS[:9], CAPTIONS[10]]
    ours = BPETokenizer.train(captions, vocab_size=vocab_size)
    lines = [normalize(caption) for caption in captions if normalize(caption)]
    counts = collections.Counter(letter for line in lines for letter in line if letter != " ")
    rare = {letter for letter, _ in counts.most_common()[(vocab_size - RESERVED) // 2 :]}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=("".join(" " if letter in rare else letter for letter in line) for line in lines),
        model_writer=model, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0,
        byte_fallback=True, normalization_rule_name="identity", unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
        num_threads=4, minloglevel=2,
    )  # fmt: skip
    wanted = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert [wanted.id_to_piece(i) for i in range(wanted.vocab_size())] == [
        ours._processor.id_to_piece(i) for i in range(ours.vocab_size)
    ]


def test_more_characters_than_room_become_bytes():
    ideographs = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    small = BPETokenizer.train([ideographs, "a red apple"], vocab_size=300)
    assert small.vocab_size <= 300
    assert small.decode(small.encode(ideographs)) == ideographs


@pytest.mark.parametrize(("captions", "vocab_size"), [([], 400), (["", " \x00"], 400), (["a red apple"], 256)])
def test_training_refuses(captions, vocab_size):
    with pytest.raises(UserError, match="expected"):
        BPETokenizer.train(captions, vocab_size=vocab_size)


def test_save_load_pickle(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "run")
    assert path == tmp_path / "run" / "tokenizer.model"
    for again in (load_tokenizer(tmp_path / "run"), load_tokenizer(path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.digest == tokenizer.digest
        assert again.encode(CAPTIONS[3]) == tokenizer.encode(CAPTIONS[3])
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.model"]


def test_load_refuses(tmp_path):
    with pytest.raises(UserError, match="train one first"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="expected a sentencepiece model"):
        load_tokenizer(tmp_path)
    with open(tmp_path / "foreign.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TRAINING), model_writer=file, model_type="bpe", vocab_size=60, minloglevel=2
        )
    with pytest.raises(UserError, match="byte pieces"):
        load_tokenizer(tmp_path / "foreign.model")


def test_command_trains_on_every_caption_and_describes(monkeypatch, tmp_path, capsys):
    pixel = np.zeros((1, 1, 3), np.uint8)
    slots = [
        Record("a", pixel, tuple(TRAINING[:90])),
        Dropped("b", "no image"),
        Record("c", pixel, tuple(TRAINING[90:])),
    ]
    monkeypatch.setattr(train_tokenizer, "open_source", lambda spec, *, pictures_required: {"folder:x": slots}[spec])
    parser = argparse.ArgumentParser()
    train_tokenizer.add_arguments(parser)
    args = parser.parse_args(["folder:x", "--vocab-size", "340", "--out", str(tmp_path / "new")])
    assert train_tokenizer.main(args) == 0
    tokenizer = load_tokenizer(tmp_path / "new")
    assert tokenizer.digest == BPETokenizer.train(TRAINING, vocab_size=340).digest
    line = capsys.readouterr().out
    assert "340 pieces, tokens per caption mean 9" in line and tokenizer.digest[:12] in line
    assert line.endswith(f"of {len(TRAINING)} captions in 3 of 3 records\n")
    monkeypatch.setattr(train_tokenizer, "DESCRIBED", 1)  # every third caption, and at least one
    args.limit, args.out = 2, tmp_path / "ends"
    assert train_tokenizer.main(args) == 0
    assert "in 2 of 3 records" in capsys.readouterr().out
    assert load_tokenizer(args.out).digest == tokenizer.digest, "the first record and the last, where all captions are"

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a folder"):
        train_tokenizer.main(
            parser.parse_args(["folder:x", "--vocab-size", "340", "--out", str(tmp_path / "file" / "x")])
        )
