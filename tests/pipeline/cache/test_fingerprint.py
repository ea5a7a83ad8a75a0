"""The code fingerprint covers definitions, not files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipeline.cache.fingerprint import Code, FingerprintError
from pipeline.graph import COUNTED, NEUTRAL, STAGES

ROOT = Path(__file__).resolve().parents[3]


def all_digests(root: Path) -> dict[str, list[str]]:
    code = Code(root, frozenset(NEUTRAL), COUNTED)
    return {stage.name: code.fingerprint(stage.entry).digests for stage in STAGES.values()}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def changed(root: Path, before: dict[str, list[str]]) -> set[str]:
    return {name for name, digest in all_digests(root).items() if digest != before[name]}


def reaching(root: Path, definition: str) -> set[str]:
    code = Code(root, frozenset(NEUTRAL), COUNTED)
    return {s.name for s in STAGES.values() if definition in code.fingerprint(s.entry).definitions}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("models/layers.py", "class RMSNorm", "def unused(x):\n    return x\n\n\nclass RMSNorm"),
        (
            "models/config.py",
            '    "T": GPTSize(',
            '    "tiny": GPTSize(dim=64, num_layers=1, num_heads=1),\n    "T": GPTSize(',
        ),
        ("models/layers.py", '"""Root-mean-square norm', '"""The root-mean-square norm'),
        ("models/layers.py", "class RMSNorm", "# a comment\nclass RMSNorm"),
        ("stages/runtime/artifact.py", "indent=2", "indent=4"),
        ("stages/train.py", 'if __name__ == "__main__":', 'if __name__ == "__main__":\n    print("hello")'),
    ],
)
def test_what_changes_no_result_changes_no_fingerprint(code_copy: Path, file: str, old: str, new: str) -> None:
    before = all_digests(code_copy)
    edit(code_copy / file, old, new)
    assert changed(code_copy, before) == set()


@pytest.mark.slow
def test_editing_rmsnorm_changes_exactly_the_stages_that_reach_it(code_copy: Path) -> None:
    before = all_digests(code_copy)
    edit(code_copy / "models/layers.py", "eps: float = 1e-5", "eps: float = 1e-6")
    assert changed(code_copy, before) == {"entropy_model", "entropy_map", "train", "entropy_head", "sample"}
    assert changed(code_copy, before) == reaching(code_copy, "models.layers:RMSNorm")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        # indirect use: the stages import models.vq, which uses _norm
        ("models/vq.py", "eps=1e-6", "eps=1e-5", {"tokenizer", "tokenize", "sample", "evaluate"}),
        ("stages/scores/statistics.py", "self.n - 1", "self.n", {"evaluate"}),
        ("models/patching.py", "positions < 2", "positions < 1", {"patch_index", "entropy_head", "sample"}),
        ("stages/training/optim.py", "0.5 * (1", "0.6 * (1", {"tokenizer", "entropy_model", "train", "entropy_head"}),
    ],
)
def test_an_edit_reaches_the_stages_that_use_it(
    code_copy: Path, file: str, old: str, new: str, stages: set[str]
) -> None:
    before = all_digests(code_copy)
    edit(code_copy / file, old, new)
    assert changed(code_copy, before) == stages


@pytest.mark.slow
def test_an_edit_of_dpar_does_not_reach_the_entropy_model(code_copy: Path) -> None:
    before = all_digests(code_copy)
    edit(
        code_copy / "models/dpar.py",
        "self.decoder_start_embedding = nn.Embedding(1",
        "self.decoder_start_embedding = nn.Embedding(2",
    )
    assert changed(code_copy, before) == {"train", "entropy_head", "sample"}


def package(tmp_path: Path, **modules: str) -> Code:
    """A small tree with modules `stages.<name>` of the given texts; the stage's function is stages.stage:run."""
    (tmp_path / "stages").mkdir(exist_ok=True)
    (tmp_path / "stages/__init__.py").touch()
    for name, text in modules.items():
        (tmp_path / "stages" / f"{name}.py").write_text(text)
    return Code(tmp_path)


