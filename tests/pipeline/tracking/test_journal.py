from pathlib import Path

from pipeline.tracking.journal import Journal, unfinished


def test_sent_events_are_not_sent_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "1")
    journal.append("pipeline_started", name="a")
    journal.append("stage_started", stage="train")
    journal.sent, journal.run_id = 1, "abc"
    journal.save()
    journal.close()
    again = Journal(tmp_path / "1")
    assert [event["event"] for event in again.unsent()] == ["stage_started"]
    assert again.run_id == "abc"
    again.remove()
    assert not (tmp_path / "1").exists()


def test_a_journal_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    live = Journal(tmp_path / "1")
    live.append("pipeline_started")
    assert live.lock()
    assert unfinished(tmp_path) == []
    live.close()
    (found,) = unfinished(tmp_path)
    found.close()


def test_a_killed_process_is_completed_with_how_it_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "1")
    for kind, stage in (
        ("pipeline_started", ""),
        ("stage_started", "a"),
        ("stage_finished", "a"),
        ("stage_started", "b"),
    ):
        journal.append(kind, stage=stage)
    journal.close()
    with (tmp_path / "1" / "events.jsonl").open("a") as file:
        file.write('{"event": "stage_fin')  # torn by the kill
    (found,) = unfinished(tmp_path)
    found.complete()
    ends = [(event["event"], event.get("stage"), event.get("status")) for event in found.unsent()[4:]]
    assert ends == [("stage_failed", "b", "KILLED"), ("pipeline_finished", None, "KILLED")]
    found.complete()
    assert len(found.unsent()) == 6
    found.close()
