"""Turns of a conversation: what the model is given to read, where its answer ends, what is forgotten."""

import io
import random
import runpy
import sys

import pytest
import tiktoken
import torch

import chat
import decode
import dialogue
from decode import generate
from dialogue import Dialogue, complete, converse, form_of, transcript
from gpt import GPT, GPTConfig


def bytes_encoding(*special_tokens):
    return tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks={bytes([b]): b for b in range(256)},
                             special_tokens={token: 256 + i for i, token in enumerate(special_tokens)})


BASE = bytes_encoding("<|endoftext|>")
CHAT = chat.extend(BASE)
LLAMA3 = bytes_encoding("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ENCODINGS = {"base": BASE, "chat": CHAT, "llama 3": LLAMA3}


def tiny(context=48, vocab_size=270):
    return GPT(GPTConfig(vocab_size, context, 2, 2, 16), generator=torch.Generator().manual_seed(0)).eval()


def said(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def scripted(monkeypatch):
    """Instead of a model: (prompts that it was given, answers that it will give, as bytes)."""
    prompts, answers = [], []

    def stream(model, tokens, max_new_tokens, **options):
        prompts.append(tokens)
        return iter([*answers[len(prompts) - 1]])
    monkeypatch.setattr(decode, "stream", stream)
    return prompts, answers


# --- forms ---

def test_a_transcript_is_a_play_and_nothing_in_it_is_a_control_token():
    messages = said("Who <|endoftext|> is it?", "Me", "Why?")
    text = "\nYou: Who <|endoftext|> is it?\nModel: Me\nYou: Why?\nModel:"
    assert transcript(BASE, messages) == list(text.encode())


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_vocabulary_says_which_form(name):
    import llama_chat
    form = form_of(ENCODINGS[name])
    assert form.render is {"base": transcript, "chat": chat.render_prompt, "llama 3": llama_chat.chat_tokens}[name]
    assert form.stop_strings == (["\nYou:"] if name == "base" else [])
    assert sorted(form.stop_tokens) == sorted(ENCODINGS[name]._special_tokens.values())


@pytest.mark.parametrize("dropped", ["<|assistant|>", "<|end|>"])
def test_half_a_form_is_none(dropped):
    half = bytes_encoding(*{"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"} - {dropped})
    assert form_of(half).render is transcript


# --- turns ---

@pytest.mark.parametrize("name", ENCODINGS)
def test_a_turn_reads_the_longest_end_of_the_conversation_that_fits(name, scripted):
    """Against trying every question to begin with, over thirty turns of random lengths."""
    (prompts, answers), draw, encoding = scripted, random.Random(0), ENCODINGS[name]
    form, everything, forgot = form_of(encoding), [], 0
    talk = Dialogue(tiny(context=120), encoding, 20)
    for turn in range(30):
        question, answer = (("".join(draw.choices("abc ", k=draw.randrange(1, 50))).strip() or "a") for _ in range(2))
        answers.append(f" {answer} ".encode())
        try:
            assert "".join(talk.answer(question)) == f" {answer} "
        except ValueError as error:  # alone it needs more than there is
            assert len(form.render(encoding, said(question))) > 100 and "does not fit: 100 are free" in str(error)
            answers.pop()
            continue
        everything.append({"role": "user", "content": question})
        fitting = [tokens for first in range(0, len(everything), 2)
                   if len(tokens := form.render(encoding, everything[first:])) <= 100]
        assert prompts[-1] == fitting[0]
        forgot += fitting[0] != form.render(encoding, everything)
        everything.append({"role": "assistant", "content": answer})
        assert talk.messages == everything[-len(talk.messages):]
    assert forgot > 10 and len(prompts) > 20


@pytest.mark.parametrize("room", [0, -1])
def test_what_fits_to_the_last_token_stays_and_a_line_that_never_fits_loses_nothing(room, scripted, monkeypatch, capsys):
    prompts, answers = scripted
    answers += [b" A test. ", b" Yes. "]
    question, answer, last = said("What is it?", "A test.", "Sure?")
    newest = len(chat.render_prompt(CHAT, [question, answer, last])) + room
    lines = ["What is it?", "long " * newest, "x" * 2 * newest, "Sure?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    converse(Dialogue(tiny(newest + 8), CHAT, 8))
    assert prompts == [chat.render_prompt(CHAT, [question]), chat.render_prompt(CHAT, [last] if room else [question, answer, last])]
    out = capsys.readouterr().out
    assert out.count(f"does not fit: {newest} are free beside the answer: shorten it") == 2
    assert "Model: A test. \n" in out and "Model: Yes. \n" in out  # in the one way, whatever an answer begins with


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_answer_is_what_the_model_writes_behind_the_form(name):
    model, encoding = tiny(context=96), ENCODINGS[name]
    form = form_of(encoding)
    talk = Dialogue(model, encoding, 8, temperature=0)
    text = "".join(talk.answer("Hi"))
    (tokens,) = generate(model, [form.render(encoding, said("Hi"))], 8, stop_tokens=form.stop_tokens, temperature=0)
    assert text == "".join(decode.decode_stream(tokens, encoding, form.stop_strings, form.stop_tokens))
    again = "".join(talk.answer("And?"))  # the second turn reads the first
    (tokens,) = generate(model, [form.render(encoding, said("Hi", text.strip(), "And?"))], 8, stop_tokens=form.stop_tokens, temperature=0)
    assert again == "".join(decode.decode_stream(tokens, encoding, form.stop_strings, form.stop_tokens))


def test_stop_strings_and_tokens_end_an_answer_and_options_reach_the_model(scripted):
    prompts, answers = scripted
    answers += [b" I do.\nYou: and", [*b" Yes", 256, *b"no"]]
    talk = Dialogue(tiny(context=96), BASE, 8)
    assert ["".join(talk.answer(line)) for line in ("Do you?", "So?")] == [" I do.", " Yes"]
    assert talk.messages == said("Do you?", "I do.", "So?", "Yes")


def test_sampling_options_change_the_answer_and_a_generator_repeats_it():
    def text(**options):
        return "".join(Dialogue(tiny(), BASE, 16, generator=torch.Generator().manual_seed(3), **options).answer("Hi"))
    assert text() == text() != text(temperature=0) and text(top_k=1) == text(temperature=0)


def test_who_stops_listening_has_heard_so_much(scripted):
    prompts, answers = scripted
    answers += [b"one two", b"three"]
    talk = Dialogue(tiny(), BASE, 8)
    pieces = talk.answer("Count")
    assert next(pieces) + next(pieces) == "on"
    pieces.close()
    assert talk.messages == said("Count", "on")
    never = talk.answer("not asked for")
    never.close()
    assert "".join(talk.answer("Go on")) == "three" and prompts[-1] == transcript(BASE, said("Count", "on", "Go on"))


def test_a_context_without_room_is_refused():
    with pytest.raises(ValueError, match="^--max_new_tokens 48 leaves no room in a context of 48: take fewer"):
        Dialogue(tiny(), BASE, 48)


def test_a_completion_is_what_follows_and_begins_where_a_text_ended():
    model = tiny()
    for text, begin, prompt in (("some", [], [*b"some"]), ("", [], [256]), ("some", [7, 256], [7, 256, *b"some"]), ("", [7], [7])):
        (tokens,) = generate(model, [prompt], 8, stop_tokens=[256], temperature=0)
        assert "".join(complete(model, BASE, text, 8, begin=begin, temperature=0)) == "".join(decode.decode_stream(tokens, BASE, [], [256]))


# --- at a terminal ---

def test_lines_are_read_until_exit_or_the_end(monkeypatch, capsys):
    for typed, first, lines in (("a\n\n  b \n/exit\nc\n", None, ["a", "b"]), ("b", "a", ["a", "b"]), ("", None, []), ("x\n", " /exit", [])):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert list(dialogue.lines_typed(first)) == lines
    assert capsys.readouterr().out.startswith("You: You: You: You: You: a\nYou: You: \n")


def test_the_demo_learns_to_answer(capsys):
    dialogue.main(500, 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "10 of 10 answered: True; what no longer fitted was left out: True (expected True each)"
    assert lines[-2].count("You:") == 2 and sum("of the conversation it has read 5 messages" in line for line in lines) == 8


@pytest.mark.parametrize("flags, message", [(["--steps", "x"], "invalid int value: 'x'"), (["--stepz", "1"], "--stepz"),
                                            (["--steps", "-1"], "--steps must be at least 0, got -1"),
                                            (["--seed", "-1"], "--seed must be in 0 .. 2^32 - 1, got -1")])
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dialogue.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(dialogue.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("dialogue.py: ") and message in error and error.count("\n") == 1
