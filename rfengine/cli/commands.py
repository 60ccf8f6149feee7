"""Every command of the command line, its options and what runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from reprlib import repr as shortened
from typing import Annotated, Any

import tyro

from rfengine.benchmark.options import ThroughputOptions
from rfengine.cli import bench, calibrate, client, convert, doctor, export_vae, generate, parity, serve, train
from rfengine.cli import eval as evaluate
from rfengine.cli.terminal import exit_status_of, stops_as_interrupt
from rfengine.torchrun import started_ranks

Options = (
    Annotated[generate.GenerateOptions, tyro.conf.subcommand("generate")]
    | Annotated[serve.ServeOptions, tyro.conf.subcommand("serve")]
    | Annotated[client.ClientOptions, tyro.conf.subcommand("client")]
    | Annotated[convert.ConvertOptions, tyro.conf.subcommand("convert")]
    | Annotated[parity.ParityOptions, tyro.conf.subcommand("parity")]
    | Annotated[doctor.DoctorOptions, tyro.conf.subcommand("doctor")]
    | Annotated[ThroughputOptions, tyro.conf.subcommand("bench")]
    | Annotated[calibrate.CalibrateOptions, tyro.conf.subcommand("calibrate")]
    | Annotated[export_vae.ExportVAEOptions, tyro.conf.subcommand("export-vae")]
    | Annotated[train.TrainOptions, tyro.conf.subcommand("train")]
    | Annotated[evaluate.EvalOptions, tyro.conf.subcommand("eval")]
)


_RUN: dict[type, Callable[[Any], int]] = {
    generate.GenerateOptions: generate.run,
    serve.ServeOptions: serve.run,
    client.ClientOptions: client.run,
    convert.ConvertOptions: convert.run,
    parity.ParityOptions: parity.run,
    doctor.DoctorOptions: doctor.run,
    ThroughputOptions: bench.run,
    calibrate.CalibrateOptions: calibrate.run,
    export_vae.ExportVAEOptions: export_vae.run,
    train.TrainOptions: train.run,
    evaluate.EvalOptions: evaluate.run,
}


def run_command(arguments: Sequence[str] | None) -> int:
    """Read the arguments, those of the process where they are None, and run what they ask for; returns the
    exit status."""

    def run() -> int:
        _refuse_text_as_option(sys.argv[1:] if arguments is None else arguments)
        options = tyro.cli(
            Options,
            prog="rfengine",
            description="Streaming text-to-video in real time.",
            args=arguments,
            config=(tyro.conf.DisallowNone,),  # a prompt may be the word None
        )
        with stops_as_interrupt(own_process=arguments is None):
            _refuse_ranks(options)
            return _RUN[type(options)](options)

    return exit_status_of(run)


def _refuse_ranks(options: object) -> None:
    """Raises ValueError where torchrun started several processes of a command that is one."""
    ranks = started_ranks()
    if ranks > 1 and not isinstance(options, generate.GenerateOptions | train.TrainOptions):
        raise ValueError(
            f"torchrun started {ranks} processes and this command is one; several run `generate` or `train`"
        )


def _refuse_text_as_option(arguments: Sequence[str]) -> None:
    """Raises ValueError for a text that begins with two dashes: no option has a space in its name."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for text in options:
        name = text.partition("=")[0]
        if name.startswith("--") and " " in name:
            raise ValueError(
                f"{shortened(text)} begins with dashes and is no option; put -- before a prompt that does, "
                "after all options"
            )