def definitions(code: Code) -> set[str]:
    return set(code.fingerprint(("stages.stage", "run")).definitions)


def digests(tmp_path: Path, **modules: str) -> list[str]:
    """Digests of a small tree with only these modules."""
    shutil.rmtree(tmp_path / "stages", ignore_errors=True)
    return package(tmp_path, **modules).fingerprint(("stages.stage", "run")).digests


RUN = "\n\ndef run():\n    return f()"
F, G = "def f():\n    return g() + 1", "def g():\n    return LIMIT\n\nLIMIT = 3"


@pytest.mark.parametrize(
    "modules",
    [
        {"stage": f"from stages.renamed import f{RUN}", "renamed": f"{F}\n\n{G}"},
        {"stage": f"from stages.other import f{RUN}", "other": f"from stages.more import g\n\n{F}", "more": G},
        {"stage": f"{F}\n\n{G}{RUN}"},
        {
            "stage": f"from .other import f{RUN}",
            "other": f"from . import more\n\n{F.replace('g()', 'more.g()')}",
            "more": G,
        },
        {"stage": f"import stages.other as o{RUN.replace('f()', 'o.f()')}", "other": f"{F}\n\n{G}"},
        {"stage": f"{RUN.replace('return', 'from stages.late import f; return')}", "late": f"{F}\n\n{G}"},
        {"stage": f"from stages.other import f{RUN}", "other": f"{F}\n\n{G}\n\ndef unused():\n    return 4"},
    ],
    ids=["renamed", "split", "merged", "relative", "through a module", "imported late", "beside something unused"],
)
def test_the_module_of_a_definition_does_not_count(tmp_path: Path, modules: dict[str, str]) -> None:
    at_first = digests(tmp_path, stage=f"from stages.other import f{RUN}", other=f"{F}\n\n{G}")
    assert digests(tmp_path, **modules) == at_first


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "from stages.one import f\nfrom stages.two import f as g",
            "from stages.two import f\nfrom stages.one import f as g",
        ),
        (
            "from stages.one import f\nfrom stages.two import f as g",
            "from stages.one import f\nfrom stages.one import f as g",
        ),
        (
            "from math import floor as f\nfrom stages.two import f as g",
            "from math import ceil as f\nfrom stages.two import f as g",
        ),
        ("import numpy as f\nfrom stages.two import f as g", "import math as f\nfrom stages.two import f as g"),
    ],
)
def test_a_name_bound_to_something_else_counts(tmp_path: Path, before: str, after: str) -> None:
    use = "\n\ndef run():\n    return f(1), g(2)"
    deep = {
        "one": "def f(x):\n    return h(x)\n\ndef h(x):\n    return 1",
        "two": "def f(x):\n    return h(x)\n\ndef h(x):\n    return 2",
    }
    assert digests(tmp_path, stage=before + use, **deep) != digests(tmp_path, stage=after + use, **deep)


def test_statements_that_run_on_import_count_one_by_one(tmp_path: Path) -> None:
    stage = f"import stages.more\nfrom stages.other import f{RUN}"
    together = digests(tmp_path, stage=stage, other="prepare(1)\nprepare(2)\n\ndef f():\n    return 1", more="")
    apart = digests(tmp_path, stage=stage, other="prepare(1)\n\ndef f():\n    return 1", more="prepare(2)")
    fewer = digests(tmp_path, stage=stage, other="prepare(1)\n\ndef f():\n    return 1", more="")
    assert together == apart != fewer


