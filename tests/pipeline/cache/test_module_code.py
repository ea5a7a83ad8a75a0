"""Properties of the code fingerprint over small generated programs with known dependencies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.fingerprint import Code
from pipeline.cache.module_code import EVERYTHING, load_module

KINDS = ("function", "nested", "class", "constant", "outside", "fallback")
OUTSIDE = ("tau", "pi", "e", "inf", "nan", "sin", "cos", "tan", "exp")
RUN = 0
"""Index of the entry function."""


@dataclass(frozen=True)
class Definition:
    """A definition at the top level of a module."""

    name: str
    kind: str
    number: int
    """A literal in its text; another literal makes another definition."""
    uses: tuple[int, ...]
    """Indices of the definitions that it uses."""

    def text(self, documented: bool, named: Sequence[str]) -> str:
        """Source text; `named` has the names of the definitions it uses."""
        name, value = self.name, " + ".join([str(self.number), *named])
        doc = f'    """All about {name}."""\n' if documented else ""
        comment = "    # no comment\n" if documented else ""
        return {
            "function": f"def {name}(x: int = 0):\n{doc}{comment}    return {value}\n",
            "nested": f"def {name}(x):\n{doc}    def g(y):\n{indented(doc)}        return {value}\n    return g\n",
            "class": f"class {name}:\n{doc}    field = 3\n{doc}    def m(self):\n{comment}        return {value}\n",
            "constant": f"{name} = {value}\n",
            "outside": f"from math import {OUTSIDE[self.number]} as {name}\n",
            "fallback": f"try:\n    from math import tau as {name}\nexcept ImportError:\n    {name} = {value}\n",
        }[self.kind]


def indented(line: str) -> str:
    return f"    {line}" if line else ""


Program = tuple[Definition, ...]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A function `run` and up to seven more definitions, with arbitrary uses, cycles included."""
    count = draw(st.integers(1, 8))
    made = []
    for place in range(count):
        kind = "function" if place == RUN else draw(st.sampled_from(KINDS))
        uses = draw(st.lists(st.integers(0, count - 1), max_size=3, unique=True)) if kind != "outside" else []
        name = "run" if place == RUN else f"{kind}_{place}"
        made.append(Definition(name, kind, draw(st.integers(0, len(OUTSIDE) - 1)), tuple(uses)))
    return tuple(made)


def written(
    folder: Path,
    program: Program,
    *,
    rooms: Mapping[int, str] | None = None,
    order: Sequence[int] | None = None,
    documented: bool = False,
    style: str = "from",
) -> Path:
    """Write a program as modules of `stages`; the module of each definition is `main` unless `rooms` says another."""
    rooms = {place: (rooms or {}).get(place, "main") for place in range(len(program))}
    (folder / "stages").mkdir()
    (folder / "stages/__init__.py").touch()
    start = rooms[RUN]
    for room in {start, *rooms.values()}:
        # The module of `run` imports all others, so that what they do on import counts wherever it stands.
        imports = [f"import stages.{other}" for other in sorted({*rooms.values()} - {room}) if room == start]
        body = []
        for place in order or range(len(program)):
            if rooms[place] != room:
                continue
            named = []
            for used in program[place].uses:
                line, name = reference(program[used].name, rooms[used], room, style)
                imports.append(line)
                named.append(name)
            body.append(program[place].text(documented, named))
        head = '"""What this module is for."""\n' if documented else ""
        gap = "\n\n# ---- a banner\n\n" if documented else "\n"
        lines = [line for line in dict.fromkeys(imports) if line]
        (folder / "stages" / f"{room}.py").write_text(head + gap.join(["\n".join(lines), *body]))
    return folder


def reference(name: str, target: str, room: str, style: str) -> tuple[str, str]:
    """How a module calls a definition of another one, and the import that it needs."""
    if target == room:
        return "", name
    return {
        "from": (f"from stages.{target} import {name}", name),
        "relative": (f"from .{target} import {name}", name),
        "module": (f"from stages import {target} as other_{target}", f"other_{target}.{name}"),
        "dotted": (f"import stages.{target}", f"stages.{target}.{name}"),
    }[style]


def digests(program: Program, **shape: object) -> list[str]:
    """Digests of a program written in this shape."""
    start = shape.get("rooms", {}).get(RUN, "main")  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        root = written(Path(folder), program, **shape)  # type: ignore[arg-type]
        return Code(root).fingerprint((f"stages.{start}", "run")).digests


