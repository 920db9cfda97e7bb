"""Evaluation of a trained model on a split: metrics, simple baselines on the same features, published results, report.

This file imports nothing: the metrics can be computed without matplotlib and torch.
"""
