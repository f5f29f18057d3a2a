"""Byte-pair encoding: a vocabulary learned from text.   Sennrich et al. 2016 (1508.07909), GPT-2 (2019)

Idea      Start with the 256 bytes as tokens, so no text is unknown. Again and again make the most frequent
          pair of neighbouring tokens a new token: frequent words end as one token, rare ones as several.
          No token crosses a word; a regular expression splits text into words first (" the" is one).
Formula   (a, b) = argmax over pairs of  sum over words w of  count(w) * #{i : (w_i, w_i+1) = (a, b)}
          a b -> ab in every word, rank(ab) = number of tokens so far; repeat
          encode: in each word merge the neighbours whose merge has the lowest rank, until none has one
Shapes    n bytes of text -> ids in [0, n_vocab), about n / 4 of them in English -> the same n bytes
Omits     merges across words, BPE-dropout, characters with an unknown token (Sennrich's own setting).
Run       python tokenizer.py        CPU, 2 s; ends with "naive = fast: True (...), round trip: True (...)"
          python tokenizer.py --data book.txt --out book.tiktoken
Test      pytest tests/test_tokenizer.py
"""

import argparse
import base64
import hashlib
import heapq
import json
import operator
import os
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex  # tiktoken depends on it, so it is there; Python's own `re` lacks \p{L} and \p{N}
import tiktoken

# The words of GPT-2 and of GPT-4 (and Llama 3): contractions, letters, digits, other signs, blanks, with the
# last blank before a word part of it. The published patterns in possessive form (++ never gives back).
# Recent tiktoken's own cl100k_base tries \s++$ before \s*[\r\n]: there a final "\n  " is one word, not two.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
                r"|\s*[\r\n]|\s++$|\s+(?!\S)|\s")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")  # GPT-2's spelling and Llama 3's
DOWNLOAD_SECONDS = 30
# What reading a damaged JSON file can raise.
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


# --- 1. the algorithm, as it reads --------------------------------------------------------------

def count_words(texts: Iterable[str], pattern: str = GPT2_SPLIT) -> dict[bytes, int]:
    """Each different word of the texts, in UTF-8, and how often it occurs. ValueError if ``texts`` is one
    str, or ``pattern`` is no regular expression, captures groups, or leaves out part of a text (tiktoken
    would drop it without a word)."""
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"texts must be an iterable of str, got one {type(texts).__name__}: pass [text]")
    try:
        split = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if split.groups:
        raise ValueError(f"pattern {pattern!r} captures {split.groups} group(s): write (?:...) for (...)")
    counts: Counter[str] = Counter()
    for text in map(_without_surrogates, texts):
        words = split.findall(text)
        covered = sum(map(len, words))
        if covered < len(text):
            raise ValueError(f"pattern {pattern!r} covers {covered} of {len(text)} characters: add |(?s:.)")
        counts.update(words)
    return {word.encode(): n for word, n in counts.items() if word}


def _without_surrogates(text: str) -> str:
    """Half a surrogate pair (JSON can hold one) has no UTF-8: U+FFFD instead, as tiktoken has it."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def train_bpe_naive(texts: Iterable[str], vocab_size: int, pattern: str = GPT2_SPLIT) -> dict[bytes, int]:
    """The ranks of ``vocab_size`` tokens, all pairs counted anew each round.   Sennrich et al., Algorithm 1

    A tie goes to the greatest pair in lexicographic order (bytes of the left token, then of the right), as in
    the paper's own program. A pair that occurs once is merged like any other. No two pairs spell the same
    token, as equal bytes between two borders of tokens have been merged alike everywhere: bytes identify it.

    Returns token -> rank in order of rank, the 256 bytes first; fewer if every word has become one token.
    Raises ValueError if ``vocab_size`` is below 256, and as ``count_words``.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256, the number of bytes, got {vocab_size}")
    words = {tuple(bytes([b]) for b in word): n for word, n in count_words(texts, pattern).items()}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        words = {_merge(word, best): n for word, n in words.items()}
    return ranks


