"""The methods, the datasets, the training loop and the evaluation."""
