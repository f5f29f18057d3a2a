"""Stages of alignment: each is one loop over batches, with its own loss.   Ouyang et al. 2022 (2203.02155), section 3

Idea      Fine-tuning on answers, a reward model, PPO, GRPO and DPO differ in what a step learns from; all else is
          shared: each process's part of a batch, the sum of gradients, checkpoints, metrics. What a step draws depends
          on the seed and the step's number alone, so a run that was interrupted ends where an unbroken one does.
Formula   loss of a step = sum over parts of the batch of (their rows' part of the mean over ALL rows or tokens):
          rlhf.py, preference.py.   A ranking a > b > ... of answers to one question, Plackett-Luce:
          reward: -log P(ranking) of scores;  DPO: of beta log (p/q), Rafailov et al. 2023 (2305.18290), A.3
Shapes    a batch of B conversations, B / dp rows on each process: tokens, mask, log-probs (B, T), scores (B,);
          processes = dp * tp: tp share every matrix and work on the same rows (tensor_parallel.py); dp divide
          optimizer states, gradients, weights (zero.py). Answers are written on weights gathered once for all of them.
          checkpoints: parts "model" and, of reward, "head", of ppo, "critic", under full names whatever the layout
Omits     bf16, pipelines; ZeRO for what is not trained: reference and judge are cut by tp alone, and every model is
          read whole before it is cut. Which stage follows which: alignment.py.
Run       python stages.py    a tiny model is fine-tuned, interrupted, and goes on: 10 s
          Ends with "interrupted = unbroken: True ..."
Test      pytest tests/test_stages.py
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import SIGINT, SIGTERM

import torch
import torch.nn as nn
from torch import Tensor


# --- 1. the models --------------------------------------------------------------------------

def load_policy(directory: str | Path, device: torch.device | str = "cpu", of_reward_model: bool = False):
    """(model, encoding) of a run's directory, a checkpoint or a Hugging Face directory, ready to chat: the special
    tokens of chat.py are in its vocabulary. ``of_reward_model``, and ValueError, as models.load_model."""
    import chat
    import models
    model, encoding = models.load_model(directory, str(device), of_reward_model)
    encoding = chat.extend(encoding)
    chat.resize_vocabulary(model, encoding.max_token_value + 1, torch.Generator().manual_seed(0))
    return model, encoding


def load_reward_model(directory: str | Path, device: torch.device | str = "cpu"):
    """The reward model that the stage "reward" saved. CheckpointError, a ValueError, if there is none."""
    import checkpoint
    import preference
    model, _ = load_policy(directory, device, of_reward_model=True)
    reward = preference.RewardModel(model)
    head = checkpoint.load(checkpoint.latest(directory), ("head",))["head"]
    reward.score.load_state_dict(head)
    return reward.to(device).eval()


def read_policy(team, directory: str | Path):
    """``load_policy`` on all processes of a team.Team: each has its slice of the model."""
    model, encoding = team.world.agree(lambda: load_policy(directory, team.world.device))
    return team.cut(model), encoding


def read_reward_model(team, directory: str | Path):
    """``load_reward_model`` likewise."""
    net = team.world.agree(lambda: load_reward_model(directory, team.world.device))
    team.cut(net.model)
    return net


# --- 2. the loop ----------------------------------------------------------------------------

class Stage:
    """One stage's loop: what is trained, its optimizer, checkpoints, metrics.

    Args:
        parts: name -> module; each is a part of the checkpoint. "model" is a language model of the contract.
        total: steps.
        models: what is called and trained; None: the parts.
    """

    def __init__(self, name: str, config, team, encoding, parts: dict[str, nn.Module], total: int, lr: float,
                 models: Sequence[nn.Module] | None = None):
        from team import Trained
        self.name, self.config, self.team, self.encoding, self.parts = name, config, team, encoding, parts
        self.world, self.total, self.lr = team.world, total, lr
        decay, eps = (0.1, 1e-8) if name == "sft" else (0.0, 1e-5)
        self.trained = Trained(
            team, list(parts.values()) if models is None else models, parts,
            lambda groups: torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps,
                                             fused=self.world.device.type in ("cpu", "cuda")),
            lambda name, p: {"weight_decay": decay if p.dim() >= 2 else 0.0})
        self.state: dict = {}  # numbers of the stage's own that a resumed run needs

    def step(self, loss: Tensor) -> dict[str, float]:
        """Backward through this part's share of the loss, sum over the parts, one step."""
        loss.backward()
        self.trained.finish()
        norm = self.trained.clip(self.config.max_gradient or math.inf).item()
        total = self.team.sum([loss.item()])[0]
        self.check(total, norm)
        self.trained.step()
        self.trained.zero_grad()
        return {"loss": total, "grad_norm": norm}

    def check(self, loss: float, norm: float) -> None:
        """ValueError if the loss or the gradient's norm is not finite: nothing of this step is to be saved."""
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise ValueError(f"{self.name}: loss {loss} and gradient norm {norm} are not finite: take a lower "
                             f"--{self.name}_lr, or look at the data")

    def run(self, learn: Callable[[int], dict[str, float]]) -> None:
        """``learn(step)`` for every step that is not done yet, with its learning rate set; saves and reports.

        Raises SystemExit, 128 + n, after signal n (Ctrl-C, a polite kill) on any process: the step in work is saved.
        """
        from processes import noting_signals
        c, world, folder = self.config, self.world, self.config.folder(self.name)
        first, lines = self._resume(), []
        every, began = c.save_every or max(1, self.total // 5), time.perf_counter()
        said = began
        for module in self.parts.values():
            module.train()
        with noting_signals(world.say) as received:
            for step in range(first, self.total):
                warm_up = max(1, self.total // 20)
                lr = self.lr * min((step + 1) / warm_up, 1 - (step - warm_up) / (self.total - warm_up + 1) * 0.9)
                for group in self.trained.param_groups:
                    group["lr"] = lr
                torch.manual_seed(hash((c.seed, step, self.team.part)) % 2**63)  # dropout: a resumed run draws the same
                line = {"step": step + 1, "lr": lr} | learn(step)
                lines.append(line)
                done, last = step + 1, step + 1 == self.total
                now = time.perf_counter()
                if done == first + 1 or last or done % max(1, self.total // 8) == 0 or now - said > 10:
                    spent, said = now - began, now
                    left = timedelta(seconds=round(spent / (done - first) * (self.total - done)))
                    shown = "  ".join(f"{key} {value:.3g}" for key, value in line.items() if key not in ("step", "lr"))
                    world.say(f"{self.name} {done:>5}/{self.total}  {shown}  ETA {left}")
                stops = world.sum([float(signal in received) for signal in (SIGINT, SIGTERM)])  # on any process
                if last or any(stops) or done % every == 0:
                    self._save(done, lines)
                    lines = []
                if any(stops):
                    world.say(f"{self.name}: stopped after step {done}, saved in {folder}; --resume goes on")
                    raise SystemExit(128 + (SIGTERM if stops[1] else SIGINT))
        if first < self.total:
            world.say(f"{self.name}: {self.total - first} steps in {time.perf_counter() - began:.0f} s, saved in "
                      f"{folder}")

    def _resume(self) -> int:
        import checkpoint
        folder, world = self.config.folder(self.name), self.world
        if world.first(lambda: not any(folder.glob("step-*"))):
            return 0
        path = world.first(lambda: checkpoint.latest(folder))
        states = world.agree(lambda: checkpoint.shapes(path))
        meta = checkpoint.load_into(path, self.trained.tensors(states), world.everyone)
        self.trained.refresh()
        self.state, step = meta["state"], meta["step"]
        world.say(f"{self.name}: " + (f"resuming from {path}" if step < self.total else f"done already, in {folder}"))
        return step

    def _save(self, step: int, lines: list[dict]) -> None:
        import checkpoint
        import models
        import tokenizer
        folder, model = self.config.folder(self.name), self.parts["model"]
        sizes = models.sizes_of(model)
        kind = "moe" if "experts" in sizes else "gpt" if type(model).__name__ == "GPT" else "llama"
        meta = {"model_type": kind, "model_config": sizes, "stage": self.name, "state": self.state,
                "align_config": {key: str(value) for key, value in vars(self.config).items()},
                "torch": torch.__version__}
        checkpoint.save(folder, step, self.trained.tensors(), meta, keep=1, group=self.world.everyone,
                        write_files=lambda place: tokenizer.save(self.encoding, place / "tokenizer.tiktoken"))

        def write() -> None:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

        self.world.agree(write, here=self.world.rank == 0)


def sample_answers(model: nn.Module, encoding, conversations: Sequence[list], config, team, draw: Sequence[int]):
    """This part's share of sampled answers to conversations, as rollout.Rollout, and their texts. The numbers in
    ``draw`` seed the random numbers: row b draws the same on any number of processes."""
    import chat
    import rollout
    if len(conversations) < team.parts:
        raise ValueError(f"{len(conversations)} answers are too few for {team.parts} processes: take a larger batch")
    generator = torch.Generator().manual_seed(hash((config.seed, *draw)) % 2**63)
    uniforms = torch.rand(len(conversations), config.max_new_tokens, generator=generator)
    mine = team.share(len(conversations))
    prompts = [chat.render_prompt(encoding, messages) for messages in conversations[mine]]
    found = rollout.generate_rollout(model, prompts, config.max_new_tokens, uniforms=uniforms[mine],
                                     stop_tokens=[encoding.encode_single_token(chat.END)],
                                     whole_logits=team.whole_logits(model))
    return found, [chat.answer_text(encoding, response) for response in found.responses()]


# --- 3. the stages --------------------------------------------------------------------------
#
# Arguments of all: config, an alignment.AlignConfig; team, a team.Team; questions, an alignment.Questions;
# pairs, of chat.Preference: (to learn from, held out); init and reward_model, directories to load from.

def _epochs(lengths: Sequence[int], batch: int, seed: int) -> Callable[[int], list[int]]:
    """step -> the examples of its batch."""
    import chat
    per_epoch, cache = max(1, len(lengths) // batch), {}

    def at(step: int) -> list[int]:
        epoch, place = divmod(step, per_epoch)
        if epoch not in cache:
            cache.clear()
            cache[epoch] = chat.batches(lengths, batch, seed, epoch)
        return cache[epoch][place]

    return at


def run_sft(config, team, questions, init: str) -> None:
    """Supervised fine-tuning: -log P(answer | question), a mean over the answers' tokens of a step; conversations share
    rows, and none sees another."""
    import chat
    import models
    import packing
    import rlhf
    model, encoding = read_policy(team, init)
    context = model.config.context
    examples = team.world.agree(lambda: [chat.fit_example(encoding, c.messages, context, c.where)
                                         for c in questions.train])
    at = _epochs([1] * len(examples), config.sft_batch, config.seed)  # any lengths: packed rows have no padding to save
    total = config.sft_epochs * max(1, len(examples) // config.sft_batch)
    stage = Stage("sft", config, team, encoding, {"model": model}, total, config.sft_lr)

    def learn(step: int) -> dict[str, float]:
        batch = [examples[i] for i in at(step)]
        count = sum(sum(mask) for _, mask in batch)
        mine, counts = team.deal(batch)
        tokens, mask, ids = chat.pack_examples(mine, context, team.world.device)
        loss = rlhf.response_loss(team.log_probs(model, tokens, packing.PackedRows(ids)), mask, count)
        share = sum(len(tokens) for tokens, _ in mine) / sum(len(tokens) for tokens, _ in batch)
        return stage.step(counts * (loss + models.balancing_loss(model) * share))

    stage.run(learn)


def _fit_rankings(team, encoding, pairs: list, context: int) -> list:
    import chat
    return team.world.agree(lambda: [chat.fit_pair(encoding, pair, context) for pair in pairs])


def _answers(rankings: Sequence, device) -> tuple[Tensor, Tensor, Tensor]:
    """The answers of all rankings as one batch: chat.pad's."""
    import chat
    return chat.pad([answer for ranking in rankings for answer in ranking], device)


def _ranking_loss(scores: Tensor, rankings: Sequence, count: int) -> tuple[Tensor, float, float]:
    """Of the scores of all answers of rankings: (preference.ranking_loss, pairs in the right order, pairs)."""
    import preference
    sizes = [len(ranking) for ranking in rankings]
    better, worse = preference.pairs_of(scores.detach(), sizes)
    loss = preference.ranking_loss(preference.by_ranking(scores, sizes), count)
    return loss, (better > worse).sum().item(), len(better)


def run_reward(config, team, pairs: tuple[list, list], init: str) -> dict[str, float]:
    """A reward model from ranked answers, of which pairs are the shortest; centred so that the answers of its first
    256 rankings score 0 on average. Returns its accuracy and calibration on all pairs of the held-out rankings."""
    import preference
    import rlhf
    model, encoding = read_policy(team, init)
    net = preference.RewardModel(model, torch.Generator().manual_seed(config.seed)).to(team.world.device)
    train, held_out = (_fit_rankings(team, encoding, side, model.config.context) for side in pairs)
    at = _epochs([sum(len(tokens) for tokens, _ in ranking) for ranking in train], config.reward_batch, config.seed)
    total = config.reward_epochs * max(1, len(train) // config.reward_batch)
    stage = Stage("reward", config, team, encoding, {"model": model, "head": net.score}, total, config.reward_lr, [net])

    def score(some: Sequence) -> Tensor:
        tokens, _, last = _answers(some, team.world.device)
        return net.scores(tokens, last)  # (answers,)

    def judged(some: Sequence) -> Tensor:
        with torch.no_grad(), rlhf.evaluating(net), stage.trained.gathered():
            return torch.cat([score(some[i:i + 32]) for i in range(0, len(some), 32)])

    def learn(step: int) -> dict[str, float]:
        batch = [train[i] for i in at(step)]
        mine, counts = team.deal(batch)
        loss, *right = _ranking_loss(score(mine), mine, len(batch))
        stats = stage.step(counts * loss)
        if step + 1 == stage.total:
            stage.trained.add(net.score.bias, -judged(train[:256]).mean())
        right, seen = team.sum([counts * x for x in right])
        return stats | {"accuracy": right / seen}

    stage.run(learn)
    seen = preference.calibration(*preference.pairs_of(judged(held_out), [len(ranking) for ranking in held_out]))
    count = int(seen.pairs.sum())
    team.world.say(f"reward: {seen.accuracy:.1%} of {count} held-out pairs in the right order, calibration error "
                   f"{seen.error:.3f}")
    return {"accuracy": seen.accuracy, "pairs": count, "calibration_error": seen.error}


def scores_of(net, found) -> Tensor:
    """The reward model's scores of answers, read at their last tokens: (B,)."""
    with torch.no_grad():
        return net.scores(found.tokens, found.lengths - 1)


def answer_log_probs(model: nn.Module, found, team) -> Tensor:
    """Log-probs of answers under a model, 0 outside them: (B, T)."""
    import rlhf
    with torch.no_grad(), rlhf.evaluating(model):
        return team.log_probs(model, found.tokens) * found.mask


def prompts_of(questions, pairs: tuple[list, list], encoding, context: int) -> tuple[list, list]:
    """Conversations that wait for an answer, to learn on and held out, without those that leave no room for one."""
    import chat
    if questions.labeller is None and pairs[0]:
        sides = [[pair.messages for pair in side] for side in pairs]
    else:
        sides = [[c.messages[:-1] for c in side] for side in (questions.train, questions.held_out)]
    return tuple([m for m in side if len(chat.render_prompt(encoding, m)) < context] for side in sides)


def run_ppo(config, team, questions, pairs: tuple[list, list], init: str, reward_model: str) -> None:
    """PPO against the reward model, whose copy is the critic's start; the fine-tuned model is the reference."""
    import rlhf
    (model, encoding), (reference, _) = read_policy(team, init), read_policy(team, init)
    judge, critic = read_reward_model(team, reward_model), read_reward_model(team, reward_model)
    prompts, _ = prompts_of(questions, pairs, encoding, model.config.context)
    at = _epochs([1] * len(prompts), config.ppo_batch, config.seed)
    stage = Stage("ppo", config, team, encoding, {"model": model, "critic": critic}, config.ppo_steps, config.ppo_lr)

    def learn(step: int) -> dict[str, float]:
        asked = [prompts[i] for i in at(step)]
        with stage.trained.gathered():  # once, not for every token
            found, _ = sample_answers(model, encoding, asked, config, team, (2, step))
        experience = rlhf.Experience(found.tokens, found.mask, found.log_probs,
                                     answer_log_probs(reference, found, team), scores_of(judge, found),
                                     found.terminated)
        coefficient = stage.state.get("kl_coefficient", config.ppo_kl)
        settings = rlhf.PPOConfig(kl_coefficient=coefficient, epochs=config.ppo_epochs,
                                  minibatches=min(config.ppo_minibatches, len(asked)),
                                  max_gradient=config.max_gradient or math.inf)
        generator = torch.Generator().manual_seed(hash((config.seed, 3, step)) % 2**63)
        stats = rlhf.ppo_update(model, critic, stage.trained, experience, settings, generator, stage.trained.finish,
                                team.total, (team.share(len(asked)).start, len(asked)), team.losses(model),
                                stage.trained.clip)
        if stats["steps"]:
            stage.check(stats["policy_loss"] + stats["value_loss"], stats["grad_norm"])
        if config.ppo_kl_target and coefficient:
            adaptive = rlhf.AdaptiveKL(coefficient, config.ppo_kl_target, 10 * config.ppo_batch)
            stage.state = {"kl_coefficient": adaptive.update(stats["kl"], len(asked))}
        keys = ("score", "kl", "length", "entropy", "explained_variance", "step_kl", "clipped")
        return {key: stats[key] for key in keys} | {"beta": coefficient}

    stage.run(learn)


def run_grpo(config, team, questions, pairs: tuple[list, list], init: str, reward_model: str) -> None:
    """GRPO against the reward model: several answers to each question, each against the others' mean; no critic."""
    import rlhf
    (model, encoding), (reference, _) = read_policy(team, init), read_policy(team, init)
    judge = read_reward_model(team, reward_model)
    prompts, _ = prompts_of(questions, pairs, encoding, model.config.context)
    G, B = config.grpo_group, config.grpo_batch
    at = _epochs([1] * len(prompts), B // G, config.seed)
    stage = Stage("grpo", config, team, encoding, {"model": model}, config.grpo_steps, config.grpo_lr)

    def learn(step: int) -> dict[str, float]:
        asked = [prompts[i] for i in at(step) for _ in range(G)]
        with stage.trained.gathered():  # once, not for every token
            found, _ = sample_answers(model, encoding, asked, config, team, (4, step))
        scores = scores_of(judge, found)
        everywhere = torch.cat([x.to(scores) for x in team.gather(scores.cpu())])  # groups may lie across processes
        advantages = rlhf.rloo_advantages(everywhere.view(-1, G)) if config.grpo_advantage == "rloo" else \
            rlhf.group_advantages(everywhere.view(-1, G), scale=config.grpo_advantage == "std")  # (questions, G)
        advantages = advantages.flatten()[team.share(len(asked))]
        under_reference, mask = answer_log_probs(reference, found, team), found.mask
        with rlhf.evaluating(model):
            new = team.log_probs(model, found.tokens) * mask
        # One step per batch: the policy that answered is the policy that learns, so every ratio is 1.
        loss = rlhf.grpo_loss(new, new.detach(), under_reference, advantages, mask, kl=config.grpo_kl,
                              length=config.grpo_length, max_length=config.max_new_tokens, count=len(asked))
        kl, length = team.sum([((new - under_reference) * mask).sum().item(), mask.sum().item()])
        means = {"score": everywhere.mean().item(), "kl": kl / len(asked), "length": length / len(asked)}
        return stage.step(loss) | means

    stage.run(learn)


def run_dpo(config, team, pairs: tuple[list, list], init: str) -> None:
    """DPO from ranked answers alone (of pairs it is preference.dpo_loss); the reference's log-probs are computed once,
    before the first step. IPO and smoothed labels are losses of pairs: ValueError for a longer ranking."""
    import preference
    import rlhf
    model, encoding = read_policy(team, init)
    train = _fit_rankings(team, encoding, pairs[0], model.config.context)
    of_pairs = config.dpo_kind == "ipo" or config.dpo_label_smoothing > 0
    if of_pairs and (longest := max(map(len, train))) > 2:
        raise ValueError(f"--dpo_kind=ipo and --dpo_label_smoothing compare two answers, --preferences ranks {longest}"
                         ": leave them out, or rank two")
    at = _epochs([sum(len(tokens) for tokens, _ in ranking) for ranking in train], config.dpo_batch, config.seed)
    total = config.dpo_epochs * max(1, len(train) // config.dpo_batch)
    stage = Stage("dpo", config, team, encoding, {"model": model}, total, config.dpo_lr)

    def of_answers(some: Sequence) -> Tensor:
        tokens, mask, _ = _answers(some, team.world.device)
        return (team.log_probs(model, tokens) * mask).sum(1)  # (answers,)

    def by_reference() -> Sequence[Tensor]:
        if config.dpo_kind == "reference_free":  # to it every answer is equally likely
            return [torch.zeros(len(ranking), device=team.world.device) for ranking in train]
        mine = train[team.share(len(train))]
        with torch.no_grad(), rlhf.evaluating(model), stage.trained.gathered():
            parts = [of_answers(mine[i:i + 32]).cpu() for i in range(0, len(mine), 32)]
        everywhere = torch.cat(team.gather(torch.cat([torch.zeros(0), *parts])))  # in the order of train
        return everywhere.to(team.world.device).split([len(ranking) for ranking in train])

    reference = by_reference()

    def learn(step: int) -> dict[str, float]:
        batch = at(step)
        mine, counts = team.deal(batch)  # numbers of rankings
        rankings = [train[i] for i in mine]
        policy, kept = of_answers(rankings), torch.cat([reference[i] for i in mine])  # (answers,)
        loss, *right = _ranking_loss(preference.implicit_reward(policy, kept, config.dpo_beta), rankings, len(batch))
        if of_pairs:
            loss = preference.dpo_loss(policy[::2], policy[1::2], kept[::2], kept[1::2], config.dpo_beta,
                                       config.dpo_label_smoothing, config.dpo_kind, len(batch))
        right, seen = team.sum([counts * x for x in right])
        return stage.step(counts * loss) | {"accuracy": right / seen}

    stage.run(learn)


# --- 4. demo --------------------------------------------------------------------------------

@dataclass
class _Settings:
    out: Path
    seed: int
    save_every: int
    max_gradient: float = 1.0

    def folder(self, name: str) -> Path:
        return self.out / name


def main(steps: int, seed: int) -> None:
    if steps < 3 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 3 and --seed in 0 .. 2^32 - 1, got {steps} and {seed}")
    import gpt
    import processes
    import team
    import tokenizer
    encoding = tokenizer.train(["the quick brown fox"], 257)

    def train(folder: Path, stop: int | None) -> nn.Module:
        config = _Settings(folder, seed, max(1, steps // 3))
        sizes = gpt.GPTConfig(257, 32, 2, 2, 32, dropout=0.1)
        model = gpt.GPT(sizes, generator=torch.Generator().manual_seed(seed))
        texts = torch.randint(257, (steps, 4, 33), generator=torch.Generator().manual_seed(seed))
        stage = Stage("sft", config, team.Team(processes.World()), encoding, {"model": model}, steps, 1e-3)

        def learn(step: int) -> dict[str, float]:
            if step == stop:
                raise InterruptedError
            return stage.step(gpt.next_token_loss(model(texts[step, :, :-1]), texts[step, :, 1:]))

        stage.run(learn)
        return model

    with tempfile.TemporaryDirectory() as folder:
        unbroken = train(Path(folder) / "a", None)
        try:
            train(Path(folder) / "b", steps - 1)
        except InterruptedError:
            print(f"interrupted after step {steps - 1}")
        resumed = train(Path(folder) / "b", None)
    same = all(bool((p == q).all()) for p, q in zip(unbroken.parameters(), resumed.parameters()))
    print(f"interrupted = unbroken: {same} (expected True: every weight, bit for bit, with dropout)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=30, help="of training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and dropout (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
