"""CTC probabilities of texts, however they are cut into labels.

A label sequence has one CTC probability and a text has the sum over all that spell it. A model that was trained on one segmentation of each
word has nearly all of it there; one that copies pieces of other words has not (`duolect.models.copying`). And where another model proposes
in labels of its own, a text is judged after each of them, not only where a word ends: a hypothesis whose words never end would be judged
never.

Legend: R rows, A labels that occur in some segmentation of a text, T frames, F letters (see `following`), V labels of the decoder.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from duolect.scorer import Scorer
from duolect.search.fusion import NEG, ByWord, Held, SearchError, TextPolicy, parting_starts, written_words
from duolect.search.prefix import IMPOSSIBLE, CtcPrefix, PrefixState, possible
from duolect.vocabulary import Vocabulary

UNFINISHED = "\ufffd"
"""What stands for bytes that are no letter yet, in a vocabulary of bytes."""

LAST = chr(0x10FFFF)
"""Behind all letters, in the order of texts."""


@dataclass(frozen=True)
class Cut:
    """A label at a place in a text: letters begin..end of it."""

    label: int
    begin: int
    end: int


@dataclass(frozen=True)
class Cuts:
    """All labels of all segmentations of a text, by where they begin."""

    every: Sequence[Cut]
    length: int

    @cached_property
    def label(self) -> Tensor:
        """[A]"""
        return torch.tensor([cut.label for cut in self.every], dtype=torch.long)

    @cached_property
    def last(self) -> Tensor:
        """[A] bool: which end where the text ends."""
        return torch.tensor([cut.end == self.length for cut in self.every], dtype=torch.bool)

    @cached_property
    def steps(self) -> Sequence[Step]:
        """What begins at each place where something does."""
        begins = sorted({cut.begin for cut in self.every})
        return [Step(*(tuple(a for a, cut in enumerate(self.every) if getattr(cut, x) == i) for x in ("begin", "end"))) for i in begins]

    @cached_property
    def ends(self) -> Mapping[int, Sequence[int]]:
        """The places where something ends, the text's begin among them (as number 0; cuts are numbered from 1), and what does."""
        out = defaultdict[int, list[int]](list, {0: [0]})
        for a, cut in enumerate(self.every):
            out[cut.end].append(a + 1)
        return out


@dataclass(frozen=True)
class Step:
    """The cuts that begin at a place, and those that end there."""

    begin: tuple[int, ...]
    end: tuple[int, ...]


