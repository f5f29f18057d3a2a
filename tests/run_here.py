"""A file as the main program, in this process: what conftest.run_program does in one of its own, without the wait."""

import contextlib
import io
import runpy
import subprocess
import sys

from conftest import ROOT


def run_here(words):
    """subprocess.CompletedProcess of ``python words...``: exit status, what it printed."""
    words, out, err, status = [str(word) for word in words], io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as left:
        status = left.code or 0
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
