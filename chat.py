"""Chat: conversations as tokens, with a mask of what to learn.   Ouyang et al. 2022 (InstructGPT, 2203.02155)

Idea      A base model continues text; an assistant answers. Special tokens that no text can spell mark who speaks
          and where a turn ends. The model learns to write the assistant's turns and nothing else: its loss counts
          their tokens, and the <|end|> after each, so that it learns to stop.
Formula   <|user|> question <|end|> <|assistant|> answer <|end|>  ...         one conversation, as often as it goes on
          mask     0         0       0        0         1      1              -log P(answer <|end|> | all before)
Shapes    conversations -> lists of tokens and of their mask -> tokens (B, T) int64, mask (B, T) fp32: mask[b, t] = 1
          if token t of row b is to be learned.
          ``pack_examples``: several conversations to a row, what is left of it empty. Attention and positions begin
          anew with each (packing.PackedRows), so that a row gives what its conversations give alone (experts with a
          capacity excepted: they count tokens over rows). A conversation's first token, whose probability a row's
          place before it cannot give, is a role's, and never learned.
          ``pad``: one to a row, padded on the right, for what is read at a row's end (rewards, answers compared).
Omits     tools and images.
Run       python chat.py                          questions and answers from Python's documentation: 5 s
          python chat.py --data my/pairs.jsonl    checks a file: {"prompt", "response"}, {"messages": [...]},
                                                  {"prompt", "chosen", "rejected"}, or
                                                  {"prompt", "answers": [best, ..., worst]} on each line
          Ends with "packed = alone: True ..."
Test      pytest tests/test_chat.py
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
import torch.nn as nn
from torch import Tensor

ROLES = ("system", "user", "assistant")
END = "<|end|>"
SPECIAL_TOKENS = (*(f"<|{role}|>" for role in ROLES), END)

Message = dict[str, str]  # {"role": one of ROLES, "content": text}


# --- 1. room in the vocabulary and in the model ---------------------------------------------

def extend(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """The same encoding with SPECIAL_TOKENS after its last id; those that it has already keep theirs."""
    special = dict(encoding._special_tokens)
    for token in SPECIAL_TOKENS:
        special.setdefault(token, max([encoding.max_token_value, *special.values()]) + 1)
    if len(special) == len(encoding._special_tokens):
        return encoding
    return tiktoken.Encoding(f"{encoding.name.removesuffix('_chat')}_chat", pat_str=encoding._pat_str,
                             mergeable_ranks=encoding._mergeable_ranks, special_tokens=special)


@torch.no_grad()
def resize_vocabulary(model: nn.Module, vocab_size: int, generator: torch.Generator | None = None) -> None:
    """Give a model rows for ``vocab_size`` ids, in place; logits of the ids that it has stay as they are.

    A new row is the mean of the old ones, with noise of a hundredth of their spread: at random it would have logits
    like no other's, and one that is too large takes probability from every other (Hewitt 2021). A model that has rows
    enough (vocabularies padded to a round size) is left alone.
    """
    old = model.config.vocab_size
    if vocab_size <= old:
        return
    for name in ("token_embedding", "output"):  # a tied model has no output
        layer = getattr(model, name, None)
        if layer is not None:
            w = layer.weight
            noise = torch.randn(vocab_size - old, w.size(1), generator=generator).to(w)
            rows = torch.cat((w, w.mean(0) + 0.01 * w.std(0) * noise))  # (vocab_size, D)
            layer.weight = nn.Parameter(rows, requires_grad=w.requires_grad)
            setattr(layer, "num_embeddings" if name == "token_embedding" else "out_features", vocab_size)
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)


# --- 2. the template ------------------------------------------------------------------------

def render(encoding: tiktoken.Encoding, messages: Sequence[Message]) -> tuple[list[int], list[float]]:
    """A conversation's tokens, and a mask that is 1 on the assistant's words and the <|end|> after them.

    ``encoding`` is one of ``extend``. What a message spells out, "<|end|>" too, stays text: nobody can end a turn
    but the template. Raises ValueError for a role that is none of ROLES.
    """
    tokens, mask, end = [], [], encoding.encode_single_token(END)
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"role {message['role']!r} is none of {', '.join(ROLES)}")
        content = encoding.encode_ordinary(message["content"]) + [end]
        tokens += [encoding.encode_single_token(f"<|{message['role']}|>"), *content]
        mask += [0.0] + [float(message["role"] == "assistant")] * len(content)
    return tokens, mask


def render_prompt(encoding: tiktoken.Encoding, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation, and the <|assistant|> after which the model goes on."""
    return render(encoding, messages)[0] + [encoding.encode_single_token("<|assistant|>")]