def reached(program: Program) -> set[int]:
    """Indices of the definitions that `run` or an import-time statement reaches, from the program itself."""
    waiting = [RUN, *(place for place, each in enumerate(program) if each.kind == "fallback")]
    found: set[int] = set()
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            waiting.extend(program[place].uses)
    return found


def edited(program: Program, place: int) -> Program:
    """The program with another literal in one definition."""
    other = replace(program[place], number=(program[place].number + 1) % len(OUTSIDE))
    return (*program[:place], other, *program[place + 1 :])


@given(program=programs())
def test_docstrings_comments_and_blank_lines_do_not_count(program: Program) -> None:
    assert digests(program, documented=True) == digests(program)


@pytest.mark.slow
@given(program=programs(), data=st.data())
def test_the_order_of_definitions_does_not_count(program: Program, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(program))))
    assert digests(program, order=order) == digests(program)


@pytest.mark.slow
@given(program=programs(), name=st.sampled_from(["main_2", "a", "zz"]))
def test_the_name_of_the_module_does_not_count(program: Program, name: str) -> None:
    assert digests(program, rooms=dict.fromkeys(range(len(program)), name)) == digests(program)


@pytest.mark.slow
@given(program=programs(), style=st.sampled_from(["from", "relative", "module", "dotted"]), data=st.data())
def test_splitting_a_module_does_not_count(program: Program, style: str, data: st.DataObject) -> None:
    rooms = {place: data.draw(st.sampled_from(["main", "part"])) for place in range(len(program))}
    assert digests(program, rooms=rooms, style=style) == digests(program)


@pytest.mark.slow
@given(program=programs(), data=st.data())
def test_an_edit_counts_exactly_where_it_is_reached(program: Program, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(range(len(program))))
    changed = digests(edited(program, place)) != digests(program)
    assert changed == (place in reached(program))


@pytest.mark.slow
@given(program=programs(), data=st.data())
def test_an_edit_counts_in_every_other_module_too(program: Program, data: st.DataObject) -> None:
    rooms = {place: data.draw(st.sampled_from(["main", "part"])) for place in range(len(program))}
    place = data.draw(st.sampled_from(range(len(program))))
    changed = digests(edited(program, place), rooms=rooms) != digests(program, rooms=rooms)
    assert changed == (place in reached(program))


@given(program=programs())
def test_the_definitions_are_named_after_their_module(program: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = Code(written(Path(folder), program)).fingerprint(("stages.main", "run")).definitions
    texts = {name.removeprefix("stages.main:") for name in found} - {"<import>"}
    own = {program[place].name for place in reached(program) if program[place].kind != "outside"}
    assert texts == own


def module(tmp_path: Path, text: str) -> Callable[[str], int]:
    """How many statements of a module make up a name."""
    path = tmp_path / "part.py"
    path.write_text(text)
    found = load_module(path, "stages.part")
    return lambda name: len(found.nodes(name))


def test_a_name_that_is_bound_twice_has_both_statements(tmp_path: Path) -> None:
    statements = module(tmp_path, "try:\n    import fast\nexcept ImportError:\n    fast = None\nfast = 3\n")
    assert statements("fast") == 2
    assert statements("<import>") == 1
    assert statements(EVERYTHING) == statements("nosuch") == 0


def test_a_file_is_parsed_again_only_after_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "part.py"
    path.write_text("LIMIT = 3\n")
    first = load_module(path, "stages.part")
    assert load_module(path, "stages.part") is first
    path.write_text("LIMIT = 30\n")
    assert load_module(path, "stages.part") is not first


@pytest.mark.parametrize(
    "text",
    [
        "from stages.part import act\n\n\ndef run(x):\n    return act(x)\n",
        "from stages import part\n\n\ndef run(x):\n    return part.act(x)\n",
        "from stages.part import *\n\n\ndef run(x):\n    return act(x)\n",
        "from stages import part\n\n\ndef run(x):\n    return (lambda module: module.act(x))(part)\n",
    ],
    ids=["by name", "through the module", "by a star", "with the module passed around"],
)
def test_an_import_of_another_package_counts_where_it_is_passed_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").touch()
    (tmp_path / "stages/main.py").write_text(text)
    found = []
    for number, name in enumerate(("silu", "gelu", "silu")):
        (tmp_path / "stages/part.py").write_text(f"from torch.nn.functional import {name} as act\n")
        os.utime(tmp_path / "stages/part.py", (number, number))  # edits of one size can fall into one tick of the clock
        found.append(Code(tmp_path).fingerprint(("stages.main", "run")).digests)
    assert found[0] == found[2] != found[1]
