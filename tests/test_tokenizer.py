"""BPE against its naive form, Hugging Face tokenizers, tiktoken's trainer and files, GPT-2's vocabulary."""

import base64
import json
import random
import runpy
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import regex
import tiktoken
from pydoc_data.topics import topics
from tiktoken._educational import bpe_train
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import tokenizer
from tokenizer import (CL100K_SPLIT, GPT2_SPLIT, count_words, decode_bytes, encode, encode_bytes,
                       encode_word_naive, eot, load, save, train, train_bpe, train_bpe_naive)

ROOT = Path(__file__).resolve().parent.parent
GPT2 = ROOT.parent / "shared" / "data" / "gpt2"  # GPT-2's own vocabulary, where this machine has it
CORPUS = "\n\n".join(topics.values())[:60_000]
BYTES = {bytes([b]): b for b in range(256)}
PUBLISHED = {  # as they were published, before tiktoken made them possessive
    GPT2_SPLIT: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    CL100K_SPLIT: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+"}
HOSTILE = ["", " ", "\n", "   leading and trailing   ", "a\r\n\r\n  b\t\tc  \n",
           "I'LL we're 'S they've''d", "1234567890 12,345.67",
           "naïve café Ünïcödé", "日本語テキスト、中国話", "😀👩‍👩‍👧‍👦🏳️‍🌈", "\x00\x01\x7f\x85\xa0\u2028\u200b",
           "e\u0301\u0301\u0301 z̶a̶l̶g̶o̶",
           "<|endoftext|>", "<|endoftext|><|endoftext|> x", "a" * 3000, " " * 3000 + "x", "!?" * 1000, "ſ'ſ 'ſt",
           "\ufeffBOM", "def f(x):\n    return x**2  # ok\n", "العربية עברית हिन्दी ไทย"]


def random_texts(rng, alphabet):
    return ["".join(rng.choices(alphabet, k=rng.randrange(100))) for _ in range(rng.randrange(1, 8))]


@pytest.fixture(scope="module")
def encoding():
    return train([CORPUS], 1000)


# --- training -----------------------------------------------------------------------------------

@pytest.mark.parametrize("alphabet", ["a", "ab", "abc ", "aé😀 \n'", "".join(map(chr, range(1, 0x250)))])
def test_train_bpe_matches_naive_on_random_text(alphabet):
    rng = random.Random(alphabet)
    for _ in range(25):  # small alphabets: many ties, overlapping pairs (aaa), two pairs that spell one token
        texts, size = random_texts(rng, alphabet), 256 + rng.randrange(90)
        assert list(train_bpe(texts, size).items()) == list(train_bpe_naive(texts, size).items())


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, CL100K_SPLIT, r"(?s:.+)"])
def test_train_bpe_matches_naive_on_prose(pattern):
    texts = [CORPUS[:3000], CORPUS[3000:6000]]
    assert list(train_bpe(texts, 330, pattern).items()) == list(train_bpe_naive(texts, 330, pattern).items())


def test_train_bpe_is_lexicographically_greatest_on_ties():
    # Each pair of "ab", "xy", "xa" occurs once: (x, y) > (x, a) > (a, b).
    assert list(train_bpe(["ab", "xy", "xa"], 259))[256:] == [b"xy", b"xa", b"ab"]
    # A longer left token sorts above its own prefix: after ab, (ab, y) > (a, z), each of which occurs once.
    assert list(train_bpe(["ab", "ab", "az", "aby"], 259))[256:] == [b"ab", b"aby", b"az"]
    rng = random.Random(0)
    for _ in range(100):
        texts = random_texts(rng, "abc")
        merges = brute_force_merges(byte_words(texts), 30)
        assert list(train_bpe(texts, 286))[256:] == [a + b for a, b, _ in merges]


def brute_force_merges(words, n):
    """[(left, right, was it a tie?)] by recounting, with neither of the trainers' merge."""
    merges, words = [], dict(words)
    while len(merges) < n:
        pairs = Counter()
        for word, count in words.items():
            pairs.update({p: k * count for p, k in Counter(zip(word, word[1:])).items()})
        if not pairs:
            break
        most = max(pairs.values())
        top = sorted(p for p, count in pairs.items() if count == most)
        a, b = top[-1]
        merges.append((a, b, len(top) > 1))
        merged = {}
        for word, count in words.items():
            out = []
            for token in word:
                out.append(token)
                if out[-2:] == [a, b]:
                    out[-2:] = [a + b]  # longer than a and b, so it takes no part in another merge now
            merged[tuple(out)] = count
        words = merged
    return merges


