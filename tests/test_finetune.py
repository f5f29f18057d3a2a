"""Fine-tuning: inputs of the four tasks, losses against transformers', answers against brute force."""

import random
import re
import runpy
import sys
from itertools import islice, product
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bert
import finetune
import wordpiece
from finetune import IGNORE, best_spans, collate, encode_question, encode_tags, fine_tune, held_out_score, hold_out, join_pair, span_loss, tagging_loss
from wordpiece import split_words

SPECIAL = SimpleNamespace(pad=0, cls=2, sep=3, mask=4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- inputs ---------------------------------------------------------------------------------

def test_a_question_is_laid_out_as_a_pair_and_its_answer_found_again():
    question, passage = [10, 11], [[20], [21, 22], [23], [24, 25, 26]]
    flat = [i for word in passage for i in word]
    for first, last in ((0, 0), (1, 1), (1, 3), (3, 3), (0, 3)):
        tokens, segments, (start, end) = encode_question(SPECIAL, 20, question, passage, (first, last))
        assert (tokens, segments) == join_pair(SPECIAL, 20, question, flat)
        assert tokens[start:end + 1] == [i for word in passage[first:last + 1] for i in word]
    assert encode_question(SPECIAL, 20, question, passage, None) == (*join_pair(SPECIAL, 20, question, flat), (0, 0))


def test_an_answer_cut_off_by_truncation_is_refused_and_one_that_just_fits_is_not():
    question, passage = [10, 11], [[20], [21, 22], [23], [24, 25, 26]]
    tokens, segments, span = encode_question(SPECIAL, 8, question, passage, (1, 1))  # [CLS] 2 [SEP] 3 [SEP]
    assert tokens == [2, 10, 11, 3, 20, 21, 22, 3] and segments == [0] * 4 + [1] * 4 and span == (5, 6)
    with pytest.raises(ValueError, match="the answer, words 1 .. 2, ends at token 8, but 8 tokens hold only 7 before"):
        encode_question(SPECIAL, 8, question, passage, (1, 2))
    with pytest.raises(ValueError, match="the answer, words 1 .. 1, ends at token 7"):  # its last piece alone is cut off
        encode_question(SPECIAL, 7, question, passage, (1, 1))
    assert encode_question(SPECIAL, 7, question, passage, None)[2] == (0, 0)  # nothing to lose


@pytest.mark.parametrize("answer", [(-1, 0), (2, 1), (3, 4)])
def test_answers_outside_the_passage_are_refused(answer):
    with pytest.raises(ValueError, match=rf"answer words {answer[0]} .. {answer[1]} are not in a passage of 4 words"):
        encode_question(SPECIAL, 20, [10], [[20]] * 4, answer)


def test_a_question_that_fills_the_room_is_refused():
    with pytest.raises(ValueError, match="a question of 6 tokens leaves no room for a passage in 9"):
        encode_question(SPECIAL, 9, [10] * 6, [[20]], None)


def test_the_first_piece_carries_the_tag_and_the_rest_is_ignored():
    tokens, segments, tags = encode_tags(SPECIAL, 20, [[7], [8, 9, 10], [11, 12]], [2, 0, 1])
    assert tokens == [2, 7, 8, 9, 10, 11, 12, 3] and segments == [0] * 8
    assert tags == [IGNORE, 2, 0, IGNORE, IGNORE, 1, IGNORE, IGNORE]


@pytest.mark.parametrize("room, words, tags, message", [
    (7, [[7], [8, 9, 10], [11, 12]], [0, 0, 0], "a sequence of 8 tokens does not fit a context of 7"),
    (20, [[7], [8]], [0], "got 2 words, 0 of them without pieces, and 1 tags"),
    (20, [[7], []], [0, 1], "got 2 words, 1 of them without pieces, and 2 tags")])
def test_tags_that_would_be_lost_are_refused(room, words, tags, message):
    with pytest.raises(ValueError, match=message):
        encode_tags(SPECIAL, room, words, tags)


def test_batches_pad_tokens_and_tags():
    rows = [encode_tags(SPECIAL, 20, [[7], [8, 9]], [1, 2]), encode_tags(SPECIAL, 20, [[7]], [3])]
    tokens, segments, real, tags = collate(SPECIAL, rows)
    assert tokens.tolist() == [[2, 7, 8, 9, 3], [2, 7, 3, 0, 0]] and tags.tolist() == [[-100, 1, 2, -100, -100], [-100, 3, -100, -100, -100]]
    assert collate(SPECIAL, [(*join_pair(SPECIAL, 9, [7]), (1, 2))] * 3)[3].tolist() == [[1, 2]] * 3
    assert collate(SPECIAL, [(*join_pair(SPECIAL, 9, [7]), 1)] * 3)[3].tolist() == [1, 1, 1]


# --- losses and answers ---------------------------------------------------------------------

def test_losses_match_transformers():
    transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                     max_position_embeddings=9, num_labels=4)
    tokens, g = torch.randint(5, 30, (3, 9), generator=seeded()), seeded(1)
    tagger = transformers.BertForTokenClassification(config).eval()
    tags = torch.randint(4, (3, 9), generator=g).masked_fill(torch.rand(3, 9, generator=g) < 0.4, IGNORE)
    out = tagger(tokens, labels=tags)
    torch.testing.assert_close(tagging_loss(out.logits, tags), out.loss, atol=1e-6, rtol=0)
    config.num_labels = 2
    reader, spans = transformers.BertForQuestionAnswering(config).eval(), torch.tensor([[1, 4], [0, 0], [7, 8]])
    out = reader(tokens, start_positions=spans[:, 0], end_positions=spans[:, 1])
    torch.testing.assert_close(span_loss(torch.stack((out.start_logits, out.end_logits), -1), spans), out.loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("threshold, longest", [(0.0, 30), (0.0, 3), (1.5, 4), (-100.0, 2), (100.0, 30)])
def test_best_spans_match_brute_force(threshold, longest):
    scores = torch.randn(40, 11, 2, generator=seeded())
    allowed = torch.rand(40, 11, generator=seeded(1)) < 0.6
    allowed[:, 0], allowed[:, 5] = False, True
    spans, margins = best_spans(scores, allowed, threshold, longest)
    for row in range(40):
        start, end = scores[row].unbind(-1)
        best, i, j = max((float(start[i] + end[j]), i, j) for i, j in product(range(11), repeat=2)
                         if i <= j < i + longest and allowed[row, i] and allowed[row, j])
        none = float(start[0] + end[0])
        assert margins[row].item() == pytest.approx(best - none, abs=1e-5)
        assert tuple(spans[row].tolist()) == ((i, j) if best > none + threshold else (0, 0))
    answered = (spans[:, 1] > 0).float().mean()
    assert answered == 1.0 if threshold == -100 else answered == 0.0 if threshold == 100 else 0.0 < answered < 1.0 or threshold == 0


def test_nothing_allowed_is_no_answer():
    spans, margin = best_spans(torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool), -1e9)
    assert spans.tolist() == [[0, 0]] and margin.item() == float("-inf")


