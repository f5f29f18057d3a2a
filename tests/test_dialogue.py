"""Turns of a conversation: what the model is given to read, where its answer ends, what is forgotten."""

import io
import math
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
        return (token for token in answers[len(prompts) - 1])
    monkeypatch.setattr(decode, "stream", stream)
    return prompts, answers


# --- forms ---

def test_a_transcript_is_a_play_and_nothing_in_it_is_a_control_token():
    messages = said("Who <|endoftext|> is it?", "Me", "Why?")
    text = "\nYou: Who <|endoftext|> is it?\nModel: Me\nYou: Why?\nModel:"
    assert transcript(BASE, messages) == list(text.encode())
    assert transcript(BASE, [{"role": "system", "content": "A play."}, *messages]) == list(b"A play." + text.encode())


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

@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_turn_reads_the_longest_end_of_the_conversation_that_fits(name, system, scripted):
    """Against trying every question to begin with, over thirty turns of random lengths."""
    (prompts, answers), draw, encoding = scripted, random.Random(0), ENCODINGS[name]
    form, everything, forgot = form_of(encoding), [], 0
    front = [{"role": "system", "content": system}] if system else []
    talk = Dialogue(tiny(context=120), encoding, 20, system=system)
    for turn in range(30):
        question, answer = (("".join(draw.choices("abc ", k=draw.randrange(1, 50))).strip() or "a") for _ in range(2))
        answers.append(f" {answer} ".encode())
        try:
            assert "".join(talk.answer(question)) == f" {answer} "
        except ValueError as error:  # alone it needs more than there is
            assert len(form.render(encoding, front + said(question))) > 100 and f"{100 - talk.taken} are left for it: shorten it" in str(error)
            answers.pop()
            continue
        everything.append({"role": "user", "content": question})
        fitting = [tokens for first in range(0, len(everything), 2)
                   if len(tokens := form.render(encoding, front + everything[first:])) <= 100]
        assert prompts[-1] == fitting[0]
        forgot += fitting[0] != form.render(encoding, front + everything)
        everything.append({"role": "assistant", "content": answer})
        assert said(*sum(talk.turns, ())) == everything[-2 * len(talk.turns):]
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
    assert out.count(f"{newest - 3} are left for it: shorten it, or lower max_new_tokens") == 2
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
    assert talk.turns == [("Do you?", "I do."), ("So?", "Yes")]


def test_sampling_options_change_the_answer_and_a_generator_repeats_it():
    def text(**options):
        return "".join(Dialogue(tiny(), BASE, 16, generator=torch.Generator().manual_seed(3), **options).answer("Hi"))
    assert text() == text() != text(temperature=0) and text(top_k=1) == text(temperature=0)


def test_who_stops_listening_has_heard_so_much(scripted):
    prompts, answers = scripted
    answers += [b"one two", b"three", b"", b"later", b"first"]
    talk = Dialogue(tiny(context=96), BASE, 8)
    pieces = talk.answer("Count")
    assert next(pieces) + next(pieces) == "on"
    pieces.close()
    talk.answer("not asked for").close()
    assert talk.turns == [("Count", "on")]
    assert "".join(talk.answer("Go on")) == "three" and prompts[-1] == transcript(BASE, said("Count", "on", "Go on"))
    assert "".join(talk.answer("Say nothing")) == "" and talk.turns[-1] == ("Say nothing", "")
    one, other = talk.answer("a"), talk.answer("b")  # each as if it were the next, and kept in the order of their ends
    next(one), next(other)
    assert "".join(other) + "".join(one) == "irstater" and talk.turns[-2:] == [("b", "first"), ("a", "later")]


@pytest.mark.parametrize("broken", [RuntimeError, KeyboardInterrupt])
def test_what_fails_before_it_is_heard_has_not_been_said(broken, monkeypatch):
    talk = Dialogue(tiny(context=96), BASE, 8, temperature=0)
    first = "".join(talk.answer("Hi"))
    line = "x" * 60  # which the first turn would have to leave for

    def fails(*_, **__):
        raise broken
    with monkeypatch.context() as patch, pytest.raises(broken):
        patch.setattr(decode, "next_logits", fails)
        list(talk.answer(line))
    assert talk.turns == [("Hi", first.strip())]
    with pytest.raises(TypeError):
        list(talk.answer(None))
    assert "".join(talk.answer("And?")) and len(talk.turns) == 2
    assert "".join(talk.answer(line)) and len(talk.turns) == 1


@pytest.mark.parametrize("name, taken", [("base", 13), ("chat", 3), ("llama 3", 23)])
def test_a_context_without_room_is_refused(name, taken):
    model, encoding = tiny(), ENCODINGS[name]
    talk = Dialogue(model, encoding, 48 - taken - 1)
    assert len(form_of(encoding).render(encoding, said("x"))) == talk.room
    for bad in (48 - taken, 48, 99, 0, -5):
        with pytest.raises(ValueError, match=rf"^max_new_tokens must be in 1 .. {47 - taken} in a context of 48 of which {taken} are taken by the form"):
            Dialogue(model, encoding, bad)
    for bad in (16.5, math.nan, "8", None):
        with pytest.raises(ValueError, match="^max_new_tokens must be in 1 .."):
            Dialogue(model, encoding, bad)
    taken = len(form_of(encoding).render(encoding, [{"role": "system", "content": "Be kind"}, *said("")]))
    with pytest.raises(ValueError, match=f"in 1 .. {47 - taken} in .* of which {taken} are taken"):
        Dialogue(model, encoding, 48, system="Be kind")
    for length in (48, 99):
        with pytest.raises(ValueError, match="^the system's text and the form take .* tokens, the context has 48: shorten the text"):
            Dialogue(model, encoding, 1, system="x" * length)
    with pytest.raises(ValueError, match="top_p must be in"):
        Dialogue(model, encoding, 8, top_p=0.0)
    with pytest.raises(TypeError, match="temprature"):
        Dialogue(model, encoding, 8, temprature=1.0)


def test_a_million_blanks_are_refused_before_they_are_rendered():
    talk = Dialogue(tiny(), CHAT, 8)
    with pytest.raises(ValueError, match="this line takes 1000002 tokens, and 37 are left for it"):
        next(talk.answer("a" + " " * 10**6 + "b"))


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
    dialogue.main(400, 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "10 of 10 answered: True; the oldest turns are forgotten: True (expected True each)"
    assert lines[-2].count("You:") == 2 and sum("it has read the last 3 questions" in line for line in lines) == 8


@pytest.mark.parametrize("flags, message", [(["--steps", "x"], "invalid int value: 'x'"), (["--stepz", "1"], "--stepz"),
                                            (["--steps", "-1"], "--steps must be at least 0, got -1"),
                                            (["--seed", "-1"], "--seed must be in 0 .. 2^32 - 1, got -1")])
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dialogue.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(dialogue.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("dialogue.py: ") and message in error and error.count("\n") == 1
