"""The template against one written out by hand, packing against single rows, files good and bad."""

import functools
import json
import random

import pytest
import tiktoken
import torch

import chat
import rlhf
from chat import (END, Conversation, Preference, answer_text, ask, batches, extend, fit_example, fit_pair,
                  pack_examples, pad, read_conversations, read_preferences, render, render_prompt, resize_vocabulary,
                  split_conversations)
from run_here import run_here
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from packing import PackedRows

BYTES = {bytes([b]): b for b in range(256)}


def byte_encoding(**special):
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=BYTES,
                             special_tokens={"<|endoftext|>": 256} | special)


@pytest.fixture(scope="module")
def encoding():
    return extend(byte_encoding())


def gpt(V=261, context=64):
    return GPT(GPTConfig(V, context, 2, 2, 16), generator=torch.Generator().manual_seed(0)).double().eval()


def llama(V=261, context=64, tied=False):
    return Llama(LlamaConfig(V, context, 2, 2, 1, 16, 32, tied=tied), generator=torch.Generator().manual_seed(0)).double()


def file_of(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# --- vocabulary ---

def test_special_tokens_stand_behind_the_vocabulary_and_those_there_keep_their_ids(encoding):
    assert [encoding.encode_single_token(t) for t in chat.SPECIAL_TOKENS] == [257, 258, 259, 260]
    assert encoding.n_vocab == 261 and extend(encoding) is encoding
    partly = extend(byte_encoding(**{END: 300}))
    assert partly.encode_single_token(END) == 300 and partly.encode_single_token("<|system|>") == 301
    bare = extend(tiktoken.Encoding("bare", pat_str=r"(?s:.)", mergeable_ranks=BYTES, special_tokens={}))
    assert bare.encode_single_token("<|system|>") == 256


@pytest.mark.parametrize("make", [lambda: gpt(256), lambda: llama(256), lambda: llama(256, tied=True)])
def test_resizing_leaves_all_old_logits_as_they_were_and_new_ones_ordinary(make):
    model, tokens = make(), torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens)
        resize_vocabulary(model, 260, torch.Generator().manual_seed(0))
        after = model(torch.cat((tokens, torch.tensor([[257, 259]])), 1))
    assert torch.equal(after[:, :20, :256], before) and after.shape[-1] == 260 == model.config.vocab_size
    assert (after[:, :20, 256:].max(-1).values < before.max(-1).values).all()
    rows = model.token_embedding.weight
    resize_vocabulary(model, 100)
    assert model.token_embedding.weight is rows


def test_a_resized_model_learns_its_new_rows():
    model = gpt(256)
    resize_vocabulary(model, 261)
    model(torch.tensor([[1, 260]]))[0, 0, 260].backward()
    assert model.token_embedding.weight.grad[260].abs().sum() > 0


# --- template ---

def test_template_matches_one_written_out_by_hand_over_several_turns(encoding):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"}, {"role": "assistant", "content": "ef"}]
    tokens, mask = render(encoding, messages)
    assert tokens == [257, 83, 260, 258, 97, 98, 260, 259, 99, 260, 258, 100, 260, 259, 101, 102, 260]
    assert mask == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert render_prompt(encoding, messages[:4]) == tokens[:14]
    assert answer_text(encoding, tokens[14:]) == "ef" == answer_text(encoding, [101, 102])
    with pytest.raises(ValueError, match="role 'judge' is none of system, user, assistant"):
        render(encoding, [{"role": "judge", "content": "x"}])


def test_a_message_cannot_end_its_turn_by_spelling_the_token(encoding):
    tokens, _ = render(encoding, ask("<|end|><|assistant|>hi"))
    assert tokens.count(260) == 1 and 259 not in tokens


def test_an_answer_may_hold_broken_bytes_and_specials(encoding):
    assert answer_text(encoding, [0xE2, 97, 256, 98, 260, 99]) == "\ufffdab"
    gaps = extend(byte_encoding(**{END: 300}))  # ids that a model may draw and no token has
    assert answer_text(gaps, [97, 280, 98, 999, 300]) == "ab"


# --- examples ---

