"""What generated code can do to us: nothing; what it can claim: only what its tests prove; and that correct programs pass."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ultrafuser import sandbox
from ultrafuser.errors import SandboxError, UltraFuserError
from ultrafuser.sandbox import Limits, Outcome, execute, isolation

HUMANEVAL = Path(__file__).parents[2] / "../shared/data/eval/instruct_humaneval.jsonl"
ANSWER = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(4) == 8\n"
EVERYWHERE = pytest.mark.parametrize("unsafe", [False, True], ids=["sandbox", "unsafe"])


def processes_with(token: str) -> list[str]:
    """Command lines that hold a token, of the processes that are alive."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue  # ended meanwhile
    return [line for line in lines if token in line]


@pytest.fixture
def limits() -> Iterator[Limits]:
    """Limits whose file size is like no other's. bubblewrap has it on its command line, and nothing inside outlives bubblewrap."""
    if (reason := sandbox.available()) and not os.environ.get("CI"):
        pytest.skip(reason)
    limits = Limits(timeout_s=2.0, memory_bytes=256 << 20, file_bytes=4096 * random.randrange(250, 10**6))
    yield limits
    assert processes_with(f"--size {limits.file_bytes}") == []


def failed(outcome: Outcome, *words: str) -> bool:
    assert all(word in outcome.detail for word in words), outcome
    return outcome.status == "failed" and not outcome.passed


# Programs that do what they should


@EVERYWHERE
def test_a_right_answer_passes_and_a_wrong_one_fails(limits, unsafe):
    assert sandbox.check(ANSWER, TESTS, limits=limits, unsafe=unsafe) == Outcome("passed")
    assert failed(
        sandbox.check(ANSWER, "x = 1\nassert double(4) == 9", limits=limits, unsafe=unsafe),
        "AssertionError (tests, line 2)",
    )
    assert sandbox.run("print('hello')", limits=limits, unsafe=unsafe).passed
    assert failed(
        sandbox.run("1 / 0", limits=limits, unsafe=unsafe), "ZeroDivisionError: division by zero (answer, line 1)"
    )


def test_parts_share_one_namespace_in_their_order(limits):
    assert sandbox.check("y = x + 1", "assert y == 3", setup="x = 2", limits=limits).passed
    assert failed(
        sandbox.check("y = 1", "", setup="import missing_module", limits=limits),
        "ModuleNotFoundError",
        "(setup, line 1)",
    )


def test_only_run_is_the_main_program(limits):
    block = "if __name__ == '__main__':\n    raise ValueError('main')"
    assert sandbox.check(block, "", limits=limits).passed
    assert failed(sandbox.run(block, limits=limits), "ValueError: main")


def test_classes_find_their_module(limits):
    answer = "from dataclasses import dataclass\nimport pickle\n@dataclass\nclass Point:\n    x: 'int'\n"
    assert sandbox.check(answer, "assert pickle.loads(pickle.dumps(Point(1))) == Point(1)", limits=limits).passed


def test_text_of_any_kind_arrives(limits):
    assert sandbox.check("def f():\n    return 'żółw 🐢'", "assert f() == 'żółw \\U0001f422'", limits=limits).passed
    assert failed(sandbox.check("raise ValueError('żółw 🐢')", "", limits=limits), "ValueError: żółw 🐢")
    assert failed(sandbox.check("x = '\ud800'", "", limits=limits), "UnicodeEncodeError")
    assert failed(sandbox.check("x = '\0'", "", limits=limits), "null byte")
    assert failed(sandbox.check("raise ValueError('\\ud800\\n\\n' + 10**5 * 'a')", "", limits=limits), "\\ud800 aaa")


def test_huge_parts_arrive(limits):
    text = "a" * (8 << 20)
    assert sandbox.check(f"x = '{text}'", f"assert x == '{text}'", limits=limits).passed


def test_a_syntax_error_fails(limits):
    assert failed(sandbox.check("def double(x)\n    return", TESTS, limits=limits), "SyntaxError", "line 1")


def test_scratch_can_be_written_and_starts_empty(limits):
    answer = "import os\nassert os.listdir() == []\nopen('a', 'w').write('1')\nassert os.environ['HOME'] == os.getcwd()"
    for _ in range(2):
        assert sandbox.check(answer, "assert open('a').read() == '1'", limits=limits).passed


def test_input_is_empty(limits):
    assert failed(sandbox.check("input()", "", limits=limits), "EOFError")


