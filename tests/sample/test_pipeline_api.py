"""`dalle_jax.Pipeline` and `dalle-jax sample`: pictures that say how they were made, arguments that are checked."""

import copy
import errno
import io
import json
import pickle
import re

import jax
import numpy as np
import pytest
from PIL import Image

import dalle_jax
from dalle_jax.cli import main, sample
from dalle_jax.cli.sample import file_names, read_image
from dalle_jax.data.transforms import center_crop
from dalle_jax.errors import UserError
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.pictures.picture import Picture
from dalle_jax.sample.batches import bucket, plan
from dalle_jax.sample.request import Request
from tests.support.stand_in_server import NoisePipeline, png_of
from tests.support.tiny_model import CAPTION, BrightIsBest, pixels_of


@pytest.fixture(scope="module")
def pipe(model_folder):
    pipe = dalle_jax.Pipeline.load(model_folder, devices=jax.devices()[:1])
    pipe.generator.can_guide = True
    pipe.reranker = BrightIsBest()
    return pipe


def test_pictures_carry_how_they_were_made_into_png_files_and_copies(pipe, tmp_path):
    """In another process too."""
    made = pipe(CAPTION, best_of=1, seed=7, temperature=0.9, top_k=5)[0]
    assert (made.size, made.mode, made.caption, made.seed) == ((16, 16), "RGB", CAPTION, 7)
    for again in (lambda picture: picture, copy.deepcopy, lambda picture: pickle.loads(pickle.dumps(picture))):
        picture = again(made)
        assert (picture.caption, picture.seed, picture.score) == (CAPTION, 7, made.score)
        np.testing.assert_array_equal(picture.tokens, made.tokens)
        picture.save(tmp_path / "picture.png")
        read = Image.open(tmp_path / "picture.png")
        np.testing.assert_array_equal(np.asarray(read), np.asarray(made))
        assert (read.info["caption"], read.info["seed"], read.info["score"]) == (CAPTION, "7", f"{made.score:.6f}")
        assert json.loads(read.info["settings"]) == picture.settings == {
            "best_of": 1,
            "caption_tokens": 7,
            "checkpoint": pipe.digest,
            "clip": "bright",
            "guidance": 1.0,
            "keep_rows": 0,
            "max_caption_tokens": 15,
            "seed": 7,
            "temperature": 0.9,
            "top_k": 5,
            "top_p": None,
            "weights": "model",
        }  # fmt: skip
    made.save(tmp_path / "picture.jpg")  # other formats are saved as by any PIL image


def test_pictures_carry_the_tokens_that_they_were_decoded_from(pipe):
    pictures = pipe(CAPTION, n=3, seed=1)
    tokens, images = np.stack([picture.tokens for picture in pictures]), pixels_of(pictures)
    assert tokens.shape == (3, 4, 4) and tokens.dtype == np.int32 and len(np.unique(tokens)) > 3
    np.testing.assert_array_equal(pipe.decode(tokens), images)
    np.testing.assert_array_equal(pipe.encode(images), pipe.generator.image_tokenizer.encode(images))


def test_captions_of_a_call_share_no_seed():
    """Each goes on where the candidates of the one before end; a list of seeds is taken as it is."""
    pipe = NoisePipeline()
    alone = pipe(CAPTION, n=2, seed=5)
    both = pipe([CAPTION] * 2, n=2, seed=5)
    assert [[picture.seed for picture in row] for row in both] == [[5, 6], [7, 8]]
    np.testing.assert_array_equal(pixels_of(alone), pixels_of(both[0]))
    assert not np.array_equal(pixels_of(both[0]), pixels_of(both[1]))
    ranked = pipe([CAPTION] * 3, n=1, best_of=4, seed=2**32 - 12)
    assert [row[0].settings["seed"] for row in ranked] == [2**32 - 12, 2**32 - 8, 2**32 - 4]
    with pytest.raises(UserError, match="seed must be at most"):
        pipe([CAPTION] * 3, n=1, best_of=4, seed=2**32 - 11)
    for row in pipe([CAPTION] * 2, n=1, seed=[6, 6]):
        np.testing.assert_array_equal(pixels_of(row), pixels_of(alone)[1:])


