"""Folders of images: every oddity, two at a time, in files beside the images, in metadata files and in COCO's JSON.

What a folder holds is a good record or a counted slot, and one oddity costs no record of another.
"""

import csv
import dataclasses
import errno
import io
import itertools
import json
import os
import pathlib
import random
import shutil

import pytest

from dalle_jax import files
from dalle_jax.cli import data
from dalle_jax.cli.main import main
from dalle_jax.data.decode import decode_image
from dalle_jax.data.record import Dropped, Record, captions_of
from dalle_jax.data.sources import check_outside, open_source
from dalle_jax.errors import UserError
from tests.support import ROOT
from tests.support.broken_shards import encoded

IMAGE = encoded(size=(4, 3))
FOLDER, PIPE, NOWHERE = object(), object(), object()
WITHOUT_IMAGE = ("no image", "zero bytes", "outside the folder")


@dataclasses.dataclass(frozen=True)
class Odd:
    """files: path -> content. rows: of a metadata file, (file_name, caption) or a whole row. slots: key -> captions, or
    the reason why there are none; the key of the n-th row is n."""

    slots: dict
    files: dict = dataclasses.field(default_factory=dict)
    rows: list = dataclasses.field(default_factory=list)


BESIDE = {
    "several lines": Odd({"a.jpg": ("one", "two", "three")}, {"a.jpg": IMAGE, "a.txt": b"one\n\n two \r\nthree"}),
    "upper case": Odd({"IMG_0.JPG": ("b",)}, {"IMG_0.JPG": IMAGE, "IMG_0.TXT": b"b"}),
    "two texts": Odd({"c.jpg": ("C",), "c.txt": "duplicate key"}, {"c.jpg": IMAGE, "c.TXT": b"C", "c.txt": b"c"}),
    "json of img2dataset": Odd({"00/d.jpg": ("d",)}, {"00/d.jpg": IMAGE, "00/d.json": b'{"caption": "d", "key": "d"}'}),
    "text of json": Odd({"e.jpg": ("e",)}, {"e.jpg": IMAGE, "e.json": b'{"text": "e"}'}),
    "text before json": Odd({"f.jpg": ("f",)}, {"f.jpg": IMAGE, "f.txt": b"f", "f.json": b'{"capt'}),
    "bad json": Odd({"g.jpg": "bad json"}, {"g.jpg": IMAGE, "g.json": b'{"capt'}),
    "json of something else": Odd({"h.jpg": "no caption"}, {"h.jpg": IMAGE, "h.json": b"[]", "other.json": b"{}"}),
    "no caption": Odd({"i.jpg": "no caption"}, {"i.jpg": IMAGE}),
    "blank caption": Odd({"j.jpg": "empty caption"}, {"j.jpg": IMAGE, "j.txt": b" \n"}),
    "Latin-1": Odd({"k.jpg": "not utf-8"}, {"k.jpg": IMAGE, "k.txt": "schön".encode("latin-1")}),
    "other line ends": Odd({"l.jpg": ("a\u2028b\x0b\x85c",)}, {"l.jpg": IMAGE, "l.txt": "a\u2028b\x0b\x85c".encode()}),
    "folder for a caption": Odd({"m.jpg": "no caption"}, {"m.jpg": IMAGE, "m.txt": FOLDER}),
    "pipe for a caption": Odd({"n.jpg": "no caption"}, {"n.jpg": IMAGE, "n.txt": PIPE}),
    "caption alone": Odd({"o.txt": "no image"}, {"o.txt": b"o"}),
    "no bytes": Odd({"p.jpg": "zero bytes"}, {"p.jpg": b"", "p.txt": b"p"}),
    "HEIC": Odd({"q.HEIC": "unsupported image"}, {"q.HEIC": b"ftypheic", "q.txt": b"q"}),
    "RAW too": Odd({"r.jpg": ("r",), "r.dng": "extra image"}, {"r.jpg": IMAGE, "r.dng": b"", "r.txt": b"r"}),
    "link to nothing": Odd({"s.jpg": "no image"}, {"s.jpg": NOWHERE, "s.txt": b"s"}),
    "no Unicode": Odd({"\udcff.jpg": ("t",)}, {"\udcff.jpg": IMAGE, "\udcff.txt": b"t"}),
    "path too long": Odd({"/".join(["x" * 250] * 17): "unreadable file"}, {"/".join(["x" * 250] * 17): FOLDER}),
    "not for us": Odd({}, {".u.jpg": IMAGE, ".u/v.jpg": IMAGE, "Thumbs.db": b"", "README": b""}),
}  # fmt: skip
ROWS = {
    "several rows": Odd({"A.jpg": ("one", "two")}, {"A.jpg": IMAGE}, [("A.jpg", "one"), ("A.jpg", "two")]),
    "a blank row": Odd({"B.jpg": ("b",)}, {"B.jpg": IMAGE}, [("B.jpg", " "), ("B.jpg", "b")]),
    "blank rows": Odd({"C.jpg": "empty caption"}, {"C.jpg": IMAGE}, [("C.jpg", ""), ("C.jpg", "")]),
    "row before text": Odd({"D.jpg": ("row",)}, {"D.jpg": IMAGE, "D.txt": b"text"}, [("D.jpg", "row")]),
    "no such image": Odd({"E.jpg": "no image"}, {}, [("E.jpg", "e")]),
    "outside": Odd({"../outside.jpg": "outside the folder"}, {}, [("../outside.jpg", "f")]),
    "absolute": Odd({"G.jpg": ("g",)}, {"G.jpg": IMAGE}, [("FOLDER/G.jpg", "g")]),
    "absolute elsewhere": Odd({"/nowhere/H.jpg": "outside the folder"}, {}, [("/nowhere/H.jpg", "h")]),
    "backslash": Odd({"sub/I.jpg": ("i",)}, {"sub/I.jpg": IMAGE}, [("sub\\I.jpg", "i")]),
    "HEIC in a row": Odd({"J.heic": "unsupported image"}, {"J.heic": b""}, [("J.heic", "j")]),
    "line ends in a row": Odd({"K.jpg": ("one\ntwo\u2028.",)}, {"K.jpg": IMAGE}, [("K.jpg", "one\ntwo\u2028.")]),
    "no file_name": Odd({0: "no image", "L.jpg": ("l",)}, {"L.jpg": IMAGE}, [("", "lost"), ("L.jpg", "l")]),
}  # fmt: skip
ONLY_CSV = {
    "comma without quotes": Odd({"M.jpg": "bad csv"}, {"M.jpg": IMAGE}, [b"M.jpg,,red, round\r\n"]),
    "quotes inside": Odd({"O.jpg": ("big dog 12\"",)}, {"O.jpg": IMAGE}, [b'O.jpg,,"big" dog 12"\r\n']),
    "quote that is not closed": Odd(
        {"P.jpg": "bad csv", "Q.jpg": "no caption"}, {"P.jpg": IMAGE, "Q.jpg": IMAGE},
        [b'P.jpg,,"red\r\n', b'Q.jpg,,a "blue" one"\r\n'],
    ),
}  # fmt: skip
ONLY_JSON = {
    "broken line": Odd({0: "bad json", "N.jpg": ("n",)}, {"N.jpg": IMAGE}, [b'{"file_name": "x\n', ("N.jpg", "n")]),
    "line that is no object": Odd({0: "bad json"}, {}, [b"[1]\n"]),
    "line of other encoding": Odd({0: "bad json"}, {}, ['{"file_name": "schön.jpg"}\n'.encode("latin-1")]),
}  # fmt: skip


