"""The only code that opens Zarr or Parquet."""
