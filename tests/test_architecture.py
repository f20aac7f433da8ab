"""Imports run one way, and serving needs no torch: read off the source and off a running interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fullframe
import fusedpool
from fullframe.engine.choice import DRIVERS

PACKAGE = Path(fullframe.__file__).parent
KERNELS = Path(fusedpool.__file__).parent
# What each room may import besides itself; `errors`, `defaults`, the version and generated messages are open to all.
MAY_IMPORT = {
    "image": set(),
    "model": {"image"},
    "engine": {"model", "image"},
    "server": {"engine", "model", "image", "settings"},
    "settings": {"engine", "model", "image"},
    "client": {"engine", "model", "image"},
    "convert": {"engine", "model", "image"},
    "table": {"engine", "model", "image"},
    "learn": {"convert", "engine", "model", "image"},
    "cli": {"server", "engine", "model", "image", "settings", "client", "learn", "convert", "table"},
}
SHARED = {"errors", "defaults", "files", "__version__"}
GRPC_ROOMS = {"server", "client", "cli"}


def imports(path: Path) -> set[str]:
    """Dotted names of everything `path` imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if room(path) in MAY_IMPORT]


def test_every_room_is_known() -> None:
    rooms = {room(path) for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__", "__main__", "errors", "defaults", "files", "v1"} == set(MAY_IMPORT)


def test_imports_run_one_way() -> None:
    for path in sources():
        for name in imports(path):
            package, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if package != "fullframe" or target in SHARED or target == room(path):
                continue
            if target == "v1":
                assert room(path) in GRPC_ROOMS, f"{path} knows the transport's messages"
            else:
                assert target in MAY_IMPORT[room(path)], f"{path} imports {name}"


def on_torch(path: Path) -> bool:
    """Whether it is of the engine on PyTorch, which is imported when it is chosen."""
    return room(path) == "engine" and (path.name == "fused.py" or PACKAGE / "engine" / "graph" in path.parents)


def test_only_transport_knows_grpc_and_only_learning_and_one_engine_know_torch() -> None:
    for path in sources():
        for name in imports(path):
            top = name.partition(".")[0]
            assert top not in {"grpc", "grpc_status", "grpc_health"} or room(path) in GRPC_ROOMS, f"{path}: {name}"
            exported = room(path) == "convert" and path.name in {"modules.py", "sources.py"}  # networks in PyTorch
            torch_may_be = room(path) == "learn" or exported or on_torch(path)
            assert top not in {"torch", "onnxscript"} or torch_may_be, f"{path}: {name}"
            # Where graphs are made or changed.
            graphs = (
                room(path) in {"learn", "convert"}
                or path.name in {"strips.py", "heads.py", "memory.py"}
                or path.parent.name == "ragged"
                or on_torch(path)
            )
            assert top != "onnx" or graphs or _type_checking(path, name), f"{path}: {name}"
            assert top != "pyarrow" or room(path) == "table", f"{path}: {name}"
            assert top != "onnxruntime" or room(path) in {"engine", "learn", "convert"}, f"{path}: {name}"


def test_the_kernel_library_stands_alone_and_only_learning_and_one_engine_use_it() -> None:
    assert not [name for path in KERNELS.rglob("*.py") for name in imports(path) if name.startswith("fullframe")]
    users = {path for path in sources() for name in imports(path) if name.startswith("fusedpool")}
    assert {"torch engine" if on_torch(path) else room(path) for path in users} == {"learn", "torch engine"}


def test_only_the_choice_of_engines_knows_them_all() -> None:
    for path in sources():
        if not on_torch(path) and path.name != "choice.py":
            assert not [
                name for name in imports(path) if name.startswith(("fullframe.engine.fused", "fullframe.engine.graph"))
            ]


def _type_checking(path: Path, name: str) -> bool:
    """Whether `name` is imported for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inside = {alias.name for n in ast.walk(node) if isinstance(n, ast.Import) for alias in n.names}
            if name in inside:
                return True
    return False


def loaded(program: str) -> list[str]:
    """What of the packages that serving has no use for a program leaves imported."""
    names = {"torch", "onnx", "fusedpool", "array_api_compat", "matplotlib", "PIL", "skimage", "pyarrow"}
    program += f"\nimport sys; print(*sorted({names} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return output.stdout.split()


def test_importing_the_server_loads_no_torch() -> None:
    assert loaded("import fullframe.server.lifecycle, fullframe.engine.predictor, fullframe.client") == []


SERVED = """
from fullframe.image import Limits, open_raw
from fullframe.engine.query import Query
from fullframe.server.lifecycle import open_models
from fullframe.settings import Settings

plane = open_models(Settings(engine={engine!r}, batching="ragged", tile_pixels=5000))
images = [open_raw(bytes(3 * side * side), side, side, Limits()) for side in (20, 30, 400)]
for future in plane.submit(plane.model(), images, Query()):
    future.result()
plane.close()
"""


@pytest.mark.parametrize("engine", ["onnx", *(["auto"] if not any(path.exists() for path in DRIVERS) else [])])
def test_serving_with_onnx_runtime_never_loads_torch(engine: str) -> None:
    """In batches and in pieces."""
    assert loaded(SERVED.format(engine=engine)) == ["onnx"]


def test_the_other_engine_loads_it() -> None:
    """The control."""
    assert {"torch", "fusedpool"} <= set(loaded("import fullframe.engine.fused"))


@pytest.mark.parametrize("disabled", ["", "0"])
def test_onnx_runtime_keeps_no_identifier_unless_told(disabled: str, tmp_path: Path) -> None:
    code = "import fullframe, time; fullframe.load(engine='onnx'); time.sleep(0.5)"
    told = {"ORT_DISABLE_TELEMETRY": disabled} if disabled else {}
    subprocess.run([sys.executable, "-c", code], env={"HOME": str(tmp_path), **told}, check=True)
    assert bool([path for path in tmp_path.rglob("*") if path.is_file()]) == bool(disabled)


def test_no_two_test_files_have_one_name() -> None:
    """pytest collects a folder at a time, and all of them for -m slow and -m gpu."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len({*names})
