"""From tables to numbers: findings, intervals, selection. Free of torch and HTML."""
