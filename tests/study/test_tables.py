"""Studies: every row of every table is an experiment of its own; a table is trained, recognized and continued."""

from __future__ import annotations

import json

import pytest

from duolect.config import digest
from duolect.recipes.asr import RECIPES
from duolect.study.tables import TABLES, Study


@pytest.mark.parametrize("recipe", ["speech_llm", "loquacious_speech_llm"])
@pytest.mark.parametrize("table", TABLES)
def test_rows_differ(table: str, recipe: str) -> None:
    experiments = Study(table, RECIPES[recipe](["train"], ["dev"], ""), "test").experiments()
    assert list(experiments) == list(TABLES[table])
    if recipe == "speech_llm" or table != "prompts":  # whose last row is what the paper's recipe does anyway
        assert len({digest(x) for x in experiments.values()}) == len(experiments)


def test_a_table_is_trained_recognized_and_continued(zoo, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from duolect.cli import study as command

    corpus = str(zoo["corpus"])
    changes = (
        f"encoder.model={zoo['am']}",
        f"llm.model={zoo['llm']}",
        "llm.dims.adapter.labels=false",
        "llm.dims.adapter.kind=concat",
        "training.seconds=null",
        "training.steps=2",
        "held_out=0",
        "max_share_lost=0.9",
    )
    names = ("sllm-greedy", "sllm+ctc-label")
    assert command.study("prompts", (corpus,), corpus, tmp_path / "out", set=(changes,), decodings=names, limit=3, device="cpu") == 0
    table = capsys.readouterr().out
    assert "CTC greedy" in table and all(f"{title}: greedy" in table and f"{title}: + CTC" in table for title in TABLES["prompts"])
    assert (tmp_path / "out" / "table.md").is_file() and (tmp_path / "out" / "table.json").is_file()

    before = json.loads((tmp_path / "out" / "table.json").read_text())["table"]["rows"]
    monkeypatch.setattr("duolect.study.tables.run", lambda *x, **y: pytest.fail("trained again"))
    monkeypatch.setattr("duolect.recognize.recognizer.Recognizer.recognize", lambda *x, **y: pytest.fail("recognized again"))
    assert command.study("prompts", (corpus,), corpus, tmp_path / "out", set=(changes,), decodings=names, limit=3, device="cpu") == 0
    after = json.loads((tmp_path / "out" / "table.json").read_text())["table"]["rows"]
    assert [(row["system"], row["wer"]) for row in after] == [(row["system"], row["wer"]) for row in before]


def test_wrong_tables_are_refused(tmp_path) -> None:
    from duolect.cli import study as command

    with pytest.raises(ValueError, match="table 'atention' is unknown, is attention meant"):
        command.study("atention", ("train",), "test", tmp_path / "out")
    with pytest.raises(ValueError, match="recipe mini has no speech LLM"):
        command.study("attention", ("train",), "test", tmp_path / "out", recipe="mini")
