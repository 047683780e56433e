"""lm: language models fitted to texts, trained from scratch, and how well they predict."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from duolect.cli.checks import at_least, writable
from duolect.cli.training import RunOptions, trained

if TYPE_CHECKING:
    from duolect.evaluate.perplexity import Scored


def finetune(
    llm: Positional[str],
    text: tuple[str, ...],
    check: tuple[str, ...] = (),
    out: Path = Path("runs/lm"),
    units: str = "",
    learns: Literal["all", "lora", "nothing"] = "all",
    case: Literal["lower", "upper", "keep"] = "lower",
    options: Annotated[RunOptions, arg(name="")] = RunOptions(),
) -> int:
    """Fits a causal language model to transcripts or any text; the same command goes on where it stopped.

    Example: duolect lm finetune smollm2-135m --text train.txt --check dev.txt --learns lora

    Example: duolect lm finetune Qwen/Qwen2-0.5B --text train.txt --units my-ctc-model/ --out runs/qwen-in-my-units

    Args:
        llm: An embedded name, folder, .gguf file or hub id.
        text: What it learns from: text files with a sentence a line, manifests.
        check: Validation texts; the first decides which weights are best.
        out: Run folder; the language model lies in its folder model, for --lm.
        units: CTC model whose SentencePiece units the model gets, with new embeddings; default: its own tokenizer's.
        learns: All of it, low-rank paths, or nothing but new embeddings.
        case: What is made of the texts: they should look as transcripts do.
        options: Training.
    """
    from duolect.recipes.language import finetune as recipe
    from duolect.recipes.language import run

    return trained(replace(recipe(llm, text, check, units, learns), case=case), run, out, options)


def train(
    text: tuple[str, ...],
    check: tuple[str, ...] = (),
    out: Path = Path("runs/unit-lm"),
    units: str = "duolect-ctc",
    case: Literal["lower", "upper", "keep"] = "lower",
    options: Annotated[RunOptions, arg(name="")] = RunOptions(),
) -> int:
    """Trains a Transformer language model from scratch in the units of a CTC model, for label-wise fusion.

    Example: duolect lm train --text train.txt --check dev.txt --units my-ctc-model/ --set model.layers=6 model.dim=512 model.heads=8

    Args:
        text: What it learns from: text files with a sentence a line, manifests.
        check: Validation texts; the first decides which weights are best.
        out: Run folder; the language model lies in its folder model, for --lm.
        units: CTC model whose SentencePiece units it has.
        case: What is made of the texts: they should look as transcripts do.
        options: Training.
    """
    from duolect.recipes.language import run, scratch

    return trained(replace(scratch(text, check, units), case=case), run, out, options)


def text(
    sources: Positional[tuple[Path, ...]],
    /,
    out: Path,
    without: tuple[Path, ...] = (),
    run: int = 5,
) -> int:
    """Writes texts as transcripts are written (English: lower case, numbers in words, no punctuation), without what is to be tested.

    Example: duolect lm text mails.txt old/manifest.jsonl --out domain.txt --without test/manifest.jsonl

    Args:
        sources: Text files with a sentence a line, manifests.
        out: The text file, a sentence a line, for `duolect lm finetune --text`.
        without: Texts and manifests that will be tested: their sentences are left out, and so is what is nearly one.
        run: Words in a row that a sentence must share with a tested one to be nearly one; all words of the shorter one are enough,
            three or more.
    """
    from duolect.data.text import HeldOut, TextLines, as_said

    at_least(3, run=run)
    writable("--out", out, inputs=[*sources, *without])
    tested = HeldOut((as_said(line) for path in without for line in TextLines(path)), run=run)
    read, same, near, words = 0, 0, 0, 0
    kept: list[str] = []
    for line in (as_said(line) for path in sources for line in TextLines(path)):
        read += bool(line)
        same += (has := tested.has(line))
        near += (is_near := not has and tested.near(line))
        if line and not has and not is_near:
            kept.append(line)
            words += len(line.split())
    if not kept:
        raise ValueError(f"{' '.join(map(str, sources))}: of {read} sentences {same} are tested and {near} nearly: nothing is left")
    out.write_text("\n".join(kept) + "\n", encoding="utf-8")
    left = f"; left out: {same} that are tested, {near} that share {run} words in a row with one" if without else ""
    print(f"{out}: {len(kept)} sentences, {words} words{left}")
    return 0


def ppl(
    lm: tuple[str, ...],
    text: tuple[Path, ...],
    by: str = "domain",
    prompt: str = "",
    limit: int | None = None,
    batch: int = 16,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    json: Path | None = None,
) -> int:
    """Perplexity per label and per word (which compares models of unlike units), with 95% intervals, by text and domain.

    Example: duolect lm ppl --lm smollm2-135m runs/lm/model duolect-unit-lm --text dev.txt dev/manifest.jsonl

    Args:
        lm: Language models: anything that --lm takes elsewhere.
        text: Text files with a sentence a line, manifests.
        by: Field of a manifest's lines whose values get rows of their own.
        prompt: Text read before every sentence.
        limit: At most so many sentences of each text, evenly spread.
        batch: Sentences scored at once.
        device: auto, cpu, cuda, ...
        precision: Of the language models.
        json: Also write everything to this file.
    """
    from duolect.cli.options import device_of
    from duolect.data.text import TextLines
    from duolect.evaluate.perplexity import perplexities, plain_rows
    from duolect.models.ngram import reads
    from duolect.recognize.models import Models
    from duolect.run import progress_bar, write_json

    at_least(1, limit=limit, batch=batch)
    writable("--json", json, inputs=text, kinds=[".json"])
    models = Models(device=device_of(device), precision=precision)
    sources = {str(path): TextLines(path) for path in text}
    if empty := [path for path, lines in sources.items() if not len(lines)]:
        raise ValueError(f"{empty[0]}: has no sentence: name a text with one a line, or a manifest with texts")
    rows = []
    for name in lm:
        scorer = models.language(name, prompt=prompt)
        for path, lines in sources.items():
            chosen = range(len(lines))[:: max(1, -(-len(lines) // limit) if limit else 1)]
            title = f"{name} on {Path(path).name}"
            found = []
            for start in progress_bar(range(0, len(chosen), batch), desc=title, unit="batch"):
                some = [lines.fields(i) for i in chosen[start : start + batch]]
                found += _scored(scorer, some, by, title, begun=bool(prompt.strip()))
            rows += perplexities([x for x, _ in found], model=name, text=path)
            if unread := [text for _, text in found if not reads(scorer, text)]:
                share = f"{100 * len(unread) / len(found):.0f}% of the sentences have words or letters that it does not know"
                models.say(f"{title}: {share}, such as {unread[0][:60]!r}: do not compare its perplexity with others'")
    print(plain_rows(rows))
    if json is not None:
        write_json(json, [asdict(row) for row in rows])
    return 0


def _scored(scorer: Any, lines: list[dict[str, Any]], by: str, title: str, *, begun: bool) -> list[tuple[Scored, str]]:
    """What a language model says of lines of a manifest, and the text that it read of each."""
    from duolect.evaluate.perplexity import Scored
    from duolect.models import ModelError
    from duolect.recognize.decoding import policy_of
    from duolect.search.rescore import text_scores

    texts = [policy_of(scorer).text(x["text"]) for x in lines]
    try:
        found = text_scores(scorer, texts, begun=begun)
    except ModelError as error:
        raise ValueError(f"{title}: it cannot read a sentence, perhaps {max(texts, key=len)[:40]!r}...: {error}") from error
    domains = [str(x[by]) if by in x else "" for x in lines]
    return [
        (Scored(domain, -score, labels, len(text.split()) + 1), text)
        for domain, text, (score, labels) in zip(domains, texts, found, strict=True)
    ]
