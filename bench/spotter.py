"""How many words an untrained spotter names: recall of a corpus' words, in their order, by the window it looks at.

python bench/spotter.py --data dev/manifest.jsonl [--every 4] [--whisper whisper-base]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from tqdm import tqdm

from duolect.data.sources import open_source
from duolect.data.text import as_said
from duolect.data.utterance import load_audio
from duolect.models.embedded import resolve
from duolect.models.encoders import Encoded, WhisperEncoder
from duolect.models.spotter import NAMED, Spotter

WINDOWS = ((0, 8), (0, 12), (2, 16), (4, 20), (4, 28), (4, 40), (8, 80))


def found(named: Sequence[set[str]], words: Sequence[str]) -> int:
    """The most words that are named in frames in their order; a word is named by its first two letters or more, or all of it."""
    best = [0] * (len(words) + 1)
    for names in named:
        hits = [any(word.startswith(x) and len(x) >= min(2, len(word)) for x in names) for word in words]
        last = best
        best = [0]
        for j, hit in enumerate(hits):
            best.append(max(last[j + 1], best[j], last[j] + hit))
    return best[-1]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--every", type=int, default=1, help="take every so many-th utterance")
    parser.add_argument("--whisper", default="whisper-base")
    args = parser.parse_args()
    utterances = list(open_source(args.data).utterances)[:: args.every]
    place = resolve(args.whisper)
    encoder, heard = WhisperEncoder.from_whisper(place).eval(), list[tuple[list[str], Encoded]]()
    for utterance in tqdm(utterances, unit="utt", mininterval=5):
        features = encoder.features(torch.from_numpy(load_audio(utterance)))[: round(encoder.max_seconds * 100)]
        heard.append((as_said(utterance.text or "").split(), encoder(features[None], torch.tensor([len(features)]))))
    total = sum(len(words) for words, _ in heard)
    print(f"{args.whisper}, {len(heard)} utterances, {total} words", end="\n\n")
    print("| back | ahead | likeliest % | among", NAMED, "% |")
    print("| --: | --: | --: | --: |")
    for back, ahead in WINDOWS:
        spotter, hits = Spotter.from_whisper(place, back=back, ahead=ahead).eval(), [0, 0]
        for words, encoded in heard:
            _, high, low = spotter(encoded)[0, :, spotter.dims.dim :].chunk(3, -1)
            names = [[spotter.texts[int(n)].strip() for n in frame] for frame in (256 * high + low).tolist()]
            for i, most in enumerate((1, NAMED)):
                hits[i] += found([{x for x in frame[:most] if x} for frame in names], words)
        print(f"| {back} | {ahead} | " + " | ".join(f"{100 * x / total:.1f}" for x in hits) + " |", flush=True)


if __name__ == "__main__":
    main()
