"""Tools for data sets: validate, decontaminate, deduplicate, split, count, convert."""
