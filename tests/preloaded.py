"""What the process has loaded from which tests start programs and ranks: imports that take seconds, and a small library.

Demos learn from the texts of Python's standard library. Programs started here see some twenty of its modules as the
whole of it, and read them in a tenth of the time; test_data.py, test_labeller.py and test_word2vec.py read more.
"""

import gc
import sys

import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401  (every optimizer imports it)
import torch.distributed.checkpoint  # noqa: F401

import conftest  # noqa: F401  (and with it pytest: what a new process runs is in there)
import data
import labeller
import train  # noqa: F401  (and with it most of our files)

sys.stdlib_module_names = frozenset(
    "argparse ast bisect calendar cmd collections configparser csv difflib functools heapq json logging os random re shutil "
    "smtplib statistics string subprocess textwrap threading uuid".split())
documents, questions = data.default_documents(), labeller.default_questions()
data.default_documents, labeller.default_questions = lambda: list(documents), lambda: list(questions)
gc.collect()
gc.freeze()  # the collector of a fork need not look at, and so copy, what it was born with