def answer_text(encoding: tiktoken.Encoding, tokens: Sequence[int]) -> str:
    """What an answer's tokens say, up to its <|end|>; special tokens say nothing, nor do ids that no token has (a model
    may have rows for such, a vocabulary gaps)."""
    said, silent, end = [], set(encoding._special_tokens.values()), encoding.encode_single_token(END)
    for token in tokens:
        if token == end:
            break
        with contextlib.suppress(KeyError):
            said.append(b"" if token in silent else encoding.decode_single_token_bytes(token))
    return b"".join(said).decode("utf-8", "replace").strip()


def ask(question: str) -> list[Message]:
    """A conversation of one question."""
    return [{"role": "user", "content": question}]


# --- 3. examples: tokens that fit the context -----------------------------------------------

@dataclass
class Conversation:
    """Messages that hold at least one answer; ``where`` names its line for the messages of errors."""
    messages: list[Message]
    where: str


@dataclass
class Preference:
    """Of two answers to one conversation, the one that was preferred and the other; of more, the best, the worst, and
    those ``between``, best first."""
    messages: list[Message]
    chosen: str
    rejected: str
    where: str
    between: tuple[str, ...] = ()

    @property
    def answers(self) -> list[str]:
        """All, best first."""
        return [self.chosen, *self.between, self.rejected]


Example = tuple[list[int], list[float]]  # tokens, mask: as ``render``


def fit_example(encoding: tiktoken.Encoding, messages: Sequence[Message], context: int, where: str) -> Example:
    """``render``, cut after ``context`` tokens. ValueError if then no token of an answer is left to learn."""
    tokens, mask = render(encoding, messages)
    if not any(mask):
        raise ValueError(f"{where}: no turn of the assistant is there to be learned: add one")
    if not any(mask[:context]):
        raise ValueError(f"{where}: the prompt of {mask.index(1.0)} tokens fills the context of {context}: "
                         "shorten it, or train a model with a larger --context")
    return tokens[:context], mask[:context]


def fit_pair(encoding: tiktoken.Encoding, pair: Preference, context: int) -> tuple[Example, ...]:
    """The conversation with each of the answers, best first, the mask on these alone. ValueError as ``fit_example``, or
    if two are the same up to the context."""
    prompt, found = render_prompt(encoding, pair.messages), []
    for answer in pair.answers:
        messages = [*pair.messages, {"role": "assistant", "content": answer}]
        tokens, _ = fit_example(encoding, messages, context, pair.where)
        if len(prompt) >= context:  # an earlier turn may have had an answer to learn
            raise ValueError(f"{pair.where}: the prompt of {len(prompt)} tokens fills the context of {context}: "
                             "shorten it, or train a model with a larger --context")
        if any(tokens == other for other, _ in found):
            raise ValueError(f"{pair.where}: two answers begin with the same tokens and differ only after the "
                             f"context of {context}: shorten them, or leave the line out")
        found.append((tokens, [0.0] * len(prompt) + [1.0] * (len(tokens) - len(prompt))))
    return tuple(found)


