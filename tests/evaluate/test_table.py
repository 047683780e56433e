from __future__ import annotations

import json

import pytest

from duolect.evaluate.normalize import normalizer
from duolect.evaluate.table import json_table, markdown_table, plain_table, rows
from duolect.evaluate.wer import ScoreError
from tests.evaluate.lines import score

NONE = normalizer("none")
REFERENCES = {f"u{i}": "a b c d e" for i in range(40)}
DOMAINS = {k: "read" if i % 2 else "call" for i, k in enumerate(REFERENCES)}


def scored(every: int, *, failed: int = 0, seconds: float = 0.0):
    hypotheses = {k: None if i < failed else "a x c d e" if i % every == 0 else v for i, (k, v) in enumerate(REFERENCES.items())}
    return score(REFERENCES, hypotheses, normalizer=NONE, domains=DOMAINS, seconds=seconds, corpus="toy")


@pytest.fixture(scope="module")
def table():
    return rows({"ctc greedy": scored(1, seconds=2.0), "rescoring": scored(2, seconds=12.0), "one | pass": scored(4, failed=1)})


def test_plain_table(table):
    text = plain_table(table)
    lines = text.splitlines()
    assert " ".join(lines[0].split()) == "system WER % 95% S D I words call read failed RTF vs first 95% of it p"
    assert lines[2].startswith("ctc greedy  20.00  [20.00, 20.00]  40  0  0    200  20.00  20.00")
    assert lines[3].split()[:3] == ["rescoring", "10.00", "[7.00,"]
    assert "-10.00" in lines[3] and "<0.001" in lines[3] and "0.12" in lines[3]
    assert "0.02" in lines[2] and "vs" not in lines[2]
    assert text.isascii() and text.endswith("\n") and "\x1b" not in text
    assert "norm:none@1|" in text and "one | pass: 1 utterances failed and count as deleted: u0" in text
    rule = lines[1]
    assert {len(line) <= len(rule) for line in lines[:5]} == {True}


def test_markdown_table(table):
    lines = markdown_table(table).splitlines()
    cells = lines[0].count("|")
    assert lines[1] == "| :-- |" + " --: |" * (cells - 2)
    assert [line.count("|") - line.count("\\|") for line in lines[:5]] == [cells] * 5
    assert "one \\| pass" in lines[4]
    assert lines[5] == "" and lines[6].startswith("- `norm:")


def test_json_table(table):
    data = json.loads(json.dumps(json_table(table), allow_nan=False))
    first, second, third = data["rows"]
    assert first["against_first"] is None
    assert second["against_first"]["difference"] == pytest.approx(-10.0)
    assert (first["rtf"], third["rtf"]) == (pytest.approx(0.02), None) and third["audio_seconds"] == pytest.approx(97.5)
    assert second["domains"]["call"]["wer"] == 20.0
    assert third["failed"] == ["u0"]


def test_columns_that_say_nothing_are_left_out():
    text = plain_table(rows({"only": score({"a": "x y"}, {"a": "x"}, normalizer=NONE)}))
    assert text.splitlines()[0].split() == ["system", "WER", "%", "S", "D", "I", "words"]


def test_systems_on_other_utterances_are_refused():
    with pytest.raises(ScoreError, match="not scored on the same utterances"):
        rows({"a": scored(1), "b": score({"a": "x"}, {"a": "x"}, normalizer=NONE)})


def test_utterances_that_run_away_are_counted():
    hypotheses = {k: "a b c d e " * 2 if i < 4 else "a b c d e f g h i" if i < 8 else v for i, (k, v) in enumerate(REFERENCES.items())}
    ran, still = score(REFERENCES, hypotheses, normalizer=NONE), scored(1)
    assert (ran.runaways, still.runaways) == (4, 0)
    text = plain_table(rows({"still": still, "ran": ran}))
    assert "runaway %" in text.splitlines()[0] and "10.0" in text.splitlines()[3]
    assert "runaway" not in plain_table(rows({"still": still}))
    assert json_table(rows({"ran": ran}))["rows"][0]["runaways"] == 4