# --- training and scoring -------------------------------------------------------------------

class PerToken(nn.Module):
    """Scores of each token by its id alone; ``first``: of the token after [CLS], as a classifier."""

    def __init__(self, n, first=False):
        super().__init__()
        self.table, self.first = nn.Embedding(40, n), first
        nn.init.zeros_(self.table.weight)

    def forward(self, tokens, segments, real):
        x = self.table(tokens)
        return x[:, 1] if self.first else x


def test_fine_tuning_learns_each_sort_of_target_and_the_score_counts_right_ones():
    rng = random.Random(0)
    ids = [[rng.randrange(10, 40) for _ in range(rng.randrange(2, 6))] for _ in range(120)]
    labels = [(*join_pair(SPECIAL, 20, row), row[0] % 2) for row in ids]
    tags = [encode_tags(SPECIAL, 20, [[i] for i in row], [i % 3 for i in row]) for row in ids]
    spans = []
    for row in ids:
        passage = [[i] for i in (*row[:2], 5, 7, 6)] if row[0] % 2 else [[i] for i in row]  # the answer is 5 .. 6
        spans.append(encode_question(SPECIAL, 20, [9], passage, (2, 4) if row[0] % 2 else None))
    for model, loss, rows in ((PerToken(2, first=True), F.cross_entropy, labels), (PerToken(3), tagging_loss, tags), (PerToken(2), span_loss, spans)):
        before = held_out_score(model, rows, SPECIAL)
        fine_tune(model, loss, rows, SPECIAL, epochs=60, lr=0.2)
        assert before < 0.75 and held_out_score(model, rows, SPECIAL) == 1.0 and not model.training