def byte_words(texts):
    return {tuple(bytes([b]) for b in word): n for word, n in count_words(texts).items()}


def until_first_tie(texts, n):
    merges = brute_force_merges(byte_words(texts), n)
    return [a + b for a, b, _ in merges][:next((i for i, m in enumerate(merges) if m[2]), n)]


def hugging_face(texts, vocab_size, special=()):
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return model


def test_train_bpe_matches_hugging_face_and_tiktoken_until_the_first_tie():
    """They break ties otherwise (the smaller ids; the pair seen first), so merges compare up to the first tie."""
    # Words of two letters that occur 1, 4, 9, ... times: few sums of counts are equal.
    pairs = [a + b for a in "acegi" for b in "bdfhj"]
    few_ties = [" ".join(pair for n, pair in enumerate(pairs, 1) for _ in range(n * n))]
    for texts, at_least in ((few_ties, 8), ([CORPUS], 20)):
        expected = until_first_tie(texts, 30)
        size = 256 + len(expected)
        assert len(expected) >= at_least
        assert list(train_bpe(texts, size))[256:] == expected
        theirs = load_hugging_face_ranks(hugging_face(texts, size))
        assert [t for t, _ in sorted(theirs.items(), key=lambda x: x[1])][256:] == expected
        assert list(bpe_train("".join(texts), size, GPT2_SPLIT, visualise=None))[256:] == expected


def load_hugging_face_ranks(model):
    characters = {c: b for b, c in zip(gpt2_order(), sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return {bytes(characters[c] for c in token): i for token, i in model.get_vocab().items()}


def gpt2_order():
    """Bytes in the order of their visible characters: those that print first, then the hidden 68."""
    prints = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    return prints + [b for b in range(256) if b not in prints]


def test_train_bpe_shares_nearly_all_tokens_with_hugging_face():
    """Ties order merges otherwise and so may change a few tokens."""
    ours = set(train_bpe([CORPUS], 1000))
    theirs = set(load_hugging_face_ranks(hugging_face([CORPUS], 1000)))
    assert len(ours & theirs) > 0.95 * 1000


def test_training_is_prefix_stable_and_deterministic():
    long, short = train_bpe([CORPUS], 700), train_bpe([CORPUS], 400)
    assert list(long.items())[:400] == list(short.items())
    assert list(long.values()) == list(range(700)) and list(long.items())[:256] == list(BYTES.items())
    # The order of documents changes no count.
    assert train_bpe([CORPUS[:9000], "x y", ""], 400) == train_bpe(["", "x y", CORPUS[:9000]], 400)


def test_training_stops_when_no_pair_remains():
    assert list(train_bpe(["aaaa"], 999))[256:] == list(train_bpe_naive(["aaaa"], 999))[256:] == [b"aa", b"aaaa"]
    assert train(["aaaa"], 999).n_vocab == 256 + 2 + 1
    assert train_bpe([], 300) == train_bpe_naive([""], 300) == BYTES


def test_train_is_of_exactly_the_size_asked_with_special_tokens_last():
    made = train([CORPUS], 400, special_tokens=("<|endoftext|>", "<|pad|>"), name="mine")
    assert (made.n_vocab, made.name) == (400, "mine")
    assert made.encode("<|endoftext|><|pad|>", allowed_special="all") == [398, 399]
    assert train([CORPUS], 300, special_tokens=()).n_vocab == 300
    assert train([CORPUS], 300, CL100K_SPLIT)._mergeable_ranks == train_bpe([CORPUS], 299, CL100K_SPLIT)


def test_training_on_one_long_word_is_linear_in_its_length():
    start = time.perf_counter()
    assert list(train_bpe(["ab" * 200_000, "a" * 200_000], 259))[256:] == [b"ab", b"abab", b"aa"]
    assert time.perf_counter() - start < 20  # half a second; quadratic, some minutes


def test_text_with_half_a_surrogate_pair_is_learned_as_tiktoken_encodes_it():
    assert train_bpe(["\ud83d \ud83d \ud83d"], 258) == train_bpe(["\ufffd \ufffd \ufffd"], 258)
    assert encode(train(["x"], 257), "\ud83d\ude00") == list("😀".encode())


# --- the split ----------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", [GPT2_SPLIT, CL100K_SPLIT])
def test_split_matches_the_published_pattern(pattern):
    rng = random.Random(0)
    alphabet = "aZéſ'sSlLtdrev 19²\n\r\t\u00a0\u2028_-!?日😀\u0301\x1c\x85"  # ſ is an s to (?i:...)
    for text in HOSTILE + ["".join(rng.choices(alphabet, k=60)) for _ in range(2000)]:
        assert regex.findall(pattern, text) == regex.findall(PUBLISHED[pattern], text)


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, CL100K_SPLIT])
def test_split_matches_tiktoken_on_every_kind_of_character(pattern):
    """Training splits with `regex`, tiktoken with its own engine. Their Unicode versions may differ on characters
    that this Python does not know yet (category Cn), on no other."""
    ranks = dict(BYTES)
    for lead in b" a1!'":  # one merge that happens exactly if the character is in the word of the one before it
        for b in range(256):
            ranks[bytes([lead, b])] = len(ranks)
    whole = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    single = tiktoken.Encoding("s", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    find = regex.compile(pattern).findall
    # All of the first 0x3100 characters and every 701st of the others: in a second.
    for code in [*range(0x3100), *range(0x3100, 0x110000, 701)]:
        if unicodedata.category(chr(code)) in ("Cn", "Cs"):
            continue
        text = "".join(f"{lead}{chr(code)}b\n" for lead in " a1!'")
        assert whole.encode(text) == [t for word in find(text) for t in single.encode(word)], hex(code)


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, CL100K_SPLIT])
def test_encoding_matches_naive_merging_word_by_word(pattern):
    made = train([CORPUS], 800, pattern)
    ranks = made._mergeable_ranks
    for text in [*HOSTILE[:-7], *HOSTILE[-5:], CORPUS[40_000:44_000]]:
        words = [w.encode() for w in regex.findall(pattern, text)]
        assert encode(made, text) == [ranks[t] for w in words for t in encode_word_naive(ranks, w)]