def test_examples_are_cut_behind_the_context_and_prompts_that_fill_it_refused(encoding):
    messages = [*ask("abc"), {"role": "assistant", "content": "defg"}]
    whole = render(encoding, messages)
    assert fit_example(encoding, messages, 64, "x") == whole
    assert fit_example(encoding, messages, 7, "x") == (whole[0][:7], whole[1][:7])
    with pytest.raises(ValueError, match="x: no turn of the assistant is there"):
        fit_example(encoding, ask("abc"), 64, "x")
    with pytest.raises(ValueError, match=r"f.jsonl, line 3: the prompt of 6 tokens fills the context of 6"):
        fit_example(encoding, messages, 6, "f.jsonl, line 3")


def test_pairs_learn_their_last_answers_and_refuse_what_is_equal_up_to_the_context(encoding):
    turns = [*ask("a"), {"role": "assistant", "content": "b"}, *ask("c")]
    chosen, rejected = fit_pair(encoding, Preference(turns, "de", "f", "w"), 64)
    assert chosen == (render_prompt(encoding, turns) + [100, 101, 260], [0.0] * 10 + [1.0] * 3)
    assert rejected[1] == [0.0] * 10 + [1.0] * 2
    with pytest.raises(ValueError, match="w: two answers begin with the same tokens"):
        fit_pair(encoding, Preference(turns, "dea", "deb", "w"), 12)
    with pytest.raises(ValueError, match="w: the prompt of 10 tokens fills the context of 10"):
        fit_pair(encoding, Preference(turns, "dea", "deb", "w"), 10)


def some_examples(encoding, n=12):
    """Of one turn and of two, of many lengths."""
    draw, found = random.Random(0), []
    for i in range(n):
        turns = [{"role": role, "content": "".join(draw.choices("abcdef ", k=draw.randint(1, 12)))}
                 for role in ("user", "assistant") * (1 + i % 2)]
        found.append(fit_example(encoding, turns, 64, str(i)))
    return found


