"""The hallucination guard: evidence against brute force over all alignments, and what it says of right and wrong transcripts."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from duolect.search import guard as module
from duolect.search.fusion import SearchError
from duolect.search.guard import Evidence, Guard, Loop, Verdict, guarded, judge, longest_loop
from duolect.vocabulary import CharacterVocabulary
from tests.oracles import all_alignments, collapsed, random_log_probs

TRUSTING = Guard(nats=1e9, unexplained_seconds=1e9)
DEFAULT = Guard()
SECONDS = 0.04
ALPHABET = CharacterVocabulary(["<pad>", "|", *"abcdefghijklmnopqrstuvwxyz'", "</s>"], bos="</s>")


def spoken(text, *, pause=2, vocabulary=ALPHABET, sure=0.999, silence=(3, 3)):
    """Log-probs of audio in which a text is said: each label one frame, then `pause` frames of blank."""
    labels = vocabulary.encode(text)
    frames = [vocabulary.blank] * silence[0]
    for label in labels:
        frames += [label, *[vocabulary.blank] * pause]
    frames += [vocabulary.blank] * silence[1]
    x = torch.full((len(frames), vocabulary.size), (1 - sure) / (vocabulary.size - 1))
    x[torch.arange(len(frames)), torch.tensor(frames, dtype=torch.long)] = sure
    return x.log()


def judged(text, x, *, vocabulary=ALPHABET, guard=DEFAULT):
    return judge(text.split(), x, vocabulary=vocabulary, seconds_per_frame=SECONDS, guard=guard)


def suspects(verdict):
    return [w.text for w in verdict.words if w.cause]


SAID = "the cat sat on the mat and looked out"


def test_evidence_is_that_of_the_best_of_all_alignments(letters):
    for seed, text in itertools.product(range(3), ["a", "ab", "a b", "aa b", "b a"]):
        x = random_log_probs(1, 6, letters, seed=seed, peak=2.0)[0]
        x[0, letters.blank] += 8  # so that something is heard, and something is blank
        x = x.log_softmax(-1)
        labels = tuple(letters.encode(text))
        paths = [p for p in itertools.product(range(letters.size), repeat=6) if collapsed(p, letters.blank) == labels]
        best = max(paths, key=lambda p: float(x[torch.arange(6), list(p)].double().sum()))
        verdict = judge(text.split(), x, vocabulary=letters, seconds_per_frame=SECONDS, guard=TRUSTING)
        spans = []  # first and last frame of each label
        for t, y in enumerate(best):
            if y != letters.blank and (t == 0 or best[t - 1] != y):
                spans.append([t, t])
            elif y != letters.blank:
                spans[-1][1] = t
        at = 0
        for word, evidence in zip(text.split(), verdict.words, strict=True):
            at += at > 0  # the separator is not part of the word
            mine = spans[at : at + len(word)]
            at += len(word)
            start, end = mine[0][0], mine[-1][1] + 1
            inside = [t for a, b in mine for t in range(a, b + 1)]
            log_prob = sum(float(x[t, best[t]]) for t in inside)
            assert evidence.labels == len(word)
            assert (evidence.start, evidence.end) == pytest.approx((start * SECONDS, end * SECONDS))
            assert evidence.log_ratio == pytest.approx((log_prob - sum(float(x[t].max()) for t in inside)) / len(word), abs=1e-5)


def case_of(words, x, vocabulary, guard=DEFAULT):
    spelled = module._spelled(words, vocabulary)
    return module._Case(words, words, spelled, x.double().clamp(min=-1e4), vocabulary, SECONDS, guard)


def test_prefix_scores_are_sums_over_all_alignments(letters):
    x = random_log_probs(1, 5, letters, seed=5)[0]
    words = ["ab", "b", "a"]
    case = case_of(words, x, letters)
    got = case.forward(case.x, case.spelled)
    for t in range(6):
        table = all_alignments(x[:t], letters.blank) if t else {(): 0.0}
        for k in range(4):
            labels = tuple(y for word in case.spelled[:k] for y in word)
            assert got[k, t] == pytest.approx(table.get(labels, -math.inf), abs=1e-4), (k, t)


def test_the_run_taken_out_is_the_one_without_which_the_audio_is_likeliest(letters):
    """The gain is of one moment between what is before and behind: at most all moments, at least their mean."""
    for seed in range(8):
        x = random_log_probs(1, 6, letters, seed=seed)[0]
        words = ["a", "b", "ab", "a"][: 2 + seed % 3]
        case = case_of(words, x, letters, Guard(nats_per_label=1.0))
        table, n = all_alignments(x, letters.blank), len(words)

        def score(kept, case=case, table=table):
            labels = tuple(y for i in kept for y in case.spelled[i])
            return table.get(labels, -math.inf) + 1.0 * len(labels)

        runs = {(i, j): score([*range(i), *range(j, n)]) for i in range(n) for j in range(i + 1, n + 1)}
        run, gain = case.worst(*case.scores(case.spelled), case.spelled)
        full = score(range(n))
        if full == -math.inf:
            assert gain == math.inf
            continue
        best = max(runs.values()) - full
        assert best - math.log(7) - 1e-4 <= gain
        assert gain <= best + math.log(2) + 1e-4  # a label that ends what is before and begins what is behind counts twice
        assert runs[run.start, run.stop] >= max(runs.values()) - math.log(7) - math.log(2) - 1e-4


@pytest.mark.parametrize("written", [SAID, "The cat sat — on the mat, and LOOKED out.", "The Cat ... sat on the mat and looked out!"])
def test_a_right_transcript_of_any_spelling_is_believed(written):
    verdict = judged(written, spoken(SAID))
    assert not verdict.causes and not verdict.condemned and verdict.fits and verdict.unexplained == ()
    assert [w.text for w in verdict.words] == written.split()
    assert all(w.log_ratio is None or w.log_ratio == pytest.approx(0.0, abs=1e-6) for w in verdict.words)
    starts = [w.start for w in verdict.words]
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("before", "invented", "behind", "cause"),
    [
        (SAID, "please subscribe to our channel", "", "tail"),
        (SAID, "thank you", "", "tail"),
        ("", "subtitles by the community", SAID, "words"),
        ("the cat sat on the mat", "yesterday evening", "and looked out", "words"),
        (SAID, "out " * 200, "", "loop"),
        (SAID, "looked out " * 3, "", "loop"),
        ("the cat sat on the", "on the " * 20, "mat and looked out", "loop"),
    ],
)
def test_what_was_invented_is_found_and_nothing_else(before, invented, behind, cause):
    text = " ".join([before, invented, behind])
    verdict = judged(text, spoken(SAID))
    flags = [w.cause for w in verdict.words]
    n, m = len(before.split()), len(invented.split())
    assert flags == [None] * n + [cause] * m + [None] * len(behind.split())
    assert set(verdict.causes) == {cause} and verdict.condemned == (2 * m >= len(flags))
    truncated = guarded(text, verdict, policy="truncate")
    if cause in ("tail", "loop"):
        assert truncated == (SAID, "truncated")
    else:
        assert truncated == (text, "warned")


def test_another_text_is_condemned():
    verdict = judged("nothing of this was ever said here", spoken(SAID, pause=4))
    assert verdict.condemned and len(suspects(verdict)) >= 6


@pytest.mark.parametrize("missing", [slice(0, 2), slice(2, 5), slice(4, 6), slice(1, 6)])
def test_speech_that_was_left_out_has_a_place(missing):
    words = ["abc", "def", "ghi", "jkl", "mno", "pqr"]  # no letter twice, so that none can be lent to a word beside
    x = spoken(" ".join(words), pause=3)
    whole = judged(" ".join(words), x).words
    kept = [word for word in words if word not in words[missing]]
    verdict = judged(" ".join(kept), x)
    assert set(verdict.causes) == {"unexplained"} and not suspects(verdict)
    (span,) = verdict.unexplained
    # The separators between are heard, too; the first words lack the one before them.
    assert span == pytest.approx((whole[missing][0].start, whole[missing][-1].end), abs=4 * SECONDS + 1e-9)
    assert verdict.condemned == (len(kept) <= 3)
    assert guarded(" ".join(kept), verdict, policy="truncate").action == "warned"


def test_real_repeats_are_not_a_loop():
    said = "no no no no that is it"
    verdict = judged(said, spoken(said))
    assert verdict.loop == Loop(0, 1, 4) and not verdict.causes
    more = judged("no " * 12 + "that is it", spoken(said))
    assert set(more.causes) == {"loop"}
    assert guarded("", more, policy="truncate") == (said, "truncated"), "as many passes stay as are heard"
    tail = judged(said + " thank you for watching", spoken(said))
    assert suspects(tail) == ["thank", "you", "for", "watching"], "an invented end must not speak against real repeats before it"


def test_too_many_labels_for_the_frames():
    x = spoken("the cat", pause=1, silence=(0, 0))
    verdict = judged("the cat sat on the mat and looked out of the window", x)
    assert not verdict.fits and suspects(verdict) == ["sat", "on", "the", "mat", "and", "looked", "out", "of", "the", "window"]
    assert all(w.log_ratio is None and w.labels == 0 and w.start == verdict.words[1].end for w in verdict.words[2:])
    assert guarded("the cat sat ...", verdict, policy="truncate").text == "the cat"


@pytest.mark.parametrize("frames", [0, 1, 50])
def test_silence_and_no_audio(frames):
    x = torch.full((frames, ALPHABET.size), 1e-4)
    x[:, ALPHABET.blank] = 1.0
    x = (x / x.sum(-1, keepdim=True)).log()
    empty = judged("", x)
    assert empty == Verdict((), (), Loop(), True, {}, False)
    for text in ("you", "thank you for watching", "the " * 200, "42"):
        verdict = judged(text, x)
        assert verdict.condemned and set(verdict.causes) == {"silence"} and suspects(verdict) == text.split()
        assert guarded(text, verdict, policy="truncate") == ("", "truncated")
    assert judged("you", x).fits == (frames >= 3)


def test_an_empty_transcript_of_speech_is_condemned():
    verdict = judged("", spoken(SAID))
    assert verdict.condemned and set(verdict.causes) == {"unexplained"}
    assert guarded("", verdict, policy="ctc", ctc=lambda: SAID) == (SAID, "replaced")
    assert guarded("", verdict, policy="truncate") == ("", "warned")


def test_words_that_ctc_cannot_spell_are_not_judged_and_excuse_what_they_stand_for():
    verdict = judged("the cat sat on the 42 and looked out", spoken(SAID, pause=6))
    assert not verdict.causes and verdict.unexplained == ()
    (word,) = (w for w in verdict.words if w.text == "42")
    assert word.log_ratio is None and word.labels == 0
    assert word.start == word.end == verdict.words[4].end
    dash = judged("the cat sat on the — and looked out", spoken(SAID, pause=6))
    assert set(dash.causes) == {"unexplained"}, "a dash stands for nothing"
    assert not judged("the cat sat on the mat 猫 naïve and looked out", spoken(SAID)).causes
    digits = SAID + " 7" * 19
    assert not judged(digits, spoken(SAID)).causes
    many = judged(digits + " 7", spoken(SAID))
    assert suspects(many) == ["7"] * 19 and set(many.causes) == {"loop"}
    tail = judged(SAID + " thank you for watching 42", spoken(SAID))
    assert suspects(tail) == ["thank", "you", "for", "watching", "42"], "what cannot be judged goes with the end it belongs to"


def test_what_cannot_be_judged_before_an_invented_end_stays():
    assert suspects(judged(SAID + " 42 thank you for watching", spoken(SAID))) == ["thank", "you", "for", "watching"]


def test_other_words_than_were_said():
    verdict = judged("the cat flew by the mat and looked out", spoken(SAID))
    assert set(verdict.causes) == {"words"} and {"flew", "by"} <= set(suspects(verdict)) <= {"cat", "flew", "by", "the"}
    assert guarded("", verdict, policy="truncate").action == "warned" and not verdict.condemned


def test_dear_runs_are_maximal_sums(letters):
    """Every run that is found costs more than is allowed, and no run of words that were not found does."""
    rng = random.Random(1)
    case = case_of([], torch.zeros(1, letters.size), letters, Guard(nats_per_label=5.0, nats=10.0))
    found = 0
    for _ in range(200):
        ratios = [None if rng.random() < 0.1 else -rng.choice([0.0, 1.0, 6.0, 9.0, 14.0]) for _ in range(rng.randint(0, 9))]
        words = [Evidence("w", 0, 1, rng.randint(1, 3), r) for r in ratios]
        surplus = [0.0 if w.log_ratio is None else -(w.log_ratio + 5.0) * w.labels for w in words]
        runs = case.dear(words)
        inside = {i for run in runs for i in run}
        assert all(sum(surplus[i] for i in run) > 10.0 and surplus[run.start] >= 0.0 < surplus[run.stop - 1] for run in runs)
        assert sum(len(run) for run in runs) == len(inside)
        for i, j in itertools.combinations(range(len(words) + 1), 2):
            assert inside & set(range(i, j)) or sum(surplus[i:j]) <= 10.0
        found += len(runs)
    assert found > 50


def test_equal_labels_need_a_blank_between(letters):
    x = random_log_probs(1, 2, letters, seed=0)[0]
    x[0, 0] += 20
    for text, frames, fits in (("aa", 2, False), ("ab", 2, True), ("a", 1, True), ("ab", 1, False)):
        assert judge([text], x[:frames].log_softmax(-1), vocabulary=letters, seconds_per_frame=SECONDS).fits == fits


def test_loops_are_found_as_by_trying_everything():
    rng = random.Random(0)
    for _ in range(300):
        words = [rng.choice("ab" if rng.random() < 0.5 else "abc") for _ in range(rng.randint(0, 12))]
        best = Loop()
        for period in range(1, len(words) // 2 + 1):
            for start in range(len(words)):
                repeats = 1
                while words[start + repeats * period : start + (repeats + 1) * period] == words[start : start + period] and start + (
                    repeats + 1
                ) * period <= len(words):
                    repeats += 1
                if repeats > 1 and (repeats - 1) * period > (best.repeats - 1) * best.period * (best.repeats > 0):
                    best = Loop(start, period, repeats)
        assert longest_loop(words) == best
    assert longest_loop(["I", "think"] * 1000) == Loop(0, 2, 1000)


def test_padding_changes_nothing():
    texts = [SAID, "the cat sat", "the cat " * 30]
    xs = [spoken("the cat sat"), spoken(SAID)]
    padded = torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
    for text, (row, x) in itertools.product(texts, zip(padded, xs, strict=True)):
        assert judged(text, row[: len(x)]) == judged(text, x)


def test_certain_and_impossible_labels_give_numbers():
    x = torch.where(spoken(SAID) > math.log(0.5), 0.0, -math.inf)
    assert not judged(SAID, x).causes
    verdict = judged(SAID + " thank you", x)
    assert suspects(verdict) == ["thank", "you"]
    assert all(math.isfinite(w.log_ratio) and w.log_ratio <= 0 for w in verdict.words)


def test_pieces_and_characters_and_a_first_separator(other_vocabularies):
    pieces = other_vocabularies["pieces"]
    from duolect.vocabulary import SentencePieceVocabulary

    vocabulary = SentencePieceVocabulary(pieces.model, blank="last")
    verdict = judged("AB, ba abba", spoken("ab ba abba", vocabulary=vocabulary), vocabulary=vocabulary)
    assert not verdict.causes and [w.labels > 0 for w in verdict.words] == [True] * 3
    assert suspects(judged("ab ba abba bab baab bb aa", spoken("ab ba abba", vocabulary=vocabulary), vocabulary=vocabulary)) == [
        "bab",
        "baab",
        "bb",
        "aa",
    ]


def test_what_is_too_long_says_so(monkeypatch):
    monkeypatch.setattr(module, "MOST_CELLS", 100)
    with pytest.raises(SearchError, match=r"5 s of audio and 9 words .* cut the recording"):
        judged(SAID, spoken(SAID))
    assert not judged("", spoken("a")).causes


def verdict_of(causes=("tail",), condemned=False):
    words = (Evidence("a", 0, 1, 1, -0.1), Evidence("b", 1, 1, cause="tail" if "tail" in causes else None))
    return Verdict(words, (), Loop(), True, dict.fromkeys(causes, "why"), condemned)


def test_policies():
    told = {"ctc": lambda: "own", "rejoint": lambda: "joint"}
    fine, tail, bad = verdict_of(()), verdict_of(), verdict_of(condemned=True)
    for policy in ("off", "warn", "truncate", "rejoint", "ctc"):
        assert guarded("a b", fine, policy=policy, **told) == ("a b", "none")
    assert guarded("a b", bad, policy="off", **told) == ("a b", "none")
    assert guarded("a b", bad, policy="warn", **told) == ("a b", "warned")
    assert guarded("a b", tail, policy="truncate", **told) == ("a", "truncated")
    assert guarded("a b", tail, policy="ctc", **told) == ("a b", "warned")
    assert guarded("a b", bad, policy="ctc", **told) == ("own", "replaced")
    assert guarded("a b", bad, policy="ctc") == ("a b", "warned")
    assert guarded("a b", tail, policy="rejoint", **told) == ("joint", "rejoint")
    assert guarded("a b", tail, policy="rejoint") == ("a b", "rejoint")
    assert guarded("a b", verdict_of(("unexplained",)), policy="truncate") == ("a b", "warned")
