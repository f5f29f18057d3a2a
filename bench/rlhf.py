"""Alignment's costs: rollouts beside transformers' generate, the parts of a PPO step, and what DPO's kept log-probs save.

    python bench/rlhf.py                    all three, tiny (4 x 128) and small (6 x 384) models; about two minutes
    python bench/rlhf.py --only rollout     one part: rollout, ppo, dpo
    python bench/rlhf.py --device cuda

rollout  32 prompts of 4 to 64 tokens, answers that end where a stop token is drawn (one in 24 tokens, 128 at most), sampled
         at temperature 1; tokens of answers per second. Goal: at least 2 times transformers' generate, same weights
ppo      time of rollout, of judging (log-probs under policy and reference, scores) and of the update, 4 epochs
dpo      a step on 16 pairs with the reference's log-probs kept, one forward for both sides; beside the formula done plainly,
         four forwards. Of 8 forwards' worth of work 6 remain, so 0.75 of the time is expected

Every round runs each in turn, in one process; medians over the rounds.
"""

import argparse
import copy
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

# This file has the name of the file that it measures, so its own folder must not come first.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

try:
    import transformers
except ImportError as error:
    print(f"{sys.argv[0]}: needs {error.name}: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

from gpt import GPT, GPTConfig
from preference import RewardModel, dpo_loss
from processes import keep_freed_memory
from rlhf import Experience, PPOConfig, aligned_log_probs, last_place, ppo_update
from rollout import generate_rollout

PARTS = ("rollout", "ppo", "dpo")
SIZES = {"tiny": GPTConfig(2048, 256, 4, 4, 128), "small": GPTConfig(8192, 256, 6, 6, 384)}
PROMPTS, LONGEST = 32, 128


def timed(runs: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run by round, the first round left out; a run's result is not looked at."""
    seconds = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def draw(V: int, generator: torch.Generator) -> tuple[list[list[int]], list[int]]:
    """Ragged prompts, and stop tokens that a model of random weights draws once in 24."""
    lengths = torch.randint(4, 65, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(V // 24, V, (n,), generator=generator).tolist() for n in lengths], list(range(1, V // 24))


def bench_rollout(name: str, model: GPT, device: str, rounds: int, generator: torch.Generator) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(directory).eval().to(device)
    V = model.config.vocab_size
    prompts, stops = draw(V, generator)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    real = torch.arange(longest, device=device) >= torch.tensor([[longest - len(p)] for p in prompts], device=device)
    written = {"ours": [], "theirs": []}

    def ours() -> None:
        found = generate_rollout(model, prompts, LONGEST, stop_tokens=stops, generator=generator)
        written["ours"].append(int(found.mask.sum()))

    def peer() -> None:
        out = theirs.generate(padded, attention_mask=real.long(), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                              max_new_tokens=LONGEST, eos_token_id=stops, pad_token_id=0)[:, longest:]
        written["theirs"].append(int((out != 0).sum()))

    seconds = timed({"ours": ours, "theirs": peer}, rounds, device)
    speed = {who: statistics.median(n / s for n, s in zip(written[who][1:], seconds[who])) for who in seconds}
    per_step = {who: statistics.median(seconds[who]) * 1e3 for who in seconds}
    print(f"rollout, {name}: ours {speed['ours']:.0f}, transformers {speed['theirs']:.0f} tokens/s: "
          f"{speed['ours'] / speed['theirs']:.2f} x   ({per_step['ours']:.0f} and {per_step['theirs']:.0f} ms a batch of "
          f"{statistics.mean(written['ours']):.0f} and {statistics.mean(written['theirs']):.0f} tokens)", flush=True)


def bench_ppo(name: str, model: GPT, device: str, rounds: int, generator: torch.Generator) -> None:
    policy, reference = copy.deepcopy(model), model
    judge = RewardModel(copy.deepcopy(model), generator)
    critic = copy.deepcopy(judge)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=1e-5)
    prompts, stops = draw(model.config.vocab_size, generator)
    state = {}

    def write() -> None:
        state["found"] = generate_rollout(policy, prompts, LONGEST, stop_tokens=stops, generator=generator)

    @torch.no_grad()
    def judged() -> None:
        found = state["found"]
        log_probs, before = (aligned_log_probs(m, found.tokens) * found.mask for m in (policy, reference))
        scores = judge.scores(found.tokens, last_place(found.mask))
        state["batch"] = Experience(found.tokens, found.mask, log_probs, before, scores, found.terminated)

    def learn() -> None:
        ppo_update(policy, critic, optimizer, state["batch"], PPOConfig(stop_kl=None), generator)

    seconds = timed({"rollout": write, "judging": judged, "update": learn}, rounds, device)
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    whole = sum(medians.values())
    print(f"PPO step, {name}: {whole * 1e3:.0f} ms, of it " + ", ".join(
        f"{part} {value / whole:.0%}" for part, value in medians.items()), flush=True)


def bench_dpo(name: str, model: GPT, device: str, rounds: int, generator: torch.Generator) -> None:
    policy, reference, (N, T) = copy.deepcopy(model), model, (16, 96)
    V = model.config.vocab_size
    chosen, rejected = (torch.randint(V, (N, T), generator=generator).to(device) for _ in range(2))
    mask = (torch.arange(T, device=device) >= 48).float().expand(N, T)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)

    def whole(m, tokens) -> torch.Tensor:
        return (aligned_log_probs(m, tokens) * (mask if len(tokens) == N else mask.repeat(2, 1))).sum(1)

    def step(loss) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        kept = whole(reference, torch.cat((chosen, rejected))).chunk(2)

    def with_kept() -> None:
        step(dpo_loss(*whole(policy, torch.cat((chosen, rejected))).chunk(2), *kept))

    def plainly() -> None:
        with torch.no_grad():
            under_reference = whole(reference, chosen), whole(reference, rejected)
        step(dpo_loss(whole(policy, chosen), whole(policy, rejected), *under_reference))

    medians = {run: statistics.median(values)
               for run, values in timed({"kept": with_kept, "plainly": plainly}, rounds, device).items()}
    print(f"DPO step, {name}: kept {medians['kept'] * 1e3:.0f} ms, plainly {medians['plainly'] * 1e3:.0f} ms: "
          f"{medians['kept'] / medians['plainly']:.2f} of the time (expected about 0.75)", flush=True)


def main(device: str, only: str | None, sizes: list[str], rounds: int, threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_freed_memory()
    where = platform.processor() or platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        where = next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    print(f"{where}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name in sizes:
        generator = torch.Generator().manual_seed(0)
        model = GPT(SIZES[name], generator=generator).eval().to(device)
        for part, run in zip(PARTS, (bench_rollout, bench_ppo, bench_dpo)):
            if only in (None, part):
                run(name, model, device, rounds, generator)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES), help="models (default: both)")
    parser.add_argument("--repeats", dest="rounds", type=int, default=5, help="measured rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.threads or 1) < 1:
        parser.error("every number must be at least 1")
    try:
        main(**vars(arguments))
    except KeyboardInterrupt:
        parser.exit(130)
