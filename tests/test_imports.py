"""Holds the layering table of docs/architecture.md against the code, and imports the package on its own.

A unit is a module or a subpackage directly below rfengine/. The table may name units that are not built yet.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rfengine"

LAYERS = [
    {"files", "limits", "stop_signals", "version"},
    {"torchrun"},
    {
        "accuracy", "config", "config_json", "cuda_graph", "diffusion_forcing_config", "host_state", "memory",
        "nvtx_ranges", "prompt_blend", "prompts", "rotary", "runtime_config", "video",
    },
    {"tensor_parallel"},
    {"grid", "older_snapshot", "presets", "schedule", "snapshot_parts"},
    {"kernels"},
    {"ops"},
    {"cache"},
    {"models"},
    {"checkpoint"},
    {"costs", "toy"},
    {"tuning", "export"},
    {"runtime"},
    {"clip", "diffusers_call", "frame_chunk", "prompt_script", "rehearsal", "snapshot", "stream"},
    {"diffusion_forcing", "pipeline"},
    {"rfengine"},  # the names in rfengine/__init__.py
    {"calibration", "doctor", "evaluation", "parity", "serving"},
    {"benchmark", "training"},
    {"cli"},
]  # fmt: skip
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# who may import these at all
ONLY_FROM = {
    "kernels": {"ops"},
    "rfengine": {"benchmark", "cli", "doctor", "evaluation", "serving"},
}
# what these may not import although it lies below them
NEVER_INTO = {
    "training": {"runtime", "pipeline", "stream", "rfengine"},
    "serving": {"accuracy", "cuda_graph", "nvtx_ranges", "rotary", "tensor_parallel"}
    | {unit for units in LAYERS[5:13] for unit in units},
}
# heavy or optional packages: imported inside the function that needs them, wherever that is
ONLY_INSIDE_FUNCTIONS = {
    "av", "cuda", "diffusers", "flash_attn", "ftfy", "onnx", "onnxruntime", "pycuda", "tensorrt",
    "ray", "transformers", "triton",
}  # fmt: skip
# those of the server: its own modules may import them, and nothing outside imports those modules
OF_SERVING = {"aiohttp", "fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn", "websockets"}
# functions of torch that make a tensor of the default dtype on the default device
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "hann_window", "linspace",
    "logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip


def sources() -> list[Path]:
    kernels = (PACKAGE / "kernels").rglob("*.py")  # a link, which rglob does not enter on its own
    return sorted({*PACKAGE.rglob("*.py"), *kernels})


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def module_of(path: Path) -> str:
    """The dotted name of a source file: rfengine/cache/__init__.py is rfengine.cache."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def unit_of(module: str) -> str:
    """The unit a module lies in; the package itself is the unit rfengine."""
    return module.split(".")[1] if "." in module else module


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every import below `tree`: its line, and the dotted name of what is imported, module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def module_edges() -> Iterator[tuple[str, str, str]]:
    """Every import of one module of the package by another: where it stands, importer and imported."""
    modules = {module_of(path) for path in sources()}
    for path in sources():
        importer = module_of(path)
        for line, name in imported_names(tree_of(path)):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != importer:
                yield f"{path.relative_to(ROOT)}:{line}", importer, name


def unit_edges() -> Iterator[tuple[str, str, str]]:
    """module_edges between different units, by the names of the units."""
    for place, importer, imported in module_edges():
        if unit_of(importer) != unit_of(imported):
            yield place, unit_of(importer), unit_of(imported)


def test_every_unit_stands_in_the_layering_table() -> None:
    assert {unit_of(module_of(path)) for path in sources()} - set(LEVEL) == set()


def test_imports_are_absolute() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_an_import_only_goes_down() -> None:
    upward = [
        f"{place}: {importer} imports {imported}"
        for place, importer, imported in unit_edges()
        if LEVEL.get(imported, 0) > LEVEL.get(importer, len(LAYERS))
    ]
    assert upward == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, importer, imported in module_edges():
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' -> '.join(error.args[1])}")


def test_packages_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, importer, imported in unit_edges():
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle of packages: {' -> '.join(error.args[1])}")


def test_nothing_changes_where_python_looks_for_modules() -> None:
    changes = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "site.addsitedir")
    ]
    assert changes == []


