"""The campaign's own rules, and a short campaign where CAMPAIGN asks for it: it takes half an hour."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from campaign.__main__ import KINDS, main, rows
from campaign.rows import Outcome, Result, Results, Row, run_rows, table
from campaign.workplace import Workplace


def test_rows_are_the_same_for_the_same_seed_and_have_names_of_their_own(tmp_path: Path) -> None:
    place = Workplace(tmp_path, "evaluate", 1.0)
    names = [[row.name for row in rows(place, list(KINDS), 20, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == len(names[0])
    counts = {kind: len(list(make(place, 20, 0))) for kind, make in KINDS.items()}
    assert counts == {"kills": 100, "damage": 40, "hostile": 20, "servers": 15}


def test_an_interrupted_campaign_goes_on_with_the_next_row_and_an_error_of_a_row_is_a_loss(tmp_path: Path) -> None:
    ran: list[str] = []

    def outcome(name: str) -> Outcome:
        ran.append(name)
        if name == "broken":
            raise ValueError("no\nhome")
        return Outcome(verdict="survived", said="a line", open_ports=("python 0.0.0.0",))

    def row(name: str) -> Row:
        return Row(kind="kills", name=name, run=lambda: outcome(name))

    shown: list[Result] = []
    run_rows([row("one")], Results(tmp_path / "results.jsonl"), shown.append)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"kind": "kills", "na')  # killed while it wrote
    results = run_rows([row("one"), row("broken")], Results(tmp_path / "results.jsonl"), shown.append)
    assert ran == ["one", "broken"]
    assert [result.verdict for result in results] == ["survived", "lost"]
    assert results[1].said == "the row failed: ValueError: no home"
    assert table(results)[-1].split() == ["all", "2", "1", "1", "0", "0", "python", "0.0.0.0"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif("CAMPAIGN" not in os.environ, reason="the campaign takes hours: set CAMPAIGN=1")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_and_nothing_is_silent(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "campaign"  # the kinds share an undisturbed run
    assert main(["--kind", kind, "--times", "2", "--folder", str(folder)]) == 0