class CtcWords(Scorer[PrefixState]):
    """log p_ctc(words | words before), over all segmentations; its labels in `advance` are the numbers that `number` gives to words.

    log_probs: of single labels, as `prefix` gives them. `opened` judges a word that is not complete.
    """

    def __init__(self, prefix: CtcPrefix) -> None:
        self.prefix, self.vocabulary = prefix, prefix.vocabulary
        self._labels = defaultdict[str, list[int]](list)
        for label, text in enumerate(self.vocabulary.label_texts):
            if text:
                self._labels[text].append(label)
        self._longest = max(map(len, self._labels), default=1)
        self._upper = all(text == text.upper() for text in self._labels)
        self._numbers: dict[str, int] = {}
        self._words: list[Cuts] = []
        self._opened: dict[str, Cuts] = {}
        self._further: dict[str, frozenset[int]] = {}
        self._tables: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._sums: dict[tuple[int, str, int], Tensor] = {}

    def number(self, word: str, *, first: bool = False) -> int:
        """What stands for a word in `advance`; first: no word was before it."""
        text = self.text_of(word, first=first)
        if text not in self._numbers:
            self._numbers[text] = len(self._words)
            cuts = self._cut(text, whole=True)
            if not cuts.every:  # what cannot be spelled is as the vocabulary writes it
                labels = self.vocabulary.encode_word(word, first=first)
                cuts = Cuts([Cut(label, i, i + 1) for i, label in enumerate(labels)], len(labels))
            self._words.append(cuts)
        return self._numbers[text]

    def text_of(self, word: str, *, first: bool) -> str:
        """How the vocabulary's labels write a word, with what parts it from those before."""
        # A SentencePiece model begins a text as it begins a word, others begin it with its first letter.
        bare = first and not any(self._starts[label] for label in self.vocabulary.encode(word)[:1])
        text = word if bare else " " + word
        return text.upper() if self._upper else text

    def _cut(self, text: str, *, whole: bool) -> Cuts:
        """All cuts that lead from the text's begin, and to its end where it is whole."""
        ends, begins, found = {0}, {len(text)}, list[Cut]()
        for i in range(len(text)):
            for j in range(i + 1, min(len(text), i + self._longest) + 1) if i in ends else ():
                if labels := self._labels.get(text[i:j]):
                    found += [Cut(label, i, j) for label in labels]
                    ends.add(j)
        if whole:
            for cut in reversed(found):
                begins |= {cut.begin} if cut.end in begins else set()
            found = [cut for cut in found if cut.end in begins]
        return Cuts(found, len(text))

    def start(self, rows: int) -> PrefixState:
        return self.prefix.start(rows)

    def log_probs(self, state: PrefixState, labels: Tensor | None = None) -> Tensor:
        return self.prefix.log_probs(state, labels)

    def advance(self, state: PrefixState, labels: Tensor, lengths: Tensor) -> tuple[Tensor, PrefixState]:
        begin, words, sizes = state.prefix, labels.tolist(), lengths.tolist()
        for s in range(labels.shape[1]):
            rows = [r for r, n in enumerate(sizes) if n > s and self._words[words[r][s]].every]
            if rows:
                state = self._one(state, rows, [self._words[words[r][s]] for r in rows])
        gained = torch.where(lengths.to(begin.device) > 0, possible(state.prefix) - begin, 0.0)
        return gained.float(), state

    def _one(self, state: PrefixState, rows: Sequence[int], words: Sequence[Cuts]) -> PrefixState:
        index = torch.tensor(rows, device=state.prefix.device)
        old = self.prefix.select(state, index)
        label, both, blank, prefix = (x[:, 1:] for x in self._lattice(old, words))
        last = _padded([cuts.last for cuts in words], False).to(label.device)
        # Only a label that a word begins with can come again at once, as the begin of the next word.
        again = last & self._starts.to(label.device)[label]
        rest = torch.where(again[..., None], blank, both)
        both, rest = (x.masked_fill(~last[..., None], IMPOSSIBLE).logsumexp(1).clamp(min=IMPOSSIBLE) for x in (both, rest))
        said = prefix.masked_fill(~last, IMPOSSIBLE).logsumexp(1)
        new = PrefixState(both, rest, said, torch.where(again, label, -1).amax(1), old.utterance)
        return PrefixState(*(x.index_copy(0, index, y) for x, y in zip(_parts(state), _parts(new), strict=True)))

    @cached_property
    def _starts(self) -> Tensor:
        return torch.tensor([text.startswith(" ") for text in self.vocabulary.label_texts])

    def _lattice(self, old: PrefixState, texts: Sequence[Cuts]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(label [R, 1+A], both and blank [R, 1+A, T+1], prefix [R, 1+A]): number 0 is the state before the text, the others that behind
        each cut's label, after all that may come before it."""
        device, count, most = old.prefix.device, len(texts), max(len(cuts.every) for cuts in texts)
        label = torch.cat([old.last[:, None], _padded([cuts.label for cuts in texts], -2).to(device)], 1)
        both, blank = (old.both.new_full((count, most + 2, old.both.shape[1]), IMPOSSIBLE) for _ in range(2))
        prefix = old.both.new_full((count, most + 1), IMPOSSIBLE)
        both[:, 0], blank[:, 0] = old.both, old.blank
        for i in range(max(len(cuts.steps) for cuts in texts)):  # what begins at one place does not hang on each other
            here = [(r, cuts.steps[i]) for r, cuts in enumerate(texts) if i < len(cuts.steps)]
            row = torch.tensor([r for r, step in here for _ in step.begin], device=device)
            cut = torch.tensor([a + 1 for _, step in here for a in step.begin], device=device)
            came = _padded([torch.tensor(step.end) + 1 if i else torch.zeros(1, dtype=torch.long) for _, step in here], most + 1).to(device)
            of = torch.tensor([n for n, (_, step) in enumerate(here) for _ in step.begin], device=device)
            rows = torch.tensor([r for r, _ in here], device=device)
            into = both[rows[:, None], came].logsumexp(1)[of] if came.shape[1] > 1 else both[row, came[of, 0]]
            which, y = came[of], label[row, cut]
            again = label[row[:, None], which.clamp(max=most)] == y[:, None]
            again &= which <= most
            if bool((twice := again.any(1)).any()):  # a label that comes again at once comes through blank
                r, w = row[twice][:, None], which[twice]
                into[twice] = torch.where(again[twice][..., None], blank[r, w], both[r, w]).logsumexp(1)
            both[row, cut], blank[row, cut], prefix[row, cut] = self.prefix.grown(into, y, old.utterance[row])
        return label, both[:, :-1], blank[:, :-1], prefix

    def opened(self, state: PrefixState, begun: Sequence[str], first: Sequence[bool]) -> Tensor:
        """[R] log p(the text goes on with these letters | words so far): the sum over all label sequences whose text begins like that; 0
        where there are no letters, or none that labels can write."""
        texts = [self.text_of(word, first=f) if word.strip() else word for word, f in zip(begun, first, strict=True)]
        out = torch.zeros_like(state.prefix)
        rows = [r for r, text in enumerate(texts) if text and self._can_begin(text)]
        if not rows:
            return out
        index = torch.tensor(rows, device=out.device)
        old, texts = self.prefix.select(state, index), [texts[r] for r in rows]
        cuts = [self._cuts_of(text) for text in texts]
        label, both, blank, prefix = self._lattice(old, cuts)
        said = prefix[:, 1:].masked_fill(~_padded([c.last for c in cuts], False).to(out.device), IMPOSSIBLE)
        beyond = self._all_beyond(old.utterance.tolist(), texts, cuts, label, both, blank)
        total = torch.cat([said, beyond], 1).logsumexp(1).clamp(min=IMPOSSIBLE)
        return out.index_copy(0, index, possible(total) - old.prefix)

    @cached_property
    def following(self) -> Mapping[str, int]:
        """What a text may go on with, numbered: a letter, or a space with the letter behind it (or whatever is)."""
        return {x: i for i, x in enumerate(sorted({_following(text[n:]) for text in self._labels for n in range(len(text))}))}

    def followed(self, state: PrefixState, begun: Sequence[str], first: Sequence[bool]) -> Tensor:
        """[R, F] at least log p(the text goes on with these letters and then what `following` says | words so far): that a label needs a
        blank before it comes again is left out."""
        texts = [self.text_of(word, first=f) if word.strip() else word for word, f in zip(begun, first, strict=True)]
        cuts = [self._cuts_of(text) for text in texts]
        both = self._lattice(state, cuts)[1][..., :-1]
        out = both.new_full((len(texts), len(self.following)), IMPOSSIBLE)
        for r, (u, text, c) in enumerate(zip(state.utterance.tolist(), texts, cuts, strict=True)):
            for end, places in c.ends.items():
                which, table = self._table(u, text[end:])
                if len(which):
                    come = both[r, places].logsumexp(0) if len(places) > 1 else both[r, places[0]]
                    out[r, which] = torch.logaddexp(out[r, which], (come + table).logsumexp(1))
        return possible(out.clamp_(min=IMPOSSIBLE)) - state.prefix[:, None]

    def _table(self, utterance: int, rest: str) -> tuple[Tensor, Tensor]:
        """(what may follow [N] after `rest`, by `following`; log p [N, T] of all labels that begin with `rest` and then that)."""
        if (utterance, rest) not in self._tables:
            which = defaultdict[int, list[int]](list)
            for label in sorted(self._beyond(rest)):
                which[self.following[_following(self.vocabulary.label_texts[label][len(rest) :])]].append(label)
            by_label = self.prefix.by_label[utterance]
            rows = [by_label[torch.tensor(labels, device=by_label.device)].logsumexp(0) for labels in which.values()]
            table = torch.stack(rows).clamp(min=IMPOSSIBLE) if rows else by_label[:0]
            self._tables[utterance, rest] = torch.tensor(list(which), dtype=torch.long, device=by_label.device), table
        return self._tables[utterance, rest]

    def _cuts_of(self, text: str) -> Cuts:
        if text not in self._opened:
            self._opened[text] = self._cut(text, whole=False)
        return self._opened[text]

    def _can_begin(self, text: str) -> bool:
        ends = {0, *(cut.end for cut in self._cuts_of(text).every)}
        return len(text) in ends or any(self._beyond(text[end:]) for end in ends)

    def _beyond(self, rest: str) -> frozenset[int]:
        """The labels that begin with these letters and have more."""
        if rest not in self._further:
            texts = self._texts[bisect_right(self._texts, rest) : bisect_left(self._texts, rest + LAST)]
            self._further[rest] = frozenset(label for text in texts for label in self._labels[text])
        return self._further[rest]

    @cached_property
    def _texts(self) -> Sequence[str]:
        return sorted(self._labels)

    def _all_beyond(
        self, utterances: Sequence[int], texts: Sequence[str], cuts: Sequence[Cuts], label: Tensor, both: Tensor, blank: Tensor
    ) -> Tensor:
        """[R, 1+A] log p of the labels that go beyond the text from each place of the lattice on; the label that led there only through
        blank."""
        known, by_label = label.tolist(), self.prefix.by_label
        others, itself = list[tuple[int, int, Tensor]](), list[tuple[int, int, Tensor]]()
        for r, (u, text, c) in enumerate(zip(utterances, texts, cuts, strict=True)):
            for end, places in c.ends.items():
                if end < len(text) and (labels := self._beyond(rest := text[end:])):
                    for a in places:
                        there = known[r][a] in labels
                        others.append((r, a, self._summed(u, rest, known[r][a] if there else -1)))
                        if there:
                            itself.append((r, a, by_label[u, known[r][a]]))
        out = both.new_full(both.shape[:2], IMPOSSIBLE)
        for states, found in ((both, others), (blank, itself)):
            if found:
                r, a = (torch.tensor([x[i] for x in found], device=out.device) for i in (0, 1))
                gained = (states[r, a, :-1] + torch.stack([x[2] for x in found])).logsumexp(1)
                out[r, a] = torch.logaddexp(out[r, a], gained)
        return out

    def _summed(self, utterance: int, rest: str, aside: int) -> Tensor:
        """[T] log p of all labels beyond `rest` but one."""
        key = utterance, rest, aside
        if key not in self._sums:
            by_label = self.prefix.by_label[utterance]
            labels = torch.tensor(sorted(self._beyond(rest) - {aside}), dtype=torch.long, device=by_label.device)
            self._sums[key] = by_label[labels].logsumexp(0).clamp(min=IMPOSSIBLE)
        return self._sums[key]

    def finish(self, state: PrefixState) -> Tensor:
        return self.prefix.finish(state)

    def select(self, state: PrefixState, rows: Tensor) -> PrefixState:
        return self.prefix.select(state, rows)


SILENT = 1
"""So many labels in a row may write nothing."""


@dataclass(frozen=True)
class Spoken:
    """State of `Spelled`: the words so far, and per row what has been said of the last one already."""

    held: Held[PrefixState]
    open: Tensor  # [R]
    silent: Tensor  # [R] how many labels in a row wrote nothing


class Spelled(Scorer[Spoken]):
    """A CTC model as a scorer of hypotheses in another vocabulary: log p_ctc(text begins so | what it began with before), text for text.

    Labels that write nothing, such as punctuation that is dropped, are free, and a search would rather say them than what costs something:
    more than SILENT in a row are impossible. The score of a label needs its letters, so there is no `log_probs`: the schedule must be one
    without lookahead.
    """

    def __init__(self, prefix: CtcPrefix, vocabulary: Vocabulary, *, policy: TextPolicy | None = None) -> None:
        self.vocabulary, self.policy, self.words = vocabulary, policy or TextPolicy(), CtcWords(prefix)

        def convert(labels: tuple[int, ...], first: bool) -> Sequence[int]:
            words = written_words(labels, vocabulary, self.policy, first=first)
            return [self.words.number(word, first=first and i == 0) for i, word in enumerate(words)]

        self.by_word = ByWord(self.words, vocabulary, convert, starts=parting_starts(vocabulary, self.policy))
        self._begun: dict[tuple[tuple[int, ...], bool], str] = {}

    def start(self, rows: int) -> Spoken:
        held = self.by_word.start(rows)
        return Spoken(held, torch.zeros_like(held.inner.prefix), torch.zeros(rows, dtype=torch.long))

    def log_probs(self, state: Spoken, labels: Tensor | None = None) -> Tensor:
        raise SearchError(
            "a CTC model reads labels of another vocabulary as text, one after the other: fuse it with EveryLabel(lookahead=False)"
        )

    def advance(self, state: Spoken, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Spoken]:
        gained, held = self.by_word.advance(state.held, labels, lengths)
        opened = self.words.opened(held.inner, *self._last_word(held))
        silent, most = state.silent, state.silent
        for column, going in zip(labels.cpu().T, (lengths.cpu()[:, None] > torch.arange(labels.shape[1])).T, strict=True):
            silent = torch.where(going, torch.where(self._writes[column], 0, silent + 1), silent)
            most = torch.maximum(most, silent)
        opened = opened.masked_fill((most > SILENT).to(opened.device), NEG)
        return _further(state.open, gained.to(opened.device) + opened), Spoken(held, opened, silent)

    @cached_property
    def _writes(self) -> Tensor:
        """[V] bool: whether a label writes anything; a separator alone does not."""
        words = map(self.policy.words, self.vocabulary.label_texts)
        return torch.tensor([any(self.policy(x, first=False) for x in w) for w in words])

    def _last_word(self, held: Held[PrefixState]) -> tuple[list[str], list[bool]]:
        """(what is written of it, whether it is the first) in each row."""
        first = (~held.begun).tolist()
        rows = zip(held.pending.tolist(), held.count.tolist(), first, strict=True)
        return [self._written(tuple(labels[:n]), f) for labels, n, f in rows], first

    def _written(self, labels: tuple[int, ...], first: bool) -> str:
        """The letters of a word that may go on; a space where more than a separator is still to come."""
        if (labels, first) not in self._begun:
            written = " ".join(written_words(labels, self.vocabulary, self.policy, first=first)).rstrip(UNFINISHED)
            parted = not first and "".join(self.vocabulary.label_texts[label] for label in labels).isspace()
            self._begun[labels, first] = " " if parted else written
        return self._begun[labels, first]

    def bound(self, state: Spoken) -> Tensor | None:
        """By what a label's text begins with; 0 where that is no letter."""
        followed = self.words.followed(state.held.inner, *self._last_word(state.held)) - state.open[:, None]
        spaced = self.words.following.get(" ")
        if spaced is not None:  # a label that is only a space may have any letter behind it
            behind = [i for text, i in self.words.following.items() if text[:1] == " " and i != spaced]
            followed[:, behind] = torch.logaddexp(followed[:, behind], followed[:, spaced, None])
        free = followed.new_zeros(len(followed), 1)
        table = torch.cat([followed.clamp(max=0.0).nan_to_num(nan=NEG), free, torch.full_like(free, NEG)], 1)
        inside, begins = (x.to(table.device) for x in self._follows)
        found = table.gather(1, torch.where((state.held.count == 0).to(table.device)[:, None], begins, inside)).float()
        return found.masked_fill(((state.silent >= SILENT)[:, None] & ~self._writes).to(found.device), NEG)

    @cached_property
    def _follows(self) -> tuple[Tensor, Tensor]:
        """[V] twice: the number of what the label goes on with, inside a text and at its begin; the next number is for what is free, and
        the one behind it for what no label writes."""
        free, never = len(self.words.following), len(self.words.following) + 1
        known: dict[str, tuple[int, int]] = {}
        for begin in {text[:2] for text in self.vocabulary.label_texts}:
            letter = self.policy(begin.strip()[:1], first=False)
            at_begin, spaced = (self.words.text_of(letter, first=first) for first in (True, False))
            inner = spaced if begin[:1] == " " else spaced.strip()
            known[begin] = (free, free)
            if letter.isalnum():
                known[begin] = self.words.following.get(inner, never), self.words.following.get(at_begin, never)
        inside, begins = zip(*(known[text[:2]] for text in self.vocabulary.label_texts), strict=True)
        return torch.tensor(inside), torch.tensor(begins)

    def finish(self, state: Spoken) -> Tensor:
        return _further(state.open, self.by_word.finish(state.held).to(state.open.device))

    def select(self, state: Spoken, rows: Tensor) -> Spoken:
        return Spoken(self.by_word.select(state.held, rows), state.open[rows.to(state.open.device)], state.silent[rows.cpu()])


def _following(text: str) -> str:
    return text[: 2 if text[:1] == " " else 1]


def _further(said: Tensor, score: Tensor) -> Tensor:
    """The score but what has been said of it; what is impossible stays so."""
    return torch.where(said == NEG, NEG, score - said).float()


def _parts(state: PrefixState) -> tuple[Tensor, ...]:
    return state.both, state.blank, state.prefix, state.last, state.utterance


def _padded(rows: Sequence[Tensor], value: int | bool) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