def _merge(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    merged, i = [], 0
    while i < len(word):
        step = 2 if word[i:i + 2] == pair else 1
        merged.append(b"".join(word[i:i + step]))
        i += step
    return tuple(merged)


def encode_word_naive(ranks: dict[bytes, int], word: bytes) -> list[bytes]:
    """The tokens of one word: merge the leftmost neighbours of lowest rank until none have one."""
    parts = [bytes([b]) for b in word]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return parts
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


# --- 2. the same ranks, fast --------------------------------------------------------------------

def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = GPT2_SPLIT) -> dict[bytes, int]:
    """The ranks of ``train_bpe_naive`` (arguments, result and errors too), touching only words that change.

    A word is a str with one character chr(rank) per token, so that finding a pair is C code. Merging a b in
    "l a b r" changes four counts: (l, a) and (b, r) lose what (l, ab) and (ab, r) gain. A count that falls
    leaves its old entry in the heap, too high; it is corrected when it comes up. Only pairs with the new token
    gain, and they are pushed. So the first entry that is true is the maximum.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256, the number of bytes, got {vocab_size}")
    word_counts = count_words(texts, pattern)
    words = [word.decode("latin-1") for word in word_counts]  # character b for byte b
    frequency = list(word_counts.values())
    ranks = {bytes([b]): b for b in range(256)}
    tokens = list(ranks)
    # heapq pops the smallest, ties want the greatest: complement the bytes, and end each token with a
    # character above every byte, as a prefix is the smaller. Two joined keys then compare like the pair.
    keys = [chr(255 - b) + "\u0100" for b in range(256)]
    counts: defaultdict[str, int] = defaultdict(int)
    holders: defaultdict[str, list[int]] = defaultdict(list)  # pair -> words that hold it, or once did
    for i, word in enumerate(words):
        for pair in map("".join, pairwise(word)):
            counts[pair] += frequency[i]
            holders[pair].append(i)
    heap = [(-n, keys[ord(a)] + keys[ord(b)], a + b) for (a, b), n in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        minus_count, key, pair = heapq.heappop(heap)
        if counts[pair] != -minus_count:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], key, pair))
            continue
        first, second = pair
        new, token = chr(len(ranks)), tokens[ord(first)] + tokens[ord(second)]
        ranks[token] = len(ranks)
        tokens.append(token)
        keys.append("".join(chr(255 - b) for b in token) + "\u0100")
        gained: defaultdict[str, list[int]] = defaultdict(list)
        for i in set(holders.pop(pair)):
            n, parts = frequency[i], words[i].split(pair)
            words[i] = new.join(parts)
            left_was = left_is = ""
            for before, after in pairwise(parts):  # between the two stood the pair
                if before:
                    left_was = left_is = before[-1]
                if left_is:
                    made = left_is + new
                    counts[left_was + first] -= n
                    counts[made] += n
                    gained[made].append(i)
                if after:
                    made = new + after[0]
                    counts[second + after[0]] -= n
                    counts[made] += n
                    gained[made].append(i)
                left_was, left_is = second, new  # what the next pair has to its left if nothing is between
        counts[pair] = 0
        holders |= gained
        for a, b in gained:
            if counts[a + b] > 0:
                heapq.heappush(heap, (-counts[a + b], keys[ord(a)] + keys[ord(b)], a + b))
    return ranks


def train(texts: Iterable[str], vocab_size: int, pattern: str = GPT2_SPLIT,
          special_tokens: Sequence[str] = (END_OF_TEXT[0],), name: str = "bpe") -> tiktoken.Encoding:
    """Learn an encoding whose n_vocab is ``vocab_size``, less if the text runs out of pairs: ranks first,
    special tokens last. ValueError as ``train_bpe``, or if a special token is empty or repeated."""
    if isinstance(special_tokens, str) or len({*special_tokens, ""}) <= len(special_tokens):
        raise ValueError(f"special_tokens must be a list of different, non-empty str, got {special_tokens!r}")
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"vocab_size must be at least 256 bytes + {len(special_tokens)} special tokens, "
                         f"got {vocab_size}")
    ranks = train_bpe(texts, vocab_size - len(special_tokens), pattern)
    special = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# --- 3. text to ids and back --------------------------------------------------------------------

def encode(encoding: tiktoken.Encoding, text: str, allow_special: bool = False) -> list[int]:
    """The ids of a text. A special token that a document spells out stays text unless ``allow_special``,
    which is for templates that the program itself wrote."""
    if allow_special:
        return encoding.encode(text, allowed_special="all")
    # A million blanks in a row overflow the stack of tiktoken's regular expressions; such a text is split by
    # `regex` instead. Half a million blanks fill one of these blocks.
    if len(text) > 500_000 and any(text[i:i + 250_000].isspace() for i in range(0, len(text), 250_000)):
        words = regex.findall(encoding._pat_str, _without_surrogates(text))
        return [token for word in words for token in encoding._encode_single_piece(word)]
    return encoding.encode_ordinary(text)


def encode_bytes(encoding: tiktoken.Encoding, data: bytes) -> list[int]:
    """The ids of any bytes: as text where they are UTF-8, else one id per byte. Inverse: ``decode_bytes``."""
    # surrogateescape marks each byte b that is not UTF-8 with the character U+DC00 + b.
    parts = regex.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape"))  # text, mark, text, ...
    tokens = encode(encoding, parts[0])
    for mark, text in zip(parts[1::2], parts[2::2]):
        tokens += [encoding.encode_single_token(bytes([ord(mark) - 0xDC00])), *encode(encoding, text)]
    return tokens


def decode_bytes(encoding: tiktoken.Encoding, tokens: Iterable[int]) -> bytes:
    """The bytes that ids stand for, special tokens as they are spelled. ValueError if an id has none."""
    try:
        return encoding.decode_bytes([operator.index(token) for token in tokens])
    except (KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"no token of {encoding.name!r}, n_vocab {encoding.n_vocab}: {error}") from None


def eot(encoding: tiktoken.Encoding) -> int:
    """The id that ends a document, <|endoftext|> or <|end_of_text|>. ValueError if there is neither."""
    for token in END_OF_TEXT:
        if token in encoding.special_tokens_set:
            return encoding.encode_single_token(token)
    raise ValueError(f"{encoding.name!r} has neither {' nor '.join(END_OF_TEXT)} among its special tokens")


# --- 4. files -----------------------------------------------------------------------------------

def save(encoding: tiktoken.Encoding, path: str | os.PathLike) -> None:
    """Write ``path``, tiktoken's "base64 rank" lines, and ``path``.json: name, pattern, special tokens, and
    the SHA-256 of ``path``, by which ``load`` notices that a kill has let only one of the two be renamed.
    Both are written beside first. ValueError if there is no such folder, or if it cannot be written to."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a" if path.is_dir() else "no such"
        raise ValueError(f"{path}: {problem} folder: name a file in a folder that is there")
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    data = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks)
    sidecar = {"name": encoding.name, "pattern": encoding._pat_str,
               "special_tokens": encoding._special_tokens, "sha256": hashlib.sha256(data).hexdigest()}
    beside = [Path(f"{path}{end}.{os.getpid()}.{threading.get_ident()}.tmp") for end in (".json", "")]
    try:
        beside[0].write_text(json.dumps(sidecar, indent=1))
        beside[1].write_bytes(data)
        os.replace(beside[0], f"{path}.json")
        os.replace(beside[1], path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                         "room on the disk") from None
    finally:
        for file in beside:
            file.unlink(missing_ok=True)