@pytest.mark.slow
def test_moves_in_the_real_tree_leave_every_stage_cached(code_copy: Path) -> None:
    """Renaming a module, moving a function, splitting a file or making a package changes no fingerprint."""
    before = all_digests(code_copy)
    rename(code_copy, "stages.training.optim", "stages.training.optimisation")
    rename(code_copy, "models.layers", "models.blocks.transformer")
    split(code_copy, "models.patch_tables", "models.bit_packing", ("pack_bits", "unpack_bits"))
    assert changed(code_copy, before) == set()
    edit(code_copy / "models/bit_packing.py", "bitorder=", "axis=0, bitorder=")
    assert changed(code_copy, before) == {"patch_index", "entropy_head", "train", "sample"}


def rename(root: Path, old: str, new: str) -> None:
    """Rename a module and fix its importers."""
    target = root.joinpath(*new.split(".")).with_suffix(".py")
    target.parent.mkdir(exist_ok=True)
    (target.parent / "__init__.py").touch()
    root.joinpath(*old.split(".")).with_suffix(".py").rename(target)
    for path in root.rglob("*.py"):
        path.write_text(path.read_text().replace(old, new))


def split(root: Path, old: str, new: str, names: tuple[str, ...]) -> None:
    """Move functions of a module into a new module; the old module and its importers import them."""
    source = root.joinpath(*old.split(".")).with_suffix(".py")
    text, moved = source.read_text(), []
    for name in names:
        function = re.search(rf"^def {name}\(.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
        assert function is not None
        # A line at the margin may also be the closing parenthesis of a function's parameters.
        moved.append(function[0])
        text = text.replace(function[0], "")
    head = text[: text.index("\n\n\n")] if "\n\n\n" in text else text
    imports = [line for line in head.splitlines() if line.startswith(("import ", "from "))]
    aliases = [line for line in text.splitlines() if re.match(r"\w+ = NDArray", line)]
    root.joinpath(*new.split(".")).with_suffix(".py").write_text("\n".join([*imports, *aliases, *moved]))
    lines = text.splitlines()
    place = max(number for number, line in enumerate(lines) if line.startswith(("import ", "from "))) + 1
    lines.insert(place, f"from {new} import {', '.join(names)}")
    source.write_text("\n".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        "from stages.other import f\n\ndef run():\n    return f()",
        "from stages.other import f as g\n\ndef run():\n    return g()",
        "from .other import f\n\ndef run():\n    return f()",
        "from . import other\n\ndef run():\n    return other.f()",
        "import stages.other\n\ndef run():\n    return stages.other.f()",
        "import stages.other as o\n\ndef run():\n    return o.f()",
        "def run():\n    from stages.other import f\n    return f()",
        "from stages.again import f\n\ndef run():\n    return f()",
        "from stages.other import f\n\nTABLE = {'f': f}\n\ndef run():\n    return TABLE['f']()",
        "from stages.other import f\n\nclass A:\n    def m(self):\n        f()\n\ndef run():\n    return A()",
        "try:\n    from stages.other import f\nexcept ImportError:\n    f = None\n\ndef run():\n    return f()",
        "try:\n    from stages.other import f\nexcept ImportError:\n    def f(): ...\n\ndef run():\n    return f()",
        "try:\n    from stages.other import f\nexcept OSError:\n    from math import f\n\ndef run():\n    return f()",
        "class A:\n    def a(self):\n        from stages.other import f\n        f()\n    def b(self):\n"
        "        from math import f\n        f()\n\ndef run():\n    return A()",
    ],
)
def test_every_way_to_import_a_name_is_followed_to_that_name(tmp_path: Path, text: str) -> None:
    other = "def f():\n    return h()\n\ndef h():\n    return 1\n\ndef unused():\n    return 2\n"
    found = definitions(package(tmp_path, stage=text, other=other, again="from stages.other import f"))
    assert {"stages.stage:run", "stages.other:f", "stages.other:h"} <= found
    assert "stages.other:unused" not in found


