"""Studies: every row of every table is an experiment of its own; a table is trained, recognized and continued."""

from __future__ import annotations

import json

import pytest

from duolect.config import digest
from duolect.recipes.asr import RECIPES
from duolect.run import RunError
from duolect.study.tables import TABLES, Study


@pytest.mark.parametrize("recipe", ["speech_llm", "loquacious_speech_llm"])
@pytest.mark.parametrize("table", TABLES)
def test_rows_differ(table: str, recipe: str) -> None:
    experiments = Study(table, RECIPES[recipe](["train"], ["dev"], ""), "test").experiments()
    assert list(experiments) == list(TABLES[table])
    if recipe == "speech_llm" or table != "prompts":  # whose last row is what the paper's recipe does anyway
        assert len({digest(x) for x in experiments.values()}) == len(experiments)


@pytest.mark.parametrize("table", ["prompts", "units", "learning"])
def test_a_table_is_trained_recognized_and_continued(zoo, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys, table: str) -> None:
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
    assert command.study(table, (corpus,), corpus, tmp_path / "out", set=(changes,), decodings=names, limit=3, device="cpu") == 0
    printed = capsys.readouterr().out
    assert "CTC greedy" in printed and all(f"{title}: greedy" in printed and f"{title}: + CTC" in printed for title in TABLES[table])
    assert (tmp_path / "out" / "table.md").is_file() and (tmp_path / "out" / "table.json").is_file()

    before = json.loads((tmp_path / "out" / "table.json").read_text())["table"]["rows"]
    monkeypatch.setattr("duolect.study.tables.run", lambda *x, **y: pytest.fail("trained again"))
    monkeypatch.setattr("duolect.recognize.recognizer.Recognizer.recognize", lambda *x, **y: pytest.fail("recognized again"))
    assert command.study(table, (corpus,), corpus, tmp_path / "out", set=(changes,), decodings=names, limit=3, device="cpu") == 0
    after = json.loads((tmp_path / "out" / "table.json").read_text())["table"]["rows"]
    assert [(row["system"], row["wer"]) for row in after] == [(row["system"], row["wer"]) for row in before]
    monkeypatch.setitem(TABLES, table, {title: {**row, "llm.dims.begin": "b"} for title, row in TABLES[table].items()})
    with pytest.raises(RunError, match=r"holds a run of another recipe .*begin"):
        command.study(table, (corpus,), corpus, tmp_path / "out", set=(changes,), decodings=names, limit=3, device="cpu")


def test_how_rows_learn_is_the_users_to_say(tmp_path, monkeypatch) -> None:
    from duolect.cli import study as command

    seen = []
    monkeypatch.setattr("duolect.study.tables.measured", lambda study, out, world: seen.append(study.experiments()) or [])
    monkeypatch.setattr("duolect.cli.options.write_tables", lambda *x, **y: None)
    for changes in ((), ("training.learning_rates.llm=1e-3", "llm.dims.learns=nothing")):
        command.study("learning", ("train",), "test", tmp_path / "out", set=(changes,), device="cpu")
    plainly, said = ({title: (x.training.learning_rates["llm"], x.llm.dims.learns) for title, x in rows.items()} for rows in seen)
    assert plainly["LoRA"] == (3e-4, "lora") and plainly["LLM whole"] == (5e-5, "all")
    assert said["LoRA"] == (1e-3, "lora") and said["LLM whole"] == (1e-3, "all")


def test_wrong_tables_are_refused(tmp_path) -> None:
    from duolect.cli import study as command

    with pytest.raises(ValueError, match="table 'atention' is unknown, is attention meant"):
        command.study("atention", ("train",), "test", tmp_path / "out")
    with pytest.raises(ValueError, match="recipe mini has no speech LLM"):
        command.study("attention", ("train",), "test", tmp_path / "out", recipe="mini")
