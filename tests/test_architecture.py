import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from conf.runtime import RuntimeConfig
from conf.schema import Settings
from conf.train import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "prefect", "mlflow", "pyarrow", "zarr", "numpy")


def _fields(
    prefix: str, section: type[BaseModel], above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, tuple[frozenset[str], str]]]:
    """Dotted name of every setting, the classes of the sections that it can be read from, and its own name."""
    for name, field in section.model_fields.items():
        bases = [base for base in section.__mro__ if issubclass(base, BaseModel) and name in base.model_fields]
        classes = above | {base.__name__ for base in bases}
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(f"{prefix}{name}.", field.annotation, classes if prefix else frozenset())
        else:
            yield f"{prefix}{name}", (classes, name)


FAMILY_FIELDS = [field for section in FAMILIES.values() for field in _fields("train.", section)]
ADDRESSES = dict([*_fields("", Settings), *FAMILY_FIELDS, *_fields("runtime.", RuntimeConfig)])


def test_layers_hold() -> None:
    lint = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert lint.returncode == 0, lint.stdout[-3000:]


def _modules_imported(text: str) -> set[str]:
    """Every module that a text imports or may import: `from a import b` may import a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _knows_process_groups(text: str) -> bool:
    """`torch.distributed` is imported, or reached as an attribute of `torch`."""
    reached = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    return any((name + ".").startswith("torch.distributed.") for name in _modules_imported(text) | reached)


@pytest.mark.parametrize(
    ("text", "knows"),
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("from torch.distributed.tensor import DTensor", True),
        ("import torch\nrank = torch.distributed.get_rank()", True),
        ("from torch.distributions import Categorical", False),
        ("import torch  # not distributed\ndistributed = 1", False),
    ],
)
def test_the_search_for_process_groups_finds_them(text: str, knows: bool) -> None:
    assert _knows_process_groups(text) == knows


@pytest.mark.slow
def test_models_know_no_process_group() -> None:
    # Beside the contracts: import-linter sees of an installed package no more than its top-level name.
    paths = (ROOT / "models").rglob("*.py")
    assert [path for path in paths if _knows_process_groups(path.read_text(encoding="utf-8"))] == []


def _randomness(text: str) -> set[str]:
    """Names by which a text makes or seeds random numbers without `stages.runtime.randomness`."""
    names = {"default_rng", "Philox", "RandomState", "SeedSequence", "manual_seed", "manual_seed_all"}
    found = {module for module in _modules_imported(text) if module.partition(".")[0] in {"random", "secrets"}}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            of_numpy = ast.unparse(node.value) in {"np.random", "numpy.random"}
            if node.attr in names or (of_numpy and node.attr != "Generator"):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names if alias.name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Generator"):
            found.add(ast.unparse(node.func))  # as an annotation it is fine
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import random", {"random"}),
        ("from random import shuffle", {"random", "random.shuffle"}),
        ("np.random.seed(0)", {"np.random.seed"}),
        ("x = np.random.default_rng(3).random()", {"np.random.default_rng"}),
        ("from numpy.random import Philox", {"Philox"}),
        ("torch.cuda.manual_seed_all(1)", {"torch.cuda.manual_seed_all"}),
        ("torch.Generator('cpu')", {"torch.Generator"}),
        ("np.random.Generator(bits)", {"np.random.Generator"}),
        ("def f(generator: np.random.Generator) -> float:\n    return generator.random()", set()),
        ("random = 1\nfrom stages.runtime import randomness", set()),
    ],
)
def test_the_search_for_random_numbers_finds_them(text: str, found: set[str]) -> None:
    assert _randomness(text) == found


def test_random_numbers_have_one_source() -> None:
    source = ROOT / "stages" / "runtime" / "randomness.py"
    paths = [path for folder in ("stages", "models") for path in (ROOT / folder).rglob("*.py") if path != source]
    found = {path.name: _randomness(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: names for name, names in found.items() if names} == {}
    assert _randomness(source.read_text(encoding="utf-8")) == {
        "np.random.Philox",
        "np.random.Generator",
        "torch.manual_seed",
    }


@pytest.mark.parametrize("folder", ["tests", "docker"])
def test_no_package_file_where_a_name_would_shadow_an_installed_package(folder: str) -> None:
    assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [["status"], ["config"], ["why", "train"], ["run", "--dry-run"]])
def test_a_question_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "one.png").write_bytes(b"never opened")
    arguments = [*command, "--set", f"dataset.root={tmp_path / 'images'}", "--set", f"runtime.home={tmp_path / 'home'}"]
    program = (
        "import sys\nfrom pipeline.cli.main import run_command\n"
        f"code = run_command({arguments!r})\n"
        f"print(code, sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0 []"


def test_every_setting_is_read_where_its_section_is_known() -> None:
    """By a stage or the pipeline, or by a property of its section, which they read."""
    paths = [path for folder in ("pipeline", "stages") for path in (ROOT / folder).rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    readers = [(text, _attributes_read(ast.parse(text))) for text in texts]
    for path in (ROOT / "conf").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        properties = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and _is_property(node)
        ]
        readers.append((text, set[str]().union(*map(_attributes_read, properties))))
    unread = {
        address
        for address, (classes, name) in ADDRESSES.items()
        if not any(name in attributes and any(each in text for each in classes) for text, attributes in readers)
    }
    assert unread == {"seed"}  # sections take it when settings are loaded


def _attributes_read(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list)
