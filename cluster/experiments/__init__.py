"""Run whole experiments: evaluation of a run, reproduction of published results, the demo."""