# --- text to ids and back -----------------------------------------------------------------------

def test_a_document_that_spells_a_special_token_is_text(encoding):
    text = "before <|endoftext|> after"
    assert eot(encoding) == encoding.n_vocab - 1
    assert eot(encoding) not in encode(encoding, text)
    assert encode(encoding, text, allow_special=True).count(eot(encoding)) == 1
    for allow in (False, True):
        assert decode_bytes(encoding, encode(encoding, text, allow_special=allow)) == text.encode()
    assert eot(encoding) not in encode_bytes(encoding, text.encode() + b"\xff<|endoftext|>")


def test_hostile_text_round_trips(encoding):
    for text in HOSTILE + [CORPUS]:
        assert decode_bytes(encoding, encode(encoding, text)) == text.encode()
        assert encode_bytes(encoding, text.encode()) == encode(encoding, text)


def test_every_byte_string_round_trips(encoding):
    rng = random.Random(0)
    for alphabet in (range(256), [0xED, 0xA0, 0x80, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0x20, 0x61]):
        for _ in range(1500):
            data = bytes(rng.choices(alphabet, k=rng.randrange(20)))
            assert decode_bytes(encoding, encode_bytes(encoding, data)) == data
    damaged = "café ".encode() * 50 + b"\xff\xfe" + CORPUS.encode()  # one bad byte does not spoil the words after it
    assert encode_bytes(encoding, damaged)[-500:] == encode(encoding, CORPUS)[-500:]


