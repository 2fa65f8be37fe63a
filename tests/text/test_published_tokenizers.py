"""The text tokenizers of published models give the ids of their originals.

The golden file holds small vocabularies, captions and the ids that the originals made of them; it was written by
`python -m tests.text.test_published_tokenizers` and may change only with the captions chosen here, or with the names of
emoji in a new version of the package. With the originals installed the same comparison runs live on random captions.
"""

import json
import pathlib
import pickle
import random
import sys
import tempfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dalle_jax.data.pipeline import DataConfig, Prepare
from dalle_jax.data.record import Record
from dalle_jax.errors import UserError
from dalle_jax.layout import CaptionLayout, Layout
from dalle_jax.text import check_fits, clip, has_tokenizer, load_tokenizer
from dalle_jax.text.bart import DALLEMiniTokenizer, MinDalleTokenizer
from dalle_jax.text.bpe import BPETokenizer
from dalle_jax.text.malevich import MalevichTokenizer
from dalle_jax.text.mindalle import MinDALLETokenizer
from tests.support import GOLDEN, text_originals

GOLDEN_FILE = GOLDEN / "text_tokenizers.json"
ORIGINALS = {
    "mindalle": text_originals.mindalle,
    "malevich": text_originals.malevich,
    "dalle-mini": text_originals.dalle_mini,
    "min-dalle": text_originals.min_dalle,
}
TRAINING = [
    "a photo of the red cat above a blue square",
    "the cat and the dog sit on the table, it's late: don't wake them",
    "красная кошка и собака сидят на столе",
    "Кошка над синим квадратом",
    "日本の猫 naïve café über",
    "an armchair in the shape of an avocado, 2022, 3.5 by 7",
    "!!! ... --- aaaa (x) [y]",
]
WORDS = "the of and a in is s t to on my i love cat dog sun set sunset tok dot x no filter 2 20 2022 1 9".split()
PARTS = (
    "a |the cat|CAT| |  |\t|\n|\x0b|\x1c|\x85|\xa0|\u2003|\u2581|\u2028|#love|#lovemycat2022|#a_b|#no.filter|#9slash2|"
    "<person>|<PERSON>, and <person>|,|[1]|[12]|<b>|<|><|</s>|<s>|<mask>|<unk>|[UNK]|[PAD]|[pad]|http://x.y/z|1,234,567|"
    "3.5|u.s.a.|12/31/2022|it's|don't|'tis|we'll|’s|“|”|\"|``|a-b-c|-|--|%|&|/|$|*|_|\\|!!!!|aaaa|....|VIIII|1111111|🎨|"
    "👩‍👩‍👧|🇩🇪|❤️|кошка|КРАСНАЯ|日本|猫|é|Ü|İ|ß|ﬁ|½|&amp;|&lt;b&gt;|&amp;amp;|&#65;|\x00|\x07|\ufeff|\u200d|\ufffd|(x)|{y}|~|+|"
    "=|:smile:|;|?|' ' '|xtokxdotxtokx|ss|s|t|'s|'S|@user|^|Ġ|</w>|ÿ|𝒳|\U0010ffff|سلام"
).split("|")
CAPTIONS = [
    *TRAINING,
    "",
    "  \t\n ",
    "A  RED\tcat\non the Table",
    "#lovemycat2022 #sunset_love! #no.filter",
    "<person> and <person>, <person> love <person>'s dog",
    "[1] a cat http://example.org/a?b=c sat, 1,234,567 times on 12/31/2022 at 3.5 [23]",
    "he said \"don't\" — ‘we’ll’ ``see'' \"\" ''",
    "noooooo!!!!! ..... VIII IIII well-known a-b-c 50% off & more/less $5 *",
    "&amp;lt;b&gt; bold &lt;/b&gt; rock &amp; roll Ã©",
    "🎨 👩‍👩‍👧 🇩🇪 ❤️ cat🎨cat",
    "Кошка, 猫, 日本, سلام, é Ü İ ß ﬁ ½ 𝒳",
    "<s> </s> <pad> <unk> <mask> [UNK] [PAD] </w> Ġ",
    "nul\x00 bell\x07 bom\ufeff joiner\u200d \ufffd nbsp\xa0wide\u3000line\u2028sep\u2581sep\x1c",
]


