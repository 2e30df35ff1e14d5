"""The plan of the house, held by reading the imports: floors, siblings, and what an import loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import headwise

ROOT = Path(headwise.__file__).parent

# Which floor a file or folder of the package stands on. A new one must be given its place here.
FLOORS = {
    "allocator": 0,
    "errors": 0,
    "dims": 0,
    "registry": 0,
    "kernels": 1,
    "cache": 2,
    "linear": 3,
    "vein": 3,
    "start": 3,
    "attention": 3,
    "position": 3,
    "norm": 3,
    "ffn": 3,
    "spec": 4,
    "model": 5,
    "io": 6,
    "blocks": 6,
    "data": 6,
    "exchange": 7,
    "train": 7,
    "generate": 7,
    "distill": 8,
    "serve": 8,
    "lab": 9,
    "cli": 10,
    "__main__": 11,
}
FAMILIES = ("attention", "position", "norm", "ffn")
# On one floor only these may be imported across: what a family offers the others, the shared projector, the
# linear map, the helpers that write a file whole or not at all; and the ground floor's own files.
SHARED = {*FAMILIES, *(f"{family}.base" for family in FAMILIES), "vein", "start", "io.atomic", "errors", "dims"}
SHARED |= {"linear", "attention.recurrence", "io.gguf.tokenizer"}
# Where modules of any floor are loaded by name: the tables of public names and of kinds, when a name is first asked
# for, a worker process, which imports what its parent had (a user's own mechanisms), and the modeling file of an
# exported model, which brings its modules along. Of other libraries' functions the benchmark keeps a table.
BY_NAME = {"__init__.py", "registry.py", "lab/worker.py", "lab/bench/peers.py", "io/remote_code/modeling_headwise.py"}
# Files that hold no tensors and so must not cost torch's start.
TORCH_FREE = {"errors.py", "dims.py", "registry.py", "__init__.py", "lab/stats.py", "lab/result.py"}
TORCH_FREE |= {f"lab/ab/{name}.py" for name in ("__init__", "arms", "result", "summary", "words", "markdown")}
TORCH_FREE |= {"lab/claims.py", "cli/__init__.py", "cli/dispatch.py", "train/__init__.py", "train/settings.py"}
TORCH_FREE |= {"distill/__init__.py", "distill/settings.py"}
TORCH_FREE |= {"generate/__init__.py", "generate/scheduler.py", "cache/__init__.py", "cache/block_manager.py"}
MODEL_FILES = {"safetensors", "gguf", "pickle", "shelve", "marshal", "joblib", "dill", "cloudpickle"}


@dataclass(frozen=True)
class Import:
    """One import statement: in which file, of which module, and whether only the type checker reads it."""

    file: str
    line: int
    module: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports_of(path: Path) -> Iterator[Import]:
    file = path.relative_to(ROOT).as_posix()
    inner: set[ast.AST] = set()
    for node in nodes_of(path):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner |= set(ast.walk(node))
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports in full, from headwise. …"
            assert node.module is not None
            # `from headwise.io import atomic` names a module as `import headwise.io.atomic` does.
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in deeper]
        else:
            continue
        for name in dict.fromkeys(names):
            yield Import(file, node.lineno, name, node in inner)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return name.startswith("headwise.") and (path.with_suffix(".py").exists() or path.is_dir())


FILES = sorted(ROOT.rglob("*.py"))


@cache
def imports() -> list[Import]:
    return [found for path in FILES for found in imports_of(path)]


def inside() -> list[Import]:
    return [i for i in imports() if i.module.split(".")[0] == "headwise"]


def unit(name: str) -> str:
    """The file or folder right under headwise that a file or module belongs to."""
    return name.replace("/", ".").removesuffix(".py").split(".")[0]


def test_the_test_sees_the_imports() -> None:
    """A reader that found nothing would allow everything."""
    assert len(FILES) > 50
    assert len(inside()) > 100
    assert any(i.lazy for i in imports())
    assert any(i.module == "headwise.spec" and i.file == "model/build.py" for i in inside())


def test_every_file_has_a_floor() -> None:
    units = {unit(path.relative_to(ROOT).as_posix()) for path in FILES} - {"__init__"}
    assert units <= set(FLOORS), f"give {units - set(FLOORS)} a floor"


def test_a_file_imports_only_from_floors_under_its_own() -> None:
    """Its own folder aside. Imports inside functions count: a lazy import is still a dependence."""
    wrong = []
    for found in inside():
        if found.file == "__init__.py":
            continue  # the public names, for the type checker
        here, target = unit(found.file), found.module.removeprefix("headwise").lstrip(".")
        there = unit(target)
        if not target:  # `from headwise import __version__`
            allowed = FLOORS[here] > FLOORS["model"]
        elif here == there or FLOORS[there] < FLOORS[here]:
            allowed = True
        else:
            allowed = FLOORS[there] == FLOORS[here] and target in SHARED
        if not allowed:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_mechanisms_do_not_import_one_another() -> None:
    """One mechanism, one file: it may lean on its family's base and on what other families offer all."""
    wrong = []
    for found in inside():
        family, _, file = found.file.partition("/")
        if family not in FAMILIES or file in ("__init__.py", "base.py"):
            continue
        target = found.module.removeprefix("headwise.")
        if unit(target) in FAMILIES and target not in SHARED:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_kernels_are_tensor_functions() -> None:
    """No modules, and the readable definition leans on nothing but torch."""
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "nn.Module" not in path.read_text(encoding="utf-8"), path
    for folder in (p for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__"):
        naive = f"kernels/{folder.name}/naive.py"
        assert (folder / "naive.py").exists()
        assert {i.module.split(".")[0] for i in imports() if i.file == naive} <= {"__future__", "torch", "math"}


def test_modules_are_loaded_by_name_only_from_their_own_folder() -> None:
    """importlib would step around this test; a folder's table of its own names is no such step."""
    wrong = []
    for path in FILES:
        file = path.relative_to(ROOT).as_posix()
        for node in nodes_of(path):
            if file in BY_NAME or not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            own = name == "import_module" and ast.unparse(node.args[0])[2:].startswith(f"headwise.{unit(file)}.")
            if name in ("import_module", "run_path", "run_module", "spec_from_file_location") and not own:
                wrong.append(f"{file}:{node.lineno}")
    assert not wrong, wrong


def test_only_io_opens_model_files() -> None:
    wrong = [str(i) for i in imports() if i.module.split(".")[0] in MODEL_FILES and not i.file.startswith("io/")]
    assert not wrong, "\n".join(wrong)


def test_no_pickle_is_read_ever() -> None:
    for path in FILES:
        used = {ast.unparse(n) for n in nodes_of(path) if isinstance(n, ast.Attribute)}
        used |= {n.id for n in nodes_of(path) if isinstance(n, ast.Name)}
        assert not used & {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec", "__import__"}, path
    assert not [str(i) for i in imports() if i.module.split(".")[0] in MODEL_FILES - {"safetensors", "gguf"}]


def test_files_without_tensors_import_no_torch() -> None:
    wrong = [str(i) for i in imports() if i.file in TORCH_FREE and i.module.split(".")[0] == "torch"]
    assert not wrong, "\n".join(wrong)


# ---- what an import loads ----


def loaded(code: str) -> set[str]:
    """The modules in a fresh interpreter after this code."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {
    "torch",
    "transformers",
    "scipy",
    "matplotlib",
    "pydantic",
    "rich",
    "numpy",
    "tokenizers",
    "safetensors",
    "yaml",
}


def test_importing_headwise_loads_nothing_heavy() -> None:
    modules = loaded("import headwise; dir(headwise); headwise.__version__")
    assert not modules & HEAVY
    assert {m for m in modules if m.startswith("headwise")} == {"headwise"}


def test_reading_and_building_lines_does_not_load_the_compile_stack() -> None:
    """More than plain `import torch` does, that is: its own imports are its own affair."""
    bare = loaded("import torch")
    modules = loaded(
        "import torch, headwise as hw\n"
        "model = hw.build(hw.parse('llama(attention=pattern(window(4), softmax))'))\n"
        "hw.count('gpt2'), hw.list_ffn()\n"
        "model(torch.zeros(1, 9, dtype=torch.int64)).sum().backward()"
    )
    assert "headwise.model.build" in modules
    new = {name for name in modules - bare if not name.startswith("headwise")}
    wrong = {m for m in new if m.split(".")[0] in ("transformers", "scipy", "matplotlib", "rich", "sympy", "triton")}
    wrong |= {m for m in new if m.startswith(("torch._inductor", "torch._dynamo", "torch._export", "torch.compiler"))}
    assert not wrong


@pytest.mark.parametrize(
    "module",
    [
        *("headwise.errors", "headwise.dims", "headwise.registry", "headwise.train", "headwise.cli"),
        *("headwise.cache.block_manager", "headwise.distill.settings"),
    ],
)
def test_light_modules_stay_light(module: str) -> None:
    assert "torch" not in loaded(f"import {module}")


def test_every_public_name_is_there() -> None:
    for name in headwise.__all__:
        assert getattr(headwise, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'biuld'"):
        _ = headwise.biuld