def fill(folder: pathlib.Path, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        if content is FOLDER:
            make_deep(folder, name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is PIPE:
            os.mkfifo(path)
        elif content is NOWHERE:
            path.symlink_to("nothing")
        else:
            path.write_bytes(content)


def make_deep(folder: pathlib.Path, name: str) -> None:
    """A folder whose path may be longer than the system takes at once."""
    here = os.open(folder, os.O_RDONLY)
    for part in name.split("/"):
        os.mkdir(part, dir_fd=here)
        here, parent = os.open(part, os.O_RDONLY, dir_fd=here), here
        os.close(parent)
    os.close(here)


def metadata(folder: pathlib.Path, odds, kind: str) -> dict:
    """Write the rows of all as metadata.csv or .jsonl; returns the slots of all, rows by their lines."""
    out, line, slots = io.BytesIO(b""), 1, {}
    if kind == "csv":
        out.write(b"file_name,other,text\r\n")
        line = 2
    for odd in odds:
        keys = []
        for row in odd.rows:
            if not isinstance(row, bytes):
                name, text = row[0].replace("FOLDER", str(folder)), row[1]
                table = io.StringIO()
                csv.writer(table).writerow((name, "", text))
                row = table.getvalue() if kind == "csv" else json.dumps({"file_name": name, "text": text}) + "\n"
                row = row.encode("utf-8", "surrogateescape")
            out.write(row)
            line += row.count(b"\n")
            keys.append(f"metadata.{kind}:{line - 1}")
        slots |= {keys[key] if isinstance(key, int) else key: wanted for key, wanted in odd.slots.items()}
    if any(odd.rows for odd in odds):
        (folder / f"metadata.{kind}").write_bytes(out.getvalue())
    return slots


def in_pairs(names, size: int):
    """Groups of so many names in which every pair comes together."""
    rng, left = random.Random(0), set(itertools.combinations(names, 2))
    while left:
        chosen = {*rng.sample(list(names), size - 2), *min(left)}
        group = [name for name in names if name in chosen]
        left -= set(itertools.combinations(group, 2))
        yield group


def outcome(source) -> dict:
    slots = {}
    for i, slot in enumerate(source):
        assert slot.key not in slots
        slots[slot.key] = slot.reason if isinstance(slot, Dropped) else slot.captions
        assert not isinstance(slot, Record) or captions_of(source, i) == slot.captions
    return slots


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_every_file_and_row_is_a_record_or_a_counted_slot(tmp_path, kind):
    odds = BESIDE | ROWS | (ONLY_CSV if kind == "csv" else ONLY_JSON)
    for number, names in enumerate(in_pairs(odds, 10)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found_here = [odds[name] for name in names]
        for odd in found_here:
            fill(folder, odd.files)
        slots = metadata(folder, found_here, kind)
        assert outcome(open_source(f"folder:{folder}")) == slots, names
        of_dvae = open_source(f"folder:{folder}", captions_required=False)
        pictures = {key for key, found in slots.items() if key[-3:] in ("jpg", "JPG") and found not in WITHOUT_IMAGE}
        assert {slot.key for slot in of_dvae if isinstance(slot, Record)} == pictures, names
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "metadata.jsonl",
            b'{"name": "a.jpg"}\n{"name": "b.jpg"}',
            "file_name in the rows of .* all 2 .*a row of ..name",
        ),
        ("metadata.csv", b"image,text\r\na.jpg,x\r\n", "a row of ..image., .text...: name the column file_name"),
        ("metadata.csv", PIPE, "expected a readable .*, got no regular file"),
        ("metadata.csv", "file_name,text\r\na.jpg,schön\r\n".encode("cp1252"), "expected a readable .*metadata.csv"),
    ],
)
def test_a_metadata_file_that_is_wrong_as_a_whole_is_one_sentence(tmp_path, name, content, words):
    fill(tmp_path, {"a.jpg": IMAGE, name: content})
    with pytest.raises(UserError, match=words):
        open_source(f"folder:{tmp_path}")


