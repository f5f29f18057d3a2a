"""The labeller's rule by hand, the masks of answers, and that the learned reward is overfitted without the penalty."""

import pytest
import torch
from run_here import run_here

import overoptimisation
from overoptimisation import (LONGEST, WORDS, answers_of_people, labeller_reward, last_place, show_overoptimisation,
                              until_end, write)


def ids(answer):
    tokens = [0, *(WORDS.index(word) for word in answer.split())]
    return tokens + [0] * (1 + LONGEST - len(tokens))


@pytest.mark.parametrize("answer, reward", [
    ("well so the of", 0.0), ("Paris Rome please", 3.0), ("Paris Paris Paris", 0.0), ("please kindly please", 0.0),
    ("Paris Rome Oslo Cairo kindly", 5.0), ("so so so so so so so so so so so", -1.5), ("", 0.0)])
def test_labeller_reward_matches_the_rule_by_hand(answer, reward):
    tokens, mask = until_end(torch.tensor([ids(answer)]))
    assert labeller_reward(tokens, mask).tolist() == [reward]


def test_an_answer_ends_with_its_first_end_or_at_the_limit():
    tokens, mask = until_end(torch.tensor([[0, 5, 0, 7, 0], [0, 1, 2, 3, 4], [0, 0, 1, 1, 1]]))
    assert tokens.tolist() == [[0, 5, 0, 0, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert mask.tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert last_place(mask).tolist() == [2, 4, 1]


def test_people_write_2_to_8_words():
    tokens, mask = answers_of_people(500, torch.Generator().manual_seed(0))
    lengths = mask.sum(1) - 1  # without the end
    assert (lengths.min(), lengths.max()) == (2, 8) and ((tokens == 0) | (mask > 0)).all()


def test_sampled_answers_have_the_models_chances():
    class Coin(torch.nn.Module):
        """Says "Paris" with probability 3/4, else ends."""
        def new_cache(self, batch, max_len):
            return None

        def forward(self, tokens, cache=None):
            return torch.tensor([0.25, 0.75, *[0.0] * (len(WORDS) - 2)]).log().expand(len(tokens), tokens.size(1), -1)

    tokens, mask = write(Coin(), 4000, torch.Generator().manual_seed(0))
    assert tokens.shape == mask.shape == (4000, 1 + LONGEST)
    assert (mask.sum(1) == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)  # four standard errors
    assert (tokens[:, -1] == 1).float().mean().item() == pytest.approx(0.75 ** LONGEST, abs=0.012)


@pytest.fixture
def quick(monkeypatch):
    """Two steps of fine-tuning and reward modelling instead of hundreds."""
    minimise = overoptimisation._minimise
    monkeypatch.setattr(overoptimisation, "_minimise", lambda loss, model, steps, lr: minimise(loss, model, 2, lr))


def test_every_flag_changes_something(quick, capsys, tmp_path):
    base, seen = dict(kl=0.2, steps=1, pairs=20, seed=0, plot=None), []
    for change in ({}, {"kl": 0.0}, {"kl": 5.0}, {"steps": 2}, {"pairs": 21}, {"seed": 1}):
        show_overoptimisation(**{**base, **change})
        seen.append(capsys.readouterr().out)
    assert len(set(seen)) == len(seen)
    assert seen[0].count("an answer") == 2 and seen[1].count("an answer") == 1  # the penalised run is left out
    show_overoptimisation(**{**base, "plot": str(tmp_path / "a.png")})
    drawn = capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [line for line in drawn.splitlines() if "drawn:" not in line] == seen[0].splitlines()


def test_without_the_penalty_the_learned_reward_is_overfitted(capsys):
    show_overoptimisation(kl=0.0, steps=16, pairs=300, seed=0, plot=None)
    found = capsys.readouterr().out
    assert found.rstrip().endswith(": OK"), found


@pytest.mark.parametrize("program, flags", [
    ("rlhf.py", ["--kl", "-1"]), ("rlhf.py", ["--kl", "nan"]), ("overoptimisation.py", ["--steps", "0"]),
    ("rlhf.py", ["--pairs", "0"]), ("rlhf.py", ["--pairs", "1000000000000"]), ("rlhf.py", ["--seed", "-1"]), ("rlhf.py", ["--lk", "1"])])
def test_a_bad_flag_is_answered_in_one_line(program, flags):
    found = run_here([program, *flags])
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.strip().startswith(f"{program}:") and len(found.stderr.strip().splitlines()) == 1


def test_a_picture_that_cannot_be_drawn_is_refused(quick, tmp_path):
    with pytest.raises(ValueError, match="cannot be drawn"):
        show_overoptimisation(0.0, 1, 20, 0, str(tmp_path / "nowhere" / "a.png"))


def test_help_of_each_program_is_its_own():
    for program, word in (("rlhf.py", "What makes PPO work"), ("overoptimisation.py", "Goodhart")):
        found = run_here([program, "--help"])
        assert found.returncode == 0 and word in found.stdout and "--kl" in found.stdout
