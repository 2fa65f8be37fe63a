"""The command line: help and version at once, exit status, one line instead of a traceback."""

import argparse
import importlib
import os
import subprocess
import sys
import types

import pytest

import dalle_jax
from dalle_jax.cli import main as cli
from dalle_jax.data.sources import cache
from dalle_jax.errors import UserError


def run(*words):
    return subprocess.run([sys.executable, "-m", "dalle_jax.cli", *words], capture_output=True, text=True, timeout=120)


@pytest.fixture
def verbs(monkeypatch):
    """Two small verbs instead of the real ones; returns the list of namespaces that their `main` got."""
    called = []

    def add_arguments(parser):
        parser.add_argument("source", nargs="?")
        parser.add_argument("--config")
        parser.add_argument("--seed", type=int, default=0)

    def main(args):
        called.append(args)
        if args.source == "missing":
            raise UserError("expected a folder, got 'missing': make it first")
        if args.source == "interrupt":
            raise KeyboardInterrupt
        if args.source == "defect":
            raise ZeroDivisionError
        return 3 if args.source == "three" else 0

    module = types.ModuleType("small_verb")
    module.add_arguments, module.main = add_arguments, main
    monkeypatch.setitem(sys.modules, "small_verb", module)
    small = {"train": ("small_verb", "a"), "data": ("small_verb", "b")}
    monkeypatch.setattr(cli, "VERBS", small)
    return called


def test_help_lists_every_verb_without_loading_jax():
    code = (
        "import sys; from dalle_jax.cli import main as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'jax', 'numpy', 'flax', 'PIL'} & sys.modules.keys(), 'help loads heavy modules'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for verb, (_, summary) in cli.VERBS.items():
        assert verb in done.stdout and summary.split()[0] in done.stdout


def options(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for family in action.choices.values():
                yield from options(family)
        elif action.option_strings and action.dest != "help" and action.help != argparse.SUPPRESS:
            yield action


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_gives_every_option_words_and_its_default(verb, capsys):
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.VERBS[verb][0]).add_arguments(parser)
    for option in options(parser):
        assert option.help and (option.required or "default" in option.help), option.option_strings
    with pytest.raises(SystemExit) as exit_:
        cli.main([verb, "--help"])
    assert exit_.value.code == 0 and f"dalle-jax {verb}" in capsys.readouterr().out


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"dalle-jax {dalle_jax.__version__}\n")


def test_wrong_words_end_in_one_line_and_status_2():
    done = run("drain")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "'drain'" in done.stderr and "train" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "VERB"),
        (["data", "--see=1"], "--see"),  # no abbreviations: they would change meaning with the next option
        (["data", "--seed=many"], "many"),
        (["data", "here", "--config.model.width=3"], "train"),
        (["train", "--config.model.width", "3"], "="),
        (["data", "missing"], "make it first"),
        (["data", "here", "--sead=1"], "(see `dalle-jax data --help`)"),
        (["data", "-red"], "if -red is no option, put -- before it (see `dalle-jax data --help`)"),
    ],
)
def test_user_errors(words, says, verbs, capsys):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("dalle-jax: error: ") and says in err


def test_a_reader_that_has_had_enough_ends_the_command_quietly():
    """`dalle-jax data ... | head`: no traceback, and the status that shells give to a closed pipe."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "dalle_jax.cli", "data", "scenes:val", "--limit=2", "--json"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 141 and "Error" not in done.stderr


def test_the_verbs_own_exit_status(verbs):
    assert cli.main(["data", "three"]) == 3
    assert cli.main(["data", "--seed", "4", "--", "-red"]) == 0
    assert [(args.source, args.seed) for args in verbs] == [("three", 0), ("-red", 4)]
    assert not hasattr(verbs[0], "overrides")


def test_overrides_go_to_train_in_order_whatever_is_in_them(verbs):
    words = ["train", "--config.a.b=1", "--config", "configs/x.py:demo", "--config.source=folder:my pictures", "here"]
    assert cli.main(words) == 0
    (args,) = verbs
    assert args.overrides == ["--config.a.b=1", "--config.source=folder:my pictures"]
    assert (args.config, args.source) == ("configs/x.py:demo", "here")


def test_a_tilde_is_home_where_a_path_begins_with_it(verbs, monkeypatch):
    """Shells leave the one after a = as it is, launchers and services every one."""
    monkeypatch.setenv("HOME", "/me")
    words = ["train", "~/in", "--config=~/x.py:demo", "--config.tokenizer=~/t", "--config.name=a~/b"]
    assert cli.main(words) == cli.main(["data", "~ no path"]) == cli.main(["data", "~100 stars"]) == 0
    assert [args.source for args in verbs] == ["/me/in", "~ no path", "~100 stars"]
    assert verbs[0].config == "/me/x.py:demo"
    assert verbs[0].overrides == ["--config.tokenizer=/me/t", "--config.name=a~/b"]
    monkeypatch.setenv(cache.VARIABLE, "~/cache")
    assert str(cache.folder()) == "/me/cache"


def test_interrupt_is_130(verbs, capsys):
    assert cli.main(["data", "interrupt"]) == 130
    assert capsys.readouterr().err == "dalle-jax: interrupted\n"


def test_defects_keep_their_traceback(verbs):
    with pytest.raises(ZeroDivisionError):
        cli.main(["data", "defect"])


def test_the_package_has_a_lazy_pipeline_and_nothing_else():
    with pytest.raises(AttributeError, match="Piepline"):
        _ = dalle_jax.Piepline
