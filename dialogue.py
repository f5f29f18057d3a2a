"""Dialogue: how a model that only continues a text takes part in a conversation.   Askell et al. 2021 (2112.00861)

Idea      A language model goes on with what it reads. To be talked with, it is given the conversation so far, written
          out in a fixed form that ends where its own turn begins. What it then writes, until the form marks the end of
          a turn, is its answer. The model remembers nothing: all of it is read again for every turn, so what no longer
          fits the context is forgotten, oldest turns first.
Formula   tokens = form(s, u_1, a_1, ..., u_n)     s: what the system says, if anything; u: the user; a: the model
          a_n    ~ p( . | tokens), up to a stop token, a stop string or max_new_tokens
          len(tokens) <= context - max_new_tokens, else u_1 and a_1 are left out, then u_2 and a_2 ...
Shapes    messages [{"role": "user", "content": "..."}, ...] -> ids, a list of int -> pieces of text
Omits     keeping the cache from turn to turn, summaries of what is left out.
Run       python dialogue.py     a tiny model reads transcripts, then is talked with: 20 s on one core;
          ends with "10 of 10 answered: True; ..."
          python decode.py --checkpoint out/pretrain --chat     the program that uses it
Test      pytest tests/test_dialogue.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn


# --- 1. forms: a conversation as tokens ------------------------------------------------------

def transcript(encoding, messages: Sequence[dict]) -> list[int]:
    """The form for a base model, which was taught none: a play's script. A user who writes a line that begins with
    "Model:" puts words into the model's mouth, and it cannot tell; the control tokens of chat models prevent that."""
    import tokenizer
    said_by = {"system": "", "user": "\nYou: ", "assistant": "\nModel: "}
    text = "".join(said_by[message["role"]] + message["content"] for message in messages)
    return tokenizer.encode(encoding, text + "\nModel:")


@dataclass
class Form:
    """How conversations with a model are written, and what ends its turn. (A line of the user that is longer than the
    context is refused before it is rendered.)"""
    render: Callable[[object, Sequence[dict]], list[int]]  # (encoding, messages) -> ids, up to where the answer begins
    stop_tokens: list[int]
    stop_strings: list[str]


