"""Data sets whose images stay in tars and Parquet files of others, wherever these are."""
