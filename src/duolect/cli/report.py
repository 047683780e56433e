"""report: pictures of what a model does with a recording."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from duolect.cli.checks import PICTURES, writable


def report(
    what: Positional[Literal["attention"]],
    /,
    audio: Path,
    model: str = "duolect-sllm",
    text: str | None = None,
    heads: tuple[str, ...] = (),
    out: Path = Path("attention.png"),
    device: str = "auto",
) -> int:
    """Draws where a speech LLM looks while it writes a transcript, the CTC alignment over it; all heads' shares as JSON beside it.

    Example: duolect report attention --model runs/speech_llm/model --audio talk.wav --heads 24:7 5:8 13:13 --out attention.png

    Args:
        what: attention: maps of chosen layers and heads, over prompt, audio and text.
        audio: A recording no longer than the model hears at once.
        model: Speech LLM: an embedded name or a folder.
        text: The transcript; default: what the model itself recognizes (greedy).
        heads: layer:head, both from 1; default: the three with the most attention on audio, the very first position left out.
        out: The PNG to write; <out>.json beside it holds the shares.
        device: auto, cpu, cuda, ...
    """
    from duolect.audio.io import read_audio
    from duolect.cli.options import device_of
    from duolect.evaluate.plots import attention_panels, figure_class
    from duolect.models.attention_maps import attention_maps
    from duolect.models.embedded import resolve
    from duolect.models.speech_llm import SpeechLlm
    from duolect.run import write_json

    writable("--out", out, inputs=[audio], kinds=PICTURES)
    figure_class()
    samples = read_audio(audio)
    network = SpeechLlm.load(resolve(model), device=device_of(device))
    there = len(network.layers), int(network.llm.config.get_text_config(decoder=True).num_attention_heads)
    chosen = [_layer_head(named, there) for named in dict.fromkeys(heads)]
    text, labels = _transcript(network, samples, text)
    maps = attention_maps(network, audio=samples, labels=labels)
    axes = _axes(network, samples, text, labels, maps)
    shares = {"audio": maps.audio_mass(), "audio_but_first": maps.audio_mass(skip=1), "own_word": maps.mass(axes.boxed)}
    ranked = sorted((-share, x, y) for x, row in enumerate(shares["audio_but_first"].tolist(), 1) for y, share in enumerate(row, 1))
    chosen = chosen or [(layer, head) for _, layer, head in ranked[:3]]
    panels = {}
    for layer, head in chosen:
        audible, aligned = (shares[name][layer - 1, head - 1] for name in ("audio", "own_word"))
        panels[f"layer {layer} head {head}: {audible:.0%} on audio, {aligned:.0%} on the word"] = maps.weights[layer - 1][head - 1]
    attention_panels(panels, axes=axes, title=f"{audio.name}: {text}", path=out)
    table = {name: share.astype(float).round(4).tolist() for name, share in shares.items()}
    shown = [f"{layer}:{head}" for layer, head in chosen]
    found = {"model": model, "audio": str(audio), "text": text, "heads": shown, "share_by_layer_and_head": table}
    write_json(f"{out}.json", found)
    print(f"{out}, {out}.json: layer:head {' '.join(shown)}")
    return 0


def _layer_head(named: str, there: tuple[int, int]) -> tuple[int, int]:
    layer, _, head = named.partition(":")
    if not (layer.isdecimal() and head.isdecimal()):
        raise ValueError(f"--heads {named}: expected layer:head, both counted from 1, such as 24:7")
    if not (1 <= int(layer) <= there[0] and 1 <= int(head) <= there[1]):
        raise ValueError(f"--heads {named}: there is none: the model has layers 1 to {there[0]} of heads 1 to {there[1]}")
    return int(layer), int(head)


def _transcript(network: Any, audio: Any, text: str | None) -> tuple[str, Sequence[int]]:
    """The text as the model writes it, and its labels; without one, what the model recognizes, in the labels it was recognized by."""
    from duolect.audio.io import SAMPLE_RATE
    from duolect.recognize.decoding import WRITTEN
    from duolect.search.fusion import Fused
    from duolect.search.label import label_beam_search

    if text is not None:
        text = WRITTEN[network.written].text(text)
        return text, network.vocabulary.encode(text)
    heard = Fused(scorer=network.scorer([audio]), scale=1.0)
    own = label_beam_search({"llm": heard}, 1, beam=1, max_labels=10 + 10 * len(audio) // SAMPLE_RATE)[0][0]
    return own.text, own.labels


def _axes(network: Any, audio: Any, text: str, labels: Sequence[int], maps: Any) -> Any:
    """What stands along the maps, the CTC head's words boxed: by the rows that predict their labels and the audio of their time."""
    from duolect.evaluate.plots import AttentionAxes
    from duolect.recognize.recognizer import Segment, timed_words
    from duolect.scorer import Hypothesis

    segment = Segment(0, 0.0, audio, network.ctc.log_probs_of([audio]).log_probs[0])
    so_far = [max(1, len(network.vocabulary.decode(labels[: i + 1]).split())) for i in range(len(labels))]
    boxes = []
    for number, word in enumerate(timed_words(Hypothesis((), text, {}), segment, network.ctc)):
        rows = [i for i, words in enumerate(so_far) if words == number + 1]
        if rows and word.confidence > 0:  # without, its time is guessed
            keys = maps.within(word.start, word.end)
            boxes.append((rows[0], rows[-1] + 1, keys.start, keys.stop))
    shown = str.maketrans("ĠĊ", "▁↵")  # byte-level tokenizers' space and line break
    names, rows = ([x.translate(shown) for x in found] for found in ((key.name for key in maps.keys), maps.predicted))
    return AttentionAxes([key.kind for key in maps.keys], names, [key.seconds for key in maps.keys], rows, boxes)
