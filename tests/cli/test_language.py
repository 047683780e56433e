"""duolect lm finetune, train, text, ppl."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from duolect.cli.language import finetune, train
from tests.models.test_finetuned import sources
from tests.models.test_speech_llm import TEXTS
from tests.recipes.test_language import text, units

__all__ = ["sources", "text", "units"]


def test_a_text_is_not_written_over(duolect, tmp_path):
    (tmp_path / "t.txt").write_text("Some text here\n")
    for command in (["lm", "text", tmp_path / "t.txt", "--out"], ["lm", "ppl", "--lm", "x", "--text", tmp_path / "t.txt", "--json"]):
        code, _, err = duolect(*command, tmp_path / "t.txt")
        assert code == 2 and "is what is to be read" in err and (tmp_path / "t.txt").read_text() == "Some text here\n"


def test_the_command_line(text: Path, units: Path, sources: dict[str, Path], tmp_path: Path, duolect) -> None:
    quick = ["training.epochs=null", "training.steps=2", "training.precision=fp32", "training.schedule.steps=1", "learning.checked=4"]
    common = ["--text", text, "--check", text, "--set", *quick]
    code, out, err = duolect(
        "lm", "finetune", sources["qwen2"], *common, "dims.lora.targets=q_proj,v_proj", "--learns", "lora", "--out", tmp_path / "a"
    )
    assert code == 0 and "text word PPL" in out, err
    code, out, err = duolect("lm", "train", *common, "model.dim=16", "model.heads=1", "--units", units, "--out", tmp_path / "b")
    assert code == 0 and "text word PPL" in out, err
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps({"text": x.upper(), "domain": d}) + "\n" for x, d in zip(TEXTS, "aabb" * 40, strict=False)))
    code, out, err = duolect(
        "lm",
        "ppl",
        "--lm",
        tmp_path / "a/model",
        tmp_path / "b/model",
        "--text",
        text,
        manifest,
        "--json",
        tmp_path / "p.json",
        "--limit",
        12,
    )
    rows = json.loads((tmp_path / "p.json").read_text())
    assert code == 0 and [r["domain"] for r in rows] == ["all", "all", "a", "b"] * 2, err
    assert all(r["word_interval"]["low"] <= r["word_ppl"] <= r["word_interval"]["high"] for r in rows if r["word_interval"])
    assert rows[0]["word_ppl"] != rows[4]["word_ppl"] and f"{rows[0]['word_ppl']:.1f}" in out
    assert duolect("lm", "finetune", sources["qwen2"], "--text", tmp_path / "none.txt")[::2] == (
        2,
        f"duolect: {tmp_path / 'none.txt'}: cannot be read (No such file or directory): name a text file or a manifest\n",
    )


def test_the_two_ways_to_a_language_model_have_folders_of_their_own() -> None:
    assert len({inspect.signature(command).parameters["out"].default for command in (finetune, train)}) == 2


def test_short_texts_and_unknown_words_are_said(text: Path, units: Path, sources: dict[str, Path], tmp_path: Path, duolect) -> None:
    small = ["model.dim=16", "model.heads=1", "model.layers=1", "training.precision=fp32"]
    same = tmp_path / "other" / text.name
    same.parent.mkdir()
    same.write_text(text.read_text())
    code, out, err = duolect(
        "lm", "train", "--text", text, "--check", text, same, "--units", units, "--set", *small, "--out", tmp_path / "a"
    )
    assert code == 0 and "updates, so it learns little" in err and f"{text} word PPL" in out and f"{same} word PPL" in out, err
    (tmp_path / "odd.txt").write_text(TEXTS[0] + "\n\u4f60\u597d\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    code, out, err = duolect("lm", "ppl", "--lm", tmp_path / "a/model", "--text", tmp_path / "odd.txt", text)
    assert code == 0 and err.count("do not compare its perplexity") == 1, err
    assert "50% of the sentences have words or letters that it does not know, such as '\u4f60\u597d'" in err
    code, out, err = duolect("lm", "ppl", "--lm", tmp_path / "a/model", "--text", tmp_path / "empty.txt")
    assert (code, err) == (
        2,
        f"duolect: {tmp_path / 'empty.txt'}: has no sentence: name a text with one a line, or a manifest with texts\n",
    )
    code, out, err = duolect("lm", "ppl", "--lm", tmp_path / "a", "--text", text)
    assert (code, err.splitlines()[-1]) == (
        2,
        f"duolect: {tmp_path / 'a'}: is the folder of a training run: name {tmp_path / 'a' / 'model'}",
    )
    code, out, err = duolect("lm", "finetune", sources["qwen2"], "--text", text, "--learns", "nothing", "--out", tmp_path / "b")
    assert code == 2 and "is to learn: name new units with --units" in err and not (tmp_path / "b").exists()
    code, out, err = duolect("lm", "finetune", tmp_path / "a.arpa", "--text", text)
    assert code == 2 and "a.arpa: is an n-gram, expected a causal language model" in err


def test_a_text_of_a_domain_without_what_is_tested(tmp_path: Path, duolect) -> None:
    (tmp_path / "all.txt").write_text("Press 1.\nThe room is Locked!\nThe room that we saw is locked.\nNow the room is locked\n(tone)\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "the room is locked"}) + "\n")
    out = tmp_path / "domain.txt"
    code, said, err = duolect("lm", "text", tmp_path / "all.txt", "--out", out, "--without", tmp_path / "test.jsonl")
    assert code == 0 and out.read_text() == "press one\nthe room that we saw is locked\n", err
    assert said == f"{out}: 2 sentences, 9 words; left out: 1 that are tested, 1 that share 5 words in a row with one\n"
    code, _, err = duolect("lm", "text", tmp_path / "test.jsonl", "--out", out, "--without", tmp_path / "test.jsonl")
    assert code == 2 and "of 1 sentences 1 are tested and 0 nearly: nothing is left" in err and len(out.read_text()) > 30