def form_of(encoding) -> Form:
    """The form that a vocabulary has control tokens for: chat.py's, which alignment.py teaches, or Llama 3's; else a
    ``transcript``. Any control token ends a turn. (A vocabulary cannot say whether its model was taught the form.)"""
    known = encoding.special_tokens_set
    stop_tokens = [encoding.encode_single_token(token) for token in sorted(known)]
    if {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"} <= known:
        from chat import render_prompt
        return Form(render_prompt, stop_tokens, [])
    if {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= known:
        from llama_chat import chat_tokens
        return Form(chat_tokens, stop_tokens, [])
    return Form(transcript, stop_tokens, ["\nYou:"])  # else it would write the user's next turn too


# --- 2. turns ---------------------------------------------------------------------------------

class Dialogue:
    """A conversation with a model. ``turns`` are the questions and answers that are not yet forgotten.

        dialogue = Dialogue(*models.load_model("out/ppo"), temperature=0.8)
        for piece in dialogue.answer("What does textwrap.dedent do?"):
            print(piece, end="", flush=True)

    Args:
        model, encoding: as models.load_model gives them.
        max_new_tokens: the longest answer; so much of the context is kept free for it.
        system: what stands in front, and is never forgotten: who the model is to be.
        form: None: ``form_of(encoding)``.
        generator: the random numbers of sampling; None: torch's global ones.
        sampling: fields of ``decode.Sampling``, such as temperature=0.8.

    Raises ValueError if the context has no room for an answer and a question, or for what ``Sampling`` refuses.
    """

    def __init__(self, model: nn.Module, encoding, max_new_tokens: int = 64, *, system: str = "",
                 form: Form | None = None, generator: torch.Generator | None = None, **sampling):
        from decode import Sampling
        Sampling(**sampling)
        self.model, self.encoding, self.form = model, encoding, form or form_of(encoding)
        self.options = dict(max_new_tokens=max_new_tokens, generator=generator, **sampling)
        self.system, self.turns = system, []
        context, self.taken = model.config.context, len(self._render([], ""))
        if context - self.taken < 2:
            raise ValueError(f"the system's text and the form take {self.taken} tokens, the context has {context}: "
                             "shorten the text")
        if not (isinstance(max_new_tokens, int) and 1 <= max_new_tokens < context - self.taken):
            raise ValueError(f"max_new_tokens must be in 1 .. {context - self.taken - 1} in a context of {context} of "
                             f"which {self.taken} are taken by the form and the system's text, got {max_new_tokens}")
        self.room = context - max_new_tokens  # tokens left for the conversation, those of its form included

    def _render(self, turns: list[tuple[str, str]], line: str) -> list[int]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self.form.render(self.encoding, [*messages, {"role": "user", "content": line}])

    def answer(self, line: str) -> Iterator[str]:
        """The model's answer, piece by piece; nothing happens until the first is asked for. When the iterator ends, or
        is closed, the question and as much of the answer as was taken join ``turns``, and those that did not fit leave;
        if drawing fails before the first piece, ``turns`` are as they were.

        Raises ValueError, with the first piece, for a line that does not fit even alone; the conversation can go on.
        """
        import tokenizer
        from decode import decode_stream, stream
        needed, left = len(tokenizer.encode(self.encoding, line)), self.room - self.taken
        if needed <= self.room:  # what is far too long is not rendered at all
            needed = len(self._render([], line)) - self.taken
        if needed > left:
            raise ValueError(f"this line takes {needed} tokens, and {left} are left for it: shorten it, or lower "
                             "max_new_tokens")
        forgotten = 0
        while len(tokens := self._render(self.turns[forgotten:], line)) > self.room:
            forgotten += 1
        said, is_over = [], False
        with closing(stream(self.model, tokens, stop_tokens=self.form.stop_tokens, **self.options)) as new:
            try:
                for piece in decode_stream(new, self.encoding, self.form.stop_strings, self.form.stop_tokens):
                    said.append(piece)
                    yield piece
                is_over = True
            finally:  # also where the caller stops early
                if said or is_over:
                    del self.turns[:forgotten]
                    self.turns.append((line, "".join(said).strip()))


def complete(model: nn.Module, encoding, text: str, max_new_tokens: int, *, begin: Sequence[int] = (),
             generator: torch.Generator | None = None, **sampling) -> Iterator[str]:
    """What follows a text, piece by piece, up to the end-of-text token (others come out as they are spelled); ``begin``
    are tokens in front of it. If there are neither, the end-of-text token stands there: a text begins where another
    ended."""
    import tokenizer
    from decode import decode_stream, stream
    eot = tokenizer.eot(encoding)
    tokens = [*begin, *tokenizer.encode(encoding, text)] or [eot]
    new = stream(model, tokens, max_new_tokens, stop_tokens=[eot], generator=generator, **sampling)
    return decode_stream(new, encoding, [], [eot])


def text_begins_with(directory: str | Path, encoding) -> list[int]:
    """Tokens in front of every text: published Llama 3 models were trained with <|begin_of_text|> there, ours not."""
    is_published = any((Path(directory) / name).exists() for name in ("config.json", "params.json"))
    token = "<|begin_of_text|>"
    return [encoding.encode_single_token(token)] if is_published and token in encoding.special_tokens_set else []


# --- 3. at a terminal -------------------------------------------------------------------------

def lines_typed(first: str | None = None) -> Iterator[str]:
    """What is typed, line by line, after ``first``, blank lines left out; until /exit or the end of stdin."""
    print("You: ", end="" if first is None else f"{first}\n", flush=True)
    line = sys.stdin.readline() if first is None else f"{first}\n"
    while line and line.strip() != "/exit":
        if line.strip():
            yield line.strip()
        print("You: ", end="", flush=True)
        line = sys.stdin.readline()
    if not line:
        print()  # ends the line of the last "You: "


def print_as_it_comes(pieces: Iterator[str]) -> None:
    """Every piece at once, and at the end a new line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def converse(dialogue: Dialogue, first: str | None = None) -> None:
    """Ask and answer at the terminal, line by line."""
    for line in lines_typed(first):
        try:
            pieces = dialogue.answer(line)
            text = next(pieces, "")  # a line that does not fit is refused here
        except ValueError as error:
            print(error)
            continue
        print(f"Model: {text.lstrip(' ')}", end="", flush=True)
        print_as_it_comes(pieces)


# --- 4. demo ----------------------------------------------------------------------------------

def main(steps: int, seed: int) -> None:
    import tiktoken
    from gpt import GPT, GPTConfig, next_token_loss

    if steps < 0 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 0, got {steps}" if steps < 0 else
                         f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    encoding = tiktoken.Encoding("bytes", pat_str=r"(?s).", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    generator, context = torch.Generator().manual_seed(seed), 64
    model = GPT(GPTConfig(257, context, 2, 4, 64), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99))

    def transcripts(n: int) -> torch.Tensor:
        """n conversations in which the model says the user's letter as a capital, (n, context + 1)."""
        letters = torch.randint(97, 123, (n, context // 16 + 1), generator=generator).tolist()
        rows = ["".join(f"\nYou: {chr(i)}\nModel: {chr(i).upper()}" for i in row).encode() for row in letters]
        return torch.tensor([list(row[:context + 1]) for row in rows])

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, 2 - 2 * step / steps)
        batch = transcripts(32)
        loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}   loss {loss:.3f}", flush=True)
    print("at best ln 26 / 16 = 0.204: of 16 characters one, the user's letter, cannot be known")

    dialogue, asked, right = Dialogue(model, encoding, 16, temperature=0), [], 0
    for letter in map(chr, torch.randint(97, 123, (10,), generator=generator).tolist()):
        text = "".join(dialogue.answer(letter)).strip()
        asked.append(letter)
        right += text == letter.upper()
        print(f"You: {letter}   Model: {text}   it has read the last {len(dialogue.turns)} questions")
    alone = "".join(complete(model, encoding, "\nYou: c\nModel:", 24, temperature=0))
    print(f"without a stop string it speaks for both: {alone!r}")
    kept = [question for question, _ in dialogue.turns]
    is_forgotten = len(kept) < 10 and kept == asked[-len(kept):]
    print(f"{right} of 10 answered: {right == 10}; the oldest turns are forgotten: {is_forgotten} (expected True each)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=400, help="of the demo's training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's weights and letters (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
