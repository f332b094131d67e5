"""DDP and FSDP2 around an accelerated model, and within: two processes on the CPU."""

import os
import signal
import subprocess
import sys

import fastunet
import parallel
from fastunet.models import TOY, UNet


def test_two_processes_get_eagers_output_and_gradients(tmp_path):
    process = subprocess.Popen(
        [sys.executable, parallel.__file__, str(tmp_path)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # it and the two
    assert process.returncode == 0, errors
    report = fastunet.explain(UNet(TOY))
    sites = sum(report.replaced.values()) - report.replaced["time_embedding"]
    for rank in range(parallel.SIZE):
        lines = (tmp_path / f"{rank}.txt").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        # fully_shard makes a class of its own of each module that it is called with.
        sharded = int(counts.pop("accelerate() after fully_shard"))
        assert 0 < sharded < sites
        assert counts == {
            "accelerate() before DDP": str(sites),
            "accelerate() after DDP": str(sites),
            "accelerate() before fully_shard": str(sites),
        }
