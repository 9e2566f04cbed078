"""Pages of the report, a module each."""
