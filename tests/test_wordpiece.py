"""WordPiece against Hugging Face's BertTokenizer and trainer, on strings meant to break it."""

import random
import re
import runpy
import sys
import unicodedata

import pytest

import wordpiece
from wordpiece import SPECIAL, WordPiece, split_words, train_wordpiece, train_wordpiece_naive

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
tokenizers = pytest.importorskip("tokenizers", reason="pip install -r tests/requirements.txt")

TEXTS = ["The quick brown fox jumps over the lazy dog; the dogs sleep.", "Low, lower, lowest: newer and newest, wider and widest!",
         "Tokenisation, the tokenised and the tokens' tokeniser.", "Größe, café, naïve façade, Ünïcödé.", "x = [1, 2, 34] + 56 ** 7"]
# Every sort of character that basic tokenisation tells apart, and its neighbours.
PARTS = ["the", "low", "est", "Tokens", "CAFÉ", "cafe\u0301", "naïve", "Ångström", "İstanbul", "ΑΣ", "ſ", "ß", "ﬁ", "Ǆ", "K", "東京", "語", "ひらがな", "한국어",
         "\uf900", "\U00020000", "\U0002b820", "\U0002b920", "\U0002f800", "़", "हिन्दी", "עִבְרִית", "العربية", "ไทย", "\u0301", "\u0898", "\u1ab0", "\u1abf",
         "\u0300\u0323", "\x00", "\x01", "\x07", "\x0b", "\x0c", "\x1c", "\x1f", "\x7f", "\x85", "\xad", "\u200b", "\u200d", "\u2028", "\u2029",
         "\u202e", "\ufeff", "\ufffd", "\ufffe", "\ue000", "\U000e0001", "\U0010ffff", "\u00a0", "\u1680", "\u180e", "\u2003", "\u3000",
         " ", "  ", "\t", "\n", "\r\n",
         ".", "...", "'", "`", "$", "^", "~", "|", "<", "=", "+", "@", "#", "##", "##s", "_", "-", "—", "¿", "«", "。", "、", "・", "€", "¬", "±",
         "\u037e", "\u1fef", "\u2e43",
         "\u061d", "😀", "👨\u200d👩\u200d👧", "🇫🇷", "1", "٣", "Ⅷ", "½", "10,000.5", "a" * 99, "b" * 100, "c" * 101, "e\u0301" * 100, "lowestnewest" * 20,
         "[MASK]", "[SEP]", "[mask]", "[[CLS]]", "[UNK", "PAD]"]


def vocabulary(size=140, lower=True):
    return train_wordpiece(TEXTS, size, lower)


def theirs(tokens, lower=True, **options):
    return transformers.BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=lower, **options)


def hostile(count, seed=0):
    """Mixtures of PARTS, of ordinary words, of random characters of all planes."""
    rng, words = random.Random(seed), " ".join(TEXTS).split()
    for _ in range(count):
        pieces = []
        for _ in range(rng.randrange(12)):
            kind = rng.random()
            if kind < 0.5:
                pieces.append(rng.choice(PARTS))
            elif kind < 0.8:
                pieces.append(rng.choice(words))
            else:
                code = rng.randrange(rng.choice((0x80, 0x500, 0x3000, 0x10000, 0x110000)))
                pieces.append("" if 0xD800 <= code < 0xE000 else chr(code))
        yield rng.choice(("", " ")).join(pieces)


# --- ids ------------------------------------------------------------------------------------

@pytest.mark.parametrize("lower", [True, False])
def test_ids_match_transformers_on_hostile_strings(lower):
    # Vocabulary: whole words, sub-words, and single characters from far away, so that what is kept, dropped, lowered or split shows.
    tokens = vocabulary(lower=lower)
    tokens += [t for c in "ά東語कہ한😀€¬±。ß\u0323\u0301\u0898\u1abf" for t in (c, "##" + c) if t not in tokens]
    ours, bert = WordPiece(tokens, lower), theirs(tokens, lower)
    texts = list(hostile(6000))
    for text, ids in zip(texts, bert(texts, add_special_tokens=False)["input_ids"]):
        assert ours.encode(text, allow_special=True) == ids, ascii(text)


