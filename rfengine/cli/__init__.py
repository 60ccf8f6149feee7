"""The command line: one module for each command, its options a dataclass, each error one sentence."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from rfengine.cli import bench, convert, doctor, export_vae, generate, parity, train
from rfengine.cli import eval as evaluate
from rfengine.cli.terminal import (
    CALLER_ERROR,
    INTERRUPTED,
    OTHER_ERROR,
    fail,
    one_line_warnings,
    termination_as_interrupt,
)
from rfengine.evaluation.throughput_options import ThroughputOptions

Options = (
    Annotated[generate.GenerateOptions, tyro.conf.subcommand("generate")]
    | Annotated[convert.ConvertOptions, tyro.conf.subcommand("convert")]
    | Annotated[parity.ParityOptions, tyro.conf.subcommand("parity")]
    | Annotated[doctor.DoctorOptions, tyro.conf.subcommand("doctor")]
    | Annotated[ThroughputOptions, tyro.conf.subcommand("bench")]
    | Annotated[export_vae.ExportVAEOptions, tyro.conf.subcommand("export-vae")]
    | Annotated[train.TrainOptions, tyro.conf.subcommand("train")]
    | Annotated[evaluate.EvalOptions, tyro.conf.subcommand("eval")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a failure, 2 for wrong input, 130 after Ctrl-C."""
    options = tyro.cli(
        Options,
        prog="rfengine",
        description="Streaming text-to-video in real time.",
        args=arguments,
        config=(tyro.conf.DisallowNone,),  # a prompt may be the word None
    )
    commands: dict[type, Callable[[Any], int]] = {
        generate.GenerateOptions: generate.run,
        convert.ConvertOptions: convert.run,
        parity.ParityOptions: parity.run,
        doctor.DoctorOptions: doctor.run,
        ThroughputOptions: bench.run,
        export_vae.ExportVAEOptions: export_vae.run,
        train.TrainOptions: train.run,
        evaluate.EvalOptions: evaluate.run,
    }
    with one_line_warnings(), termination_as_interrupt():
        try:
            return commands[type(options)](options)
        except ValueError as error:
            return fail(error, CALLER_ERROR)
        except (RuntimeError, OSError) as error:
            return fail(error, OTHER_ERROR)
        except KeyboardInterrupt as error:
            if arguments is None:  # the process ends here: a second Ctrl-C must not break its last words
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return fail(f"interrupted; {str(error) or 'nothing was written'}", INTERRUPTED)
