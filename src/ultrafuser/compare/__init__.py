"""Builds, measures and reports the alternatives that a recipe lists."""
