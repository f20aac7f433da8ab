"""Features of many images as one Parquet file: a row for each image, and how they were made in the file's metadata."""
