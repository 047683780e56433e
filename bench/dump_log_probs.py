"""CTC log-probs of real audio for `ctc_beam.py --log-probs`: python bench/dump_log_probs.py MANIFEST --out log_probs.npz."""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import numpy as np

from duolect.data.sources import read_manifest
from duolect.data.utterance import load_audio
from duolect.models.ctc import load_acoustic_model


def main() -> None:
    """Writes log_probs [B, T, V] and lengths [B] of the longest utterances under a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=harness.existing)
    parser.add_argument("--model", default="duolect-ctc", help="name or folder of a CTC model")
    parser.add_argument("--utterances", type=int, default=16)
    parser.add_argument("--max-seconds", type=float, default=20.0, help="of an utterance; 500 frames of duolect-ctc")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    harness.use_threads(args.threads)
    found = [u for u in read_manifest(args.manifest).utterances if u.seconds and u.seconds <= args.max_seconds]
    chosen = sorted(found, key=lambda u: -(u.seconds or 0.0))[: args.utterances]
    output = load_acoustic_model(args.model).log_probs_of([load_audio(u) for u in chosen])
    np.savez(args.out, log_probs=output.log_probs.numpy(), lengths=output.lengths.numpy())
    print(f"{args.out}: {len(chosen)} utterances of {args.manifest}, log_probs {tuple(output.log_probs.shape)}")


if __name__ == "__main__":
    main()
