"""prior: the unigrams that a fused language model is corrected by, estimated from audio and transcripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from duolect.cli.checks import at_least, corpus_name, writable
from duolect.cli.options import report

if TYPE_CHECKING:
    from torch import Tensor

    from duolect.data.utterance import Utterance
    from duolect.models.ctc import AcousticModel, CtcOutput
    from duolect.models.priors import Words
    from duolect.vocabulary import Vocabulary

FEW = 20
"""A prior of fewer utterances is warned of."""


def prior(
    data: Path | None = None,
    am: str = "duolect-ctc",
    lm: str = "",
    text: Path | None = None,
    out: Path | None = None,
    limit: Annotated[int, arg(help="Utterances listened to, at most.")] = 500,
    case: Literal["lower", "upper", "keep"] = "lower",
    alpha: float = 1.0,
    seed: int = 0,
) -> int:
    """Estimates label priors: the acoustic model's mean softmax over audio, and label counts of transcripts, also in an LM's tokenizer.

    Example: duolect prior --data train/manifest.jsonl --am my-model/ --lm smollm2-135m

    Written are `softmax`, `counts`, `sampled` (counts of sampled segmentations, where the vocabulary can sample) in the acoustic model's
    units, and `llm` in the language model's labels; what else the file has (other kinds, other language models) stays.

    Args:
        data: Manifest or folder of audio like the training data, best with transcripts.
        am: CTC acoustic model.
        lm: Language model whose labels are counted too; each gets its own by a call of its own.
        text: Transcripts to count instead, one a line (or a manifest), read as a stream. Without --data nothing is listened to.
        out: Folder for the priors; default: the model's own folder, where decodings look for them, unless it is an embedded model.
        case: How words are written before they are counted.
        alpha: Of sampled segmentations: the smaller the more varied, 1 as likely as the unigrams say.
        seed: Of sampled segmentations.
    """
    from duolect.data.sources import open_source
    from duolect.models.embedded import SHIPPED
    from duolect.models.priors import PRIORS_FILE, softmax_prior, text_priors, write_priors
    from duolect.recognize.models import Models, place_of

    at_least(1, limit=limit)
    if data is None and text is None:
        raise ValueError("there is nothing to estimate priors from: name audio with --data, a text with --text, or both")
    place = Path(place_of(am, "acoustic"))
    if out is None and (not place.is_dir() or place.resolve().is_relative_to(SHIPPED.resolve())):
        copy = f", or a copy of {place} with --am" if place.is_dir() else ""
        raise ValueError(f"--am {am}: has no folder that is yours: name one for {PRIORS_FILE} with --out{copy}")
    writable("--out", folder := out or place, folder=True)
    models, failed = Models(), list[str]()
    model, language = models.acoustic(am), models.vocabulary(lm) if lm else None
    utterances = open_source(data).utterances if data else ()
    words = _words(text, utterances, case)
    texts = sum(count for (_, first), count in words.items() if first)
    if not texts and (language is not None or data is None):
        raise ValueError(f"{text or data}: has no transcripts to count: name a text with --text")
    chosen = utterances[:: max(1, len(utterances) // limit)][:limit]
    found = {"softmax": softmax_prior(_heard(model, chosen, failed), model.vocabulary)} if chosen else {}
    if chosen and len(failed) == len(chosen):
        raise ValueError(f"{data}: no audio could be read: {failed[0]}")
    if texts:
        found |= text_priors(words, model.vocabulary, alpha=alpha, seed=seed)
    heard = len(chosen) - len(failed)
    if few := [f"{n} {what}" for n, what in ((heard, "utterances"), (texts, "transcripts")) if 0 < n < FEW]:
        print(f"warning: {' and '.join(few)} are few for a prior, which may do harm: name {FEW} or more, best hundreds", file=sys.stderr)
    source = f"{corpus_name(data or text or folder)}: {heard} utterances, {texts} transcripts"
    write_priors(folder, model.vocabulary, found, source=source)
    _say(found, words, model.vocabulary)
    if language is not None:
        of_text = text_priors(words, language, alpha=alpha, seed=seed)
        found["llm"] = of_text.get("sampled", of_text["counts"])
        write_priors(folder, language, {"llm": found["llm"]}, source=f"{source}, in labels of {lm}")
        _say({"llm": found["llm"]}, words, language)
    print(f"{folder / PRIORS_FILE}: {', '.join(found)} from {heard} utterances and {texts} transcripts")
    return report(failed)


def _words(text: Path | None, utterances: Sequence[Utterance], case: Literal["lower", "upper", "keep"]) -> Words:
    from duolect.data.filter import with_case
    from duolect.data.text import TextLines
    from duolect.models.priors import count_words
    from duolect.run import progress_bar

    texts = TextLines(text, case=case) if text else [with_case(u.text, case) for u in utterances if u.text]
    return count_words(progress_bar(texts, unit="text"))


def _heard(model: AcousticModel, utterances: Sequence[Utterance], failed: list[str]) -> Iterator[CtcOutput]:
    from duolect.audio.io import AudioError
    from duolect.data.utterance import load_audio
    from duolect.run import progress_bar

    for utterance in progress_bar(utterances, unit="utterance"):
        try:
            yield model.log_probs_of([load_audio(utterance)])
        except AudioError as error:
            failed.append(str(error))


def _say(priors: dict[str, Tensor], words: Words, vocabulary: Vocabulary) -> None:
    """Prints what a prior looks like: one that is not sane has a perplexity far above its entropy's, or odd labels at its head."""
    from duolect.models.priors import label_counts, spoken

    counts = label_counts(words, vocabulary) * spoken(vocabulary)
    for kind, prior in priors.items():
        share = prior.double().exp() * spoken(vocabulary)
        entropy = float(-(share * prior).sum())
        text = f", perplexity {float((-(counts * prior).sum() / counts.sum()).exp()):.1f} of transcripts" if counts.sum() else ""
        likely = " ".join(f"{vocabulary.piece(i)} {float(share[i]):.3f}" for i in share.topk(min(8, len(share))).indices.tolist())
        print(f"{kind:8} entropy {entropy:.3f} nats{text}; likeliest: {likely}")
