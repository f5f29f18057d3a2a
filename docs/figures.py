"""Make the figures that the README shows: each by a program of this project, run on this machine.

    python docs/figures.py                 all of them, five to fifteen minutes on two cores
    python docs/figures.py experts zero    some
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIGURES = {  # name of the picture -> what makes it
    "translation": "python rnn_nmt.py --plot docs/translation.png",
    "attention": "python flash_attn.py --plot docs/attention.png",
    "timelines": "python pipeline_schedules.py --plot docs/timelines.png",
    "zero": "python zero.py --plot docs/zero.png",
    "underflow": "python precision.py --plot docs/underflow.png",
    "experts": "python moe.py --plot docs/experts.png",
    "overoptimisation": "python rlhf.py --plot docs/overoptimisation.png",
    "growth": "python reason.py --plot docs/growth.png --out thinker.pt",
    "tokens": "python inference_scaling.py --checkpoint thinker.pt --plot docs/tokens.png",
    "isoflop": "python scaling_laws.py --plot docs/isoflop.png",
    "law": "python scaling.py --measure --plot docs/law.png",
}
ROOT = Path(__file__).resolve().parent.parent


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in FIGURES if not names else [n for n in FIGURES if n in names or n == "growth" and "tokens" in names]:
            began = time.perf_counter()
            print(FIGURES[name], flush=True)
            words = FIGURES[name].replace("thinker.pt", f"{folder}/thinker.pt").split()
            done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"figures.py: {FIGURES[name]} ended with {done.returncode}")
            last = done.stdout.strip().splitlines()[-1]
            print(f"  {time.perf_counter() - began:.0f} s   {last}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)} (default: all)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}: choose from {', '.join(FIGURES)}")
    try:
        main(options.names)
    except KeyboardInterrupt:
        parser.exit(130)
