"""What phrases that may come (`--context`) do to each way of joining: error rate, listed words heard, speed, by length of the list.

Half of a list are rare words of the transcripts, half are rare words of other transcripts that are not said; one list for all recordings.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

from duolect.data.sources import open_source
from duolect.evaluate.normalize import normalizer
from duolect.evaluate.wer import Score, score_recognized
from duolect.recognize.files import decode_to_files
from duolect.recognize.models import Models
from duolect.recognize.presets import Ingredients, decoding_of
from duolect.recognize.recognizer import Recognizer

COMMON = 5000
"""So many of the commonest words of a text are not worth listing."""


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def evenly(words: Sequence[str], count: int) -> list[str]:
    """So many of the words, from all places."""
    return [words[i * len(words) // count] for i in range(min(count, len(words)))]


def heard(score: Score, listed: set[str]) -> str:
    """How many of the listed words that are said are in the transcripts, and how often one is that is not said."""
    said, found, invented = 0, 0, 0
    for u in score.utterances:
        there, written = (Counter(w for w in text.split() if w in listed) for text in (u.reference, u.hypothesis))
        said, found = said + there.total(), found + (there & written).total()
        invented += (written - there).total()
    return f"{found} of {said}, {invented} invented"


def main() -> None:
    """Prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=harness.existing, required=True, help="speech with transcripts")
    parser.add_argument("--others", type=harness.existing, required=True, help="transcripts whose words are not said")
    parser.add_argument("--common", type=harness.existing, required=True, help="a text of which the commonest words are not listed")
    parser.add_argument("--limit", type=int, help="recordings of --data")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 10, 40], help="phrases of the lists")
    parser.add_argument("--decodings", nargs="+", default=["ctc", "delayed", "sllm-greedy", "sllm+ctc-time", "sllm+ctc-label"])
    parser.add_argument("--out", type=Path, default=Path("out/context"), help="hypotheses; the same command goes on")
    args = parser.parse_args()
    harness.use_threads(1)
    utterances = [u for u in open_source(args.data).utterances if u.text][: args.limit]
    common = {w for w, _ in Counter(words_of(args.common.read_text())).most_common(COMMON)}
    same = normalizer("whisper-english")  # a word that is counted as another one would never be found
    said, others = (
        list(dict.fromkeys(w for u in x if u.text for w in words_of(u.text) if w not in common and same(w) == w))
        for x in (utterances, open_source(args.others).utterances)
    )
    unsaid, models, rows = [w for w in others if w not in said], Models(), list[dict[str, Any]]()
    listed = {size: evenly(said, size // 2) + evenly(unsaid, size - size // 2) for size in args.sizes}
    for name in args.decodings:
        for size, phrases in listed.items():
            decoding = decoding_of(name, Ingredients(context=dict.fromkeys(phrases, 1.0)))
            recognizer = Recognizer(models, "duolect-ctc", {name: decoding})
            out = args.out / f"{name}-{size}.jsonl"
            out.parent.mkdir(parents=True, exist_ok=True)
            lines = decode_to_files(recognizer, utterances, {name: out})[name]
            score = score_recognized(lines, normalizer=normalizer("whisper-english"), corpus=Path(args.data).stem)
            row = {"decoding": name, "phrases": size, "WER %": f"{score.errors.rate:.2f} {score.interval}"}
            rows.append({**row, **{f"of {n}": heard(score, set(listed[n])) for n in args.sizes if n}, "RTF": score.rtf})
            harness.print_table(rows[-1:], title=out.name)
    harness.print_table(rows, title="words of each list that were heard, with and without it")
    harness.save(
        "context",
        rows,
        settings=vars(args),
        notes=[f"{len(utterances)} recordings", *(f"{n}: {x}" for n, x in listed.items())],
        quick=False,
    )


if __name__ == "__main__":
    main()