def test_only_the_named_units_import_kernels_and_the_public_names() -> None:
    strangers = [
        f"{place}: {importer} imports {imported}"
        for place, importer, imported in unit_edges()
        if importer not in ONLY_FROM.get(imported, {importer})
    ]
    assert strangers == []


def test_training_and_serving_keep_to_their_own_ground() -> None:
    trespasses = [
        f"{place}: {importer} imports {imported}"
        for place, importer, imported in unit_edges()
        if imported in NEVER_INTO.get(importer, set())
    ]
    assert trespasses == []


def test_kernels_need_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    others = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources()
        if unit_of(module_of(path)) == "kernels"
        for line, name in imported_names(tree_of(path))
        if name.partition(".")[0] not in allowed and not name.startswith("rfengine.kernels")
    ]
    assert others == []


def test_heavy_packages_are_imported_inside_functions() -> None:
    at_import_time = []
    for path in sources():
        unit = unit_of(module_of(path))
        if unit == "kernels":  # a kernel is Triton code; ops.py loads it when it is asked for
            continue
        forbidden = ONLY_INSIDE_FUNCTIONS if unit == "serving" else ONLY_INSIDE_FUNCTIONS | OF_SERVING
        for node in statements_run_at_import(tree_of(path)):
            names = {name for _, name in imported_names(node)}
            heavy = {name.partition(".")[0] for name in names} & forbidden
            if unit != "serving":
                heavy |= {name for name in names if name.startswith("rfengine.serving")}
            at_import_time += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in sorted(heavy)]
    assert at_import_time == []


def statements_run_at_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """The import statements that run when the module is imported: not in functions, not for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from statements_run_at_import(node)


def in_fresh_interpreter(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_rfengine_needs_torch_alone_and_touches_no_cuda() -> None:
    loaded = in_fresh_interpreter(
        "import sys, torch\n"
        "def refuse(*args, **kwargs): raise AssertionError('CUDA was asked for at import')\n"
        "names = ['_lazy_init', 'is_available', 'device_count', 'current_device', 'get_device_properties']\n"
        "for name in names: setattr(torch.cuda, name, refuse)\n"
        "before = set(sys.modules)\n"
        "import rfengine, rfengine.runtime.chunk_runner\n"
        "for name in rfengine.__all__: assert getattr(rfengine, name)\n"
        "assert 'nvtx' not in sys.modules\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    )
    assert set(loaded.split()) - set(sys.stdlib_module_names) - {"torch", "rfengine"} == set()


@pytest.mark.parametrize("module", ["rfengine", "rfengine.cli"])
def test_torch_waits_until_a_public_name_is_asked_for(module: str) -> None:
    loaded = in_fresh_interpreter(f"import sys, {module}; print(*sys.modules)").split()
    assert not {"numpy", "torch", "typing_extensions", "tyro"} & set(loaded)


def test_public_names_are_listed_and_no_other_name_is_there() -> None:
    import rfengine

    assert set(rfengine.__all__) <= set(dir(rfengine))
    with pytest.raises(AttributeError, match="'rfengine' has no attribute 'pipelines'"):
        _ = rfengine.pipelines


def test_no_size_of_one_resolution_is_burned_in() -> None:
    # tokens of a frame, of 21 frames and of 9 frames at 480 x 832; prose may name them
    burned = {1560, 32760, 14040}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in sources()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and node.value in burned
    ]
    assert found == []


def test_the_engine_names_dtype_and_device_wherever_it_makes_a_tensor() -> None:
    # what is left out comes from the host program's defaults; a module's parameters are replaced when it is
    # loaded, and a training or a benchmark runs in a process of its own
    found = []
    for path in sources():
        if unit_of(module_of(path)) in ("benchmark", "toy", "training"):
            continue
        parameters = {
            id(call)
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter"
            for call in ast.walk(node)
        }
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call) or id(node) in parameters:
                continue
            owner, _, name = ast.unparse(node.func).rpartition(".")
            named = {keyword.arg for keyword in node.keywords}
            if owner == "torch" and name in FACTORIES and not {"dtype", "device"} <= named:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: torch.{name}")
    assert found == []


def test_kernels_is_never_a_regular_package() -> None:
    # with an __init__.py there, transformers mistakes the folder for a package of that name and cannot import
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (PACKAGE / "kernels" / "__init__.py").exists()