@pytest.mark.parametrize(
    "text",
    [
        "from stages.other import *\n\ndef run():\n    return f()",
        "from stages import other\n\ndef run(name):\n    return getattr(other, name)()",
        "import importlib\n\ndef run():\n    return importlib.import_module('stages.other').f()",
        "from stages import other\n\ndef run():\n    return apply(other)",
        "from stages import again\n\ndef run():\n    return apply(again)",
        "from stages.again import h\n\ndef run():\n    return h()",
    ],
)
def test_the_whole_module_counts_where_a_name_cannot_be_resolved(tmp_path: Path, text: str) -> None:
    other = "def f():\n    return 1\n\ndef g():\n    return 2\n"
    found = definitions(package(tmp_path, stage=text, other=other, again="from stages.other import *"))
    assert {"stages.other:f", "stages.other:g"} <= found


@pytest.mark.parametrize(
    "init", ["from . import part\n\ndef g():\n    return part.f()", "def g():\n    from .part import f\n    return f()"]
)
def test_a_package_leads_to_its_parts(tmp_path: Path, init: str) -> None:
    code = package(tmp_path, stage="from stages.parts import g\n\ndef run():\n    return g()")
    (tmp_path / "stages/parts").mkdir()
    (tmp_path / "stages/parts/__init__.py").write_text(init)
    (tmp_path / "stages/parts/part.py").write_text("def f():\n    return 1\n")
    assert {"stages.parts:g", "stages.parts.part:f"} <= definitions(code)


@pytest.mark.parametrize(
    "effect",
    [
        "prepare()",
        "import torch\n\ntorch.backends.cuda.matmul.allow_tf32 = True",
        "import os\n\nos.environ['X'] = '1'",
        "TABLE = {}\nTABLE['f'] = 1",
        "if TYPE_CHECKING:\n    pass\nelse:\n    prepare()",
    ],
)
@pytest.mark.parametrize(
    "stage",
    [
        "from stages.other import f\n\ndef run():\n    return f()",
        "import stages.other\n\ndef run():\n    return 1",
        "def run():\n    import stages.other",
        "from stages.between import g\n\ndef run():\n    return g()",
    ],
)
def test_what_runs_on_import_counts(tmp_path: Path, effect: str, stage: str) -> None:
    between = "import stages.other\n\ndef g():\n    return 1"
    code = package(tmp_path, stage=stage, between=between, other=f"{effect}\n\ndef f():\n    return 1\n")
    assert "stages.other:<import>" in definitions(code)


def test_what_is_for_type_checkers_or_for_python_m_does_not_count(tmp_path: Path) -> None:
    guarded = "if TYPE_CHECKING:\n    import stages.other\n\nif __name__ == '__main__':\n    import stages.other\n"
    code = package(tmp_path, stage=f"{guarded}\ndef run():\n    return 1", other="prepare()")
    assert definitions(code) == {"stages.stage:run"}


def test_an_edit_is_seen_by_code_that_was_read_before(tmp_path: Path) -> None:
    code = package(tmp_path, stage="from stages.late import f\n\ndef run():\n    return f()")
    assert definitions(code) == {"stages.stage:run"}
    (tmp_path / "stages/late.py").write_text("def f():\n    return 1")
    before = code.fingerprint(("stages.stage", "run")).definitions
    (tmp_path / "stages/late.py").write_text("def f():\n    return g()\n\ndef g():\n    return 1")
    after = code.fingerprint(("stages.stage", "run")).definitions
    assert set(after) - set(before) == {"stages.late:g"}
    assert after["stages.late:f"] != before["stages.late:f"]


def test_a_computed_import_is_refused(tmp_path: Path) -> None:
    code = package(tmp_path, stage="import importlib\n\ndef run(n):\n    return importlib.import_module(n)")
    with pytest.raises(FingerprintError, match=r"stages.stage line 4 imports a module by a computed name"):
        definitions(code)


@pytest.mark.slow
def test_the_fingerprint_does_not_depend_on_where_the_code_lies(
    code_copy: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    for name in ("stages", "models"):
        shutil.copytree(code_copy / name, other / name)
    assert all_digests(other) == all_digests(code_copy)