def test_without_a_seed_one_is_drawn_and_said():
    pipe = NoisePipeline()
    first, second = (pipe([CAPTION, "a star"], n=2) for _ in range(2))
    assert first[0][0].seed != second[0][0].seed
    again = pipe([CAPTION, "a star"], n=2, seed=first[0][0].settings["seed"])
    np.testing.assert_array_equal(pixels_of(sum(again, [])), pixels_of(sum(first, [])))
    for picture in sum(first, []):  # a picture's own seed draws it alone
        np.testing.assert_array_equal(pixels_of(pipe(picture.caption, seed=picture.seed)), pixels_of([picture]))


@pytest.fixture
def small_batches(pipe, monkeypatch):
    """Batches of two images: everything larger is split."""
    monkeypatch.setattr(pipe, "_capacity", dict.fromkeys((False, True), (2, "two at a time")))


def test_split_batches_draw_the_same_pictures(pipe, small_batches):
    """The last batch is filled up; captions that share batches keep their own settings."""
    split = pixels_of(pipe(CAPTION, n=5, seed=10))
    mixed = pipe([CAPTION, "a small star", CAPTION], n=1, seed=[10, 0, 11])
    np.testing.assert_array_equal(pixels_of(row[0] for row in mixed)[[0, 2]], split[:2])
    pipe._capacity[False] = (64, "many at a time")
    np.testing.assert_array_equal(split, pixels_of(pipe(CAPTION, n=5, seed=10)))
    np.testing.assert_array_equal(split[[4, 0, 2]], pixels_of(row[0] for row in pipe([CAPTION] * 3, seed=[14, 10, 12])))
    mixed = [
        Request(CAPTION, n=2, seed=10),
        Request("a small star", n=1, options={"temperature": 0.5, "top_k": 3}),
        Request(CAPTION, n=3, best_of=5, seed=10),
        Request("", n=2, guidance=2.0, seed=4),
    ]
    for request, pictures in zip(mixed, pipe.draw(mixed), strict=True):
        alone = pipe.draw([request])[0]
        np.testing.assert_array_equal(pixels_of(alone), pixels_of(pictures))
        assert [p.seed for p in alone] == [p.seed for p in pictures]


def test_best_of_returns_the_best_of_all_candidates_in_order(pipe, small_batches, monkeypatch):
    """Ranked while batches of two are drawn, or two at a time of a large batch: never more are decoded at once."""
    everything = pipe(CAPTION, n=6, seed=3)
    brightness = np.array([np.asarray(p).mean() / 255 for p in everything])
    order = np.argsort(-brightness, kind="stable")[:2]
    for _ in range(2):
        pipe.reranker.given.clear()
        best = pipe(CAPTION, n=2, best_of=6, seed=3)
        assert [p.seed for p in best] == [3 + int(i) for i in order] and pipe.reranker.given == [2, 2, 2]
        np.testing.assert_array_equal(pixels_of(best), pixels_of(everything)[order])
        np.testing.assert_allclose([p.score for p in best], brightness[order], rtol=1e-5)
        pipe._capacity[False] = (64, "many at a time")
        monkeypatch.setattr(pipe.generator, "decode_batch", 2)
    assert best[0].settings["clip"] == "bright" and everything[0].score is None


