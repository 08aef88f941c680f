"""Who may import whom, held over the syntax trees; and that our folders shadow no package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "offload", "warmup", "proto")
"""Folders at the top level that the package reaches by links."""
ENGINE_SIDE = (
    "attention",
    "block_pool",
    "deadlines",
    "dense",
    "embedding",
    "engine",
    "engine_process",
    "hot_experts",
    "kv_cache",
    "layerwise",
    "logprobs",
    "mixtral",
    "model",
    "pack",
    "pack_files",
    "pack_matrices",
    "readout",
    "sampler",
    "scheduler",
    "sequence",
    "step_costs",
    "transformers_module",
    "zero3",
)
FRONT_DOOR = (
    "budget",
    "cgroups",
    "checkpoint",
    "cli",
    "client",
    "config",
    "directory",
    "errors",
    "json_file",
    "large_file",
    "messages",
    "open_requests",
    "packed",
    "json_tokenizer",
    "progress",
    "pulse",
    "safetensors_file",
    "sentencepiece_tokenizer",
    "state",
    "supervisor",
    "tokenizer",
    "whole_file",
)
HEAVY = {"torch", "transformers", "deepspeed"}


def sources(*folders: str) -> list[Path]:
    """Python files below the folders, generated ones left out."""
    found = [
        file
        for folder in folders
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not file.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    ]
    assert found, f"no sources in {folders}"
    return found


def modules(*names: str) -> list[Path]:
    files = [ROOT / "moe_server" / f"{name}.py" for name in names]
    assert all(file.is_file() for file in files), files
    return files


def imports(tree: ast.AST, file: Path) -> Iterator[str]:
    """Every module that is imported below a node, in full; of `from a import b`, `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(file: Path) -> set[str]:
    return set(imports(ast.parse(file.read_text(encoding="utf-8")), file))


def imports_at_module_level(file: Path) -> set[str]:
    """What importing the file imports: not what its functions do, nor what type checkers see."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(imports(node, file))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def ours(names: set[str]) -> set[str]:
    """Those in our package, or in a folder of ours by a name that it must not have."""
    return {name for name in names if name.split(".")[0] in {"moe_server", "tests", *FOLDERS}}


def outermost(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def show(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", sources("kernels"), ids=show)
def test_kernels_import_nothing_of_ours(file):
    inside = {name for name in ours(imports_of(file)) if name.startswith("moe_server.kernels.")}
    assert ours(imports_of(file)) == inside


def test_proto_holds_no_code_of_ours():
    assert list((ROOT / "proto").rglob("*.proto"))
    for file in (ROOT / "proto").rglob("*.py"):
        assert file.name.endswith(("_pb2.py", "_pb2_grpc.py"))
        assert all(name.startswith("moe_server.proto.") for name in ours(imports_of(file)))


@pytest.mark.parametrize("file", sources("offload"), ids=show)
def test_offload_imports_offload_errors_and_formats_only(file):
    allowed = ("moe_server.offload.", "moe_server.errors.", "moe_server.kernels.formats.")
    assert all(name.startswith(allowed) for name in ours(imports_of(file)))


@pytest.mark.parametrize("file", sources("moe_server/constraints"), ids=show)
def test_constraints_know_neither_service_nor_engine(file):
    rooms = ("constraints.", "errors.", "messages.", "sequence.")
    allowed = tuple(f"moe_server.{room}" for room in rooms)
    assert all(name.startswith(allowed) for name in ours(imports_of(file)))
    assert "llguidance" not in outermost(imports_at_module_level(file))


@pytest.mark.parametrize("file", sources("moe_server/chat"), ids=show)
def test_chat_knows_the_tokenizer_and_no_service(file):
    rooms = ("chat.", "errors.", "json_file.", "tokenizer.")
    allowed = tuple(f"moe_server.{room}" for room in rooms)
    assert all(name.startswith(allowed) for name in ours(imports_of(file)))
    assert "mistral_common" not in outermost(imports_at_module_level(file))


def test_config_imports_errors_and_addresses_only_and_they_nothing():
    [config, errors, address, messages] = modules("config", "errors", "address", "messages")
    allowed = ("moe_server.errors.", "moe_server.address.")
    assert all(name.startswith(allowed) for name in ours(imports_of(config)))
    assert ours(imports_of(errors)) == ours(imports_of(address)) == set()
    assert all(name.startswith("moe_server.errors.") for name in ours(imports_of(messages)))


@pytest.mark.parametrize("file", modules(*ENGINE_SIDE) + sources("offload", "kernels"), ids=show)
def test_the_engine_s_side_knows_no_grpc_and_no_front_door(file):
    names = imports_of(file)
    assert not outermost(names) & {"grpc", "google", "grpc_health", "grpc_reflection"}
    front = ("service", "proto", "supervisor", "cli", "commands", "client", "tokenizer", "state")
    assert not [
        name for name in ours(names) if name.startswith(tuple(f"moe_server.{one}" for one in front))
    ]


@pytest.mark.parametrize(
    "file",
    modules(*FRONT_DOOR)
    + sources(*(f"moe_server/{room}" for room in ("service", "commands", "constraints", "chat"))),
    ids=show,
)
def test_the_front_door_starts_without_heavy_libraries(file):
    assert not outermost(imports_at_module_level(file)) & HEAVY


def test_nor_does_anything_that_it_imports_load_them():
    code = "import moe_server.cli, moe_server.service.server, sys; print(*sys.modules)"
    assert not set(python(code, ROOT).split()) & (HEAVY | {"numpy", "llguidance"})


def test_no_file_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
    everything = sources("moe_server", "tests", "benchmarks", *FOLDERS)
    assert not [show(file) for file in everything if file.stem in drawers]


def test_the_rules_above_can_fail(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import torch.nn\n"
        "from moe_server.service import server\n"
        "try:\n    import grpc\nexcept ImportError:\n    pass\n"
        "def lazily():\n    import deepspeed\n"
        "class Eagerly:\n    import transformers\n"
    )
    eager = {"torch.nn", "moe_server.service.server", "grpc", "transformers"}
    assert imports_at_module_level(file) == eager
    assert imports_of(file) == eager | {"deepspeed"}


# Names


def python(code: str, cwd: Path, *paths: Path) -> str:
    """What a fresh interpreter prints, with `paths` before the installed packages."""
    lines = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_namespaces_and_links_to_them(folder):
    assert not list((ROOT / folder).rglob("__init__.py"))
    link = ROOT / "moe_server" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """Somebody else's packages by our folders' names, as Hugging Face's `kernels` is one."""
    path = tmp_path_factory.mktemp("site")
    for folder in FOLDERS:
        (path / folder).mkdir()
        (path / folder / "__init__.py").write_text("OWNER = 'theirs'\n")
    return path


IMPORT_ALL = "; ".join(
    [f"import {folder}" for folder in FOLDERS]
    + [f"assert {folder}.OWNER == 'theirs'" for folder in FOLDERS]
    + ["import moe_server.kernels, moe_server.offload.layout, moe_server.warmup"]
    + ["assert moe_server.offload.layout.PAGE_BYTES"]
    + ["assert kernels is not moe_server.kernels"]
    + ["print('theirs')"]
)


@pytest.mark.parametrize("cwd", [Path("/"), ROOT], ids=["from /", "from the repository"])
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "theirs first"])
def test_a_regular_package_by_a_folder_s_name_wins(theirs, cwd, ours_first):
    paths = [ROOT, theirs] if ours_first else [theirs, ROOT]
    assert python(IMPORT_ALL, cwd, *paths) == "theirs"


def test_transformers_finds_no_kernels_package_in_ours():
    code = (
        "import moe_server.kernels, importlib.util, sys\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec is None or spec.origin is None, 'kernels' in sys.modules)"
    )
    assert python(code, ROOT) == "True False"
