from __future__ import annotations

import sys
from typing import Any

import pytest

from duolect.cli import main
from tests.recognize.conftest import zoo

__all__ = ["zoo"]


@pytest.fixture
def duolect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command line; gives (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["duolect", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def with_models(zoo):
    return ["--am", zoo["am"], "--lm", zoo["llm"], "--unit-lm", zoo["unit"], "--device", "cpu"]
