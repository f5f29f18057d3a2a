"""What the process has loaded from which tests start programs: imports that take seconds, and Python's documentation.

``default_documents`` parses the standard library for four seconds; test_data.py has its own tests.
"""

import matplotlib.pyplot  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401  (every optimizer imports it)
import torch.distributed.checkpoint  # noqa: F401

import data

documents = data.default_documents()
data.default_documents = lambda: list(documents)