def coco(images, annotations):
    return {"images": [{"id": i, "file_name": name} for i, name in images],
            "annotations": [{"image_id": i, "caption": text} for i, text in annotations]}  # fmt: skip


COCO = {  # slots: the key of annotation or image n of an oddity is its kind and n
    "several captions": (coco([(1, "a.jpg")], [(1, "one"), (1, "two")]), {"a.jpg": ("one", "two")}),
    "ids as text and float": (coco([(2, "b.jpg")], [("2", "b"), (2.0, "B")]), {"b.jpg": ("b", "B")}),
    "blank": (coco([(3, "c.jpg")], [(3, " "), (3, "c")]), {"c.jpg": ("c",), ("annotations", 0): "empty caption"}),
    "no caption": (coco([(4, "d.jpg")], []), {"d.jpg": "no caption"}),
    "no such image": (coco([], [(99, "of nothing")]), {("annotations", 0): "no image"}),
    "no such file": (coco([(5, "gone.jpg")], [(5, "e")]), {"gone.jpg": "no image"}),
    "HEIC": (coco([(6, "f.heic")], [(6, "f")]), {"f.heic": "unsupported image"}),
    "outside": (coco([(7, "../x.jpg")], [(7, "g")]), {"../x.jpg": "outside the folder"}),
    "twice": (coco([(8, "h.jpg"), (8, "i.jpg")], [(8, "h")]), {"h.jpg": ("h",), "i.jpg": "duplicate key"}),
    "no file_name": (coco([(9, "")], []), {("images", 0): "no image"}),
    "null": ({"images": [None], "annotations": [3]}, {("images", 0): "no image", ("annotations", 0): "no caption"}),
    "no Unicode": (coco([(10, "\ud83d.jpg")], [(10, "j")]), {"\ud83d.jpg": "no image"}),
}  # fmt: skip


