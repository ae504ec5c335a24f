"""Manual review of rows in the browser."""
