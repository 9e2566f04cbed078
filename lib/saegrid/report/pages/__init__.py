"""Pages of the report, one module each."""