def test_a_million_blanks_are_encoded(encoding):
    """tiktoken alone overflows its stack here."""
    for blank, pattern in ((" ", GPT2_SPLIT), (" \n", CL100K_SPLIT)):
        made = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=encoding._mergeable_ranks, special_tokens={})
        text = "some words" + blank * (1_020_000 // len(blank)) + "x I'll"
        assert decode_bytes(made, encode(made, text)) == text.encode()
        text = "some words" + blank * (490_000 // len(blank)) + "x I'll"
        assert encode(made, text) == made.encode_ordinary(text)
        text += blank * 300_000 + "y"  # above the limit from which words are split here, the same ids
        assert encode(made, text) == made.encode_ordinary(text)


def test_ids_that_are_no_token_are_refused(encoding):
    for bad in (encoding.n_vocab, -1, 2**40, 97.5, None):
        with pytest.raises(ValueError, match="n_vocab 1000"):
            decode_bytes(encoding, [1, bad])


def test_eot_knows_both_spellings_and_refuses_neither():
    assert eot(train(["x"], 300, special_tokens=["<|a|>", "<|end_of_text|>"])) == 257
    with pytest.raises(ValueError, match="neither"):
        eot(train(["x"], 257, special_tokens=["<|a|>"]))


# --- files --------------------------------------------------------------------------------------

def same(a, b):
    return a.__getstate__() == b.__getstate__()


def test_saved_encoding_is_loaded_equal_and_is_tiktokens_own_format(encoding, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken caches by path even what is on disk
    for made in (encoding, train(["é ü"], 260, CL100K_SPLIT, ("<|x|>", "<|ü|>"), "odd name")):
        save(made, tmp_path / "v.tiktoken")  # the second time over the first
        assert same(load(tmp_path / "v.tiktoken"), made) and same(load(str(tmp_path / "v.tiktoken")), made)
        assert load_tiktoken_bpe(str(tmp_path / "v.tiktoken")) == made._mergeable_ranks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.tiktoken", "v.tiktoken.json"]


def test_rank_file_alone_is_taken_as_gpt2s_kind(encoding, tmp_path):
    save(encoding, tmp_path / "v.tiktoken")
    (tmp_path / "v.tiktoken.json").unlink()
    alone = load(tmp_path / "v.tiktoken")
    assert alone.__getstate__() == {**encoding.__getstate__(), "name": "v"}
    with open(tmp_path / "v.tiktoken", "ab") as file:
        file.write(b"\n")  # tiktoken passes over blank lines
    assert same(load(tmp_path / "v.tiktoken"), alone)
    # A rank that is left out is where <|endoftext|> goes, as in p50k_base.
    write_ranks(tmp_path / "gap.tiktoken", [*BYTES.items(), (b"ab", 257)])
    assert eot(load(tmp_path / "gap.tiktoken")) == 256


def write_ranks(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks))


def many_ranks(n):
    return {**BYTES, **{b"%07d" % i: i for i in range(256, n)}}


def test_llama3_and_cl100k_rank_files_are_known_by_their_size(tmp_path):
    write_ranks(tmp_path / "tokenizer.model", many_ranks(128_000).items())
    llama = load(tmp_path / "tokenizer.model")
    assert (llama.n_vocab, llama.name, llama._pat_str) == (128_256, "llama3", CL100K_SPLIT)
    published = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|reserved_special_token_0|>": 128002,
                 "<|reserved_special_token_3|>": 128005, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007,
                 "<|reserved_special_token_4|>": 128008, "<|eot_id|>": 128009, "<|reserved_special_token_5|>": 128010,
                 "<|reserved_special_token_250|>": 128255}
    assert published.items() <= llama._special_tokens.items() and len(llama._special_tokens) == 256
    assert eot(llama) == 128_001
    write_ranks(tmp_path / "cl.tiktoken", many_ranks(100_256).items())
    cl100k = load(tmp_path / "cl.tiktoken")
    assert (cl100k.n_vocab, cl100k._pat_str, eot(cl100k)) == (100_277, CL100K_SPLIT, 100_257)


GOOD = b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in {**BYTES, b"ab": 256, b"abc": 257}.items())


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), (b"", "empty"), (b"\x0a\x0e\x0a\x05<unk>\x15", "line 1 "), (b"{}", "line 1 "),
    (GOOD[:-3], "line 258 "), (GOOD[:-8], "line 258 "), (GOOD[:-5], "line 258 "), (GOOD + b"YWI= 258\n", "line 259 "),
    (GOOD + b"YWJj\n", "line 259 "), (GOOD + b"YW!j 258\n", "line 259 "), (GOOD + b"YWJk 3\n", "line 259 "),
    (GOOD + b"YWJk -1\n", "line 259 "), (GOOD + b"YWJk 99999999999\n", "line 259 "), (GOOD[50:], "line 1 "),
    (GOOD[:700], "256 single bytes"), (GOOD + b"= 258\n", "line 259 ")])
