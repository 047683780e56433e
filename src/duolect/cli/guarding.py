"""guard: the transcripts of any system, judged by what a CTC model hears."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from duolect.cli.checks import writable
from duolect.cli.options import ModelOptions, recognizer_for, report, say_score, source_of

if TYPE_CHECKING:
    from torch import Tensor

    from duolect.data.utterance import Utterance
    from duolect.models.ctc import AcousticModel
    from duolect.scorer import Hypothesis, Recognized
    from duolect.search.guard import Verdict


def guard(
    hypotheses: Path,
    out: Path,
    models: Annotated[ModelOptions, arg(name="")] = ModelOptions(),
    policy: Literal["off", "warn", "truncate", "rejoint", "ctc"] = "warn",
    decoding: str = "ctc",
    data: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Finds what a system invented, repeated or left out, by a CTC model's evidence for every word, and mends it.

    Example: duolect guard --hypotheses llm.jsonl --out guarded.jsonl --am duolect-ctc --policy truncate

    Lines get a field `guard`: the suspect words with times and causes, speech without words, what repeats, what was done. Where the text is
    changed, `unguarded_text` keeps the old one.

    Args:
        hypotheses: JSON lines of any system with audio_filepath and pred_text (or nbest); relative paths start at this file's folder.
        out: The file to write.
        models: Models; used are --am and what --decoding needs.
        policy: warn: say it, change nothing; truncate: take out loops and suspect ends; ctc: the CTC model's own transcript where half or
            more is wrong; rejoint: recognize anew what is suspect; off: copy.
        decoding: What rejoint recognizes with: a named decoding (see `duolect compare --help`) or a JSON file.
        data: The manifest or folder that was recognized, where its audio paths start there.
        overwrite: Replace an output that is there.
    """
    from duolect.recognize.files import read_settings
    from duolect.run import write_json
    from duolect.scorer import write_hypotheses

    writable("--out", out, inputs=[hypotheses, *([data] if data else [])])
    if out.exists() and not overwrite:
        raise ValueError(f"--out {out}: is there already: name another file, or replace it with --overwrite")
    failures: list[str] = []
    source, places = source_of(hypotheses, failures), None if data is None else source_of(data, failures)
    if source is None or (data is not None and places is None):
        return report(failures)
    lines = {u.id: line for u in source.utterances if (line := _line(u, hypotheses, failures))}
    at = {u.id: u for u in (*source.utterances, *(places.utterances if places else ()))}
    recognizer = recognizer_for(models, {"it": decoding} if policy == "rejoint" else {})
    heard = [at[id] for id, line in lines.items() if line.error is None and policy != "off"]
    if data is None and heard and not any(u.audio.is_file() for u in heard):
        print(f"no audio where paths start at {hypotheses.parent}: --data names the manifest where they start", file=sys.stderr)
    model = recognizer.models.acoustic(recognizer.acoustic) if heard else None
    verdicts = dict(_judged(heard, lines, model, models.batch_seconds, failures) if model else ())
    suspects = {id: verdict for id, (verdict, _) in verdicts.items() if verdict.causes}
    again = recognizer.recognize([at[id] for id in suspects]) if policy == "rejoint" and suspects else ()
    anew = {found["it"].id: found["it"] for found in again}
    failures += [f"{r.id}: {r.error}" for r in anew.values() if r.error is not None]
    done = [_guarded(line, policy, *verdicts[id], anew.get(id)) if id in verdicts else line for id, line in lines.items()]
    write_hypotheses(out, done)
    said = {"am": models.am, "policy": policy, "decoding": decoding if policy == "rejoint" else None}
    write_json(f"{out}.json", {**read_settings(hypotheses), "guarded": said})
    if policy != "off":
        _say(suspects, list(lines.values()), done, data or hypotheses)
    return report(failures, done)


def _say(suspects: dict[str, Verdict], lines: list[Recognized], done: list[Recognized], corpus: Path) -> None:
    """Prints how many transcripts are suspect, of what, what was done, and the WER before and after where there are references."""
    causes = Counter(cause for verdict in suspects.values() for cause in verdict.causes)
    causes["condemned"] = sum(verdict.condemned for verdict in suspects.values())
    actions = Counter(line.extra["guard"]["action"] for line in done if "guard" in line.extra)
    for title, counts in ((f"{len(suspects)} of {len(lines)} transcripts are suspect", causes), ("done", actions)):
        print(f"{title}: {', '.join(f'{n} {name}' for name, n in counts.items() if n) or 'none'}")
    if all(isinstance(line.fields.get("text"), str) for line in done):
        for title, some in (("before: ", lines), ("after:  ", done)):
            print(title, end="", file=sys.stderr, flush=True)
            say_score(some, corpus)


