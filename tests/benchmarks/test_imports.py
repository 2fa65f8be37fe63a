"""Benchmarks and makers of figures fit the package: each imports, those of other environments aside."""

import importlib
import importlib.util

import pytest

from tests.support import ROOT

OTHERS = (
    "peer_dalle_pytorch",
    "peer_loaders",
    "peer_openai_dvae",
    "peer_pytorch_fid",
    "peer_emu3",
    "peer_taming",
)  # import what only a peer's has
SCRIPTS = [path for folder in ("benchmarks", "docs/make") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem not in OTHERS], ids=lambda path: path.stem)
def test_a_script_imports(path, monkeypatch):
    if path.is_relative_to(ROOT / "benchmarks"):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        return
    monkeypatch.syspath_prepend(path.parent)  # as when it is run
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
