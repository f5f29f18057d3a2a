"""Decoding against transformers (processors, generate, beam search) and against exact enumeration."""

import io
import itertools
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process

import decode
from decode import (Sampling, beam_search, decode_stream, generate, min_p, naive_generate, next_logits,
                    repetition_penalty, score, stream, temperature, token_log_probs, top_k, top_p)
from gpt import GPT, GPTConfig


def tiny(vocab_size=11, context=24, seed=0, scale=8.0, **sizes):
    """A GPT in float64, its weights scaled so that its distributions are far from uniform."""
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16} | sizes
    model = GPT(GPTConfig(vocab_size, context, **sizes), generator=torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= scale
    return model.eval()


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """A random GPT-2 of transformers and the same weights in our GPT, both float64."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=48, n_embd=32, n_layer=2, n_head=2,
                                        initializer_range=0.3, bos_token_id=0, eos_token_id=0)).eval()
    directory = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(directory)
    return theirs.double(), GPT.from_pretrained(directory).double()


PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9]]


# --- score ---

def test_score_matches_log_softmax_and_ragged_rows_match_rows_alone():
    model, tokens = tiny(), torch.randint(11, (3, 7))
    log_p = model(tokens).log_softmax(-1)
    expected = sum(log_p[:, t - 1].gather(1, tokens[:, t:t + 1])[:, 0] for t in range(1, 7))
    torch.testing.assert_close(score(model, tokens), expected)
    ragged = score(model, tokens, torch.tensor([7, 1, 4]))
    alone = torch.stack([score(model, tokens[b:b + 1, :n])[0] for b, n in enumerate((7, 1, 4))])
    torch.testing.assert_close(ragged, alone)
    assert ragged[1] == 0
    assert token_log_probs(model, tokens).shape == (3, 6)


def test_probabilities_of_all_sequences_sum_to_one():
    tokens = torch.tensor([(0, *rest) for rest in itertools.product(range(3), repeat=4)])
    torch.testing.assert_close(score(tiny(3), tokens).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("lengths", [[0, 2], [1, 4], [1]])
def test_bad_lengths_and_shapes_are_refused(lengths):
    with pytest.raises(ValueError, match=r"2 values in 1 .. 3"):
        score(tiny(), torch.zeros(2, 3, dtype=torch.long), torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        score(tiny(), torch.zeros(3, dtype=torch.long))


# --- choosing ---

@pytest.mark.parametrize("value", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_processors_match_transformers(value, ties):
    logits, rows = torch.randn(5, 40, dtype=torch.float64) * 3, torch.randint(40, (5, 12))
    if ties:
        logits = logits.round()
    k = int(value * 10)
    for ours, theirs in (
            (repetition_penalty(logits, rows, 1 + value), logits_process.RepetitionPenaltyLogitsProcessor(1 + value)),
            (temperature(logits, value), logits_process.TemperatureLogitsWarper(value)),
            (top_k(logits, k), logits_process.TopKLogitsWarper(k)),
            (top_p(logits, value), logits_process.TopPLogitsWarper(value)),
            (min_p(logits, value), logits_process.MinPLogitsWarper(value))):
        theirs_kept = theirs(rows, logits)
        if ties and isinstance(theirs, logits_process.TopPLogitsWarper):  # which of equals they keep is left open there
            ours, theirs_kept = ours.sort().values, theirs_kept.sort().values
        torch.testing.assert_close(ours, theirs_kept, atol=0, rtol=0)


def test_top_p_keeps_the_larger_ids_among_equals():
    assert top_p(torch.zeros(1, 40), 0.25).isfinite()[0].tolist() == [False] * 30 + [True] * 10


def test_chain_matches_transformers():
    logits, rows = torch.randn(5, 40, dtype=torch.float64) * 3, torch.randint(40, (5, 12))
    scores = logits
    for process in (logits_process.RepetitionPenaltyLogitsProcessor(1.3), logits_process.TemperatureLogitsWarper(0.7),
                    logits_process.TopKLogitsWarper(20), logits_process.TopPLogitsWarper(0.9),
                    logits_process.MinPLogitsWarper(0.05)):
        scores = process(rows, scores)
    ours = Sampling(0.7, 20, 0.9, 0.05, 1.3).probabilities(logits, rows)
    torch.testing.assert_close(ours, scores.softmax(-1), atol=0, rtol=0)


def test_top_p_keeps_at_least_one_and_top_k_larger_than_the_vocabulary_keeps_all():
    logits = torch.randn(4, 9)
    assert (top_p(logits, 1e-9).isfinite().sum(-1) == 1).all()
    assert torch.equal(top_k(logits, 99), logits)


@pytest.mark.parametrize("bad", [dict(temperature=-1.0), dict(temperature=float("nan")),
                                 dict(temperature=1e-40), dict(top_k=0), dict(top_k=2.5), dict(top_p=0.0),
                                 dict(top_p=1.1), dict(min_p=-0.1), dict(min_p=1.5), dict(repetition_penalty=0.0)])
def test_values_out_of_range_are_refused(bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        generate(tiny(), [[1]], 2, **bad)


def test_none_leaves_a_step_out_and_the_coldest_temperature_is_greedy():
    logits = torch.randn(3, 9) * 1e3
    assert torch.equal(Sampling(None).probabilities(logits, [[]] * 3), logits.softmax(-1))
    assert torch.equal(Sampling(1e-6).probabilities(logits, [[]] * 3).argmax(-1), logits.argmax(-1))
    assert torch.equal(repetition_penalty(logits, [[]] * 3, 2.0), logits)  # nothing to penalise


# --- generate ---

def test_greedy_matches_transformers_padded(peers):
    theirs, ours = peers
    prompts = [[7, 1, 30, 2], [11], [40, 41, 42]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    for penalty in (None, 1.5):
        expected = [theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long),
                                    do_sample=False, max_new_tokens=12, eos_token_id=49, pad_token_id=0,
                                    repetition_penalty=penalty)[0, len(p):].tolist() for p in prompts]
        got = generate(ours, prompts, 12, temperature=0, stop_tokens=[49], repetition_penalty=penalty)
        assert got == expected
    batch = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None,
                            pad_token_id=0)[:, longest:].tolist()
    assert generate(ours, prompts, 12, temperature=0) == batch


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=0, repetition_penalty=2.0)])
@pytest.mark.parametrize("stop_tokens", [(), (0, 5)])
def test_ragged_batch_matches_naive_rows(options, stop_tokens):
    model = tiny()
    batch = generate(model, PROMPTS, 30, stop_tokens=stop_tokens, **options)  # 30: past the context of 24
    assert batch == naive_generate(model, PROMPTS, 30, stop_tokens=stop_tokens, **options)
    assert batch == [generate(model, [p], 30, stop_tokens=stop_tokens, **options)[0] for p in PROMPTS]


def test_sampling_one_row_matches_naive_and_repeats_with_the_seed():
    model, options = tiny(), dict(temperature=0.9, top_k=8, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
    runs = [f(model, torch.tensor([[3, 1]]), 15, generator=torch.Generator().manual_seed(seed), **options)
            for f, seed in ((generate, 1), (generate, 1), (naive_generate, 1), (generate, 2))]
    assert runs[0] == runs[1] == runs[2] != runs[3]


def test_sampled_tokens_follow_the_filtered_distribution():
    model = tiny()
    drawn = generate(model, [[3, 1]] * 4000, 1, generator=torch.Generator().manual_seed(0), top_k=4, temperature=1.3)
    p = Sampling(1.3, 4).probabilities(model(torch.tensor([[3, 1]]))[:, -1], [[3, 1]])[0]
    observed = torch.bincount(torch.tensor(drawn)[:, 0], minlength=11) / 4000
    assert (observed[p == 0] == 0).all()
    assert (observed - p).abs().max() < 0.04  # five standard deviations of a frequency over 4000 draws


def test_every_option_changes_the_text():
    model = tiny(scale=4.0)

    def run(**options):
        return generate(model, PROMPTS, 12, generator=torch.Generator().manual_seed(0), **options)

    plain = run()
    for options in (dict(temperature=0), dict(temperature=3.0), dict(top_k=2), dict(top_p=0.3), dict(min_p=0.5),
                    dict(repetition_penalty=5.0), dict(stop_tokens=range(11))):
        assert run(**options) != plain, options


def test_stop_tokens_the_limit_and_the_context_end_a_row():
    model = tiny()
    free = generate(model, PROMPTS, 40, temperature=0)
    assert [len(p) + len(c) for p, c in zip(PROMPTS, free)] == [24] * 4
    stop = free[0][3]
    stopped = generate(model, PROMPTS, 40, temperature=0, stop_tokens=[stop])
    assert stopped == [c[:c.index(stop) + 1] if stop in c else c for c in free]
    assert generate(model, PROMPTS, 40, temperature=0, stop_tokens=torch.tensor([stop])) == stopped
    assert len(generate(model, [[1]], 3, temperature=0)[0]) == 3
    assert generate(model, [[1] * 24, [2] * 23], 3, temperature=0)[0] == []


def test_no_prompts_give_no_completions():
    assert generate(tiny(), [], 3) == [] == naive_generate(tiny(), [], 3)


@pytest.mark.parametrize("prompt, message", [([], "prompt 0 is empty"),
                                             ([1] * 25, "25 tokens, the model's context is 24: shorten it"),
                                             ([11], "the vocabulary is 0 .. 10"), ([-1], "the vocabulary is 0 .. 10")])
def test_bad_prompts_are_refused(prompt, message):
    model = tiny()
    for call in (lambda: generate(model, [prompt], 3), lambda: naive_generate(model, [prompt], 3),
                 lambda: stream(model, prompt, 3), lambda: beam_search(model, prompt, 2, 3)):
        with pytest.raises(ValueError, match=message):
            call()
    for no_rows in ([1, 2], torch.tensor([1, 2]), torch.tensor([[1.0, 2.0]]), [[1, 2.5]], ["text"]):
        with pytest.raises(ValueError, match="prompts must be rows of token ids"):
            generate(model, no_rows, 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate(model, [[1]], 0)


def test_every_method_uses_eval_mode_and_restores_the_modes():
    model = tiny(dropout=0.5)
    model.train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    first = generate(model, PROMPTS, 8, temperature=0)
    assert first == generate(model, PROMPTS, 8, temperature=0)  # no dropout
    next(stream(model, [1], 8))  # abandoned after one token
    beam_search(model, [1], 2, 3)
    score(model, torch.tensor([[1, 2]]))
    naive_generate(model, [[1]], 2)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("B", [1, 3])
def test_next_logits_match_the_plain_model(dtype, tolerance, B):
    # Tolerances: some tens of roundings of logits of order one in each format; the fast products sum in another order.
    model, tokens = tiny(scale=2.0).to(dtype), torch.randint(11, (B, 15))
    with torch.inference_mode():
        expected, cache = model(tokens), model.new_cache(B, 15)
        got = [next_logits(model, tokens[:, :13], cache, 2)[:, -1:], next_logits(model, tokens[:, 13:], cache, 2)]
    torch.testing.assert_close(torch.cat(got, 1), expected[:, 12:], atol=tolerance, rtol=tolerance)


# --- streaming ---

BYTES = tiktoken.Encoding("bytes", pat_str=r".", special_tokens={"<end>": 256},
                          mergeable_ranks={bytes([b]): b for b in range(256)})


def test_stream_matches_generate():
    model, options = tiny(), dict(temperature=0.9, top_p=0.9, stop_tokens=[4])
    streamed = list(stream(model, [3, 1], 12, generator=torch.Generator().manual_seed(3), **options))
    assert streamed == generate(model, [[3, 1]], 12, generator=torch.Generator().manual_seed(3), **options)[0]


def test_characters_are_never_broken():
    text = "aé語🙂 end"
    pieces = list(decode_stream(text.encode(), BYTES))
    assert pieces == list(text)
    assert "".join(decode_stream("né🙂".encode()[:-1], BYTES)) == "né"  # unfinished at the end
    assert "".join(decode_stream(b"a\xffb", BYTES)) == "a\ufffdb"
    assert "".join(decode_stream([97, 999, 98], BYTES)) == "a\ufffdb"
    assert "".join(decode_stream([0xe8, 999, 97], BYTES)) == "\ufffd\ufffda"  # what was begun ends there


def test_stop_strings_end_the_text_wherever_tokens_are_cut():
    torch.manual_seed(0)
    chunks = [bytes(c) for n in (1, 2, 3) for c in itertools.product(b"ab", repeat=n)]
    encoding = tiktoken.Encoding("ab", pat_str=r".", special_tokens={}, mergeable_ranks=
                                 {bytes([b]): b for b in range(256)} | {c: 256 + i for i, c in enumerate(chunks)})
    stops = ("abba", "bb", "aaab")
    for _ in range(200):
        tokens = (256 + torch.randint(len(chunks), (6,))).tolist()
        text = encoding.decode(tokens)
        expected = next((text[:end - max(len(s) for s in stops if text[:end].endswith(s))]
                         for end in range(len(text) + 1) if text[:end].endswith(stops)), text)
        assert "".join(decode_stream(tokens, encoding, stops)) == expected, text
    assert list(decode_stream([97, 98, 97], BYTES, ["bc"])) == ["a", "ba"]  # held back, then let go


def test_stop_tokens_end_the_text_and_an_empty_stop_string_is_refused():
    assert "".join(decode_stream([97, 256, 98], BYTES, stop_tokens=[256])) == "a"
    with pytest.raises(ValueError, match="must not be empty"):
        next(decode_stream([97], BYTES, [""]))


# --- beam search ---

@pytest.mark.parametrize("beams, penalty, stop", [(1, 1.0, False), (4, 1.0, False), (4, 1.0, True), (5, 0.0, True),
                                                  (3, 2.0, True), (3, -1.0, True)])
def test_beam_search_matches_transformers(peers, beams, penalty, stop):
    theirs, ours = peers
    for prompt in ([7, 1, 30], [11], [40, 2]):
        # Their stop token is one that the model likes, so that beams do end early.
        eos = None if not stop else generate(ours, [prompt], 4, temperature=0)[0][-1]
        if beams == 1:
            expected = generate(ours, [prompt], 10, temperature=0)
            assert [tokens for tokens, _ in beam_search(ours, prompt, 1, 10)] == expected
            continue
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                              num_beams=beams, num_return_sequences=beams, do_sample=False, max_new_tokens=10,
                              length_penalty=penalty, eos_token_id=eos, pad_token_id=0 if eos is None else eos,
                              return_dict_in_generate=True, output_scores=True)
        got = beam_search(ours, prompt, beams, 10, length_penalty=penalty, n_best=beams, stop_token=eos)
        theirs_best = zip(out.sequences.tolist(), out.sequences_scores.tolist())
        for (tokens, value), (row, expected) in zip(got, theirs_best, strict=True):
            assert row[len(prompt):len(prompt) + len(tokens)] == tokens
            assert value == pytest.approx(expected, rel=1e-5)  # they add up log-probabilities in fp32


def test_beam_search_with_enough_beams_matches_enumeration():
    model, V, n = tiny(4), 4, 3
    rows = torch.tensor([(1, *rest) for rest in itertools.product(range(V), repeat=n)])
    best = score(model, rows).sort(descending=True)
    got = beam_search(model, [1], V ** n, n, length_penalty=0, n_best=V ** n)
    assert [tokens for tokens, _ in got] == rows[best.indices, 1:].tolist()
    torch.testing.assert_close(torch.tensor([value for _, value in got], dtype=torch.float64), best.values)


def test_more_beams_are_not_worse_here_and_options_change_the_result():
    model = tiny(scale=4.0)
    values = [beam_search(model, [3, 1], beams, 8, length_penalty=0)[0][1] for beams in (1, 11 ** 2)]
    assert values[0] < values[1]
    scores = {beam_search(model, [3, 1], 4, 8, length_penalty=a)[0][1] for a in (0, 1)}
    assert len(scores) == 2
    assert len(beam_search(model, [3, 1], 4, 8, n_best=3)) == 3
    stop = beam_search(model, [3, 1], 4, 8)[0][0][2]
    assert beam_search(model, [3, 1], 4, 8, stop_token=stop) != beam_search(model, [3, 1], 4, 8)
    with pytest.raises(ValueError, match="got 3 of 2 beams"):
        beam_search(model, [1], 2, 3, n_best=3)


def test_beam_search_ends_at_the_context():
    assert len(beam_search(tiny(), [1] * 20, 3, 10)[0][0]) == 4
    assert beam_search(tiny(), [1] * 24, 3, 10) == []


# --- the program ---

@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A training run's directory with one checkpoint of a random GPT over bytes."""
    import checkpoint
    import tokenizer
    encoding = tokenizer.train(["some text to merge, some text"], 270)
    directory, config = tmp_path_factory.mktemp("run"), GPTConfig(encoding.n_vocab, 32, 1, 2, 16)
    checkpoint.save(directory, 3, {"model": GPT(config, generator=torch.Generator().manual_seed(0)).state_dict()},
                    {"model_type": "gpt", "model_config": vars(config)},
                    lambda path: tokenizer.save(encoding, path / "tokenizer.tiktoken"))
    return directory


OPTIONS = dict(system="", max_new_tokens=8, temperature=0.8, top_p=0.95, seed=0, device="cpu")


def test_program_completes_prompts_and_every_flag_changes_something(run_directory, capsys, monkeypatch):
    def run(stdin="", **changes):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        options = dict(checkpoint=str(run_directory), prompt="some", chat=False) | OPTIONS | changes
        decode.main(**options)
        return capsys.readouterr().out

    plain = run()
    assert plain.startswith("some") and plain == run() == run("some", prompt="-")
    for changes in (dict(prompt="text"), dict(prompt=None), dict(max_new_tokens=3), dict(temperature=0.0),
                    dict(top_p=0.1), dict(seed=1), dict(chat=True)):
        assert run(**changes) != plain, changes
    chat = run("hello\nagain\n/exit\nnot read", chat=True, prompt=None)
    assert chat.count("You: ") == 3 and chat.count("Model:") == 2
    assert run("hello", chat=True, prompt=None, max_new_tokens=4, system="So") != run("hello", chat=True, prompt=None, max_new_tokens=4)


@pytest.mark.parametrize("changes, message", [
    (dict(checkpoint="no/such"), "no such directory"), (dict(prompt="x" * 99), "the model's context is 32: shorten it"),
    (dict(top_p=0.0), r"^--top_p must be in \(0, 1\], got 0.0"), (dict(temperature=-1.0), "^--temperature must be 0 or at least"),
    (dict(max_new_tokens=0), "^--max_new_tokens must be at least 1, got 0"),
    (dict(chat=True, max_new_tokens=32), "^max_new_tokens must be in 1 .. [0-9]+ in a context of 32 of which [0-9]+ are taken"),
    (dict(system="Be kind."), "--system is what a conversation begins with: take --chat, too"),
    (dict(device="no_such"), "^--device no_such: .*: take cpu, or another torch$"),
    (dict(checkpoint=None), "need a --checkpoint"), (dict(chat=True, prompt="-"), "both read stdin"),
    (dict(checkpoint=None, prompt=None, top_p=2.0), "^--top_p must be")])
def test_program_refuses_bad_input(run_directory, changes, message):
    with pytest.raises(ValueError, match=message):
        decode.main(**dict(checkpoint=str(run_directory), prompt="some", chat=False) | OPTIONS | changes)


@pytest.mark.parametrize("arguments, message", [
    (["--checkpoint", "no/such", "--prompt", "x"], "no/such: no such directory"), (["--no_such_flag"], "unrecognized"),
    (["--device", "no_such_device"], "no_such_device")])
def test_program_says_in_one_line_what_is_wrong(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(decode.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("decode.py: ") and message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_program_says_that_there_is_no_gpu(run_directory):
    with pytest.raises(ValueError, match="^--device cuda: .*: take cpu, or another torch$"):
        decode.main(**dict(checkpoint=str(run_directory), prompt="some", chat=False) | OPTIONS | dict(device="cuda"))


def test_program_alone_in_a_folder_on_an_ascii_terminal(run_directory, tmp_path, monkeypatch, capsys):
    alone, home = shutil.copy(decode.__file__, tmp_path), Path(decode.__file__).parent

    def run(*arguments):
        """Exit status, stdout, stderr of a program that starts there."""
        monkeypatch.setattr(sys, "argv", [alone, *map(str, arguments)])
        out, status = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), 0
        monkeypatch.setattr(sys, "stdout", out)
        try:
            runpy.run_path(alone, run_name="__main__")
        except SystemExit as left:
            status = left.code
        out.flush()
        return status, out.buffer.getvalue().decode(), capsys.readouterr().err

    with monkeypatch.context() as patch:  # without its neighbours
        patch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if Path(path).resolve() != home)])
        patch.delitem(sys.modules, "gpt")
        status, _, error = run()
        assert status == 2 and error.startswith("decode.py: No module named 'gpt'") and error.count("\n") == 1
    status, shown, error = run("--checkpoint", run_directory, "--prompt", "é")
    assert status == 0 and shown.startswith("?") and error == ""


def test_program_asks_for_large_pages_before_the_first_tensor(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")  # and put back as it was, after the test
    monkeypatch.setattr(sys, "argv", ["decode.py", "--checkpoint", "nowhere"])
    with pytest.raises(SystemExit):
        runpy.run_path(decode.__file__, run_name="__main__")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