def save_hugging_face(encoding: tiktoken.Encoding, folder: str | os.PathLike) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder. transformers' AutoTokenizer reads
    them and gives the same ids, but takes a special token that a document spells out for the token.

    ValueError for a rank that is no merge of two lower ones, OSError if it cannot be written."""
    letter = {byte: character for character, byte in _characters_of_bytes().items()}
    vocab: dict[str, int] = {}
    merges, lower = [], {}
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        vocab["".join(map(letter.get, token))] = rank
        if len(token) > 1:
            parts = encode_word_naive(lower, token)
            if len(parts) != 2:
                raise ValueError(f"{encoding.name!r}: {token!r} is no merge of two tokens of lower rank")
            merges.append(" ".join("".join(map(letter.get, part)) for part in parts))
        lower[token] = rank
    special = encoding._special_tokens
    # In Hugging Face's regular expressions {1,3}+ would repeat, not hold fast.
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str.replace("}+", "}")},
             "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": token} | added for token, i in special.items()],
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": vocab | special, "merges": merges}}
    ends = {"eos_token": token for token in END_OF_TEXT if token in special}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | ends
    (Path(folder) / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def load(name_or_path: str | os.PathLike) -> tiktoken.Encoding:
    """An encoding by tiktoken's name ("gpt2", "cl100k_base"; ./gpt2 is a folder called so) or from disk:

    - a rank file with the sidecar of ``save``;
    - a rank file alone: of 128000 ranks, Llama 3's tokenizer.model; of 100256, cl100k_base; any other is
      taken as GPT-2's kind, GPT2_SPLIT and <|endoftext|> on the first free id;
    - GPT-2's vocab.json + merges.txt, by their folder or by the path of either;
    - a folder with a rank file called tokenizer.tiktoken, as checkpoints and their exports have, or with
      tokenizer.model, itself or in original/, as Meta publishes Llama 3.

    Raises ValueError, one line with file, place and cure: missing, empty, cut short, of another kind,
    contradicting itself; or a name that tiktoken neither has cached nor can download.
    """
    path = Path(name_or_path)
    if name_or_path in tiktoken.list_encoding_names():
        return _load_published(str(name_or_path))
    if path.name in ("vocab.json", "merges.txt"):
        return _load_gpt2(path.parent / "vocab.json", path.parent / "merges.txt")
    for name in ("tokenizer.tiktoken", "tokenizer.model", "original/tokenizer.model"):
        if os.path.exists(path / name):
            return _load_ranks(path / name)
    if os.path.isdir(path):
        if not any(os.path.exists(path / name) for name in ("vocab.json", "merges.txt")):
            raise ValueError(f"{path}: holds no tokenizer that is read here: copy tokenizer.model (Llama 3), or "
                             "vocab.json and merges.txt (GPT-2), into it")
        return _load_gpt2(path / "vocab.json", path / "merges.txt")
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file: give a file, a folder with vocab.json and merges.txt, or one "
                         f"of {', '.join(tiktoken.list_encoding_names())}")
    return _load_ranks(path)


def _load_published(name: str) -> tiktoken.Encoding:
    outcome: list = ["no answer"]

    def fetch() -> None:
        try:
            outcome[0] = tiktoken.get_encoding(name)
        except Exception as error:  # whatever the network raises
            outcome[0] = type(error).__name__

    # tiktoken downloads without a time limit; a thread that can be left behind gives it one.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if isinstance(outcome[0], tiktoken.Encoding):
        return outcome[0]
    raise ValueError(f"{name}: tiktoken has no copy and cannot download one ({outcome[0]}): point "
                     "TIKTOKEN_CACHE_DIR to a filled cache, or give a vocabulary from disk")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what}; the file is cut short, damaged or of another kind: copy it again")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if not data:
        raise _damaged(path, "is empty")
    return data


def _load_ranks(path: Path) -> tiktoken.Encoding:
    data, sidecar = _read(path), path.with_name(path.name + ".json")
    ranks: dict[bytes, int] = {}
    ids: set[int] = set()
    if path.name == "tokenizer.model" and data[:1] == b"\n":  # protobuf's first field
        raise ValueError(f"{path}: is SentencePiece's (Llama 1 and 2, Mistral), which is not read: give Llama 3's")
    for number, line in enumerate(data.rstrip().splitlines(), 1):
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
            if token in ranks or rank in ids or not 0 <= rank < 2**31:
                raise ValueError
        except ValueError:  # binascii.Error is one
            raise _damaged(path, f"line {number} is not a new token in base64 and a new rank") from None
        ranks[token] = rank
        ids.add(rank)
    if not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise _damaged(path, f"its {len(ranks)} tokens lack some of the 256 single bytes")
    if sidecar.exists():
        content = _read(sidecar)
        try:
            fields = json.loads(content)
            if fields["sha256"] != hashlib.sha256(data).hexdigest():
                raise ValueError(f"sha256 is not that of {path.name}")
            return tiktoken.Encoding(fields["name"], pat_str=fields["pattern"], mergeable_ranks=ranks,
                                     special_tokens=fields["special_tokens"])
        except MALFORMED as error:
            raise _damaged(sidecar, f"is not what save() wrote ({error!r})") from None
    name, pattern, special = path.stem, GPT2_SPLIT, {END_OF_TEXT[0]: min(set(range(len(ids) + 1)) - ids)}
    if len(ranks) == 128_000:  # of Llama 3's special tokens, 3.1 renamed some that are reserved here
        reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
        names = ["<|begin_of_text|>", END_OF_TEXT[1], *reserved[:4], "<|start_header_id|>",
                 "<|end_header_id|>", reserved[4], "<|eot_id|>", *reserved[5:]]
        name, pattern, special = "llama3", CL100K_SPLIT, {token: 128_000 + i for i, token in enumerate(names)}
    elif path.name == "tokenizer.model":
        raise _damaged(path, f"has {len(ranks)} ranks, Llama 3's has 128000")
    elif len(ranks) == 100_256:
        name, pattern = "cl100k_base", CL100K_SPLIT
        special = {END_OF_TEXT[0]: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                   "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _characters_of_bytes() -> dict[str, int]:
    """GPT-2 writes a byte as itself where Latin-1 shows it, else as the next character from U+0100 on."""
    shown = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _load_gpt2(vocab_path: Path, merges_path: Path) -> tiktoken.Encoding:
    vocab_data, merges_data = _read(vocab_path), _read(merges_path)
    byte_of = _characters_of_bytes()
    try:
        vocab = json.loads(vocab_data)
        ids = {operator.index(i) for i in vocab.values()}
        if len(ids) < len(vocab) or min(ids) < 0 or max(ids) >= 2**31:
            raise ValueError("two tokens share an id, or an id is out of range")
        ranks = {bytes([byte]): vocab[character] for character, byte in byte_of.items()}
    except MALFORMED as error:
        raise _damaged(vocab_path, f"is no JSON table from token to id with all bytes ({error!r})") from None
    last = -1
    for number, line in enumerate(merges_data.decode("utf-8", "replace").rstrip().splitlines(), 1):
        if number == 1 and line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocab.keys() or not set(left + right) <= byte_of.keys():
            raise _damaged(merges_path, f"line {number} {line[:40]!r} merges no tokens of {vocab_path.name}")
        if vocab[left + right] <= last:  # tiktoken has one number for both the id and the priority of a merge
            raise ValueError(f"{merges_path}: line {number} is not in the order of ids in {vocab_path.name}, "
                             "as tiktoken needs it: use the tokenizers library for this vocabulary")
        ranks[bytes(byte_of[c] for c in left + right)] = last = vocab[left + right]
    made = set(ranks.values())
    special = {token: i for token, i in vocab.items() if i not in made}
    for token in special:
        if token[:1] + token[-1:] not in ("<>", "[]"):  # what special tokens look like
            raise _damaged(merges_path, f"makes not all tokens of {vocab_path.name}, not {token!r}")
    return tiktoken.Encoding(vocab_path.absolute().parent.name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                             special_tokens=special)


# --- 5. demo ------------------------------------------------------------------------------------

def check_writable(path: str | None) -> None:
    """ValueError for a file that cannot be written: now, not after the work. None is no file."""
    if path is not None:
        try:
            is_new = not os.path.exists(path)
            open(path, "ab").close()  # keeps what is there
            if is_new:
                os.remove(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                             "room on the disk") from None


def main(data: str | None, vocab_size: int, pattern: str, text: str, out: str | None) -> None:
    check_writable(out)
    split = GPT2_SPLIT if pattern == "gpt2" else CL100K_SPLIT
    if data is None:
        from pydoc_data.topics import topics  # 465 KB of English that every Python has
        corpus = "\n\n".join(topics.values())
    else:
        from data import read_documents
        corpus = "\n\n".join(read_documents(data))
    held_out, corpus = corpus[:len(corpus) // 10], corpus[len(corpus) // 10:]
    encoding = train([corpus], vocab_size, split)
    ranks = list(encoding._mergeable_ranks.items())
    print(f"n_vocab = {encoding.n_vocab}   (expected {vocab_size}, fewer if the text runs out of pairs)")
    print("first merges:", " ".join(repr(token.decode("utf-8", "replace")) for token, _ in ranks[256:268]))
    print("bytes per token of the tenth of the text that was held out   (expected 1.00 at 256, then growing)")
    for size in [*(256 << k for k in range(13) if 256 << k < len(ranks)), len(ranks)]:
        # The first ranks are what a shorter training would have learned.
        smaller = tiktoken.Encoding("", pat_str=split, mergeable_ranks=dict(ranks[:size]), special_tokens={})
        print(f"  {size:7d} ranks   {len(held_out.encode()) / max(1, len(encode(smaller, held_out))):.2f}")
    print("tokens:", "|".join(encoding.decode([token]) for token in encode(encoding, text)))
    plain, control = (encode(encoding, END_OF_TEXT[0], allow_special=allow) for allow in (False, True))
    print(f"{END_OF_TEXT[0]} in a document: {len(plain)} tokens of text; in a template: {control}   "
          f"(expected more than 1; [{eot(encoding)}])")
    if out is not None:
        save(encoding, out)
        same = encode(load(out), held_out) == encode(encoding, held_out)
        print(f"saved: {out} and {out}.json; loaded, they encode alike: {same}   (expected True)")
    size, part = min(vocab_size, 400), [corpus[:40_000]]
    naive, fast = train_bpe_naive(part, size, split), train_bpe(part, size, split)
    equal = list(naive.items()) == list(fast.items())
    noise = held_out.encode() + random.Random(0).randbytes(10_000)
    exact = decode_bytes(encoding, encode_bytes(encoding, noise)) == noise
    print(f"naive = fast: {equal} ({len(naive) - 256} merges), round trip: {exact} ({len(noise)} bytes) "
          "(expected True, True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: the topics of "
                        "Python's help)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids to learn, <|endoftext|> included "
                        "(default %(default)s)")
    parser.add_argument("--pattern", choices=("gpt2", "cl100k"), default="gpt2",
                        help="what counts as a word (default %(default)s)")
    parser.add_argument("--text", default="Tokenizers split uncommon words: antidisestablishmentarianism.",
                        help="sentence to show as tokens (default: one with a rare word)")
    parser.add_argument("--out", help="file to write the vocabulary to, say words.tiktoken")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
