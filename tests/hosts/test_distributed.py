"""DDP and FSDP2 around an accelerated model, and within: two processes on the CPU."""

import subprocess
import sys

import fastunet
import parallel
from fastunet.models import TOY, UNet


def test_two_processes_get_eagers_output_and_gradients(tmp_path):
    command = [sys.executable, parallel.__file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(parallel.SIZE)
    ]  # fmt: skip
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    report = fastunet.explain(UNet(TOY))
    sites = sum(report.replaced.values()) - report.replaced["time_embedding"]
    for printed, _ in results:
        counts = dict(line.split(": ") for line in printed.splitlines())
        # fully_shard makes a class of its own of each module that it is called with.
        sharded = int(counts.pop("accelerate() after fully_shard"))
        assert 0 < sharded < sites
        assert counts == {
            "accelerate() before DDP": str(sites),
            "accelerate() after DDP": str(sites),
            "accelerate() before fully_shard": str(sites),
        }
