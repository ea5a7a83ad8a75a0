import logging
import logging.config

import pytest

from pipeline.cli.screen_log import warnings_on_screen


@pytest.mark.parametrize("package", ["pipeline.tracking.tracker", "stages.runtime.artifact", "conf.load", "pipeline"])
def test_a_warning_of_ours_is_one_line_on_the_screen(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_on_screen():
        logging.getLogger(package).info("details")
        logging.getLogger(package).warning("%s is\nslow", "MLflow")
        logging.getLogger("someone.else").warning("not ours")
    logging.getLogger(package).warning("after the command")
    assert capsys.readouterr().err == "warning: MLflow is slow\n"


def test_a_root_logger_set_to_critical_as_by_prefect_swallows_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    with warnings_on_screen():
        console = {"class": "logging.StreamHandler", "level": "CRITICAL"}
        try:
            logging.config.dictConfig(
                {
                    "version": 1,
                    "disable_existing_loggers": False,
                    "handlers": {"console": console},
                    "root": {"level": "WARNING", "handlers": ["console"]},
                }
            )
            logging.getLogger("pipeline.tracking").warning("MLflow is slow")
        finally:
            root.setLevel(level)
            root.handlers[:] = handlers
    assert capsys.readouterr().err == "warning: MLflow is slow\n"