def test_bad_rank_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.tiktoken"
    if content is not None:
        path.write_bytes(content[:content.rindex(b"\n") + 1] if len(content) == 700 else content)
    assert message in refusal(path)


def refusal(path):
    """What ``load`` says of a bad file: one line that names it."""
    with pytest.raises(ValueError) as error:
        load(path)
    assert "\n" not in str(error.value) and Path(path).name in str(error.value)
    return str(error.value)


def test_llama3_model_that_is_cut_short_is_refused(tmp_path):
    write_ranks(tmp_path / "tokenizer.model", list(many_ranks(1000).items()))
    assert "Llama 3's has 128000" in refusal(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("sidecar, message", [
    (b"", "empty"), (b"{", "JSONDecodeError"), (b"[]", "TypeError"), (b"{}", "sha256"), ("sha", "sha256 is not that"),
    (b"[" * 100_000, "RecursionError"), ("pattern", "Parsing error"), ("special_tokens", "OverflowError"),
    ("list", "AttributeError"), ("name", "name")])
def test_bad_sidecars_are_refused_in_one_line(encoding, tmp_path, sidecar, message):
    path = tmp_path / "v.tiktoken"
    save(encoding, path)
    fields = json.loads((tmp_path / "v.tiktoken.json").read_bytes())
    if sidecar == "sha":
        path.write_bytes(path.read_bytes()[:-14])
        path.write_bytes(path.read_bytes()[:path.read_bytes().rindex(b"\n") + 1])  # cut between two lines
    elif isinstance(sidecar, str):
        fields |= {"pattern": {"pattern": "("}, "special_tokens": {"special_tokens": {"<|x|>": -1}},
                   "list": {"special_tokens": []}, "name": {}}[sidecar]
        fields = {k: v for k, v in fields.items() if k != sidecar or k != "name"}
        (tmp_path / "v.tiktoken.json").write_text(json.dumps(fields))
    else:
        (tmp_path / "v.tiktoken.json").write_bytes(sidecar)
    assert message in refusal(path)


def test_saving_into_a_missing_folder_is_refused(encoding, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        save(encoding, tmp_path / "none" / "v.tiktoken")


def test_saving_that_fails_leaves_what_was_there(encoding, tmp_path, monkeypatch):
    save(encoding, tmp_path / "v.tiktoken")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, content):  # the sidecar, written before, still had room
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="v.tiktoken: cannot be written .No space left on device.: check"):
        save(train(["x y z"], 257), tmp_path / "v.tiktoken")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, CL100K_SPLIT], ids=["gpt2", "cl100k"])
def test_what_is_written_for_transformers_gives_the_same_ids(tmp_path, pattern):
    from transformers import AutoTokenizer
    ours = train([CORPUS], 700, pattern, ("<|endoftext|>", "<|user|>"))
    tokenizer.save_hugging_face(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in HOSTILE + [CORPUS[-20_000:], "<|user|>"]:
        ids = encode(ours, text, allow_special=True)  # as transformers does
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.eos_token_id, len(theirs)) == (eot(ours), ours.n_vocab)


def test_ranks_that_are_no_merges_cannot_be_written_for_transformers(tmp_path):
    odd = tiktoken.Encoding("odd", pat_str=GPT2_SPLIT, mergeable_ranks=BYTES | {b"abc": 256}, special_tokens={})
    with pytest.raises(ValueError, match="b'abc' is no merge of two tokens of lower rank"):
        tokenizer.save_hugging_face(odd, tmp_path)


def test_a_folder_with_a_rank_file_is_read_by_it(encoding, tmp_path):
    save(encoding, tmp_path / "tokenizer.tiktoken")
    assert same(load(tmp_path), encoding)


# --- GPT-2's two files --------------------------------------------------------------------------

@pytest.fixture
def gpt2_folder(tmp_path):
    model = hugging_face([CORPUS], 600, ["<|endoftext|>", "<pad>"])
    model.model.save(str(tmp_path))
    return tmp_path, model


