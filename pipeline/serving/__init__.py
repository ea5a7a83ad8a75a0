"""The pipeline as Prefect flows. No other package imports Prefect."""
