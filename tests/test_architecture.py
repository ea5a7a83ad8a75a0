import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from conf.load import describe, load_settings, names
from conf.schema import RuntimeConfig, Settings
from conf.train import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "prefect", "mlflow", "pyarrow", "zarr", "numpy")


def _fields(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Dotted name of every setting, with the class that declares it and its own name."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(f"{prefix}{name}.", field.annotation)
        else:
            declares = next(parent for parent in section.__mro__ if name in parent.__annotations__)
            yield f"{prefix}{name}", (declares.__name__, name)


FAMILY_FIELDS = [field for section in FAMILIES.values() for field in _fields("train.", section)]
ADDRESSES = dict([*_fields("", Settings), *FAMILY_FIELDS, *_fields("runtime.", RuntimeConfig)])


def test_layers_hold() -> None:
    lint = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert lint.returncode == 0, lint.stdout[-3000:]


def test_models_know_no_process_group() -> None:
    # Beside the contracts: import-linter sees of an installed package no more than its top-level name.
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "models").glob("*.py")}
    assert [path for path, text in texts.items() if "distributed" in text] == []


@pytest.mark.parametrize("folder", ["tests", "docker"])
def test_no_package_file_where_a_name_would_shadow_an_installed_package(folder: str) -> None:
    assert list((ROOT / folder).rglob("__init__.py")) == []


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


@pytest.mark.parametrize("preset", names("preset"))
def test_every_preset_loads_and_says_what_it_is_for(preset: str) -> None:
    settings, _ = load_settings(preset)
    assert isinstance(settings, Settings)
    assert (ROOT / "conf" / "preset" / f"{preset}.yaml").read_text().startswith("# ")
    assert len(describe("preset", preset)) > 10


def test_every_ablation_changes_the_base_and_says_how() -> None:
    base, _ = load_settings()
    for ablation in names("ablation"):
        changed, _ = load_settings(None, ablation)
        assert changed != base, ablation
        assert len(describe("ablation", ablation)) > 10, ablation


def test_every_setting_is_read_where_its_section_is_known() -> None:
    paths = [path for folder in ("pipeline", "stages") for path in (ROOT / folder).rglob("*.py")]
    readers = [(text, _attributes_read(ast.parse(text))) for text in map(_text, paths)]
    # A property of a section reads for those who read the property.
    readers += [(text, _read_by_properties(text)) for text in map(_text, (ROOT / "conf").glob("*.py"))]
    unread = {
        address
        for address, (section, name) in ADDRESSES.items()
        if not any(section in text and name in attributes for text, attributes in readers)
    }
    assert unread == set()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _attributes_read(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def _read_by_properties(text: str) -> set[str]:
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    properties = [node for node in functions if [ast.unparse(name) for name in node.decorator_list] == ["property"]]
    return set().union(*map(_attributes_read, properties))
