"""Evaluate a trained model on a split: metrics, simple baselines on the same features, published results, the
report.
"""