def test_fine_tuning_follows_its_seed_and_takes_fewer_rows_than_a_batch():
    rows = [(*join_pair(SPECIAL, 20, [10 + i]), i % 2) for i in range(20)]
    found = []
    for seed, batch in ((0, 8), (0, 8), (1, 8), (0, 64)):
        model = PerToken(2, first=True)
        fine_tune(model, F.cross_entropy, rows, SPECIAL, epochs=2, batch=batch, seed=seed)
        found.append(model.table.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2]) and found[3].any()


# --- tasks ----------------------------------------------------------------------------------

TEXTS = ["Too short.\n\n" + "\n\n".join(f"{verb} the {noun} of a {kind} object, if there is one, or None. "
                                           f"The other {noun} is left alone by {name}() in this case."
                     for noun in ("name", "size", "item", "owner", "path", "time", "mode", "kind", "date", "root", "link", "rest", "state"))
         for verb, kind, name in (("Return", "file", "open"), ("Print", "lock", "wait"), ("Send", "mail", "post"))]


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece.WordPiece(wordpiece.train_wordpiece(TEXTS, 140))


def rows(make, tokenizer, n=40, seed=0, room=96, **options):
    return list(islice(make(TEXTS, tokenizer, room, random.Random(seed), **options), n))


def test_held_out_text_is_the_end_of_each_document():
    train, test = hold_out(TEXTS, 0.3)
    assert ["\n\n".join(both) for both in zip(train, test)] == TEXTS and all(test)
    assert [len(text.split("\n\n")) for text in test] == [4, 4, 4]
    assert hold_out(["one paragraph"]) == (["one paragraph"], [""])


def test_passages_and_sentences_are_found():
    assert [len(finetune.passages(text)) for text in TEXTS] == [13, 13, 13]
    assert " ".join(finetune.word_sentences(TEXTS)[0]) == "Return the name of a file object, if there is one, or None."
    assert len(finetune.word_sentences(TEXTS)) == 78


def test_a_paragraph_carries_the_number_of_its_document(tokenizer):
    found = rows(finetune.origin_rows, tokenizer, longest=[2, 0])
    assert sorted(label for *_, label in found) == [0] * 13 + [1] * 13
    assert all(("send" if label == 0 else "return") in tokenizer.decode(tokens) for tokens, _, label in found)


def test_half_of_the_pairs_are_of_one_document(tokenizer):
    for k, (tokens, segments, label) in enumerate(rows(finetune.pair_rows, tokenizer, longest=[0, 1, 2])):
        a, b = tokenizer.decode(tokens)[6:-6].split(" [SEP] ")
        assert label == k % 2 == int(a.split()[0] != b.split()[0]) and a != b and sum(segments) > 2