def random_captions(count):
    rng = random.Random(0)
    for _ in range(count):
        if rng.random() < 0.2:
            ranges = ((32, 127), (0, 0x300), (0x400, 0x500), (0x2000, 0x2100), (0x1F300, 0x1F700))
            yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(25)))
        else:
            yield "".join(rng.choice(PARTS) for _ in range(rng.randrange(14)))


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    return text_originals.write(tmp_path_factory.mktemp("originals"), golden)


@pytest.fixture(scope="module")
def tokenizers_of(folder):
    return read_all(folder)


def read_all(folder):
    read = (MinDALLETokenizer.read(folder), MalevichTokenizer.read(folder / "bpe.model"))
    read += (DALLEMiniTokenizer.read(folder), MinDalleTokenizer.read(folder))
    return {tokenizer.family: tokenizer for tokenizer in read}


@pytest.mark.parametrize("family", ORIGINALS)
def test_ids_are_those_of_the_golden_file(golden, tokenizers_of, family):
    assert [item["caption"] for item in golden["captions"]] == CAPTIONS
    for item in golden["captions"]:
        assert tokenizers_of[family].encode(item["caption"]) == item[family], item["caption"]
    assert any(len(item[family]) > 10 for item in golden["captions"])


@pytest.mark.parametrize("family", ORIGINALS)
def test_the_original_agrees_on_many_captions(folder, tokenizers_of, family):
    original = ORIGINALS[family](folder)
    for caption in random_captions(1_000):
        assert tokenizers_of[family].encode(caption) == original(caption), caption


def test_sizes_marks_and_padding(golden, tokenizers_of):
    found = {name: (t.vocab_size, t.marks, t.pad) for name, t in tokenizers_of.items()}
    pieces, bart = len(golden["mindalle"]["vocab"]), len(golden["bart"]["vocab"])
    assert "[PAD]" not in golden["mindalle"]["vocab"]
    characters, rules = map(int, golden["malevich"].split("\n")[0].split())
    assert found == {
        "mindalle": (pieces + 1, None, pieces),
        "malevich": (4 + characters + rules, (2, 3), None),
        "dalle-mini": (bart, (0, 2), 1),
        "min-dalle": (bart, (0, 2), 1),
    }


def test_a_vocabulary_of_mindalle_may_hold_the_padding():
    vocab = {"[UNK]": 0, "[PAD]": 1, "a": 2, "b</w>": 3, "ab</w>": 4}
    tokenizer = MinDALLETokenizer({"vocab": vocab, "merges": ["a b</w>"]})
    assert (tokenizer.vocab_size, tokenizer.pad) == (5, 1)
    assert tokenizer.encode("AB b, a [PAD]") == [4, 3, 0, 0, 1]  # 'a' as a last piece is not there


def test_the_mask_of_bart_is_no_id_of_a_caption(tokenizers_of, golden):
    content = {"vocab": golden["bart"]["vocab"] | {"<mask>": 50_264}, "merges": golden["bart"]["merges"]}
    assert MinDalleTokenizer(content).vocab_size == tokenizers_of["min-dalle"].vocab_size


@pytest.mark.parametrize("family", ORIGINALS)
def test_a_folder_holds_it(tmp_path, tokenizers_of, family):
    tokenizer = tokenizers_of[family]
    assert not has_tokenizer(tmp_path)
    file = tokenizer.save(tmp_path / "model")
    assert has_tokenizer(file.parent)
    for again in (load_tokenizer(file), load_tokenizer(file.parent), pickle.loads(pickle.dumps(tokenizer))):
        assert (type(again), again.digest, again.vocab_size) == (
            type(tokenizer),
            tokenizer.digest,
            tokenizer.vocab_size,
        )
        assert [again.encode(caption) for caption in CAPTIONS] == [tokenizer.encode(caption) for caption in CAPTIONS]
    assert len({t.digest for t in tokenizers_of.values()}) == 4


@pytest.mark.parametrize("family", ORIGINALS)
@hypothesis.given(st.text(alphabet=st.characters(exclude_categories=[]), max_size=40))
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_any_caption_has_ids(tokenizers_of, family, caption):
    """Lone surrogates too."""
    tokenizer = tokenizers_of[family]
    ids = tokenizer.encode(caption)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode(caption.encode("utf-8", "ignore").decode()) == ids


@pytest.mark.parametrize(
    "caption", ["&#" + "1" * 9_000 + ";", "&amp;#" + "1" * 9_000, "#" + "a" * 9_000, "\ud800" * 9_000]
)
def test_long_captions(tokenizers_of, caption):
    for tokenizer in tokenizers_of.values():
        tokenizer.encode(caption)
    clip.clean(caption)