def test_of_ranked_drafts_only_the_chosen_are_finished(monkeypatch):
    """For any generator: here one that draws noise, of which finishing is counted. Of equal ones smaller seeds win."""
    pipe, finished = NoisePipeline(), []
    finish = pipe.generator.finish
    monkeypatch.setattr(
        pipe.generator, "finish", lambda drafts, *rest: finished.append(len(drafts)) or finish(drafts, *rest)
    )
    request = Request("a star", n=2, best_of=40, seed=3)
    pictures = pipe.draw([request])[0]
    assert finished == [2] and sum(pipe.reranker.given) == 40
    np.testing.assert_array_equal(pixels_of(pictures), pixels_of(pipe.finished(request)))
    monkeypatch.setattr(pipe.reranker, "score", lambda images, caption: np.arange(len(images)) // 2 % 2)
    assert [picture.seed for picture in pipe("a star", n=3, best_of=40, seed=3)] == [5, 6, 9]


def test_eight_devices_that_share_models_in_pairs_draw_what_one_draws(model_folder, pipe):
    many = dalle_jax.Pipeline.load(model_folder, tensor=2)
    many.reranker = pipe.reranker
    assert (many.generator.batch_multiple, many.generator.engine.mesh.size) == (4, 8)
    alone, shared = (each(CAPTION, n=5, best_of=6, seed=10) for each in (pipe, many))
    np.testing.assert_array_equal(pixels_of(shared), pixels_of(alone))
    assert [picture.seed for picture in shared] == [picture.seed for picture in alone]


def test_progress_is_seen_step_by_step_and_a_request_can_be_ended(pipe, small_batches):
    seen = []

    def on_progress(preview):
        images = preview.images()
        seen.append((preview.request, preview.step, preview.share, np.asarray(images[0])))
        assert preview.steps == 4 and len(images) <= 2
        return not (preview.request == 1 and preview.step == 2)

    first, second = pipe(["a star", CAPTION], n=3, seed=[0, 5], on_progress=on_progress)
    np.testing.assert_array_equal(pixels_of(first), pixels_of(pipe("a star", n=3, seed=0)))
    assert second == [] and [step for request, step, *_ in seen if request == 1] == [1, 2]
    shares = [share for request, _, share, _ in seen if request == 0]
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 8  # two batches of four rows
    steps = [(step, image) for request, step, _, image in seen if request == 0][:4]
    for step, image in steps:
        assert (image[step * 4 :] == 255).all()
    np.testing.assert_array_equal(steps[3][1], np.asarray(first[0]))


def test_nothing_more_is_drawn_when_nobody_waits(pipe, small_batches, monkeypatch):
    """Ended in its second row, the first of three batches is the last."""
    rows, advance = [], pipe.generator.engine.advance
    monkeypatch.setattr(pipe.generator.engine, "advance", lambda batch, *row: rows.append(row) or advance(batch, *row))
    for answer in (bool, np.bool):  # a comparison of NumPy numbers ends it too
        rows.clear()
        assert pipe(CAPTION, n=5, on_progress=lambda preview, answer=answer: answer(preview.step < 2)) == []
        assert rows == [(0, 1), (1, 2)]


def test_batches_have_few_shapes_and_fit(pipe):
    assert [bucket(i) for i in (1, 2, 4, 5, 16, 17, 64, 65)] == [1, 4, 4, 16, 16, 64, 64, 256]
    for counts, room, multiple in (
        ([1] * 200, 64, 1), ([512], 64, 8), ([5, 70, 3], 16, 4), ([1], 8, 8), ([2, 2, 2], 6, 2),
    ):  # fmt: skip
        plans = plan(dict(enumerate(counts)), capacity=room, multiple=multiple)
        assert len({(p.prompts, p.candidates) for p in plans}) == 1  # one program
        assert all(p.prompts * p.candidates <= room and not p.prompts * p.candidates % multiple for p in plans)
        drawn = [set() for _ in counts]
        for slot in (slot for p in plans for slot in p.slots):
            assert slot.count <= plans[0].candidates
            drawn[slot.request].update(range(slot.first, slot.first + slot.count))
        assert [sorted(candidates) for candidates in drawn] == [list(range(count)) for count in counts]
    (half, _) = plan({0: 512}, capacity=349)  # even parts, not a full one and a rest that is drawn as a full one
    assert (half.prompts, half.candidates) == (1, 256)
    images, reason = pipe.capacity()
    engine = pipe.generator.engine
    assert images == engine.capacity(guided=False)[0] and f"{images} images per batch" in reason
    each = engine.batch_bytes(1, 2, guided=False) - engine.batch_bytes(1, 1, guided=False)
    config = engine.config  # row and convolution: rings of 5 and 14 of 16 positions; noise of a row, logits
    slots = 5 + 16
    assert each == slots * 2 * 4 * config.heads * config.head_size + 4 * config.image_vocab * (config.grid + 4)


def test_completion_keeps_the_top_rows(pipe, monkeypatch):
    image = np.random.default_rng(0).integers(256, size=(20, 24, 3), dtype=np.uint8)
    given = pipe.encode(center_crop(image, 16)[None])
    completed = pipe(CAPTION, n=3, image=Image.fromarray(image), keep_rows=2)
    whole = pipe(CAPTION, image=image, keep_rows=4)[0]
    np.testing.assert_array_equal(np.asarray(whole), pipe.decode(given)[0])
    np.testing.assert_array_equal(whole.tokens, given[0])
    for picture in completed:
        np.testing.assert_array_equal(picture.tokens[:2], given[0, :2])
    assert completed[0].settings["keep_rows"] == 2
    monkeypatch.setattr(pipe.generator, "_layout", TransformerConfig().layout)
    assert pipe.generator.steps(Request(CAPTION, image=image)) == range(15, 32)  # by default as in section 3.3
    assert len({np.asarray(picture).tobytes() for picture in completed}) == 3


def test_a_given_picture_is_read_as_in_training(pipe, tmp_path):
    """Turned upright as the camera says, and its transparency laid on white."""
    pixels = np.random.default_rng(0).integers(256, size=(20, 24, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[10:, :, 3] = 0
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=upside_down)
    pixels[10:, :, :3] = 255
    want = pipe.encode(center_crop(np.ascontiguousarray(pixels[::-1, ::-1, :3]), 16)[None])[0]
    for image in (Image.open(tmp_path / "photo.png"), read_image(tmp_path / "photo.png")):
        np.testing.assert_array_equal(pipe(CAPTION, image=image, keep_rows=4)[0].tokens, want)


CUT = Image.open(io.BytesIO(png_of(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))[:2000]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n to be a whole number of at least 1 and of at most 4,096, got 0"),
        ({"n": 1.5}, "n to be a whole number .* got 1.5"),
        ({"n": True}, "n to be a whole number .* got True"),
        ({"n": 3, "best_of": 2}, "best_of must be at least n = 3, got 2"),
        ({"best_of": 4097}, "best_of to be a whole number .* at most 4,096, or None, got 4097"),
        ({"temperature": -0.1}, "temperature to be a number of at least 0 and of at most 1,000, got -0.1"),
        ({"temperature": float("nan")}, "temperature to be a number .* got nan"),
        ({"temperature": "1"}, "temperature to be a number .* got '1'"),
        ({"temperature": None}, "temperature to be a number .* got None"),
        ({"guidance": -1}, "guidance to be a number of at least 0 and of at most 1,000, got -1"),
        ({"guidance": 1e30}, r"guidance to be a number .* got 1e\+30"),
        ({"guidance": np.float32("inf")}, "guidance to be a number .* got inf"),
        ({"top_k": 0}, "top_k to be a whole number of at least 1 and of at most 12, or None, got 0"),
        ({"top_k": 13}, "top_k to be a whole number .* got 13"),
        ({"top_p": 0.0}, "top_p to be a number of at most 1 and above 0, or None, got 0.0|above 0 and of at most 1"),
        ({"top_p": 1.5}, "top_p to be a number .* got 1.5"),
        ({"seed": -1}, "seed to be a whole number of at least 0"),
        ({"n": 2, "seed": 2**32 - 1}, r"seed must be at most 2\*\*32 - candidates = 4294967294, got 4294967295"),
        ({"seed": [1, 2]}, "seed must be one, or one per caption, got 2"),
        ({"seed": []}, "seed must be one, or one per caption, got 0"),
        ({"seed": np.array(1.0)}, "seed to be a whole number"),
        ({"on_progress": 3}, "on_progress must be a function that takes a Preview, or None, got 3"),
        ({"on_rows": print}, r"expected options of this model \(temperature, top_k, top_p, keep_rows\), got 'on_rows'"),
        ({"keep_rows": 2}, "needs an image"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "keep_rows": 5}, "keep_rows to be .* at most 4, or None, got 5"),
        ({"image": np.zeros((8, 8), np.uint8)}, r"uint8 \[H, W, 3\]"),
        ({"image": "star.png"}, r"image must be a PIL image or uint8 \[H, W, 3\]"),
        ({"image": CUT}, "image must be one that can be read, got one where"),
    ],
)
def test_arguments_out_of_range_are_refused(pipe, arguments, message):
    with pytest.raises(UserError, match=message) as refused:
        pipe(CAPTION, **arguments)
    assert "\n" not in str(refused.value)


