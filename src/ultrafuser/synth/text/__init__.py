"""Parses, filters and checks what models wrote."""