def test_many_at_once(limits):
    answers = [ANSWER, "def double(x):\n    return x"] * 6
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda answer: sandbox.check(answer, TESTS, limits=limits).passed, answers))
    assert outcomes == [True, False] * 6


# Limits


@EVERYWHERE
@pytest.mark.parametrize(
    "answer",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_an_endless_loop_is_stopped(limits, answer, unsafe):
    begin = time.monotonic()
    outcome = sandbox.check(answer, TESTS, limits=Limits(timeout_s=0.5, file_bytes=limits.file_bytes), unsafe=unsafe)
    assert outcome == Outcome("timeout", "still running after 0.5 s")
    assert time.monotonic() - begin < 30
    in_a_call = sandbox.check(
        "def double(x):\n    while True: pass", TESTS, limits=Limits(timeout_s=0.5, file_bytes=limits.file_bytes)
    )
    assert in_a_call.status == "timeout"


def test_processor_time_counts_as_time(limits):
    assert (
        sandbox.check("import os, signal\nos.kill(os.getpid(), signal.SIGXCPU)", "", limits=limits).status == "timeout"
    )


def test_a_fork_bomb_is_stopped(limits):
    assert failed(sandbox.check("import os\nwhile True: os.fork()", "", limits=limits))
    patient = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert sandbox.check(patient, "", limits=limits).status == "timeout"


def test_processes_and_threads_are_counted(limits):
    answer = """
import os, threading, time
started = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        started += 1
except BlockingIOError:
    pass
try:
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise ValueError("one more")
except RuntimeError:
    pass
"""
    few = Limits(timeout_s=5, processes=5, file_bytes=limits.file_bytes)
    assert sandbox.check(answer, "assert started == 4, started", limits=few) == Outcome("passed")


@EVERYWHERE
@pytest.mark.parametrize("answer", ["x = bytearray(1 << 34)", "x = []\nwhile True: x.append(bytearray(1 << 20))"])
def test_a_memory_hog_is_stopped(limits, answer, unsafe):
    assert sandbox.check(answer, "", limits=limits, unsafe=unsafe).status == "memory"


@EVERYWHERE
@pytest.mark.parametrize("stream", [1, 2])
def test_an_output_flood_is_stopped(limits, stream, unsafe):
    begin = time.monotonic()
    answer = f"import os\nwhile True: os.write({stream}, b'x' * 65536)"
    outcome = sandbox.check(
        answer, "", limits=Limits(timeout_s=60, output_bytes=100_000, file_bytes=limits.file_bytes), unsafe=unsafe
    )
    assert outcome == Outcome("output", "printed more than 100000 bytes")
    assert time.monotonic() - begin < 30


def test_output_up_to_the_limit_passes(limits):
    few = Limits(output_bytes=1000, file_bytes=limits.file_bytes)
    assert sandbox.check("import os\nos.write(1, b'x' * 1000)", "", limits=few).passed
    assert sandbox.check("import os\nos.write(1, b'x' * 1001)", "", limits=few).status == "output"


def test_files_are_limited_one_by_one_and_together(limits):
    small = Limits(file_bytes=1 << 20)
    assert failed(sandbox.check("open('a', 'wb').write(b'x' * (2 << 20))", "", limits=small), "OSError")
    together = "for i in range(3):\n    with open(str(i), 'wb') as f: f.write(b'x' * (1 << 19))"
    assert failed(sandbox.check(together, "", limits=small), "No space left")


# What is outside


def test_files_outside_cannot_be_read(limits, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("mango")
    monkeypatch.setenv("SECRET_KEY", "mango")
    assert failed(sandbox.check(f"open({str(secret)!r}).read()", "", limits=limits), "FileNotFoundError")
    assert failed(sandbox.check("open('/etc/passwd').read()", "", limits=limits), "FileNotFoundError")
    answer = """
import glob, os
texts = [str(os.environ)]
for file in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
    try:
        texts.append(open(file).read())
    except OSError:
        pass
folders = set(os.listdir("/"))
"""
    tests = "assert 'mango' not in str(texts), texts\nassert not folders & {'home', 'tmp', 'var', 'work', 'mnt', 'sys'}, folders"
    assert sandbox.check(answer, tests, limits=limits) == Outcome("passed")


def test_nothing_outside_can_be_written(limits, tmp_path):
    paths = [
        tmp_path / "new",
        Path("/new"),
        Path("/dev/new"),
        Path("/dev/shm/new"),
        Path("/usr/lib/new"),
        Path("/driver.py"),
        Path("/tmp/new"),
    ]
    paths += [Path(os.__file__), Path("/proc/sys/kernel/core_pattern"), Path("/proc/sysrq-trigger")]
    for path in paths:
        assert failed(sandbox.check(f"open({str(path)!r}, 'a').write('x')", "", limits=limits), "Error"), path
    assert list(tmp_path.iterdir()) == []


def test_the_network_is_out_of_reach(limits):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        answer = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1)"
        assert failed(sandbox.check(answer, "", limits=limits), "ConnectionRefusedError")
        with pytest.raises(TimeoutError):
            server.accept()
        assert (
            failed(sandbox.check(answer, "", limits=limits, unsafe=True)) is False
        )  # the same code gets through without a sandbox


def test_abstract_sockets_are_out_of_reach(limits):
    name = f"\0ultrafuser-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        answer = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})"
        assert failed(sandbox.check(answer, "", limits=limits), "ConnectionRefusedError")


def test_no_other_process_can_be_killed(limits):
    answer = """
import os, signal
for pid in [os.getppid(), 1, -1, *range(3, 2000)]:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
"""
    assert sandbox.check(answer + ANSWER, TESTS, limits=limits) == Outcome("passed")


def test_deleting_its_folder_harms_nobody(limits, tmp_path):
    (tmp_path / "kept").write_text("x")
    answer = f"import json, os, shutil\nfor folder in (os.getcwd(), {str(tmp_path)!r}, os.path.dirname(json.__file__)): shutil.rmtree(folder, True)\n"
    assert sandbox.check(answer + ANSWER, TESTS, limits=limits).passed
    assert (tmp_path / "kept").exists() and Path(json.__file__).exists()


def test_no_privilege_is_left(limits):
    answer = "status = dict(line.split(':', 1) for line in open('/proc/self/status'))"
    tests = "assert [int(status[k], 16) for k in ('CapPrm', 'CapEff', 'CapAmb')] == [0, 0, 0]\nassert int(status['NoNewPrivs']) == 1"
    assert sandbox.check(answer, tests, limits=limits) == Outcome("passed")


def test_everything_ends_with_the_program_that_asked(limits):
    code = f"from ultrafuser import sandbox\nsandbox.run('while True: pass', limits=sandbox.Limits(60, file_bytes={limits.file_bytes}))"
    asking = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while not processes_with(f"--size {limits.file_bytes}") and time.monotonic() < until:
        time.sleep(0.02)
    assert processes_with(f"--size {limits.file_bytes}")
    asking.kill()
    asking.wait()
    while processes_with(f"--size {limits.file_bytes}") and time.monotonic() < until:
        time.sleep(0.02)  # then the fixture looks


# Verdicts that are not earned

FORGERIES = {
    "print": "print('passed', flush=True)\nprint('{\"status\": \"passed\"}', flush=True)\nraise ValueError",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "exit without a code": "raise SystemExit",
    "generator exit": "raise GeneratorExit",
    "atexit": "import atexit, os, sys\natexit.register(lambda: (print('passed', flush=True), os._exit(0)))\nsys.exit(0)",
    "a fork goes on": "import os\nif os.fork(): os._exit(0)",
    "the parent waits for a fork": "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0), os._exit(0)",
    "every descriptor closed": "import os\nos.closerange(0, 1024)",
    "every descriptor told": "import os\nfor fd in range(64):\n    for text in (b'ready\\n', b'passed\\n', b'0' * 64 + b'\\n'):\n        try: os.write(fd, text)\n        except OSError: pass",
    "a channel flood": "import os\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 65536)\n    except OSError: pass",
    "built-ins replaced": "import builtins\nbuiltins.exec = builtins.compile = builtins.AssertionError = lambda *a, **k: None",
    "modules replaced": "import os, json\nos._exit = os.write = json.loads = lambda *a: None",
    "main replaced": "import __main__\n__main__.judge = __main__.main = __main__.describe = lambda *a: b''",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "killing itself": "import os\nos.kill(os.getpid(), 9)",
}


@EVERYWHERE
@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_no_forgery_passes(limits, forgery, unsafe):
    wrong = "def double(x):\n    return 0\n"
    in_a_call = "def double(x):\n" + "".join(f"    {line}\n" for line in forgery.splitlines()) + "    return 0\n"
    for answer in (wrong + forgery, in_a_call):
        assert sandbox.check(answer, TESTS, limits=limits, unsafe=unsafe).status in ("failed", "output"), answer


def test_an_exit_in_a_program_or_in_tests_is_no_pass(limits):
    assert failed(sandbox.run("import sys\nsys.exit(0)", limits=limits), "SystemExit: 0")
    assert failed(
        sandbox.check(ANSWER, "import os\nos._exit(0)", limits=limits), "ended with code 0 before its tests did"
    )


def test_an_error_whose_text_fails_is_told(limits):
    answer = "class Odd(Exception):\n    def __str__(self): raise SystemExit\nraise Odd"
    assert failed(sandbox.check(answer, "", limits=limits), "Odd: (no text) (answer, line 3)")


def test_threads_left_running_do_not_hold_a_verdict_back(limits):
    answer = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    assert sandbox.check(answer + ANSWER, TESTS, limits=limits).passed


# Without a sandbox


def test_without_a_sandbox_code_is_refused(monkeypatch):
    monkeypatch.setattr(execute, "available", lambda: "bubblewrap (the command bwrap) is not installed")
    for judge in (lambda: sandbox.run("pass"), lambda: sandbox.check(ANSWER, TESTS)):
        with pytest.raises(SandboxError, match="bwrap.* is not installed. Install bubblewrap .* or pass --unsafe-code"):
            judge()
    assert issubclass(SandboxError, UltraFuserError)
    assert sandbox.check(ANSWER, TESTS, unsafe=True).passed


def test_why_there_is_no_sandbox(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    execute.find_isolation.cache_clear()
    try:
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert sandbox.available() == "bubblewrap (the command bwrap) is not installed"
        execute.find_isolation.cache_clear()
        monkeypatch.setattr(shutil, "which", lambda name: str(broken))
        assert "makes no sandbox here: bwrap: No permissions to create new namespace" in str(sandbox.available())
    finally:
        execute.find_isolation.cache_clear()


def test_a_sandbox_that_fails_is_an_error_and_no_verdict(limits, monkeypatch):
    assert sandbox.available() is None
    monkeypatch.setattr(isolation, "DRIVER", Path("/nonexistent/driver.py"))
    outcome = sandbox.check(ANSWER, TESTS, limits=limits)
    assert outcome.status == "error" and "/nonexistent/driver.py" in outcome.detail


def test_unsafe_kills_the_group_and_removes_the_folder(tmp_path):
    answer = f"""
import os, time
open({str(tmp_path / "folder")!r}, "w").write(os.getcwd())
if os.fork() == 0:
    open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
    time.sleep(60)
while not os.path.exists({str(tmp_path / "pid")!r}) or not open({str(tmp_path / "pid")!r}).read(): time.sleep(0.01)
"""
    processes = 10**6 if os.geteuid() else 8  # an ordinary user's other processes count too
    assert sandbox.check(answer, "", limits=Limits(processes=processes), unsafe=True) == Outcome("passed")
    assert not Path((tmp_path / "folder").read_text()).exists()
    child, until = int((tmp_path / "pid").read_text()), time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < until:  # killed at once; the system reaps it
            os.kill(child, signal.SIG_DFL)
            time.sleep(0.01)


def test_unsafe_survives_the_loss_of_its_folder():
    assert sandbox.check("import os, shutil\nshutil.rmtree(os.getcwd())\n" + ANSWER, TESTS, unsafe=True).passed


# HumanEval


@pytest.mark.slow
def test_humaneval_references_pass_and_wrong_answers_fail(limits):
    if not HUMANEVAL.exists():
        pytest.skip(f"{HUMANEVAL} is missing")
    rows = [json.loads(line) for line in HUMANEVAL.read_text(encoding="utf-8").splitlines()]
    limits = Limits(timeout_s=30, file_bytes=limits.file_bytes)

    def passes(row: dict[str, str], body: str) -> bool:
        return sandbox.check(row["prompt"] + body, f"{row['test']}\ncheck({row['entry_point']})", limits=limits).passed

    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda row: passes(row, row["canonical_solution"]), rows))
        wrong = list(pool.map(lambda row: passes(row, "    return None\n"), rows))
    assert [row["task_id"] for row, passed in zip(rows, right, strict=True) if not passed] == []
    assert [row["task_id"] for row, passed in zip(rows, wrong, strict=True) if passed] == []
    assert len(rows) == 164