def test_numpy_numbers_are_numbers(pipe):
    """Of any width, in every argument; they do not show in what is written down."""
    plain = {"n": 2, "best_of": 3, "seed": 2**31 + 5, "guidance": 1.5, "temperature": 0.5, "top_k": 3, "top_p": 0.75}
    kinds = {"n": np.int64, "best_of": np.int8, "seed": np.uint32, "guidance": np.float32, "temperature": np.float16}
    from_numpy = {name: kinds.get(name, np.float64 if name == "top_p" else np.int32)(v) for name, v in plain.items()}
    for picture, other in zip(pipe(CAPTION, **plain), pipe(CAPTION, **from_numpy), strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(other))
        assert picture.metadata() == other.metadata()


@pytest.mark.parametrize("captions", [[], [3], "", 3, None, b"a star", "a \ud800", "a" * 32_001])
def test_captions_must_be_texts(pipe, captions):
    if captions == "":  # an empty caption is a caption: all padding
        assert len(pipe(captions)) == 1
        return
    with pytest.raises(UserError, match="captions? must be"):
        pipe(captions)
    with pytest.raises(UserError, match="requests must be a list of Request, got 'a star' in it"):
        pipe.draw(["a star"])


def test_command_writes_pictures_and_a_sheet(model_folder, pipe, tmp_path, capsys):
    """On eight devices, the pictures that one draws; without --json it says how many it draws at a time, and why."""
    out = tmp_path / "out"
    words = ["sample", str(model_folder), CAPTION, "a star", "-n", "2", "--seed", "3", "--out", str(out), "--json"]
    assert main.main(words) == 0
    told = capsys.readouterr()
    made = json.loads(told.out)
    names = [*(f"a-red-circle-above-a-blue-square-{seed}.png" for seed in (3, 4)), "a-star-5.png", "a-star-6.png"]
    assert [picture["file"] for picture in made["pictures"]] == [str(out / name) for name in names]
    assert made["seed"] == 3 and told.err == ""
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "sheet.png"])
    assert Image.open(out / names[3]).info["seed"] == "6"
    drawn, alone = (
        [np.asarray(Image.open(out / name)) for name in names],
        sum(pipe([CAPTION, "a star"], n=2, seed=3), []),
    )
    np.testing.assert_array_equal(drawn, pixels_of(alone))
    for entry, picture in zip(made["pictures"], alone, strict=True):
        assert entry.pop("file") and entry == {
            "caption": picture.caption, "seed": picture.seed, "score": None, "settings": picture.settings
        }  # fmt: skip
    assert main.main(words[:-1]) == 0
    told = capsys.readouterr()
    assert re.match(r"\d+ images per batch: .* MB each, 80% of .* GB free holds \d+", told.err)
    assert re.match(r"4 pictures of 2 caption\(s\), from seed 3, in .* s: ", told.out)