def test_the_answer_is_the_sentence_of_the_questions_document(tokenizer):
    whole = {" ".join(split_words(" ".join(words))) for words in finetune.word_sentences(TEXTS)}
    firsts = set()
    for tokens, segments, (start, end) in rows(finetune.question_rows, tokenizer, 60):
        begin = segments.index(1)
        answer, question = tokenizer.decode(tokens[start:end + 1]), tokenizer.decode(tokens[1:begin - 1])
        rest = tokenizer.decode([*tokens[begin:start], *tokens[end + 1:-1]])
        verb = {"return": "open", "print": "wait", "send": "post"}[question.split()[0]]
        assert {answer, rest} <= whole and (question.split()[0] in answer or verb in answer)
        firsts.add(start == begin)
    assert firsts == {True, False}


def test_every_word_carries_the_number_of_its_sentences_document(tokenizer):
    for tokens, _, tags in rows(finetune.origin_tag_rows, tokenizer, longest=[2, 0]):
        assert sorted(set(tags) - {IGNORE}) == [0, 1]
        for label, names in ((0, ("send", "post")), (1, ("return", "open"))):
            part = tokenizer.decode([token for token, tag in zip(tokens, tags) if tag == label]).split()
            first = next(i for i, tag in enumerate(tags) if tag == label)
            words = tokenizer.decode(tokens[first:]).split()
            assert part and (words[0] == names[0] or names[1] in words)


def test_rows_that_never_fit_end(tokenizer, monkeypatch):
    monkeypatch.setattr(finetune, "TRIES", 100)
    assert rows(finetune.question_rows, tokenizer, room=12) == [] == rows(finetune.origin_tag_rows, tokenizer, room=12, longest=[0, 1])


def test_tasks_hold_what_was_asked_for_and_the_baseline_is_the_share_of_the_usual_answer(tokenizer):
    tasks = finetune.make_tasks(*hold_out(TEXTS, 0.5), tokenizer, 96, 6, seed=0)
    assert [len(task.train) for task in tasks] == [6, 6, 6, 6] and [task.n_labels for task in tasks] == [3, 2, 2, 3]
    assert tasks[0].baseline == pytest.approx(1 / 3, abs=0.1) and tasks[1].baseline == 0.5
    assert tasks[2].baseline < 0.5 and 0.2 < tasks[3].baseline < 0.8
    with pytest.raises(ValueError, match="the texts hold no rows for the task 'text: which document'"):
        finetune.make_tasks(["nothing"], TEXTS, tokenizer, 96, 3, seed=0)


# --- demo -----------------------------------------------------------------------------------

def demo(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    runpy.run_path(finetune.__file__, run_name="__main__")
    return capsys.readouterr().out


def test_demo_ends_on_its_verdict_and_every_flag_changes_something(tokenizer, tmp_path, monkeypatch, capsys):
    import data
    monkeypatch.setattr(data, "default_documents", lambda: TEXTS)
    model = bert.BERTForPretraining(bert.BERTConfig(len(tokenizer), context=96, n_layers=1, n_heads=2, d_model=16), seeded())
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "vocab.txt")
    runs = [demo(monkeypatch, capsys, "--init", tmp_path, "--examples", 6, *more)
            for more in ((), (), ("--seed", 1), ("--examples", 2))]
    assert runs[0] == runs[1] and len(set(runs)) == 3
    assert all(re.search(r"transfer: pre-training is ahead of the baseline and of training from scratch on \d of 4 tasks", run) for run in runs)
    with pytest.raises(SystemExit) as caught:
        demo(monkeypatch, capsys, "--init", tmp_path / "missing")
    assert caught.value.code == 2 and "missing/vocab.txt: cannot be read" in capsys.readouterr().err
    assert re.search(r"from scratch: above the baseline on \d of 4 tasks", demo(monkeypatch, capsys, "--examples", 2))


@pytest.mark.parametrize("flags, message", [(("--examples", 0), "--examples must be at least 1 and --seed in 0 .. 2^32 - 1, got 0 and 0")])
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        demo(monkeypatch, capsys, *flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows to learn from"):
        fine_tune(PerToken(2, first=True), F.cross_entropy, [], SPECIAL)
    with pytest.raises(ValueError, match="no rows to score"):
        held_out_score(PerToken(2, first=True), [], SPECIAL)
