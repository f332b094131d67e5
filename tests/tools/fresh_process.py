"""Code in processes of their own that have imported torch and nothing of ours yet.

To import torch takes seconds, so one process does it, and each piece of code runs in a fork.
"""

import ast
import os
import subprocess
import sys
from typing import Any

_SERVER = """
import ast, os, sys, traceback
import torch
assert not {"fastunet", "triton"} & {*sys.modules}
for line in sys.stdin:
    code, environment = ast.literal_eval(line)
    if os.fork() == 0:
        os.environ.update(environment)
        status = 0
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print("ended with", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


class FreshProcess:
    """To be used in a ``with`` block, at the end of which the process that forks ends."""

    def __enter__(self) -> "FreshProcess":
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTUNET_", "TRITON_"))}
        self._server = subprocess.Popen(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", _SERVER],
            env=clean | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=os.path.dirname(__file__),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.communicate()

    def run(self, code: str, **environment: str) -> Any:
        """The last line that the code prints, as a value; or that of its error, as it is."""
        assert self._server.stdin is not None and self._server.stdout is not None
        print((code, environment), file=self._server.stdin, flush=True)
        lines: list[str] = []
        for line in self._server.stdout:
            if line.startswith("ended with "):
                break
            lines.append(line.strip())
        else:
            raise RuntimeError(f"the process that forks has ended: {lines}")
        last = lines[-1] if lines else "None"
        return ast.literal_eval(last) if line == "ended with 0\n" else last
