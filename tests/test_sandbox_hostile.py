"""Programs that mean harm: none does any, and the next verdict is unaffected.

Every program defines `double`, which returns what it achieved; the tests, out of its reach, say what that should be.
"""

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from ebft.sandbox import Limits, Program, Verdict, available_languages
from sandboxes import ATTEMPT, GOOD, HERE, NODE, achieves, every, modes, run, sandbox, still_judges, strong

NO_PASS = {Verdict.FAILED, Verdict.TIMED_OUT, Verdict.OUT_OF_MEMORY}

# --- resources ---

EXHAUSTING = {
    "fork bomb": "def double(x):\n    while True: os.fork()",
    "stubborn fork bomb": "def double(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "fork bomb of sleepers": "def double(x):\n    while os.fork() >= 0: os.fork() or time.sleep(60)",
    "thread bomb": "def double(x):\n    while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "balloon": "def double(x):\n    a = []\n    while True: a.append(bytearray(10**7))",
    "balloon at once": "a = [0] * 10**10",
    "balloon that hides its error": "def double(x):\n    a = []\n    while True:\n"
    "        try: a.append(bytes(10**6))\n        except MemoryError: pass",
    "balloons": "def double(x):\n    for i in range(6):\n        if not os.fork():\n"
    "            a = b'x' * (64 << 20)\n            time.sleep(60)\n    time.sleep(60)",
    "output": "def double(x):\n    while True: print('passed' * 1000)",
    "output in small pieces": "def double(x):\n    while True: os.write(2, b'x')",
    "output by children": "def double(x):\n    for i in range(4):\n"
    "        if not os.fork(): os.execv('/usr/bin/yes', ['yes'])\n    time.sleep(60)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef double(x): return double(x)",
    "recursion in C": "def double(x):\n    a = []\n    for i in range(10**6): a = [a]\n    return a",
    "giant integer": "def double(x): return 9 ** 9 ** 9",
    "giant text": "def double(x): return 'x' * (60 << 20)",
    "busy children": "def double(x):\n    for i in range(3): os.fork()\n    while True: pass",
    "stops itself": "def double(x): os.kill(os.getpid(), 19)",
    "files": "def double(x):\n    for i in range(10**6): open(str(i), 'w').close()",
}
EXHAUSTING_VERDICTS = {
    "balloon": {Verdict.OUT_OF_MEMORY},
    "balloon at once": {Verdict.OUT_OF_MEMORY},
    "balloons": {Verdict.OUT_OF_MEMORY},
    "output": {Verdict.FAILED},
    "output in small pieces": {Verdict.FAILED, Verdict.TIMED_OUT},
    "busy children": {Verdict.TIMED_OUT},
    "stops itself": {Verdict.TIMED_OUT},
    "giant integer": {Verdict.TIMED_OUT, Verdict.OUT_OF_MEMORY},
}


@strong
@pytest.mark.parametrize("name", EXHAUSTING)
def test_exhausting(layer, name):
    code = "import os, time, threading\n" + EXHAUSTING[name]
    started = time.monotonic()
    outcome = run(layer, code, GOOD[1])
    assert outcome.verdict in EXHAUSTING_VERDICTS.get(name, NO_PASS), outcome
    assert time.monotonic() - started < 60  # no measurement: it ended
    still_judges(layer)


@every
@pytest.mark.parametrize("name", ["balloon", "balloons", "output"])  # nothing that multiplies, in the weak layer
def test_exhausting_together_and_weakly(layer, name):
    code = "import os, time, threading\n" + EXHAUSTING[name]
    outcome = run(layer, code, GOOD[1], apart=False)
    assert outcome.verdict in EXHAUSTING_VERDICTS.get(name, NO_PASS), outcome
    still_judges(layer)


@strong
def test_the_kernel_itself_limits_processes(layer):
    """Not only the keeper, which looks now and then: forks fail at the limit."""
    body = """
count = 0
try:
    for i in range(200):
        if not os.fork():
            time.sleep(3)
            os._exit(0)
        count += 1
except BlockingIOError:
    pass
return count < 20
"""
    achieves(layer, body, "True", before="import os, time")


@strong
def test_a_full_folder_is_an_error_of_the_program(layer):
    body = """
total = 0
try:
    for i in range(100):
        with open(f"/tmp/{i}", "wb", buffering=0) as file:
            total += file.write(bytes(1 << 20))
except OSError:
    pass
return 2 << 20 < total <= 4 << 20
"""
    achieves(layer, body, "True")