def test_special_tokens_that_a_text_spells_out_are_text_unless_allowed():
    ours, bert = WordPiece(vocabulary()), theirs(vocabulary())
    bert._tokenizer.encode_special_tokens = True
    for text in ("a [MASK] [SEP]", "[CLS]", *(text for text in hostile(300, seed=1) if "[" in text)):
        assert ours.encode(text) == bert._tokenizer.encode(text, add_special_tokens=False).ids, ascii(text)
    assert ours.encode("low [MASK]") != ours.encode("low [MASK]", allow_special=True) == [*ours.encode("low"), ours.mask]


@pytest.mark.parametrize("lower", [True, False])
def test_every_character_is_split_as_transformers_does(lower):
    backend = theirs(vocabulary(), lower)._tokenizer
    planes = (range(0x5000), range(0x9F00, 0xAD00), range(0xD700, 0xD800), range(0xE000, 0x20080), range(0x2A600, 0x2CF00),
              range(0xE0000, 0xE0200))  # what is between them is of one kind
    codes = [code for plane in planes for code in plane]
    for i in range(0, len(codes), 200):
        text = " ".join(f"a{chr(code)}b" for code in codes[i:i + 200])
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
        ours = split_words(text, lower)
        assert len(ours) == len(words)
        # Lower cases and decompositions younger than this Python, or than theirs: one unknown word to both.
        assert sum(x != y for x, y in zip(ours, words)) < 30
        for x, y in zip(ours, words):
            assert x == y or unicodedata.category(x[1]) in ("Lu", "Ll", "Cn", "Mc"), ascii((x, y))


def test_words_of_100_characters_are_cut_and_longer_ones_unknown():
    tokens = [*SPECIAL, "a", "##a", "##aa"]
    ours = WordPiece(tokens)
    assert ours.encode("a" * 100) == [5] + [7] * 49 + [6]
    assert ours.encode("a" * 101) == [ours.unk] == theirs(tokens)("a" * 101, add_special_tokens=False)["input_ids"]
    assert ours.encode("á" * 100) == ours.encode("a" * 100)  # counted without their accents


def test_the_longest_piece_is_taken_first_and_a_dead_end_is_unknown():
    ours = WordPiece([*SPECIAL, "un", "una", "##able", "##ble", "##a"])
    assert ours.decode(ours.encode("unable")) == "unable" and ours.encode("unable") == [6, 8]
    assert ours.encode("unaable") == [6, 7]
    assert ours.encode("unx") == [ours.unk]


def test_every_word_has_a_piece_and_the_empty_text_none():
    ours = WordPiece(vocabulary())
    assert ours.encode("") == ours.encode(" \n\t") == ours.encode("\x00\u200b") == []
    assert ours.encode_words(["the", "\u200b", "tokens"]) == [ours.encode("the"), [ours.unk], ours.encode("tokens")]


def test_decoding_gives_the_cleaned_words():
    ours = WordPiece(vocabulary())
    assert ours.decode(ours.encode("The LOWEST  café!")) == "the lowest cafe !"
    with pytest.raises(ValueError, match=r"token id 140 is not in the vocabulary, 0 \.\. 139"):
        ours.decode([5, 140])


# --- training -------------------------------------------------------------------------------

@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("size", [90, 130, 100000])
def test_fast_training_matches_naive(size, lower):
    texts = [*TEXTS, "aaaa aaaaa aaaaaa abab ababab", "mississippi " * 3]
    tokens = train_wordpiece(texts, size, lower)
    assert tokens == train_wordpiece_naive(texts, size, lower)
    assert len(set(tokens)) == len(tokens) <= size