@pytest.mark.parametrize("make", [gpt, llama])
def test_losses_and_gradients_of_packed_conversations_match_each_alone(encoding, make):
    """1e-7 for Llama, whose norms and angles are in fp32; GPT is in float64 throughout."""
    examples, model, tolerance = some_examples(encoding), make(), 1e-12 if make is gpt else 1e-7
    tokens, mask, ids = pack_examples(examples, 64)
    assert max(len(set(row.tolist()) - {-1}) for row in ids) >= 3
    count = mask.sum()
    forward = functools.partial(model, cache=PackedRows(ids))
    packed = rlhf.response_loss(rlhf.aligned_log_probs(forward, tokens), mask, count)
    alone = sum(rlhf.response_loss(rlhf.aligned_log_probs(model, torch.tensor([ids])), torch.tensor([learnt]), count)
                for ids, learnt in examples)
    torch.testing.assert_close(packed, alone, rtol=0, atol=tolerance)
    leaking = rlhf.response_loss(rlhf.aligned_log_probs(model, tokens), mask, count)
    assert abs(leaking - alone) > 1e-4  # without PackedRows: the check can tell
    for ours, theirs in zip(torch.autograd.grad(packed, list(model.parameters())),
                            torch.autograd.grad(alone, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_packed_rows_hold_every_token_and_its_mask_once(encoding):
    for n, context in ((1, 64), (2, 64), (12, 64), (12, 500), (7, 61)):
        examples = some_examples(encoding, n)
        tokens, mask, ids = pack_examples(examples, context)
        assert tokens.shape == mask.shape == ids.shape and tokens.size(1) <= context and mask.dtype == torch.float32
        for k, (expected, learnt) in enumerate(examples):
            row, = (ids == k).any(1).nonzero().flatten().tolist()  # one row, in one piece
            places = (ids[row] == k).nonzero().flatten()
            assert len(places) == len(expected) == places[-1] - places[0] + 1
            assert tokens[row, places].tolist() == expected and mask[row, places].tolist() == learnt
        assert not mask[ids < 0].any() and (ids >= 0).sum() == sum(len(x) for x, _ in examples)
    assert n == 7 and pack_examples(examples[:1], context)[0].shape == (1, len(examples[0][0]))  # nothing empty
    for bad in ([], [([], [])], [([1, 2, 3], [1.0])]):
        with pytest.raises(ValueError, match="want examples of at least one token, each with a mask of its length"):
            pack_examples(bad, 60)
    with pytest.raises(ValueError, match="an example of 61 tokens does not fit a row of 60: cut it by fit_example"):
        pack_examples([([1] * 61, [1.0] * 61)], 60)


@pytest.mark.parametrize("make", [gpt, llama])
def test_logits_of_an_example_are_the_same_padded_and_alone(encoding, make):
    texts = ["a", "hello there", "b" * 30]
    examples = [fit_example(encoding, [*ask(t), {"role": "assistant", "content": t[::-1]}], 64, t) for t in texts]
    tokens, mask, last = pad(examples)
    model = make()
    with torch.no_grad():
        packed = model(tokens)
        for row, (ids, learnt) in enumerate(examples):
            alone = model(torch.tensor([ids]))[0]
            torch.testing.assert_close(packed[row, :len(ids)], alone, rtol=0, atol=1e-12)  # float64: rounding alone
            assert last[row] == len(ids) - 1 and mask[row].tolist() == learnt + [0.0] * (tokens.size(1) - len(ids))


def test_batches_hold_every_example_once_and_like_lengths_together():
    lengths = torch.randint(5, 60, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    found = batches(lengths, 8, seed=1, epoch=0)
    assert sorted(i for batch in found for i in batch) == list(range(64)) and {len(b) for b in found} == {8}
    padded = sum(max(lengths[i] for i in b) * 8 for b in found)
    assert padded < 1.15 * sum(lengths)
    assert found == batches(lengths, 8, 1, 0) and found != batches(lengths, 8, 1, 1) and found != batches(lengths, 8, 2, 0)
    assert [len(b) for b in batches([3] * 10, 4, 0, 0)] == [4, 4] and [len(b) for b in batches([3] * 2, 4, 0, 0)] == [2]


def test_no_question_is_on_both_sides_and_neither_is_empty():
    conversations = [Conversation([*ask(f"q{i % 40}"), {"role": "assistant", "content": f"{i}"}], str(i)) for i in range(80)]
    train, held_out = split_conversations(conversations, 0.2)
    assert len(train) + len(held_out) == 80 and 2 <= len(held_out) <= 34
    assert not {c.messages[0]["content"] for c in train} & {c.messages[0]["content"] for c in held_out}
    system = [Conversation([{"role": "system", "content": "Be brief."}, *c.messages], c.where) for c in conversations]
    assert [c.where for c in split_conversations(system, 0.2)[1]] == [c.where for c in held_out]  # one system message for all
    for share in (1e-9, 0.999999999):
        assert all(split_conversations(conversations[:2], share))
    with pytest.raises(ValueError, match="different first messages"):
        split_conversations(conversations[:1] * 3, 0.2)


# --- files ---

def test_files_of_all_three_kinds_are_read(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = read_conversations(file_of(tmp_path, {"prompt": "q", "response": "a", "id": 7}, "", {"messages": turns}))
    assert [c.messages for c in found] == [turns[1:], turns] and found[1].where.endswith("data.jsonl, line 3")
    found = read_preferences(file_of(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"},
                                     {"prompt": turns[:2], "chosen": turns[1:], "rejected": [*turns[1:2], turns[2] | {"content": "b"}]}))
    assert [(p.messages, p.chosen, p.rejected) for p in found] == [(turns[1:2], "a", "b"), (turns[:2], "a", "b")]


def test_rankings_of_several_answers_are_read_and_fitted_best_first(tmp_path, encoding):
    [found] = read_preferences(file_of(tmp_path, {"prompt": "q", "answers": ["a", "b", [{"role": "assistant", "content": "c"}]]}))
    assert found.answers == ["a", "b", "c"] and (found.chosen, found.rejected) == ("a", "c")
    assert [answer_text(encoding, tokens[4:]) for tokens, _ in fit_pair(encoding, found, 64)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="w: two answers begin with the same tokens"):
        fit_pair(encoding, Preference(ask("q"), "xa", "b", "w", ("xb",)), 5)


GOOD = {"prompt": "q", "response": "a"}


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not JSON"), ("[1]", 'line 2: want a JSON object with "prompt"'), ({"prompt": "q"}, 'line 2: no "response"'),
    ({"prompt": "q", "response": " "}, "line 2: \"response\" is ' ', not a text"), ({"prompt": "", "response": "a"}, '"prompt" is empty'),
    ({"prompt": "q", "response": 3}, "\"response\" is 3, not a text"), ('{"prompt": "q", "response": "\\ud800"}', "half a surrogate"),
    ({"messages": []}, "line 2: messages must be a list"), ({"messages": [{"role": "user"}]}, 'line 2: no "content"'),
    ({"messages": [{"role": "user", "content": "q"}]}, "line 2: turns must go user, assistant"),
    ({"messages": [{"role": "assistant", "content": "q"}]}, "they are assistant"),
    ({"messages": [{"role": "user", "content": "q"}] * 2 + [{"role": "assistant", "content": "q"}]}, "they are user, user, assistant"),
    ({"messages": [{"role": "system", "content": "q"}]}, "they are system")])
def test_bad_conversations_are_refused_by_line(tmp_path, line, message):
    with pytest.raises(ValueError, match="data.jsonl.*" + message):
        read_conversations(file_of(tmp_path, GOOD, line))


@pytest.mark.parametrize("line, message", [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "line 1: both answers are the same"),
    ({"prompt": "q", "chosen": "", "rejected": "a"}, 'line 1: "chosen" is empty'), ({"chosen": "b", "rejected": "a"}, 'no "prompt"'),
    ({"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "a"}, '"chosen" ends with the user'),
    ({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "a"}, "end with the user"),
    ({"prompt": "q", "chosen": [*ask("other"), {"role": "assistant", "content": "b"}], "rejected": "a"},
     'line 1: "chosen" goes on from other messages than "prompt"'),
    ({"prompt": "q", "answers": ["a"]}, "line 1: \"answers\" is \\['a'\\], not a list of two or more"),
    ({"prompt": "q", "answers": ["a", "b", "a"]}, "line 1: two answers are the same"),
    ({"prompt": "q", "answers": ["a", ""]}, 'line 1: "answers\\[1\\]" is empty')])
def test_bad_preferences_are_refused_by_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_preferences(file_of(tmp_path, line))


def test_files_that_are_missing_or_empty_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        read_preferences(file_of(tmp_path, "", ""))


# --- program ---

def test_program_checks_a_file_and_says_in_one_line_what_is_wrong(tmp_path):
    question = "".join(map(chr, range(33, 103)))  # nothing in it to merge
    good = file_of(tmp_path, "", *({"prompt": f"{question} {i}", "chosen": "yes", "rejected": "no"} for i in range(3)))
    found = run_here(["chat.py", "--data", str(good), "--vocab_size", "260"])
    assert found.returncode == 0 and "packed = alone: True" in found.stdout and "3 preferences" in found.stdout
    word = file_of(tmp_path, {"prompt": "chosen", "response": "yes"}, {"prompt": "b", "response": "no"})  # a value, no key
    assert "2 conversations" in run_here(["chat.py", "--data", str(word)]).stdout
    good = file_of(tmp_path, "", *({"prompt": f"{question} {i}", "chosen": "yes", "rejected": "no"} for i in range(3)))
    short = run_here(["chat.py", "--data", str(good), "--vocab_size", "260", "--context", "64"])
    assert short.returncode == 2 and "line 2: the prompt of" in short.stderr and "fills the context of 64" in short.stderr
    for flags, message in ((["--data", str(file_of(tmp_path, "{"))], "line 1: not JSON"), (["--vocab_size", "3"], "in 257 .. 2^20"),
                           (["--context", "63"], "--context in 64 .. 2^20")):
        found = run_here(["chat.py", *flags])
        assert found.returncode == 2 and message in found.stderr and found.stderr.count("\n") == 1
