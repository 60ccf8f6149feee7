"""One run of `rfengine bench --protocol`: each protocol in turn is measured, put into the file and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from rfengine.benchmark.agreement import check_agreement
from rfengine.benchmark.conditions import peak_memory, reset_peak_memory, state, versions
from rfengine.benchmark.measured_engine import MeasuredEngine, device_of, setting_of
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.protocols.plan import Plan, planned
from rfengine.benchmark.protocols.protocol import Protocol, Rival, Setting, Trial
from rfengine.benchmark.protocols.repetition import differs
from rfengine.benchmark.protocols.report import render, render_machine
from rfengine.files import write_text
from rfengine.presets import PRESETS

Record = dict[str, Any]


def run(options: ThroughputOptions) -> int:
    """Measure the protocols of `options`. The file has a JSON list of those that have ended; with - each is a
    line of JSON, and else a table. Returns the exit status: 1 where a stream that was made again differs.
    Raises RuntimeError with the name of a protocol that failed, after which none is measured."""
    plans, records = planned(options), list[Record]()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    to_terminal = str(options.json) == "-"
    place = "were shown" if options.json is None or to_terminal else f"are in {options.json}"
    try:
        for record in measured(plans):
            records.append(record)
            try:
                if options.json is not None and not to_terminal:
                    write_text(options.json, json.dumps(records, indent=2) + "\n")
            finally:  # a full disk takes no figure along
                if not to_terminal and len(records) == 1:
                    print(render_machine(record))
                print(json.dumps(record) if to_terminal else render(record), flush=True)
    except RuntimeError as error:
        failed = f"the protocol {plans[len(records)].protocol.name} failed: {error}"
        ended = f"; {len(records)} of {len(plans)} protocols {place}" if records else ""
        raise RuntimeError(failed + ended) from error
    except KeyboardInterrupt:
        if not records:
            raise
        raise KeyboardInterrupt(f"{len(records)} of {len(plans)} protocols {place}") from None
    return int(any(differs(run["figures"]) for record in records for run in record["runs"]))


def measured(plans: list[Plan]) -> Iterator[Record]:
    """The record of each protocol as it ends. Raises WrongEngineError for an engine that is wrong."""
    engines, known = ComparedEngines(), versions(device_of(plans[0].settings[0].options.device))
    for plan in plans:
        protocol = plan.protocol
        runs = [_measured_run(protocol, setting, engines) for setting in plan.settings]
        setting = runs[0].pop("setting")
        for each in runs[1:]:
            del each["setting"]
        yield {
            "protocol": protocol.name,
            "summary": protocol.summary,
            "inside": list(protocol.inside),
            "outside": list(protocol.outside),
            "fixed": {
                "system": protocol.system, "vae": protocol.vae, "context_pass": protocol.context_pass,
                "frames": protocol.frames,
            },
            **setting,
            "versions": known,
            "runs": runs,
            "rivals": [_beside(rival, setting, runs) for rival in protocol.rivals],
        }  # fmt: skip


def _measured_run(protocol: Protocol, setting: Setting, engines: ComparedEngines) -> Record:
    engine, agreement = engines.load(setting)
    device, described = engine.device, _setting(engine, setting.options)
    graphs = described.pop("graphs")
    trial = Trial(setting, protocol.frames, engine)
    del engine  # the trial alone holds it, so that it can be released
    before = state(device)
    reset_peak_memory(device)
    figures = protocol.measure(trial)
    is_known = device.type == "cuda" and trial.engine is not None  # on a CPU it is that of the process
    peak = peak_memory(device) if is_known else None
    return {
        "graphs": graphs, "figures": figures, "peak_memory_bytes": peak,
        "before": before, "after": state(device), "agreement": agreement,
        "setting": described,
    }  # fmt: skip


def _setting(engine: MeasuredEngine, options: ThroughputOptions) -> Record:
    described = setting_of(engine, options)
    del described["chunks"]  # a figure, where a protocol has any
    model = engine.pipeline.config.model
    return described | {
        "preset": next((name for name, preset in PRESETS.items() if preset.model == model), None),
        "text": "encoded" if engine.encodes_text else "states given",
        "runtime": {name: value for name, value in asdict(options.runtime).items() if name != "graphs"},
    }


def _beside(rival: Rival, setting: Record, runs: list[Record]) -> Record:
    differences = rival.differences(setting)
    return asdict(rival) | {
        "differences": differences,
        "ratios": None if differences else [rival.ratio(run["figures"]) for run in runs],
    }


class ComparedEngines:
    """Engines whose first chunks agree with the reference. What computes the same is compared once: with
    graphs where they are measured too, since the first chunks of such a stream run op by op."""

    def __init__(self) -> None:
        self._agreements: dict[tuple[Any, ...], list[Record]] = {}

    def load(self, setting: Setting) -> tuple[MeasuredEngine, list[Record]]:
        """The engine and its agreement. Raises WrongEngineError for one that does not agree."""
        engine = setting.load()
        config, dtype = engine.pipeline.config, engine.pipeline.model.dtype
        config = replace(config, runtime=replace(config.runtime, graphs=None))
        computes = (config, dtype, engine.grid, engine.decodes, engine.context_pass)
        if computes not in self._agreements:
            # FP8 frames are held to a PSNR when the decoder is opened
            held = engine.decoder if setting.options.runtime.vae_precision != "fp8" else None
            found = check_agreement(engine.pipeline, engine.grid, held, setting.context_pass)
            self._agreements[computes] = [asdict(agreement) for agreement in found]
        return engine, self._agreements[computes]
