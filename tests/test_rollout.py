"""Batched rollouts against one prompt at a time, against transformers, and against the distribution they draw from."""

import copy

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

import decode
from run_here import run_here
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from moe import MoE
from rollout import PADDED, _ends_of_alike, draw_tokens, generate_rollout, naive_generate_rollout

V, CONTEXT = 23, 32


def sharpened(model, scale=6.0):
    """Weights scaled so that distributions are far from uniform: a token off would show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= scale
    return model.eval()


def gpt(**sizes):
    return sharpened(GPT(GPTConfig(V, CONTEXT, 2, 2, 16, **sizes), generator=torch.Generator().manual_seed(0)))


def llama(**options):
    return sharpened(Llama(LlamaConfig(V, CONTEXT, 2, 2, 1, 16, 32), generator=torch.Generator().manual_seed(0), **options))


def moe():
    draw = torch.Generator().manual_seed(1)
    return llama(mlp=lambda c: MoE(c.d_model, c.d_ff, 4, 2, generator=draw))


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2], [3, 8, 4, 6], [2] * 29]


@pytest.mark.parametrize("make", [gpt, llama, moe])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0])
def test_batched_rollouts_match_one_prompt_at_a_time(make, temperature):
    model, uniforms = make(), torch.rand(len(PROMPTS), 12, generator=torch.Generator().manual_seed(3))
    one, many = (f(model, PROMPTS, 12, temperature=temperature, stop_tokens=[4, 7], uniforms=uniforms)
                 for f in (naive_generate_rollout, generate_rollout))
    for name in ("tokens", "mask", "terminated", "lengths"):
        assert torch.equal(getattr(one, name), getattr(many, name)), name
    torch.testing.assert_close(one.log_probs, many.log_probs, rtol=0, atol=1e-4)  # fp32, logits of about 10
    assert 0 < many.terminated.sum() < len(PROMPTS) or temperature == 0


def test_log_probs_and_masks_match_the_whole_text_scored_token_by_token():
    model = gpt()
    found = generate_rollout(model, PROMPTS, 10, stop_tokens=[4], generator=torch.Generator().manual_seed(0))
    for row, prompt in enumerate(PROMPTS):
        n = int(found.lengths[row])
        text = found.tokens[row, :n].tolist()
        assert text[:len(prompt)] == prompt and found.responses()[row] == text[len(prompt):]
        assert found.mask[row].tolist() == [0.0] * len(prompt) + [1.0] * (n - len(prompt)) + [0.0] * (found.mask.size(1) - n)
        for t in range(found.tokens.size(1)):
            expected = 0.0
            if len(prompt) <= t < n:
                expected = model(torch.tensor([text[:t]]))[0, -1].log_softmax(-1)[text[t]].item()
            assert found.log_probs[row, t].item() == pytest.approx(expected, abs=1e-4)
        assert bool(found.terminated[row]) == (text[-1] == 4)
        assert 4 not in text[len(prompt):-1] and n - len(prompt) <= min(10, CONTEXT - len(prompt))


def test_greedy_rollouts_match_transformers_generate_and_decode():
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(TheirConfig(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                          num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
                                          rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False)).eval()
    ours = llama()
    ours.save_pretrained(folder := __import__("tempfile").mkdtemp())
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    found = generate_rollout(ours, PROMPTS[:5], 8, temperature=0, stop_tokens=[4]).responses()
    longest = max(map(len, PROMPTS[:5]))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS[:5]])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS[:5]])
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=4, pad_token_id=0)
    for new, row in zip(found, expected[:, longest:].tolist()):
        assert new == row[:len(new)] and set(row[len(new):]) <= {0}
    assert found == decode.generate(ours, PROMPTS[:5], 8, temperature=0, stop_tokens=[4])


@pytest.mark.parametrize("batch", [1, 2, 4, 128])
def test_a_row_depends_on_its_own_numbers_alone(batch):
    model, uniforms = gpt(), torch.rand(6, 9, generator=torch.Generator().manual_seed(5))
    whole = generate_rollout(model, PROMPTS, 9, stop_tokens=[4], uniforms=uniforms).responses()
    assert generate_rollout(model, PROMPTS, 9, stop_tokens=[4], uniforms=uniforms, batch=batch).responses() == whole
    half = generate_rollout(model, PROMPTS[3:], 9, stop_tokens=[4], uniforms=uniforms[3:])
    assert half.responses() == whole[3:]
    seeded = [generate_rollout(model, PROMPTS, 9, generator=torch.Generator().manual_seed(s)).responses() for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_the_model_sees_little_padding_and_no_answer_after_its_end(monkeypatch):
    model, seen = gpt(), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda tokens, start=0: (seen.append(tokens.shape), embed(tokens, start))[1])
    found = generate_rollout(model, PROMPTS, 12, stop_tokens=[4, 7], generator=torch.Generator().manual_seed(0))
    answers = found.mask.sum(1)  # their lengths
    steps = seen[len(_ends_of_alike(sorted(map(len, PROMPTS)))):]  # behind those that read prompts
    assert steps == [(int((answers > n).sum()), 1) for n in range(1, int(answers.max()))]
    assert _ends_of_alike([7] * 9) == [9] and _ends_of_alike([3]) == [1]
    lengths = sorted(torch.randint(4, 65, (32,), generator=torch.Generator().manual_seed(0)).tolist())
    begin = 0
    for end in (ends := _ends_of_alike(lengths)):
        part = lengths[begin:end]
        assert 1 - sum(part) / (len(part) * part[-1]) <= PADDED
        begin = end
    assert begin == 32 and len(ends) < 10


def test_a_model_that_has_diverged_is_refused():
    model = gpt()
    model.position_embedding.weight.data[3] = float("nan")  # of two prompts, one reaches it
    with pytest.raises(ValueError, match=r"logits are not finite for prompts \[1\]"):
        generate_rollout(model, [[1], [1, 2, 3, 4]], 2)


def test_drawn_tokens_are_distributed_as_softmax():
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)) * 2
    uniforms = torch.rand(40000, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 0.5):
        drawn = draw_tokens(logits.expand(40000, 7), uniforms, temperature)
        share = torch.bincount(drawn, minlength=7) / 40000
        # five standard deviations of a share
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=5 * 0.5 / 200)
    edges = draw_tokens(torch.tensor([[-1e9, 0.0, 0.0]] * 2), torch.tensor([0.0, 0.99999994]), 1.0)
    assert edges.tolist() == [1, 2]  # what is impossible is not drawn, at either end


def test_rollouts_have_no_dropout_and_leave_the_mode_and_weights():
    model = gpt(dropout=0.5).train()
    before = copy.deepcopy(model.state_dict())
    first, second = (generate_rollout(model, PROMPTS[:2], 6, temperature=0).responses() for _ in range(2))
    assert first == second and model.training and all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    loss = model(torch.tensor([[1, 2]])).sum()
    loss.backward()  # what a rollout made can be used in training


@pytest.mark.parametrize("make", [gpt, llama])
def test_rollouts_in_bf16_are_scored_by_the_model_in_bf16(make):
    model = make().bfloat16()
    found = generate_rollout(model, PROMPTS[:4], 8, generator=torch.Generator().manual_seed(0))
    for row, prompt in enumerate(PROMPTS[:4]):
        n = int(found.lengths[row])
        logits = model(found.tokens[row:row + 1, :n]).float().log_softmax(-1)
        whole = logits[0, :-1].gather(1, found.tokens[row, 1:n, None])[:, 0][len(prompt) - 1:]
        # bf16 has 8 bits: logits of about 10 differ by a few hundredths, cached or not
        assert (found.log_probs[row, len(prompt):n] - whole).abs().mean() < 0.1


@pytest.mark.parametrize("prompts, options, message", [
    ([], {}, "needs a prompt"), ([[1]], {"max_new_tokens": 0}, "got 1 prompts, 0"), ([[1]], {"temperature": -1}, "and -1"),
    ([[1], []], {}, "prompt 1 has 0 tokens"), ([[1] * CONTEXT], {}, "prompt 0 has 32 tokens"), ([[1, V]], {}, "ids 1 .. 23"),
    ([[1]], {"uniforms": torch.rand(2, 4)}, r"uniforms must be \(1, 4\)"), ([[1]], {"batch": 0}, "batch must be at least 1, got 0")])
def test_bad_input_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_rollout(gpt(), prompts, **{"max_new_tokens": 4} | options)


def test_program_ends_on_its_verdict_and_refuses_in_one_line():
    found = run_here(["rollout.py", "--prompts", "3", "--max_new_tokens", "24"])
    assert found.returncode == 0 and "batched = alone: True (expected True; 3 answers)" in found.stdout.splitlines()[-1]
    other = run_here(["rollout.py", "--prompts", "3", "--max_new_tokens", "24", "--seed", "1"])
    assert other.returncode == 0 and other.stdout.splitlines()[2] != found.stdout.splitlines()[2]  # another mean length
    bad = run_here(["rollout.py", "--prompts", "0"])
    assert bad.returncode == 2 and bad.stderr.startswith("rollout.py: --prompts") and bad.stderr.count("\n") == 1
