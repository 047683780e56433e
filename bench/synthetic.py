"""Made-up input of realistic shape: peaky CTC log-probs, vocabularies without a tokenizer, n-best lists that share most words."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from duolect.scorer import Hypothesis
from duolect.vocabulary import Vocabulary

WORDS = tuple(
    """
    the of and to a in that he was it his is with as i had for at by on not be from but you or her which were she they have him one all this
    so we an said there who them when if no would their been will up what out more into could some me than then only its now do very about
    little any other time man can two did like before great has after old over must through such made upon good should well down where never
    men day come own may how much here life back too first long himself being yet might eyes still came last young hand house way place
    thought work water morning nothing against under again heart face night once world head left done found people children country another
    because always between without everything something anything perhaps together ourselves understanding considerable circumstances
    """.split()  # noqa: SIM905
)


class MadeUp(Vocabulary):
    """Pieces by their written forms alone; `▁` marks a word start, blank (if any) serves as bos and eos too.

    Text is cut into words and each given one or two labels by a hash of it: as many as a real tokenizer would, and without meaning.
    """

    def __init__(self, pieces: Sequence[str], *, blank: int | None) -> None:
        self.pieces, self.size, self.blank = tuple(pieces), len(pieces), blank
        self.bos = self.eos = 0 if blank is None else blank

    def encode(self, text: str) -> list[int]:
        out = []
        for word in text.split():
            hashed = sum(ord(c) * 31**i for i, c in enumerate(word))
            out += [1 + (hashed * k) % (self.size - 1) for k in ((1,) if len(word) < 7 else (1, 7))]
        return out

    def decode(self, labels: Sequence[int]) -> str:
        return "".join(self.pieces[y] for y in labels if y != self.blank).replace("▁", " ").strip()

    def piece(self, label: int) -> str:
        return self.pieces[label]

    def starts_word(self, label: int) -> bool:
        return self.pieces[label].startswith("▁")

    def save(self, folder: Path) -> None:
        raise NotImplementedError("made-up pieces are not worth keeping")


def pieces(size: int) -> MadeUp:
    """`size` pieces and a blank behind them: syllables, half of them word starts, in the order of their frequency."""
    syllables = [a + b + c for c in ("", *"nrslt") for b in "aeiou" for a in ("", *"bcdfghjklmnprstvwz", "th", "st", "ch", "sh")]
    made = [x for y in syllables for x in ("▁" + y, y)]
    made += [f"▁{a}{b}" for a in syllables for b in syllables][: max(size - len(made), 0)]
    return MadeUp([*made[:size], ""], blank=size)


def ctc_log_probs(vocabulary: Vocabulary, *, utterances: int, frames: int, seed: int, pace: float = 0.3, unsure: float = 0.12) -> Tensor:
    """[B, T, V] log-probs as a trained CTC model gives them: mostly blank, labels as peaks of one or two frames, few of them doubtful.

    pace: labels per frame. unsure: share of frames where a second label (or blank) comes close; the rest has one label at p > 0.99.
    """
    assert vocabulary.blank is not None
    generator = torch.Generator().manual_seed(seed)
    shape = (utterances, frames)
    rank = torch.arange(vocabulary.size, dtype=torch.float)
    frequency = 1.0 / (rank + 3.0)  # Zipf; the vocabularies here list their labels by frequency
    frequency[vocabulary.blank] = 0.0

    def labels() -> Tensor:
        return torch.multinomial(frequency, utterances * frames, replacement=True, generator=generator).view(shape)

    def chance(p: float) -> Tensor:
        return torch.rand(shape, generator=generator) < p

    spoken = chance(pace)
    target = torch.where(spoken, labels(), vocabulary.blank)
    # Some labels last two frames.
    held = spoken[:, :-1] & ~spoken[:, 1:] & (torch.rand(utterances, frames - 1, generator=generator) < 0.25)
    target[:, 1:] = torch.where(held, target[:, :-1], target[:, 1:])
    logits = torch.randn(*shape, vocabulary.size, generator=generator) * 1.5
    peak = 12.0 + 4.0 * torch.rand(shape, generator=generator) + 0.5 * float(torch.tensor(vocabulary.size).log())
    logits.scatter_add_(2, target[..., None], peak[..., None])
    rival = torch.where(chance(0.5) & (target != vocabulary.blank), vocabulary.blank, labels())
    margin = 6.0 * torch.rand(shape, generator=generator)
    close = torch.where(chance(unsure), peak - margin, 0.0)
    logits.scatter_add_(2, rival[..., None], torch.where(rival == target, 0.0, close)[..., None])
    return logits.log_softmax(-1)


def labels_per_frame(log_probs: Tensor, lengths: Tensor, *, above: float = -5.0) -> float:
    """Mean number of labels above a log-prob in a frame: how peaky the log-probs are (a very sure model: 1.1)."""
    real = torch.arange(log_probs.shape[1])[None] < lengths[:, None]
    return float((log_probs > above).sum(2)[real].float().mean())


def sentence(words: int, *, seed: int) -> str:
    """Words in a row."""
    choice = random.Random(seed)
    return " ".join(choice.choice(WORDS) for _ in range(words))


def nbest_list(*, words: int, size: int, doubtful: int, seed: int) -> list[Hypothesis]:
    """The `size` likeliest combinations of alternatives at `doubtful` places of a sentence of `words` words.

    The places lie late rather than early, because a time-synchronous beam decides early doubts in favour of later ones: of the labels that
    a language model sees about a fifth is distinct, as in real lists of 64.
    """
    choice = random.Random(seed)
    spoken = sentence(words, seed=seed).split()
    places: set[int] = set()
    while len(places) < min(doubtful, words):
        places.add(int(words * max(choice.random() for _ in range(2))))
    order = sorted(places)
    # At each place: the word itself, other words in its place, no word, or one more.
    options = [sorted([(0.0, (spoken[p],))] + [(choice.expovariate(0.7), edit) for edit in _edits(spoken[p], choice)]) for p in order]
    heap = [(0.0, (0,) * len(order))]
    seen, best = {heap[0][1]}, []
    while heap and len(best) < size:
        cost, picked = heapq.heappop(heap)
        best.append((cost, picked))
        for i, n in enumerate(picked):
            if n + 1 < len(options[i]):
                longer = (*picked[:i], n + 1, *picked[i + 1 :])
                if longer not in seen:
                    seen.add(longer)
                    heapq.heappush(heap, (cost - options[i][n][0] + options[i][n + 1][0], longer))
    out = []
    for cost, picked in best:
        at = {p: options[i][picked[i]][1] for i, p in enumerate(order)}
        text = " ".join(word for i, own in enumerate(spoken) for word in at.get(i, (own,)))
        out.append(Hypothesis((), text, {"ctc": -cost}))
    return out


def _edits(word: str, choice: random.Random) -> list[tuple[str, ...]]:
    return [(choice.choice(WORDS),), (choice.choice(WORDS),), (), (word, choice.choice(WORDS))]