def test_vocab_json_and_merges_match_hugging_face(gpt2_folder):
    folder, model = gpt2_folder
    loaded = load(folder)
    assert loaded._special_tokens == {"<|endoftext|>": 0, "<pad>": 1} and loaded.n_vocab == 600
    for text in HOSTILE + [CORPUS[-20_000:]]:
        text = text.replace("<|endoftext|>", "")  # theirs takes it for the control token
        assert encode(loaded, text) == model.encode(text).ids
    for path in ("vocab.json", "merges.txt"):
        assert same(load(folder / path), loaded)
    text = (folder / "merges.txt").read_bytes()
    text = text.split(b"\n", 1)[1].replace(b"\n", b"\r\n") + b"\r\n"  # no header, Windows, a blank line at the end
    (folder / "merges.txt").write_bytes(text)
    assert same(load(folder), loaded)
    save(loaded, folder / "v.tiktoken")
    assert same(load(folder / "v.tiktoken"), loaded)


def test_gpt2_vocabulary_matches_transformers_on_hostile_text():
    if not (GPT2 / "vocab.json").exists():
        return  # the small vocabulary above covers the format
    from transformers import GPT2Tokenizer
    theirs, ours = GPT2Tokenizer.from_pretrained(GPT2), load(GPT2)
    assert (ours.n_vocab, eot(ours), ours._pat_str) == (50257, 50256, GPT2_SPLIT)
    assert encode(ours, "hello world") == [31373, 995]  # from tiktoken's own documentation
    rng = random.Random(0)
    for text in HOSTILE + [CORPUS] + ["".join(rng.choices("aA eéß'st\n19😀日!", k=200)) for _ in range(50)]:
        text = text.replace("<|endoftext|>", "")
        assert encode(ours, text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("case, message", [
    ("no merges", "merges.txt: cannot be read (No such file"), ("empty merges", "merges.txt: is empty"),
    ("no vocab", "vocab.json: cannot be read (No such"),
    ("vocab not json", "vocab.json: is no JSON"), ("vocab a list", "vocab.json: is no JSON"),
    ("vocab of str", "vocab.json: is no JSON"), ("vocab deep", "RecursionError"), ("vocab {}", "ValueError"),
    ("id -1", "out of range"), ("id 99999999999", "out of range"), ("same ids", "share an id"), ("byte missing", "vocab.json: is no JSON"),
    ("merges cut in a line", "merges"), ("merges cut between lines", "makes not all"), ("merge unknown", "line 5 "),
    ("merge without blank", "line 5 "), ("not UTF-8", "line 5 "), ("order", "in the order of ids")])
def test_bad_gpt2_files_are_refused_in_one_line(gpt2_folder, case, message):
    folder, _ = gpt2_folder
    vocab, merges = json.loads((folder / "vocab.json").read_bytes()), (folder / "merges.txt").read_bytes().split(b"\n")
    vocab_data = None
    if case == "no merges":
        (folder / "merges.txt").unlink()
    elif case == "no vocab":
        (folder / "vocab.json").unlink()
    elif case == "empty merges":
        merges = [b""]
    elif case.startswith("vocab"):
        vocab_data = {"vocab not json": "{\"a\": 1,", "vocab a list": "[1]", "vocab of str": '{"a": "1"}',
                      "vocab deep": "[" * 100_000, "vocab {}": "{}"}[case]
    elif case.startswith("id "):
        vocab["<pad>"] = int(case[3:])
    elif case == "same ids":
        vocab["<pad>"] = 0
    elif case == "byte missing":
        del vocab["a"]
    elif case == "merges cut in a line":
        merges = [*merges[:100], merges[100][:-2]]
    elif case == "merges cut between lines":
        merges = merges[:100]
    elif case == "order":
        merges[4], merges[300] = merges[300], merges[4]
    else:
        merges[4] = {"merge unknown": "zq qzq".encode(), "merge without blank": b"the", "not UTF-8": b"\xff \xfe"}[case]
    if case != "no merges":
        (folder / "merges.txt").write_bytes(b"\n".join(merges))
    if case != "no vocab":
        (folder / "vocab.json").write_text(vocab_data or json.dumps(vocab))
    with pytest.raises(ValueError) as error:
        load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- names, arguments, the command --------------------------------------------------------------

def test_published_name_that_cannot_be_had_is_refused_in_time(monkeypatch):
    def refuse(name):
        raise ConnectionError("many\nlines")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(ValueError, match="^gpt2: .*ConnectionError.*TIKTOKEN_CACHE_DIR"):
        load("gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.1)
    with pytest.raises(ValueError, match="no answer"):
        load("gpt2")


def test_published_name_is_tiktokens(encoding, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding if name == "cl100k_base" else None)
    assert load("cl100k_base") is encoding


def test_unknown_name_is_refused_with_the_names_there_are():
    for name in ("no_such_encoding", "x" * 5000):  # the latter is too long for a file system
        assert "cl100k_base" in refusal(name)


@pytest.mark.parametrize("call, message", [
    (lambda: train_bpe(["x"], 255), "at least 256, .*, got 255"), (lambda: train_bpe_naive(["x"], 0), "at least 256, .*, got 0"),
    (lambda: train(["x"], 256), "at least 256 bytes .*, got 256"), (lambda: train("text", 300), "one str"),
    (lambda: train(b"text", 300), "one bytes"),
    (lambda: train_bpe(["x"], 300, "("), "not a regular expression"),
    (lambda: train_bpe(["x"], 300, "(.)"), "captures 1"),
    (lambda: train_bpe(["a b"], 300, r"\S+"), "covers 2 of 3"),
    (lambda: train(["x"], 300, special_tokens="<|a|>"), "list"),
    (lambda: train(["x"], 300, special_tokens=["a", "a"]), "different"),
    (lambda: train(["x"], 300, special_tokens=[""]), "non-empty")])
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def run(*flags):
    return subprocess.run([sys.executable, "tokenizer.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True)


def test_command_does_what_each_flag_says(tmp_path):
    data = tmp_path / "in.txt"
    data.write_text(CORPUS[:20_000])
    plain = run("--data", data, "--vocab_size", 290)
    assert plain.returncode == 0 and "n_vocab = 290 " in plain.stdout
    assert plain.stdout.splitlines()[-1].startswith("naive = fast: True (34 merges), round trip: True")
    assert " tokens of text; in a template: [289]   (expected more than 1; [289])" in plain.stdout
    other = run("--data", data, "--vocab_size", 290, "--pattern", "cl100k", "--text", "dolor 12345",
                "--out", tmp_path / "o")
    tokens = next(line for line in other.stdout.splitlines() if line.startswith("tokens: "))
    assert tokens.replace("|", "") == "tokens: dolor 12345"
    assert "encode alike: True" in other.stdout and load(tmp_path / "o")._pat_str == CL100K_SPLIT


def test_command_learns_from_all_files_that_a_pattern_names(tmp_path):
    (tmp_path / "a.txt").write_text("abc " * 200)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "xyz " * 200}) + "\n")
    found = run("--data", f"{tmp_path}/*.txt,{tmp_path}/b.jsonl", "--vocab_size", 270, "--text", "abc xyz")
    assert found.returncode == 0 and "tokens: abc| xyz\n" in found.stdout, found.stderr


def test_command_says_what_it_lacks_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "data", None)  # as if the file were not there
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "--data", "in.txt"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(tokenizer.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("tokenizer.py: ") and error.endswith(": copy that file beside this one, or install that package\n")


@pytest.mark.parametrize("content, flags, message", [
    (None, [], "in.txt: no such file"), (b"", [], "in.txt: is empty"), (b"abc\xff", [], "in.txt, byte 3: 0xff is not UTF-8: convert the file"),
    (b"abc", ["--vocab_size", "100"], "at least 256"), (b"abc", ["--out", "."], "cannot be written (Is a directory)"),
    (b"abc", ["--out", "none/v"], "cannot be written (No such file"), (b"abc", ["--vocab_size", "many"], "invalid int value: 'many'"),
    (b"abc", ["--pattern", "bert"], "invalid choice: 'bert'"), (b"abc", ["--nope"], "unrecognized arguments: --nope")])
def test_command_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys, content, flags, message):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "--data", "in.txt", "--vocab_size", "258", *flags])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(tokenizer.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("tokenizer.py: ")
    assert not [path for path in tmp_path.iterdir() if path.name != "in.txt"]


def test_command_stops_without_a_traceback_on_ctrl_c(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(regex, "compile", interrupted)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py"])
    with pytest.raises(BaseException) as exit:
        runpy.run_path(tokenizer.__file__, run_name="__main__")
    assert isinstance(exit.value, SystemExit) and exit.value.code == 130 and capsys.readouterr().err == ""