def _line(utterance: Utterance, path: Path, failures: list[str]) -> Recognized | None:
    """A manifest line as a line of a hypotheses file; None, and a failure, where it has no transcript."""
    from duolect.scorer import Recognized

    try:
        line = Recognized.from_json(utterance.fields)
        if line.error is not None or (line.nbest and all(isinstance(h.text, str) for h in line.nbest)):
            return line
        cause = "no transcript"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cause = f"not a hypothesis ({type(error).__name__}: {error})"
    failures.append(f"{path}: {utterance.id}: {cause}: expected pred_text, or nbest with a text each; correct or remove the line")
    return None


def _guarded(line: Recognized, policy: Any, verdict: Verdict, greedy: Hypothesis, anew: Recognized | None) -> Recognized:
    """The line after the policy, with the field `guard`; a text that could not be recognized anew stays."""
    from duolect.scorer import Hypothesis
    from duolect.search.guard import guarded

    if policy == "rejoint" and (anew is None or anew.error is not None):
        policy = "warn"
    text, action = guarded(line.text, verdict, policy=policy, ctc=lambda: greedy.text, rejoint=lambda: anew.text if anew else line.text)
    suspect = [{"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3), "cause": w.cause} for w in verdict.words if w.cause]
    found = {"action": action, "causes": dict(verdict.causes), "condemned": verdict.condemned, "fits": verdict.fits, "suspect": suspect}
    found |= {"unexplained": [[round(t, 3) for t in span] for span in verdict.unexplained], "loop": verdict.loop._asdict()}
    if text == line.text:
        return replace(line, extra={"guard": found})
    nbest = anew.nbest if anew and action == "rejoint" else [greedy] if action == "replaced" else [Hypothesis((), text, {})]
    fields = {k: v for k, v in line.fields.items() if k != "words"}  # their times were the old text's
    return replace(line, fields=fields, nbest=nbest, extra={"guard": found, "unguarded_text": line.fields.get("unguarded_text", line.text)})


def _judged(
    utterances: Sequence[Utterance], lines: dict[str, Recognized], model: AcousticModel, batch_seconds: float, failures: list[str]
) -> Iterator[tuple[str, tuple[Verdict, Hypothesis]]]:
    """By id the verdict and the CTC model's own transcript, in an order that suits batching; of others why there is none, in failures."""
    import torch

    from duolect.audio.io import AudioError
    from duolect.data.batching import batches_by_seconds
    from duolect.data.utterance import load_audio
    from duolect.run import progress_bar
    from duolect.search.ctc import ctc_greedy
    from duolect.search.fusion import SearchError
    from duolect.search.guard import judge

    said: dict[str, Any] = {"vocabulary": model.vocabulary, "seconds_per_frame": model.seconds_per_frame}
    with progress_bar(total=len(utterances), unit="line") as bar:
        for batch in batches_by_seconds([u.seconds or 10.0 for u in utterances], batch_seconds=batch_seconds):
            audios: dict[str, Any] = {}
            for u in (utterances[i] for i in batch):
                try:
                    audios[u.id] = load_audio(u)
                except AudioError as error:
                    failures.append(f"{u.id}: {error}")
            for id, x in zip(audios, _encoded(model, list(audios.values())), strict=True):
                try:
                    if isinstance(x, str):
                        raise SearchError(x)
                    greedy = ctc_greedy(x[None], torch.tensor([len(x)]), vocabulary=model.vocabulary)[0][0]
                    yield id, (judge(lines[id].text.split(), x, **said), greedy)
                except SearchError as error:
                    failures.append(f"{id}: {error}")
            bar.update(len(batch))


def _encoded(model: AcousticModel, audios: list[Any]) -> list[Tensor | str]:
    """Log-probs [T, V] of each recording, or why it has none; each alone where they cannot be encoded at once."""
    from duolect.models import ModelError

    try:
        output = model.log_probs_of(audios) if audios else None
        return [x[:n] for x, n in zip(output.log_probs, output.lengths.tolist(), strict=True)] if output else []
    except (ModelError, RuntimeError, MemoryError) as error:
        if len(audios) == 1:
            return [" ".join(str(error).split()) or type(error).__name__]
    return [x for audio in audios for x in _encoded(model, [audio])]
