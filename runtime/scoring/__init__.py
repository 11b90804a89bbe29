"""Offline scoring: many pictures by one bundle into Parquet files, in processes of this machine or on Ray."""