def test_training_matches_hugging_face_where_no_counts_tie():
    numbers = {"ab": 31, "abc": 17, "de": 29, "def": 13, "ghi": 11, "gh": 40, "jk": 7, "jkl": 5}
    texts = [" ".join(" ".join([word] * n) for word, n in numbers.items())]
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(texts, tokenizers.trainers.WordPieceTrainer(vocab_size=60, special_tokens=list(SPECIAL), show_progress=False))

    def merges(tokens):  # of single characters, they list those at the start and those inside of words in another order
        return [token for token in tokens if token not in SPECIAL and len(token.removeprefix("##")) > 1]

    assert merges(train_wordpiece(texts, 60)) == merges(sorted(backend.get_vocab(), key=backend.get_vocab().get))
    assert len(merges(train_wordpiece(texts, 60))) == 8


def test_training_needs_words_and_room_for_their_characters():
    with pytest.raises(ValueError, match="hold no words"):
        train_wordpiece(["", "\x00 \n"], 100)
    with pytest.raises(ValueError, match="vocab_size 10 cannot hold the 5 special tokens and 9 characters"):
        train_wordpiece(["abcde fghi"], 10)
    with pytest.raises(ValueError, match=r"pass \[text\]"):
        train_wordpiece("one text", 100)


# --- files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_vocabulary_files_are_those_of_transformers(tmp_path, line_end):
    tokens = [*vocabulary(), "\u2028", "\x85"]  # str.splitlines would cut there
    (tmp_path / "vocab.txt").write_text(line_end.join(tokens) + line_end, newline="")
    ours = WordPiece.load(tmp_path / "vocab.txt")
    assert ours.tokens == tokens
    ours.save(tmp_path / "saved.txt")
    assert WordPiece.load(tmp_path / "saved.txt").tokens == tokens
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    (tmp_path / "saved.txt").rename(tmp_path / "vocab.txt")
    bert = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert bert(TEXTS[2])["input_ids"] == [ours.cls, *ours.encode(TEXTS[2]), ours.sep]


@pytest.mark.parametrize("content, message", [
    (None, "no such file|cannot be read"), (b"", "lacks .*: copy a whole vocab.txt of BERT's$"),
    (b"\xff\xfe[", "vocab.txt, byte 0: is not UTF-8: convert the file first$"),
    ("\n".join([*SPECIAL, "a", "a"]).encode(), "'a' is in the vocabulary twice"), (b"[PAD]\n[UNK]\nthe\n", r"lacks \[CLS\] \[SEP\] \[MASK\]")])
def test_bad_vocabulary_files_are_refused(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        WordPiece.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_saving_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        WordPiece(vocabulary()).save(tmp_path / "no" / "vocab.txt")


# --- demo -----------------------------------------------------------------------------------

def demo(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["wordpiece.py", *map(str, flags)])
    runpy.run_path(wordpiece.__file__, run_name="__main__")
    return capsys.readouterr().out


def test_demo_ends_on_its_verdict_and_every_flag_changes_something(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS * 3))
    plain = demo(monkeypatch, capsys, "--data", tmp_path / "a.txt", "--vocab_size", 120)
    assert re.search(r"naive = fast: True .* words read back: 100.00%", plain)
    assert "120 tokens learned" in plain
    cased = demo(monkeypatch, capsys, "--data", tmp_path / "a.txt", "--vocab_size", 130, "--cased", "--out", tmp_path / "v.txt")
    assert "130 tokens learned" in cased and cased != plain
    assert any(token != token.lower() for token in WordPiece.load(tmp_path / "v.txt").tokens if token not in SPECIAL)


@pytest.mark.parametrize("flags, message", [(("--data", "missing.txt"), "missing.txt"), (("--vocab_size", 6), "vocab_size 6 cannot hold")])
def test_bad_flags_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    monkeypatch.setattr(sys, "argv", ["wordpiece.py", "--data", str(tmp_path / "a.txt"), *map(str, flags)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(wordpiece.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_words_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(wordpiece, "REMEMBERED", 3)
    tokenizer = wordpiece.WordPiece([*wordpiece.SPECIAL, *"abcdefgh"])
    assert tokenizer.encode("a b c d e f g h a") == [5, 6, 7, 8, 9, 10, 11, 12, 5] and len(tokenizer._known) <= 3
