"""Stages of the pipeline: lists of topics and instructions, then texts."""
