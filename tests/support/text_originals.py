"""The original text tokenizers of published models as functions of a caption, on files that `write` makes of a golden.

Those of YouTokenToMe, dalle-mini and min-dalle come from their packages, of which single files are taken: the packages
themselves no longer import. minDALL-E's is the class of the package `tokenizers` that it uses.
"""

import importlib.util
import json
import sys
import types

import pytest
import tokenizers

WHY = "the comparison takes the originals: see the step text_tokenizers of .ci/run"


def write(folder, golden):
    """The files of all four as their users have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for names, key in (
        (("bpe-16k-vocab.json", "bpe-16k-merges.txt"), "mindalle"),
        (("vocab.json", "merges.txt"), "bart"),
    ):
        (folder / names[0]).write_text(json.dumps(golden[key]["vocab"]), encoding="utf-8")
        (folder / names[1]).write_text("\n".join(["#version: 0.2", *golden[key]["merges"], ""]), encoding="utf-8")
    merges = [tuple(merge.split(" ")) for merge in golden["bart"]["merges"]]
    bart = tokenizers.ByteLevelBPETokenizer(golden["bart"]["vocab"], merges)
    bart.save(str(folder / "tokenizer.json"))
    (folder / "bpe.model").write_text(golden["malevich"], encoding="utf-8")
    lines = [f"{word} {10**6 - rank}" for rank, word in enumerate(golden["words"])]
    (folder / "enwiki-words-frequency.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def mindalle(folder):
    files = [str(folder / name) for name in ("bpe-16k-vocab.json", "bpe-16k-merges.txt")]
    tokenizer = tokenizers.CharBPETokenizer.from_file(*files, unk_token="[UNK]", lowercase=True, dropout=None)
    tokenizer.add_special_tokens(["[PAD]"])
    return lambda caption: tokenizer.encode(caption).ids


def malevich(folder):
    youtokentome = pytest.importorskip("youtokentome", reason=WHY)
    tokenizer = youtokentome.BPE(str(folder / "bpe.model"))
    return lambda caption: tokenizer.encode([caption.lower().strip()])[0]


def min_dalle(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    tokenizer = _module("min_dalle", "text_tokenizer.py").TextTokenizer(vocab, merges)
    return lambda caption: tokenizer.tokenize(caption)[1:-1]


def caption_normalizer(folder):
    """With one word for <person>, which it draws at random."""
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = lambda *args, filename: str(folder / filename)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", hub)
        module = _module("dalle_mini", "model/text.py")
    module.person_token = [("a person", 1)]
    return module.TextNormalizer()


def dalle_mini(folder):
    transformers = pytest.importorskip("transformers", reason=WHY)
    normalize = caption_normalizer(folder)
    tokenizer = transformers.BartTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return lambda caption: tokenizer(normalize(caption), add_special_tokens=False)["input_ids"]


def _module(package, file):
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{WHY}, got no {package}")
    (folder,) = found.submodule_search_locations
    spec = importlib.util.spec_from_file_location(f"{package}_original", f"{folder}/{file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