def test_what_stands_behind_32000_characters_is_not_read(tokenizers_of):
    for tokenizer in tokenizers_of.values():
        assert tokenizer.encode("a " * 16_000 + "cat") == tokenizer.encode("a " * 16_000)
        assert tokenizer.encode("a " * 15_998 + "cat") != tokenizer.encode("a " * 15_998)


def layout_of(tokenizer, *, spare=0):
    first = "none" if tokenizer.family == "mindalle" else "text"
    sizes = dict(text_len=8, text_vocab=tokenizer.vocab_size + spare, grid=2, image_vocab=8, first=first)
    return Layout(**sizes, marks=tokenizer.marks, pad=tokenizer.pad)


@pytest.mark.parametrize("family", ORIGINALS)
def test_a_folder_with_the_tokenizer_of_another_model_is_refused(tmp_path, tokenizers_of, family):
    tokenizer = tokenizers_of[family]
    tokenizer.save(tmp_path)
    for spare in (0, 8):  # published tables of text tokens have rows to spare
        assert load_tokenizer(tmp_path, layout=layout_of(tokenizer, spare=spare)).digest == tokenizer.digest
    with pytest.raises(UserError, match=rf"expected a tokenizer of {tokenizer.vocab_size - 1} entries"):
        load_tokenizer(tmp_path, layout=Layout(text_vocab=tokenizer.vocab_size - 1))
    others = [Layout(text_vocab=9_999), CaptionLayout(text_vocab=9_999)]
    others += [layout_of(t, spare=9_000) for t in tokenizers_of.values() if t.marks != tokenizer.marks]
    for other in others:
        with pytest.raises(UserError, match="those of another model: put the one back"):
            load_tokenizer(tmp_path, layout=other)


