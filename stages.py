"""Stages of alignment: each is one loop over batches, with its own loss.   Ouyang et al. 2022 (2203.02155), section 3

Idea      Fine-tuning on answers, a reward model, PPO, GRPO and DPO differ in what a step learns from; all else is
          shared: each process's part of a batch, the sum of gradients, checkpoints, metrics. What a step draws depends
          on the seed and the step's number alone, so a run that was interrupted ends where an unbroken one does.
Formula   loss of a step = sum over processes of (their rows' part of the mean over ALL rows or tokens): rlhf.py,
          preference.py
Shapes    a batch of B conversations: B / processes rows on each: tokens, mask, log-probs (B, T), scores (B,)
          checkpoints: parts "model" and, of reward, "head", of ppo, "critic"; as train.py's otherwise
Omits     bf16, policies cut over processes: each holds its models whole. Which stage follows which: alignment.py.
Run       python stages.py    a tiny model is fine-tuned, interrupted, and goes on: 10 s
          Ends with "interrupted = unbroken: True ..."
Test      pytest tests/test_stages.py
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor


# --- 1. what all stages share ---------------------------------------------------------------

def load_policy(directory: str | Path, device: torch.device | str = "cpu"):
    """(model, encoding) of a run's directory, a checkpoint or a Hugging Face directory, ready to chat: the special
    tokens of chat.py are in its vocabulary. ValueError as decode.load_model."""
    import chat
    import decode
    model, encoding = decode.load_model(directory, str(device))
    for p in model.parameters():
        p.data = p.data.contiguous()  # decoding one row likes another layout than training and sending
    encoding = chat.extend(encoding)
    chat.resize_vocabulary(model, encoding.max_token_value + 1, torch.Generator().manual_seed(0))
    return model, encoding


def load_reward_model(directory: str | Path, device: torch.device | str = "cpu"):
    """The reward model that the stage "reward" saved. CheckpointError, a ValueError, if there is none."""
    import checkpoint
    import preference
    model, _ = load_policy(directory, device)
    reward = preference.RewardModel(model)
    head = checkpoint.load(checkpoint.latest(directory), ("head",))["head"]
    reward.score.load_state_dict(head)
    return reward.to(device).eval()


class Stage:
    """One stage's loop: what is trained, its optimizer, checkpoints, metrics.

    Args:
        parts: name -> module; each is a part of the checkpoint. "model" is a language model of the contract.
        total: steps.
    """

    def __init__(self, name: str, config, world, encoding, parts: dict[str, nn.Module], total: int, lr: float):
        import parallel
        self.name, self.config, self.world, self.encoding, self.parts = name, config, world, encoding, parts
        self.total, self.lr, self.module = total, lr, nn.ModuleDict(parts)
        self.dp = parallel.DataParallel(self.module, reduction="sum")
        trained = [p for p in self.module.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1 if name == "sft" else 0.0},
                  {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8 if name == "sft" else 1e-5,
                                           fused=world.device.type in ("cpu", "cuda"))
        self.state: dict = {}  # numbers of the stage's own that a resumed run needs

    def step(self, loss: Tensor | None) -> dict[str, float]:
        """Backward through this process's part of the loss (None: it has none), sum over processes, one step."""
        if loss is not None:
            loss.backward()
        self.dp.finish()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_gradient or math.inf).item()
        total = self.world.sum([0.0 if loss is None else loss.item()])[0]
        if not (math.isfinite(norm) and math.isfinite(total)):
            raise ValueError(f"{self.name}: loss {total} and gradient norm {norm} are not finite; a lower "
                             f"--{self.name}_lr, or look at the data")
        self.optimizer.step()
        self.module.zero_grad()
        return {"loss": total, "gradient": norm}

    def run(self, learn: Callable[[int], dict[str, float]]) -> None:
        """``learn(step)`` for every step that is not done yet, with its learning rate set; saves and reports."""
        c, world, folder = self.config, self.world, self.config.folder(self.name)
        first, lines = self._resume(), []
        every, began = c.save_every or max(1, self.total // 5), time.perf_counter()
        self.module.train()
        for step in range(first, self.total):
            warm_up = max(1, self.total // 20)
            lr = self.lr * min((step + 1) / warm_up, 1 - (step - warm_up) / (self.total - warm_up + 1) * 0.9)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(hash((c.seed, step, world.rank)) % 2**63)  # dropout: a resumed run draws the same
            line = {"step": step + 1, "lr": lr} | learn(step)
            lines.append(line)
            done, last = step + 1, step + 1 == self.total
            if done == first + 1 or last or done % max(1, self.total // 8) == 0:
                spent = time.perf_counter() - began
                left = timedelta(seconds=round(spent / (done - first) * (self.total - done)))
                shown = "  ".join(f"{key} {value:.3g}" for key, value in line.items() if key not in ("step", "lr"))
                world.say(f"{self.name} {done:>5}/{self.total}  {shown}  ETA {left}")
            if last or done % every == 0:
                self._save(done, lines)
                lines = []
        if first < self.total:
            world.say(f"{self.name}: {self.total - first} steps in {time.perf_counter() - began:.0f} s, saved in "
                      f"{folder}")

    def _resume(self) -> int:
        import checkpoint
        folder = self.config.folder(self.name)
        if self.world.first(lambda: not any(folder.glob("step-*"))):
            return 0
        saved = self.world.agree(lambda: checkpoint.load(checkpoint.latest(folder), (*self.parts, "optimizer")))
        names = {f"{part}.{name}": tensor for part in self.parts for name, tensor in saved[part].items()}
        state = {"model": names, "optimizer": saved["optimizer"]}
        self.world.agree(lambda: checkpoint.load_states(self.module, self.optimizer, state))
        self.state = saved["meta"]["state"]
        step = saved["meta"]["step"]
        self.world.say(f"{self.name}: " + (f"going on from step {step}" if step < self.total else "done already")
                       + f", in {folder}")
        return step

    def _save(self, step: int, lines: list[dict]) -> None:
        import checkpoint
        import models
        import tokenizer
        folder, model = self.config.folder(self.name), self.parts["model"]

        def write() -> None:
            sizes = models.sizes_of(model)
            kind = "moe" if "experts" in sizes else "gpt" if type(model).__name__ == "GPT" else "llama"
            meta = {"model_type": kind, "model_config": sizes, "stage": self.name, "state": self.state,
                    "align_config": {key: str(value) for key, value in vars(self.config).items()},
                    "torch": torch.__version__}
            tensors = {part: {name: p.detach() for name, p in module.named_parameters()}
                       for part, module in self.parts.items()}
            tensors["optimizer"] = checkpoint.optimizer_state(self.module, self.optimizer)
            checkpoint.save(folder, step, tensors, meta, keep=1, write_files=lambda place: tokenizer.save(
                self.encoding, place / "tokenizer.tiktoken"))
            with open(folder / "metrics.jsonl", "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

        self.world.agree(write, here=self.world.rank == 0)


def part_of(world, count: int) -> slice:
    """This process's share of so many rows: as equal as can be, earlier rows on earlier processes."""
    return slice(count * world.rank // world.size, count * (world.rank + 1) // world.size)


def sample_answers(model: nn.Module, encoding, conversations: Sequence[list], config, world, draw: Sequence[int]):
    """This process's share of sampled answers to conversations, as rollout.Rollout, and their texts. The numbers in
    ``draw`` seed the random numbers: row b draws the same on any number of processes."""
    import chat
    import rollout
    if len(conversations) < world.size:
        raise ValueError(f"{len(conversations)} answers are too few for {world.size} processes: a larger batch")
    generator = torch.Generator().manual_seed(hash((config.seed, *draw)) % 2**63)
    uniforms = torch.rand(len(conversations), config.new_tokens, generator=generator)
    mine = part_of(world, len(conversations))
    prompts = [chat.render_prompt(encoding, messages) for messages in conversations[mine]]
    found = rollout.generate_rollout(model, prompts, config.new_tokens, uniforms=uniforms[mine],
                                     stop_tokens=[encoding.encode_single_token(chat.END)])
    return found, [chat.answer_text(encoding, response) for response in found.responses()]


# --- 2. the stages --------------------------------------------------------------------------
#
# Arguments of all: config, an alignment.AlignConfig; world, a processes.World; questions, an alignment.Questions;
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


def run_sft(config, world, questions, init: str) -> None:
    """Supervised fine-tuning: -log P(answer | question), a mean over the answers' tokens of a step."""
    import chat
    import models
    import rlhf
    model, encoding = world.agree(lambda: load_policy(init, world.device))
    context = model.config.context
    examples = world.agree(lambda: [chat.fit_example(encoding, c.messages, context, c.where) for c in questions.train])
    at = _epochs([len(tokens) for tokens, _ in examples], config.sft_batch, config.seed)
    total = config.sft_epochs * max(1, len(examples) // config.sft_batch)
    stage = Stage("sft", config, world, encoding, {"model": model}, total, config.sft_lr)

    def learn(step: int) -> dict[str, float]:
        batch = [examples[i] for i in at(step)]
        count = sum(sum(mask) for _, mask in batch)
        mine = batch[world.rank::world.size]
        if not mine:
            return stage.step(None)
        tokens, mask, _ = chat.pad(mine, world.device)
        loss = rlhf.response_loss(rlhf.aligned_log_probs(model, tokens), mask, count)
        return stage.step(loss + models.balancing_loss(model) * (len(mine) / len(batch)))

    stage.run(learn)


def _fit_pairs(encoding, pairs: list, context: int) -> list:
    import chat
    return [chat.fit_pair(encoding, pair, context) for pair in pairs]


def _both(pairs: Sequence, device) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs as one batch: first the chosen, then the rejected."""
    import chat
    return chat.pad([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], device)


def run_reward(config, world, pairs: tuple[list, list], init: str) -> dict[str, float]:
    """A reward model from pairs; centred so that the preferred and the rejected answers together score 0 on average.
    Returns its accuracy and calibration on the pairs held out."""
    import preference
    import rlhf
    model, encoding = world.agree(lambda: load_policy(init, world.device))
    generator = torch.Generator().manual_seed(config.seed)
    net = preference.RewardModel(model, generator).to(world.device)
    train, held_out = world.agree(lambda: [_fit_pairs(encoding, side, model.config.context) for side in pairs])
    at = _epochs([len(a[0]) + len(b[0]) for a, b in train], config.reward_batch, config.seed)
    total = config.reward_epochs * max(1, len(train) // config.reward_batch)
    stage = Stage("reward", config, world, encoding, {"model": model, "head": net.score}, total, config.reward_lr)

    def score(some: Sequence) -> tuple[Tensor, Tensor]:
        tokens, _, last = _both(some, world.device)
        return net.scores(tokens, last).chunk(2)

    def learn(step: int) -> dict[str, float]:
        batch = [train[i] for i in at(step)]
        mine, loss, right = batch[world.rank::world.size], None, 0
        if mine:
            chosen, rejected = score(mine)
            loss, right = preference.reward_loss(chosen, rejected, len(batch)), (chosen > rejected).sum().item()
        stats = stage.step(loss)
        if step + 1 == stage.total:
            with torch.no_grad(), rlhf.evaluating(net):
                some = [x for i in range(0, min(256, len(train)), 32) for x in score(train[i:min(i + 32, 256)])]
                net.centre(torch.cat(some).mean())
        return stats | {"accuracy": world.sum([float(right)])[0] / len(batch)}

    stage.run(learn)
    with torch.no_grad(), rlhf.evaluating(net):
        scores = [score(held_out[i:i + 64]) for i in range(0, len(held_out), 64)]
    seen = preference.calibration(torch.cat([a for a, _ in scores]), torch.cat([b for _, b in scores]))
    world.say(f"reward: {seen.accuracy:.1%} of {len(held_out)} held-out pairs in the right order, calibration error "
              f"{seen.error:.3f}")
    return {"accuracy": seen.accuracy, "pairs": len(held_out), "calibration_error": seen.error}


def scores_of(net, found) -> Tensor:
    """The reward model's scores of answers, read at their last tokens: (B,)."""
    with torch.no_grad():
        return net.scores(found.tokens, found.lengths - 1)


def answer_log_probs(model: nn.Module, found) -> Tensor:
    """Log-probs of answers under a model, 0 outside them: (B, T)."""
    import rlhf
    with torch.no_grad(), rlhf.evaluating(model):
        return rlhf.aligned_log_probs(model, found.tokens) * found.mask


def _sum_over_ranks(world) -> Callable[[Tensor], Tensor]:
    import torch.distributed as dist

    def total(x: Tensor) -> Tensor:
        x = x.clone()
        if world.size > 1:
            dist.all_reduce(x)
        return x

    return total


def prompts_of(questions, pairs: tuple[list, list], encoding, context: int) -> tuple[list, list]:
    """Conversations that wait for an answer, to learn on and held out, without those that leave no room for one."""
    import chat
    if questions.labeller is None and pairs[0]:
        sides = [[pair.messages for pair in side] for side in pairs]
    else:
        sides = [[c.messages[:-1] for c in side] for side in (questions.train, questions.held_out)]
    return tuple([m for m in side if len(chat.render_prompt(encoding, m)) < context] for side in sides)


def run_ppo(config, world, questions, pairs: tuple[list, list], init: str, reward_model: str) -> None:
    """PPO against the reward model, whose copy is the critic's start; the fine-tuned model is the reference."""
    import rlhf
    (model, encoding), (reference, _) = (world.agree(lambda: load_policy(init, world.device)) for _ in range(2))
    judge, critic = (world.agree(lambda: load_reward_model(reward_model, world.device)) for _ in range(2))
    prompts, _ = prompts_of(questions, pairs, encoding, model.config.context)
    at = _epochs([1] * len(prompts), config.ppo_batch, config.seed)
    stage = Stage("ppo", config, world, encoding, {"model": model, "critic": critic}, config.ppo_steps, config.ppo_lr)
    total = _sum_over_ranks(world)

    def learn(step: int) -> dict[str, float]:
        asked = [prompts[i] for i in at(step)]
        found, _ = sample_answers(model, encoding, asked, config, world, (2, step))
        experience = rlhf.Experience(found.tokens, found.mask, found.log_probs, answer_log_probs(reference, found),
                                     scores_of(judge, found), found.terminated)
        coefficient = stage.state.get("kl_coefficient", config.ppo_kl)
        settings = rlhf.PPOConfig(kl_coefficient=coefficient, epochs=config.ppo_epochs,
                                  minibatches=min(config.ppo_minibatches, len(asked)),
                                  max_gradient=config.max_gradient or math.inf)
        generator = torch.Generator().manual_seed(hash((config.seed, 3, step)) % 2**63)
        stats = rlhf.ppo_update(model, critic, stage.optimizer, experience, settings, generator, stage.dp.finish, total,
                                (part_of(world, len(asked)).start, len(asked)))
        if config.ppo_kl_target and coefficient:
            adaptive = rlhf.AdaptiveKL(coefficient, config.ppo_kl_target, 10 * config.ppo_batch)
            stage.state = {"kl_coefficient": adaptive.update(stats["kl"], len(asked))}
        keys = ("score", "kl", "length", "entropy", "explained_variance", "step_kl", "clipped")
        return {key: stats[key] for key in keys} | {"beta": coefficient}

    stage.run(learn)


def run_grpo(config, world, questions, pairs: tuple[list, list], init: str, reward_model: str) -> None:
    """GRPO against the reward model: several answers to each question, each against the others' mean; no critic."""
    import rlhf
    (model, encoding), (reference, _) = (world.agree(lambda: load_policy(init, world.device)) for _ in range(2))
    judge = world.agree(lambda: load_reward_model(reward_model, world.device))
    prompts, _ = prompts_of(questions, pairs, encoding, model.config.context)
    G, B = config.grpo_group, config.grpo_batch
    at = _epochs([1] * len(prompts), B // G, config.seed)
    stage = Stage("grpo", config, world, encoding, {"model": model}, config.grpo_steps, config.grpo_lr)

    def learn(step: int) -> dict[str, float]:
        asked = [prompts[i] for i in at(step) for _ in range(G)]
        found, _ = sample_answers(model, encoding, asked, config, world, (4, step))
        scores = scores_of(judge, found)
        everywhere = torch.cat([x.to(world.device) for x in world.gather(scores.cpu())])  # groups may lie across ranks
        advantages = rlhf.group_advantages(everywhere.view(-1, G)).flatten()[part_of(world, len(asked))]
        under_reference, mask = answer_log_probs(reference, found), found.mask
        with rlhf.evaluating(model):
            new = rlhf.aligned_log_probs(model, found.tokens) * mask
        # One step per batch: the policy that answered is the policy that learns, so every ratio is 1.
        loss = rlhf.grpo_loss(new, new.detach(), under_reference, advantages, mask, kl=config.grpo_kl, count=len(asked))
        kl, length = world.sum([((new - under_reference) * mask).sum().item(), mask.sum().item()])
        means = {"score": everywhere.mean().item(), "kl": kl / len(asked), "length": length / len(asked)}
        return stage.step(loss) | means

    stage.run(learn)


def run_dpo(config, world, pairs: tuple[list, list], init: str) -> None:
    """DPO from the pairs alone; the reference's log-probs are computed once, before the first step."""
    import preference
    import rlhf
    model, encoding = world.agree(lambda: load_policy(init, world.device))
    train = world.agree(lambda: _fit_pairs(encoding, pairs[0], model.config.context))
    at = _epochs([len(a[0]) + len(b[0]) for a, b in train], config.dpo_batch, config.seed)
    total = config.dpo_epochs * max(1, len(train) // config.dpo_batch)
    stage = Stage("dpo", config, world, encoding, {"model": model}, total, config.dpo_lr)

    def of_answers(some: Sequence) -> Tensor:
        tokens, mask, _ = _both(some, world.device)
        return (rlhf.aligned_log_probs(model, tokens) * mask).sum(1)  # (2 N,)

    def by_reference() -> Tensor:
        mine = range(len(train))[part_of(world, len(train))]
        with torch.no_grad(), rlhf.evaluating(model):
            parts = [of_answers([train[i] for i in mine[k:k + 32]]).view(2, -1).cpu() for k in range(0, len(mine), 32)]
        everywhere = world.gather(torch.cat([torch.zeros(2, 0), *parts], 1))
        return torch.cat(everywhere, 1).to(world.device)  # (2, N)

    reference = by_reference()

    def learn(step: int) -> dict[str, float]:
        batch = at(step)
        mine, loss, right = batch[world.rank::world.size], None, 0
        if mine:
            chosen, rejected = of_answers([train[i] for i in mine]).chunk(2)
            loss = preference.dpo_loss(chosen, rejected, *reference[:, mine], config.dpo_beta, count=len(batch))
            right = (chosen - rejected > reference[0, mine] - reference[1, mine]).sum().item()
        return stage.step(loss) | {"accuracy": world.sum([float(right)])[0] / len(batch)}

    stage.run(learn)


# --- 3. demo --------------------------------------------------------------------------------

@dataclass
class _Settings:
    out: Path
    seed: int
    save_every: int
    max_gradient: float = 1.0

    def folder(self, name: str) -> Path:
        return self.out / name


def main(steps: int, seed: int) -> None:
    if steps < 3 or not 0 <= seed < 2**31:
        raise ValueError(f"--steps must be at least 3 and --seed in 0 .. 2^31 - 1, got {steps} and {seed}")
    import gpt
    import processes
    import tokenizer
    encoding = tokenizer.train(["the quick brown fox"], 257)

    def train(folder: Path, stop: int | None) -> nn.Module:
        config = _Settings(folder, seed, max(1, steps // 3))
        sizes = gpt.GPTConfig(257, 32, 2, 2, 32, dropout=0.1)
        model = gpt.GPT(sizes, generator=torch.Generator().manual_seed(seed))
        texts = torch.randint(257, (steps, 4, 33), generator=torch.Generator().manual_seed(seed))
        stage = Stage("sft", config, processes.World(), encoding, {"model": model}, steps, 1e-3)

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
    print(f"interrupted = unbroken: {same} (every weight, bit for bit; with dropout)")


if __name__ == "__main__":
    # Without argparse's usage lines a mistake is answered in one line.
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of training (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and dropout (default 0)")
    try:
        main(**vars(parser.parse_args()))
    except ValueError as error:
        print(f"stages.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
