"""Programs that ask for a pass they have not earned: none gets it; what only two processes can prevent is known."""

import pytest

from ebft.sandbox import Verdict
from sandboxes import ATTEMPT, GOOD, achieves, modes, run, still_judges, strong, strongest

FAKES = {
    "exits": "import os\nos._exit(0)",
    "exits politely": "import sys\nsys.exit(0)",
    "exits when called": "import os\ndef double(x): os._exit(0)",
    "exits politely when called": "import sys\ndef double(x): sys.exit(0)",
    "exits later": "import atexit, os\natexit.register(os._exit, 0)\nimport sys\nsys.exit(0)",
    "interrupts": "def double(x): raise KeyboardInterrupt",
    "generator exit": "def double(x): raise GeneratorExit",
    "prints": "print('passed')\nprint('P' + 'ok')\nimport os\nos.write(2, b'passed')\nos._exit(0)",
    "writes everywhere": "import os\nfor fd in range(256):\n    for text in (b'passed', b'P', bytes(7) + b'\\1P'):\n"
    "        try: os.write(fd, text)\n        except OSError: pass\nos._exit(0)",
    "guesses the nonce": "import os\nos.write(4, (33).to_bytes(8, 'big') + b'P' + b'0' * 32)\nos._exit(0)",
    "becomes another": "import os\nos.execv('/bin/true', ['true'])",
    "no assertions": "import builtins\nbuiltins.AssertionError = None\n"
    "builtins.exec = builtins.compile = lambda *a, **k: 0\ndef double(x): return 0",
    "replaces the harness": "import sys\nfor name, module in list(sys.modules.items()):\n"
    "    if name.startswith('inside'):\n        for key in ('judge', 'failure', 'watch', 'encode', 'take_answer'):\n"
    "            setattr(module, key, lambda *a, **k: b'P')\ndef double(x): return 0",
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = lambda *a: None\ndef double(x): return 0",
    "closes its pipes": "import os\nos.closerange(0, 256)\ndef double(x): return 8",
    "answers early": "import os\nfor fd in range(3, 20):\n    try: os.write(fd, (4).to_bytes(8, 'big') + b'(2:T')\n"
    "    except OSError: pass\ndef double(x): return 0",
    "answers without end": "import os\ndef double(x): os.write(4, (1 << 60).to_bytes(8, 'big') + b'x' * 100)",
}


@strongest
@modes
@pytest.mark.parametrize("name", FAKES)
def test_fake_pass(layer, apart, name):
    outcome = run(layer, FAKES[name], GOOD[1], apart)
    assert outcome.verdict is Verdict.FAILED, outcome
    still_judges(layer)


EARNED_NOWHERE = {
    "equal to everything": "class Equal:\n    def __eq__(self, other): return True\ndef double(x): return Equal()",
    "number equal to everything": "class Equal(int):\n    def __eq__(self, other): return True\n"
    "def double(x): return Equal(3)",
    "walks the frames": "import sys\ndef double(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for value in list(frame.f_locals.values()):\n"
    "            if isinstance(value, str) and 'assert double' in value:\n"
    "                return int(value.split('==')[1])\n        frame = frame.f_back",
    "runs the protocol itself": "import os, sys\nsys.path.append('/sandbox')\nfrom inside import wire\n"
    "wire.send(4, b'R')\nparts = [wire.receive(3) for i in range(3)]\nwire.send(4, b'P' + parts[2])\nos._exit(0)",
}


@strongest
@pytest.mark.parametrize("name", EARNED_NOWHERE)
def test_what_only_one_process_lets_pass(layer, name):
    """The holes that docs/sandbox.md tells of: two processes close them, one process does not."""
    assert run(layer, EARNED_NOWHERE[name], GOOD[1], apart=True).verdict is Verdict.FAILED
    assert run(layer, EARNED_NOWHERE[name], GOOD[1], apart=False).verdict is Verdict.PASSED
    still_judges(layer)


@strong
def test_expected_answers_are_not_in_reach(layer):
    """Neither in the candidate's memory, nor through the kernel from that of the processes around it."""
    body = """
seen = [str(x) for x in gc.get_objects() if "opensesame" in str(x)[:10000] and "harmless" not in str(x)]
others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]
tries = [(pid, name) for pid in others for name in ("mem", "maps", "environ", "fd", "fdinfo", "stack")]
opened = attempt(*((f"{pid}/{name}", lambda pid=pid, name=name: look(f"/proc/{pid}/{name}")) for pid, name in tries))
libc = ctypes.CDLL(None, use_errno=True)
attached = [pid for pid in others if libc.ptrace(16, int(pid), 0, 0) == 0]
return len(others) >= 2, seen, opened, attached
"""
    before = ATTEMPT + (
        "import ctypes, gc\n"
        "def look(path):\n    return os.listdir(path) if 'fd' in path else open(path, 'rb').read(100)\n"
    )
    secret = "(True, [], [], []) and 'open' + 'sesame'"  # put together in the tests alone
    achieves(layer, body, f"(True, [], [], []) if {secret} else 'opensesame'", before=before)