def test_a_tokenizer_of_ones_own_is_not_that_of_a_published_model(tokenizers_of):
    own = BPETokenizer.train(TRAINING, vocab_size=340)
    check_fits(own, Layout(text_vocab=own.vocab_size), "here")
    with pytest.raises(UserError, match=f"expected a tokenizer of {own.vocab_size + 1} entries in here"):
        check_fits(own, Layout(text_vocab=own.vocab_size + 1), "here")
    with pytest.raises(UserError, match=r"the marks \(2, 3\) and the padding None in here, got None and None"):
        check_fits(own, Layout(text_vocab=own.vocab_size, marks=(2, 3), first="none"), "here")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"family": "dall-e"}', '{"family": "malevich"}', '{"family": 3', "[" * 9_999]
)
def test_a_damaged_file_in_a_folder_is_refused(tmp_path, text):
    (tmp_path / "text_tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="text_tokenizer.json, got another or a damaged file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("family", "name", "damage", "message"),
    [
        ("mindalle", "bpe-16k-vocab.json", lambda text: text[:-9], "damaged"),
        ("mindalle", "bpe-16k-vocab.json", lambda text: text.replace("[UNK]", "[unk]"), r"no entry \[UNK\]"),
        ("mindalle", "bpe-16k-vocab.json", lambda text: text.replace('"[UNK]": 0', '"[UNK]": 1'), "different whole"),
        ("mindalle", "bpe-16k-vocab.json", lambda text: text.replace('"[UNK]": 0', '"[UNK]": -1'), "different whole"),
        ("mindalle", "bpe-16k-vocab.json", lambda text: text.replace('"[UNK]": 0', '"[UNK]": "0"'), "different whole"),
        ("mindalle", "bpe-16k-vocab.json", lambda text: "[1]", "damaged"),
        ("mindalle", "bpe-16k-merges.txt", lambda text: text + "q qq\n", "'q qq' is not of two entries"),
        ("mindalle", "bpe-16k-merges.txt", lambda text: text + "a b c\n", "'a b c' is not of two entries"),
        ("mindalle", "bpe-16k-merges.txt", None, "got No such file"),
        ("dalle-mini", "tokenizer.json", lambda text: "{}", "no 'model'"),
        (
            "dalle-mini",
            "tokenizer.json",
            lambda text: text.replace('"type": "BPE"', '"type": "Unigram"'),
            "must be BPE",
        ),
        ("dalle-mini", "tokenizer.json", lambda text: text.replace('"<pad>"', '"<pads>"'), "the first entries must be"),
        ("dalle-mini", "enwiki-words-frequency.txt", lambda text: " \n", "it has no words"),
        ("dalle-mini", "enwiki-words-frequency.txt", None, "enwiki-words-frequency.txt, got No such file"),
        (
            "min-dalle",
            "vocab.json",
            lambda text: text.replace('"</s>": 2', '"</s>": 99999'),
            "the first entries must be",
        ),
        ("min-dalle", "merges.txt", None, "got No such file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, golden, family, name, damage, message):
    folder = text_originals.write(tmp_path / "files", golden)
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).unlink()
    if damage:
        assert damage(text) != text
        (folder / name).write_text(damage(text), encoding="utf-8")
    read = {
        "mindalle": MinDALLETokenizer.read,
        "dalle-mini": DALLEMiniTokenizer.read,
        "min-dalle": MinDalleTokenizer.read,
    }
    with pytest.raises(UserError, match=message) as caught:
        read[family](folder)
    assert family in str(caught.value)


def test_min_dalles_files_of_both_sizes_in_one_folder(tmp_path, golden, tokenizers_of):
    folder = text_originals.write(tmp_path / "files", golden)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).rename(folder / name.replace(".", "_mini."))
    assert MinDalleTokenizer.read(folder, suffix="_mini").digest == tokenizers_of["min-dalle"].digest


@pytest.mark.parametrize(
    ("package", "families"),
    [("tokenizers", set(ORIGINALS)), ("emoji", {"dalle-mini", "min-dalle"}), ("unidecode", {"dalle-mini"})],
)
def test_a_missing_package_is_said_when_the_tokenizer_is_loaded(
    tmp_path, tokenizers_of, monkeypatch, package, families
):
    monkeypatch.setitem(sys.modules, package, None)
    for family in families:
        tokenizers_of[family].save(tmp_path)
        with pytest.raises(UserError, match=rf"{package}.*: pip install 'dalle-jax\[captions\]'"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("family", ORIGINALS)
def test_training_reads_captions_with_it_and_refuses_dropout(tokenizers_of, family):
    tokenizer = tokenizers_of[family]
    layout, caption = layout_of(tokenizer), "The  Cat &amp; a dog"
    prepare = Prepare(DataConfig(image_size=8, augment="center"), layout, tokenizer)
    record = Record("key", np.zeros((8, 8, 3), np.uint8), (caption,))
    example = prepare(record, np.random.default_rng(0), at_random=True)
    np.testing.assert_array_equal(example.arrays["text"], layout.caption_ids(tokenizer.encode(caption)))
    with pytest.raises(UserError, match=rf"text tokenizer of {family}, which has none, got 0.1: set --config.data.bpe"):
        Prepare(DataConfig(image_size=8, augment="center", bpe_dropout=0.1), layout, tokenizer)


def trained():
    """Vocabularies of the golden file, other ones each time: YouTokenToMe learns its own, `tokenizers` the others."""
    import tokenizers
    import youtokentome

    lower, folder = [line.lower() for line in TRAINING], pathlib.Path(tempfile.mkdtemp())
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    bart = tokenizers.ByteLevelBPETokenizer()
    bart.train_from_iterator(lower, vocab_size=360, min_frequency=1, special_tokens=marks)
    characters = tokenizers.CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    how = dict(vocab_size=200, min_frequency=1, special_tokens=["[UNK]"], suffix="</w>")
    characters.train_from_iterator(TRAINING, **how)
    (folder / "text").write_text("\n".join(lower * 9), encoding="utf-8")
    how = dict(data=str(folder / "text"), model=str(folder / "bpe.model"), vocab_size=200, coverage=0.99, n_threads=1)
    youtokentome.BPE.train(**how)
    found = {}
    for name, tokenizer in (("bart", bart), ("mindalle", characters)):
        model = json.loads(tokenizer.to_str())["model"]
        found[name] = {"vocab": model["vocab"], "merges": [" ".join(merge) for merge in model["merges"]]}
    return found | {"malevich": (folder / "bpe.model").read_text(), "words": WORDS}


if __name__ == "__main__":
    content = json.loads(GOLDEN_FILE.read_text(encoding="utf-8")) if GOLDEN_FILE.exists() else trained()
    folder = text_originals.write(pathlib.Path(tempfile.mkdtemp()), content)
    originals = {name: make(folder) for name, make in ORIGINALS.items()}
    normalize = text_originals.caption_normalizer(folder)
    content["captions"] = [
        {"caption": caption, "normalized": normalize(caption), **{name: f(caption) for name, f in originals.items()}}
        for caption in CAPTIONS
    ]
    GOLDEN_FILE.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(GOLDEN_FILE, GOLDEN_FILE.stat().st_size, "bytes")