@strong
def test_memory_that_no_limit_counts_is_not_to_be_had(layer):
    body = """
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result == -1: raise OSError(ctypes.get_errno())
return attempt(
    ("memfd", lambda: os.memfd_create("x")),
    ("shm", lambda: checked(libc.shmget(0, 1 << 30, 0o1600))),
    ("user namespace", lambda: checked(libc.unshare(0x10000000))),
    ("mount", lambda: checked(libc.mount(b"x", b"/tmp", b"tmpfs", 0, None))),
    ("more memory", lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))),
)
"""
    achieves(layer, body, before=ATTEMPT + "import ctypes, resource")


# --- the machine outside ---


@strong
@modes
def test_files_outside(layer, apart, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    way_to_python = {part for path in available_languages().values() for part in Path(path).parts}
    body = f"""
places = [{str(tmp_path)!r}, "/", "/usr", "/dev", "/etc", "/sandbox", os.path.dirname(os.__file__), os.getcwd()]
return attempt(
    ("read", lambda: open({str(victim)!r}).read()),
    ("write", lambda: open({str(victim)!r}, "r+").write("yours")),
    ("passwords", lambda: open("/etc/passwd").read()),
    ("this file", lambda: open({__file__!r}).read()),
    ("home", lambda: set(os.listdir({str(Path.home())!r})) - {way_to_python!r} or 1 / 0),
    *((place, lambda place=place: open(place + "/new", "w").write("yours")) for place in places),
)
"""
    achieves(layer, body, "['/tmp']", apart)
    assert victim.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["victim.txt"]


@strong
def test_interpreter_cannot_be_deleted(layer):
    body = """
shutil.rmtree(os.path.dirname(json.__file__), ignore_errors=True)
shutil.rmtree("/sandbox", ignore_errors=True)
return attempt(
    ("remove", lambda: os.remove(sys.executable)),
    ("truncate", lambda: os.truncate(os.__file__, 0)),
    ("mode", lambda: os.chmod(sys.executable, 0o777)),
)
"""
    achieves(layer, body, before=ATTEMPT + "import json, shutil, sys")
    assert subprocess.run([available_languages()["python"], "-c", "import ast, json"], check=False).returncode == 0


@every
@modes
def test_environment_and_descriptors_of_the_parent(layer, apart, monkeypatch, tmp_path):
    monkeypatch.setenv("HUB_TOKEN", "s3cret-token")
    secret = tmp_path / "secret.txt"
    secret.write_text("s3cret-token")
    body = """
seen = repr(os.environ)
for path in glob.glob("/proc/*/environ") if os.getpid() < 100 else ["/proc/self/environ"]:
    try: seen += open(path).read()
    except OSError: pass
for fd in range(256):
    try: seen += os.pread(fd, 100, 0).decode()
    except OSError: pass
    try: os.fstat(fd)
    except OSError: continue
    seen += f" fd{fd}"
return "s3cret" in seen, [fd for fd in range(256) if f" fd{fd}" in seen]
"""
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        achieves(layer, body, "(False, [0, 1, 2, 3, 4])", apart, before="import glob, os")


@strong
@modes
def test_network(layer, apart):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        name = f"\0{uuid.uuid4().hex}"
        local.bind(name)
        local.listen()
        body = f"""
def connect(family, address):
    with socket.socket(family) as client:
        client.settimeout(1)
        client.connect(address)
return attempt(
    ("loopback", lambda: connect(socket.AF_INET, {server.getsockname()!r})),
    ("loopback 6", lambda: connect(socket.AF_INET6, ("::1", {server.getsockname()[1]}))),
    ("abstract", lambda: connect(socket.AF_UNIX, {name!r})),
    ("outside", lambda: connect(socket.AF_INET, ("192.0.2.1", 80))),
    ("host of a virtual machine", lambda: socket.socket(40)),
    ("kernel", lambda: socket.socket(16, socket.SOCK_RAW)),
    ("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW)),
)
"""
        achieves(layer, body, apart=apart, before=ATTEMPT + "import socket")
        for listener in (server, local):
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()


SIGNALS = {
    "parent": "os.kill(os.getppid(), 9)",
    "everything": "os.kill(-1, 9)",
    "stop everything": "os.kill(-1, 19)",
    "group": "os.killpg(0, 9)",
    "first": "os.kill(1, 9)\nreturn 7",
    "by name": "for p in glob.glob('/proc/[0-9]*'):\n"
    "    if b'python' in open(p + '/cmdline', 'rb').read(): os.kill(int(p[6:]), 9)",
    "by number": "for p in range(2, 5000):\n    try: os.kill(p, 9)\n    except OSError: pass",
}


@strong
@modes
@pytest.mark.parametrize("name", SIGNALS)
def test_signals(layer, apart, name):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    body = "".join(f"    {line}\n" for line in SIGNALS[name].splitlines())
    outcome = run(layer, f"import glob, os\ndef double(x):\n{body}", GOOD[1], apart)
    assert outcome.verdict in NO_PASS
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    still_judges(layer)


# --- what outlives the run ---

OUTLIVING = {
    "child": "subprocess.Popen(sleeper)",
    "daemon": "if not os.fork():\n    os.setsid()\n    if not os.fork(): os.execv(sleeper[0], sleeper)\n"
    "    os._exit(0)",
    "deaf": "subprocess.Popen(['/bin/sh', '-c', 'trap \"\" TERM HUP INT; sleep 61', *sleeper])",
    "thread": "threading.Thread(target=subprocess.run, args=(sleeper,)).start()",
    "many": "for i in range(8): subprocess.Popen(sleeper, start_new_session=True)",
}


def processes_with(marker):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it has just ended
            continue
    return found


@every
@modes
@pytest.mark.parametrize("name", OUTLIVING)
def test_nothing_outlives_the_run(layer, apart, name):
    marker = uuid.uuid4().hex
    body = "".join(f"    {line}\n" for line in OUTLIVING[name].splitlines())
    code = (
        "import os, subprocess, sys, threading, time\n"
        f"sleeper = [sys.executable, '-c', 'import time; time.sleep(61)', '{marker}']\n"
        f"def double(x):\n{body}    time.sleep(0.2)\n    return 2 * x\n"
    )
    assert run(layer, code, GOOD[1], apart).verdict is Verdict.PASSED  # it does what the tests ask
    assert processes_with(marker) == []
    still_judges(layer)


@every
def test_nothing_outlives_a_run_that_is_killed(layer):
    marker = uuid.uuid4().hex
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass', '{marker}']).wait()"
    assert run(layer, code, "").verdict is Verdict.TIMED_OUT
    assert processes_with(marker) == []


@pytest.mark.parametrize("layer", [name for name in HERE if name == "weak"])
def test_weak_layer_leaves_no_folder(layer):
    code = "import os\nopen('left', 'w').write('x')\nos.mkdir('a')\ndef double(x): return os.getcwd()"
    outcome = run(layer, code, "raise RuntimeError(double(1))", apart=True)
    folder = outcome.detail.split()[1]
    assert "sandbox-" in folder and not os.path.exists(folder)


@NODE
@strong
def test_hostile_javascript(layer):
    code = (
        "const fs = require('fs'), net = require('net'), child = require('child_process');\n"
        "const done = [];\n"
        "for (const [name, step] of [['read', () => fs.readFileSync('/etc/passwd')],\n"
        "    ['write', () => fs.writeFileSync('/usr/x', 'x')], ['ok', () => fs.writeFileSync('/tmp/x', 'x')]])\n"
        "  try { step(); done.push(name); } catch (error) {}\n"
        "child.spawn('/bin/sleep', ['61'], { detached: true, stdio: 'ignore' }).unref();\n"
    )
    tests = (
        "const names = Object.keys(process.env).filter((name) => name !== 'PWD').sort();\n"
        "require('node:assert').deepEqual([done, names], [['ok'], ['HOME', 'LANG', 'PATH', 'TMPDIR']]);"
    )
    outcome = sandbox(layer).run(Program(code, tests, language="javascript"))
    assert outcome.verdict is Verdict.PASSED, outcome
    still_judges(layer)


@strong
def test_hostile_programs_beside_good_ones(layer):
    """Workers at the same time: a fork bomb next door takes no process from a good program."""
    bomb = Program(
        "import os\n" + EXHAUSTING["fork bomb of sleepers"].replace("time", "os"), GOOD[1], entry_point="double"
    )
    balloon = Program(EXHAUSTING["balloon"], GOOD[1], entry_point="double")
    good = Program(*GOOD, entry_point="double")
    outcomes = sandbox(layer, Limits(wall_seconds=5, cpu_seconds=1, memory_mib=192)).run_all(
        [bomb, good, balloon, good] * 2
    )
    assert [outcome.verdict is Verdict.PASSED for outcome in outcomes] == [False, True] * 4
