"""Metrics as `evaluate` modules: one self-contained folder each, which loads by path and goes to the Hub as it is.

In a checkout `evaluate.load("evaluation/medical_vqa")`; from an installed package
`evaluate.load(str(importlib.resources.files("lladamedv.evaluation") / "medical_vqa"))`.
"""
