"""The final model of an iteration measured by lm-eval: on the recipe's own held-out problems, and on others' tasks."""
