"""Specialists, hand-made rows and exams for SmolLM2-135M-Instruct."""
