"""YouTokenToMe's model files: ids worked out by hand, a slow encoder that scans the rules, and damaged files.

`test_published_tokenizers.py` compares with YouTokenToMe itself.
"""

import json
import random

import pytest

from dalle_jax.errors import UserError
from dalle_jax.text.malevich import MalevichTokenizer
from tests.support import GOLDEN

# The space 4, a 5, b 6, c 7; ab 8, _ab 9, bc 10, abc 11.
SMALL = "4 4\n9601 4\n97 5\n98 6\n99 7\n5 6 8\n4 8 9\n6 7 10\n8 7 11\n1 0 2 3\n"


def read(tmp_path, text):
    (tmp_path / "bpe.model").write_text(text, encoding="utf-8")
    return MalevichTokenizer.read(tmp_path / "bpe.model")


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("ab", [9]),
        ("abc", [9, 7]),  # rule 2 comes before rule 4
        ("aabc", [4, 5, 11]),
        ("bcabc", [4, 10, 11]),
        ("AB \t\n bC", [9, 4, 10]),
        ("  c\u2581c  ", [4, 7, 4, 7]),
        ("xab y", [4, 1, 8, 4, 1]),
        ("xyяab", [4, 1, 8]),  # what is unknown is so once
        ("xaxb", [4, 1, 5, 1, 6]),
        ("\xa0ab\xa0", [9]),  # Python strips it
        ("a\xa0b", [4, 5, 1, 6]),  # but it ends no word
        ("a\x00\ud800b", [4, 5, 1, 6]),
        ("<UNK><PAD>", [4, 1, 5, 1]),
        ("", []),
        (" \u2581 ", []),
    ],
)
def test_ids_worked_out_by_hand(tmp_path, caption, ids):
    assert read(tmp_path, SMALL).encode(caption) == ids


def test_sizes_and_marks(tmp_path):
    tokenizer = read(tmp_path, SMALL)
    assert (tokenizer.vocab_size, tokenizer.marks, tokenizer.pad) == (12, (2, 3), None)


def slow_ids(model, caption):
    """Rule by rule in the order of the file: the first that fits anywhere, at its leftmost place, again and again."""
    rows = [[int(number) for number in line.split()] for line in model.strip().split("\n")]
    (n, m), characters, rules = rows[0], dict(rows[1 : 1 + rows[0][0]]), rows[1 + rows[0][0] : -1]
    assert len(rules) == m and len(characters) == n
    ids = []
    for word in caption.lower().strip().split():
        pieces = [characters[0x2581]]
        for character in word:
            piece = characters.get(ord(character), 1)
            if piece != 1 or pieces[-1] != 1:
                pieces.append(piece)
        merged = True
        while merged:
            merged = False
            for left, right, made in rules:
                places = [i for i in range(len(pieces) - 1) if pieces[i : i + 2] == [left, right]]
                if places:
                    pieces[places[0] : places[0] + 2] = [made]
                    merged = True
                    break
        ids += pieces
    return ids


def random_model(rng, *, rules):
    """Rules of any pieces so far, not in an order that training would give, that make different strings."""
    letters = "abcя"[: rng.randrange(1, 5)]
    names = {4: "\u2581"} | {5 + i: letter for i, letter in enumerate(letters)}
    lines = [f"{ord(name)} {i}" for i, name in names.items()]
    for _ in range(rules):
        left, right = rng.choice(list(names)), rng.choice([i for i in names if "\u2581" not in names[i]])
        if (made := names[left] + names[right]) not in names.values() and len(made) < 9:
            lines.append(f"{left} {right} {len(names) + 4}")
            names[len(names) + 4] = made
    characters = len(letters) + 1
    return "\n".join([f"{characters} {len(lines) - characters}", *lines, "1 0 2 3", ""])


def test_the_slow_encoder_agrees(tmp_path):
    rng = random.Random(0)
    models = [random_model(rng, rules=rng.randrange(25)) for _ in range(40)]
    models.append(json.loads((GOLDEN / "text_tokenizers.json").read_text(encoding="utf-8"))["malevich"])
    merges = 0
    for model in models:
        tokenizer = read(tmp_path, model)
        for _ in range(60):
            caption = "".join(
                rng.choice("abcяабкош xЯ") * rng.choice([1, 1, 2, 3, 7]) for _ in range(rng.randrange(15))
            )
            ids = tokenizer.encode(caption)
            assert ids == slow_ids(model, caption), (model, caption)
            merges += max(ids, default=0) > 9
    assert merges > 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must have two numbers"),
        ("4\n", "the first line must have two numbers"),
        ("-1 4\n", "the first line must have two numbers"),
        ("\x00\x01", "damaged"),
        (SMALL.replace("4 4\n", "4 x\n"), "damaged"),
        (SMALL[:-9], "4 lines of 2 numbers, 4 of 3 and one of 4 must follow the first, got 8"),
        (SMALL.replace("4 4\n", "4 3\n"), "must follow the first, got 9"),
        (SMALL.replace("4 4\n", "3 5\n"), "must follow the first, got 9"),
        (SMALL.replace("4 4\n", "4 999999999999\n"), "must follow the first, got 9"),
        (SMALL.replace("1 0 2 3", "1 -1 2 3"), "the last line must be the marks 1 0 2 3, got 1 -1 2 3"),
        (SMALL.replace("6 7 10", "6 12 10"), "the rule in line 8 must make a new id"),
        (SMALL.replace("6 7 10", "6 11 10"), "the rule in line 8 must make a new id"),  # which a later rule makes
        (SMALL.replace("6 7 10", "6 7 9"), "the rule in line 8 must make a new id"),
        (SMALL.replace("6 7 10", "6 7 99"), "the ids must be 4 .. 11"),
        (SMALL.replace("6 7 10", "5 6 10"), "the ids must be 4 .. 11, each of another string"),
        (SMALL.replace("98 6", "97 6"), "the ids must be 4 .. 11, each of another string"),
        (SMALL.replace("98 6", "98 2"), "the rule in line 6"),
        (SMALL.replace("9601", "9602"), "U\\+2581"),
        (SMALL.replace("9601", "99999999999999999999"), "damaged"),
        (SMALL.replace("9601", "-5"), "damaged"),
        (SMALL.replace("97 5", "55296 5"), "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "the text tokenizer of malevich at" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="bpe.model, got No such file or directory: fetch the file"):
        MalevichTokenizer.read(tmp_path / "bpe.model")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="another or a damaged file"):
        MalevichTokenizer.read(tmp_path / "binary")
