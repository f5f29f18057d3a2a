"""One folder, one run: begin, go on, start again after a crash, or refuse, so that nothing is ever lost.

Idea      A run writes its checkpoints into --out. Whoever starts a program there may mean four things, and a guess can
          destroy days: so a run that is found is neither continued nor overwritten unasked. torchrun is the
          exception: after a crash it starts all processes again with the same arguments, and the run it began itself
          goes on; a mark in the folder tells whose it is. A file lock keeps a second run out while one lives: the
          system lets go of it when the process ends, kill -9 included.
Formula   settings of a resumed run = flags given now, over those of its checkpoint, over the defaults; what the
          weights depend on (sizes, batch, text) may not be given anew
Shapes    no tensors here
Omits     locks on Windows, and on file systems that several machines share, which may not keep them: one run at a time
          is up to the user there. What a checkpoint is, and that it is whole: checkpoint.py.
Run       python run_folder.py    every case in a scratch folder; ends with "8 of 8 ..."
Test      pytest tests/test_run_folder.py
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path

_LOCKS: dict[str, object] = {}  # folder -> the open file that holds its lock


# --- 1. what a folder is for -----------------------------------------------------------------

def decide(settings, given: set[str]) -> tuple:
    """On rank 0: what this run is. Returns a config.TrainConfig, and the checkpoint to go on from or None.

    A resumed run has the settings of its checkpoint under what is given now. Another run in --out is neither
    continued nor overwritten unasked. After a crash torchrun starts the processes again with the same arguments:
    then the run goes on, if it is the one that this torchrun began, as the mark in --out tells.

    Raises:
        ConfigError, CheckpointError: one line that says what to do.
    """
    import alignment
    import checkpoint
    from config import FIXED_BY_CHECKPOINT, OF_THE_MACHINE, ConfigError
    out = Path(settings.out)
    if (out / "manifest.json").exists():
        raise ConfigError(f"{out} is one checkpoint of a run, not its folder: give --out={out.parent}")
    aligned = [stage for stage in alignment.STAGES if _checkpoints(home(out) / stage)]
    # As config.derive will have it, which needs to know more.
    goes_on = settings.stage == "all" or settings.stage is None and settings.data is None and settings.context >= 96
    if aligned and goes_on and not (settings.overwrite or _checkpoints(out)):  # before days of work, not after them
        raise ConfigError(f"{home(out) / aligned[0]} already holds a run: --overwrite deletes it, --stage=pretrain "
                          f"ends before it, --out=DIR writes elsewhere")
    lock(out)  # from here on nobody else changes what is found
    found, mark = bool(_checkpoints(out)), out / ".torchrun"
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    restarted = again and mark.exists() and mark.read_text() == _this_torchrun()
    if found and not (settings.resume or settings.overwrite or restarted):
        raise ConfigError(f"{out} already holds a run ({checkpoint.latest(out).name}): --resume goes on with it, "
                          f"--overwrite starts again, --out=DIR writes elsewhere")
    if not found or settings.overwrite and not restarted:
        if settings.resume and not found:
            print(f"nothing to resume in {out}: starting from the beginning", flush=True)
        return settings, None
    path = checkpoint.latest(out)
    saved = checkpoint.load(path, parts=())["meta"]
    if "train_config" not in saved:
        raise ConfigError(f"{path} was not written by train.py: --out=DIR writes elsewhere")
    for name in FIXED_BY_CHECKPOINT:
        if name in given and getattr(settings, name) != saved["train_config"].get(name):
            raise ConfigError(f"{path} was trained with --{name}={saved['train_config'].get(name)}, not "
                              f"{getattr(settings, name)}: leave the flag out to resume, or give another --out")
    kept = {field.name for field in dataclasses.fields(settings)} - given - OF_THE_MACHINE
    merged = {name: value for name, value in saved["train_config"].items() if name in kept}
    settings = dataclasses.replace(settings, **merged, resume=True, overwrite=False)
    if settings.steps < saved["step"]:
        raise ConfigError(f"{path} has done {saved['step']} steps already, --steps={settings.steps} is less: give more")
    return settings, path


def _this_torchrun() -> str:
    """A restart by the same torchrun has the same run id and the same parent."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def _checkpoints(out: Path) -> list[Path]:
    """Those in a folder, superseded ones too; what else the user keeps there is not ours."""
    return [path for path in out.glob("step-*") if re.fullmatch(r"step-\d+(\.old)?", path.name)]


def begin(out: Path, resumed: Path | None) -> None:
    """Nothing can be refused any more: delete what is to be overwritten, and leave this torchrun's mark."""
    import checkpoint
    for old in _checkpoints(out) if resumed is None else ():
        checkpoint.remove(old)
    (out / ".torchrun").write_text(_this_torchrun())


def lock(out: Path) -> None:
    """One run per folder, for as long as this process lives; where there are no file locks, on the user's honour. A
    folder that this process has locked already stays so."""
    from config import ConfigError
    if str(out) in _LOCKS:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a+")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}): check the folder, its permissions and "
                          f"the room on the disk, or give another --out") from None
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            raise ConfigError(f"{out} is being written by process {file.read() or '?'}: wait for it, end it, or give "
                              f"another --out") from None
    except (ImportError, OSError) as error:  # Windows, or a file system without locks
        print(f"{out} cannot be locked ({error}): see to it that no second run writes there", flush=True)
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    _LOCKS[str(out)] = file  # closed, and so unlocked, when the run is over


def unlock() -> None:
    """The run is over, whatever ended it."""
    for file in _LOCKS.values():
        file.close()
    _LOCKS.clear()


def home(out: Path) -> Path:
    """The directory in which the stages after pre-training have one each: beside out/pretrain, else inside."""
    return out.parent if out.name == "pretrain" else out


# --- 2. demo ---------------------------------------------------------------------------------

def main() -> None:
    import subprocess

    import checkpoint
    from config import ConfigError, TrainConfig
    right, total = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"

        def shows(what: str, expected: str, given: set[str] = frozenset(), **flags) -> None:
            nonlocal right, total
            try:
                settings, path = decide(TrainConfig(out=str(out), **flags), set(given) | set(flags))
                came = "starts" if path is None else f"goes on from {path.name}, lr {settings.lr:g}"
            except ConfigError as error:
                came = "refused: " + str(error).replace(str(out), "out")
            unlock()
            right, total = right + came.startswith(expected), total + 1
            print(f"{what:46} {came}")

        shows("an empty folder", "starts")
        shows("an empty folder, --resume", "starts", resume=True)
        saved = dataclasses.asdict(TrainConfig(out=str(out), lr=1e-3))
        checkpoint.save(out, 20, {}, {"train_config": saved})
        shows("a run", "refused: out already holds a run")
        shows("a run, --resume", "goes on from step-00000020, lr 0.001", resume=True)
        shows("a run, --resume --lr 0.0005", "goes on from step-00000020, lr 0.0005", resume=True, lr=5e-4)
        shows("a run, --resume --d_model 64", "refused: out/step-00000020 was trained with", resume=True, d_model=64)
        shows("a run, --overwrite", "starts", overwrite=True)
        code = ("import sys, run_folder, pathlib; run_folder.lock(pathlib.Path(sys.argv[1])); print(flush=True); "
                "sys.stdin.read()")
        other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 cwd=Path(__file__).parent)
        other.stdout.readline()  # it has the lock
        shows("a run that another process is writing", f"refused: out is being written by process {other.pid}",
              overwrite=True)
        other.communicate()
    print(f"{right} of {total} cases as expected (expected all)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.parse_args()
    try:
        main()
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