def test_a_caption_that_is_not_read_to_its_end_is_named(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", lambda args: pipe)
    long = f"{CAPTION} left of a green star below a small yellow triangle"
    pictures = [pipe(caption, seed=0)[0] for caption in (long, f"{long} and a cross")]
    np.testing.assert_array_equal(*pixels_of(pictures))  # what is not read changes nothing, but it is said
    tokens, read = (pictures[0].settings[name] for name in ("caption_tokens", "max_caption_tokens"))
    assert read == pipe.generator.model.config.layout.caption_len < tokens < pictures[1].settings["caption_tokens"]
    assert main.main(["sample", "model", CAPTION, long, "-n", "1", "--out", str(tmp_path)]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert (
        warning
        == f"dalle-jax: warning: {long[:40]!r}... has {tokens} tokens, of which the model reads {read}: shorten it"
    )


def test_the_folder_of_a_command_is_tried_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", lambda args: pytest.fail("loaded"))
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/deeper", "/proc/nothing"):
        assert main.main(["sample", "nowhere", "a star", "--out", str(tmp_path / out)]) == 2
        assert re.match(r"dalle-jax: .*expected a folder to write to, got .*\n$", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_leaves_whole_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", lambda args: NoisePipeline())
    saved, save = [], Picture.save

    def fill(picture, aside, *rest):
        saved.append(aside)
        if len(saved) == 3:
            aside.write_bytes(b"\x89PNG half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(picture, aside, *rest)

    monkeypatch.setattr(Picture, "save", fill)
    out = tmp_path / "out"
    assert main.main(["sample", "model", "a star", "-n", "4", "--seed", "0", "--out", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["a-star-0.png", "a-star-1.png"]
    assert all(Image.open(path).load() for path in out.iterdir())


def test_every_picture_of_a_command_has_its_own_file():
    """Captions that are alike as file names, and ones longer than a file name may be."""
    pixels, long = np.zeros((1, 1, 3), np.uint8), "a very long road " * 20
    captions = ["a star", "A star!", "a  star", f"{long} east", f"{long} west", "\U00020000" * 90, "?"]
    names = file_names([Picture.from_array(pixels, caption=text, seed=7, settings={}) for text in captions])
    assert names[:3] == ["a-star-7.png", "a-star-7-2.png", "a-star-7-3.png"] and names[-1] == "caption-7.png"
    assert len(set(names)) == len(names) and max(len(name.encode()) for name in names) < 100
