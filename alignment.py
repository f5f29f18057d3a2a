"""Alignment: from a base model to a chat model, in one command.   Ouyang et al. 2022 (2203.02155)

Idea      A base model is shown answers (sft). It answers, a labeller says which of two answers is better, and a reward
          model learns that (reward). Then the policy learns: from rewards of answers that it writes itself, by PPO or
          GRPO, or from the labelled pairs alone (dpo). At the end all are judged on questions that none has seen.
Formula   of the stages: stages.py.   win rate = P(gold > SFT's) + P(equal) / 2, per question
          95% interval of a mean: +- 1.96 s / sqrt(n)
Shapes    out/sft, out/reward, out/ppo, out/dpo, out/grpo: checkpoints as train.py's, metrics.jsonl;
          out/sft/preferences.jsonl: {"prompt", "chosen", "rejected", "held_out"}; out/evaluation.json: the table
          processes: --tp of them share every matrix, --zero divides what is trained over the others (team.py)
Omits     bf16, pipelines, ZeRO for reference and judge (tp cuts them too), adapters, several rounds of labelling.
Run       python alignment.py --init out/pretrain          all stages, on what train.py wrote: 3 to 6 minutes
          torchrun --standalone --nproc_per_node=2 alignment.py --init out/pretrain   the same on two: 2 to 3 minutes
          python alignment.py --init out/sft --stages dpo    one stage from a fine-tuned model
          Ends with "aligned in ... s; ... win rate against SFT: ..."
Test      pytest tests/test_alignment.py
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

STAGES = ("sft", "reward", "ppo", "dpo", "grpo")


class AlignmentError(ValueError):
    """A setting or a file that the user has to mend; the message is one line that says which and how."""


# --- 1. the settings ------------------------------------------------------------------------

def _setting(default, help: str, least: float | None = None, most: float = math.inf, choices: tuple = ()):
    metadata = {"help": help, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class AlignConfig:
    """Every setting of the stages; each field is a flag. None means derived: the help says how."""

    stages: str = _setting("sft,reward,ppo,dpo,grpo", "which to run, in this order; ppo and grpo need the reward model")
    init: str | None = _setting(None, "model to start from; derived: OUT/pretrain for sft, else OUT/sft")
    reward_model: str | None = _setting(None, "for ppo and grpo; derived: OUT/reward")
    out: str = _setting("out", "directory in which each stage has one of its own")
    instructions: str | None = _setting(None, 'JSON lines {"prompt", "response"} or {"messages"}; derived: Python\'s '
                                              "documentation asked about")
    preferences: str | None = _setting(None, 'JSON lines {"prompt", "chosen", "rejected"} or {"prompt", "answers": '
                                             "[best, ..., worst]}; derived: the fine-tuned model's answers, as a "
                                             "labeller's rule prefers")
    held_out: float = _setting(0.15, "share of the questions kept for evaluation", 0.001)
    max_new_tokens: int = _setting(24, "longest answer", 1)
    max_gradient: float = _setting(1.0, "largest norm of a gradient; 0 turns clipping off", 0)
    sft_epochs: int = _setting(4, "passes over the instructions", 1)
    sft_batch: int = _setting(32, "conversations per step", 1)
    sft_lr: float = _setting(1e-3, "peak learning rate", 0)
    pairs: int = _setting(4000, "questions whose two answers are compared", 2)
    reward_epochs: int = _setting(2, "passes over the pairs", 1)
    reward_batch: int = _setting(32, "pairs per step", 1)
    reward_lr: float = _setting(1e-3, "peak learning rate", 0)
    ppo_steps: int = _setting(14, "batches of answers", 1)
    ppo_batch: int = _setting(128, "answers per batch", 2)
    ppo_epochs: int = _setting(2, "passes over a batch", 1)
    ppo_minibatches: int = _setting(2, "optimizer steps per pass", 1)
    ppo_lr: float = _setting(3e-4, "peak learning rate", 0)
    ppo_kl: float = _setting(0.2, "price of a nat of divergence from the fine-tuned model, at first", 0)
    ppo_kl_target: float = _setting(4.0, "nats per answer that the price is adapted to; 0: it stays", 0)
    dpo_epochs: int = _setting(1, "passes over the pairs", 1)
    dpo_batch: int = _setting(32, "pairs per step", 1)
    dpo_lr: float = _setting(2e-4, "peak learning rate", 0)
    dpo_beta: float = _setting(0.2, "price of a nat of divergence", 0)
    dpo_kind: str = _setting("sigmoid", "DPO's loss: sigmoid, ipo, or reference_free",
                             choices=("sigmoid", "ipo", "reference_free"))
    dpo_label_smoothing: float = _setting(0.0, "probability that a pair's label is wrong (conservative DPO)", 0, 0.49)
    grpo_steps: int = _setting(16, "batches of answers", 1)
    grpo_batch: int = _setting(128, "answers per batch", 2)
    grpo_group: int = _setting(8, "answers to each question", 2)
    grpo_lr: float = _setting(3e-4, "peak learning rate", 0)
    grpo_kl: float = _setting(0.1, "price of a nat of divergence per token", 0)
    grpo_advantage: str = _setting("std", "a reward less its group's mean, over the group's std (GRPO); mean: not "
                                          "divided (Dr. GRPO); rloo: less the mean of the others",
                                   choices=("std", "mean", "rloo"))
    grpo_length: str = _setting("sequence", "an answer's sum is divided by its own length (GRPO); constant: by "
                                            "--max_new_tokens (Dr. GRPO)", choices=("sequence", "constant"))
    evaluation_prompts: int = _setting(1000, "held-out questions answered at the end, at most", 1)
    seed: int = _setting(0, "of the order of examples and of answers")
    device: str | None = _setting(None, "cpu, cuda or mps; derived: the best that is here")
    tp: int = _setting(1, "tensor-parallel processes: they share every matrix of every model", 1)
    zero: int = _setting(0, "ZeRO: divide optimizer states (1), gradients (2), weights (3) of what is trained over the "
                            "other processes", 0, 3)
    timeout: int = _setting(600, "seconds after which a silent process counts as lost", 1, 10**7 - 1)
    save_every: int | None = _setting(None, "steps between checkpoints; derived: a fifth of the stage", 1)
    resume: bool = _setting(False, "go on from the newest checkpoints in --out; stages that are done stay")
    overwrite: bool = _setting(False, "start again although --out holds such stages: they are deleted")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least, most = getattr(self, field.name), field.metadata["least"], field.metadata["most"]
            if isinstance(value, float) and not math.isfinite(value):
                raise AlignmentError(f"--{field.name} must be finite, got {value}")
            if None not in (value, least) and not least <= value <= most:
                limits = f"in {least} .. {most}" if most < math.inf else f"at least {least}"
                raise AlignmentError(f"--{field.name} must be {limits}, got {value}")
            if (choices := field.metadata["choices"]) and value not in choices:
                raise AlignmentError(f"--{field.name} must be one of {', '.join(choices)}, got {value}")
        if not 0 <= self.seed < 2**32:
            raise AlignmentError(f"--seed must be in 0 .. 2^32 - 1, got {self.seed}")
        if self.dpo_label_smoothing and self.dpo_kind == "ipo":
            raise AlignmentError("--dpo_label_smoothing is not for --dpo_kind=ipo, whose loss knows no probabilities")
        unknown = set(self.chosen()) - set(STAGES)
        if unknown or not self.chosen():
            raise AlignmentError(f"--stages={self.stages}: choose from {','.join(STAGES)}")
        if self.grpo_batch % self.grpo_group:
            raise AlignmentError(f"--grpo_batch={self.grpo_batch} is no multiple of --grpo_group={self.grpo_group}")
        if self.resume and self.overwrite:
            raise AlignmentError("--resume goes on and --overwrite starts again: give one of them")
        if not self.held_out < 1:
            raise AlignmentError(f"--held_out must be below 1, got {self.held_out}")

    def chosen(self) -> list[str]:
        """The stages to run, in the order in which they build on each other."""
        names = [name.strip() for name in self.stages.split(",") if name.strip()]
        return sorted(dict.fromkeys(names), key=lambda name: STAGES.index(name) if name in STAGES else -1)

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        return Path(self.out) / stage


# --- 2. questions, and answers compared -----------------------------------------------------

@dataclass
class Questions:
    """What is learned from and judged by: conversations, prompts that need answers, and who compares these."""
    train: list  # chat.Conversation
    held_out: list
    labeller: object | None  # labeller.Labeller; None: the pairs come from a file


def read_questions(config: AlignConfig, encoding, context: int) -> Questions:
    """The instructions of a file, or those that every machine has, without the questions that would fill the context.
    ValueError with the number of a bad line."""
    import chat
    import labeller
    given = config.instructions is not None
    own = [] if given else labeller.default_questions()
    if given:
        conversations = chat.read_conversations(config.instructions)
        for c in conversations:  # also those held out: a bad line is named now, not after the training
            chat.fit_example(encoding, c.messages, context, c.where)
    else:
        conversations = [chat.Conversation([*chat.ask(question), {"role": "assistant", "content": sentence}], question)
                         for question, sentence in own]
        conversations = [c for c in conversations if len(chat.render_prompt(encoding, c.messages[:-1])) < context]
        if not conversations:
            raise AlignmentError(f"each of the {len(own):,} questions fills the model's context of {context}: train "
                                 "one with a larger --context, or give --instructions")
    train, held_out = chat.split_conversations(conversations, config.held_out)
    by_rule = not given and config.preferences is None
    return Questions(train, held_out, labeller.make_labeller(a for _, a in own) if by_rule else None)


def compare_answers(config: AlignConfig, team, questions: Questions, sft: str | Path) -> tuple[list, list]:
    """(pairs to learn from, pairs held out), of chat.Preference: a file's, or those in the fine-tuned model's folder.
    If there are none yet, the model answers each question twice and the labeller says which answer is better."""
    import chat
    import stages
    if config.preferences is not None:
        pairs = chat.read_preferences(config.preferences)
        as_conversations = [chat.Conversation(pair.messages, pair.where) for pair in pairs]
        _, aside = chat.split_conversations(as_conversations, config.held_out)
        aside = {conversation.where for conversation in aside}
        return [p for p in pairs if p.where not in aside], [p for p in pairs if p.where in aside]
    path, world = Path(sft) / "preferences.jsonl", team.world
    held_out = {c.messages[0]["content"] for c in questions.held_out}
    if world.first(lambda: not path.exists()):
        model, encoding = stages.read_policy(team, sft)
        asked, lines, began = [], [], time.perf_counter()
        for side in (questions.train[:config.pairs], questions.held_out):
            asked += [c.messages[0]["content"] for c in side]
        conversations, both = [chat.ask(question) for question in asked], []
        world.say(f"{len(asked)} questions are answered twice by {sft} ...")
        for which in (0, 1):
            _, texts = stages.sample_answers(model, encoding, conversations, config, team, (1, which))
            both.append([text for part in team.gather(texts) for text in part])
        for question, *answers in zip(asked, *both):
            which = questions.labeller.prefers(question, *answers) if all(answers) else 0
            if which:
                chosen, rejected = answers[::which]
                lines.append({"prompt": question, "chosen": chosen, "rejected": rejected,
                              "held_out": question in held_out})
        world.say(f"{len(asked)} questions answered twice by {sft} in {time.perf_counter() - began:.0f} s, "
                  f"{len(lines)} pairs in {path}")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        world.agree(lambda: _write_whole(path, text), here=world.rank == 0)
    else:
        world.say(f"answers compared before are used: {path}; delete it to have others")
    # by the split of this run, which may be another than that of the run that made the pairs
    aside = [json.loads(line)["prompt"] in held_out for line in path.read_text().splitlines()]
    if len(set(aside)) < 2:
        raise AlignmentError(f"{path}: of the {len(aside)} pairs none is left to learn from or none to judge by: "
                             "delete it and give more --pairs, or train a better model (more --sft_epochs)")
    pairs = chat.read_preferences(path)
    return [p for p, out in zip(pairs, aside) if not out], [p for p, out in zip(pairs, aside) if out]


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


# --- 3. the evaluation ----------------------------------------------------------------------

@torch.no_grad()
def evaluate_policies(config: AlignConfig, team, questions: Questions, pairs: tuple[list, list],
                      models: dict[str, str], reward_model: str | None) -> list[dict]:
    """One line per model: held-out loss, and of its sampled answers to the held-out questions the gold reward with its
    95% interval, how often it beats SFT's, the reward model's score, KL from SFT in nats per answer, length in tokens.

    ``models``: name -> directory; "sft" is one of the names.
    """
    import chat
    import stages
    judge = stages.read_reward_model(team, reward_model) if reward_model else None
    reference, encoding = stages.read_policy(team, models["sft"])
    context, labeller = reference.config.context, questions.labeller
    _, prompts = stages.prompts_of(questions, pairs, encoding, context)
    prompts = prompts[:config.evaluation_prompts]
    examples = [chat.fit_example(encoding, c.messages, context, c.where) for c in questions.held_out]
    examples = examples[team.part::team.parts]
    table, gold = [], {}
    for name in sorted(models, key=lambda name: name != "sft"):  # first what the others are compared with
        model, _ = stages.read_policy(team, models[name])
        loss = count = 0.0
        for i in range(0, len(examples), 32):
            tokens, mask, _ = chat.pad(examples[i:i + 32], team.world.device)
            loss -= (team.log_probs(model, tokens) * mask).sum().item()
            count += mask.sum().item()
        found, texts = stages.sample_answers(model, encoding, prompts, config, team, (5,))
        kl = ((found.log_probs - stages.answer_log_probs(reference, found, team)) * found.mask).sum().item()
        score = 0.0 if judge is None else stages.scores_of(judge, found).sum().item()
        loss, count, kl, length, score = team.sum([loss, count, kl, found.mask.sum().item(), score])
        n = len(prompts)
        line = {"model": name, "held_out_loss": loss / count, "kl": kl / n, "length": length / n}
        line |= {} if judge is None else {"score": score / n}
        if labeller is not None:
            asked = [messages[-1]["content"] for messages in prompts]
            texts = [text for part in team.gather(texts) for text in part]
            gold[name] = torch.tensor([labeller.gold(q, text) for q, text in zip(asked, texts)], dtype=torch.float64)
            line["gold"], line["interval"] = gold[name].mean().item(), 1.96 * gold[name].std().item() / math.sqrt(n)
            wins = (gold[name] > gold["sft"]).double() + 0.5 * (gold[name] == gold["sft"])
            line["win_rate"] = wins.mean().item()
        greedy = decode_greedily(model, encoding, prompts[:3], config, team)
        table.append(line | {"answers": [[m[-1]["content"], text] for m, text in zip(prompts, greedy)]})
    order = list(models)
    return sorted(table, key=lambda line: order.index(line["model"]))


def decode_greedily(model: nn.Module, encoding, prompts: Sequence[list], config: AlignConfig, team) -> list[str]:
    """The likeliest answer, token by token, to each of a few conversations."""
    import chat
    import rollout
    tokens = [chat.render_prompt(encoding, messages) for messages in prompts]
    found = rollout.generate_rollout(model, tokens, config.max_new_tokens, temperature=0,
                                     whole_logits=team.whole_logits(model),
                                     stop_tokens=[encoding.encode_single_token(chat.END)])
    return [" ".join(chat.answer_text(encoding, response).split()) for response in found.responses()]


def format_table(table: list[dict]) -> str:
    """The table as text, and three questions as each model answers them."""
    columns = (("held-out loss", "held_out_loss", ".3f"), ("reward model", "score", ".2f"),
               ("gold reward", "gold", ".3f"), ("+-", "interval", ".3f"), ("win rate", "win_rate", ".1%"),
               ("KL", "kl", ".2f"), ("length", "length", ".1f"))
    rows = ["model " + "".join(f"{title:>14}" for title, _, _ in columns)]
    for line in table:
        cells = [format(line[key], form) if key in line else "-" for _, key, form in columns]
        rows.append(f"{line['model']:6}" + "".join(f"{cell:>14}" for cell in cells))
    for i, (question, _) in enumerate(table[0]["answers"]):
        rows += ["", question] + [f"  {line['model']:6} {line['answers'][i][1]}" for line in table]
    return "\n".join(rows)


# --- 4. the run -----------------------------------------------------------------------------

def run_stages(config: AlignConfig, world, chosen: Sequence[str] | None = None) -> list[dict]:
    """Run the stages (None: the config's) from the model in ``config.init`` to the table, which it prints and returns.

    Args:
        world: processes.World, of processes that all call this.

    Raises:
        ValueError, processes.ProcessError: one line each; what was saved before stays.
        SystemExit: 128 + n after signal n in a stage, which is saved.
    """
    import chat
    import checkpoint
    import run_folder
    import stages
    from team import Team
    chosen = list(config.chosen() if chosen is None else chosen)
    team = Team(world, config.tp, config.zero, config.timeout)
    begins_with_sft = chosen[0] == "sft"
    init = config.init or str(config.folder("pretrain" if begins_with_sft else "sft"))
    tuned = str(config.folder("sft")) if begins_with_sft else init
    judge = str(config.folder("reward")) if "reward" in chosen else config.reward_model or str(config.folder("reward"))
    world.first(lambda: _refuse(config, chosen, init, judge))
    model, encoding = world.agree(lambda: stages.load_policy(init))
    context = model.config.context
    questions = world.agree(lambda: read_questions(config, encoding, context))
    if config.preferences is not None and chosen != ["sft"]:  # a bad line is named now, not after the first stage
        world.agree(lambda: [chat.fit_pair(encoding, p, context) for p in chat.read_preferences(config.preferences)])
    del model
    world.first(lambda: [run_folder.lock(config.folder(stage)) for stage in chosen])
    if config.overwrite and world.rank == 0:
        for stage in chosen:
            for old in [*config.folder(stage).glob("step-*")]:
                checkpoint.remove(old)
            for name in ("metrics.jsonl", "preferences.jsonl"):
                (config.folder(stage) / name).unlink(missing_ok=True)
    world.say(f"{len(questions.train):,} conversations to train on, {len(questions.held_out):,} held out; stages "
              f"{', '.join(chosen)} from {init}")
    began = time.perf_counter()
    if begins_with_sft:
        stages.run_sft(config, team, questions, init)
    pairs: tuple[list, list] = ([], [])
    if chosen != ["sft"]:
        pairs = compare_answers(config, team, questions, tuned)
    for stage in chosen:
        if stage == "reward":
            found = stages.run_reward(config, team, pairs, tuned)
            world.agree(lambda: _write_whole(Path(judge) / "held_out.json", json.dumps(found)), here=world.rank == 0)
        elif stage == "ppo":
            stages.run_ppo(config, team, questions, pairs, tuned, judge)
        elif stage == "dpo":
            stages.run_dpo(config, team, pairs, tuned)
        elif stage == "grpo":
            stages.run_grpo(config, team, questions, pairs, tuned, judge)
    policies = ({"base": init} if begins_with_sft else {}) | {"sft": tuned}
    policies |= {stage: str(config.folder(stage)) for stage in chosen if stage not in ("sft", "reward")}
    has_judge = bool(list(Path(judge).glob("step-*"))) or "reward" in chosen
    table = evaluate_policies(config, team, questions, pairs, policies, judge if has_judge else None)
    world.say("\n" + format_table(table) + "\n")
    held_out = Path(judge) / "held_out.json"
    accuracy = json.loads(held_out.read_text()) if held_out.exists() else None
    verdict = [] if accuracy is None else [f"reward model right on {accuracy['accuracy']:.1%} of {accuracy['pairs']} "
                                           "held-out pairs (expected at least 80%)"]
    wins = [f"{line['model']} {line['win_rate']:.1%}" for line in table if line["model"] not in ("base", "sft")
            and "win_rate" in line]
    verdict += [f"win rate against SFT: {', '.join(wins)} (expected at least 65%)"] if wins else []
    if world.rank == 0:
        _write_whole(Path(config.out) / "evaluation.json", json.dumps({"table": table, "reward": accuracy}, indent=1))
    best = [stage for stage in chosen if stage != "reward"]
    if best:
        talker = config.folder("ppo" if "ppo" in best else best[-1])
        world.say(f"to talk to it: python decode.py --checkpoint {talker} --chat")
    world.say(f"aligned in {time.perf_counter() - began:.0f} s; " + ("; ".join(verdict) or f"saved in {config.out}"))
    return table


def _refuse(config: AlignConfig, chosen: list[str], init: str, judge: str) -> None:
    if config.instructions is not None and config.preferences is None and chosen != ["sft"]:
        raise AlignmentError("--instructions has no labeller: give --preferences too, for reward, ppo, dpo and grpo")
    if config.reward_model is not None and "reward" in chosen:
        raise AlignmentError(f"--reward_model={config.reward_model} is not used, as the stage reward trains one: leave "
                             "out one of them")
    start = Path(init).resolve()
    for stage in chosen:
        if config.folder(stage).resolve() in (start, *start.parents):
            raise AlignmentError(f"--init={init} is where the stage {stage} writes: --out=DIR writes elsewhere")
        if any(config.folder(stage).glob("step-*")) and not (config.resume or config.overwrite):
            raise AlignmentError(f"{config.folder(stage)} already holds a run: --resume goes on with it, --overwrite "
                                 "starts again, --out=DIR writes elsewhere")
    if {"ppo", "grpo"} & set(chosen) and "reward" not in chosen and not any(Path(judge).glob("step-*")):
        raise AlignmentError(f"{judge} holds no reward model: run the stage reward before, or give --reward_model=DIR")


def _parse(arguments: list[str]) -> AlignConfig:
    """Command line -> config. AlignmentError for an unknown flag or a value that cannot be."""
    from config import parse_flags, whole_number  # train.py's
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message: str):
        raise AlignmentError(message)

    parser.error = fail
    for field in dataclasses.fields(AlignConfig):
        help = field.metadata["help"] + (f" (default {field.default})" if field.default is not None else "")
        kind = str(getattr(field.type, "__name__", field.type)).removesuffix(" | None")
        if kind == "bool":
            parser.add_argument(f"--{field.name}", action="store_true", help=field.metadata["help"])
        else:
            parser.add_argument(f"--{field.name}", type={"int": whole_number, "float": float}.get(kind, str),
                                default=field.default, help=help.replace("%", "%%"))
    return AlignConfig(**vars(parse_flags(parser, arguments)))


def main(arguments: list[str], program: str = "alignment.py") -> int:
    """Exit status: 0 done, 1 another process was lost, 2 the user has to mend something, 130 Ctrl-C.

    ``program``: the name that was typed, with which errors begin.
    """
    rank = int(os.environ.get("RANK", 0))

    def one_line(text: str, status: int) -> int:
        print(f"{program}: {text}", file=sys.stderr, flush=True)
        return status

    try:
        import processes
        import run_folder
        config = _parse(arguments)
        run_stages(config, processes.join(config.device, config.timeout))
    except ValueError as error:
        return one_line((str(error) or repr(error)).splitlines()[0], 2) if rank == 0 else 2
    except ImportError as error:
        return one_line(f"{error}: copy that file beside this one, or install that package", 2) if rank == 0 else 2
    except torch.OutOfMemoryError as error:
        return one_line(f"rank {rank}: {str(error).splitlines()[0][:150]}: take a smaller batch of that stage, "
                        "such as --sft_batch", 2)
    except OSError as error:
        return one_line(f"{error}; what was saved before is as it was: --resume goes on from there", 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except RuntimeError as error:
        if not processes.is_lost(error):
            raise
        return one_line(f"rank {rank} lost another process ({str(error).splitlines()[0][:120]}): start again with "
                        "--resume", 1)
    finally:
        import torch.distributed as dist
        with contextlib.suppress(Exception):  # the neighbours may not be here
            run_folder.unlock()
            if dist.is_initialized():
                dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
