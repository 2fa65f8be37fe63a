"""Whatever people send is a record, a dropped one with a reason, or one sentence; no traceback and no hang."""

import itertools
import json
import os

import pytest
from hypothesis import strategies as st

from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.data.record import REASONS, BadRecord, Dropped, captions_of
from dalle_jax.data.sources import captions, open_source
from dalle_jax.errors import UserError
from tests.support.broken_shards import encoded, pack, sample
from tests.support.fuzz import damaged, few_and, fuzz

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
IMAGE = encoded(size=(4, 3))
NAMES = st.sampled_from(
    ["a.jpg", "b.jpg", "sub/a.jpg", "../a.jpg", "/a.jpg", "sub\\a.jpg", "c.heic", ".", "", "a\0.jpg"]
)
LETTERS = st.characters(exclude_categories=())  # lone surrogates too
TEXTS = st.text(LETTERS, max_size=12) | NAMES
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["file_name", "text", "caption", "captions", "id", "image_id", "images", "annotations"]) | TEXTS
ROWS = st.dictionaries(KEYS, VALUES | st.lists(TEXTS, max_size=3), max_size=5)


def check_captions(found: tuple[str, ...]) -> None:
    assert all(caption == caption.strip() != "" and caption.encode() for caption in found)


def check(spec: str) -> None:
    """Every slot of a source is a record or has a reason."""
    try:
        source = open_source(spec)
    except UserError as error:
        assert str(error).count("\n") == 0
        return
    for i in range(len(source)):
        item = source[i]
        assert item.key
        check_captions(captions_of(source, i))
        if isinstance(item, Dropped):
            assert item.reason in REASONS
        else:
            assert item.captions == captions_of(source, i) != ()


@few_and(5_000)
@pytest.mark.parametrize("read", [captions.from_text, captions.from_json])
def test_captions(read, inputs):
    def check_one(data):
        try:
            check_captions(read(data))
        except BadRecord as bad:
            assert bad.reason in REASONS

    of_json = ROWS.map(lambda row: json.dumps(row).encode())
    text = TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
    fuzz(
        check_one,
        st.binary(max_size=40) | of_json | text | damaged(b'{"captions": ["a b", "c"], "x": {}}'),
        inputs=inputs,
    )


@few_and(5_000)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_a_folder(tmp_path, kind, inputs):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/a.jpg", "c.heic"):
        (tmp_path / name).write_bytes(IMAGE)
    line = ROWS.map(json.dumps) if kind == "jsonl" else st.lists(TEXTS | st.just('"'), max_size=4).map(",".join)
    whole = b'{"file_name": "a.jpg", "text": "a"}\n' if kind == "jsonl" else b"file_name,text\r\na.jpg,a\r\nb.jpg,b\r\n"

    def check_one(lines, data):
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
        (tmp_path / f"metadata.{kind}").write_bytes(data + text)
        check(f"folder:{tmp_path}")

    fuzz(check_one, st.lists(line, max_size=4), damaged(whole), inputs=inputs)


@few_and(10_000)
def test_the_json_of_coco(tmp_path, inputs):
    (tmp_path / "a.jpg").write_bytes(IMAGE)
    ids = st.integers(0, 2) | st.sampled_from([0.0, "1", None])
    image = st.fixed_dictionaries({"id": ids | VALUES, "file_name": NAMES | VALUES}) | VALUES
    annotation = st.fixed_dictionaries({"image_id": ids | VALUES, "caption": TEXTS | VALUES}) | VALUES
    lists = {"images": st.lists(image, max_size=4) | VALUES, "annotations": st.lists(annotation, max_size=4) | VALUES}

    def check_one(content):
        (tmp_path / "captions.json").write_text(json.dumps(content))
        check(f"coco:{tmp_path}/captions.json,{tmp_path}")

    fuzz(check_one, st.fixed_dictionaries(lists) | VALUES, inputs=inputs)


@few_and(10_000)
def test_a_damaged_tar(tmp_path, monkeypatch, inputs):
    monkeypatch.setenv("DALLE_JAX_CACHE", os.devnull)  # an index is not kept, which costs more than making it
    whole = pack(
        [*sample("a", jpg=IMAGE), *sample("b", jpg=IMAGE, json=b'{"caption": "b"}'), *sample("c.d", jpg=IMAGE)]
    )
    numbers = itertools.count()

    def check_one(data):
        path = tmp_path / f"{next(numbers)}.tar"  # an index is known again by its path, size and time
        path.write_bytes(data)
        check(f"wds:{path}")
        path.unlink()

    fuzz(check_one, damaged(whole), inputs=inputs)


@few_and(2_000)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_damaged_image(kind, inputs):
    def check_one(data):
        try:
            assert decode_image(data, max_pixels=1_000_000).shape[2] == 3
        except BadImage as bad:
            assert bad.reason in REASONS

    fuzz(check_one, damaged(encoded(kind=kind, size=(24, 16))), inputs=inputs)
