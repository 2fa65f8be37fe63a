"""CLIP's own tokenizer gives the ids of the slow tokenizer of the package transformers.

The golden file holds a small generated vocabulary, captions and the ids that transformers 4 made of them (with ftfy, as
the released preprocessing has it); it was written by `python -m tests.text.test_clip_tokenizer` and may change only
with the captions chosen here. With transformers before version 5 installed, which dropped its slow tokenizers, the same
comparison runs live.
"""

import json
import pathlib
import pickle
import random

import pytest

from dalle_jax.errors import UserError
from dalle_jax.text import clip, load_tokenizer
from dalle_jax.text.clip import MERGES, VOCAB, CLIPTokenizer
from tests.support import GOLDEN
from tests.support.clip_vocabulary import WORDS, generated, write_merge_list, write_vocab

GOLDEN_FILE = GOLDEN / "clip_tokenizer.json"
CAPTIONS = [
    "a photo of the red circle",
    "A Red  circle\tabove\n a BLUE square.",
    "It's don't WE'LL they're I've i'm he'd 'twas rock'n'roll ''s",
    "2024 12345 1st ½ ⅷ ٣٤",
    "naïve café e\u0301 ÜBER straße İstanbul",
    "日本語の文 слово مرحبا हिन्दी",
    "🎨 👩‍👩‍👧 🇩🇪 ❤️!!",
    "!!! ... --- #hash @user a_b-c/d\\e (x) [y] {z}",
    "&amp; &lt;b&gt; rock &amp; roll",
    "‘curly’ “quotes” — dash… ﬁne ﬂat",
    "\u00a0no\u2003break\u200bspace\ufeff",
    "sÃ©ance mojibake â€” mended",
    "",
    "   ",
    "x" * 300,
    "a\x00b\x07c \ufffd",
    "word</w> <w> w</w>",
]


def slow_tokenizer(folder):
    why = "the comparison takes its slow tokenizer: pip install 'transformers<5' ftfy"
    transformers = pytest.importorskip("transformers", reason=why)
    if int(transformers.__version__.partition(".")[0]) >= 5:
        pytest.skip(f"{why}, got {transformers.__version__}")
    return transformers.CLIPTokenizer(str(folder / VOCAB), str(folder / MERGES))


def slow_ids(tokenizer, caption):
    """Without the marks."""
    return tokenizer(caption)["input_ids"][1:-1]


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))


def test_ids_are_those_of_the_golden_file(golden, tmp_path):
    merges = [tuple(pair) for pair in golden["merges"]]
    assert merges == generated()
    tokenizer = CLIPTokenizer.load(write_merge_list(tmp_path / "bpe.txt.gz", merges))
    assert tokenizer.vocab_size == 512 + len(merges)
    assert [item["caption"] for item in golden["captions"]] == CAPTIONS
    for item in golden["captions"]:
        assert tokenizer.encode(item["caption"]) == item["ids"], item["caption"]


def test_the_slow_tokenizer_agrees_on_many_strings(golden, tmp_path):
    merges = [tuple(pair) for pair in golden["merges"]]
    folder = write_vocab(tmp_path / "vocab", merges)
    slow, ours = slow_tokenizer(folder), CLIPTokenizer.load(folder)
    for item in golden["captions"]:
        assert slow_ids(slow, item["caption"]) == item["ids"]
    rng = random.Random(0)
    marks = ["  ", "\n", "'", "'s", "7", "½", "é", "日", "🎨", "!", "?!", "-", "ß", "А", "\u00a0", "ﬁ", "<", "É"]
    parts = [*WORDS, *marks]
    for _ in range(2_000):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(12)))
        assert ours.encode(text) == slow_ids(slow, text), text


def test_every_form_of_the_vocabulary_is_the_same_tokenizer(tmp_path):
    merges = generated()
    one = CLIPTokenizer.load(write_merge_list(tmp_path / "bpe.txt.gz", merges))
    two = CLIPTokenizer.load(write_vocab(tmp_path / "vocab", merges))
    three = load_tokenizer(one.save(tmp_path / "saved").parent)
    four = pickle.loads(pickle.dumps(one))
    assert len({t.digest for t in (one, two, three, four)}) == 1
    assert len({tuple(t.encode("It's a red circle")) for t in (one, two, three, four)}) == 1


def test_the_merge_list_ends_where_the_released_vocabulary_does(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "MAX_MERGES", 5)
    path = write_merge_list(tmp_path / "bpe.txt.gz", generated())
    assert CLIPTokenizer.load(path).vocab_size == 512 + 5


def test_text_is_cleaned_as_published():
    assert clip.clean("  A &amp;amp; B\n\nÇ ") == "a & b ç"


@pytest.mark.parametrize("entity", ["&#" + "1" * 9_000 + ";", "&amp;#" + "1" * 9_000])
def test_an_entity_of_too_many_digits_is_no_error(entity):
    assert clip.clean(f"a {entity} b").startswith("a \ufffd")


def test_a_mark_in_a_caption_is_text(tmp_path):
    tokenizer = CLIPTokenizer.load(write_merge_list(tmp_path / "bpe.txt.gz", generated()))
    ids = tokenizer.encode("red <|endoftext|> circle")
    assert max(ids) < tokenizer.vocab_size and len(ids) > 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / VOCAB).unlink(), "got No such file"),
        (lambda f: (f / VOCAB).write_text("{"), "another file"),
        (lambda f: (f / VOCAB).write_text("[]"), "another file"),
        (lambda f: (f / VOCAB).write_text('{"a": 0}'), "the last two entries"),
        (lambda f: (f / MERGES).write_text("#version\na b c\n"), "two entries"),
        (lambda f: (f / MERGES).write_text("q x</w>\n"), "not in the vocabulary"),
        (lambda f: (f / VOCAB).write_text((f / VOCAB).read_text().replace('"a"', '"other"')), "1 of the 512 .*, 'a'"),
    ],
)
def test_other_files_are_refused(tmp_path, damage, message):
    folder = write_vocab(tmp_path / "vocab", generated())
    damage(folder)
    with pytest.raises(UserError, match=message):
        CLIPTokenizer.load(folder)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="bpe_simple_vocab_16e6"):
        CLIPTokenizer.load(tmp_path / "nothing.txt.gz")
    (tmp_path / "binary.gz").write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(UserError):
        CLIPTokenizer.load(tmp_path / "binary.gz")


if __name__ == "__main__":
    import tempfile

    merges = generated()
    slow = slow_tokenizer(write_vocab(pathlib.Path(tempfile.mkdtemp()), merges))
    captions = [{"caption": caption, "ids": slow_ids(slow, caption)} for caption in CAPTIONS]
    GOLDEN_FILE.write_text(json.dumps({"merges": merges, "captions": captions}, indent=0) + "\n", encoding="utf-8")
    print(GOLDEN_FILE, GOLDEN_FILE.stat().st_size, "bytes")
