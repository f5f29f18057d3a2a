"""What the process has loaded from which tests start programs and ranks: imports that take seconds, and Python's documentation.

``default_documents`` parses the standard library for four seconds: the first program that needs it leaves its text in a
file for the others; test_data.py has its own tests.
"""

import gc
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401  (every optimizer imports it)
import torch.distributed.checkpoint  # noqa: F401

import conftest  # noqa: F401  (and with it pytest: what a new process runs is in there)
import data
import train  # noqa: F401  (and with it most of our files)

parse = data.default_documents
_text = hashlib.sha256(sys.version.encode() + Path(data.__file__).read_bytes()).hexdigest()[:16]
_file = Path(tempfile.gettempdir(), f"default_documents-{os.getuid()}-{_text}.json")


def default_documents():
    if not _file.exists():
        beside = _file.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(parse()))
        beside.replace(_file)
    return json.loads(_file.read_text())


data.default_documents = default_documents
gc.collect()
gc.freeze()  # the collector of a fork need not look at, and so copy, what it was born with
