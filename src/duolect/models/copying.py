"""A CTC head that writes pieces by itself and copies those of words that a spotter names: a pointer-generator (arXiv 1704.04368) for CTC.

What it has to learn is when to say which piece of a word; how the word is written it need not know.

Legend: B utterances, T frames, D width, K words that can be named, M named in a frame, V labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.models.spotter import BYTE, Spotter
from duolect.vocabulary import Vocabulary

PLACES = 8  # pieces of a word that can be copied
AGO = (0, 4, 8, 12, 16)  # frames since the word was named
LEAST = 1e-30  # of a probability, before its logarithm
MOST = 30.0  # by which the logarithm of a chance may rise


class CopyingHead(nn.Linear):
    """Frames [B, T, D] and what was named in them [B, T, 3 M] to log-probs [B, T, V]: of pieces it writes, of pieces it copies, of blank.

    p = written * softmax(linear) + blank + copied: of a word named AGO frames earlier (its last pieces are said when the window is past
    it) a place is chosen: its first, second, ... piece, as a word or within one; what no named word has at a place is blank. Chances of
    words named in a frame are weighed anew by what it has heard around: exp(look(frame) * embedding); at first they stay as they are.
    """

    def __init__(self, dim: int, vocabulary: Vocabulary, spotter: Spotter) -> None:
        super().__init__(dim, vocabulary.size)
        assert vocabulary.blank is not None
        self.blank = vocabulary.blank
        self.choice = nn.Linear(dim, 2 + len(AGO) * 2 * PLACES)  # to write, blank, and the places
        self.look = nn.Linear(dim, spotter.dims.dim, bias=False)
        nn.init.zeros_(self.look.weight)
        self.pieces: Tensor
        self.words: Tensor
        self.register_buffer("pieces", _pieces(vocabulary, spotter.texts), persistent=False)
        self.register_buffer("words", spotter.words, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        frames, told = input[..., : self.in_features], input[..., self.in_features :].float()
        chances, high, low = told.chunk(3, -1)
        words = (high * BYTE + low).round().long().clamp(max=len(self.pieces) - 1)
        weights = torch.einsum("btmd,btd->btm", self.words[words], self.look(frames).float()).clamp(max=MOST)
        weighed = chances * weights.exp()
        chances = weighed * (chances.sum(-1, keepdim=True) / weighed.sum(-1, keepdim=True).clamp(min=LEAST))
        choice = self.choice(frames).float().softmax(-1)
        probs = choice[..., :1] * super().forward(frames).float().softmax(-1)
        blank, pieces = choice[..., 1], self.pieces[words]  # [B, T], [B, T, M, 2 PLACES]
        for ago, places in zip(AGO, choice[..., 2:].unflatten(-1, (len(AGO), -1)).unbind(2), strict=True):
            then, there = _later(chances, ago), _later(pieces, ago)
            probs = probs.scatter_add(-1, there.flatten(-2), (then[..., None] * places[..., None, :]).flatten(-2))
            blank = blank + places.sum(-1) * (1 - then.sum(-1))
        only = F.one_hot(torch.tensor(self.blank, device=blank.device), self.out_features)
        return (probs + blank[..., None] * only).clamp(min=LEAST).log()


def _later(x: Tensor, frames: int) -> Tensor:
    """x [B, T, ...] as it was so many frames ago, zeros at first."""
    frames = min(frames, x.shape[1])
    return torch.cat([torch.zeros_like(x[:, :frames]), x[:, : x.shape[1] - frames]], 1)


def _pieces(vocabulary: Vocabulary, texts: Sequence[str]) -> Tensor:
    """[K, 2 PLACES] labels of each text from the first on, as a word and then as the inside of one; blank where there are none."""
    assert vocabulary.blank is not None
    rows: dict[str, list[int]] = {}
    for word in dict.fromkeys(text.strip() for text in texts):  # most come with and without a space
        places = ([*x[:PLACES], *[vocabulary.blank] * (PLACES - len(x))] for x in (vocabulary.encode(word), within(vocabulary, word)))
        rows[word] = [label for place in places for label in place]
    return torch.tensor([rows[text.strip()] for text in texts])


def within(vocabulary: Vocabulary, text: str) -> list[int]:
    """Labels of a text inside of a word, found behind a letter that keeps labels of its own; none where there is no such letter."""
    for letter in "eaoinrst":
        head, labels = vocabulary.encode_word(letter, first=True), list(vocabulary.encode(letter + text))
        if labels[: len(head)] == list(head):
            return labels[len(head) :]
    return []
