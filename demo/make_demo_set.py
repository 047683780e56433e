"""Makes the embedded demo set: real recordings from registry packages whose licences allow it, as 16 kHz FLAC with a manifest.

    python demo/make_demo_set.py [--packages FOLDER] [--output src/duolect/embedded/demo] [--not-in a/manifest.jsonl ...]
    python demo/make_demo_set.py --rest --output FOLDER --not-in TRAINING/manifest.jsonl   # the other prompts, and the texts of all

Needs pip, apt-get and dpkg-deb (Debian bookworm's lists: `apt-get update`), ffmpeg for G.722, and soundfile.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from duolect.data.text import as_said

RATE = 16000
HERE = Path(__file__).resolve().parent
PYPI = "pyannote.audio==4.0.7"
DEBIAN = {"pocketsphinx-testdata": "0.8+5prealpha+1-15", "asterisk-core-sounds-en-g722": "1.6.1-1"}
TEXTS = {"asterisk-core-sounds-en": "1.6.1-1"}
SPHINX = "usr/share/pocketsphinx/test/data"
PROMPTS = "usr/share/asterisk/sounds/en_US_f_Allison"
SHORT_SECONDS = 2.0  # a shorter piece of conversation is joined with what its speaker says next
MARGIN_SECONDS = 0.1

LIBRIVOX = "public domain (LibriVox recording; package BSD-2-Clause)"
BSD = "BSD-2-Clause (Carnegie Mellon University)"
MIT = "MIT (CNRS, pyannote.audio)"
CC = "CC-BY-SA-3.0 (Allison Smith, Digium)"

# What was said where the package's transcript is missing or says something else; checked with Whisper base (README.md).
READ = {
    "0870": "and mister john dashwood had then leisure to consider how much there might be prudently in his power to do for them",
    "0880": "he was not an ill disposed young man",
    "0890": "unless to be rather cold hearted and rather selfish is to be ill disposed",
    "0920": "had he married a more amiable woman he might have been made still more respectable than he was",
    "0930": "he might even have been made amiable himself",
}
CARDS = {
    "001": "ten of clubs",
    "002": "four queen of clubs",
    "003": "seven of clubs",
    "005": "eight of spades four of clubs seven of hearts",
}
COMMANDS = {
    "goforward": "go forward ten meters",
    "something": "go somewhere and do something",
    "tidigits/dhd.2934z": "two nine three four zero",
}
# prompt: (start, end, text) of its sentences, in seconds, cut in pauses; left out: abbreviations that are spelled (P B X)
# and strings of digits, where the written forms (1234 | 1, 2, 3, 4) would count as errors
SAID: dict[str, list[tuple[float, float, str]]] = {
    "demo-instruct": [
        (0.50, 5.30, "if you would like to learn more technical information about asterisk dial two now"),
        (19.70, 24.16, "in order for this test to work you will need to be connected to the internet"),
        (32.03, 38.93, "this test is most useful when you have connected to this asterisk server from a remote location"),
        (47.63, 52.41, "that user is configured to ring the console when their extension is dialed"),
        (56.80, 62.25, "if the console is busy or unavailable you will be given the option to leave voicemail"),
        (62.25, 68.86, "to check voicemail for the user dial extension eight five zero zero to enter the voicemail system"),
    ],
    "demo-congrats": [
        (7.22, 14.14, "you have also installed a set of sample sounds and configuration files that should help you get started"),
        (15.80, 19.41, "you will navigate this demonstration by dialing digits"),
        (19.41, 30.20, "if you are using a console channel driver instead of a real phone you can use the dial answer and hang up commands "
                       "to simulate the actions of a standard telephone"),
    ],
    "basic-pbx-ivr-main": [
        (6.48, 10.51, "if you know your party's extension you may dial it at any time"),
        (10.51, 16.53, "to establish a sales partnership press one to speak with a customer advocate press two"),
        (16.53, 20.01, "for accounting and other receivables press three"),
        (20.01, 25.30, "for a company directory press four for an operator press zero"),
    ],
    "priv-callee-options": [
        (16.48, 23.12, "dial four to send this caller to a polite don't call menu now and forevermore"),
        (23.12, 31.00, "dial five to allow this caller to come straight through to you in the future but just this once "
                       "send them to voicemail"),
    ],
    "confbridge-lock-extended": [
        (0.0, 99.0, "to lock or unlock the conference when a conference is locked only conference administrators can join"),
    ],
    "confbridge-mute-extended": [
        (0.0, 99.0, "to mute or unmute yourself when you are muted you cannot send audio to other participants however you will still hear "
                    "audio from other unmuted participants"),
    ],
}  # fmt: skip


# Prompts with spelled abbreviations or a misspelled text.
WRONG = {"confbridge-binaural-off", "confbridge-binaural-on", "spy-h323", "spy-nbs", "unidentified-no-callback"}


@dataclass(frozen=True)
class Piece:
    """One utterance: samples [N] at 16 kHz and its manifest fields, except audio_filepath and duration."""

    samples: np.ndarray
    id: str
    text: str
    speaker: str
    domain: str
    licence: str
    source: str


def fetch(packages: Path, debian: dict[str, str], *, pypi: bool) -> Path:
    """The folder with all packages unpacked; downloads only what is not in `packages` yet."""
    unpacked = packages / "unpacked"
    packages.mkdir(parents=True, exist_ok=True)
    if pypi:
        if not list(packages.glob("pyannote*.whl")):
            run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", PYPI], cwd=packages)
        with zipfile.ZipFile(next(packages.glob("pyannote*.whl"))) as wheel:
            wheel.extractall(unpacked)
    for name, version in debian.items():
        if not list(packages.glob(f"{name}_*.deb")):
            run(["apt-get", "download", "--quiet", f"{name}={version}"], cwd=packages)
        run(["dpkg-deb", "--extract", str(next(packages.glob(f"{name}_*.deb"))), str(unpacked)], cwd=packages)
    return unpacked


def run(command: list[str], *, cwd: Path) -> bytes:
    done = subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.decode(errors='replace').strip()[-400:]}")
    return done.stdout


def conversation(unpacked: Path) -> Iterator[Piece]:
    """The turns of a telephone conversation, cut by its STM; greetings under a second are left out."""
    folder = unpacked / "pyannote/audio/sample"
    samples = read(folder / "sample.wav")
    turns: list[tuple[str, float, float, str]] = []
    for line in (folder / "sample.stm").read_text().splitlines():
        _, _, speaker, start, end, text = line.split(maxsplit=5)
        last = turns[-1] if turns else ("", 0.0, 0.0, "")
        if last[0] == speaker and last[2] - last[1] < SHORT_SECONDS and float(start) - last[2] < MARGIN_SECONDS:
            turns[-1] = (speaker, last[1], float(end), f"{last[3]} {text}")
        else:
            turns.append((speaker, float(start), float(end), text))
    for n, (speaker, start, end, text) in enumerate(turns):
        before = (turns[n - 1][2] + start) / 2 if n else 0.0
        after = (end + turns[n + 1][1]) / 2 if n + 1 < len(turns) else len(samples) / RATE
        piece = cut(samples, max(before, start - MARGIN_SECONDS), min(after, end + MARGIN_SECONDS))
        if end - start > 0.9:
            plain = "".join(c for c in text.lower() if c.isalpha() or c in " '")
            yield Piece(piece, f"conversation-{n:02}", plain, f"conversation_{speaker.lower()}", "conversation", MIT, f"PyPI {PYPI}")


def sphinx(unpacked: Path) -> Iterator[Piece]:
    """Sentences of a novel, playing cards and spoken commands."""
    folder = unpacked / SPHINX
    source = f"Debian pocketsphinx-testdata {DEBIAN['pocketsphinx-testdata']}"
    for number, text in READ.items():
        samples = read(folder / f"librivox/sense_and_sensibility_01_austen_64kb-{number}.wav")
        yield Piece(samples, f"librivox-{number}", text, "librivox_sense_and_sensibility", "librivox", LIBRIVOX, source)
    for number, text in CARDS.items():
        yield Piece(read(folder / f"cards/{number}.wav"), f"cards-{number}", text, "sphinx_cards", "commands", BSD, source)
    for name, text in COMMANDS.items():
        samples = np.fromfile(folder / f"{name}.raw", "<i2").astype(np.float32) / 32768
        short = name.split("/")[-1].replace(".", "-")
        yield Piece(samples, f"commands-{short}", text, f"sphinx_{short}", "commands", BSD, source)


def prompts(unpacked: Path) -> Iterator[Piece]:
    """Sentences of long telephone prompts."""
    for name, sentences in SAID.items():
        samples = prompt(unpacked, name)
        for n, (start, end, text) in enumerate(sentences):
            yield said(name, cut(samples, start, end), text, f"-{n}" if len(sentences) > 1 else "")


def rest(unpacked: Path, manifests: list[Path]) -> Iterator[Piece]:
    """The prompts of three words and more that are neither in the demo set nor in the manifests, by recording or text, each text once."""
    lines = [line for path in manifests for line in map(json.loads, path.read_text().splitlines())]
    names = {line["id"].split("__")[-1] for line in lines}
    texts = {line["text"] for line in lines}
    for name, written in written_prompts(unpacked):
        text = as_said(written)
        if len(text.split()) > 2 and text not in texts and not ({name, name.replace("/", "_")} & (names | SAID.keys() | WRONG)):
            texts.add(text)
            yield said(name, prompt(unpacked, name), text)


def written_prompts(unpacked: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every prompt, as the package writes them."""
    with gzip.open(unpacked / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz", "rt", encoding="utf-8") as file:
        for line in file:
            name, colon, written = line.partition(":")
            if colon and not line.startswith(";"):
                yield name.strip(), written.strip()


def prompt(unpacked: Path, name: str) -> np.ndarray:
    """[N] samples of a prompt."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        sys.exit("ffmpeg is not on the PATH: it decodes G.722; apt-get install ffmpeg")
    raw = run([ffmpeg, "-v", "error", "-f", "g722", "-i", f"{name}.g722", "-f", "s16le", "-"], cwd=unpacked / PROMPTS)
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32768


def said(name: str, samples: np.ndarray, text: str, number: str = "") -> Piece:
    source = f"Debian asterisk-core-sounds-en-g722 {DEBIAN['asterisk-core-sounds-en-g722']}"
    return Piece(samples, f"prompts-{name.replace('/', '-')}{number}", text, "allison_smith", "prompts", CC, source)


def read(path: Path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != RATE or samples.ndim != 1:
        sys.exit(f"{path}: {rate} Hz, shape {samples.shape}; expected {RATE} Hz mono: the package has changed")
    return samples


def cut(samples: np.ndarray, start: float, end: float) -> np.ndarray:
    return samples[round(start * RATE) : round(end * RATE)]


def require_unseen(pieces: list[Piece], manifests: list[Path]) -> None:
    """Ends the program where a text also stands in one of the manifests (training data)."""
    seen = {line["text"] for path in manifests for line in map(json.loads, path.read_text().splitlines())}
    known = [piece.id for piece in pieces if piece.text in seen]
    if known:
        sys.exit(f"{known} are in {[str(path) for path in manifests]}: take them out of the demo set")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="where downloads lie or go (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=HERE.parent / "src/duolect/embedded/demo")
    parser.add_argument("--not-in", type=Path, action="append", default=[], help="a manifest of training data, whose texts are refused")
    parser.add_argument("--rest", action="store_true", help="instead: all other prompts as a test set, and texts.txt, what all of them say")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        packages = (options.packages or Path(temporary)).resolve()
        if options.rest:
            unpacked = fetch(packages, {name: x for name, x in {**DEBIAN, **TEXTS}.items() if "asterisk" in name}, pypi=False)
            pieces = list(rest(unpacked, options.not_in))
            options.output.mkdir(parents=True, exist_ok=True)
            texts = [written for _, written in written_prompts(unpacked)]
            (options.output / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        else:
            unpacked = fetch(packages, DEBIAN, pypi=True)
            pieces = [*conversation(unpacked), *sphinx(unpacked), *prompts(unpacked)]
    require_unseen(pieces, options.not_in)
    audio = options.output / "audio"
    shutil.rmtree(audio, ignore_errors=True)
    audio.mkdir(parents=True)
    with open(options.output / "manifest.jsonl", "w", encoding="utf-8") as manifest:
        for piece in pieces:
            soundfile.write(audio / f"{piece.id}.flac", piece.samples, RATE, subtype="PCM_16")
            line = {"id": piece.id, "audio_filepath": f"audio/{piece.id}.flac", "duration": round(len(piece.samples) / RATE, 4)}
            line |= {key: getattr(piece, key) for key in ("text", "speaker", "domain", "licence", "source")}
            manifest.write(json.dumps(line) + "\n")
    seconds = sum(len(piece.samples) for piece in pieces) / RATE
    size = sum(file.stat().st_size for file in audio.iterdir())
    words = sum(len(piece.text.split()) for piece in pieces)
    print(f"{len(pieces)} utterances, {seconds:.1f} s, {words} words, {size / 1e6:.2f} MB in {options.output}")


if __name__ == "__main__":
    main()
