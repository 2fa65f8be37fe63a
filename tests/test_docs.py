"""The examples of the documentation run with a tiny random model; what pages link to and name is there."""

import json
import pydoc
import re
import shlex
from pathlib import Path

import jax
import pytest
from PIL import Image

import dalle_jax
from dalle_jax import config
from dalle_jax.cli import main
from tests.support import ROOT
from tests.support.tiny_model import BrightIsBest

DOCS = ROOT / "docs"
# A line that begins with a command, after what sets it up.
COMMAND = re.compile(
    r"(?m)^(?:    )?(?:\$ )?(?:[^`\n]* )?"
    r"(dalle-jax|launch/(?:local\.sh|slurm\.sbatch|tpu_pod\.sh run)) (?!serves )([^`$\n]*)$"
)
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("benchmarks/results/*.md")]


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[list[str]]:
    """The words of every `dalle-jax` command of a page, and of those that its launchers would give."""
    found = []
    for program, rest in COMMAND.findall(text.replace("\\\n", " ")):
        words = [word for word in shlex.split(rest, comments=True) if word != "..."]  # what a page leaves out
        if program != "dalle-jax":
            words = ["train", "--config", words[0], "--workdir", *words[1:]]
        found.append(words + ["--workdir=DIR"] * (words[0] == "train" and "--workdir" not in words))
    return found


def test_every_page_is_in_the_list_of_pages():
    listed = re.findall(r"^- \[(\w+\.md)\]", (DOCS / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted({path.name for path in DOCS.glob("*.md")} - {"README.md"})


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.json")), ids=page_name)
def test_json_is_json(path):
    json.loads(path.read_text())


def test_the_table_in_readme_lists_every_verb():
    table = (ROOT / "README.md").read_text().partition("| `dalle-jax` |")[2].partition("\n\n")[0]
    listed = [verb for line in table.splitlines()[1:] for verb in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(listed) == sorted(main.VERBS)


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=page_name)
def test_files_that_are_named_exist(path):
    text = path.read_text()
    named = re.findall(r"\b((?:tests|docs/make|launch|configs|\.ci)/[\w/.-]*\w)", text)
    named += [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (benchmarks\.[\w.]+)", text)]
    named += [f"dalle_jax/{name}" for name in re.findall(r"`(?:dalle_jax/)?(\w+/[\w/]+\.py)`", text)]
    for file, words in re.findall(r"pytest (?:-\S+ )*(tests/[\w/]+\.py) -k \"?([\w ]+)", text.replace("\n", " ")):
        tests = re.findall(r"def test_(\w+)", (ROOT / file).read_text())
        assert all(any(word in test for test in tests) for word in words.split(" or ")), words
    for name in set(named) - {name for name in named if "NAME" in name}:
        assert (ROOT / name).exists() or (ROOT / name.removeprefix("dalle_jax/")).exists(), name


def test_the_api_page_names_what_is_there():
    pattern = r"auto(?:class|function|module):: ([\w.]+)(?:\n   :members: (\w[\w, ]*))?"
    named = re.findall(pattern, (DOCS / "api.md").read_text())
    for name, members in named:
        for part in [name, *(f"{name}.{member}" for member in members.split(", ") if member)]:
            assert pydoc.locate(part) is not None, part


def test_commands_are_found_in_every_form():
    page = "    $ dalle-jax data a  # look\n\nA=1 launch/local.sh c 'w x' \\\n  --config.k=v\nx && dalle-jax demo\n"
    assert commands(page) == [["data", "a"], ["train", "--config", "c", "--workdir", "w x", "--config.k=v"], ["demo"]]


@pytest.mark.parametrize("path", [page for page in PAGES if "dalle-jax" in page.read_text()], ids=page_name)
def test_commands_parse(path):
    for words in commands(path.read_text()):
        args = main.parse(words)
        if words[0] in main.OVERRIDDEN and (args.config or "").startswith("configs/"):
            config.load(args.config, args.overrides)


def python_of(name: str) -> str:
    """All Python of a page as one program, on the lines where it stands."""
    text = (DOCS / name).read_text()
    code = ["\n"] * len(text.splitlines())
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first = text[: block.start(1)].count("\n")
        lines = block[1].splitlines(keepends=True)
        code[first : first + len(lines)] = lines
    return "".join(code)


def load_anything(monkeypatch, model, path):
    """`Pipeline.load(path)` loads a random model that can rank and guide.

    Its batches are of four, so that one program draws most of the pictures.
    """
    load = dalle_jax.Pipeline.load

    def loaded(asked, **kwargs):
        assert asked == path
        pipe = load(model, devices=jax.devices()[:1], **kwargs)
        pipe.generator.can_guide, pipe.reranker = True, BrightIsBest()
        monkeypatch.setattr(pipe, "_capacity", {False: (4, "4 at a time"), True: (4, "4 at a time")})
        return pipe

    monkeypatch.setattr(dalle_jax.Pipeline, "load", loaded)
    tokenizer = dalle_jax.ImageTokenizer.load
    monkeypatch.setattr(dalle_jax.ImageTokenizer, "load", lambda asked: tokenizer({path: model}[asked]))


def run_page(name, model, monkeypatch, folder, *, path, top_k):
    """The names that the Python of a page sets. top_k: in it, more than the vocabulary of the random model has."""
    load_anything(monkeypatch, model, path)
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(python_of(name).replace(f"top_k={top_k}", "top_k=9"), name, "exec"), names)
    assert [picture.seed for picture in names["pictures"]] == [0, 1, 2, 3]
    return names


def test_readme(model_folder, tmp_path, monkeypatch):
    run_page("../README.md", model_folder, monkeypatch, tmp_path, path="demo/transformer", top_k=50)
    assert Image.open("picture.png").info["seed"] == "0" and Path("so_far.png").exists()


def test_sampling(model_folder, tmp_path, monkeypatch):
    names = run_page("sampling.md", model_folder, monkeypatch, tmp_path, path="runs/transformer", top_k=200)
    assert Image.open("first.png").info["seed"] == "0" and Path("half-0.png").exists()
    assert names["best"][0].score >= names["best"][1].score and len(names["close"]) == 4
    assert [len(pictures) for pictures in (names["red"], names["star"])] == [4, 4]
    assert len(names["completed"]) == 4 and names["completed"][0].settings["keep_rows"] == 1
    assert names["tokens"].shape == (4, 4, 4) and names["pixels"].shape == (4, 16, 16, 3)
    megabytes = [round(names[name] / 1e6) for name in ("kept_bytes", "read_bytes", "text_bytes")]
    assert megabytes == [287, 35, 260]
