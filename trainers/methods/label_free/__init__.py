"""Methods that need neither labels nor pairs: directions fitted to frozen features, and a contrastive head.

`projections` has the mathematics, which the baselines of the evaluation use too; `fitted` the methods without gradient
steps.
"""
