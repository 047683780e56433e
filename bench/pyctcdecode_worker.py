"""pyctcdecode in a process and environment of its own: decodes what it is told, times itself, and answers in JSON lines.

Usage: python pyctcdecode_worker.py FOLDER, with log_probs.npy [B, T, V], lengths.npy [B] and labels.json in it. Each line of standard
input is {"utterances": [..], "beam": 16, "frames": null, "token_min_logp": -5.0, "beam_prune_logp": -10.0}.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

logging.disable(logging.WARNING)  # that there is no kenlm, which is not needed here

import numpy as np  # noqa: E402
from pyctcdecode import build_ctcdecoder  # noqa: E402


def main(folder: Path) -> None:
    """Answers until the input ends."""
    log_probs, lengths = np.load(folder / "log_probs.npy"), np.load(folder / "lengths.npy")
    decoder = build_ctcdecoder(json.loads((folder / "labels.json").read_text()))
    print(json.dumps({"numpy": np.__version__}), flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        answer = []
        for u in told["utterances"]:
            frames = log_probs[u, : lengths[u]][: told["frames"]]
            begin, cpu = time.perf_counter(), time.process_time()
            beams = decoder.decode_beams(
                frames, beam_width=told["beam"], token_min_logp=told["token_min_logp"], beam_prune_logp=told["beam_prune_logp"]
            )
            spent = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
            answer.append({**spent, "text": beams[0][0], "score": float(beams[0][-2]), "beams": len(beams)})
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