def pack_examples(examples: Sequence[Example], context: int,
                  device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Examples of any lengths, several to a row by best fit, as R rows of T tokens: tokens, mask, and ids, the index in
    ``examples`` that each token is of, -1 where a row is empty; (R, T) each. ``model(tokens, packing.PackedRows(ids))``
    keeps them apart. ValueError if there are none, or one is empty or longer than the context.

    Widths T from the longest example to four times that, at most the context, are tried: attention costs R T^2, the
    rest R T, so the narrowest is taken that has within 3% of the fewest places.
    """
    from packing import pack_best_fit
    if not examples or any(not tokens or len(tokens) != len(mask) for tokens, mask in examples):
        raise ValueError(f"want examples of at least one token, each with a mask of its length, got {len(examples)} of "
                         f"{[(len(tokens), len(mask)) for tokens, mask in examples][:9]}")
    lengths = np.array([len(tokens) for tokens, _ in examples])
    if (longest := int(lengths.max())) > context:
        raise ValueError(f"an example of {longest} tokens does not fit a row of {context}: cut it by fit_example")
    plans = {T: pack_best_fit(lengths, T) for T in {min(context, longest * k // 4) for k in range(4, 17)}}
    fewest = min((plan[-1, 0] + 1) * T for T, plan in plans.items())
    T = min(T for T, plan in plans.items() if (plan[-1, 0] + 1) * T <= 1.03 * fewest)
    shape, filled = (int(plans[T][-1, 0]) + 1, T), defaultdict(int)
    packed, masks, ids = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.full(shape, -1)
    for row, i, _, n in plans[T].tolist():
        here, filled[row] = slice(filled[row], filled[row] + n), filled[row] + n
        packed[row, here], masks[row, here], ids[row, here] = *examples[i], i
    return tuple(torch.from_numpy(x).to(device) for x in (packed, masks, ids))


def pad(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Examples of any lengths as one batch: tokens (B, T), mask (B, T), and the last real position (B,)."""
    T = max(len(tokens) for tokens, _ in examples)
    tokens = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens, _ in examples], device=device)
    mask = torch.tensor([mask + [0.0] * (T - len(mask)) for _, mask in examples], device=device)
    return tokens, mask, torch.tensor([len(tokens) - 1 for tokens, _ in examples], device=device)


