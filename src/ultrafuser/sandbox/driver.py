"""The program inside the sandbox: it limits itself, runs an answer and then its tests, and reports over one socket.

It runs under `python -I -S`, so it imports the standard library only. Once the answer has run, nothing that can be reached
by name can be trusted. Everything that is needed afterwards is held in local variables before.

Each request is a line with a JSON object: {"uid", "limits", "module", "setup", "answer"}, then, after `ready`,
{"tests", "proof"}. Each reply is a line: `started`, `ready`, and at the end the proof, `memory: ...` or `failed: ...`.
"""

import fcntl
import json
import os
import resource
import sys
import types

MAX_DETAIL = 2000


def main(inherited: int) -> None:
    # Above the numbers that programs guess, below RLIMIT_NOFILE, and closed in every program that the answer starts.
    channel = fcntl.fcntl(inherited, fcntl.F_DUPFD_CLOEXEC, 8 + os.urandom(1)[0] % 40)
    os.close(inherited)
    requests = open(channel, "rb", closefd=False)
    request = json.loads(requests.readline())
    for name, value in request["limits"].items():
        limit(getattr(resource, name), value)
    if request["uid"] is not None:  # from root to a user that owns nothing. This gives up every capability too
        os.setgroups([])
        os.setresgid(request["uid"], request["uid"], request["uid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])
    judge(channel, requests, request)


def limit(which: int, value: int) -> None:
    """Set the soft and the hard limit to a value, or to the present hard limit if that is lower."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def judge(channel, requests, request) -> None:
    """Run setup, answer and tests in one namespace, then leave the process at once, before any code that the answer left."""
    # The answer may replace any of these in their modules.
    write, getpid, leave, loads = os.write, os.getpid, os._exit, json.loads
    run, build, explain = exec, compile, describe
    own_pid = getpid()
    module = types.ModuleType(request["module"])
    sys.modules[request["module"]] = module  # dataclasses, pickle and typing look a class up by its module

    def reply(line: bytes) -> None:
        if getpid() != own_pid:  # a process that the answer forked
            leave(1)
        line += b"\n"
        while line:
            line = line[write(channel, line) :]

    reply(b"started")
    try:
        for name in ("setup", "answer"):
            run(build(request[name], f"<{name}>", "exec", dont_inherit=True), module.__dict__)
        reply(b"ready")
        final = loads(requests.readline())
        run(build(final["tests"], "<tests>", "exec", dont_inherit=True), module.__dict__)
        reply(final["proof"].encode())
    except MemoryError:
        reply(b"memory: MemoryError")
    except BaseException as error:  # noqa: BLE001 - an answer may raise anything, SystemExit included
        reply(b"failed: " + explain(error))
    finally:
        leave(0)


def describe(error: BaseException) -> bytes:
    """One line: the error's type, its text, and the innermost line of the answer or its tests."""
    location, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file in ("<setup>", "<answer>", "<tests>"):
            location = f" ({file[1:-1]}, line {trace.tb_lineno})"
        trace = trace.tb_next
    try:
        text = str(error)[:MAX_DETAIL]
    except BaseException:  # noqa: BLE001 - str() may be the answer's own code
        text = "(no text)"
    words = [f"{type(error).__name__}:", *text.split()] if text.strip() else [type(error).__name__]
    return (" ".join(words) + location).encode("utf-8", "backslashreplace")


if __name__ == "__main__":
    main(int(sys.argv[1]))
