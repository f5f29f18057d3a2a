"""Dialogue: how a model that only continues a text takes part in a conversation.   Ouyang et al. 2022 (2203.02155)

Idea      A language model goes on with what it reads. To be talked with, it reads the conversation so far, written in
          the form that it was trained on and opened where its own turn begins; what it then writes is its answer, up to
          where that form has the turn end. The model remembers nothing: all of it is read again for every turn, so what
          no longer fits the context is forgotten, oldest turns first.
Formula   tokens = form(u_1, a_1, ..., u_n)                  u: what the user said, a: what was answered
          a_n    ~ p( . | tokens), up to a stop token or a stop string
          len(tokens) <= context - max_new_tokens            else u_1 and a_1 are left out, then u_2 and a_2 ...
Shapes    messages [{"role": "user" or "assistant", "content": str}, ...] -> ids, a list of int -> pieces of text
Omits     a system message (chat.py's and llama_chat.py's forms take one), keeping the cache from turn to turn,
          summaries of what is left out.
Run       python dialogue.py     a tiny model reads transcripts, then is talked with: 20 s on one core;
          ends with "10 of 10 answered: True; ..."
          python decode.py --checkpoint out/pretrain --chat     the program that uses it
Test      pytest tests/test_dialogue.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn


# --- 1. forms: a conversation as tokens ------------------------------------------------------

def transcript(encoding, messages: Sequence[dict]) -> list[int]:
    """The form for a base model, which was taught none: a play's, such as every model has read. The text of a user who
    writes "Model:" is then the model's own, for all that it can see; a chat model's control tokens prevent that."""
    import tokenizer
    names = {"user": "You", "assistant": "Model"}
    text = "".join(f"\n{names[message['role']]}: {message['content']}" for message in messages)
    return tokenizer.encode(encoding, text + "\nModel:")


@dataclass
class Form:
    """How conversations with a model are written, and what ends its turn."""
    render: Callable[[object, Sequence[dict]], list[int]]  # (encoding, messages) -> ids, up to where the answer begins
    stop_tokens: list[int]
    stop_strings: list[str]


def form_of(encoding) -> Form:
    """The form that a vocabulary is made for: that of chat.py (which alignment.py has taught), Llama 3's, or, where it
    has the control tokens of neither, a ``transcript``. Any control token ends a turn."""
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
    """A conversation with a model, one turn at a time; ``messages`` is what of it the model still reads.

        dialogue = Dialogue(*models.load_model("out/ppo"), temperature=0.8)
        for piece in dialogue.answer("What does textwrap.dedent do?"):
            print(piece, end="", flush=True)

    Args:
        model, encoding: as models.load_model gives them.
        max_new_tokens: at most, of an answer; so many tokens of the context are kept free for it.
        form: None: ``form_of(encoding)``.
        generator: of sampling; None: torch's own.
        sampling: fields of ``decode.Sampling``, such as temperature=0.8.

    Raises ValueError where the context has no room for an answer and a question.
    """

    def __init__(self, model: nn.Module, encoding, max_new_tokens: int = 64, *, form: Form | None = None,
                 generator: torch.Generator | None = None, **sampling):
        self.room = model.config.context - max_new_tokens  # for all that has been said
        if self.room < 1:
            raise ValueError(f"--max_new_tokens {max_new_tokens} leaves no room in a context of "
                             f"{model.config.context}: take fewer")
        self.model, self.encoding, self.form = model, encoding, form or form_of(encoding)
        self.options = dict(max_new_tokens=max_new_tokens, generator=generator, **sampling)
        self.messages: list[dict] = []

    def answer(self, line: str) -> Iterator[str]:
        """The model's answer, piece by piece as it is drawn; what was not asked for is not drawn.

        Raises ValueError for a line that does not fit the context even alone; the conversation can go on.
        """
        from decode import decode_stream, stream
        question = {"role": "user", "content": line}
        needed = len(self.form.render(self.encoding, [question]))
        if needed > self.room:
            raise ValueError(f"a line of {needed} tokens, with those of its form, does not fit: {self.room} are free "
                             "beside the answer: shorten it, or take fewer --max_new_tokens")
        self.messages.append(question)
        while len(tokens := self.form.render(self.encoding, self.messages)) > self.room:
            del self.messages[:2]  # a question and its answer
        said = []
        try:
            new = stream(self.model, tokens, stop_tokens=self.form.stop_tokens, **self.options)
            for piece in decode_stream(new, self.encoding, self.form.stop_strings, self.form.stop_tokens):
                said.append(piece)
                yield piece
        finally:  # whoever stops listening has heard that much
            self.messages.append({"role": "assistant", "content": "".join(said).strip()})


def complete(model: nn.Module, encoding, text: str, max_new_tokens: int, *, begin: Sequence[int] = (),
             generator: torch.Generator | None = None, **sampling) -> Iterator[str]:
    """What follows a text, piece by piece, up to the end-of-text token; ``begin`` are tokens in front of it. Where
    there is neither, the end-of-text token is: a text begins where another ended."""
    import tokenizer
    from decode import decode_stream, stream
    eot = tokenizer.eot(encoding)
    tokens = [*begin, *tokenizer.encode(encoding, text)] or [eot]
    new = stream(model, tokens, max_new_tokens, stop_tokens=[eot], generator=generator, **sampling)
    return decode_stream(new, encoding, [], [eot])


def text_begins_with(directory: str | Path, encoding) -> list[int]:
    """Tokens in front of every text: a published Llama 3 has read none without <|begin_of_text|>; ours have."""
    is_published = any((Path(directory) / name).exists() for name in ("config.json", "params.json"))
    token = "<|begin_of_text|>"
    return [encoding.encode_single_token(token)] if is_published and token in encoding.special_tokens_set else []


# --- 3. at a terminal -------------------------------------------------------------------------

def lines_typed(first: str | None = None) -> Iterator[str]:
    """What is typed, line by line, after ``first``, blank lines left out; until /exit or the end of stdin."""
    while True:
        print("You: ", end="" if first is None else f"{first}\n", flush=True)
        line, first = sys.stdin.readline() if first is None else f"{first}\n", None
        if not line:
            return print()
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def print_as_it_comes(pieces: Iterator[str]) -> None:
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
        """n windows of conversations in which the model says the user's letter as a capital, (n, context + 1)."""
        letters = torch.randint(97, 123, (n, context // 16 + 2), generator=generator).tolist()
        rows = ["".join(f"\nYou: {chr(i)}\nModel: {chr(i).upper()}" for i in row).encode() for row in letters]
        starts = torch.randint(16, (n,), generator=generator).tolist()
        return torch.tensor([list(row[start:][:context + 1]) for row, start in zip(rows, starts)])

    for step in range(steps):
        batch = transcripts(32)
        loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}   loss {loss:.3f}", flush=True)

    dialogue, right, was_shown = Dialogue(model, encoding, 16, temperature=0), 0, []
    for letter in map(chr, torch.randint(97, 123, (10,), generator=generator).tolist()):
        text = "".join(dialogue.answer(letter)).strip()
        right += text == letter.upper()
        was_shown.append(len(dialogue.messages) - 1)
        print(f"You: {letter}   Model: {text}   of the conversation it has read {was_shown[-1]} messages")
    alone = "".join(complete(model, encoding, "\nYou: x\nModel:", 24, temperature=0))
    print(f"without a stop string it speaks for both: {alone!r}")
    print(f"{right} of 10 answered: {right == 10}; what no longer fitted was left out: {max(was_shown) < 19} "
          "(expected True each)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=500, help="of the demo's training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's weights and numbers (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