def batches(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches of ``batch`` examples, as indices: every example once, in an order that (seed, epoch) draws;
    those of like length together. The last examples of an epoch that fill no batch are left out (they change with
    the epoch), unless there are fewer than one batch in all."""
    draw = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    whole = max(1, len(order) // batch)
    order = sorted(order[:whole * batch], key=lengths.__getitem__)  # stable: ties stay shuffled
    found = [order[i * batch:(i + 1) * batch] for i in range(whole)]
    draw.shuffle(found)
    return found


# --- 4. files of JSON lines -----------------------------------------------------------------

def read_conversations(path: str | os.PathLike) -> list[Conversation]:
    """{"prompt": text, "response": text} or {"messages": [{"role", "content"}, ...]} on each line; empty lines and
    other keys are passed over.

    Raises ValueError, with the line number: not such JSON; an empty prompt or answer; turns that do not alternate
    between user and assistant (after at most one system message), or end without the assistant's.
    """
    def read(line: dict, where: str) -> Conversation:
        if "messages" in line:
            messages = _messages(line["messages"], where)
        else:
            prompt, response = (_text(line, key, where) for key in ("prompt", "response"))
            messages = [*ask(prompt), {"role": "assistant", "content": response}]
        _check_turns(messages, "assistant", where)
        return Conversation(messages, where)

    return [read(line, where) for line, where in _json_lines(path, '"prompt" and "response", or "messages"')]


def read_preferences(path: str | os.PathLike) -> list[Preference]:
    """{"prompt", "chosen", "rejected"} on each line, as public preference sets ship them: each a text or a list of
    messages, which for the answers may repeat the prompt; or {"prompt", "answers": [best, ..., worst]}.

    Raises ValueError as ``read_conversations``, for a line whose answers are the same, and for answers to something
    else than the prompt.
    """
    def answer(line: dict, key: str, prompt: list[Message], where: str) -> str:
        if isinstance(line.get(key), list):
            *before, last = _messages(line[key], where)
            if last["role"] != "assistant":
                raise ValueError(f'{where}: "{key}" ends with the {last["role"]}, not with the assistant')
            if before and before != prompt[-len(before):]:
                raise ValueError(f'{where}: "{key}" goes on from other messages than "prompt": give all before the '
                                 'answer as "prompt", a list of messages')
            return last["content"]
        return _text(line, key, where)

    def answers(line: dict, prompt: list[Message], where: str) -> list[str]:
        given = line.get("answers")
        if given is None:
            return [answer(line, key, prompt, where) for key in ("chosen", "rejected")]
        if not isinstance(given, list) or len(given) < 2:
            raise ValueError(f'{where}: "answers" is {repr(given)[:40]}, not a list of two or more, the best first')
        names = [f"answers[{i}]" for i in range(len(given))]
        return [answer(dict(zip(names, given)), name, prompt, where) for name in names]

    def read(line: dict, where: str) -> Preference:
        given = line.get("prompt")
        messages = _messages(given, where) if isinstance(given, list) else ask(_text(line, "prompt", where))
        _check_turns(messages, "user", where)
        best, *between, worst = found = answers(line, messages, where)
        if len(set(found)) < len(found):
            raise ValueError(f"{where}: {'both' if len(found) == 2 else 'two'} answers are the same: correct or remove "
                             "the line")
        return Preference(messages, best, worst, where, tuple(between))

    keys = '"prompt", "chosen" and "rejected", or "prompt" and "answers"'
    return [read(line, where) for line, where in _json_lines(path, keys)]


def _json_lines(path: str | os.PathLike, keys: str) -> Iterator[tuple[dict, str]]:
    empty = True
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty, where = False, f"{path}, line {number}"
                    try:
                        found = json.loads(line.decode("utf-8-sig"))
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"{where}: not JSON in UTF-8 ({error}): correct or remove it") from None
                    if not isinstance(found, dict):
                        raise ValueError(f"{where}: want a JSON object with {keys}, found {line[:40]!r}")
                    yield found, where
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if empty:
        raise ValueError(f"{path}: is empty: want lines with {keys}")


def _text(line: dict, key: str, where: str) -> str:
    if key not in line:
        raise ValueError(f'{where}: no "{key}", only {", ".join(map(repr, line)) or "nothing"}: correct or remove it')
    text = line[key]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: "{key}" is {"empty" if text in ("", None) else repr(text)[:40]}, '
                         "not a text: correct or remove the line")
    try:
        text.encode()  # JSON can spell half of a surrogate pair, "\ud800": no text in UTF-8 holds one
    except UnicodeEncodeError:
        raise ValueError(f'{where}: "{key}" holds half a surrogate pair: correct or remove the line') from None
    return text


def _messages(given, where: str) -> list[Message]:
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise ValueError(f'{where}: messages must be a list of objects with "role" and "content", got '
                         f"{repr(given)[:40]}")
    return [{key: _text(message, key, where) for key in ("role", "content")} for message in given]


def _check_turns(messages: list[Message], last: str, where: str) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [ROLES[1 + i % 2] for i in range(len(turns))] or not turns or turns[-1] != last:
        raise ValueError(f"{where}: turns must go user, assistant, ... and end with the {last}; they are "
                         f"{', '.join(roles)[:80]}")


# --- 5. held out ----------------------------------------------------------------------------

def split_conversations(conversations: Sequence[Conversation],
                        held_out: float = 0.1) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out) by a hash of the user's first message: no question is on both sides. If one side would be empty
    it gets the conversation whose hash is nearest; ValueError if all begin alike."""
    def place(conversation: Conversation) -> float:
        text = json.dumps(next(m for m in conversation.messages if m["role"] == "user")).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") / 2**48

    places = sorted({place(conversation) for conversation in conversations})
    if len(places) < 2:
        raise ValueError("to hold some out there must be conversations with different first messages of the user")
    cut = min(max(held_out, places[1]), places[-1])
    return [c for c in conversations if place(c) >= cut], [c for c in conversations if place(c) < cut]


# --- 6. demo --------------------------------------------------------------------------------

def main(data: str | None, context: int, vocab_size: int, seed: int) -> None:
    if not 257 <= vocab_size <= 2**20 or not 64 <= context <= 2**20 or not 0 <= seed < 2**32:
        raise ValueError("--vocab_size must be in 257 .. 2^20, --context in 64 .. 2^20 and --seed in 0 .. 2^32 - 1, "
                         f"got {vocab_size}, {context} and {seed}")
    import labeller
    import packing
    import tokenizer
    from gpt import GPT, GPTConfig
    kinds: tuple[list, list] = ([], [])
    if data is None:
        kinds[0].extend(Conversation([*ask(question), {"role": "assistant", "content": sentence}], question)
                        for question, sentence in labeller.default_questions())
    else:
        first, _ = next(_json_lines(data, '"prompt" or "messages"'))
        pairs = bool({"chosen", "answers"} & first.keys())
        kinds[pairs].extend(read_preferences(data) if pairs else read_conversations(data))
    for kind, found in zip(("conversations", "preferences"), kinds):
        if found:
            print(f"{len(found):,} {kind}; the first: {found[0]}")
    texts = [message["content"] for c in [*kinds[0], *kinds[1]] for message in c.messages]
    plain = tokenizer.train(texts, vocab_size)
    encoding, vocab_size = extend(plain), plain.n_vocab  # a small file teaches fewer
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, context, 2, 4, 64), generator=generator).eval()
    with torch.no_grad():
        before = model(torch.arange(64)[None])  # (1, 64, V)
        resize_vocabulary(model, encoding.n_vocab, generator)
        kept = bool((model(torch.arange(64)[None])[..., :vocab_size] == before).all())
        print(f"special tokens {', '.join(SPECIAL_TOKENS)} = {vocab_size} ... {encoding.n_vocab - 1}; logits of the "
              f"{vocab_size} others as before: {kept} (expected True)")
        examples = [fit_example(encoding, c.messages, context, c.where) for c in kinds[0]]
        examples += [example for pair in kinds[1] for example in fit_pair(encoding, pair, context)]
        tokens, mask = examples[0]
        print("".join(f"[{text}]" if m else text for m, text in
                      zip(mask, (encoding.decode([token]) for token in tokens))) + "    [...] is to be learned")
        places = empty = rows = 0
        for i, batch in enumerate(batches([1] * len(examples), min(32, len(examples)), seed, 0)):
            tokens, _, ids = pack_examples([examples[j] for j in batch], context)
            places, empty, rows = places + ids.numel(), empty + int((ids < 0).sum()), rows + len(ids)
            if i == 0:
                packed = model(tokens, packing.PackedRows(ids))  # (R, T, V)
                worst = max((packed[ids == k] - model(torch.tensor([examples[j][0]]))[0]).abs().max().item()
                            for k, j in enumerate(batch))
    print(f"{min(32, len(examples)) * (i + 1):,} examples in {rows:,} rows: {empty / places:.1%} of the places are "
          "empty" + (" (expected below 10%)" if data is None else ""))
    print(f"packed = alone: {worst < 1e-5} (max |difference of logits| = {worst:.1e}, expected below 1e-5)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="a file of JSON lines (default: Python's documentation)")
    parser.add_argument("--context", type=int, default=128,
                        help="tokens that a conversation may have (default %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=1024,
                        help="of the tokenizer to train (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
