"""`rfengine bench`: frames per second of this machine, end to end and part by part, or by named protocols."""

from __future__ import annotations

from rfengine.benchmark.options import ThroughputOptions
from rfengine.cli.terminal import find_device


def run(options: ThroughputOptions) -> int:
    from rfengine.benchmark import throughput
    from rfengine.benchmark.protocols import session

    find_device(options.device)
    find_device(options.runtime.decode_device, "--decode-device")
    return session.run(options) if options.protocol else throughput.run(options)
