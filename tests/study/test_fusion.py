"""The fusion study: which rows, by which scales, made once."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from duolect.data.sources import open_source
from duolect.recognize.decoding import Language, Prior, TimeSynchronous
from duolect.recognize.files import decode_to_files
from duolect.recognize.models import Models
from duolect.recognize.recognizer import Recognizer
from duolect.scorer import read_hypotheses
from duolect.search.fusion import Every, EveryLabel
from duolect.study.fusion import FusionStudy, _same_models, _Study, measured


@pytest.fixture
def study(zoo: dict[str, Path], tmp_path: Path) -> FusionStudy:
    lines = (zoo["corpus"] / "manifest.jsonl").read_text().splitlines()
    for name, part in (("one", lines[:4]), ("two", lines[4:])):
        folder = tmp_path / name
        folder.mkdir()
        written = [{**json.loads(x), "audio_filepath": str(zoo["corpus"] / json.loads(x)["audio_filepath"])} for x in part]
        (folder / "manifest.jsonl").write_text("".join(json.dumps(x) + "\n" for x in written))
    lms = {"unit": str(zoo["unit"]), "llm": str(zoo["llm"])}
    corpora = (str(tmp_path / "one"), str(tmp_path / "two"))
    return FusionStudy(str(zoo["am"]), lms, *corpora, ("softmax", "counts"), intervals=(1, 3), beams=(1, 4), interval=3, beam=4, nbest=6)


def test_every_row_is_the_decoding_of_its_title(
    study: FusionStudy, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    table = measured(study, tmp_path / "out", replace(models, say=said.append))
    rounds = [x.split(": ", 1) for x in said if x.startswith("decoding ")]
    assert [x for x, _ in rounds] == [f"decoding {i} of 9" for i in range(1, 10)] and rounds[1][1] == "tune, + unit"
    assert {x for _, names in rounds for x in names.split("; ")} >= {"CTC greedy", "+ llm - counts prior, every 3"}
    titles = [row.system for row in table]
    assert titles[:5] == ["CTC greedy", "CTC beam 4", "+ unit, 6-best rescoring", "+ unit - softmax prior, 6-best rescoring",
                          "+ unit - counts prior, 6-best rescoring"]  # fmt: skip
    for kind in ("", " - softmax prior", " - counts prior"):
        assert {f"+ unit{kind}, label-wise", f"+ llm{kind}, every 3", f"+ llm{kind}, 6-best rescoring"} <= set(titles)
    assert sum(", every 1" in t for t in titles) == 1 and sum("word end" in t for t in titles) == 1
    assert sum(", beam 1" in t for t in titles) == 2 and not any(", beam 4" in t for t in titles)
    assert all(row.score.errors.words == table[0].score.errors.words for row in table)

    # One row by hand: the scales of the file, the prior in step.
    scales = json.loads((tmp_path / "out/scales/llm-softmax-one-pass.json").read_text())["scales"]
    terms = {
        "lm": Language(study.lms["llm"], scales["llm"], Every(3)),
        "prior": Prior("softmax", scales["softmax"], Every(3), words=True),
    }
    recognizer = Recognizer(models, study.am, {"x": TimeSynchronous(4, terms)})
    again = decode_to_files(recognizer, open_source(study.test).utterances, {"x": tmp_path / "x.jsonl"}, progress=False)["x"]
    (made,) = (tmp_path / "out/hypotheses").glob("llm-softmax-prior-every-3-*.jsonl")
    assert [r.text for r in again] == [r.text for r in read_hypotheses(made)]

    def never(*a: object, **b: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("duolect.recognize.recognizer.Recognizer.recognize", never)
    monkeypatch.setattr("duolect.study.fusion.rescored", never)
    assert [(r.system, r.score.errors) for r in measured(study, tmp_path / "out", models)] == [(r.system, r.score.errors) for r in table]


def test_what_is_immediate_is_not_held(study: FusionStudy, models: Models, tmp_path: Path) -> None:
    work = _Study(study, models, tmp_path)
    utterances = open_source(study.tune).utterances
    lists = work.lists("tune", utterances)
    tuned = {kind: work.tuned("llm", kind, lists, utterances)[1] for kind in work.kinds("llm")}
    made = work.one_pass("llm", tuned, "counts")
    at_once, held = (
        made["+ llm - counts prior, every 3, prior at once"].terms["prior"],
        made["+ llm - counts prior, every 3"].terms["prior"],
    )
    assert isinstance(at_once, Prior) and isinstance(held, Prior)
    assert (at_once.words, at_once.when, held.words, held.when) == (False, EveryLabel(), True, Every(3))
    assert at_once.scale == held.scale == tuned["counts"].scales["counts"]


def test_a_folder_of_other_or_changed_models_is_refused(study: FusionStudy, tmp_path: Path) -> None:
    _same_models(replace(study, nbest=9), tmp_path)  # failed before it made anything
    _same_models(study, tmp_path)
    (tmp_path / "tune.jsonl").touch()
    _same_models(replace(study, beams=(2,), lms={"llm": study.lms["llm"], "more": study.lms["unit"]}), tmp_path)
    for other in (replace(study, nbest=7), replace(study, am=study.lms["llm"]), replace(study, lms={"llm": study.lms["unit"]})):
        with pytest.raises(ValueError, match="holds a study of another or since changed --"):
            _same_models(other, tmp_path)
    weights = Path(study.lms["llm"]) / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**12))
    with pytest.raises(ValueError, match=r"changed --lm llm \(see .*models.json\): name another --out"):
        _same_models(study, tmp_path)


def test_scales_need_speech_of_their_own(study: FusionStudy, models: Models, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"are in .* and in .*: scales need speech of their own"):
        measured(replace(study, tune=study.test), tmp_path / "out", models)


def test_a_language_model_is_no_other_part(study: FusionStudy, models: Models, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is called counts, as another part"):
        measured(replace(study, lms={"counts": study.lms["llm"]}), tmp_path / "out", models)