def test_every_image_and_annotation_of_coco_is_a_record_or_a_counted_slot(tmp_path):
    tmp_path = tmp_path / "cats, and dogs"  # the specification has a comma too
    fill(tmp_path, {f"images/{name}.jpg": IMAGE for name in "abcdhi"} | {"images/f.heic": b""})
    for names in in_pairs(COCO, 4):
        whole: dict = {"images": [], "annotations": []}
        wanted = {}
        for content, slots in map(COCO.get, names):
            before = {kind: len(listed) for kind, listed in whole.items()}
            for key, found in slots.items():
                wanted[key if isinstance(key, str) else f"{key[0]}[{before[key[0]] + key[1]}]"] = found
            for kind, listed in content.items():
                whole[kind] += listed
        (tmp_path / "captions.json").write_text(json.dumps(whole))
        if not any(isinstance(image, dict) and image["file_name"] for image in whole["images"]):
            continue  # nothing but faults: one sentence
        assert outcome(open_source(f"coco:{tmp_path}/captions.json,{tmp_path}/images")) == wanted, names


def test_nothing_is_written_into_the_source(tmp_path, monkeypatch, capsys):
    """A picture of examples would be a record of the next report."""
    fill(tmp_path, {"pictures/a.jpg": IMAGE, "pictures/a.txt": b"a"})
    spec = f"folder:{tmp_path}/pictures"
    for option in ("--picture", "--dropped"):
        assert main(["data", spec, option, f"{tmp_path}/pictures/out"]) == 2
        assert "expected a place outside of folder:" in capsys.readouterr().err
    for inside, other in (("pictures/run", f"tfds:image_folder/pictures@{tmp_path}"), ("pictures", spec)):
        with pytest.raises(UserError, match="expected a place outside of"):
            check_outside(other, tmp_path / inside)
    check_outside(f"tfds:image_folder/pictures@{tmp_path}", tmp_path / "run")
    training = ["train", "--config=configs/dvae.py:demo", f"--config.run.data.train={spec}", "--workdir"]
    assert main([*training, f"{tmp_path}/pictures/run"]) == 2
    assert "expected a place outside of folder:" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "pictures")
    assert main(["data", "folder:."]) == 0
    out, err = capsys.readouterr()
    assert "good     1" in out and "examples" not in out and "no examples are drawn without --picture" in err
    assert sorted(os.listdir()) == ["a.jpg", "a.txt"]
    monkeypatch.chdir(tmp_path)
    assert main(["data", spec, "--picture", "named"]) == 0
    assert "examples named" in capsys.readouterr().out and pathlib.Path("named").read_bytes().startswith(b"\x89PNG")


def test_a_report_is_printed_before_the_picture_that_may_fail(tmp_path, monkeypatch, capsys):
    fill(tmp_path, {"pictures/a.jpg": IMAGE, "pictures/a.txt": b"a"})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "contact_sheet", full)
    assert main(["data", f"folder:{tmp_path}/pictures", "--json", "--picture", f"{tmp_path}/x.png"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["good"] == 1 and "No space left" in err and not (tmp_path / "x.png").exists()
    monkeypatch.setattr(files, "probe", full)
    monkeypatch.chdir(tmp_path)
    assert main(["data", "folder:pictures"]) == 0  # as in a folder that is read-only
    assert "good     1" in capsys.readouterr().out


REPORTS = ROOT / "../shared/data/reports"  # after public reports of users; each oddity is among the generated ones
SHARED = {
    "caption_TXT_upper_case": {"IMG_0.JPG": ("a caption",)},
    "caption_is_a_directory": {"0.jpg": "no caption"},
    "caption_line_separators": {f"{i}.jpg": (f"a dog{c}on a beach",) for i, c in enumerate("\u2028\x0b\x0c\x85\x1e")},
    "heic_beside_jpg": {"0.jpg": ("a",), "1.HEIC": "unsupported image", "2.HEIC": "unsupported image"},
    "metadata_absolute_path": {"0.jpg": "no caption", "/data/elsewhere/my_pictures/0.jpg": "outside the folder"},
    "metadata_csv_unquoted_comma": {"0.jpg": "bad csv"},
    "metadata_one_bad_line": {"0.jpg": ("a",), "1.jpg": "no caption", "2.jpg": ("c",), "metadata.jsonl:2": "bad json"},
    "metadata_rows_of_one_picture": {"0.jpg": ("caption 0", "caption 1", "caption 2")},
    "png_broken_exif": {"0.png": ("a",)},
}


@pytest.mark.skipif(not REPORTS.is_dir(), reason=f"the shared reports are not here: {REPORTS}")
@pytest.mark.parametrize("name", SHARED)
def test_shared_reports(name):
    source = open_source(f"folder:{REPORTS / name}")
    assert outcome(source) == SHARED[name]
    assert all(decode_image(slot.image).shape[2] == 3 for slot in source if isinstance(slot, Record))
