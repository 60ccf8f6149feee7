"""Exported decoder graphs in onnxruntime on the CPU, node by node and chunk by chunk against PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from rfengine.accuracy import relative_error
from rfengine.export.decoder_graphs import PIXELS, DecoderGraph, state_output
from rfengine.export.onnx_export import STAGES, export_graph, missing_packages
from rfengine.models.vae import WanVAE

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

_CHUNKS = 3  # the first graph once, the steady one with a history of it and with one of its own


@dataclass(frozen=True, slots=True)
class Agreement:
    """Largest differences of a stream that onnxruntime decodes.

    pixels: absolute, against WanVAE.decode with its own state. state: of every slot, and nodes: of node_count
    values inside both graphs against PyTorch's for the same inputs, both relative in the norm of a tensor. (A
    single value has no bound: where all channels of a pixel are near zero, ChannelNorm divides rounding by
    next to nothing.)
    """

    chunks: int
    pixels: float
    state: float
    nodes: float
    node_count: int

    @property
    def worst(self) -> float:
        return max(self.pixels, self.state, self.nodes)

    def __str__(self) -> str:
        return (
            f"{self.chunks} chunks agree to {self.pixels:.1e} in pixels, {self.state:.1e} in the state and "
            f"{self.nodes:.1e} in {self.node_count} values inside"
        )


class _Recorder(fx.Interpreter):
    """Runs a traced program and keeps the value of every node under the name that the exporter gives it."""

    def __init__(self, program: ONNXProgram) -> None:
        super().__init__(program.exported_program.module(check_guards=False))
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            self.values[n.name] = value
        return value


class _Session:
    """One graph in onnxruntime; its outputs include every value that PyTorch has too."""

    def __init__(self, graph: DecoderGraph) -> None:
        import onnxruntime

        program = export_graph(graph)
        self.graph = graph
        self.recorder = _Recorder(program)
        nodes = self.recorder.module.graph.nodes
        traced = {node.name for node in nodes if node.op == "call_function"}
        model = program.model_proto
        inner = [value for value in model.graph.value_info if value.name in traced]
        model.graph.output.extend(inner)
        self.inner_names = [value.name for value in inner]
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def run(self, *given: Tensor) -> tuple[dict[str, Tensor], float]:
        """The outputs by name, and the largest relative difference of a value inside."""
        names = [*self.graph.output_names, *self.inner_names]
        feed = {name: tensor.numpy() for name, tensor in zip(self.graph.input_names, given, strict=True)}
        answers = dict(zip(names, map(torch.from_numpy, self.session.run(names, feed)), strict=True))
        self.recorder.run(*given)
        worst = 0.0
        for name in self.inner_names:
            worst = max(worst, relative_error(answers[name], self.recorder.values[name]))
        return {name: answers[name] for name in self.graph.output_names}, worst


@torch.no_grad()
def check_in_onnxruntime(vae: WanVAE, latents: int, height: int, width: int) -> Agreement:
    """Decode a stream of chunks of noise with both graphs in onnxruntime on the CPU and with `vae`; compare.

    Both graphs are exported at height x width pixels in the dtype of `vae`, float32 or float16; onnxruntime
    carries its own state from call to call. Raises RuntimeError when a package is missing.
    """
    if missing_packages("onnxruntime"):
        raise RuntimeError("onnxruntime cannot be imported and the check needs it; pip install onnxruntime")
    stride = vae.config.spatial_stride
    size = (height // stride, width // stride)
    sessions = [_Session(DecoderGraph(vae, latents, *size, first=stage == "first")) for stage in STAGES]
    state = vae.decoder_state(1, *size, vae.conv2.weight.dtype, "cpu")
    generator = torch.Generator().manual_seed(0)
    slots: dict[str, Tensor] = {}
    of_pixels, of_state, of_nodes = 0.0, 0.0, 0.0
    for chunk in range(_CHUNKS):
        session = sessions[min(chunk, 1)]
        noise = torch.randn(
            session.graph.latents_shape, generator=generator, dtype=torch.float32, device="cpu"
        )
        outputs, inner = session.run(noise, *(slots.values() if chunk else ()))
        pixels = vae.decode(noise, state)
        held = state.tensors()
        slots = {name: outputs.get(state_output(name), torch.zeros_like(slot)) for name, slot in held.items()}
        of_pixels = max(of_pixels, (outputs[PIXELS].float() - pixels.float()).abs().max().item())
        of_state = max(of_state, *(relative_error(slots[name], slot) for name, slot in held.items()))
        of_nodes = max(of_nodes, inner)
    count = sum(len(session.inner_names) for session in sessions)
    return Agreement(_CHUNKS, of_pixels, of_state, of_nodes, count)
